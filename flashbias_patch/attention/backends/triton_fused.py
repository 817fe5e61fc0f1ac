"""This package's own Triton kernels: every feature, forward and backward, on any GPU that Triton
serves."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, List, Tuple

import torch
from torch import Tensor

from ... import settings
from ..._torch_internals import RELEASE
from ..inputs import AttentionInputs
from ..recovery import backward

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_TRITON = (3, 0)
LEAST_TORCH = (2, 1)


@functools.lru_cache(maxsize=None)
def _missing() -> Tuple[str, ...]:
    """What keeps the kernels from being imported at all."""
    if RELEASE < LEAST_TORCH:
        return ("torch {} is older than {}.{}".format(torch.__version__, *LEAST_TORCH),)
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed",)
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_TRITON:
        return ("triton {} is older than {}.{}".format(triton.__version__, *LEAST_TRITON),)
    return ()


@functools.lru_cache(maxsize=64)
def _capability(index: int) -> Tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _why_not_windows(inputs: AttentionInputs) -> List[str]:
    from ..kernels import patches

    reasons = []
    windows, mask = inputs.windows, inputs.window_mask
    for parts in (windows, mask):
        reason = None if parts is None else patches.why_not(parts.frames, parts.sides)
        if reason is not None:
            reasons.append(reason)
    frames = mask.frames if windows is None else windows.frames  # type: ignore[union-attr]
    if mask is not None and mask.frames != frames:
        reasons.append("a bias and a mask of windows lie on different frames")
    if inputs.dense is not None and inputs.dense.requires_grad:
        reasons.append("windows beside a dense bias that requires a gradient")
    if inputs.segment_weights is not None and not patches.aligned(
        inputs.segment_lengths or (), frames
    ):
        reasons.append("segments do not end where frames of windows end")
    return reasons


class TritonFused:
    name = "triton"

    def __init__(self) -> None:
        self.tune = settings.current().tune  # seconds; 0: never
        self.attend: Any = None  # kernels.operator.attend, imported with the first call

    def why_not(self, inputs: AttentionInputs) -> List[str]:
        reasons = list(_missing())
        q, v = inputs.q, inputs.v
        if q.device.type != "cuda":
            reasons.append(f"tensors are on {q.device.type}, not on a CUDA device")
        elif torch.version.hip:
            reasons.append("not tried on ROCm")
        elif _capability(q.device.index) < (8, 0):
            reasons.append(
                "compute capability {}.{} is below 8.0".format(*_capability(q.device.index))
            )
        if q.dtype not in DTYPES:
            reasons.append(f"dtype {str(q.dtype)[6:]} is not float16, bfloat16 or float32")
        if v.shape[-1] != q.shape[-1]:
            reasons.append(f"head dim of v is {v.shape[-1]}, of q {q.shape[-1]}: they must agree")
        if not 8 <= q.shape[-1] <= 128:
            reasons.append(f"head dim {q.shape[-1]} is not in 8 .. 128")
        if inputs.q_factor is not None and inputs.q_factor.shape[-1] > 64:
            reasons.append(f"rank {inputs.q_factor.shape[-1]} is above 64")
        if inputs.key_padding is not None and inputs.key_padding.requires_grad:
            reasons.append("key_padding requires a gradient")
        if inputs.windows is not None or inputs.window_mask is not None:
            reasons += _why_not_windows(inputs)
        return reasons

    def __call__(self, inputs: AttentionInputs, on_failure: Any = backward.of_fused) -> Tensor:
        if self.attend is None:
            from ..kernels import operator

            self.attend = operator.attend
        if self.tune:
            from ..kernels import on_miss

            on_miss.tune(inputs, self.tune)
        return self.attend(inputs, on_failure)  # type: ignore[no-any-return]

    def traced(self, inputs: AttentionInputs) -> Tensor:
        """The same for torch.compile: a registered operator."""
        from ..kernels.operator import fused_attention

        return fused_attention(*inputs, on_failure=backward.of_fused)

    def without_recovery(self, inputs: AttentionInputs) -> Tensor:
        """The same, but a backward pass that fails raises: what the self-check runs."""
        return self(inputs, backward.raised)


backend: Any = TritonFused()
