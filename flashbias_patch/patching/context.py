"""`with attention_bias(...)`: a bias for every patched attention in a block.

Recomputation by a checkpoint finds the biases of its forward (attention/recovery/replay.py);
threads started in the block find those of the block (threads.py).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Union,
)

from torch import Tensor

from .. import telemetry
from ..attention.recovery import checkpoint_hooks, replay
from ..bias import AttentionBias
from . import threads, unreachable

KINDS = ("cross", "self", "all")
Bias = Union[AttentionBias, Tensor]


class History:
    """Records that a `with attention_bias(...)` was opened in this process.

    `opened` is set when the first one opens, and never cleared. Until then no call reads a context
    variable for its biases.
    """

    __slots__ = ("opened",)

    def __init__(self) -> None:
        self.opened = False


history = History()


class Block:
    """One `with attention_bias(...)`: whether it is open, which kinds of attention were called in
    it, and whether any of them was given the bias. A block in a generator may end in another thread
    or task than it began in."""

    __slots__ = ("open", "ended_elsewhere", "kinds", "given")

    def __init__(self) -> None:
        self.open = True
        self.ended_elsewhere = False
        self.kinds: Set[str] = set()
        self.given = False


class Scope(NamedTuple):
    """The bias of an attention_bias(...) block and its conditions, as one thread has them."""

    bias: Bias
    kind: str
    layers: Optional[Tuple[int, ...]]
    block: Block
    order: Dict[Any, int]  # attention module -> its index in order of first use


Scopes = Tuple[Scope, ...]
_scopes: contextvars.ContextVar[Optional[Scopes]] = contextvars.ContextVar(
    "flashbias_scopes", default=None
)
# Scopes of the block in which this thread was started. They are in force while that block is open
# and _scopes is None.
_inherited: contextvars.ContextVar[Scopes] = contextvars.ContextVar(
    "flashbias_inherited_scopes", default=()
)
# Tensors that need a gradient and are in force in another way: in a list of masks, where no
# checkpoint looks for them.
_learned: contextvars.ContextVar[Tuple[Tensor, ...]] = contextvars.ContextVar(
    "flashbias_learned", default=()
)


def map_bias(bias: Bias, function: Callable[[Tensor], Tensor]) -> Bias:
    return function(bias) if isinstance(bias, Tensor) else bias._map(function)


def current_scopes() -> Scopes:
    scopes = _scopes.get()
    if scopes is None:
        return tuple(scope for scope in _inherited.get() if scope.block.open)
    if not scopes or replay.repeating():  # a recomputation has what its forward had
        return scopes
    found = tuple(scope for scope in scopes if not scope.block.ended_elsewhere)
    if len(found) < len(scopes):
        # The block that ended in another thread or task could not take its scope away from here,
        # and every later call would look for a bias.
        _scopes.set(found)
    return found


def _map_scopes(scopes: Scopes, function: Callable[[Tensor], Tensor]) -> Scopes:
    return tuple(scope._replace(bias=map_bias(scope.bias, function)) for scope in scopes)


def _look_only(
    tensors: Tuple[Tensor, ...], function: Callable[[Tensor], Tensor]
) -> Tuple[Tensor, ...]:
    for tensor in tensors:
        function(tensor)
    return tensors


replay.carry(_scopes, _map_scopes, read=current_scopes)
replay.carry(_learned, _look_only)


@contextlib.contextmanager
def attention_bias(
    bias: Union[AttentionBias, Tensor], kind: str = "cross", layers: Optional[Iterable[int]] = None
) -> Iterator[None]:
    """Add `bias` to the scaled scores of every patched attention called in this block.

    Args:
        bias: an AttentionBias, or a dense Tensor (M,N), (B,M,N), (B*H,M,N) or (B,H,M,N).
        kind: which attentions: "cross", "self" or "all". An attention is what its `operation_name`
            says (mmcv sets it), else self attention when its key is its query.
        layers: indices of the attentions of that kind, counted in the order they are first called
            in the block; None: all.

    Blocks nest: biases of several add up. A bias whose shape does not fit raises ValueError where
    it is used. The recomputation of a checkpoint called in the block has the bias too, and so has a
    thread started in the block, as long as the block is open.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(bias, (AttentionBias, Tensor)):
        raise TypeError(f"bias must be an AttentionBias or a Tensor, got {type(bias).__name__}")
    history.opened = True
    checkpoint_hooks.watch()
    # a checkpoint around this block does not need the bias: it opens the block again
    replay.current()
    block = Block()
    scope = Scope(bias, kind, None if layers is None else tuple(layers), block, {})
    before = _scopes.get()
    token = _scopes.set((*current_scopes(), scope))
    try:
        with threads.handing_on(_for_thread, _for_task):
            yield
        if not block.given:
            _warn_unused(scope)
    finally:
        # Blocks in generators may end in another order than they began in, or in another context:
        # each ends only itself.
        block.open = False
        others = tuple(other for other in _scopes.get() or () if other.block is not block)
        try:
            _scopes.reset(token)
            _scopes.set(others if others or before is not None else None)
        except ValueError:  # of another thread or task, whose value cannot be set from here
            block.ended_elsewhere = True


