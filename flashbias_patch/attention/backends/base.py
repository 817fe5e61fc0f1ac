"""Backend: one way to compute attention, with its limits, from which the reasons against a call are
made."""

from __future__ import annotations

import abc
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..._torch_internals import tracing_state
from ..inputs import AttentionInputs

# (call, gradient of the output, error of the backward pass) -> gradients of the call's tensors
OnFailure = Callable[[Any, Tensor, BaseException], Sequence[Optional[Tensor]]]


class Backend(abc.ABC):
    """Computes calls within its limits, differentiably.

    A subclass states its limits as class attributes, and other reasons in `unavailable` and
    `other_reasons`; `why_not` makes the list of reasons.

    name: its key in selection.MODULES.
    device_types, dtypes: those it takes; None: any.
    min_head_dim, max_head_dim, max_rank: None: no limit.
    equal_head_dims: v must have the head dim of q and k.
    compiled: its kernels are compiled already, as a library's are, so that the self-check can
        afford more problems.
    traceable: it computes by PyTorch's own operators, which torch.jit.trace records.
    needs_self_check: it is known to be wrong in places, so it computes nothing unchecked.
    recovers: a backward pass that fails takes the gradients from `on_failure` (see `recovering`).
    """

    name: str
    device_types: Optional[Tuple[str, ...]] = None
    dtypes: Optional[Tuple[torch.dtype, ...]] = None
    min_head_dim: Optional[int] = None
    max_head_dim: Optional[int] = None
    equal_head_dims = False
    max_rank: Optional[int] = None
    supports_empty = True
    supports_dropout = True
    supports_dense = True
    supports_mask = True
    supports_key_padding = True
    supports_key_padding_grad = True
    supports_windows = True
    supports_negative_scale = True
    compiled = False
    traceable = False
    needs_self_check = False
    recovers = False

    def why_not(self, inputs: AttentionInputs) -> List[str]:
        """Reasons why this backend does not take the call; empty if it does."""
        q, v = inputs.q, inputs.v
        if self.device_types is not None and q.device.type not in self.device_types:
            return [f"{_listed([each.upper() for each in self.device_types])} only, got {q.device}"]
        if not self.traceable and tracing_state() is not None:
            return ["torch.jit.trace records PyTorch's operators only"]
        reasons = list(self.unavailable())
        if self.dtypes is not None and q.dtype not in self.dtypes:
            names = _listed([str(dtype)[6:] for dtype in self.dtypes])
            reasons.append(f"{names} only, got {str(q.dtype)[6:]}")
        head_dim, value_head_dim = q.shape[-1], v.shape[-1]
        if self.equal_head_dims and value_head_dim != head_dim:
            reasons.append(f"head dim of v is {value_head_dim}, of q {head_dim}: they must agree")
        if self.min_head_dim is not None and head_dim < self.min_head_dim:
            reasons.append(f"head dim {head_dim} is below {self.min_head_dim}")
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            reasons.append(f"head dim {head_dim} is above {self.max_head_dim}")
        if self.max_rank is not None and inputs.rank > self.max_rank:
            reasons.append(f"rank {inputs.rank} is above {self.max_rank}")
        if not self.supports_empty and (0 in q.shape or 0 in inputs.k.shape or 0 in v.shape):
            shapes = [tuple(tensor.shape) for tensor in (q, inputs.k, v)]
            reasons.append("empty: q {}, k {}, v {}".format(*shapes))
        if not self.supports_dropout and inputs.dropout_p:
            reasons.append("no support for dropout")
        if not self.supports_dense and inputs.dense is not None:
            reasons.append("no support for a dense bias")
        if not self.supports_mask and inputs.mask is not None:
            reasons.append("no support for an attention mask")
        padding = inputs.key_padding
        if padding is not None:
            if not self.supports_key_padding:
                reasons.append("no support for a key padding mask")
            elif not self.supports_key_padding_grad and padding.requires_grad:
                reasons.append("no support for a gradient of the key padding mask")
        if not self.supports_windows and (
            inputs.windows is not None or inputs.window_mask is not None
        ):
            reasons.append("no support for local windows")
        if not self.supports_negative_scale and inputs.scale <= 0:
            reasons.append(f"scale must be positive, got {inputs.scale}")
        reasons += self.other_reasons(inputs)
        return reasons

    def unavailable(self) -> Sequence[str]:
        """Reasons why it cannot compute any call here, on a device that it takes."""
        return ()

    def other_reasons(self, inputs: AttentionInputs) -> Sequence[str]:
        """Reasons that do not follow from the limits."""
        return ()

    @abc.abstractmethod
    def __call__(self, inputs: AttentionInputs) -> Tensor:
        """The output of a call that it takes, (B, M, H, Dv). Failures raise, in backward too."""

    def recovering(self, inputs: AttentionInputs, on_failure: OnFailure) -> Tensor:
        """The output; if backward fails and the backend `recovers`, `on_failure` gives the
        gradients."""
        return self(inputs)

    def compile_ahead(self, run: Callable[[], Any]) -> None:
        """Compile the kernels that run() launches in this thread, without launching them: what
        run() computes is undefined. Nothing happens where a backend does not compile."""
        return None

    def traced(self, inputs: AttentionInputs) -> Tensor:
        """The output, inside torch.compile."""
        return self(inputs)


class Unavailable(Backend):
    """Stands for a backend whose module cannot be imported."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def why_not(self, inputs: AttentionInputs) -> List[str]:
        return [self.reason]

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        raise RuntimeError(self.reason)


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
