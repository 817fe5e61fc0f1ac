"""FiniteWatch: find the first output or gradient of a model that is not finite."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .. import telemetry
from .._torch_internals import current_graph_task
from .models import rank, unwrapped

HALF = ("float16", "bfloat16")
# Before torch 2.0 a hook is not given the keyword arguments: inputs passed so are not looked at.
_OPTIONS = inspect.signature(nn.Module.register_forward_pre_hook).parameters
WITH_KWARGS: Dict[str, Any] = {"with_kwargs": True} if "with_kwargs" in _OPTIONS else {}


class Finding(NamedTuple):
    """The first value that is not finite.

    Attributes:
        what: "input", "output" or "gradient" (of the loss with respect to the module's output).
        module: name in the model; kind: its class.
        backends: the attention backends that ran in it; empty without attention, "original" for the
            unpatched code.
        dtype: of the tensor. autocast: the dtype of the active autocast, or None.
        step: counted from 1, or as given to update().
        entries: numbers of nan, of infinite and of all entries.
        advice: what to try first.
    """

    what: str
    module: str
    kind: str
    backends: Tuple[str, ...]
    dtype: str
    autocast: Optional[str]
    step: int
    entries: Tuple[int, int, int]
    advice: str


class _Value(NamedTuple):
    what: str
    module: str
    kind: str
    backends: Tuple[str, ...]
    dtype: str
    autocast: Optional[str]
    size: int
    counts: Tensor  # (2,): nan, infinite


class FiniteWatch:
    """Name the first output or gradient of `model` that is nan or infinite.

    Call `update()` once per step. The output of each module and its gradient are reduced to two
    numbers on their device; `update()` copies these to the host in one transfer per step. This
    costs two reductions per module, so use it to search for a fault, not in every training: create
    it, train until it reports a module, and close it.

    Args:
        model: the model, wrapped by DDP or not.
        names: watch only modules whose name starts with one of these; default: all.
        stop: raise FloatingPointError in `update()` for a value that is not finite. Default: log
            one warning.

    `first` holds the Finding, or None. It is the first in the order of execution: of the forward
    pass if an output is not finite, else of the backward pass, which begins at the loss. The first
    steps of a GradScaler overflow by design: `update(skipped=True)`, for a step that it skipped,
    ignores the gradients of that step.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str] = ("",), *, stop: bool = False
    ) -> None:
        self.model = unwrapped(model)
        self.stop = stop
        self.first: Optional[Finding] = None
        self._step = 0
        self._values: List[_Value] = []
        self._calls: List[Dict[str, int]] = []
        self._handles: List[Any] = []
        this = weakref.ref(self)
        for name, module in self.model.named_modules():
            if any(name.startswith(start) for start in names):
                self._handles.append(
                    module.register_forward_pre_hook(_before(this, name), **WITH_KWARGS)
                )
                self._handles.append(module.register_forward_hook(_after(this, name)))

    def update(self, step: Optional[int] = None, *, skipped: bool = False) -> Optional[Finding]:
        """Check the values of the last step; return the Finding in the step where it is made.

        step: its number, by default counted from 1. skipped: GradScaler skipped this step.

        Raises:
            FloatingPointError: a value is not finite, and `stop` is True.
        """
        self._step = self._step + 1 if step is None else step
        values, self._values, self._calls = self._values, [], []
        if self.first is not None or not values:
            return None
        counts = torch.stack(
            [value.counts.to(values[0].counts.device) for value in values]
        ).tolist()
        not_finite = [
            (value, n)
            for value, n in zip(values, counts)
            if any(n) and not (skipped and value.what == "gradient")
        ]
        # The sort is stable: forward values first, each group in the order of execution.
        not_finite.sort(key=lambda entry: entry[0].what == "gradient")
        if not not_finite:
            return None
        value, (nans, infinite) = not_finite[0]
        self.first = Finding(
            value.what,
            value.module,
            value.kind,
            value.backends,
            value.dtype,
            value.autocast,
            self._step,
            (int(nans), int(infinite), value.size),
            advice(value.what, value.dtype, value.backends, nans > 0),
        )
        if rank() == 0:
            telemetry.once(
                ("monitor finite", id(self)), "warning", "monitor: %s", sentence(self.first)
            )
        if self.stop:
            self.close()
            raise FloatingPointError(f"monitor: {sentence(self.first)}")
        return self.first

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, name: str, module: nn.Module, args: Tuple[Any, ...]) -> None:
        if current_graph_task() == -1:
            self._calls.append(dict(telemetry.calls))
            if not self._values:  # the input of the model
                for tensor in _tensors(args):
                    self._note("input", name, module, (), tensor)

    def _leave(self, name: str, module: nn.Module, out: Any) -> None:
        backends: Tuple[str, ...] = ()
        recomputed = current_graph_task() != -1
        if not recomputed and self._calls:
            before = self._calls.pop()
            backends = tuple(
                sorted(key for key, count in telemetry.calls.items() if count > before.get(key, 0))
            )
        this = weakref.ref(self)
        for tensor in _tensors(out):
            if not recomputed:
                self._note("output", name, module, backends, tensor)
            if tensor.requires_grad:
                tensor.register_hook(_gradient(this, name, module, backends))

    def _note(
        self, what: str, name: str, module: nn.Module, backends: Tuple[str, ...], tensor: Tensor
    ) -> None:
        with torch.no_grad():
            values = tensor.detach()
            counts = torch.stack([values.isnan().sum(), values.isinf().sum()])
        autocast = str(torch.get_autocast_gpu_dtype())[6:] if torch.is_autocast_enabled() else None
        self._values.append(
            _Value(
                what,
                name,
                type(module).__name__,
                backends,
                str(tensor.dtype)[6:],
                autocast,
                tensor.numel(),
                counts,
            )
        )


