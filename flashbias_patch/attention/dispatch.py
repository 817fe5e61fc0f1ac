"""Which backend answers a call, why the others were passed over, and what happens when one fails.

Order matters: the first backend whose `why_not` is empty takes the call. A failure opens a circuit breaker for
that (backend, class of call), so that no later step pays for it again, and the next backend answers.
"""
from __future__ import annotations

import importlib
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from .. import journal, settings
from .inputs import AttentionInputs

# name -> module of backends/, in order of preference.
MODULES = {
    "triton": "triton_fused",
    "flash": "flash_attention",
    "upstream": "upstream_flashbias",
    "sdpa": "sdpa",
    "reference": "reference",
}

_loaded: Dict[str, Any] = {}
_broken: Dict[Tuple[str, str], str] = {}


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


def backend(name: str) -> Any:
    """The backend object of that name; importing it for the first time may load triton."""
    if name not in _loaded:
        try:
            module = importlib.import_module(f"{__package__}.backends.{MODULES[name]}")
            _loaded[name] = module.backend
        except ImportError as error:
            _loaded[name] = Unavailable(name, f"does not import here: {error}")
    return _loaded[name]


def candidates(pinned: Optional[str] = None) -> List[str]:
    """Backend names in the order they are asked: one if pinned by argument or FLASHBIAS_BACKEND."""
    chosen = pinned or settings.current().backend
    if chosen == "auto":
        return list(MODULES)
    if chosen not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)}, got {chosen!r}")
    return [chosen]


def reasons_against(inputs: AttentionInputs, name: str) -> List[str]:
    """Why that backend would not take the call; empty if it would."""
    why = backend(name).why_not(inputs)
    broken = None if why else _broken.get((name, inputs.call_class()))
    return [broken] if broken else why


def attend(inputs: AttentionInputs, pinned: Optional[str] = None) -> Tensor:
    """Answer a call with the first backend that takes it.

    Raises NoBackendError when none does, or, under FLASHBIAS_STRICT, as soon as one fails.
    """
    passed: List[str] = []
    for name in candidates(pinned):
        why = reasons_against(inputs, name)
        if not why:
            state = _random_state(inputs)
            try:
                out = backend(name)(inputs)
            except Exception as error:
                if not survivable(error):
                    raise
                why = [f"{type(error).__name__}: {_first_line(error)}"]
                _broken[name, inputs.call_class()] = why[0]
                journal.fallback(name, inputs.call_class(), why[0])
                if settings.current().strict:
                    passed.append(f"{name}: {why[0]}")
                    raise NoBackendError(_message(inputs, passed)) from error
                _restore_random_state(state)
            else:
                journal.calls[name] += 1
                return out
        passed.append(f"{name}: {'; '.join(why)}")
    raise NoBackendError(_message(inputs, passed))


def explain(inputs: AttentionInputs) -> Dict[str, List[str]]:
    """{backend: reasons against it} for one call, without running anything."""
    return {name: reasons_against(inputs, name) for name in MODULES}


def survivable(error: BaseException) -> bool:
    """What the machine or a library could not do is survivable; a wrecked CUDA context is not."""
    text = str(error)
    return not any(sign in text for sign in ("illegal memory access", "device-side assert", "unspecified launch"))


def _message(inputs: AttentionInputs, passed: List[str]) -> str:
    return f"no attention backend takes this call ({inputs.call_class()}):\n  " + "\n  ".join(passed)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _random_state(inputs: AttentionInputs) -> Optional[Tuple[Tensor, Optional[Tensor]]]:
    if not inputs.dropout_p:
        return None
    cuda = torch.cuda.get_rng_state(inputs.q.device) if inputs.q.is_cuda else None
    return torch.get_rng_state(), cuda


def _restore_random_state(state: Optional[Tuple[Tensor, Optional[Tensor]]]) -> None:
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])


def reset() -> None:
    """Close every circuit breaker and forget loaded backends (tests)."""
    _broken.clear()
    _loaded.clear()
