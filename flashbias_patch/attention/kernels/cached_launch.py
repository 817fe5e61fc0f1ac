"""Cached kernel launches: all arguments but the tensors' addresses are computed once per class of
call.

Triton's own launch binds, classifies and hashes about seventy arguments every time, and computing
these arguments costs as much again: with five launches, a small attention call would wait for the
processor rather than for the GPU. Later calls of a class pass their tensors and the same numbers to
the compiled kernel.
"""

from __future__ import annotations

import inspect
from typing import Any, Callable, Dict, Iterable, Optional, Sequence, Tuple, TypeVar

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from ..._torch_internals import current_cuda_device, current_cuda_stream
from . import kept_key, tiles
from .compile_ahead import collecting
from .direct_launch import Direct, direct

Step = TypeVar("Step")
# Since Triton 3.3 a compiled kernel is called with the constants too, and skips them.
TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
# The object that holds the launch hooks: functions of the user that Triton calls around launches.
HOOKS: Any = getattr(getattr(triton, "knobs", None), "runtime", CompiledKernel)
_Chain: Any = getattr(getattr(triton, "knobs", None), "HookChain", None)


def _takes_launcher() -> bool:
    """True if a compiled kernel calls its launcher with the arguments seen on Triton 3.0 to 3.9."""
    try:
        source = "".join(inspect.getsource(CompiledKernel.__getitem__).split())
    except (OSError, TypeError):
        return False
    given = "self.run(grid[0],grid[1],grid[2],stream,self.function,self.packed_metadata,"
    return given in source and "_hook,*args)" in source


LAUNCHER = (
    _takes_launcher() and hasattr(HOOKS, "launch_enter_hook") and hasattr(HOOKS, "launch_exit_hook")
)


def stream_of(tensor: Tensor) -> Optional[int]:
    """The current stream of the tensor's GPU; None where another GPU is the current one."""
    if not tensor.is_cuda:
        return 0
    index = tensor.device.index
    if current_cuda_device is None or current_cuda_stream is None or current_cuda_device() != index:
        return None
    return current_cuda_stream(index)


class Launch:
    """kernel[programs](*tensors, *numbers, **options), time and again with tensors of one
    signature.

    The first time goes through Triton, which compiles; so does every time in the interpreter.
    Afterwards the compiled kernel's launcher is called, or the C function below it
    (direct_launch.py), without what Triton prepares for launch hooks where there are none.
    """

    __slots__ = ("kernel", "grid", "numbers", "options", "run", "rest", "direct")

    def __init__(
        self, kernel: Any, programs: int, numbers: Tuple[Any, ...], options: Dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.numbers, self.options = (
            kernel,
            (programs, 1, 1),
            numbers,
            options,
        )
        self.run: Optional[Callable[..., Any]] = None
        self.rest: Tuple[Any, ...] = ()
        self.direct: Optional[Direct] = None

    def __call__(self, *tensors: Tensor, stream: Optional[int] = None) -> None:
        """On the current stream, or on that one once there is a compiled kernel."""
        if self.run is not None:
            # Addresses, because for a tensor Triton queries the driver every time whether the GPU
            # can read it.
            addresses = [*map(Tensor.data_ptr, tensors)]
            stream = stream_of(tensors[0]) if stream is None else stream
            if stream is None:
                self.run(*addresses, *self.rest, stream=None)
            else:
                self.at(stream, addresses)
        else:
            self.first(tensors)

    def at(self, stream: int, addresses: Sequence[int]) -> None:
        """On that stream, with tensors at these addresses; for a compiled kernel."""
        if self.direct is not None:
            enter, leave = HOOKS.launch_enter_hook, HOOKS.launch_exit_hook
            if (enter is None or enter.__class__ is _Chain and not enter.calls) and (
                leave is None or leave.__class__ is _Chain and not leave.calls
            ):
                function, own, packed = self.direct
                if packed:
                    function(*self.grid, stream, *own, (*addresses, *self.rest))
                else:
                    function(*self.grid, stream, *own, *addresses, *self.rest)
                return
        self.run(*addresses, *self.rest, stream=stream)  # type: ignore[misc]

    def first(self, tensors: Tuple[Tensor, ...]) -> None:
        """Launch through Triton, and keep what it compiled; compile only, while launches are
        collected."""
        if isinstance(self.kernel, JITFunction):  # not in the interpreter
            kept_key.prepare()
        if collecting.get():
            self.kernel.warmup(*tensors, *self.numbers, grid=self.grid, **self.options)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.options)
        if isinstance(compiled, CompiledKernel):
            constants = (
                [self.options[p.name] for p in self.kernel.params if p.is_constexpr]
                if TAKES_CONSTANTS
                else []
            )
            self.rest, self.run = (*self.numbers, *constants), compiled[self.grid]
            if LAUNCHER:
                self.direct = direct(compiled)


def signature(tensors: Iterable[Optional[Tensor]]) -> Tuple[Any, ...]:
    """The properties of these tensors that a launch depends on: Triton compiles for dtypes and for
    addresses divisible by 16."""
    return tuple(
        [
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)
            for t in tensors
        ]
    )


class Kept:
    """A cache of steps by key. It is emptied when tile shapes change, and when it is full (as with
    lengths that differ every time). While launches are collected nothing is kept: no step has
    run."""

    def __init__(self, room: int = 1024) -> None:
        self.room, self.generation = room, tiles.generation
        self.steps: Dict[Any, Any] = {}

    def find(self, key: Any) -> Any:
        if self.generation != tiles.generation:
            self.generation = tiles.generation
            self.steps.clear()
        return self.steps.get(key)

    def keep(self, key: Any, step: Step) -> Step:
        if collecting.get():
            return step
        if len(self.steps) >= self.room:
            self.steps.clear()
        self.steps[key] = step
        return step
