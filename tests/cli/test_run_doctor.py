"""`flashbias run` and `flashbias doctor` as subprocesses."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINI_CMT = ROOT / "examples" / "mini_cmt"


def flashbias(*words, cwd=None, **env):
    full = {k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")}
    full["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, "-m", "flashbias_patch.cli.main", *words], env={**full, **env}, cwd=cwd,
                          text=True, capture_output=True)


# One write, for ranks share the pipe and print makes two of an unbuffered line.
REPORT = "import sys, flashbias_patch, torch; sys.stdout.write('installed %s ' % flashbias_patch.status()['installed'])"


@pytest.mark.parametrize("command", [
    ["{python}", "-c", REPORT],
    ["bash", "-c", "{python} -c \"" + REPORT + "\""],
    ["--", "{python}", "script.py"],
    ["--", "{python}", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"],
    ["--", "{python}", "spawn.py"],
])
def test_run_patches_every_python_of_a_command(command, tmp_path):
    (tmp_path / "script.py").write_text(REPORT)
    (tmp_path / "spawn.py").write_text(
        "import torch.multiprocessing as mp\n"
        "def work(i):\n    exec(" + repr(REPORT) + ")\n"
        "if __name__ == '__main__':\n    mp.spawn(work, nprocs=2)\n")
    done = flashbias("run", *(word.format(python=sys.executable) for word in command), cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr
    ranks = 2 if any("distributed" in w or "spawn" in w for w in command) else 1
    assert done.stdout.count("installed True") == ranks


def test_run_off_and_exit_status(tmp_path):
    done = flashbias("run", "--off", sys.executable, "-c", REPORT)
    assert "installed False" in done.stdout
    assert flashbias("run", "--", sys.executable, "-c", "raise SystemExit(7)").returncode == 7


def test_run_chains_to_the_users_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    done = flashbias("run", sys.executable, "-c", REPORT, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.stdout.split() == ["theirs", "theirs", "installed", "True"]  # flashbias itself, then the command


def test_run_mistakes():
    missing = flashbias("run")
    assert missing.returncode == 2 and "CMD is missing" in missing.stderr
    unknown = flashbias("run", "no-such-program-anywhere")
    assert unknown.returncode == 127 and "no-such-program-anywhere" in unknown.stderr
    setting = flashbias("run", "true", FLASHBIAS_DTYPE="fp8")
    assert setting.returncode == 2 and "FLASHBIAS_DTYPE='fp8'" in setting.stderr and "bf16" in setting.stderr


def test_doctor_json_for_a_repository():
    done = flashbias("doctor", "--json", "--repo", str(MINI_CMT))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["packages"]["torch"] and report["backends"]["reference"] == []
    assert report["backends"]["triton"], "there is no GPU here: triton must say why not"
    found = {(item["class"], item["reason"]) for item in report["repository"]}
    assert {("PETRMultiheadAttention", None), ("FlashMHA", None), ("MultiheadAttention", None)} <= found


def test_doctor_text_and_mistakes(tmp_path):
    (tmp_path / "odd.py").write_text("class FlashMHA:\n    def forward(self, qkv, cu_seqlens): ...\n")
    (tmp_path / "broken.py").write_text("class FlashMHA(:\n")
    text = flashbias("doctor", "--repo", str(tmp_path)).stdout
    assert "left alone: its forward takes (qkv, cu_seqlens)" in text and "does not parse" in text
    assert "reference  takes it" in text and "GPU: none" in text
    assert flashbias("doctor", "--repo", str(tmp_path / "nowhere")).returncode == 2


def test_doctor_names_what_cannot_be_mended(monkeypatch):
    from flashbias_patch import compat
    from flashbias_patch.cli import doctor

    monkeypatch.setattr(compat, "unmendable", lambda: [("mmcv is too new", "install an older one")])
    report = doctor.examine()
    assert report["unmendable"] == [{"what": "mmcv is too new", "cure": "install an older one"}]
    assert "in the way: mmcv is too new\n  cure: install an older one" in doctor._text(report)
