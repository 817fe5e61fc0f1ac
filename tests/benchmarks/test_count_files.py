"""One patched call must be readable: the package files that it visits are counted, and should only
become fewer (tools/count_files.py)."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# (path, with a learned bias) -> files visited by a training step of one attention
MOST = {
    ("auto", False): 19,
    ("auto", True): 22,
    ("fused", False): 22,
    ("fused", True): 25,
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch takes other paths through _torch_internals.py",
)


@pytest.mark.parametrize("path, bias", MOST)
def test_a_steady_state_call_visits_few_files(monkeypatch, path, bias):
    if path == "fused":
        pytest.importorskip("triton", minversion="3.0")
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    files = importlib.import_module("count_files").files_of_a_step(path, bias)
    assert "attention/dispatch.py" in files and "attention/api.py" in files
    assert len(files) <= MOST[path, bias], files
