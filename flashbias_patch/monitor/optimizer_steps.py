"""Observe optimizer steps of monitored parameters: gradient norm, movement and skipped steps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Set

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import telemetry
from . import optimizer_hooks


@dataclass
class StepRecord:
    """One optimizer step of one parameter. Tensors are scalars on the device of the parameter."""

    norm: Optional[Tensor]  # norm of the unscaled gradient; None without a gradient
    moved: Optional[Tensor] = None  # distance from the last recorded value, right after the step
    found_inf: Optional[Tensor] = None  # not 0: a fused optimizer skipped this step (GradScaler)


class Steps:
    """Observe the given optimizers, and every torch optimizer that holds one of the parameters.

    The hooks are global, so optimizers that are built later (resumed or restarted training) are
    observed too. `parameters()` returns the monitored parameters by name; `previous` holds their
    last recorded values.
    """

    def __init__(
        self,
        optimizers: Any,
        parameters: Callable[[], Dict[str, nn.Parameter]],
        previous: Dict[str, Tensor],
    ) -> None:
        self.given = flattened(optimizers)
        self.parameters, self.previous = parameters, previous
        # optimizers that have made a step and hold a parameter, and the names of such parameters
        self.stepping: weakref.WeakSet[Any] = weakref.WeakSet()
        self.owned: Set[str] = set()
        self.observing = any(isinstance(o, Optimizer) for o in self.given)
        self._records: Dict[str, StepRecord] = {}
        self._broken = False
        self._handles: List[Any] = []
        this = weakref.ref(self)
        for method in ("before", "after"):
            self._handles.append(optimizer_hooks.register(method == "before", _hook(this, method)))

    def take(self) -> Dict[str, StepRecord]:
        """Return the steps since the last call, by parameter name."""
        seen, self._records = self._records, {}
        return seen

    def holders(self, parameter: nn.Parameter) -> List[Any]:
        """Return the parameter groups that hold `parameter`, of all known optimizers."""
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

    def before(self, optimizer: Any, closure: bool) -> None:
        """Read the gradients before a step without a closure."""
        if not closure:  # a closure computes the gradients inside the step
            self._read(optimizer)

    def after(self, optimizer: Any, closure: bool) -> None:
        """Read the movement after a step, and the gradients if the step had a closure."""
        if closure:
            self._read(optimizer)
        held = _ids(optimizer)
        for name, parameter in self.parameters().items():
            if id(parameter) in held and name in self._records:
                self._records[name].moved = distance(parameter, self.previous[name])

    def _read(self, optimizer: Any) -> None:
        held = _ids(optimizer)
        is_given = any(optimizer is one for one in self.given)
        scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale by themselves
        found_inf = getattr(optimizer, "found_inf", None)
        for name, parameter in self.parameters().items():
            if id(parameter) in held:
                self.stepping.add(optimizer)
                self.owned.add(name)
                self.observing = True
            elif not is_given or name in self.owned or self.holders(parameter):
                continue  # another optimizer's step
            gradient = parameter.grad
            norm = (
                None
                if gradient is None
                else gradient.detach().float().norm() / (1.0 if scale is None else scale)
            )
            self._records[name] = StepRecord(
                norm, found_inf=found_inf if id(parameter) in held else None
            )

    def guarded(self, method: str, optimizer: Any, closure: bool) -> None:
        """Call `before` or `after`; a failure is logged and ends the observation, not the
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
                "monitor: the steps of %s cannot be observed: %s: %s",
                type(optimizer).__name__,
                type(error).__name__,
                error,
            )


def _hook(this: Any, method: str) -> Callable[[Any, Any, Any], None]:
    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        steps = this()
        if steps is not None:
            arguments = (*args, *kwargs.values())
            steps.guarded(
                method,
                optimizer,
                any(callable(value) for value in arguments if value is not optimizer),
            )

    return hook


def _ids(optimizer: Any) -> Set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def distance(parameter: Tensor, previous: Tensor) -> Tensor:
    """Return the norm of the difference as float32, on the device of the parameter."""
    norm: Tensor = (parameter.detach() - previous.to(parameter.device)).float().norm()
    return norm


def flattened(optimizers: Any) -> List[Any]:
    """Return the optimizers in one, several, a dict of them, or wrappers (mmengine, Lightning,
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
