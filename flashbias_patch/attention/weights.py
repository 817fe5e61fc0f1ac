"""Attention weights from the arguments of an attention call."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, ContextManager, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .. import _torch_internals as internals
from ..bias import AttentionBias
from . import reference_attention
from .inputs import build
from .recovery.replay import innermost


def attention_weights(
    q: Tensor,
    k: Tensor,
    bias: Optional[Union[AttentionBias, Tensor]] = None,
    *,
    attn_mask: Optional[Tensor] = None,
    key_padding_mask: Optional[Tensor] = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias), (B, H, M, N), in at least float32; arguments as
    flash_bias_attention's.

    A row whose keys are all masked is zero.
    """
    inputs = build(q, k, k, bias, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
    return reference_attention.weights(inputs)


class CallArguments:
    """The arguments of one attention call, from which its weights can be computed.

    `tensors`: q, k, then the masks and the tensors of the bias.
    """

    def __init__(
        self, q: Tensor, k: Tensor, bias: Optional[AttentionBias], attn_mask: Optional[Tensor],
        key_padding_mask: Optional[Tensor], average: bool, batched: bool, grad: bool,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.bias, self.average, self.batched, self.grad = bias, average, batched, grad
        self.dtype = dtype
        self.hooks = _hooks_in_force()
        self.masked = attn_mask is not None, key_padding_mask is not None
        self.tensors: List[Tensor] = [q, k]
        self.versions: List[Tuple[str, Tensor, int]] = []  # of what may be changed in place
        if attn_mask is not None:
            self.add("attn_mask", attn_mask)
        if key_padding_mask is not None:
            self.add("key_padding_mask", key_padding_mask)
        if bias is not None:
            for tensor in bias.tensors():
                self.add("attention_bias", tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors += (tensor,)
        try:
            self.versions += ((name, tensor, tensor._version),)
        except RuntimeError:  # of inference mode: torch does not count its changes
            pass

    def check(self) -> None:
        """Raise RuntimeError if an argument is not what it was."""
        for name, tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} was changed in place after the attention that used it, so its "
                    "weights cannot be computed "
                    "any more: read the weights earlier, or change a copy"
                )
            if internals.is_freed(tensor):
                raise RuntimeError(
                    f"the memory of {name} was freed after the attention that used it (as "
                    "FSDP does with parameters after a module's forward), so its weights cannot "
                    "be computed any more: read the weights inside that module"
                )

    def weights(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weights, from `tensors` in place of the call's own."""
        self.check()
        given = iter(tensors)
        q, k = next(given), next(given)
        masks = [next(given) if present else None for present in self.masked]
        bias = self.bias
        if bias is not None and tensors is not self.tensors:
            bias = bias._map(lambda _: next(given))
        with _no_autocast(q.device.type):
            weights = attention_weights(q, k, bias, attn_mask=masks[0], key_padding_mask=masks[1])
            if self.average:
                weights = weights.mean(1)
            return (weights if self.batched else weights[0]).to(self.dtype)

    def saving(self) -> ContextManager[Any]:
        """Return a context in which a checkpoint that began after the call counts no saved tensors.

        The weights are computed only once: its recomputation would save fewer.
        """
        if _hooks_in_force() == self.hooks:
            return contextlib.nullcontext()
        return internals.own_saved_tensors(Tensor.detach, lambda saved: saved)


def _hooks_in_force() -> Any:
    """A weak reference to the saved-tensor hooks in force, those of a checkpoint too."""
    hooks = innermost.get()
    return None if hooks is None else weakref.ref(hooks)


def _no_autocast(device_type: str) -> Any:
    return (
        internals.autocast(device_type, enabled=False)
        if device_type in ("cpu", "cuda")
        else contextlib.nullcontext()
    )
