"""Circuit breakers: per call signature, the backends that may compute it, and those that failed,
with the reason."""

from __future__ import annotations

import enum
from typing import Any, Dict, List, NamedTuple, Optional

from .. import telemetry
from .._torch_internals import current_graph_task
from . import kept_verdicts
from .signature import CallSignature


class State(enum.Enum):
    TRUSTED = "trusted"
    OUT = "out"


class Phase(enum.Enum):
    """The pass in which a backend failed."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Verdict(NamedTuple):
    """`reason`: why the backend is out; without meaning where it is trusted."""

    state: State
    reason: str = ""


TRUSTED = Verdict(State.TRUSTED)


class Failure(NamedTuple):
    """A backend that is out for a signature."""

    signature: CallSignature
    backend: str
    reason: str


class CircuitBreaker:
    """Verdicts per call signature and backend. A backend without a verdict has not been tried for
    that signature."""

    def __init__(self) -> None:
        self.by_signature: Dict[CallSignature, Dict[str, Verdict]] = {}
        # Opened by a backward pass. They wait for the next forward, because what is recomputed
        # until then must use the backend of its forward.
        self.pending: List[Failure] = []
        # Plans follow from verdicts (plans.py), and are forgotten when these may change.
        self.plans: Dict[Any, Any] = {}

    def verdicts(self, signature: CallSignature) -> Dict[str, Verdict]:
        """{backend: verdict} of one signature; the caller may add to it."""
        self.plans.clear()
        verdicts = self.by_signature.get(signature)
        if verdicts is None:
            verdicts = self.by_signature[signature] = {}
        return verdicts

    def reason(self, signature: CallSignature, backend: str) -> Optional[str]:
        """The reason why that backend is out for the signature; None if it is not."""
        verdict = self.by_signature.get(signature, {}).get(backend)
        return None if verdict is None or verdict.state is not State.OUT else verdict.reason

    def open(
        self, signature: CallSignature, backend: str, reason: str, phase: Phase = Phase.FORWARD
    ) -> None:
        """Log a failure, and take the backend out for this signature."""
        if phase is Phase.BACKWARD:
            reason = f"backward: {reason}"
        telemetry.fallback(backend, signature.describe(), reason)
        kept_verdicts.forget(signature, backend)
        failure = Failure(signature, backend, reason)
        if phase is Phase.BACKWARD and current_graph_task() != -1:
            self.pending.append(failure)
        else:
            self._take_out(failure)

    def open_pending(self) -> None:
        """Open the breakers that a backward pass left, unless one still runs in this thread."""
        if current_graph_task() == -1:
            self.plans.clear()
            while self.pending:
                self._take_out(self.pending.pop())

    def _take_out(self, failure: Failure) -> None:
        verdict = Verdict(State.OUT, failure.reason)
        self.verdicts(failure.signature)[failure.backend] = verdict

    def failures(self) -> List[Failure]:
        """Every backend that is out, per signature."""
        return [
            Failure(signature, backend, verdict.reason)
            for signature, verdicts in self.by_signature.items()
            for backend, verdict in verdicts.items()
            if verdict.state is State.OUT
        ]

    def close(self) -> None:
        """Forget every verdict."""
        self.plans.clear()
        self.by_signature.clear()
        self.pending.clear()


breakers = CircuitBreaker()
