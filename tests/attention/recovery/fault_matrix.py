"""Run one case of the matrix: a training run with the fault, and the same without."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple

from flashbias_patch import telemetry
from flashbias_patch.attention import dispatch, selection
from flashbias_patch.attention.recovery import guard
from tests.support.fake_backends import Case, Faulty
from tests.support.small_training import train


class Outcome(NamedTuple):
    losses: List[float]
    unbroken: List[float]
    fallbacks: List[Dict[str, Any]]
    answered_last: Dict[str, int]


_unbroken: Dict[bool, List[float]] = {}


def only(monkeypatch, *backends) -> None:
    """Let the chain be these backends, then sdpa and the reference."""
    dispatch.reset()
    names = {b.name: "none" for b in backends}
    kept = {
        name: place for name, place in selection.MODULES.items() if name in ("sdpa", "reference")
    }
    monkeypatch.setattr(selection, "MODULES", {**names, **kept})
    for backend in backends:
        dispatch.loaded[backend.name] = backend


def run_case(case: Case, module, monkeypatch) -> Outcome:
    if not _unbroken:
        only(monkeypatch, Faulty(case.backend))
        _unbroken[True] = train(module)[0]
    monkeypatch.setattr(
        guard, "LARGE", 0
    )  # small as these calls are, their backward is guarded as large ones' is
    only(monkeypatch, Faulty(case.backend, case.fault, case.passing, case.layer))
    backend = dispatch.loaded[case.backend]
    telemetry.reset()
    before: Dict[str, int] = {}

    def on_step(step: int) -> None:
        backend.on_step(step)
        before.clear()
        before.update(telemetry.calls)

    losses = train(module, on_step=on_step)[0]
    last = {name: count - before.get(name, 0) for name, count in telemetry.calls.items()}
    return Outcome(
        losses, _unbroken[True], telemetry.fallbacks(), {n: c for n, c in last.items() if c}
    )
