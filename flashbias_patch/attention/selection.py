"""Backend selection: which backends there are, the order in which a call tries them, and why one
does not take it."""

from __future__ import annotations

import functools
import importlib
from typing import Dict, Iterable, List, NamedTuple, NoReturn, Optional, Set, Tuple

from .. import settings, telemetry
from . import order
from .backends.base import Backend, Unavailable
from .breaker import breakers
from .inputs import AttentionInputs
from .recovery import errors
from .signature import CallSignature, signature_of

# name -> module of backends/, in order of preference.
MODULES = {
    "triton": "triton_fused",
    "flash": "flash_attention",
    "upstream": "upstream_flashbias",
    "sdpa": "sdpa",
    "reference": "reference",
}
# Plain PyTorch: it is the reference, takes every call, and needs the least memory.
LAST_RESORT = "reference"

loaded: Dict[str, Backend] = {}  # name -> backend object
_reported: Set[CallSignature] = set()  # signatures that report_pinned has logged


class NoBackendError(RuntimeError):
    """No backend takes a call; the message lists every backend with its reasons."""


class Candidates(NamedTuple):
    """Backend names in the order in which a call tries them."""

    names: Tuple[str, ...]
    chosen: bool  # by an argument or FLASHBIAS_BACKEND


def backend(name: str) -> Backend:
    """The backend object of that name; importing it for the first time may load triton."""
    if name not in loaded:
        try:
            module = importlib.import_module(f"{__package__}.backends.{MODULES[name]}")
            loaded[name] = module.backend
        except Exception as error:  # a broken installation raises anything, not ImportError alone
            if not errors.survivable(error):
                raise
            reason = f"does not import here: {errors.first_line(error)}"
            loaded[name] = Unavailable(name, reason)
            if not isinstance(error, ModuleNotFoundError):
                telemetry.once(("import", name), "warning", "%s %s", name, reason)
    return loaded[name]


def candidates(inputs: AttentionInputs, grad: bool, pinned: Optional[str] = None) -> Candidates:
    """The backends of a call in the order in which it tries them. `grad`: it wants gradients.

    An argument pins one; FLASHBIAS_BACKEND puts one first, and under FLASHBIAS_STRICT leaves it
    alone. Otherwise the order is the measured one (order.py).
    """
    if pinned is not None or settings.current().backend != "auto":
        return chosen(pinned)
    return _measured(order.fastest(inputs, grad) if inputs.q.is_cuda else (), tuple(MODULES))


def chosen(pinned: Optional[str] = None) -> Candidates:
    """The order that an argument or FLASHBIAS_BACKEND asks for; ValueError for an unknown name."""
    name = pinned or settings.current().backend
    if name == "auto":
        return Candidates(tuple(MODULES), False)
    if name not in MODULES:
        raise ValueError(f"backend must be one of auto, {', '.join(MODULES)}, got {name!r}")
    if pinned or settings.current().strict:
        return Candidates((name,), True)
    return Candidates((name, *(other for other in MODULES if other != name)), True)


@functools.lru_cache(maxsize=64)
def _measured(fastest: Tuple[str, ...], names: Tuple[str, ...]) -> Candidates:
    """`names`, those in `fastest` in its order and before the others."""
    first = tuple(name for name in fastest if name in names)
    return Candidates(first + tuple(name for name in names if name not in first), False)


def reasons_against(
    inputs: AttentionInputs, name: str, signature: Optional[CallSignature] = None
) -> List[str]:
    """The reasons why that backend would not take the call; empty if it would (as far as is known
    without running it)."""
    out = breakers.reason(signature_of(inputs) if signature is None else signature, name)
    return backend(name).why_not(inputs) if out is None else [out]


def explain(inputs: AttentionInputs) -> Dict[str, List[str]]:
    """{backend: reasons against it} for one call, without running anything."""
    return {name: reasons_against(inputs, name) for name in MODULES}


def report_pinned(name: str, inputs: AttentionInputs, signature: CallSignature) -> None:
    """Log once per signature that `name` computes a call for which FLASHBIAS_BACKEND names another
    backend."""
    pinned = settings.current().backend
    if pinned not in ("auto", name) and signature not in _reported:
        _reported.add(signature)
        why = "; ".join(reasons_against(inputs, pinned, signature))
        reason = f"FLASHBIAS_BACKEND={pinned} cannot take it ({why}); {name} is used"
        telemetry.fallback(pinned, signature.describe(), reason)


def refuse(
    inputs: AttentionInputs, signature: CallSignature, names: Iterable[str],
    failure: Optional[Exception] = None,
) -> NoReturn:  # fmt: skip
    """Raise NoBackendError: none of `names` takes the call. `failure` is the exception of the last
    one that failed, if one did."""
    raise NoBackendError(_message(inputs, signature, names)) from failure


def refuse_if_strict(
    inputs: AttentionInputs, signature: CallSignature, name: str,
    error: Optional[BaseException] = None,
) -> None:  # fmt: skip
    """Under FLASHBIAS_STRICT, raise NoBackendError because backend `name` failed."""
    if settings.current().strict:
        raise NoBackendError(
            _message(inputs, signature, MODULES, f"FLASHBIAS_STRICT: {name} failed. ")
        ) from error


def _message(
    inputs: AttentionInputs, signature: CallSignature, names: Iterable[str], prefix: str = ""
) -> str:
    lines = [f"{prefix}no attention backend takes this call ({signature.describe()}):"]
    for name in names:
        reasons = reasons_against(inputs, name, signature) or ["not tried"]
        lines.append(f"{name}: {'; '.join(reasons)}")
    return "\n  ".join(lines)


def reset() -> None:
    """Forget loaded backends."""
    loaded.clear()
    _reported.clear()
