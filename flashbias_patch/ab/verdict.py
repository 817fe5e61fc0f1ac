"""The verdict on a comparison, as data: failures, speed, memory, training; and the conditions of
`--fail-if`. judging.py makes it from the recorded runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import parity, records, sides
from .failures import Failure
from .loader import Wait
from .parity import Parity
from .statistics import Ratio, Stalls


class Timing(NamedTuple):
    """Seconds of both sides, beside the time per step: NaN where unknown."""

    startup: Tuple[float, float]  # from the start of the command to the end of its first step
    total: Tuple[float, float]  # of a run
    break_even: Optional[int]  # the step at which a faster B has compensated for a longer start
    stalls: Tuple[Stalls, Stalls]
    waits: Tuple[Optional[Wait], Optional[Wait]] = (None, None)  # for data


@dataclass
class Verdict:
    """The result of a comparison; reports show its words, and --fail-if depends on them."""

    speed: Optional[Ratio] = None
    memory: Optional[Ratio] = None
    memory_kind: str = ""
    clock: str = ""
    parities: List[Parity] = field(default_factory=list)
    failures: List[Failure] = field(default_factory=list)
    problems: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    timing: Optional[Timing] = None
    calls: Optional[int] = (
        None  # attention calls of all patched runs; None: no patched run recorded any step
    )
    inference: bool = False  # no training steps: detections are compared instead
    detections: Optional[Dict[str, Any]] = None
    patched_peak: float = float("nan")  # bytes; also where there is nothing to compare it with
    patched_step: float = float("nan")  # seconds
    side: str = "B"  # that is compared with A
    name: str = sides.NAMES["B"]
    further: List[Verdict] = field(default_factory=list)  # of B: those of the further sides

    @property
    def who(self) -> str:
        """The side in a sentence."""
        return "patched" if self.side == "B" else f"{self.side} ({self.name})"

    @property
    def every(self) -> List[Verdict]:
        """The verdicts of all sides, this one first."""
        return [self, *self.further]

    @property
    def of_outputs(self) -> bool:
        """Were outputs of forward passes compared instead of losses?"""
        return any(p.quantity == parity.OUTPUTS for p in self.parities)

    @property
    def only_patched_fits(self) -> bool:
        """The best result: unpatched runs out of memory, patched trains."""
        return (
            bool(self.failures)
            and all(f.side == "A" and f.status == records.OUT_OF_MEMORY for f in self.failures)
            and math.isfinite(self.patched_step)
        )

    @property
    def failed(self) -> bool:
        """Some run failed, and that is not the result."""
        return bool(self.failures) and not self.only_patched_fits

    @property
    def nothing_patched(self) -> bool:
        return self.calls == 0

    @property
    def speed_word(self) -> str:
        return self._word(self.speed, "slower", "faster")

    @property
    def memory_word(self) -> str:
        return self._word(self.memory, "more memory", "less memory")

    def _word(self, ratio: Optional[Ratio], more: str, less: str) -> str:
        if ratio is None:
            return "not compared"
        return "undecided" if self.failures else ratio.word(more, less)

    @property
    def parity_word(self) -> str:
        if self.failed:
            return "fails"
        return (
            self.detections["word"] if self.detections is not None else parity.worst(self.parities)
        )

    @property
    def first_step(self) -> Optional[int]:
        return min((p.first_step for p in self.parities if p.first_step is not None), default=None)

    def fails(self, conditions: Sequence[str]) -> List[str]:
        """Those of `conditions` (FAIL_IF) that came true for any side, with the side unless it is
        B; a failed run makes any of them true."""
        found = self._fails(conditions)
        for each in self.further:
            only_a = each.failed and all(f.side == "A" for f in each.failures)
            if not (only_a and self.failed):  # a failed A is said once
                found += [f"{condition}: {each.who}" for condition in each._fails(conditions)]
        return found

    @property
    def succeeded(self) -> bool:
        """True if every side was compared, or unpatched alone ran out of memory."""
        return all(v.only_patched_fits or (v.comparable and not v.failed) for v in self.every)

    def _fails(self, conditions: Sequence[str]) -> List[str]:
        not_finite = self.parity_word == "not finite"
        true = {
            "slower": self.speed_word == "slower",
            "differs": self.parity_word == "differs" or not_finite,
            "more-memory": self.memory_word == "more memory",
            "fails": self.nothing_patched or not_finite,
        }
        if conditions and self.failed:
            return ["fails"]
        return [condition for condition in conditions if true[condition]]

    @property
    def comparable(self) -> bool:
        if self.detections is not None:
            return "error" not in self.detections
        return self.speed is not None or any(p.word != parity.NOT_COMPARED for p in self.parities)
