"""mini_cmt from its command line: it trains, repeats itself, saves, loads and evaluates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.support.mini_cmt import MINI_CMT, SMALL, frame_dir

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant")

LINE = re.compile(r"step (\d+)/(\d+)  loss: (\S+)  .*grad_norm: (\S+)  time: [\d.]+  memory: \d+")


def sources():
    real = frame_dir()
    return [
        pytest.param([], id="synthetic"),
        pytest.param(
            ["--frame", str(real)],
            id="real",
            marks=[] if real else pytest.mark.skip(reason="no frame: set FLASHBIAS_FRAME"),
        ),
    ]


def losses(text):
    """[(loss, gradient norm)] of each step, as printed."""
    return [match.group(3, 4) for match in map(LINE.match, text.splitlines()) if match]


@pytest.mark.parametrize("source", sources())
def test_two_steps_twice_are_the_same(mini_cmt, capsys, source):
    runs = []
    for _ in range(2):
        mini_cmt.train.main([*SMALL, *source, "--steps", "2", "--modality-dropout", "0.5"])
        runs.append(losses(capsys.readouterr().out))
    assert len(runs[0]) == 2
    assert runs[0] == runs[1]
    mini_cmt.train.main(
        [*SMALL, *source, "--steps", "2", "--modality-dropout", "0.5", "--seed", "1"]
    )
    assert losses(capsys.readouterr().out) != runs[0]


def test_it_learns(mini_cmt, capsys):
    mini_cmt.train.main([*SMALL, "--steps", "25", "--dropout", "0", "--lr", "2e-3"])
    first, *_, last = (float(loss) for loss, _ in losses(capsys.readouterr().out))
    assert last < 0.85 * first


def test_saved_and_loaded_predictions_agree(mini_cmt, tmp_path):
    weights, before, after = (
        str(tmp_path / name) for name in ("last.pth", "before.json", "after.json")
    )
    mini_cmt.train.main([*SMALL, "--steps", "1", "--bs", "2", "--save", weights, "--eval", before])
    mini_cmt.train.main([*SMALL, "--steps", "0", "--bs", "2", "--load", weights, "--eval", after])
    with open(before) as a, open(after) as b:
        report, again = json.load(a), json.load(b)
    assert report == again
    assert [frame["token"] for frame in report["frames"]] == ["synthetic-0", "synthetic-1"]
    predictions = report["frames"][0]["predictions"]
    assert len(predictions["scores"]) == len(predictions["boxes"]) == 24 * 10  # queries x classes
    assert predictions["scores"] == sorted(predictions["scores"], reverse=True)
    assert all(len(box) == 9 and min(box[3:6]) > 0 for box in predictions["boxes"])
    assert set(predictions["names"]) <= set(report["classes"])


def test_missing_weights_are_named(mini_cmt, tmp_path, capsys):
    weights = str(tmp_path / "last.pth")
    mini_cmt.train.main([*SMALL, "--steps", "0", "--save", weights])
    checkpoint = torch.load(weights)
    del checkpoint["state_dict"]["pts_bbox_head.reference_points"]
    torch.save(checkpoint, weights)
    mini_cmt.train.main([*SMALL, "--steps", "0", "--load", weights])
    assert "missing pts_bbox_head.reference_points" in capsys.readouterr().err


def test_unknown_configuration_key_is_a_type_error(mini_cmt):
    key = "model.pts_bbox_head.transformer.aqr.enable=True"
    with pytest.raises(TypeError, match="aqr"):
        mini_cmt.train.main([*SMALL, key, "--steps", "0"])


def test_overridden_configuration_arrives(mini_cmt):
    path = "model.pts_bbox_head.transformer.decoder.transformerlayers"
    args = mini_cmt.train.parse_args(
        [*SMALL, path + ".with_cp=False", path + ".attn_cfgs.1.dropout=0.25"]
    )
    layer = mini_cmt.train.build(args)[1].pts_bbox_head.transformer.decoder.layers[0]
    assert layer.use_checkpoint is False
    assert [attention.attn.dropout for attention in layer.attentions] == [0.1, 0.25]


def python(*arguments):
    """Run in a process of its own, in the example's folder."""
    environment = {
        **os.environ,
        "FLASHBIAS_PATCH": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(MINI_CMT),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=str(MINI_CMT),
        env=environment,
        text=True,
        capture_output=True,
        timeout=240,
    )


def test_without_flash_attn_the_error_says_so():
    code = """
import sys
sys.modules["flash_attn"] = None
sys.argv = ["train.py", "--attn", "PETRMultiheadFlashAttention", "--steps", "0"]
import runpy
runpy.run_path("tools/train.py", run_name="__main__")
"""
    done = python("-c", code)
    assert done.returncode != 0
    assert "ImportError: PETRMultiheadFlashAttention needs flash-attn" in done.stderr
    assert "use PETRMultiheadAttention" in done.stderr


FLASH_STUB = """
import sys, types
for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["flash_attn.flash_attn_interface"].flash_attn_unpadded_kvpacked_func = None
for name in ("unpad_input", "pad_input", "index_first_axis"):
    setattr(sys.modules["flash_attn.bert_padding"], name, None)
"""


def test_flash_class_is_as_the_family_has_it():
    code = (
        FLASH_STUB
        + """
import torch
from projects.mmdet3d_plugin.models.utils.petr_transformer import PETRMultiheadFlashAttention
with_bias, without = (PETRMultiheadFlashAttention(16, 4, dropout=p) for p in (0.1, 0.0))
assert with_bias.attn.in_proj_bias.shape == (48,) and with_bias.attn.out_proj.bias is not None
assert without.attn.in_proj_bias is None and without.attn.out_proj.bias is None
assert with_bias.attn.in_proj_weight.shape == (48, 16) and with_bias.batch_first
assert with_bias.attn.inner_attn.dropout_p == 0.0
try:
    with_bias(torch.zeros(5, 1, 16), torch.zeros(7, 1, 16))
except AssertionError as error:
    assert "CUDA" in str(error), error
else:
    raise SystemExit("ran on the CPU")
"""
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes():
    done = python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "tools/train.py",
        "--steps",
        "2",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(done.stdout)) == 2  # one process speaks
