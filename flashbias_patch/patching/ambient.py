"""`with attention_bias(...)`: a bias for every patched attention in a block, kept alive through recomputation.

Reentrant checkpointing ignores tensors inside lists, and recomputation runs in autograd's own thread, where context
variables are not set (torch.utils.checkpoint). So while a bias is in play, and only for code that it concerns,
torch.utils.checkpoint.checkpoint checkpoints without reentrance and carries the ambient state along.
"""
from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import threading
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch.utils.checkpoint
from torch import Tensor

from ..attention.dispatch import Script, StartOver
from ..bias import AttentionBias

KINDS = ("cross", "self", "all")


class Scope(NamedTuple):
    bias: Union[AttentionBias, Tensor]
    kind: str
    layers: Optional[Tuple[int, ...]]
    order: Dict[int, int]  # id of an attention module -> its index in order of first use


_scopes: contextvars.ContextVar[Tuple[Scope, ...]] = contextvars.ContextVar("flashbias_scopes", default=())
# What a checkpoint made in this context carries to its recomputation: nothing, which backend answered each call, or
# that and the ambient bias.
NOTHING, BACKENDS, BIAS = range(3)
_carry: contextvars.ContextVar[int] = contextvars.ContextVar("flashbias_carry", default=NOTHING)


@contextlib.contextmanager
def attention_bias(
    bias: Union[AttentionBias, Tensor], kind: str = "cross", layers: Optional[Iterable[int]] = None
) -> Iterator[None]:
    """Add `bias` to the scaled scores of every patched attention called in this block.

    Args:
        bias: an AttentionBias, or a dense Tensor (M,N), (B,M,N), (B*H,M,N) or (B,H,M,N).
        kind: which attentions: "cross", "self" or "all". An attention is what its `operation_name` says (mmcv sets it),
            else self attention when its key is its query.
        layers: indices of the attentions of that kind, counted in the order they are first called in the block;
            None: all.

    Blocks nest: biases of several add up. A bias whose shape does not fit raises ValueError where it is used.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(bias, (AttentionBias, Tensor)):
        raise TypeError(f"bias must be an AttentionBias or a Tensor, got {type(bias).__name__}")
    scope = Scope(bias, kind, None if layers is None else tuple(layers), {})
    token = _scopes.set((*_scopes.get(), scope))
    try:
        with carried_checkpoint():
            yield
    finally:
        _scopes.reset(token)


def active() -> bool:
    """Whether any `with attention_bias(...)` is open here."""
    return bool(_scopes.get())


def biases_for(module: Any, kind: str) -> List[Union[AttentionBias, Tensor]]:
    """The ambient biases that concern one attention module."""
    found = []
    for scope in _scopes.get():
        if scope.kind not in (kind, "all"):
            continue
        index = scope.order.setdefault(id(module), len(scope.order))
        if scope.layers is None or index in scope.layers:
            found.append(scope.bias)
    return found


# -- checkpointing -----------------------------------------------------------------------------------------------

_swap_lock = threading.Lock()
_swap_depth = 0
_plain_checkpoint: Callable[..., Any] = torch.utils.checkpoint.checkpoint
# Names bound by `from torch.utils.checkpoint import checkpoint` in modules of wrapped layers: (globals, name).
_bound_names: List[Tuple[Dict[str, Any], str]] = []


@contextlib.contextmanager
def carried_checkpoint(what: int = BIAS) -> Iterator[None]:
    """While open, checkpoints made in this context carry the ambient bias, or only which backend answered each
    call (then their own reentrance is kept); other threads' stay as they are."""
    global _swap_depth, _plain_checkpoint
    token = _carry.set(max(what, _carry.get()))
    with _swap_lock:
        _swap_depth += 1
        if _swap_depth == 1:
            _plain_checkpoint = torch.utils.checkpoint.checkpoint
            _set_checkpoint(_carrying(_plain_checkpoint))
    try:
        yield
    finally:
        with _swap_lock:
            _swap_depth -= 1
            if _swap_depth == 0:
                _set_checkpoint(_plain_checkpoint)
        _carry.reset(token)


def _set_checkpoint(function: Callable[..., Any]) -> None:
    torch.utils.checkpoint.checkpoint = function
    for namespace, name in _bound_names:
        namespace[name] = function


def watch_names(namespace: Dict[str, Any]) -> None:
    """Remember the names a module bound to torch's checkpoint, so that its layers are reached too."""
    for name, value in namespace.items():
        if value is torch.utils.checkpoint.checkpoint and not any(
            known is namespace and bound == name for known, bound in _bound_names
        ):
            _bound_names.append((namespace, name))


def _carrying(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(checkpoint)
    def checkpoint_carrying_bias(function: Any, *args: Any, use_reentrant: Any = None, **kwargs: Any) -> Any:
        given = {} if use_reentrant is None else {"use_reentrant": use_reentrant}
        what = _carry.get()
        if what == NOTHING:
            return checkpoint(function, *args, **given, **kwargs)
        scopes, script = _scopes.get(), Script()

        def run(*inputs: Any, **named: Any) -> Any:
            token = _scopes.set(scopes)
            try:
                with script:
                    return function(*inputs, **named)
            finally:
                _scopes.reset(token)

        if what == BIAS:
            given = {"use_reentrant": False}
        while True:
            try:
                return checkpoint(run, *args, **given, **kwargs)
            except StartOver as left:
                _close_contexts(left)
            script.rewind()

    return checkpoint_carrying_bias


def _close_contexts(error: BaseException) -> None:
    """Leave what torch's checkpoint had entered when `error` passed through it: before torch 2.13 its generator, which
    holds the saved-tensor hooks, is merely dropped, and they stay in force until it is collected."""
    assert error.__traceback__ is not None
    # Not the frame that is handling `error`: its locals, once looked at, keep the error and with it every tensor of the
    # failed attempt until Python's collector comes by.
    trace = error.__traceback__.tb_next
    while trace is not None:
        for value in list(trace.tb_frame.f_locals.values()):
            if inspect.isgenerator(value) and value.gi_code.co_filename == torch.utils.checkpoint.__file__:
                value.close()
        trace = trace.tb_next
