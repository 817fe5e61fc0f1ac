"""Backend selection: which backends there are, the order in which a call tries them, and why one
does not take it."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Dict, Iterable, List, NamedTuple, NoReturn, Optional, Set, Tuple

from torch import Tensor

from .. import settings, telemetry
from . import order
from .breaker import breakers
from .inputs import AttentionInputs
from .recovery import errors
from .signature import Key, describe, key_of

# name -> module of backends/, in order of preference.
MODULES = {
    "triton": "triton_fused",
    "flash": "flash_attention",
    "upstream": "upstream_flashbias",
    "sdpa": "sdpa",
    "reference": "reference",
}
LAST_RESORT = (
    "reference"  # plain PyTorch: trusted by definition, takes every call, needs the least memory
)

_loaded: Dict[str, Any] = {}
_told: Set[Key] = set()  # classes of call of which tell_pinned has told


class NoBackendError(RuntimeError):
    """No backend takes a call; the message lists every backend with its reasons."""


class Unavailable:
    """Stands for a backend whose module does not import here."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def why_not(self, inputs: AttentionInputs) -> List[str]:
        return [self.reason]

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        raise RuntimeError(self.reason)


class Candidates(NamedTuple):
    """Backend names in the order in which a call tries them."""

    names: Tuple[str, ...]
    chosen: bool  # by an argument or FLASHBIAS_BACKEND


def backend(name: str) -> Any:
    """The backend object of that name; importing it for the first time may load triton."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(
                f"{__package__}.backends.{MODULES[name]}"
            ).backend
        except Exception as error:  # a broken installation raises anything, not ImportError alone
            if not errors.survivable(error):
                raise
            _loaded[name] = Unavailable(name, f"does not import here: {errors.first_line(error)}")
            if not isinstance(error, ModuleNotFoundError):
                telemetry.once(("import", name), "warning", "%s %s", name, _loaded[name].reason)
    return _loaded[name]


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


# -- reasons ---------------------------------------------------------------------------------------


def reasons_against(inputs: AttentionInputs, name: str, key: Optional[Key] = None) -> List[str]:
    """Why that backend would not take the call; empty if it would (as far as is known without
    running it)."""
    out = breakers.reason(key_of(inputs) if key is None else key, name)
    return [out] if out else backend(name).why_not(inputs)


def explain(inputs: AttentionInputs) -> Dict[str, List[str]]:
    """{backend: reasons against it} for one call, without running anything."""
    return {name: reasons_against(inputs, name) for name in MODULES}


def tell_pinned(name: str, inputs: AttentionInputs, key: Key) -> None:
    """One line where FLASHBIAS_BACKEND asks for a backend and another one answers."""
    pinned = settings.current().backend
    if pinned not in ("auto", name) and key not in _told:
        _told.add(key)
        why = "; ".join(reasons_against(inputs, pinned, key))
        reason = f"FLASHBIAS_BACKEND={pinned} cannot take it ({why}); {name} answers"
        telemetry.fallback(pinned, describe(key), reason)


def refuse(
    inputs: AttentionInputs, key: Key, names: Iterable[str], failure: Optional[Exception] = None
) -> NoReturn:
    """Raise NoBackendError: none of `names` takes the call. `failure` is what the last of them
    raised, if one did."""
    raise NoBackendError(_message(inputs, key, names)) from failure


def refuse_if_strict(
    inputs: AttentionInputs, key: Key, name: str, error: Optional[BaseException] = None
) -> None:
    """Under FLASHBIAS_STRICT, raise NoBackendError since backend `name` failed."""
    if settings.current().strict:
        raise NoBackendError(
            _message(inputs, key, MODULES, f"FLASHBIAS_STRICT: {name} failed. ")
        ) from error


def _message(inputs: AttentionInputs, key: Key, names: Iterable[str], prefix: str = "") -> str:
    lines = [f"{prefix}no attention backend takes this call ({describe(key)}):"]
    for name in names:
        lines.append(f"{name}: {'; '.join(reasons_against(inputs, name, key)) or 'not asked'}")
    return "\n  ".join(lines)


def reset() -> None:
    """Forget loaded backends."""
    _loaded.clear()
    _told.clear()
