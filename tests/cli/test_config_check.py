"""flashbias doctor --config: switches, layers, what drops a bias."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from flashbias_patch import settings
from flashbias_patch.cli import config_check, config_options
from flashbias_patch.patching import install

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
    assert (transformer["num_layers"], transformer["with_cp"]) == (
        6,
        True,
    ) and "off" in transformer["router"]
    own, cross = transformer["attentions"]
    assert (own["kind"], own["patched"], own["unpatched"]) == ("self", True, True)
    assert (cross["kind"], cross["patched"], cross["unpatched"]) == ("cross", True, False)
    assert "drops every attn_mask" in config_check.text(report)


def test_on_through_a_base(written):
    path = written(
        "_base_ = './base.py'\nmodel = dict(head=dict(transformer=dict(aqr=dict(enable=True))))"
    )
    report = config_check.check(path)
    assert [(s["path"], s["on"]) for s in report["switches"]] == [
        ("model.head.transformer.aqr", True)
    ]
    assert (
        "is built" in report["transformers"][0]["router"]
        and report["transformers"][0]["num_layers"] == 6
    )
    assert any("reentrant" in note for note in report["notes"])
    assert any("BiasScaleMonitorHook" in note for note in report["notes"])
    json.dumps(report)


def test_delete_replaces_and_enable_false_is_off(written):
    report = config_check.check(
        written(
            "_base_ = ['base.py']\nenable_aqr = False\nattention_bias = True\n"
            "model = dict(head=dict(transformer=dict(_delete_=True, type='Mine', aqr=True, "
            "decoder=dict(\n"
            "    type='D', transformerlayers=[\n"
            "        dict(attn_cfgs=dict(type='MyAttention'), operation_order=('cross_attn',))]))))"
        )
    )
    assert {s["path"]: s["on"] for s in report["switches"]} == {
        "enable_aqr": False,
        "attention_bias": True,
        "model.head.transformer.aqr": True,
    }
    (transformer,) = report["transformers"]
    assert "error" in transformer["router"] and not transformer["attentions"][0]["patched"]
    assert any(
        "no cross attention of this config would receive it" in note for note in report["notes"]
    )


def test_a_missing_base_is_noted_and_a_missing_file_is_an_error(written, tmp_path):
    report = config_check.check(written("_base_ = ['../mmdetection3d/nus-3d.py']\n" + BASE))
    assert "nus-3d.py does not exist" in report["notes"][0] and len(report["transformers"]) == 1
    with pytest.raises(config_check.ConfigError, match="is not a file"):
        config_check.check(str(tmp_path / "none.py"))
    with pytest.raises(config_check.ConfigError, match="is a _base_ of itself"):
        config_check.check(written("_base_ = 'config.py'"))
    with pytest.raises(config_check.ConfigError, match="SyntaxError"):
        config_check.check(written("model = dict(("))


@pytest.mark.parametrize(
    "name, option", [("cmt_aqr.py", ("supervision", 0.1)), ("cmt_aqr_windows.py", ("window", 8))]
)
def test_the_example_configs(tmp_path, name, option):
    root = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "aqr", name)
    with open(root) as file:
        (tmp_path / name).write_text(file.read())
    (tmp_path / "cmt_voxel0100_r50_800x320_cbgs.py").write_text(
        BASE.replace("head=", "pts_bbox_head=")
    )
    report = config_check.check(str(tmp_path / name))
    assert report["switches"][0]["on"] and "is built" in report["transformers"][0]["router"]
    from flashbias_patch.aqr import options

    assert getattr(options.read(report["switches"][0]["value"]), option[0]) == option[1]


# -- agreement with a run --------------------------------------------------------------------------

FORMS = {
    "none": ("", None, ()),
    "true": ("aqr=True", None, ()),
    "false": ("aqr=False", None, ()),
    "empty": ("aqr=dict()", None, ()),
    "no enable": ("aqr=dict(per='head')", None, ()),
    "enable": ("aqr=dict(enable=True)", None, ()),
    "disabled": ("aqr=dict(enable=False)", None, ()),
    "enabled misspelt": ("aqr=dict(enabled=True)", None, ()),
    "unknown key": ("aqr=dict(enable=True, sale=1)", None, ()),
    "a string": ("aqr='on'", None, ()),
    "a bad value": ("aqr=dict(enable=True, per='banana')", None, ()),
    "cameras": ("aqr=dict(enable=True, cameras=0)", None, ()),
    "windows": ("aqr=dict(enable=True, bias='window', window=7)", None, ()),
    "windows by variable": ("", "bias=window,lidar_window=9,gaussian=2.5,camera_windows=all", ()),
    "windows by option": (
        "",
        None,
        ["aqr.enable=True", "aqr.bias=window", "aqr.per=layer", "aqr.gaussian=3"],
    ),
    "windows misspelt": ("aqr=dict(enable=True, bias='windows')", None, ()),
    "windows with an option of modality": (
        "aqr=dict(enable=True, bias='window', locality=True)",
        None,
        (),
    ),
    "window without windows": ("aqr=dict(enable=True, window=7)", None, ()),
    "scale beyond its bounds": (
        "aqr=dict(enable=True, bias='window', init_bias_scale=9.0)",
        None,
        (),
    ),
    "drop alone": ("aqr=dict(enable=True, supervision=1.0)", None, ()),
    "None": ("aqr=None", "1", ()),
    "variable": ("", "1", ()),
    "variable off": ("", "off", ()),
    "variable with options": ("", "per=head,cameras=2", ()),
    "variable with a mistake": ("", "par=head", ()),
    "the config wins": ("aqr=False", "1", ()),
    "option": ("", None, ["aqr.enable=True"]),
    "option over a dict": ("aqr=dict(enable=True)", None, ["aqr.enable=false"]),
    "option over none": ("aqr=None", None, ["aqr.per=head", "aqr.enable=True"]),
    "option with a mistake": ("", None, ["aqr.enable=True", "aqr.pre=head"]),
    "option of another name": ("", None, ["agr.enable=True"]),
}


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.Module()
        layer.attentions = [torch.nn.MultiheadAttention(16, 2)]
        self.layers = torch.nn.ModuleList([layer])


def transformer_class():
    class CmtTransformer(torch.nn.Module):
        def __init__(self, decoder=None):
            super().__init__()
            self.embed_dims, self.decoder = 16, Decoder()

        def forward(self, x, x_img, query_embed, bev_pos_embed=None, rv_pos_embed=None):
            return x

    return CmtTransformer


@pytest.mark.parametrize("form", list(FORMS))
def test_doctor_agrees_with_a_run(written, monkeypatch, installed, form):
    """doctor reports a router exactly if a run builds one, for every form of the option."""
    key, variable, overrides = FORMS[form]
    if variable is not None:
        monkeypatch.setenv("FLASHBIAS_AQR", variable)
        settings.reload()
    path = written(f"transformer = dict(type='CmtTransformer', decoder=dict(type='D'), {key})")
    report = config_check.check(path, ["transformer." + word for word in overrides])
    said = report["transformers"][0]["router"]

    config, _ = config_check.load(path)
    config_options.merge(
        config, config_options.parse(["transformer." + word for word in overrides])
    )
    arguments = {k: v for k, v in config["transformer"].items() if k not in ("type", "decoder")}
    cls = transformer_class()
    assert install.claim(cls)
    try:
        built = "aqr" in cls(**arguments)._modules
    except (TypeError, ValueError) as error:
        assert said.startswith("error") or form == "option of another name", (said, error)
        assert not any(switch["on"] for switch in report["switches"])
        return
    assert ("is built" in said) == built, said
    assert any(switch["on"] for switch in report["switches"]) == built


@pytest.mark.parametrize(
    "name, said",
    [
        ("CmtTransformer", "its windows go to every cross attention"),
        ("PETRTransformer", "needs flashbias_patch.aqr.provide_geometry"),
        ("PETRTemporalTransformer", "error: aqr.bias: 'window' needs rows and columns of the keys"),
    ],
)
def test_windows_say_what_a_class_needs(written, name, said):
    path = written(
        f"transformer = dict(type='{name}', decoder=dict(type='D'), aqr=dict(enable=True, "
        "bias='window'))"
    )
    assert said in config_check.check(path)["transformers"][0]["router"]


@pytest.mark.parametrize("text, on", [("per=head", True), ("0", False), ("par=head", False)])
def test_the_variable_reaches_transformers_that_a_config_does_not_show(
    written, monkeypatch, text, on
):
    monkeypatch.setenv("FLASHBIAS_AQR", text)
    settings.reload()
    report = config_check.check(written("model = dict(type='Detector')"))
    assert [(s["path"], s["on"]) for s in report["switches"]] == [("FLASHBIAS_AQR", on)]


def test_a_class_that_targets_leave_out_takes_no_aqr(written, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_TARGETS", "PETRMultiheadFlashAttention")
    settings.reload()
    report = config_check.check(written(BASE), ["model.head.transformer.aqr=True"])
    (transformer,) = report["transformers"]
    own, cross = transformer["attentions"]
    assert "error" in transformer["router"] and not own["patched"] and cross["patched"]
    assert "FLASHBIAS_TARGETS does not name MultiheadAttention" in own["why"]


@pytest.mark.parametrize(
    "words, parsed",
    [
        (["a.b=1", "a.c=x"], {"a": {"b": 1, "c": "x"}}),
        (["a=1.5"], {"a": 1.5}),
        (["a=True", "b=false"], {"a": True, "b": False}),
        (["a=None"], {"a": None}),
        (["a=1,2"], {"a": [1, 2]}),
        (["a=[1,(2,x)]"], {"a": [1, (2, "x")]}),
        (["a=[]"], {"a": []}),
        (["a='x'"], {"a": "x"}),
        (["a=b=c"], {"a": "b=c"}),
    ],
)
def test_overrides_are_read_as_by_mmcv(words, parsed):
    assert config_options.parse(words) == parsed


def test_overrides_index_lists_and_mistakes_are_named(written):
    path = written(BASE)
    layers = "model.head.transformer.decoder.transformerlayers.attn_cfgs"
    report = config_check.check(path, [f"{layers}.1.type=PETRMultiheadAttention"])
    assert [a["type"] for a in report["transformers"][0]["attentions"]] == [
        "MultiheadAttention",
        "PETRMultiheadAttention",
    ]
    mistakes = {
        f"{layers}.7.type=X": "no entry 7",
        "model": "expected KEY=VALUE",
        "a..b=1": "expected KEY=VALUE",
    }
    for word, part in mistakes.items():
        with pytest.raises(config_check.ConfigError, match=f"--cfg-options: .*{part}"):
            config_check.check(path, [word])


@pytest.mark.parametrize(
    "source",
    [
        "m = dict(type=['a'], decoder=dict())",
        "m = dict(type='A', decoder=dict(transformerlayers=dict(operation_order=None)))",
        "m = dict(type='A', decoder=dict(transformerlayers=dict(attn_cfgs=None)))",
        "m = {(1, 2): dict(aqr=dict(enable=True))}",
        "m = dict(type='A', decoder=dict(transformerlayers=dict(attn_cfgs=[None])))",
        "m = {1: dict(aqr={(1, 2): float('nan')})}",
        "m = {}\nm['m'] = m\nm['aqr'] = [m]",
        "m = dict(type='A', decoder=None)",
        "m = dict(type=int, decoder=dict(num_layers='6'))",
        "m = dict(type='CmtTransformer', aqr=True, decoder=dict(num_layers='six'))",
    ],
)
def test_odd_configs_are_read(written, source):
    report = config_check.check(written(source))
    json.dumps(config_check.plain(report), allow_nan=False)
    config_check.text(report)


@pytest.mark.parametrize(
    "source, part",
    [
        ("import sys; sys.exit(0)", "SystemExit"),
        ("raise KeyError('x')", "KeyError"),
        ("\0", "SyntaxError"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(written, source, part):
    with pytest.raises(config_check.ConfigError, match=part):
        config_check.check(written(source))


def test_json_is_json_whatever_a_config_prints(written):
    command = [sys.executable, "-m", "flashbias_patch.cli.main", "doctor", "--json", "--config"]
    done = subprocess.run(
        [*command, written("print('hello')\n" + BASE)], text=True, capture_output=True, check=True
    )
    assert json.loads(done.stdout)["config"]["transformers"] and "hello" in done.stderr


def test_command_line(written):
    command = [sys.executable, "-m", "flashbias_patch.cli.main", "doctor", "--config"]
    done = subprocess.run([*command, written(BASE)], stdout=subprocess.PIPE, text=True, check=True)
    assert "aqr is off; aqr=dict(enable=True) turns it on" in done.stdout
    failed = subprocess.run([*command, "nowhere.py"], stderr=subprocess.PIPE, text=True)
    assert failed.returncode == 2 and "is not a file" in failed.stderr
