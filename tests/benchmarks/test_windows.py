"""benchmarks/windows.py: groups by themselves, and their results in one file."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.scripts import load

ABOUT = {"device": "a card", "torch": "2", "triton": "3", "python": "3.12"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("FLASHBIAS_PATCH", "0")  # the script sets it where it is not
    module = load("benchmarks/windows.py")
    monkeypatch.setattr(module, "about", lambda *paths: dict(ABOUT))
    monkeypatch.setattr(
        module, "measure", lambda found, repeats, seconds: dict.fromkeys(found, {"forward": 1.0})
    )
    monkeypatch.setattr(module, "ways", lambda dtype, group="own": {f"{group} {dtype}": None})
    monkeypatch.setattr(module, "errors", lambda dtype: {"own": [str(dtype)]})
    monkeypatch.setattr(module, "step_of_layers", lambda repeats: {"windows": 1})
    return module


def run(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["windows.py", *map(str, words)])
    return script.main()


def test_groups_run_alone_and_merge(script, monkeypatch, tmp_path):
    out = tmp_path / "windows.json"
    run(script, monkeypatch, "--groups", "float32", "layers", "--out", out)
    run(script, monkeypatch, "--groups", "flex", "--out", out, "--merge")
    report = json.loads(out.read_text())
    assert report["float32"] == {"own torch.float32": {"forward": 1.0}} and report["layers"] == {
        "windows": 1
    }
    assert list(report["flex"]) == ["flex torch.float16"] and list(report["seconds"]) == [
        "float32",
        "layers",
        "flex",
    ]
    run(script, monkeypatch, "--groups", "errors", "--out", out)
    assert "flex" not in json.loads(out.read_text())


def test_results_of_another_device_are_not_merged(script, monkeypatch, tmp_path):
    out = tmp_path / "windows.json"
    out.write_text(json.dumps({**ABOUT, "device": "another", "float16": {}}))
    with pytest.raises(SystemExit, match="has another device"):
        run(script, monkeypatch, "--groups", "flex", "--out", out, "--merge")
    assert json.loads(out.read_text())["device"] == "another"