def _warn_unused(scope: Scope) -> None:
    """Say once why the bias of a block that ends was given to no attention."""
    kinds = scope.block.kinds
    if not kinds:
        why = (
            "no patched attention was called in the block; flashbias_patch.status() shows what "
            "is patched"
        )
    elif scope.kind not in (*kinds, "all"):
        why = f"only {' and '.join(sorted(kinds))} attentions were called in the block"
    else:
        why = (
            f"{len(scope.order)} attentions of this kind were called, and none has an index in "
            f"layers={scope.layers}"
        )
    telemetry.unreached(f"attention_bias(kind={scope.kind!r})", why)


@contextlib.contextmanager
def learned(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Tensors that need a gradient are in force in this block: checkpoint without reentrance."""
    checkpoint_hooks.watch()
    replay.current()
    token = _learned.set((*_learned.get(), *tensors))
    try:
        yield
    finally:
        _learned.reset(token)


def active() -> bool:
    """Return True if an `attention_bias(...)` block may concern a call here. Only to be called
    where `history.opened` is True."""
    scopes = _scopes.get()
    return bool(_inherited.get() if scopes is None else scopes) or unreachable.record.any


def biases_for(module: Any, kind: str) -> List[Bias]:
    """The ambient biases that concern one attention module."""
    found = []
    for scope in current_scopes():
        scope.block.kinds.add(kind)
        if scope.kind not in (kind, "all"):
            continue
        index = scope.order.setdefault(module, len(scope.order))
        if scope.layers is None or index in scope.layers:
            found.append(scope.bias)
            scope.block.given = True
    if found:
        unreachable.remember(module)
    else:
        unreachable.check(module)
    return found


def _of_another_thread(scopes: Scopes) -> Scopes:
    """A thread counts the layers that it calls itself: its modules are others (replicas) or called
    at another time."""
    return tuple(scope._replace(order={}) for scope in scopes)


def _for_thread(run: Callable[..., Any]) -> Callable[..., Any]:
    scopes = current_scopes()
    return functools.partial(_run_inheriting, _of_another_thread(scopes), run) if scopes else run


def _run_inheriting(scopes: Scopes, run: Callable[[], Any]) -> None:
    """Call `run` in a new thread. A worker thread of a pool outlives the block, and is then without
    its bias."""
    _inherited.set(scopes)
    run()


def _for_task(function: Callable[..., Any]) -> Callable[..., Any]:
    scopes = current_scopes()
    return (
        functools.partial(_run_task, _of_another_thread(scopes), function) if scopes else function
    )


def _run_task(scopes: Scopes, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = _scopes.set(scopes)
    try:
        return function(*args, **kwargs)
    finally:
        _scopes.reset(token)
