"""Settings of the test run. The fixtures are in tests/support/fixtures.py."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FLASHBIAS_PATCH"] = "0"  # tests install by themselves
# Kernels run in Triton's interpreter, on the CPU, or, under `make test-gpu`, on a GPU. CUDA and
# Triton read these variables once.
ON_GPU = os.environ.get("TEST_ON_GPU", "0") not in ("", "0")
if ON_GPU:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.support.capabilities import FASTEST, needs_sdpa  # noqa: E402

pytest_plugins = ["tests.support.fixtures"]

if torch.__version__.startswith("1.9."):  # where strides count unless told otherwise
    torch.testing.assert_close = functools.partial(torch.testing.assert_close, check_stride=False)


def pytest_collection_modifyitems(items):
    """What this run's device or torch cannot run is skipped."""
    if ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("TEST_ON_GPU is set, but torch finds no CUDA GPU")
    other = "TEST_ON_GPU is set: only tests marked gpu" if ON_GPU else "runs with make test-gpu"
    for item in items:
        if bool(item.get_closest_marker("gpu")) != ON_GPU:
            item.add_marker(pytest.mark.skip(reason=other))
    if FASTEST != "sdpa":
        for item in items:
            if "sdpa" in getattr(getattr(item, "callspec", None), "params", {}).values():
                item.add_marker(needs_sdpa)
