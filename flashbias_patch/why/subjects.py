"""Record the facts about one observed parameter, step by step."""

from __future__ import annotations

import fnmatch
import math
from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

from .._torch_internals import all_functions_off
from ..monitor.models import at, unwrapped
from .graph import Node

NEIGHBOURS = 64


def matching(name: str, patterns: Sequence[str]) -> bool:
    """Return True if `name` matches one of the fnmatch patterns, with an implicit "*" in front."""
    return any(fnmatch.fnmatchcase(name, "*" + pattern.lstrip("*")) for pattern in patterns)


class Subject:
    """A parameter of the module `root`, and the facts about it."""

    def __init__(self, label: str, name: str, parameter: nn.Parameter, root: nn.Module) -> None:
        self.name, self.own_name, self.parameter, self.root = (
            label,
            name,
            parameter,
            unwrapped(root),
        )
        self.reaches = False
        self.checkpoints = 0
        self.path: List[Node] = []
        self.backward_gradient: Optional[Tensor] = None
        self.steps: List[Dict[str, Any]] = []
        self.iterations: List[Dict[str, Any]] = []
        # class -> [times its output depended on the parameter, times it did not]
        self.received: Dict[str, List[int]] = {}
        self.first_dropped = ""
        self.groups: List[Dict[str, Any]] = []
        self.optimizers: List[str] = []
        self.stale = False
        self._before: Optional[Tensor] = None
        parameter_hook = getattr(parameter, "register_post_accumulate_grad_hook", None)
        if parameter_hook is not None and parameter.requires_grad:
            parameter_hook(self._accumulated)

    def _accumulated(self, parameter: Tensor) -> None:
        with all_functions_off():
            self.backward_gradient = (
                None if parameter.grad is None else parameter.grad.detach().abs().amax()
            )

    # -- one iteration -----------------------------------------------------------------------------

    def begin_iteration(self) -> None:
        self.reaches, self.path = False, []
        self.note_value()

    def note_value(self) -> None:
        """Record the value before a backward pass; it differs if code wrote to it after the
        step."""
        if self.steps and "next" not in self.steps[-1]:
            last = self.steps[-1]
            value = self.parameter.detach()
            last["next"] = _first(value)
            last["stayed"] = (
                bool(torch.equal(value, last["_after"]))
                if last["_after"].shape == value.shape
                else False
            )
            last["set_back"] = (
                bool(torch.equal(value, last["_was"]))
                if last["_was"].shape == value.shape
                else False
            )

    def end_backward(self, nodes: List[Node]) -> None:
        if nodes:
            self.path = nodes

    def note_received(self, class_name: str, depends: bool) -> None:
        counts = self.received.setdefault(class_name, [0, 0])
        counts[0 if depends else 1] += 1
        if not depends and not self.first_dropped:
            self.first_dropped = class_name

    def end_iteration(self, events: List[Dict[str, Any]]) -> None:
        self.iterations.append(
            {
                "reaches": self.reaches,
                "checkpoints": self.checkpoints,
                "events": events[:60],
                "path": [node.as_dict() for node in self.path],
                "dropped": self.first_dropped,
                "backward_gradient": None
                if self.backward_gradient is None
                else float(self.backward_gradient),
            }
        )
        self.backward_gradient, self.first_dropped = None, ""
        self.reaches = False

    # -- the optimizer's step ----------------------------------------------------------------------

    def before_step(self, optimizer: Any) -> None:
        kind = type(optimizer).__name__
        if kind not in self.optimizers:
            self.optimizers.append(kind)
        self._before = None
        for index, group in enumerate(optimizer.param_groups):
            if any(p is self.parameter for p in group["params"]):
                self._before = self.parameter.detach().clone()
                self._note_step(optimizer, index, group)
        if self._before is None and not self.groups:
            self.stale = self.stale or any(
                p.shape == self.parameter.shape and p is not self.parameter and self._is_nowhere(p)
                for group in optimizer.param_groups
                for p in group["params"]
            )

    def _is_nowhere(self, parameter: Tensor) -> bool:
        return not any(parameter is p for p in self.root.parameters())

    def _note_step(self, optimizer: Any, index: int, group: Dict[str, Any]) -> None:
        gradient = self.parameter.grad
        others = [p for g in optimizer.param_groups for p in g["params"]
                  if p is not self.parameter and p.grad is not None][:NEIGHBOURS]  # fmt: skip
        sizes = sorted(_rms(p.grad) for p in others)
        lrs = sorted(float(g.get("lr", math.nan)) for g in optimizer.param_groups)
        self.groups = [
            {
                "optimizer": type(optimizer).__name__,
                "index": index,
                "of": len(optimizer.param_groups),
                "lr": float(group.get("lr", math.nan)),
                "weight_decay": float(group.get("weight_decay", 0.0)),
                "largest_lr": lrs[-1],
            }
        ]
        value = self.parameter.detach()
        self.steps.append({
            "value": _first(value), "lr": self.groups[0]["lr"], "spacing": spacing(value),
            "gradient": None if gradient is None else float(gradient.detach().float().norm()),
            "rms": None if gradient is None else _rms(gradient),
            "neighbours": sizes[len(sizes) // 2] if sizes else None, "_was": value.clone(),
        })  # fmt: skip

    def after_step(self, optimizer: Any) -> None:
        if self._before is None or not self.steps:
            return
        step, value = self.steps[-1], self.parameter.detach()
        step["_after"] = value.clone()
        step["after"] = _first(value)
        step["moved"] = float((value.double() - self._before.to(value.device).double()).norm())
        self._before = None

    # -- as facts ----------------------------------------------------------------------------------

    def as_dict(self) -> Dict[str, Any]:
        owner = self.root
        for part in self.own_name.split(".")[:-1]:
            owner = getattr(owner, part, owner)
        now = (
            at(self.root, self.own_name.split("module.", 1)[-1])
            if self.own_name.startswith("module.")
            else at(self.root, self.own_name)
        )
        return {
            "name": self.name,
            "root": type(self.root).__name__,
            "owner": type(owner).__name__,
            "shape": list(self.parameter.shape),
            "dtype": str(self.parameter.dtype)[6:],
            "requires_grad": self.parameter.requires_grad,
            "replaced": now is not None and now is not self.parameter,
            "stale": self.stale,
            "groups": self.groups,
            "optimizers": self.optimizers,
            "received": self.received,
            "value": _first(self.parameter.detach()),
            "steps": [
                {k: v for k, v in step.items() if not k.startswith("_")} for step in self.steps
            ],
            "iterations": self.iterations,
        }


def _first(value: Tensor) -> float:
    """Return the first entry, which logs usually print for a scale."""
    return float(value.flatten()[0]) if value.numel() else math.nan


def _rms(gradient: Tensor) -> float:
    gradient = gradient.detach()
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    size: float = max(gradient.numel(), 1) ** 0.5
    return float(gradient.float().norm()) / size


def spacing(value: Tensor) -> float:
    """Return the distance from the largest entry to the next number of its dtype."""
    if not value.numel():
        return 0.0
    largest = float(value.detach().abs().amax())
    eps = torch.finfo(value.dtype).eps
    return (
        0.0
        if not math.isfinite(largest)
        else eps * 2.0 ** math.floor(math.log2(largest))
        if largest
        else 0.0
    )
