"""What benchmarks note beside their figures."""

import sys

import torch

from tests.support.scripts import load


def test_a_command_has_no_folders_of_this_machine(monkeypatch):
    provenance = load("benchmarks/provenance.py")
    words = ["--out", "/somewhere/out.json", "--features", "dropout mask", "/else/where"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/order.py", *words])
    found = provenance.about("/somewhere/out.json", None, device="cpu")
    assert (
        found["command"]
        == "python benchmarks/order.py --out out.json --features 'dropout mask' /else/where"
    )
    assert found["device"] == "cpu" and found["torch"] == torch.__version__
    assert provenance.command_of("/else/where").endswith(" where")
