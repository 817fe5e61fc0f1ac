"""Settings of the test run. The fixtures are in tests/support/fixtures.py."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FLASHBIAS_PATCH"] = "0"  # tests install by themselves

import torch

from tests.support.capabilities import FASTEST, needs_sdpa

pytest_plugins = ["tests.support.fixtures"]

if torch.__version__.startswith("1.9."):  # where strides count unless told otherwise
    torch.testing.assert_close = functools.partial(torch.testing.assert_close, check_stride=False)
if not torch.cuda.is_available():  # read when triton is first imported, whichever test does that
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Torch before 2.0 has no scaled_dot_product_attention."""
    if FASTEST != "sdpa":
        for item in items:
            if "sdpa" in getattr(getattr(item, "callspec", None), "params", {}).values():
                item.add_marker(needs_sdpa)
