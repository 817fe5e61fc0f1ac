"""Fixtures that tests of several folders share; tests/conftest.py loads this module as a plugin."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.mini_cmt import mini_cmt, patched, repository  # noqa: F401


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


@pytest.fixture
def flash(monkeypatch):
    """flash-attn's three generations in plain PyTorch, none of them installed yet."""
    from tests.support.fake_flash_attn import FakeFlash

    yield FakeFlash(monkeypatch)
    FakeFlash.forget()


@pytest.fixture(params=["triton", "torch"])
def written_by(request, monkeypatch):
    """Columns written by the Triton kernel (interpreted without a GPU) and in plain PyTorch."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET is off and there is no GPU")
    else:
        from flashbias_patch.attention.kernels import concatenate

        monkeypatch.setattr(concatenate, "_launches", lambda tensor: False)
    return request.param
