"""Paths that cannot be written are refused before a command runs or measures anything."""

import pytest

from flashbias_patch.cli import main as cli
from flashbias_patch.cli.terminal import unwritable

PROBLEMS = {
    "ab": ["ab", "--csv", "{directory}", "--", "true"],
    "bench": ["bench", "--shapes", "tiny", "--out", "{file}"],
    "report html": ["report", "{directory}", "--html", "{directory}"],
    "report csv": ["report", "{directory}", "--csv", "{file}/x.csv"],
    "report tensorboard": ["report", "{directory}", "--tensorboard", "{file}"],
    "history": ["report", "--history", "{directory}", "--markdown", "{directory}"],
}


@pytest.mark.parametrize("words", PROBLEMS.values(), ids=PROBLEMS)
def test_an_output_that_cannot_be_written_is_named_first(words, tmp_path, capfd):
    file = tmp_path / "file"
    file.write_text("kept")
    words = [word.format(directory=tmp_path, file=file) for word in words]
    assert cli.main(words) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    option = next(w for w in words if w.startswith("--") and w not in ("--shapes", "--history"))
    assert f": {option}: expected a " in said.err
    assert file.read_text() == "kept" and list(tmp_path.iterdir()) == [file]


def test_paths_that_can_be_written(tmp_path):
    assert unwritable("--out", str(tmp_path), directory=True) is None
    assert unwritable("--out", str(tmp_path / "a" / "b"), directory=True) is None
    assert unwritable("--csv", str(tmp_path / "a" / "b.csv")) is None
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "soon"])
def test_why_refuses_a_timeout_that_is_no_time(seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["why", "--timeout", seconds, "x", "--", "true"])
    assert ended.value.code == 2
    assert "--timeout: expected a number of seconds above 0" in capsys.readouterr().err


def test_why_prints_one_format(capfd):
    assert cli.main(["why", "--json", "--markdown", "x", "--", "true"]) == 2
    said = capfd.readouterr()
    assert said.out == "" and "--json: not with --markdown" in said.err
