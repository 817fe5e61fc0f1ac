"""Kernel launches whose arguments are settled but for the tensors' addresses, kept by class of call.

Triton's own launch binds, classifies and hashes some seventy arguments every time, and making these arguments costs as
much again: with five launches, a small attention call waits for the processor rather than for the GPU. So what a call's
signature determines is worked out once; later calls hand their tensors and the same numbers to the compiled kernel.
"""
from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, Optional, Tuple, TypeVar

import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from . import configs

Step = TypeVar("Step")
# Since 3.3 a compiled kernel is handed the constants too, and skips them.
TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


class Launch:
    """kernel[programs](*tensors, *numbers, **options), time and again with tensors of one signature.

    The first time goes through Triton, which compiles; so does every time in the interpreter.
    """

    __slots__ = ("kernel", "grid", "numbers", "options", "run", "rest")

    def __init__(self, kernel: Any, programs: int, numbers: Tuple[Any, ...], options: Dict[str, Any]) -> None:
        self.kernel, self.grid, self.numbers, self.options = kernel, (programs, 1, 1), numbers, options
        self.run: Optional[Callable[..., Any]] = None
        self.rest: Tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor, stream: Optional[int] = None) -> None:
        """On the current stream, or on that one once there is a compiled kernel."""
        if self.run is not None:
            # Addresses: of a tensor, Triton asks the driver whether the GPU can read it, every time.
            self.run(*[tensor.data_ptr() for tensor in tensors], *self.rest, stream=stream)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.options)
        if isinstance(compiled, CompiledKernel):
            constants = [self.options[p.name] for p in self.kernel.params if p.is_constexpr] if TAKES_CONSTANTS else []
            self.rest, self.run = (*self.numbers, *constants), compiled[self.grid]


def signature(tensors: Iterable[Optional[Tensor]]) -> Tuple[Any, ...]:
    """What of these tensors a launch depends on: Triton compiles for dtypes and for addresses divisible by 16."""
    return tuple(
        [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in tensors]
    )


class Kept:
    """Steps by key, as long as the tile shapes do not change; emptied when full (lengths that differ every time)."""

    def __init__(self, room: int = 1024) -> None:
        self.room, self.generation = room, configs.generation
        self.steps: Dict[Any, Any] = {}

    def find(self, key: Any) -> Any:
        if self.generation != configs.generation:
            self.generation = configs.generation
            self.steps.clear()
        return self.steps.get(key)

    def keep(self, key: Any, step: Step) -> Step:
        if len(self.steps) >= self.room:
            self.steps.clear()
        self.steps[key] = step
        return step
