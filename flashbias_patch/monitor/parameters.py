"""Record named parameters in training: value, gradient norm and change; warn if one is stuck."""

from __future__ import annotations

import itertools
import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from .. import telemetry
from ..why import causes
from .models import at, named, rank, unwrapped
from .optimizer_steps import Steps, distance
from .sinks import Sinks

_serials = itertools.count()
DEFAULT_NAMES = ("*bias_scale",)
MAX_ENTRIES = 16  # the single entries of parameters up to this size are recorded
TRANSFER = 10  # at most so many steps between transfers, each of which synchronises with the device


class Pending(NamedTuple):
    """The values of one parameter in one step, still on the device."""

    name: str
    stepped: bool
    has_gradient: bool
    numbers: (
        Tensor  # mean value, gradient norm, change, movement, found_inf, then the first entries
    )


class Row(NamedTuple):
    """The values of all parameters in one step."""

    step: int
    parameters: List[Pending]


class ParameterMonitor:
    """Record parameters in every step; call `update()` after each optimizer step.

    It may be called before or after zero_grad.

    Args:
        model: the model, wrapped by DDP or not.
        names: patterns as in fnmatch for the names in the model, with an implicit "*" in front, for
            example "bias_scale".
        optimizer: one optimizer, or a sequence or dict of them. Gradients are read in the steps of
            these and of every other torch optimizer that holds one of the parameters. There they
            are unscaled (GradScaler), computed (closures) and not yet cleared. If none of them is a
            torch optimizer, `.grad` is read in `update()`.
        interval: steps between log lines.
        patience: number of consecutive steps without a gradient, or without a change of the value,
            after which one warning is logged.
        jsonl, tensorboard: a file to append to, and a directory for scalars; only rank 0 writes. If
            one of them cannot be written, this is logged once, and it is not written any more.
        log: write log lines to the logger `flashbias_patch`.

    A record: step, name, value (the mean of several entries; `values` holds at most 16), grad_norm
    (None without a gradient), change (norm of the change since the previous record), stepped
    (False if no step was taken: gradient accumulation, or a step that GradScaler skipped). In the
    JSONL file a number that is not finite is null, and `not_finite` lists its key. `last` holds the
    latest record of each parameter, if possible one with a step.

    `update()` may be called in every iteration; iterations without a step are not counted. An
    internal failure is logged as an error; it ends the monitoring and not the training.

    Raises:
        ValueError: interval or patience is not a positive integer.
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
            jsonl if self.writes else None, tensorboard if self.writes else None, self._log_once
        )
        if not self.parameters:
            known = [
                n
                for n, _ in self.model.named_parameters()
                if "aqr" in n or "bias" in n.rsplit(".", 1)[-1]
            ]
            self._log_once(
                ("none", self.names),
                "monitor: no parameter is called %s%s",
                ", ".join(self.names),
                f"; there are {', '.join(known[:5])}, ..." if known else "",
            )

    def update(self, step: Optional[int] = None, grad_scale: float = 1.0) -> None:
        """Record the values after a training step or an iteration of gradient accumulation.

        step: its number, by default counted from 1. grad_scale: the factor that `.grad` still
        contains; only needed without `optimizer`: scaler.get_scale() before scaler.unscale_, else
        1.
        """
        self._step = self._step + 1 if step is None else step
        self._guarded(
            lambda: self._record(
                1.0 if self.optimizer is not None and self._steps.observing else grad_scale
            )
        )
        if len(self._pending) >= min(self.interval, self.patience, TRANSFER):
            self.flush()

    def flush(self) -> None:
        """Copy pending values from the device in one transfer; then write files, log and warn."""
        pending, self._pending = self._pending, []
        self._guarded(lambda: self._flush(pending))

    def close(self) -> None:
        """Flush, remove the hooks from the optimizers and close the files."""
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
            self._log_once(
                ("broken",),
                "monitor: stopped at step %s: %s: %s",
                self._step,
                type(error).__name__,
                error,
                level="error",
            )

    def _current(self) -> Dict[str, nn.Parameter]:
        """Return the current parameters; replaced ones are updated, removed ones are dropped."""
        for name, known in list(self.parameters.items()):
            parameter = at(self.model, name)
            if parameter is known:
                continue
            self._stuck[name] = dict.fromkeys(CAUSES, 0)
            if parameter is None:
                del self.parameters[name]
                self._log_once((name, "gone"), "monitor: %s is no longer in the model", name)
            else:
                self.parameters[name] = parameter
                self._previous[name] = parameter.detach().clone()
                self._steps.owned.discard(name)
                self._log_once(
                    (name, "replaced"),
                    "monitor: %s was replaced in the model; the new parameter is monitored",
                    name,
                    level="info",
                )
        return self.parameters

    def _record(self, grad_scale: float) -> None:
        parameters = self._current()
        steps = self._steps.take()
        entries = []
        with torch.no_grad():
            for name, parameter in parameters.items():
                if not parameter.numel():  # an empty shard (FSDP)
                    continue
                value = parameter.detach().float()
                change = distance(parameter, self._previous[name])
                self._previous[name] = parameter.detach().clone()
                step = steps.get(name)
                stepped = step is not None or not self._steps.observing
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
                transferred = torch.cat([torch.stack(numbers), value.flatten()[:MAX_ENTRIES]])
                entries.append(Pending(name, stepped, norm is not None, transferred))
        self._pending.append(Row(self._step, entries))

    def _flush(self, pending: List[Row]) -> None:
        parts = [entry.numbers for row in pending for entry in row.parameters]
        if not parts:
            return
        flat = torch.cat([part.to(parts[0].device) for part in parts]).tolist()
        start, lines = 0, []
        for step, entries in pending:
            for name, stepped, has_gradient, numbers in entries:
                stop = start + len(numbers)
                value, norm, change, moved, found_inf, *values = flat[start:stop]
                start = stop
                # A changed parameter means a step, also if no hook has seen one.
                stepped = (stepped or change != 0.0 and math.isfinite(change)) and not found_inf
                record: Dict[str, Any] = {
                    "step": step,
                    "name": name,
                    "value": value,
                    "change": change,
                    "grad_norm": norm if has_gradient and stepped else None,
                    "stepped": stepped,
                }
                if len(values) > 1 and self._numel(name) <= MAX_ENTRIES:
                    record["values"] = values
                self._count(
                    record, not_finite=has_gradient and not math.isfinite(norm), moved=moved > 0.0
                )
                if stepped or not self.last.get(name, {}).get("stepped"):
                    self.last[name] = record
                lines.append(record)
            if self.log and self.writes and step % self.interval == 0:
                telemetry.logger().info(
                    "step %d: %s", step, "; ".join(map(summarise, self.last.values()))
                )
        self._sinks.write(lines)

    def _numel(self, name: str) -> int:
        parameter = self.parameters.get(name)
        return 0 if parameter is None else parameter.numel()

    def _count(self, record: Dict[str, Any], not_finite: bool, moved: bool) -> None:
        name, norm = record["name"], record["grad_norm"]
        parameter = self.parameters.get(name)
        if parameter is None:
            return
        stepped = record["stepped"]
        if stepped:
            fields = [
                field
                for field, key in (("gradient", "grad_norm"), ("value", "value"))
                if record[key] is not None and not math.isfinite(record[key])
            ]
            if fields:
                numbers = ", ".join(
                    f"{record['grad_norm' if field == 'gradient' else field]:g}" for field in fields
                )
                self._log_once(
                    (name, "not finite", fields[-1]),
                    "monitor: %s: its %s not finite (%s), first at step %d",
                    name,
                    " and its ".join(fields) + (" are" if len(fields) > 1 else " is"),
                    numbers,
                    record["step"],
                )
        still = stepped and record["change"] == 0.0 and bool(norm) and not not_finite
        signs = {
            "none": stepped and norm is None,
            "zero": stepped and norm == 0.0,
            "unchanged": still and not moved,
            "set back": still and moved,
            "left out": not stepped and not_finite,
            "no step": not stepped and not not_finite,
        }
        for reason, is_present in signs.items():
            counts, limit = self._stuck[name], self.patience * PATIENCE.get(reason, 1)
            if stepped or reason in ("left out", "no step"):
                counts[reason] = counts[reason] + 1 if is_present else 0
            if is_present and counts[reason] == limit:
                symptom = CAUSES[reason]
                self._log_once(
                    (name, reason),
                    "monitor: %s %s for %d steps: %s; link by link: flashbias why %s -- CMD",
                    name,
                    symptom.text,
                    limit,
                    self._likely(reason, parameter) or symptom.cause,
                    name,
                )

    def _likely(self, reason: str, parameter: nn.Parameter) -> Optional[str]:
        if not parameter.requires_grad:
            return _cause_text("frozen")
        if reason == "unchanged" and (self._steps.given or self._steps.stepping):
            groups = self._steps.holders(parameter)
            if not groups:
                return _cause_text("not held")
            if all(g.get("lr") == 0 for g in groups):
                return _cause_text("lr 0", key="", how="")
        if reason == "none" and not telemetry.calls:
            return (
                "no attention was computed by flashbias_patch; is it installed in this process "
                "(python -c 'import flashbias_patch; print(flashbias_patch.status())', flashbias "
                "doctor)?"
            )
        return None

    def _log_once(self, key: Any, message: str, *args: Any, level: str = "warning") -> None:
        if self.writes:
            telemetry.once(("monitor", self._serial, *key), level, message, *args)


class Symptom(NamedTuple):
    """A sign that a parameter is stuck, and its likely cause if nothing more is known."""

    text: str
    cause: str


CAUSES = {
    "none": Symptom(
        "got no gradient",
        "the bias is dropped before attention (by an unpatched flash attention class), lost by "
        "reentrant checkpointing, or the parameter is not used in forward",
    ),
    "zero": Symptom(
        "has a gradient of exactly 0",
        "the bias is the same for all keys of a query, so softmax ignores it (one segment, or "
        "uniform weights); it is multiplied by 0; or forward clamps it and it is outside the "
        "bounds",
    ),
    "unchanged": Symptom(
        "has not moved",
        "it gets a gradient, but no step changes it: check its learning rate, and whether the "
        "step is smaller than its precision (half)",
    ),
    "set back": Symptom(
        "is changed by each step and set back",
        "it is clamped at its bound after the step, or restored",
    ),
    "left out": Symptom(
        "has gradients that are not finite, and no step was taken",
        "GradScaler skips such steps: the loss or a gradient is nan or inf",
    ),
    "no step": Symptom(
        "was in no step of an optimizer",
        "the optimizer was rebuilt without it, gradients are accumulated for longer than that, or "
        "GradScaler skips every step",
    ),
}
PATIENCE = {"no step": 4}  # times patience, because long accumulation is allowed


def check_counts(**counts: Any) -> None:
    """Raise ValueError for the first of `counts` that is not a positive integer."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _cause_text(cause: str, **values: str) -> str:
    """Format finding and change of a cause from the table of `flashbias why`."""
    link = causes.describe(cause, **values)
    return f"{link['finding']} ({link['change']})"


def summarise(record: Dict[str, Any]) -> str:
    """Format a record for the log line."""
    if not record["stepped"]:
        return f"{record['name']} {record['value']:.6g} (no optimizer step)"
    gradient = "no gradient" if record["grad_norm"] is None else f"grad {record['grad_norm']:.3g}"
    return f"{record['name']} {record['value']:.6g} ({gradient}, change {record['change']:.3g})"
