"""`flashbias run` and `flashbias doctor` as subprocesses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINI_CMT = ROOT / "examples" / "mini_cmt"


def flashbias(*words, cwd=None, **env):
    full = {k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")}
    full["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", "flashbias_patch.cli.main", *words],
        env={**full, **env},
        cwd=cwd,
        text=True,
        capture_output=True,
    )


# One write, for ranks share the pipe and print makes two of an unbuffered line.
REPORT = (
    "import sys, flashbias_patch, torch; sys.stdout.write('installed %s ' % "
    "flashbias_patch.status()['installed'])"
)


@pytest.mark.parametrize(
    "command",
    [
        ["{python}", "-c", REPORT],
        ["bash", "-c", '{python} -c "' + REPORT + '"'],
        ["--", "{python}", "script.py"],
        [
            "--",
            "{python}",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "script.py",
        ],
        ["--", "{python}", "spawn.py"],
    ],
)
def test_run_patches_every_python_of_a_command(command, tmp_path):
    (tmp_path / "script.py").write_text(REPORT)
    (tmp_path / "spawn.py").write_text(
        "import torch.multiprocessing as mp\n"
        "def work(i):\n    exec(" + repr(REPORT) + ")\n"
        "if __name__ == '__main__':\n    mp.spawn(work, nprocs=2)\n"
    )
    done = flashbias(
        "run", *(word.format(python=sys.executable) for word in command), cwd=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    ranks = 2 if any("distributed" in w or "spawn" in w for w in command) else 1
    assert done.stdout.count("installed True") == ranks


def test_run_off_and_exit_status(tmp_path):
    done = flashbias("run", "--off", sys.executable, "-c", REPORT)
    assert "installed False" in done.stdout
    assert flashbias("run", "--", sys.executable, "-c", "raise SystemExit(7)").returncode == 7


def test_run_chains_to_the_users_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    done = flashbias(
        "run", sys.executable, "-c", REPORT, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])
    )
    assert done.stdout.split() == [
        "theirs",
        "theirs",
        "installed",
        "True",
    ]  # flashbias itself, then the command


def test_run_mistakes():
    missing = flashbias("run")
    assert missing.returncode == 2 and "CMD is missing" in missing.stderr
    unknown = flashbias("run", "no-such-program-anywhere")
    assert unknown.returncode == 127 and "no-such-program-anywhere" in unknown.stderr
    setting = flashbias("run", "true", FLASHBIAS_DTYPE="fp8")
    assert (
        setting.returncode == 2
        and "FLASHBIAS_DTYPE='fp8'" in setting.stderr
        and "bf16" in setting.stderr
    )


def test_doctor_json_for_a_repository():
    done = flashbias("doctor", "--json", "--repo", str(MINI_CMT))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["packages"]["torch"] and report["backends"]["reference"] == []
    assert report["backends"]["triton"], "there is no GPU here: triton must say why not"
    found = {(item["class"], item["reason"]) for item in report["repository"]}
    assert {
        ("PETRMultiheadAttention", None),
        ("FlashMHA", None),
        ("MultiheadAttention", None),
    } <= found


def test_doctor_text_and_mistakes(tmp_path):
    (tmp_path / "odd.py").write_text(
        "class FlashMHA:\n    def forward(self, qkv, cu_seqlens): ...\n"
    )
    (tmp_path / "broken.py").write_text("class FlashMHA(:\n")
    text = flashbias("doctor", "--repo", str(tmp_path)).stdout
    assert "left alone: its forward takes (qkv, cu_seqlens)" in text and "does not parse" in text
    assert "reference  supported" in text and "GPU: none" in text
    assert flashbias("doctor", "--repo", str(tmp_path / "nowhere")).returncode == 2


def test_doctor_reports_known_problems(monkeypatch):
    from flashbias_patch import compat
    from flashbias_patch.cli import doctor
    from flashbias_patch.compat import machine

    issue = machine.Issue("mmcv is too new", "install an older one")
    monkeypatch.setattr(compat, "known_issues", lambda: [issue])
    report = doctor.examine()
    assert report["unmendable"] == [{"what": "mmcv is too new", "cure": "install an older one"}]
    assert "problem: mmcv is too new\n  fix: install an older one" in doctor.as_text(report)


# -- run: what wins, the line at exit --------------------------------------------------------------

CALLS = """
import sys; sys.path.insert(0, {repo!r})
import torch
from projects.mmdet3d_plugin.models.utils.petr_transformer import PETRMultiheadAttention
x = torch.randn(5, 2, 16)
PETRMultiheadAttention(16, 2)(x, x, x)
"""


@pytest.fixture
def training(tmp_path):
    (tmp_path / "train.py").write_text(CALLS.format(repo=str(MINI_CMT)))
    return [sys.executable, str(tmp_path / "train.py")]


def test_off_by_the_variable_wins():
    code = "import flashbias_patch; print(flashbias_patch.status()['installed'])"
    for value in ("0", "none", "Off"):
        done = flashbias("run", sys.executable, "-c", code, FLASHBIAS_PATCH=value)
        assert done.stdout == "False\n" and done.stderr.count("runs unpatched") == 1
    assert flashbias("run", sys.executable, "-c", code, FLASHBIAS_PATCH="").stdout == "True\n"


def test_one_line_at_exit(training):
    done = flashbias("run", "--", *training)
    (line,) = done.stderr.splitlines()
    assert line.startswith("flashbias_patch: patched ") and "PETRMultiheadAttention" in line
    assert (
        "attention calls: sdpa 1; fallbacks: none; biases without effect: none" in line
        and done.stdout == ""
    )
    assert flashbias("run", "--", *training, FLASHBIAS_SUMMARY="0").stderr == ""


def test_the_line_elsewhere_and_without_a_class():
    code = "import flashbias_patch, torch"
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")}
    env.update(PYTHONPATH=str(ROOT), FLASHBIAS_SUMMARY="1")
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert done.stderr.count("no class was patched") == 1
    done = subprocess.run(
        [sys.executable, "-c", "import flashbias_patch"], env=env, text=True, capture_output=True
    )
    assert done.stderr == "", "without torch there is nothing to tell"
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport os; os.close(2)"],
        env=env,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0 and done.stderr == ""


def test_the_line_names_fallbacks_and_biases(monkeypatch):
    from flashbias_patch import summary, telemetry

    telemetry.calls["sdpa"] += 3
    for _ in range(2):
        telemetry.fallback("triton", "a call", "no " + "very " * 50 + "good reason")
    telemetry.fallback("flash", "a call", "another\nreason")
    telemetry.unreached("attention_bias(...)", "no attention was called")
    line = summary.line()
    assert "\n" not in line and "attention calls: sdpa 3" in line and len(line) < 500
    assert "fallbacks: 3 (triton: no very" in line and "... and 1 more)" in line
    assert "biases without effect: 1 (attention_bias(...): no attention was called)" in line
    monkeypatch.setenv("RANK", "3")
    assert summary.line().startswith("flashbias_patch: [rank 3] ")


def test_the_line_counts_a_bias_that_no_attention_took(installed, caplog):
    import torch

    from flashbias_patch import summary

    for _ in range(2):
        with installed.attention_bias(torch.zeros(3, 4)):
            pass
    (entry,) = installed.status()["unreached"]
    assert entry["where"] == "attention_bias(kind='cross')" and entry["count"] == 2
    assert (
        "biases without effect: 2 (attention_bias(kind='cross'): no patched attention"
        in summary.line()
    )
    assert caplog.text.count("has no effect") == 1


@pytest.mark.parametrize("rank, calls, told", [("", 1, True), ("0", 0, True), ("1", 1, False)])
def test_who_prints_the_line(monkeypatch, rank, calls, told):
    from flashbias_patch import summary, telemetry

    monkeypatch.setenv("RANK", rank)
    if calls:
        telemetry.calls["sdpa"] += calls
    assert (summary.line() is not None) == told
    monkeypatch.setitem(sys.modules, summary.LAUNCHER, summary)
    assert (summary.line() is not None) == (told and calls > 0)


def test_a_script_without_a_first_line_runs_as_in_a_shell(tmp_path):
    (tmp_path / "go.sh").write_text("echo hi $1\n")
    (tmp_path / "go.sh").chmod(0o755)
    done = flashbias("run", "--", "./go.sh", "there", cwd=str(tmp_path))
    assert (done.stdout, done.returncode) == ("hi there\n", 0)


@pytest.mark.parametrize(
    "words, option",
    [
        (["python", "-I", "x.py"], "-I"),
        (["/usr/bin/python3.11", "-uE", "x.py"], "-E"),
        (["python3", "-S", "-m", "x"], "-S"),
        (["python", "x.py", "-I"], None),
        (["python", "-c", "1", "-I"], None),
        (["python", "-cI"], None),
        (["python"], None),
        (["python", "-WI", "x.py"], None),
        (["bash", "-I"], None),
        (["python", "-u", "-X", "dev", "x.py"], None),
    ],
)
def test_options_that_hide_the_package_are_seen(words, option):
    from flashbias_patch.cli.run import ignores_path

    assert ignores_path(words) == option


# -- names, once, by every door --------------------------------------------------------------------

MISSPELT = {
    "FLASHBIAS_DTYPE": ("fp-16", "the nearest is 'fp16'"),
    "FLASHBIAS_TARGETS": ("PetrMultiHeadAttention", "the nearest is PETRMultiheadAttention"),
}


@pytest.mark.parametrize("name", list(MISSPELT))
@pytest.mark.parametrize("door", ["import", "run", "doctor"])
def test_misspelt_values_are_named_once_by_every_entry_point(name, door):
    text, named = MISSPELT[name]
    if door == "import":
        env = {k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")}
        install = "import subprocess, sys, flashbias_patch; flashbias_patch.install()"
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"{install}; subprocess.run([sys.executable, '-c', {install!r}])",
            ],
            text=True,
            capture_output=True,
            env={**env, "PYTHONPATH": str(ROOT), name: text},
        )
        assert done.returncode == 0
    else:
        done = flashbias(*{"run": ("run", "true"), "doctor": ("doctor",)}[door], **{name: text})
        assert done.returncode == 2 and "nothing was run" in done.stderr
    assert done.stderr.count(named) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", ["run -- {python} -c 'import flashbias_patch'", "bench --shapes list"]
)
def test_an_unknown_variable_is_named_once_and_does_not_stop_anything(words):
    done = flashbias(*shlex.split(words.format(python=sys.executable)), FLASHBIAS_BACKENDS="sdpa")
    assert (
        done.returncode == 0 and done.stderr.count("the nearest known is FLASHBIAS_BACKEND.") == 1
    )


# -- the guard -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, part, status",
    [
        (PermissionError(13, "Permission denied", "/x/y"), "'/x/y': Permission denied", 2),
        (OSError("odd"), "odd", 2),
        (RecursionError("deep"), "nested too deeply", 2),
        (KeyboardInterrupt(), "interrupted", 130),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "cannot be decoded", 2),
        (json.JSONDecodeError("Expecting value", "", 0), "not valid JSON", 2),
    ],
)
def test_errors_of_the_surroundings_are_one_line(capsys, error, part, status):
    from flashbias_patch.cli import main

    def fail():
        raise error

    assert main.guarded("doctor", fail) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flashbias doctor: ") and part in line


def test_mistakes_of_this_package_keep_their_traceback():
    from flashbias_patch.cli import main

    with pytest.raises(ZeroDivisionError):
        main.guarded("doctor", lambda: 1 // 0)


@pytest.mark.parametrize("words", ["doctor", "bench --shapes list"])
def test_a_closed_pipe_ends_it_quietly(words):
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")},
        "PYTHONPATH": str(ROOT),
    }
    command = (
        f"{sys.executable} -m flashbias_patch.cli.main {words} | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], env=env, text=True, capture_output=True)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize("words", ["bench --shapes list", "report nowhere", "ab --help"])
@pytest.mark.parametrize("end", [">&-", "> /dev/full"])
def test_standard_output_that_takes_nothing_costs_no_traceback(words, end):
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")},
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m flashbias_patch.cli.main {words} {end}"],
        env=env,
        text=True,
        capture_output=True,
    )
    assert done.returncode in (0, 2) and len(done.stderr.splitlines()) == done.returncode // 2, (
        done.stderr
    )


INTERRUPTS = """
import signal, sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
"""


@pytest.mark.parametrize(
    "words, importing",
    [
        ("doctor", "argparse"),
        ("run -- true", "flashbias_patch.cli.bench"),
        ("tune --show", "torch"),
        ("report nowhere", "numpy"),
        ("ab -- true", "flashbias_patch.ab.report"),
    ],
)
def test_an_interrupt_while_it_starts_is_one_line(tmp_path, words, importing):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS.format(name=importing))
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")},
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "flashbias_patch.cli.main", *words.split()],
        env=env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    command = "" if words.startswith("-") else " " + words.split()[0]
    assert (done.returncode, done.stdout, done.stderr) == (
        130,
        "",
        f"flashbias{command}: interrupted\n",
    )


# -- doctor on any tree ----------------------------------------------------------------------------

FORK = (
    "class PETRMultiheadAttention(object):\n    def forward(self, query, key=None, value=None, "
    "attn_mask=None,"
    " key_padding_mask=None): ...\n"
)


def test_doctor_on_an_odd_tree(tmp_path):
    from flashbias_patch.cli import doctor

    (tmp_path / "fork.py").write_text(FORK)
    (tmp_path / "latin.py").write_bytes(
        "# -*- coding: latin-1 -*-\n# café\n".encode("latin-1") + FORK.encode()
    )
    (tmp_path / "undecodable.py").write_bytes(b"# FlashMHA \xff\n")
    (tmp_path / "nul.py").write_bytes(b"class FlashMHA:\n\0 pass\n")
    (tmp_path / "python2.py").write_text("class FlashMHA: pass\nprint 'x'\n")
    (tmp_path / "deep.py").write_text("class FlashMHA: pass\nx = " + "-" * 100000 + "1\n")
    (tmp_path / "escape.py").write_text("'\\d'\n" + FORK)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.py").symlink_to("self.py")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "device.py").symlink_to("/dev/zero")
    (tmp_path / b"\xff.py".decode("utf-8", "surrogateescape")).write_text(FORK)
    done = flashbias("doctor", "--repo", str(tmp_path), PYTHONIOENCODING="utf-8")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = {item["file"]: item for item in doctor.scan(str(tmp_path))}
    assert all(
        os.fsencode(name).decode("utf-8", "backslashreplace") in done.stdout
        for name in found
        if name[0] < "~"
    )
    patched = {name for name, item in found.items() if item["reason"] is None}
    assert {"fork.py", "latin.py", "escape.py"} < patched and len(patched) == 4
    expected = {
        "undecodable.py": "does not parse",
        "nul.py": "does not parse",
        "python2.py": "does not parse",
        "deep.py": "nested too deeply",
        "dangling.py": "No such file",
        "self.py": "cannot be read",
        "pipe.py": "not a regular file",
        "device.py": "not a regular file",
    }
    for name, part in expected.items():
        assert part in found[name]["reason"], (name, found.get(name))
    assert len(found) == len(expected) + len(patched)


def test_doctor_knows_the_targets_setting(monkeypatch, tmp_path):
    from flashbias_patch import settings
    from flashbias_patch.cli import doctor

    (tmp_path / "fork.py").write_text(FORK)
    monkeypatch.setenv("FLASHBIAS_TARGETS", "FlashMHA")
    settings.reload()
    (item,) = doctor.scan(str(tmp_path))
    assert item["reason"] == "FLASHBIAS_TARGETS does not name PETRMultiheadAttention"


def test_an_unreadable_folder_is_named(monkeypatch, tmp_path):
    from flashbias_patch.cli import doctor

    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "closed")))
        return iter(())

    monkeypatch.setattr(doctor.os, "walk", walk)
    (item,) = doctor.scan(str(tmp_path))
    assert item == {"class": None, "file": "closed", "reason": "cannot be read: Permission denied"}
