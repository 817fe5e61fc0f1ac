"""Watching named parameters in training: value, gradient norm, step-to-step change, and a word when one is stuck."""
from __future__ import annotations

import fnmatch
import json
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .. import journal

DEFAULT_NAMES = ("*bias_scale",)
FEW = 16  # parameters of at most so many entries are written out entry by entry
TRANSFER = 10  # steps between transfers from the device, at most: each one waits for it


class ParameterMonitor:
    """Records parameters once a step; call `update()` after every optimizer step (and before or after zero_grad).

    Args:
        model: the model, wrapped by DDP or not.
        names: patterns as in fnmatch against the names in the model, "*" in front implied: "bias_scale".
        optimizer: where gradients are read, just before each step: unscaled there under GradScaler, and still there
            where a loop clears them before `update()`. Without it, `.grad` is read in `update()`.
        interval: steps between log lines.
        patience: K: after so many steps in a row without gradient, or without a change of value, warn once.
        jsonl, tensorboard: a file to append to, and a directory for scalars; rank 0 writes.
        log: write log lines to the logger `flashbias_patch`.

    A record: step, name, value (the mean of several entries; `values` holds at most 16), grad_norm (None where no
    gradient arrived), change (norm of the value's change since the step before).
    """

    def __init__(
        self,
        model: nn.Module,
        names: Union[str, Sequence[str]] = DEFAULT_NAMES,
        *,
        optimizer: Optional[torch.optim.Optimizer] = None,
        interval: int = 50,
        patience: int = 50,
        jsonl: Optional[str] = None,
        tensorboard: Optional[str] = None,
        log: bool = True,
    ) -> None:
        for name, value in (("interval", interval), ("patience", patience)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.interval, self.patience, self.log = interval, patience, log
        self.optimizer = optimizer
        self.writes = rank() == 0
        self.parameters = named(model, self.names)
        self.last: Dict[str, Dict[str, Any]] = {}
        self._step = 0
        self._pending: List[Tuple[int, List[Tensor], bool]] = []
        self._previous = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._norms: Optional[Dict[str, Optional[Tensor]]] = None
        self._stuck = {name: dict.fromkeys(CAUSES, 0) for name in self.parameters}
        self._jsonl = jsonl if self.writes else None
        self._board: Any = None
        if tensorboard is not None and self.writes:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard)
        if not self.parameters:
            known = [n for n, _ in unwrapped(model).named_parameters() if "aqr" in n or "bias" in n.rsplit(".", 1)[-1]]
            self._say(("none", self.names), "monitor: no parameter is called %s%s", ", ".join(self.names),
                      f"; there are {', '.join(known[:5])}, ..." if known else "")
        register = getattr(optimizer, "register_step_pre_hook", None)  # torch >= 2.0
        self._handle = register(self._before_step) if register is not None else None

    def update(self, step: Optional[int] = None, grad_scale: float = 1.0) -> None:
        """One training step is over.

        step: its number, default counted from 1. grad_scale: what `.grad` is still multiplied by, where there is no
        `optimizer` to read it from: scaler.get_scale() before scaler.unscale_, else 1.
        """
        self._step = self._step + 1 if step is None else step
        norms = self._gradients(grad_scale) if self._handle is None else self._norms
        row = []
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                value = parameter.detach().float()
                norm = None if norms is None else norms[name]
                change = (parameter.detach() - self._previous[name].to(parameter.device)).float().norm()
                self._previous[name] = parameter.detach().clone()
                nan = value.new_full((), float("nan"))
                norm = nan if norm is None else norm.to(value.device)
                row.append(torch.cat([torch.stack([value.mean(), norm, change]), value.flatten()[:FEW]]))
        skipped = self._handle is not None and norms is None  # the scaler left this step out
        self._norms = None
        self._pending.append((self._step, row, skipped))
        if len(self._pending) >= min(self.interval, self.patience, TRANSFER):
            self.flush()

    def flush(self) -> None:
        """Bring what is pending over from the device: one transfer, then files, log line and warnings."""
        pending, self._pending = self._pending, []
        if not pending or not self.parameters:
            return
        device = pending[0][1][0].device
        flat = torch.cat([part.to(device) for _, row, _ in pending for part in row]).tolist()
        start, lines = 0, []
        for step, row, skipped in pending:
            for (name, parameter), part in zip(self.parameters.items(), row):
                value, norm, change, *values = flat[start:start + len(part)]
                start += len(part)
                record: Dict[str, Any] = {"step": step, "name": name, "value": value, "change": change,
                                          "grad_norm": None if norm != norm else norm}
                if 1 < parameter.numel() <= FEW:
                    record["values"] = values
                if not skipped:
                    self._count(name, parameter, record)
                self.last[name] = record
                lines.append(json.dumps(record))
                if self._board is not None:
                    for key in ("value", "grad_norm", "change"):
                        if record[key] is not None:
                            self._board.add_scalar(f"{name}/{key}", record[key], step)
            if self.log and self.writes and step % self.interval == 0:
                journal.logger().info("step %d: %s", step, "; ".join(map(words, self.last.values())))
        if self._jsonl is not None:
            with open(self._jsonl, "a") as file:
                file.write("\n".join(lines) + "\n")

    def close(self) -> None:
        """Flush, and let go of the optimizer and the files."""
        self.flush()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._board is not None:
            self._board.close()

    # -- gradients ------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Fused optimizers unscale by themselves: then the scale is on the optimizer."""
        scale = getattr(optimizer, "grad_scale", None)
        self._norms = self._gradients(1.0 if scale is None else scale)

    def _gradients(self, scale: Union[float, Tensor]) -> Dict[str, Optional[Tensor]]:
        return {
            name: None if p.grad is None else p.grad.detach().float().norm() / scale
            for name, p in self.parameters.items()
        }

    # -- stuck parameters -----------------------------------------------------------------------------------------

    def _count(self, name: str, parameter: nn.Parameter, record: Dict[str, Any]) -> None:
        seen = {"none": record["grad_norm"] is None, "zero": record["grad_norm"] == 0.0,
                "unchanged": record["change"] == 0.0 and bool(record["grad_norm"])}
        for reason, present in seen.items():
            counts = self._stuck[name]
            counts[reason] = counts[reason] + 1 if present else 0
            if counts[reason] == self.patience:
                what, cause = CAUSES[reason]
                self._say((name, reason), "monitor: %s %s for %d steps: %s", name, what, self.patience,
                          self._likely(reason, parameter) or cause)

    def _likely(self, reason: str, parameter: nn.Parameter) -> Optional[str]:
        if not parameter.requires_grad:
            return "it does not require a gradient (frozen)"
        if reason == "unchanged" and self.optimizer is not None:
            groups = [g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"])]
            if not groups:
                return "the optimizer does not hold it; it was built before the parameter, or filters by name"
            if all(g["lr"] == 0 for g in groups):
                return "its learning rate is 0"
        if reason == "none" and not journal.calls:
            return ("no attention went through flashbias_patch; is it installed in this process "
                    "(python -c 'import flashbias_patch; print(flashbias_patch.status())', flashbias doctor)?")
        return None

    def _say(self, key: Any, message: str, *args: Any) -> None:
        if self.writes:
            journal.once(("monitor", id(self), *key), "warning", message, *args)


# reason -> (what is seen, its likely cause where nothing more is known)
CAUSES = {
    "none": ("got no gradient", "the bias is dropped on its way (a flash attention class that is not patched), lost by "
                                "reentrant checkpointing, or the parameter is not used in forward"),
    "zero": ("has a gradient of exactly 0", "the bias is the same for all keys of a query, which softmax does not see "
                                            "(one segment, or uniform weights), or it is multiplied by 0"),
    "unchanged": ("has not moved", "a gradient arrives, but no step moves it: see its learning rate, and whether the "
                                   "step is smaller than its precision (half)"),
}


def named(model: nn.Module, names: Sequence[str]) -> Dict[str, nn.Parameter]:
    """Parameters of the unwrapped model whose name fits one of the patterns."""
    return {
        name: parameter for name, parameter in unwrapped(model).named_parameters()
        if any(fnmatch.fnmatchcase(name, "*" + pattern.lstrip("*")) for pattern in names)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """Without DistributedDataParallel, MMDataParallel and the like."""
    while isinstance(getattr(model, "module", None), nn.Module) and len(list(model.children())) == 1:
        model = model.module  # type: ignore[assignment]
    return model


def words(record: Dict[str, Any]) -> str:
    gradient = "no gradient" if record["grad_norm"] is None else f"grad {record['grad_norm']:.3g}"
    return f"{record['name']} {record['value']:.6g} ({gradient}, change {record['change']:.3g})"


def rank() -> int:
    """This process among those of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return journal.rank()
