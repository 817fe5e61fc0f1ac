"""The attention weights that torch.nn.MultiheadAttention returns, computed when they are used."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager, List, Optional, Sequence, Tuple, Union

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
_hooks: Callable[[bool], Any] = internals.saved_tensor_hooks or (lambda _: None)


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


class _Call:
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
        self.hooks = _hooks(True)
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

    def weights(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weights, from `tensors` in place of the call's own."""
        for name, tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} was changed in place after the attention that used it, so its "
                    "weights cannot be computed "
                    "any more: read the weights earlier, or change a copy"
                )
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
        if _hooks(True) == self.hooks:
            return contextlib.nullcontext()
        return internals.own_saved_tensors(Tensor.detach, lambda saved: saved)


class LazyWeights(Tensor):
    """Attention weights that are computed when something other than their shape is first used.

    Every torch function that receives them works on the computed tensor, whose gradients reach q, k
    and the bias. For code that is not a torch function, such as an autograd.Function, they depend
    on these by _Connect. The weights are those before dropout.
    """

    _call: Optional[_Call]
    _result: Optional[Tensor]
    _recomputed: bool  # made in a backward pass, by a checkpoint

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
        grad = torch.is_grad_enabled()
        call = _Call(q, k, bias, attn_mask, key_padding_mask, average, batched, grad, dtype)
        if grad and internals.current_transform() is None:
            weights: LazyWeights = _connect(call, shape, *call.tensors)
        else:
            weights = _make_wrapper_subclass(LazyWeights, shape, dtype=dtype, device=q.device)
        weights._call, weights._result = call, None
        weights._recomputed = _graph_task() != -1
        return weights

    def computed(self) -> Tensor:
        """The weights as an ordinary tensor."""
        if self._result is None:
            assert self._call is not None
            # In the grad mode of the call, whatever that of the reader is.
            call = self._call
            with torch.inference_mode(False), torch.set_grad_enabled(call.grad), call.saving():
                self._result = call.weights(call.tensors)
            self._call = None
        with _without_torch_function():
            made_by = self.grad_fn
        if (
            made_by is not None
            and torch.is_grad_enabled()
            and getattr(made_by, "_forward_cls", None) is not _Connect
        ):
            values: Tensor = _NoGradient.apply(self, self._result)
            return values
        return self._result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with _without_torch_function():
                return func(*args, **kwargs)
        # torch's reentrant checkpoint reads requires_grad of each output of a recomputation, and
        # would then differentiate this object, with a gradient of zeros if it was not used.
        if func == _REQUIRES_GRAD and args[0]._recomputed and _graph_task() != -1:
            return False
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # C++ code, for which no torch function is called. Its graph is made outside, by _Connect.
        return func(*_computed(args, detach=True), **_computed(kwargs or {}, detach=True))

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


def _computed(value: Any, detach: bool = False) -> Any:
    """`value` with every LazyWeights in it, or in its lists, tuples and dicts, computed.

    detach: without the graph of those that _Connect put into one.
    """
    if isinstance(value, LazyWeights):
        computed = value.computed()
        with _without_torch_function():
            return computed.detach() if detach and value.requires_grad else computed
    if type(value) in (list, tuple):
        return type(value)([_computed(item, detach) for item in value])
    if type(value) is dict:
        return {key: _computed(item, detach) for key, item in value.items()}
    return value


class _Connect(internals.Function):
    """Weights in the graph of q, k, the masks and the bias, for gradients of the object itself."""

    @staticmethod
    def forward(ctx: Any, call: _Call, shape: Tuple[int, ...], *tensors: Tensor) -> LazyWeights:
        ctx.call = call
        ctx.materialize_grads = False
        weights: LazyWeights = _make_wrapper_subclass(
            LazyWeights, shape, dtype=call.dtype, device=tensors[0].device
        )
        return weights

    @staticmethod
    @internals.once_differentiable
    def backward(ctx: Any, grad: Optional[Tensor]) -> Any:
        needed = ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(needed))
        leaves = [
            t.detach().requires_grad_() if need else t.detach()
            for t, need in zip(ctx.call.tensors, needed)
        ]
        with torch.enable_grad():
            weights = ctx.call.weights(leaves)
            found = iter(
                torch.autograd.grad(
                    weights,
                    [leaf for leaf in leaves if leaf.requires_grad],
                    grad,
                    allow_unused=True,
                )
            )
        return (None, None, *(next(found) if need else None for need in needed))


_connect = internals.apply_of(_Connect)


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
