"""flashbias doctor --config: switches, layers, what drops a bias."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from flashbias_patch.cli import config_check

BASE = """
import os
layers = 6
model = dict(head=dict(transformer=dict(
    type='CmtTransformer',
    decoder=dict(type='PETRTransformerDecoder', num_layers=layers, transformerlayers=dict(
        type='PETRTransformerDecoderLayer', with_cp=True,
        attn_cfgs=[dict(type='MultiheadAttention'), dict(type='PETRMultiheadFlashAttention')],
        operation_order=('self_attn', 'norm', 'cross_attn', 'norm'))))))
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="config.py"):
        (tmp_path / "base.py").write_text(BASE)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_off(written):
    report = config_check.check(written(BASE))
    (transformer,) = report["transformers"]
    assert report["switches"] == [] and report["notes"] == []
    assert (transformer["num_layers"], transformer["with_cp"]) == (6, True) and "off" in transformer["router"]
    own, cross = transformer["attentions"]
    assert (own["kind"], own["patched"], own["unpatched"]) == ("self", True, True)
    assert (cross["kind"], cross["patched"], cross["unpatched"]) == ("cross", True, False)
    assert "drops every attn_mask" in config_check.text(report)


def test_on_through_a_base(written):
    path = written("_base_ = './base.py'\nmodel = dict(head=dict(transformer=dict(aqr=dict(enable=True))))")
    report = config_check.check(path)
    assert [(s["path"], s["on"]) for s in report["switches"]] == [("model.head.transformer.aqr", True)]
    assert "is built" in report["transformers"][0]["router"] and report["transformers"][0]["num_layers"] == 6
    assert any("reentrant" in note for note in report["notes"])
    assert any("BiasScaleMonitorHook" in note for note in report["notes"])
    json.dumps(report)


def test_delete_replaces_and_enable_false_is_off(written):
    report = config_check.check(written(
        "_base_ = ['base.py']\nenable_aqr = False\nattention_bias = True\n"
        "model = dict(head=dict(transformer=dict(_delete_=True, type='Mine', aqr=True, decoder=dict(\n"
        "    type='D', transformerlayers=[\n"
        "        dict(attn_cfgs=dict(type='MyAttention'), operation_order=('cross_attn',))]))))"))
    assert {s["path"]: s["on"] for s in report["switches"]} == {
        "enable_aqr": False, "attention_bias": True, "model.head.transformer.aqr": True}
    (transformer,) = report["transformers"]
    assert "an error" in transformer["router"] and not transformer["attentions"][0]["patched"]
    assert any("no cross attention here would receive it" in note for note in report["notes"])


def test_a_missing_base_is_noted_and_a_missing_file_refused(written, tmp_path):
    report = config_check.check(written("_base_ = ['../mmdetection3d/nus-3d.py']\n" + BASE))
    assert "nus-3d.py is not there" in report["notes"][0] and len(report["transformers"]) == 1
    with pytest.raises(config_check.ConfigError, match="is not a file"):
        config_check.check(str(tmp_path / "none.py"))
    with pytest.raises(config_check.ConfigError, match="its own _base_"):
        config_check.check(written("_base_ = 'config.py'"))
    with pytest.raises(config_check.ConfigError, match="SyntaxError"):
        config_check.check(written("model = dict(("))


def test_the_example_config(tmp_path):
    root = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "aqr", "cmt_aqr.py")
    with open(root) as file:
        (tmp_path / "cmt_aqr.py").write_text(file.read())
    (tmp_path / "cmt_voxel0100_r50_800x320_cbgs.py").write_text(BASE.replace("head=", "pts_bbox_head="))
    report = config_check.check(str(tmp_path / "cmt_aqr.py"))
    assert report["switches"][0]["on"] and "is built" in report["transformers"][0]["router"]
    from flashbias_patch.aqr import options

    assert options.read(report["switches"][0]["value"]).supervision == 0.1


def test_command_line(written):
    command = [sys.executable, "-m", "flashbias_patch.cli.main", "doctor", "--config"]
    done = subprocess.run([*command, written(BASE)], stdout=subprocess.PIPE, text=True, check=True)
    assert "takes aqr=dict(enable=True), off" in done.stdout
    failed = subprocess.run([*command, "nowhere.py"], stderr=subprocess.PIPE, text=True)
    assert failed.returncode == 2 and "is not a file" in failed.stderr
