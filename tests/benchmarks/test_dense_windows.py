"""benchmarks/dense_windows.py: a detector gets the router and its dense bias when it is moved to a
device."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.aqr import family
from tests.support.scripts import load


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("FLASHBIAS_PATCH", "0")  # the script sets it
    monkeypatch.setattr(torch.nn.Module, "to", torch.nn.Module.to)  # put back after the test
    yield load("benchmarks/dense_windows.py")
    sys.modules.pop("aqr", None)


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pts_bbox_head = family.CmtHead(family.CmtTransformer())


def test_a_script_trains_with_the_dense_bias(script, monkeypatch, tmp_path):
    trained = tmp_path / "train.py"
    trained.write_text(
        "import sys\nfrom tests.benchmarks import test_dense_windows as t\n"
        "t.ran.append((sys.argv, t.Detector().to('cpu')))\n"
    )
    ran.clear()
    monkeypatch.setattr(
        sys,
        "argv",
        ["dense_windows.py", "--windows", "window=3,gaussian=2.0", str(trained), "--steps", "1"],
    )
    script.main()
    ((argv, detector),) = ran
    assert argv == [str(trained), "--steps", "1"]
    head = detector.to("cpu").pts_bbox_head  # moved again: the router stays
    router = head.transformer.aqr
    assert (router.window, router.gaussian, router.bias_scale.item()) == (3, 2.0, 2.5)
    assert {name for name, _ in detector.named_parameters()} > {
        "pts_bbox_head.transformer.aqr.bias_scale"
    }
    given, _, _ = family.inputs("CmtTransformer")
    reference, metas = family.geometry()
    with torch.no_grad():
        router.segment_proj.mul_(50)
    head(given["x"], given["x_img"], metas, reference).pow(2).sum().backward()
    assert router.bias_scale.grad != 0


ran = []  # what the script of the test leaves
