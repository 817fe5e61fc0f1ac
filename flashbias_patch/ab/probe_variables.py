"""Environment variables that tell a process of a measured command what to record (see probe.py)."""

from __future__ import annotations

from typing import NamedTuple, Optional

DIRECTORY = "FLASHBIAS_PROBE"  # where a process writes; unset: nothing is recorded
STEPS = "FLASHBIAS_PROBE_STEPS"  # after which the command is stopped; 0: never
PARAMS = "FLASHBIAS_PROBE_PARAMS"  # ends of names of the parameters to record, with commas
DEFAULT_PARAMS = "bias_scale"
SEED = "FLASHBIAS_PROBE_SEED"
NUDGE = "FLASHBIAS_PROBE_NUDGE"  # see Nudge
STAND_IN = "FLASHBIAS_PROBE_STAND_IN"  # offer functions of flash_attn's names (stand_in.py)
WATCHER = "FLASHBIAS_PROBE_WATCHER"  # id of the process of `flashbias ab`; stop when it has ended
MODE = "FLASHBIAS_PROBE_MODE"  # infer: forward passes are the iterations (inference.py)
MODULE = "FLASHBIAS_PROBE_MODULE"  # the module whose forward passes are counted
PROFILE = "FLASHBIAS_PROBE_PROFILE"  # number of steps under torch.profiler (profiling.py)

REDRAW = "redraw"


class Nudge(NamedTuple):
    """A change of a run's parameters, once, by a few units in the last place.

    `seed` determines the signs; with `redraw` the run also draws other random numbers from then on.
    The variable holds `text`: "1", "2", ... or "redraw1", "redraw2", ...
    """

    seed: int
    redraw: bool = False

    @classmethod
    def parse(cls, text: str) -> Optional[Nudge]:
        """Return the nudge of a variable's value; None for an empty value or the seed 0."""
        redraw = text.startswith(REDRAW)
        seed = int((text[len(REDRAW) :] if redraw else text) or 0)
        return cls(seed, redraw) if seed else None

    @property
    def text(self) -> str:
        return f"{REDRAW if self.redraw else ''}{self.seed}"
