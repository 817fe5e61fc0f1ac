"""One patched call must be readable: the package files that it visits are counted, and should only
become fewer (tools/count_files.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# (path, with a learned bias) -> files visited by a training step of one attention
MOST = {
    ("auto", False): 18,
    ("auto", True): 20,
    ("fused", False): 20,
    ("fused", True): 22,
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch takes other paths through _torch_internals.py",
)


CODE = "import json, count_files; print(json.dumps(count_files.files_of_a_step({!r}, {})))"


@pytest.mark.parametrize("path, bias", MOST)
def test_a_steady_state_call_visits_few_files(path, bias):
    """In a process of its own: code that opened a bias before is asked for it at each call."""
    if path == "fused":
        pytest.importorskip("triton", minversion="3.0")
    paths = [ROOT, ROOT / "benchmarks", ROOT / "tools"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(path, bias)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = json.loads(done.stdout.splitlines()[-1])
    assert "attention/dispatch.py" in files and "attention/api.py" in files
    assert len(files) <= MOST[path, bias], files
