"""Shared fixtures. Every test starts from installed patches off, default settings and an empty
journal."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FLASHBIAS_PATCH"] = "0"  # tests install by themselves

import pytest
import torch

from tests.capabilities import FASTEST, needs_sdpa

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


@pytest.fixture(autouse=True)
def clean_state(monkeypatch):
    """Default settings, nothing counted, nothing patched, before and after; the same random numbers
    in every run."""
    from flashbias_patch import settings, telemetry

    torch.manual_seed(0)
    for variable in settings.VARIABLES:
        if variable.field != "patch":
            monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.delenv(settings.NAMED, raising=False)
    monkeypatch.setenv(
        "FLASHBIAS_VERDICTS", "off"
    )  # nothing of this machine's, and nothing left on it
    settings.reload()
    telemetry.reset()
    yield
    import sys

    hooks = sys.modules.get("flashbias_patch.patching.install")
    if hooks is not None:
        hooks.uninstall()
    dispatch = sys.modules.get("flashbias_patch.attention.dispatch")
    if dispatch is not None:
        dispatch.reset()
    settings.reload()
    telemetry.reset()


@pytest.fixture
def installed():
    """The patches, installed for one test."""
    import flashbias_patch

    flashbias_patch.install()
    return flashbias_patch
