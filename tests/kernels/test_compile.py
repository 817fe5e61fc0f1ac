"""Every class of kernel variant compiles without a GPU. FLASHBIAS_TEST_PYTHONS: more interpreters (os.pathsep between
them), each with its own Triton, to compile with; CI gives throw-away environments of Triton 3.0, 3.1, 3.2, 3.4, 3.6.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.0")
SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compile_kernels.py")
PYTHONS = [sys.executable] + [
    path for path in os.environ.get("FLASHBIAS_TEST_PYTHONS", "").split(os.pathsep) if path
]


def compiled(python, arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [python, SCRIPT, str(arch)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and "compiled " in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
@pytest.mark.parametrize("python", PYTHONS)
def test_compiles(python, arch):
    compiled(python, arch)
