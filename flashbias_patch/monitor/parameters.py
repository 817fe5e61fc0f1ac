"""Watching named parameters in training: value, gradient norm, step-to-step change, and a word when
one is stuck."""

from __future__ import annotations

import itertools
import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .. import telemetry
from ..why import causes
from .models import at, named, rank, unwrapped
from .optimizer_steps import Steps, distance
from .sinks import Sinks

_serials = itertools.count()
DEFAULT_NAMES = ("*bias_scale",)
FEW = 16  # parameters of at most so many entries are written out entry by entry
TRANSFER = 10  # steps between transfers from the device, at most: each one waits for it

# step; for each parameter: name, whether a step was taken, whether a gradient arrived, numbers on
# the device
Row = Tuple[int, List[Tuple[str, bool, bool, Tensor]]]


class ParameterMonitor:
    """Records parameters once a step; call `update()` after every optimizer step (and before or
    after zero_grad).

    Args:
        model: the model, wrapped by DDP or not.
        names: patterns as in fnmatch against the names in the model, "*" in front implied:
            "bias_scale".
        optimizer: one optimizer, or a sequence or dict of them. Gradients are read in the steps of
            these and of every other torch optimizer that holds one of the parameters: unscaled
            there under GradScaler, after the closure where a step is given one, and still there
            where a loop clears them before `update()`. Where none of them is a torch optimizer,
            `.grad` is read in `update()`.
        interval: steps between log lines.
        patience: K: after so many steps in a row without gradient, or without a change of value,
            warn once.
        jsonl, tensorboard: a file to append to, and a directory for scalars; rank 0 writes. If one
            of them cannot be written, that is logged once and nothing more is written to it.
        log: write log lines to the logger `flashbias_patch`.

    A record: step, name, value (the mean of several entries; `values` holds at most 16), grad_norm
    (None where no gradient arrived), change (norm of the value's change since the record before),
    stepped (False where no step was
    taken: gradient accumulation, or GradScaler left it out). In the JSONL a number that is not
    finite is null, and `not_finite` names it. `last` holds the latest record of each parameter, of
    one with a step where there is one.

    `update()` may be called in every iteration: those without a step count for nothing. A failure
    in here is logged as an error and ends the watching, not the training.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Union[str, Sequence[str]] = DEFAULT_NAMES,
        *,
        optimizer: Any = None,
        interval: int = 50,
        patience: int = 50,
        jsonl: Optional[str] = None,
        tensorboard: Optional[str] = None,
        log: bool = True,
    ) -> None:
        check_counts(interval=interval, patience=patience)
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.interval, self.patience, self.log = interval, patience, log
        self.optimizer = optimizer
        self._serial = next(_serials)
        self.writes = rank() == 0
        self.model = unwrapped(model)
        self.parameters = named(model, self.names)
        self.last: Dict[str, Dict[str, Any]] = {}
        self._step = 0
        self._pending: List[Row] = []
        self._previous: Dict[str, Tensor] = {}
        self._stuck: Dict[str, Dict[str, int]] = {
            name: dict.fromkeys(CAUSES, 0) for name in self.parameters
        }
        self._broken = False
        self._steps = Steps(optimizer, self._current, self._previous)
        self._guarded(
            lambda: self._previous.update(
                {name: p.detach().clone() for name, p in self.parameters.items()}
            )
        )
        self._sinks = Sinks(
            jsonl if self.writes else None, tensorboard if self.writes else None, self._say
        )
        if not self.parameters:
            known = [
                n
                for n, _ in self.model.named_parameters()
                if "aqr" in n or "bias" in n.rsplit(".", 1)[-1]
            ]
            self._say(
                ("none", self.names),
                "monitor: no parameter is called %s%s",
                ", ".join(self.names),
                f"; there are {', '.join(known[:5])}, ..." if known else "",
            )

    def update(self, step: Optional[int] = None, grad_scale: float = 1.0) -> None:
        """One training step, or one iteration of gradient accumulation, is over.

        step: its number, default counted from 1. grad_scale: what `.grad` is still multiplied by,
        where there is no
        `optimizer` to read it from: scaler.get_scale() before scaler.unscale_, else 1.
        """
        self._step = self._step + 1 if step is None else step
        self._guarded(
            lambda: self._record(
                1.0 if self.optimizer is not None and self._steps.watching else grad_scale
            )
        )
        if len(self._pending) >= min(self.interval, self.patience, TRANSFER):
            self.flush()

    def flush(self) -> None:
        """Bring what is pending over from the device: one transfer, then files, log line and
        warnings."""
        pending, self._pending = self._pending, []
        self._guarded(lambda: self._flush(pending))

    def close(self) -> None:
        """Flush, and let go of the optimizers and the files."""
        self.flush()
        self._steps.close()
        self._sinks.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            work()
        except Exception as error:
            self._broken = True
            self._steps.close()
            self._say(
                ("broken",),
                "monitor: stopped at step %s: %s: %s",
                self._step,
                type(error).__name__,
                error,
                level="error",
            )

    def _current(self) -> Dict[str, nn.Parameter]:
        """The parameters as the model has them now: one that was replaced is followed, one that is
        gone is dropped."""
        for name, known in list(self.parameters.items()):
            parameter = at(self.model, name)
            if parameter is known:
                continue
            self._stuck[name] = dict.fromkeys(CAUSES, 0)
            if parameter is None:
                del self.parameters[name]
                self._say((name, "gone"), "monitor: %s is no longer in the model", name)
            else:
                self.parameters[name] = parameter
                self._previous[name] = parameter.detach().clone()
                self._steps.owned.discard(name)
                self._say(
                    (name, "replaced"),
                    "monitor: %s was replaced in the model; the new parameter is watched",
                    name,
                    level="info",
                )
        return self.parameters

    def _record(self, grad_scale: float) -> None:
        parameters = self._current()
        seen = self._steps.take()
        row = []
        with torch.no_grad():
            for name, parameter in parameters.items():
                if not parameter.numel():  # an empty shard
                    continue
                value = parameter.detach().float()
                change = distance(parameter, self._previous[name])
                self._previous[name] = parameter.detach().clone()
                step = seen.get(name)
                stepped = step is not None or not self._steps.watching
                gradient = parameter.grad
                norm = (
                    step.norm
                    if step is not None
                    else None
                    if gradient is None
                    else gradient.detach().float().norm()
                )
                numbers = [
                    value.mean(),
                    value.new_zeros(()) if norm is None else norm / grad_scale,
                    change,
                    value.new_tensor(-1.0) if step is None or step.moved is None else step.moved,
                    value.new_zeros(())
                    if step is None or step.found_inf is None
                    else step.found_inf,
                ]
                numbers = [number.to(value.device, torch.float32).reshape(()) for number in numbers]
                row.append(
                    (
                        name,
                        stepped,
                        norm is not None,
                        torch.cat([torch.stack(numbers), value.flatten()[:FEW]]),
                    )
                )
        self._pending.append((self._step, row))

    def _flush(self, pending: List[Row]) -> None:
        parts = [part for _, row in pending for *_, part in row]
        if not parts:
            return
        flat = torch.cat([part.to(parts[0].device) for part in parts]).tolist()
        start, lines = 0, []
        for step, row in pending:
            for name, stepped, arrived, part in row:
                value, norm, change, moved, found_inf, *values = flat[start : start + len(part)]
                start += len(part)
                # Whatever moved the parameter was a step, also one that no hook has seen.
                stepped = (stepped or change != 0.0 and math.isfinite(change)) and not found_inf
                record: Dict[str, Any] = {
                    "step": step,
                    "name": name,
                    "value": value,
                    "change": change,
                    "grad_norm": norm if arrived and stepped else None,
                    "stepped": stepped,
                }
                if len(values) > 1 and self._numel(name) <= FEW:
                    record["values"] = values
                self._count(
                    record, not_finite=arrived and not math.isfinite(norm), moved=moved > 0.0
                )
                if stepped or not self.last.get(name, {}).get("stepped"):
                    self.last[name] = record
                lines.append(record)
            if self.log and self.writes and step % self.interval == 0:
                telemetry.logger().info(
                    "step %d: %s", step, "; ".join(map(words, self.last.values()))
                )
        self._sinks.write(lines)

    def _numel(self, name: str) -> int:
        parameter = self.parameters.get(name)
        return 0 if parameter is None else parameter.numel()

    # -- stuck parameters --------------------------------------------------------------------------

    def _count(self, record: Dict[str, Any], not_finite: bool, moved: bool) -> None:
        name, norm = record["name"], record["grad_norm"]
        parameter = self.parameters.get(name)
        if parameter is None:
            return
        stepped = record["stepped"]
        if stepped:
            bad = [
                what
                for what, key in (("gradient", "grad_norm"), ("value", "value"))
                if record[key] is not None and not math.isfinite(record[key])
            ]
            if bad:
                numbers = ", ".join(
                    f"{record['grad_norm' if what == 'gradient' else what]:g}" for what in bad
                )
                self._say(
                    (name, "not finite", bad[-1]),
                    "monitor: %s: its %s not finite (%s), first at step %d",
                    name,
                    " and its ".join(bad) + (" are" if len(bad) > 1 else " is"),
                    numbers,
                    record["step"],
                )
        still = stepped and record["change"] == 0.0 and bool(norm) and not not_finite
        seen = {
            "none": stepped and norm is None,
            "zero": stepped and norm == 0.0,
            "unchanged": still and not moved,
            "set back": still and moved,
            "left out": not stepped and not_finite,
            "no step": not stepped and not not_finite,
        }
        for reason, present in seen.items():
            counts, limit = self._stuck[name], self.patience * PATIENCE.get(reason, 1)
            if stepped or reason in ("left out", "no step"):
                counts[reason] = counts[reason] + 1 if present else 0
            if present and counts[reason] == limit:
                what, cause = CAUSES[reason]
                self._say(
                    (name, reason),
                    "monitor: %s %s for %d steps: %s; link by link: flashbias why %s -- CMD",
                    name,
                    what,
                    limit,
                    self._likely(reason, parameter) or cause,
                    name,
                )

    def _likely(self, reason: str, parameter: nn.Parameter) -> Optional[str]:
        if not parameter.requires_grad:
            return _words("frozen")
        if reason == "unchanged" and (self._steps.given or self._steps.stepping):
            groups = self._steps.holders(parameter)
            if not groups:
                return _words("not held")
            if all(g.get("lr") == 0 for g in groups):
                return _words("lr 0", key="", how="")
        if reason == "none" and not telemetry.calls:
            return (
                "no attention went through flashbias_patch; is it installed in this process "
                "(python -c 'import flashbias_patch; print(flashbias_patch.status())', flashbias "
                "doctor)?"
            )
        return None

    def _say(self, key: Any, message: str, *args: Any, level: str = "warning") -> None:
        if self.writes:
            telemetry.once(("monitor", self._serial, *key), level, message, *args)


# reason -> (what is seen, its likely cause where nothing more is known)
CAUSES = {
    "none": (
        "got no gradient",
        "the bias is dropped on its way (a flash attention class that is not patched), lost by "
        "reentrant checkpointing, or the parameter is not used in forward",
    ),
    "zero": (
        "has a gradient of exactly 0",
        "the bias is the same for all keys of a query, which softmax does not see "
        "(one segment, or uniform weights), it is multiplied by 0, or it is clamped "
        "in forward and outside of the bounds",
    ),
    "unchanged": (
        "has not moved",
        "a gradient arrives, but no step moves it: see its learning rate, and whether the "
        "step is smaller than its precision (half)",
    ),
    "set back": (
        "is moved by each step and set back",
        "it is clamped at its bound after the step, or restored",
    ),
    "left out": (
        "has gradients that are not finite, and no step was taken",
        "GradScaler leaves such steps out: the loss or a gradient is nan or inf",
    ),
    "no step": (
        "was in no step of an optimizer",
        "the optimizer was built again without it, gradients are accumulated "
        "for longer than that, or GradScaler leaves every step out",
    ),
}
PATIENCE = {"no step": 4}  # times patience: long accumulations are in order


def check_counts(**counts: Any) -> None:
    """ValueError for the first of `counts` that is not a positive integer, by its name."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _words(cause: str, **values: str) -> str:
    """Finding and change of a cause that `flashbias why` names too."""
    found = causes.describe(cause, **values)
    return f"{found['finding']} ({found['change']})"


def words(record: Dict[str, Any]) -> str:
    if not record["stepped"]:
        return f"{record['name']} {record['value']:.6g} (no optimizer step)"
    gradient = "no gradient" if record["grad_norm"] is None else f"grad {record['grad_norm']:.3g}"
    return f"{record['name']} {record['value']:.6g} ({gradient}, change {record['change']:.3g})"
