"""Record attention weights of selected queries, recomputed from the arguments of each attention."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .._torch_internals import RELEASE, autocast, current_graph_task
from ..attention import api, reference_attention
from ..attention import inputs as attention_inputs
from ..patching import call_adapter

_BOOLEANS = (bool, torch.bool)


class AttentionMap(NamedTuple):
    """The attention weights of one call of one attention.

    Attributes:
        name: of the attention module, relative to the module passed to `attention_map`.
        call: 0 for the first call of that module in the block, 1 for the second, ...
        kind: "self" if the key is the query (or has the same memory), else "cross"; mmcv's
            `operation_name` of the module decides where there is one. Before torch 2.0: whether
            there are as many keys as queries.
        queries: the k positions of the queries.
        heads: the h heads.
        weights: (B, h, k, N), float32 or wider, detached, on the attention's device; before
            dropout. A row whose keys are all masked is zero; every other row sums to 1.
    """

    name: str
    call: int
    kind: str
    queries: Tuple[int, ...]
    heads: Tuple[int, ...]
    weights: Tensor


class _Recording:
    """The state of one open `attention_map` block."""

    def __init__(
        self, root: nn.Module, queries: Tuple[int, ...], heads: Optional[Tuple[int, ...]]
    ) -> None:
        self.names = {module: name for name, module in root.named_modules()}
        self.queries, self.heads = queries, heads
        self.maps: List[AttentionMap] = []
        self.running: List[Tuple[nn.Module, Optional[str]]] = []  # attentions, and their kinds
        self.calls: Dict[str, int] = {}

    def add(self, inputs: attention_inputs.AttentionInputs) -> None:
        module, kind = self.running[0]  # the outer module, where its core is patched too
        name = self.names[module]
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        M, H = inputs.q.shape[1:3]
        if kind is None:
            kind = "self" if inputs.k.shape[1] == M else "cross"
        heads = (
            tuple(range(H))
            if self.heads is None
            else tuple(_position(h, H, "heads", name) for h in self.heads)
        )
        queries = tuple(_position(row, M, "queries", name) for row in self.queries)
        weights = rows(inputs, queries)[:, list(heads)]
        self.maps.append(AttentionMap(name, call, kind, queries, heads, weights))


def _position(index: int, size: int, argument: str, name: str) -> int:
    if not -size <= index < size:
        raise IndexError(
            f"{argument}: {index} is out of range: {name or 'the attention'} has {size}"
        )
    return index % size


def rows(inputs: attention_inputs.AttentionInputs, queries: Sequence[int]) -> Tensor:
    """Return the softmax of the scores of these queries, (B, H, k, N), without a tensor of size M x
    N."""
    index = torch.tensor(list(queries), dtype=torch.long, device=inputs.q.device)
    return reference_attention.weights(
        reference_attention.of_queries(
            inputs, lambda tensor, axis: tensor.index_select(axis, index.to(tensor.device))
        )
    )


_open: contextvars.ContextVar[Tuple[_Recording, ...]] = contextvars.ContextVar(
    "flashbias_attention_maps", default=()
)
_blocks = 0


@contextlib.contextmanager
def attention_map(
    module: nn.Module, queries: Sequence[int], heads: Optional[Sequence[int]] = None
) -> Iterator[List[AttentionMap]]:
    """Record the attention weights of `queries` in every patched attention below `module`.

        with flashbias_patch.attention_map(model, queries=[3, 17]) as maps:
            model(**batch)
        maps[0].weights        # (B, H, 2, N) of the first attention that ran

    Args:
        module: a layer or a whole model, in training or evaluation. A wrapper such as
            DistributedDataParallel is fine.
        queries: positions along M; negative ones count from the end. In training the queries of
            denoising come first.
        heads: heads to keep; None: all.

    The weights are recomputed exactly from the arguments of the attention, masks, key padding and
    biases included, before dropout: k x N numbers per layer and head, never M x N. The outputs and
    gradients of the model are unchanged. Recomputations of checkpoints in a backward pass are not
    recorded again. Attention whose original code runs (status() counts it as "original") has no
    map.

    Raises:
        TypeError: module is not an nn.Module, or queries or heads are not integers.
        ValueError: nothing below `module` is patched.
        IndexError: an attention has fewer queries or heads.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    recording = _Recording(
        module, _integers("queries", queries), None if heads is None else _integers("heads", heads)
    )
    watched = [each for each in recording.names if _is_patched(each)]
    if not watched:
        raise ValueError(
            f"module: no attention in {type(module).__name__} is patched; "
            "flashbias_patch.status() shows which classes are, and torch.nn.MultiheadAttention by "
            "itself is none of them"
        )
    handles: List[Any] = []
    for each in watched:
        parameters = call_adapter.Parameters(type(each))
        hook = functools.partial(_entered, recording, parameters)
        handles.append(_before_forward(each, hook))
        handles.append(
            each.register_forward_hook(lambda module, args, out: _left(recording, module))
        )
    token = _open.set((*_open.get(), recording))
    try:
        with _listening():
            yield recording.maps
    finally:
        _open.reset(token)
        for handle in handles:
            handle.remove()


