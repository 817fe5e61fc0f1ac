"""The steps of optimizers, as watched parameters see them: gradient, movement, and steps that were
left out."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Set

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import telemetry
from . import optimizer_hooks


@dataclass
class Seen:
    """One step of an optimizer, for one parameter. Tensors are scalars on the parameter's
    device."""

    norm: Optional[Tensor]  # of the gradient, unscaled; None where there was no gradient
    moved: Optional[Tensor] = (
        None  # how far the parameter was from its last recorded value right after the step
    )
    found_inf: Optional[Tensor] = None  # not 0: a fused optimizer left this step out (GradScaler)


class Steps:
    """Watches every torch optimizer of the process that holds one of the parameters, or that was
    given.

    The hooks are global, so that an optimizer that is built later (a resumed or a restarted
    training) is seen too. `parameters()` returns the watched parameters by name; `previous` holds
    their last recorded values.
    """

    def __init__(
        self,
        optimizers: Any,
        parameters: Callable[[], Dict[str, nn.Parameter]],
        previous: Dict[str, Tensor],
    ) -> None:
        self.given = flattened(optimizers)
        self.parameters, self.previous = parameters, previous
        self.stepping: weakref.WeakSet[Any] = (
            weakref.WeakSet()
        )  # those that have stepped and hold a parameter
        self.owned: Set[str] = set()  # parameters that one of these holds
        self.watching = any(isinstance(o, Optimizer) for o in self.given)
        self._seen: Dict[str, Seen] = {}
        self._broken = False
        self._handles: List[Any] = []
        this = weakref.ref(self)
        for method in ("before", "after"):
            self._handles.append(optimizer_hooks.register(method == "before", _hook(this, method)))

    def take(self) -> Dict[str, Seen]:
        """What was seen since the last call, by name."""
        seen, self._seen = self._seen, {}
        return seen

    def holders(self, parameter: nn.Parameter) -> List[Any]:
        """The parameter groups that hold `parameter`, of optimizers given and of those that have
        stepped."""
        return [
            group
            for optimizer in (*self.given, *self.stepping)
            for group in getattr(optimizer, "param_groups", ())
            if any(p is parameter for p in group["params"])
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- hooks -------------------------------------------------------------------------------------

    def before(self, optimizer: Any, closure: bool) -> None:
        if not closure:  # a closure computes the gradients inside the step
            self._read(optimizer)

    def after(self, optimizer: Any, closure: bool) -> None:
        if closure:
            self._read(optimizer)
        held = _ids(optimizer)
        for name, parameter in self.parameters().items():
            if id(parameter) in held and name in self._seen:
                self._seen[name].moved = distance(parameter, self.previous[name])

    def _read(self, optimizer: Any) -> None:
        held = _ids(optimizer)
        given = any(optimizer is one for one in self.given)
        scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale by themselves
        found_inf = getattr(optimizer, "found_inf", None)
        for name, parameter in self.parameters().items():
            if id(parameter) in held:
                self.stepping.add(optimizer)
                self.owned.add(name)
                self.watching = True
            elif not given or name in self.owned or self.holders(parameter):
                continue  # another optimizer's step
            gradient = parameter.grad
            norm = (
                None
                if gradient is None
                else gradient.detach().float().norm() / (1.0 if scale is None else scale)
            )
            self._seen[name] = Seen(norm, found_inf=found_inf if id(parameter) in held else None)

    def guarded(self, method: str, optimizer: Any, closure: bool) -> None:
        """`before` or `after`; a failure is logged, and ends the watching instead of the
        training."""
        if self._broken:
            return
        try:
            getattr(self, method)(optimizer, closure)
        except Exception as error:
            self._broken = True
            telemetry.once(
                ("monitor steps", id(self)),
                "error",
                "monitor: the steps of %s cannot be watched: %s: %s",
                type(optimizer).__name__,
                type(error).__name__,
                error,
            )


def _hook(this: Any, method: str) -> Callable[[Any, Any, Any], None]:
    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        steps = this()
        if steps is not None:
            given = (*args, *kwargs.values())
            steps.guarded(
                method, optimizer, any(callable(value) for value in given if value is not optimizer)
            )

    return hook


def _ids(optimizer: Any) -> Set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def distance(parameter: Tensor, previous: Tensor) -> Tensor:
    """Norm of the difference, float32, on the parameter's device."""
    return (parameter.detach() - previous.to(parameter.device)).float().norm()


def flattened(optimizers: Any) -> List[Any]:
    """Optimizers from one, several, a dict of them, or wrappers that hold one (mmengine, Lightning,
    Accelerate)."""
    if optimizers is None:
        return []
    if isinstance(optimizers, dict):
        return flattened(list(optimizers.values()))
    if isinstance(optimizers, (list, tuple)):
        return [one for each in optimizers for one in flattened(each)]
    if isinstance(getattr(optimizers, "optim_wrappers", None), dict):
        return flattened(optimizers.optim_wrappers)
    inner = getattr(optimizers, "optimizer", None)
    if inner is not None and inner is not optimizers and not isinstance(optimizers, Optimizer):
        return flattened(inner)
    return [optimizers]
