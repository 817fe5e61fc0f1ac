"""The sides of a comparison: A unpatched, B patched, and further ones by `--side`, each compared
with A.

A side has a letter, by which its runs are named (C3), and a name. With m comparisons there are m
chances of a false alarm. For times and memory, Holm's procedure keeps the chance of any at what it
is for one: the interval of a side is made at 1 - 5%/m; of the k sides that this does not decide, at
1 - 5%/k, and so on until it decides no more. For losses, more nudged As are run before "differs" is
said (further_runs.most_confirmations).
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from .. import settings

if TYPE_CHECKING:
    from .records import Experiment

NAMES = {"A": "unpatched", "B": "patched"}
FURTHER = "CDEFGH"  # the letters of further sides
RESERVED = ("a", "b", *NAMES.values(), *FURTHER.lower(), "nudged", "redrawn")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,23}")
NEXT = re.compile(r",(?=[A-Z_][A-Z0-9_]*=)")  # other commas belong to a value
FORGOTTEN = re.compile(r"(?:^|,)(FLASHBIAS_\w*)$")


class Side(NamedTuple):
    """A further side: its environment on top of B's."""

    name: str
    env: Dict[str, str]


def parse(text: str) -> Side:
    """The side of `NAME:K=V[,K=V...]`. Raises ValueError with what is wrong."""
    name, colon, rest = text.partition(":")
    if not colon or not name or not rest:
        raise ValueError(f"expected NAME:VARIABLE=VALUE[,VARIABLE=VALUE...], got {text!r}")
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name of a side: expected a letter, then up to 23 letters, digits, "
            "'_', '.' or '-'"
        )
    if name.lower() in RESERVED:
        raise ValueError(f"{name!r} is reserved: reserved are {', '.join(sorted(RESERVED))}")
    env: Dict[str, str] = {}
    for pair in NEXT.split(rest):
        variable, equals, value = pair.partition("=")
        forgotten = FORGOTTEN.search(value)
        if not variable or not equals or forgotten:
            which = forgotten.group(1) if forgotten else pair
            raise ValueError(f"{which!r} of {name!r} has no '=': expected VARIABLE=VALUE")
        if variable in env:
            raise ValueError(f"{variable} is given twice for {name!r}")
        env[variable] = value
    problem = mistake(env)
    if problem:
        raise ValueError(f"{problem} (of {name!r})")
    return Side(name, env)


def mistake(env: Mapping[str, str]) -> str:
    """The first problem with the FLASHBIAS_ variables in `env`; empty if there is none."""
    read = settings.Settings(env)
    return next(iter(read.problems + read.unknown), "")


def check(given: Sequence[Side]) -> str:
    """The problem with several sides together; empty if there is none."""
    if len(given) > len(FURTHER):
        return f"at most {len(FURTHER)} further sides can be compared, got {len(given)}"
    names = [side.name.lower() for side in given]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    return f"the name {twice!r} is given twice" if twice else ""


def labels(options: Mapping[str, Any]) -> str:
    """The letters of all sides compared with A: "B", "BC", ..."""
    return "B" + FURTHER[: len(options.get("sides") or ())]


def name(options: Mapping[str, Any], label: str) -> str:
    """unpatched, patched, or the name that was given."""
    if label in NAMES:
        return NAMES[label]
    given = options.get("sides") or ()
    at = FURTHER.find(label)
    return str(given[at][0]) if 0 <= at < len(given) else "unknown"


def title(options: Mapping[str, Any], label: str) -> str:
    """The letter and the name: "C sdpa"."""
    return f"{label} {name(options, label)}"


def environment(options: Mapping[str, Any], label: str) -> Dict[str, str]:
    """The variables that were given for a side."""
    if label in NAMES:
        return dict(options.get(f"env_{label.lower()}") or {})
    given = options.get("sides") or ()
    at = FURTHER.find(label)
    return dict(given[at][1]) if 0 <= at < len(given) else {}


def is_patched(options: Mapping[str, Any], label: str) -> bool:
    """Does a side run patched? Every side but A does, unless its own FLASHBIAS_PATCH is off."""
    own = environment(options, label).get("FLASHBIAS_PATCH")
    return label != "A" if own is None else own.strip().lower() not in settings.FALSE


def pair(experiment: Experiment, label: str) -> Experiment:
    """The experiment with the runs of A and of one other side only."""
    runs = [run for run in experiment.runs if run.label in ("A", label)]
    return dataclasses.replace(experiment, runs=runs, judged=label)


def holm(
    names: Sequence[str], decided: Callable[[str, int], bool]
) -> Tuple[Dict[str, int], List[str]]:
    """Holm's procedure over the comparisons `names`.

    `decided(name, m)`: does the interval of that comparison at 1 - 5%/m exclude 1? Returns the m
    at which each comparison is to be judged, and the names of those that were decided.
    """
    left = list(names)
    at = {each: len(left) for each in left}
    found: List[str] = []
    while left:
        now = [each for each in left if decided(each, len(left))]
        if not now:
            break
        found += now
        left = [each for each in left if each not in now]
        at.update({each: len(left) for each in left})
    return at, found
