"""This package's own Triton kernels: every feature, forward and backward, on any GPU that Triton
supports."""

from __future__ import annotations

from typing import Any, Callable, List, NoReturn, Sequence

import torch
from torch import Tensor

from ..inputs import AttentionInputs
from ..triton_support import missing, reasons_of_device
from .base import Backend, OnFailure


def _reasons_of_windows(inputs: AttentionInputs) -> List[str]:
    from ..kernels import window_patches

    reasons = []
    windows, mask = inputs.windows, inputs.window_mask
    for parts in (windows, mask):
        reason = None if parts is None else window_patches.why_not(parts.frames, parts.sides)
        if reason is not None:
            reasons.append(reason)
    frames = mask.frames if windows is None else windows.frames  # type: ignore[union-attr]
    if mask is not None and mask.frames != frames:
        reasons.append("a bias and a mask of windows lie on different frames")
    if inputs.dense is not None and inputs.dense.requires_grad:
        reasons.append("windows beside a dense bias that requires a gradient")
    if inputs.segment_weights is not None and not window_patches.aligned(
        inputs.segment_lengths or (), frames
    ):
        reasons.append("segments do not end where frames of windows end")
    return reasons


def _raise(call: Any, grad_out: Tensor, error: BaseException) -> NoReturn:
    """Raise the error of a backward pass that has no recovery."""
    raise error


class TritonFused(Backend):
    name = "triton"
    device_types = ("cuda",)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    min_head_dim, max_head_dim, equal_head_dims = 8, 128, True
    max_rank = 64
    supports_key_padding_grad = False
    recovers = True

    def __init__(self) -> None:
        self.attend: Any = None  # kernels.autograd.attend, imported with the first call

    def unavailable(self) -> Sequence[str]:
        return missing()

    def other_reasons(self, inputs: AttentionInputs) -> List[str]:
        reasons = reasons_of_device(inputs.q.device)
        if inputs.windows is not None or inputs.window_mask is not None:
            reasons += _reasons_of_windows(inputs)
        return reasons

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        return self.recovering(inputs, _raise)

    def recovering(self, inputs: AttentionInputs, on_failure: OnFailure) -> Tensor:
        if self.attend is None:
            from ..kernels import autograd

            self.attend = autograd.attend
        out: Tensor = self.attend(inputs, on_failure)
        return out

    def compile_ahead(self, run: Callable[[], Any]) -> None:
        from ..kernels import compile_ahead

        compile_ahead.compile_ahead(run)

    def traced(self, inputs: AttentionInputs) -> Tensor:
        """The output, as one registered operator."""
        from ..kernels.autograd import fused_attention

        return fused_attention(*inputs)


backend: Backend = TritonFused()
