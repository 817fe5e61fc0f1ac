"""Kinds of exceptions: survivable, out of memory, unrecoverable CUDA errors, torch's own control
flow."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, Optional

import torch

from ..._torch_internals import OutOfMemoryError

if TYPE_CHECKING:
    from ..inputs import AttentionInputs

# After one of these errors every later CUDA call of the process fails.
STICKY = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "illegal address",
    "invalid program counter",
    "hardware stack error",
    "uncorrectable",
)
OUT_OF_MEMORY = (
    "CUDA out of memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)
# Exceptions by which torch controls its own recomputation, tracing and transforms.
CONTROL_FLOW = (
    "torch.utils.checkpoint",
    "torch._dynamo",
    "torch._subclasses",
    "torch.fx",
    "torch._export",
)
STICKY_ADVICE = (
    "an unrecoverable CUDA error was raised inside attention; any earlier kernel may have caused "
    "it. Run once with CUDA_LAUNCH_BLOCKING=1 to see which call it is"
)


def sticky(error: BaseException) -> bool:
    """True if the CUDA context is lost, so that a fallback would only hide the place."""
    text = str(error)
    return any(sign in text for sign in STICKY)


def control_flow(error: BaseException) -> bool:
    """True if torch raised this for its own control flow, so that it must pass unchanged."""
    return any(cls.__module__.startswith(CONTROL_FLOW) for cls in type(error).__mro__)


def survivable(error: BaseException) -> bool:
    """True if another backend may compute the call. KeyboardInterrupt and SystemExit are not
    survivable."""
    return isinstance(error, Exception) and not sticky(error) and not control_flow(error)


def out_of_memory(error: BaseException) -> bool:
    """True if device or host memory ran out. Triton's OutOfResources is about a kernel's shared
    memory, and does not count."""
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """`Type: first line of the message`, for a log line."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def forget_frames(error: Optional[BaseException]) -> None:
    """Clear the locals of the frames that an exception passed: they keep tensors alive, and where
    one of them is the exception itself, until Python's collector runs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def memory_advice(error: BaseException, inputs: AttentionInputs) -> str:
    """A message: the requested and the free memory, and the settings to try."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    B, M, H, D = inputs.q.shape
    N = inputs.k.shape[1]
    lines = [
        f"out of memory in attention of B={B} M={M} N={N} H={H} D={D}, also after emptying the "
        "cache and "
        "with the backend that needs the least",
        f"  requested: {asked.group(1) if asked else 'unknown'}; {_free(inputs.q.device)}",
        "  to try: with_cp=True on the decoder layers; a smaller batch; FLASHBIAS_DTYPE=fp16 or "
        "bf16; "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    ]
    if inputs.dense is not None:
        size = inputs.dense.numel() * inputs.dense.element_size() / 2**20
        lines.append(
            f"  the dense bias holds {size:.0f} MiB: set FLASHBIAS_RANK or FLASHBIAS_ENERGY to "
            "factorise it"
        )
    return "\n".join(lines)


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return "free: unknown on this device"
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    return (
        f"free: {free >> 20} MiB of {total >> 20} MiB, {held >> 20} MiB in tensors of this process"
    )