def _before(this: Any, name: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any = ()) -> None:
        watch = this()
        if watch is not None:
            watch._enter(name, module, (args, kwargs))

    return hook


def _after(this: Any, name: str) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        watch = this()
        if watch is not None:
            watch._leave(name, module, out)

    return hook


def _gradient(this: Any, name: str, module: nn.Module, backends: Tuple[str, ...]) -> Any:
    def hook(gradient: Tensor) -> None:
        watch = this()
        if watch is not None:
            watch._note("gradient", name, module, backends, gradient)

    return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of an output, also in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if (
            type(value) in (Tensor, nn.Parameter)
            and value.is_floating_point()
            and value.layout == torch.strided
        ):
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def sentence(finding: Finding) -> str:
    """Describe a Finding in one sentence."""
    nans, infinite, size = finding.entries
    attention = f", attention by {', '.join(finding.backends)}" if finding.backends else ""
    autocast = f" under autocast to {finding.autocast}" if finding.autocast else ""
    return (
        f"the first {finding.what} that is not finite belongs to {finding.module or 'the model'} "
        f"({finding.kind}{attention}, "
        f"{finding.dtype}{autocast}) at step {finding.step}: {nans} nan and {infinite} infinite of "
        f"{size}; {finding.advice}"
    )


def advice(what: str, dtype: str, backends: Sequence[str], is_nan: bool) -> str:
    """Return what to try first."""
    if what == "input":
        return "check the batch: the input data are not finite"
    if what == "gradient" and dtype == "float16":
        return (
            "the gradient overflows float16: GradScaler lowers its scale in the first steps; if "
            "the overflow persists, use bfloat16 or clip gradients (grad_clip)"
        )
    if what == "gradient":
        return (
            "outputs are finite, so check the operations between this module and the loss: a root "
            "or a norm at 0, a logarithm of 0, a division"
        )
    if dtype == "float16" and not is_nan:
        return (
            "the values overflow float16 (65504): use bfloat16, or float32 for this module "
            "(force_fp32, "
            "FLASHBIAS_DTYPE=bf16)"
        )
    if backends == ("original",):
        return (
            "the unpatched attention gives nan for a query whose keys are all masked: run "
            "patched, which gives 0"
        )
    if backends:
        return (
            "try FLASHBIAS_BACKEND=reference: if the error stays, the inputs are too large; if "
            "not, report it with flashbias doctor --markdown"
        )
    if dtype in HALF:
        return "compute this module in float32"
    return (
        "check its parameters (diverged because of the learning rate) and operations such as "
        "a logarithm or a root"
    )