def _before_forward(module: nn.Module, hook: Callable[..., None]) -> Any:
    if RELEASE >= (2, 0):
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_pre_hook(hook)


def _entered(
    recording: _Recording,
    parameters: call_adapter.Parameters,
    module: nn.Module,
    args: Tuple[Any, ...],
    kwargs: Optional[Dict[str, Any]] = None,
) -> None:
    if kwargs is None:  # before torch 2.0 hooks do not get them
        recording.running.append((module, None))
        return
    query, key = (
        parameters.get(long if long in parameters.position else short, args, kwargs)
        for long, short in (("query", "q"), ("key", "k"))
    )
    recording.running.append((module, call_adapter.kind_of(module, query, key)))


def _left(recording: _Recording, module: nn.Module) -> None:
    while recording.running and recording.running.pop()[0] is not module:
        pass  # forwards that raised


def _integers(argument: str, values: Any) -> Tuple[int, ...]:
    try:
        if any(getattr(value, "dtype", type(value)) in _BOOLEANS for value in values):
            raise TypeError
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise TypeError(f"{argument} must be a sequence of integers, got {values!r}") from None


def _is_patched(module: nn.Module) -> bool:
    from ..patching.seams.core import CoreSeam
    from ..patching.seams.outer import OuterSeam

    seam = getattr(type(module).forward, "__flashbias_seam__", None)
    return isinstance(seam, (OuterSeam, CoreSeam))


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """Replace attention_output by `_attend` in the seams while a block is open.

    Outside such blocks there is no cost.
    """
    global _blocks
    from ..patching.seams import core, dual_core, inner_attention

    _blocks += 1
    if _blocks == 1:
        for file in (core, dual_core, inner_attention):
            file.attention_output = _attend  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _blocks -= 1
        if _blocks == 0:
            for file in (core, dual_core, inner_attention):
                file.attention_output = api.attention_output  # type: ignore[attr-defined]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Any = None, **options: Any) -> Tensor:
    """Call attention_output, and record the weights for every open block with this
    attention."""
    out = api.attention_output(q, k, v, bias, **options)
    if current_graph_task() == -1:
        for recording in _open.get():
            if recording.running:
                with torch.no_grad(), autocast(q.device.type, enabled=False):
                    _record(recording, q, k, v, bias, options)
    return out


def _record(
    recording: _Recording, q: Tensor, k: Tensor, v: Tensor, bias: Any, options: Dict[str, Any]
) -> None:
    masks: Dict[str, Any] = {
        name: options.get(name) for name in ("attn_mask", "key_padding_mask", "scale")
    }
    bias, masks["attn_mask"] = attention_inputs.read_descriptions(q, k, bias, masks["attn_mask"])
    recording.add(attention_inputs.build(q, k, v, bias, **masks))
