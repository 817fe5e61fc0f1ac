"""The attention weights that torch.nn.MultiheadAttention returns, computed when they are used."""

from __future__ import annotations

import contextlib
from typing import Any, List, Optional, Tuple, Union

import torch
from torch import Tensor

from .. import _torch_internals as internals
from ..bias import AttentionBias
from . import reference_attention
from .inputs import build

_HALF = (torch.float16, torch.bfloat16)
_make_wrapper_subclass = internals.wrapper_subclass
_without_torch_function = internals.no_functions
_graph_task = internals.current_graph_task


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


class LazyWeights(Tensor):
    """Attention weights that are computed when something other than their shape is first used.

    Every torch function that receives them works on the computed tensor, whose gradients reach q, k
    and the bias. The weights are those before dropout.
    """

    _arguments: Optional[Tuple[Any, ...]]
    _versions: List[Tuple[str, Tensor, int]]
    _result: Optional[Tensor]

    @staticmethod
    def of(
        q: Tensor, k: Tensor, bias: Optional[AttentionBias], attn_mask: Optional[Tensor],
        key_padding_mask: Optional[Tensor], average: bool, batched: bool,
    ) -> LazyWeights:  # fmt: skip
        """The weights of one call, whose arguments are those of `attention_weights`.

        Args:
            average: over the heads, (B, M, N); else (B, H, M, N).
            batched: False leaves B, which is 1, out of the shape.
        """
        B, M, H, _ = q.shape
        N, dtype = k.shape[1], q.dtype
        if batched:
            shape: Tuple[int, ...] = (B, M, N) if average else (B, H, M, N)
        else:
            shape = (M, N) if average else (H, M, N)
        if q.is_cuda and dtype in _HALF and torch.is_autocast_enabled():
            dtype = torch.float32  # what torch's softmax returns under CUDA's autocast
        weights: LazyWeights = _make_wrapper_subclass(
            LazyWeights, shape, dtype=dtype, device=q.device
        )
        weights._arguments = (
            q,
            k,
            bias,
            attn_mask,
            key_padding_mask,
            average,
            batched,
            torch.is_grad_enabled(),
        )
        weights._result = None
        if bias is not None or attn_mask is not None or key_padding_mask is not None:
            weights._versions = _versions(bias, attn_mask, key_padding_mask)
        else:
            weights._versions = []
        return weights

    def computed(self) -> Tensor:
        """The weights as an ordinary tensor."""
        if self._result is None:
            self._compute()
        assert self._result is not None
        with _without_torch_function():
            returned_by_function = self.grad_fn is not None
        if returned_by_function and torch.is_grad_enabled():
            values: Tensor = _NoGradient.apply(self, self._result)
            return values
        return self._result

    def _compute(self) -> None:
        for name, tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} was changed in place after the attention that used it, so its "
                    "weights cannot be computed "
                    "any more: read the weights earlier, or change a copy"
                )
        assert self._arguments is not None
        q, k, bias, attn_mask, key_padding_mask, average, batched, grad = self._arguments
        with _without_torch_function():
            dtype = self.dtype
        # In the grad mode of the call, whatever that of the reader is.
        with torch.inference_mode(False), torch.set_grad_enabled(grad), _no_autocast(q.device.type):
            weights = attention_weights(
                q, k, bias, attn_mask=attn_mask, key_padding_mask=key_padding_mask
            )
            if average:
                weights = weights.mean(1)
            self._result = (weights if batched else weights[0]).to(dtype)
        self._arguments, self._versions = None, []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch's reentrant checkpoint reads requires_grad of each output of a recomputation, and
        # would then differentiate this object.
        if func in _METADATA or (func == _REQUIRES_GRAD and _graph_task() != -1):
            with _without_torch_function():
                return func(*args, **kwargs)
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(
            *_computed(args), **_computed(kwargs or {})
        )  # C++ code, for which no torch function is called

    def __hash__(self) -> int:
        return id(self)


_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout")
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    torch.is_floating_point,
}
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def _computed(value: Any) -> Any:
    """`value` with every LazyWeights in it, or in its lists, tuples and dicts, computed."""
    if isinstance(value, LazyWeights):
        return value.computed()
    if type(value) in (list, tuple):
        return type(value)([_computed(item) for item in value])
    if type(value) is dict:
        return {key: _computed(item) for key, item in value.items()}
    return value


def _versions(
    bias: Optional[AttentionBias], *masks: Optional[Tensor]
) -> List[Tuple[str, Tensor, int]]:
    """(argument, tensor, version) of tensors that a caller may change in place before the weights
    are computed."""
    named = list(zip(("attn_mask", "key_padding_mask"), masks))
    named += [] if bias is None else [("attention_bias", tensor) for tensor in bias.tensors()]
    return [
        (name, t, t._version)
        for name, t in named
        if t is not None and not internals.is_inference(t)
    ]


class _NoGradient(internals.Function):
    """Weights that a reentrant checkpoint returned: their values, and an error in place of a wrong
    gradient."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, result: Tensor) -> Tensor:
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "attention weights that a reentrant checkpoint returned have no gradient: checkpoint "
            "with "
            "use_reentrant=False, or leave the class out of FLASHBIAS_TARGETS"
        )


def _no_autocast(device_type: str) -> Any:
    return (
        internals.autocast(device_type, enabled=False)
        if device_type in ("cpu", "cuda")
        else contextlib.nullcontext()
    )
