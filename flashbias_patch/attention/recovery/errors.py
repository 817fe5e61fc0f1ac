"""What a failure is: survivable or not, out of memory, or none of this package's business."""

from __future__ import annotations

import re
import traceback
from typing import Optional

import torch

from ..._torch_internals import OutOfMemoryError
from ..inputs import AttentionInputs

# After one of these the CUDA context is wrecked: every later call fails.
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
# Exceptions by which torch steers its own recomputation, tracing and transforms.
STEERING = (
    "torch.utils.checkpoint",
    "torch._dynamo",
    "torch._subclasses",
    "torch.fx",
    "torch._export",
)
CULPRIT = (
    "a CUDA error that no process survives surfaced inside attention; it may come from any "
    "earlier kernel. "
    "Run once with CUDA_LAUNCH_BLOCKING=1 to see which call it is"
)


def sticky(error: BaseException) -> bool:
    """Whether the CUDA context is lost, so that falling back would only hide where."""
    text = str(error)
    return any(sign in text for sign in STICKY)


def steering(error: BaseException) -> bool:
    """Whether torch raised this to steer itself, so that it must pass through untouched."""
    return any(cls.__module__.startswith(STEERING) for cls in type(error).__mro__)


def survivable(error: BaseException) -> bool:
    """Whether another backend may answer instead. KeyboardInterrupt and SystemExit never are."""
    return isinstance(error, Exception) and not sticky(error) and not steering(error)


def out_of_memory(error: BaseException) -> bool:
    """Device or host memory ran out. Triton's OutOfResources, a kernel's shared memory, is
    something else."""
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """`Type: first line of the message`, for a log line."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def forget_frames(error: Optional[BaseException]) -> None:
    """Drop the locals of the frames an exception went through: they keep its tensors alive, and
    where one of them is the exception itself, until Python's collector comes by."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def memory_advice(error: BaseException, inputs: AttentionInputs) -> str:
    """What was asked for, what is free, and the settings to try."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    B, M, H, D = inputs.q.shape
    N = inputs.k.shape[1]
    lines = [
        f"out of memory in attention of B={B} M={M} N={N} H={H} D={D}, also after emptying the "
        "cache and "
        "with the backend that needs least",
        f"  requested: {asked.group(1) if asked else 'unknown'}; {_free(inputs.q.device)}",
        "  to try: with_cp=True on the decoder layers; a smaller batch; FLASHBIAS_DTYPE=fp16 or "
        "bf16; "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    ]
    if inputs.dense is not None:
        size = inputs.dense.numel() * inputs.dense.element_size() / 2**20
        lines.append(
            f"  the dense bias holds {size:.0f} MiB: FLASHBIAS_RANK or _ENERGY factorise it"
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
