"""Circuit breakers: which backend is trusted with which class of call, and which one is out for it,
with the reason."""

from __future__ import annotations

import enum
from typing import Any, Dict, List, NamedTuple, Tuple

from .. import telemetry
from .._torch_internals import current_graph_task
from . import kept_verdicts
from .signature import Key, describe

_current_graph_task = current_graph_task


class State(enum.Enum):
    TRUSTED = "trusted"
    OUT = "out"


class Phase(enum.Enum):
    """Where a backend failed."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Verdict(NamedTuple):
    state: State
    reason: str = ""  # why it is out


TRUSTED = Verdict(State.TRUSTED)


class CircuitBreaker:
    """Verdicts by class of call and backend. A backend without a verdict has not been tried for
    that class."""

    def __init__(self) -> None:
        self.by_class: Dict[Key, Dict[str, Verdict]] = {}
        # Opened by a backward pass: they wait for the next forward, since what is recomputed until
        # then must take the backend that its forward took.
        self.pending: List[Tuple[Key, str, str]] = []
        self.plans: Dict[
            Any, Any
        ] = {}  # made of verdicts (plans.py): forgotten when these may change

    def verdicts(self, key: Key) -> Dict[str, Verdict]:
        """{backend: verdict} of one class of call; what is written to it is kept."""
        self.plans.clear()
        found = self.by_class.get(key)
        if found is None:
            found = self.by_class[key] = {}
        return found

    def reason(self, key: Key, name: str) -> str:
        """Why that backend is out for the class; empty if it is not."""
        verdict = self.by_class.get(key, {}).get(name)
        return "" if verdict is None else verdict.reason

    def open(self, key: Key, name: str, reason: str, phase: Phase = Phase.FORWARD) -> None:
        """Log the failure and take the backend out for this class."""
        if phase is Phase.BACKWARD:
            reason = f"backward: {reason}"
        telemetry.fallback(name, describe(key), reason)
        kept_verdicts.forget(key, name)
        if phase is Phase.BACKWARD and _current_graph_task() != -1:
            self.pending.append((key, name, reason))
        else:
            self.verdicts(key)[name] = Verdict(State.OUT, reason)

    def open_pending(self) -> None:
        """Open those that a backward pass left, unless one is still running in this thread."""
        if _current_graph_task() == -1:
            self.plans.clear()
            while self.pending:
                key, name, reason = self.pending.pop()
                self.verdicts(key)[name] = Verdict(State.OUT, reason)

    def failures(self) -> List[Tuple[Key, str, str]]:
        """(class, backend, reason) of every backend that is out."""
        return [
            (key, name, verdict.reason)
            for key, found in self.by_class.items()
            for name, verdict in found.items()
            if verdict.state is State.OUT
        ]

    def close(self) -> None:
        """Forget every verdict."""
        self.plans.clear()
        self.by_class.clear()
        self.pending.clear()


breakers = CircuitBreaker()
