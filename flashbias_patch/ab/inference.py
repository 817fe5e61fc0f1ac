"""Forward passes as iterations (`flashbias ab --mode infer`), inside the command's process.

An iteration is a call of the top module in eval mode or without gradients: of all modules that the
command itself calls, the one of the most parameters; or of the module that --module names. It is
timed from the call to its return, both synchronised with the GPU. Its outputs are kept as one
number for each tensor (Sketcher), for a comparison of the sides.

While a call goes on, torch.nn.Module.__call__ is the original: modules inside, and compilers that
trace them, see nothing of this.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

MOST_OUTPUTS = 32
DEEPEST = 8  # of containers in an output
MOST_VALUES = 2**20  # of one tensor that are projected; of the others, evenly spaced ones


class Listener:
    """Calls `begins(module)` before and `ended(module, seconds, output)` after each iteration,
    `restart()` where a larger module turns out to be the top one."""

    def __init__(
        self,
        torch: Any,
        gpu: Any,
        begins: Callable[[Any], None],
        ended: Callable[[Any, float, Any], None],
        restart: Callable[[], None],
        name: str = "",
    ) -> None:
        self.torch, self.gpu, self.ended, self.restart, self.name = torch, gpu, ended, restart, name
        self.begins, self.busy = begins, False
        self.largest = 0
        self.begun: Optional[float] = None
        self.hooked: Dict[int, Any] = {}
        self.original: Any = None

    def listen(self) -> None:
        module_class = self.torch.nn.Module
        self.original = original = module_class.__call__

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if self.busy:
                return original(module, *args, **kwargs)
            self.busy, module_class.__call__ = True, original
            try:
                return self._outermost(module, args, kwargs)
            finally:
                self.busy, module_class.__call__ = False, call

        module_class.__call__ = call

    def _outermost(self, module: Any, args: Any, kwargs: Any) -> Any:
        if self.name:
            self._hook(module)
            return self.original(module, *args, **kwargs)
        if not self._counts(module) or self._size(module) < self.largest:
            return self.original(module, *args, **kwargs)
        self._begin(module)
        output = self.original(module, *args, **kwargs)
        self._end(module, output)
        return output

    def _counts(self, module: Any) -> bool:
        learning = module.training and self.torch.is_grad_enabled()
        return not (learning or self.torch.jit.is_tracing() or self.gpu.capturing())

    def _size(self, module: Any) -> int:
        """Its number of parameters; a larger one than ever begins the count anew."""
        size: int = sum(p.numel() for p in module.parameters())
        if size > self.largest:
            if self.largest:
                self.restart()
            self.largest = size
        return size

    def _hook(self, root: Any) -> None:
        """Listen to the module that is named, by its class or its place in `root`."""
        found = next(
            (m for n, m in root.named_modules() if self.name in (n, type(m).__name__)), None
        )
        if found is not None and id(found) not in self.hooked:
            self.hooked[id(found)] = found
            found.register_forward_pre_hook(lambda module, args: self._begin(module))
            found.register_forward_hook(
                lambda module, args, output: (
                    self._end(module, output) if self._counts(module) else None
                )
            )

    def _begin(self, module: Any) -> None:
        self.begins(module)
        self._synchronize()
        self.begun = time.perf_counter()

    def _end(self, module: Any, output: Any) -> None:
        self._synchronize()
        begun, self.begun = self.begun, None
        if begun is not None:
            self.ended(module, time.perf_counter() - begun, output)

    def _synchronize(self) -> None:
        if self.gpu.used() and not self.gpu.capturing():
            self.torch.cuda.synchronize()


def first_call(torch: Any, heard: Callable[[str], None]) -> None:
    """Call `heard(class name)` at the first call of any module, and never again."""
    module_class = torch.nn.Module
    original = module_class.__call__
    armed = [True]

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        if armed:
            armed.clear()
            if module_class.__call__ is call:
                module_class.__call__ = original
            heard(type(module).__name__)
        return original(module, *args, **kwargs)

    module_class.__call__ = call


def tensors_of(torch: Any, output: Any) -> List[Tuple[str, Any]]:
    """(name, tensor) of what a forward pass returned: tensors, arrays and numbers in containers,
    dataclasses, and objects that hold a `tensor` (boxes)."""
    found: List[Tuple[str, Any]] = []

    def walk(value: Any, name: str, depth: int) -> None:
        if len(found) >= MOST_OUTPUTS or depth > DEEPEST or value is None:
            return
        if isinstance(value, torch.Tensor):
            found.append((name, value))
        elif isinstance(value, dict):
            for key, entry in value.items():
                walk(entry, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(value, (list, tuple)):
            for i, entry in enumerate(value):
                walk(entry, f"{name}[{i}]", depth + 1)
        elif type(value).__module__ == "numpy" and hasattr(value, "dtype"):
            if value.dtype.kind in "fiub":
                found.append((name, torch.as_tensor(value)))
        elif isinstance(value, (int, float)):
            found.append((name, torch.tensor(float(value))))
        elif isinstance(getattr(value, "tensor", None), torch.Tensor):
            found.append((name, value.tensor))
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name, None), f"{name}.{field.name}", depth + 1)

    walk(output, "", 0)
    return [(name.lstrip(".") or "output", tensor) for name, tensor in found]


class Sketcher:
    """One number of a tensor: 4 times its L2 norm, and its sum under random signs, the same in
    every run. A relative difference of two such numbers is about a quarter of that of the tensors;
    values that changed places show."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.signs: Dict[Tuple[int, Any], Any] = {}

    def __call__(self, tensor: Any) -> Any:
        """A 0-d tensor in float64, where `tensor` is; an empty one is 0."""
        tensor = tensor.detach()
        tensor = tensor.to_dense() if tensor.layout != self.torch.strided else tensor
        values = tensor.reshape(-1)
        if values.numel() > MOST_VALUES:
            values = values[:: -(-values.numel() // MOST_VALUES)]
        values = self.torch.view_as_real(values).reshape(-1) if values.is_complex() else values
        values = values.double()
        key = values.numel(), values.device
        if key not in self.signs:
            generator = self.torch.Generator().manual_seed(values.numel())
            signs = self.torch.randint(0, 2, (values.numel(),), generator=generator) * 2 - 1
            kept = dict(list(self.signs.items())[:MOST_OUTPUTS])
            self.signs = {key: signs.to(values.device, values.dtype), **kept}
        return 4 * values.norm() + values @ self.signs[key]
