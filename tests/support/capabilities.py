"""What the installed torch can do on the CPU, for tests that run under many versions of it."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.utils.checkpoint

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
TRANSFORMS = hasattr(torch, "func")  # torch.func: torch 2.0 and later
COMPILES = hasattr(torch, "compile")
FASTEST = "sdpa" if RELEASE >= (2, 1) else "reference"  # the usual backend on the CPU
# Torch's reentrant checkpoint is the only one, and has no keyword, before 1.11.
_EXPLICIT = "use_reentrant" in inspect.signature(torch.utils.checkpoint.checkpoint).parameters
REENTRANT = {"use_reentrant": True} if _EXPLICIT else {}


def checkpoint_options(reentrant):
    """Keywords of torch's checkpoint; skips the test where there is no other kind than the
    reentrant one."""
    if not reentrant and not _EXPLICIT:
        pytest.skip("use_reentrant came with torch 1.11")
    return REENTRANT if reentrant else {"use_reentrant": False}


def since(major, minor, what):
    """Mark of a test that needs what torch has from that version on."""
    return pytest.mark.skipif(
        (major, minor) > RELEASE, reason=f"{what} came with torch {major}.{minor}"
    )


needs_compile = since(2, 1, "torch.compile of what the package makes")
needs_transforms = since(2, 0, "torch.func")
needs_autocast = since(1, 10, "autocast on the CPU")
needs_sdpa = since(2, 1, "scaled_dot_product_attention")
needs_hooks = since(1, 10, "saved-tensor hooks")


def storage_bytes(tensor):
    storage = (
        tensor.untyped_storage if hasattr(tensor, "untyped_storage") else tensor.storage
    )  # torch 2.0
    return storage().nbytes()


def half_runs_here() -> bool:
    """Whether matrix products in float16 run: not before torch 2.2."""
    try:
        torch.baddbmm(*torch.zeros(3, 2, 2, 2).half()).softmax(-1)
    except RuntimeError:
        return False
    return True


def float16_has_autocast() -> bool:
    """False before torch 2.4."""
    if not hasattr(torch, "get_autocast_cpu_dtype"):  # before torch 1.10
        return False
    before = torch.get_autocast_cpu_dtype()
    try:
        torch.set_autocast_cpu_dtype(torch.float16)
    except RuntimeError:
        return False
    torch.set_autocast_cpu_dtype(before)
    return True
