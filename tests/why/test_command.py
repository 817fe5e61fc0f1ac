"""The command `flashbias why`: exit status, formats, patched and not, custom_keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashbias_patch.why import links
from tests.support import internals

from .programs import MODEL, PROGRAMS

ROOT = Path(__file__).resolve().parents[2]


def why(*words, **env):
    full = {k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")}
    full["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", "flashbias_patch.cli.main", "why", *words],
        env={**full, **env},
        text=True,
        capture_output=True,
        timeout=240,
    )


@pytest.fixture
def program(tmp_path):
    def write(name):
        path = tmp_path / "train.py"
        path.write_text(MODEL + PROGRAMS[name][0])
        return str(path)

    return write


def test_a_broken_link_in_json(program):
    done = why("--json", "--steps", "3", "bias_scale", "--", sys.executable, program("detached"))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    (found,) = report["diagnoses"]
    assert found["broken"]["cause"] == "detached" and "train.py" in found["broken"]["finding"]
    assert report["steps"] == 3 and report["patched"] and not report["notes"]


def test_a_command_that_is_none():
    assert why("bias_scale").returncode == 2
    assert why("bias_scale", "--", "no_such_program_here").returncode == 127
    assert "at least 2" in why("bias_scale", "--steps", "1", "--", "true").stderr
    assert "at least 2" in why("--steps", "1", "bias_scale", "--", "true").stderr
    done = why(
        "bias_scale", "--", sys.executable, "-c", "import sys; print('the end'); sys.exit(3)"
    )
    assert done.returncode == 3 and "exit status 3" in done.stderr and "the end" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("off", [False, True])
def test_a_router_in_mini_cmt(off):
    """Patched, the router's scale learns through checkpoints and the flash class; unpatched there
    is none."""
    flash = (
        [] if off else ["--attn", "PETRMultiheadFlashAttention"]
    )  # which does not run unpatched without flash-attn
    command = [
        sys.executable,
        str(ROOT / "examples/mini_cmt/tools/train.py"),
        "--steps",
        "8",
        *flash,
    ]
    done = why(
        "--markdown", *(["--off"] if off else []), "bias_scale", "--", *command, FLASHBIAS_AQR="1"
    )
    assert done.returncode == int(off), done.stdout + done.stderr
    assert (
        "no module has a parameter called bias_scale" if off else "aqr.bias_scale: it learns"
    ) in done.stdout


def test_the_longest_custom_key_decides():
    paramwise = [
        {
            "base_lr": 2e-4,
            "custom_keys": {
                "img_backbone": {"lr_mult": 0.1},
                "aqr": {"lr_mult": 1.0},
                "aqr.bias": {"lr_mult": 0.0},
            },
        }
    ]
    keys = links.matching_keys("head.transformer.aqr.bias_scale", paramwise)
    assert [key for key, _ in keys] == ["aqr.bias", "aqr"]
    entry = {
        "name": "head.transformer.aqr.bias_scale",
        "replaced": False,
        "stale": False,
        "steps": [{"lr": 0.0}],
        "groups": [
            {
                "optimizer": "AdamW",
                "index": 0,
                "of": 1,
                "lr": 0.0,
                "largest_lr": 2e-4,
                "weight_decay": 0.0,
            }
        ],
    }
    found = internals.optimizer_link(entry, {"paramwise": paramwise, "skipped": 0, "steps": 1})
    assert found["cause"] == "lr 0" and "custom_keys['aqr.bias']" in found["finding"]


def test_the_constructor_of_mmcv_is_read(tmp_path):
    """A module of that name with a DefaultOptimizerConstructor: its paramwise_cfg is in the
    facts."""
    package = tmp_path / "mmcv" / "runner" / "optimizer"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    (package / "default_constructor.py").write_text(
        "import torch\nclass DefaultOptimizerConstructor:\n    def __init__(self, cfg, "
        "paramwise_cfg=None):\n"
        "        self.base_lr, self.paramwise_cfg = cfg['lr'], paramwise_cfg\n    def "
        "__call__(self, model):\n"
        "        groups = [dict(params=[p], lr=0.0 if 'bias_scale' in n else 0.1) for n, p in "
        "model.named_parameters()]\n"
        "        return torch.optim.SGD(groups, lr=self.base_lr)\n"
    )
    (tmp_path / "train.py").write_text(
        MODEL
        + "from mmcv.runner.optimizer.default_constructor import DefaultOptimizerConstructor as "
        "Constructor\n"
        "keys = {'router': dict(lr_mult=1.0), 'bias_scale': dict(lr_mult=0.0)}\n"
        "train(model, optimizer=Constructor(dict(lr=0.1), dict(custom_keys=keys))(model))"
    )
    done = why("bias_scale", "--", sys.executable, str(tmp_path / "train.py"))
    assert "learning rate is 0 (paramwise_cfg.custom_keys['bias_scale']" in done.stdout, (
        done.stdout + done.stderr
    )
