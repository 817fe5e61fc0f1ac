"""What compiled kernels look like, without a GPU, by the installed Triton for Hopper.
tools/triton_matrix.sh compiles all variants, by several versions and for other architectures.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.0")
SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compile_kernels.py")


@pytest.mark.slow
def test_a_mask_is_read_in_whole_words(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # what an earlier run compiled proves nothing
    done = subprocess.run(
        [sys.executable, SCRIPT, "90", "mask"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and "compiled 3" in done.stdout, done.stdout[-3000:]
    # A thread reads byte by byte its share of one tile of a mask, the cut one. Whole tiles are read
    # 8 or 16 bytes at a time.
    for kernel in ("forward_kernel", "queries_kernel"):
        (line,) = re.findall(rf"90 {kernel} mask: (\d+) x (\d+), .* byte loads (\d+),", done.stdout)
        queries, keys, loads = map(int, line)
        assert loads <= queries * keys // 128


@pytest.mark.slow
def test_compiles_in_threads_before_the_first_launch(tmp_path):
    from flashbias_patch.attention.kernels import compile_ahead

    if not compile_ahead.SUPPORTED:
        pytest.skip("this Triton compiles a kernel only when it is launched")
    script = os.path.join(os.path.dirname(SCRIPT), "compiled_ahead.py")
    done = subprocess.run(
        [sys.executable, script],
        env=dict(os.environ, TRITON_CACHE_DIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and "compiled " in done.stdout, done.stdout[-3000:]
