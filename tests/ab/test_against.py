"""`flashbias ab --against OLD`: A of an earlier comparison, or a refusal that says why."""

from __future__ import annotations

import json
import os

import pytest

from flashbias_patch.ab import reading, report, runner, saved, sides, timing_notes
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.runner import Options
from flashbias_patch.cli import main as cli

from .test_runner import command

OPTIONS = dict(repeats=2, steps=12, warmup=2, noise_run=False, timeout=20)


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no git: of no commit
    return command(tmp_path, "train(100)")


@pytest.fixture
def old(tmp_path, words):
    runner.run_all(words, str(tmp_path / "old"), Options(**OPTIONS))
    return str(tmp_path / "old")


def against(tmp_path, words, old, **options):
    out = str(tmp_path / "new")
    made = []
    runner.run_all(
        words,
        out,
        Options(**{**OPTIONS, "against": old, **options}),
        lambda event, run: made.append(run["label"]) if event == "start" else None,
    )
    return out, made


def refusal(tmp_path, words, old, **options):
    with pytest.raises(saved.Refused) as raised:
        against(tmp_path, words, old, **options)
    assert not (tmp_path / "new").exists()
    return str(raised.value)


def rewrite(old, **changes):
    path = os.path.join(old, "ab.json")
    with open(path) as file:
        document = json.load(file)
    document.update(changes)
    with open(path, "w") as file:
        json.dump(document, file)


def test_only_b_is_run(tmp_path, words, old):
    out, made = against(tmp_path, words, old)
    assert made == ["B", "B"]
    experiment = reading.load(out)
    assert [run.label for run in experiment.runs] == ["A", "A", "B", "B"]
    assert [run.name for run in experiment.runs] == ["A1", "A2", "B3", "B4"]
    found = judge(experiment)
    assert not found.failed and found.speed is not None and found.parity_word == "identical"
    text = report.text(experiment, found)
    assert "A was not run again" in text and old in text
    assert experiment.schedule == "BB" and all(run.saved == old for run in experiment.runs[:2])


def test_further_sides_are_run_beside_the_a_that_was_kept(tmp_path, words, old):
    further = [sides.Side("sdpa", {"FLASHBIAS_BACKEND": "sdpa"})]
    out, made = against(tmp_path, words, old, sides=further)
    assert made == ["B", "C", "C", "B"]
    experiment, found = _judged(out)
    assert [run.label for run in experiment.runs] == list("AABCCB")
    assert [each.side for each in found.every] == ["B", "C"] and not found.failed
    assert all(each.speed is not None and each.parity_word == "identical" for each in found.every)
    text = report.text(experiment, found)
    assert "C sdpa" in text and text.count("A was not run again") == 1


def test_the_reports_need_no_old_directory(tmp_path, words, old):
    out, _ = against(tmp_path, words, old)
    before = report.text(*_judged(out))
    os.rename(old, old + "-gone")
    assert report.text(*_judged(out)) == before


def _judged(out):
    experiment = reading.load(out)
    return experiment, judge(experiment)


def test_the_interval_is_that_of_a_busy_machine(tmp_path, words, old, monkeypatch):
    monkeypatch.setattr(timing_notes, "is_crowded", lambda run, experiment: False)
    together = judge(reading.load(old)).speed.mean
    apart = judge(reading.load(against(tmp_path, words, old)[0])).speed.mean
    assert apart.high / apart.low > 1.5 * together.high / together.low


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(command=["python", "other.py"]), "command"),
        (dict(cwd="/elsewhere"), "directory: '/elsewhere' there"),
        (dict(commit="0123456789"), "commit: '0123456789' there, '' here"),
        (dict(machine={"name": "other", "driver": None, "environment": {}}), "machine: 'other'"),
        (dict(host={"platform": "Other", "python": "2.7", "cpus": 1}), "python: '2.7' there"),
        (dict(machine=None), "machine"),
    ],
    ids=["command", "directory", "commit", "machine", "host", "not recorded"],
)
def test_what_differs_is_named(tmp_path, words, old, changes, said):
    if changes.get("machine", 0) is None:
        with open(os.path.join(old, "ab.json")) as file:
            document = json.load(file)
        del document["machine"]
        with open(os.path.join(old, "ab.json"), "w") as file:
            json.dump(document, file)
    else:
        rewrite(old, **changes)
    assert said in refusal(tmp_path, words, old)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(steps=11), "--steps: 12 there, 11 here"),
        (dict(seed=3), "--seed: 0 there, 3 here"),
        (dict(env_a={"X": "1"}), "--env-a: {} there"),
    ],
    ids=["steps", "seed", "env"],
)
def test_an_option_of_a_that_differs_is_named(tmp_path, words, old, options, said):
    assert said in refusal(tmp_path, words, old, **options)


def test_a_variable_that_differs_is_named(tmp_path, words, old, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "7")
        assert "CUDA_VISIBLE_DEVICES: '' there, '7' here" in refusal(tmp_path, words, old)
    monkeypatch.setenv("FLASHBIAS_BACKEND", "sdpa")  # changes B alone
    assert against(tmp_path, words, old)[1] == ["B", "B"]


def test_uncommitted_changes_are_refused(tmp_path, words, monkeypatch):
    monkeypatch.setattr(runner.history, "commit_of", lambda directory: "0123456789+")
    runner.run_all(words, str(tmp_path / "old"), Options(**OPTIONS))
    assert "uncommitted changes" in refusal(tmp_path, words, str(tmp_path / "old"))


def test_a_failed_a_is_refused(tmp_path, words):
    failing = command(tmp_path, "train(5); raise RuntimeError")
    runner.run_all(failing, str(tmp_path / "old"), Options(**OPTIONS))
    assert "A1, an A, is no result: crashed" in refusal(tmp_path, failing, str(tmp_path / "old"))
    assert "holds no ab.json" in refusal(tmp_path, words, str(tmp_path))


def test_other_versions_of_b_are_a_failure(tmp_path, words, old):
    """What the probe records in B's processes is not known before B has run."""
    for name in os.listdir(os.path.join(old, "runs")):
        place = os.path.join(old, "runs", name, "probe")
        for file in os.listdir(place):
            with open(os.path.join(place, file), "a") as probe:
                line = {"event": "environment", "torch": "2.0", "modules": {"mmcv": "1.7.1"}}
                probe.write(json.dumps(line) + "\n")
    newer = {"event": "environment", "torch": "2.1", "modules": {"mmcv": "1.7.1"}}
    (tmp_path / "script.py").write_text(
        (tmp_path / "script.py")
        .read_text()
        .replace("train(100)", f"probe._recorder.write({newer!r}); train(100)")
    )
    out, made = against(tmp_path, words, old)
    experiment, found = _judged(out)
    assert made == ["B"] and found.failed
    assert "torch 2.0 with A, 2.1 now" in report.text(experiment, found)


def test_the_command_line_refuses_in_one_line(tmp_path, words, old, capfd):
    status = cli.main(["ab", "--against", str(tmp_path), "--out", str(tmp_path / "new"), *words])
    said = capfd.readouterr()
    assert status == 2 and said.out == "" and not (tmp_path / "new").exists()
    assert said.err.startswith("flashbias ab: --against: ") and said.err.count("\n") == 1
    status = cli.main(["ab", "--against", old, "--repeats", "auto", *words])
    assert status == 2 and "--against: not with --repeats auto" in capfd.readouterr().err
