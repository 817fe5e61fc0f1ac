"""Made-up comparisons that run until the interval is narrow enough (`--repeats auto`), and how
often they are wrong.

    python -m tests.ab.looks [TRIALS]       writes the table of docs/ab.md into it
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import NamedTuple
from unittest import mock

import numpy as np

from flashbias_patch.ab import repeats, sequential, statistics

from . import synthetic

STEPS, WARMUP, SECONDS = 35, 5, 0.1
DRAWS = 40  # of the bootstrap: its tails are then too short, and the intervals a little too narrow
OPTIONS = {"repeats": repeats.AUTO}
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "ab.md"
BEGIN, END = "<!-- python -m tests.ab.looks -->\n", "<!-- end -->"

# How runs of the same thing differ.
MACHINES = {"0.2%": 0.002, "0.5%": 0.005, "1%": 0.01, "2%": 0.02, "5%": 0.05}


TABLE = ("0.2%", "0.5%", "1%", "2%")


class Outcome(NamedTuple):
    repeats: int
    decided: int
    covers: bool


def one(rng, machine, slowdown=0.0, wanted=repeats.HALF_WIDTH, every_look=True):
    """Runs pairs until the interval is narrow enough, as `flashbias ab --repeats auto` does.

    `every_look` False: with the interval of a single look, for comparison.
    """
    spread = MACHINES[machine]
    sides = {"A": [], "B": []}
    for made in range(1, sequential.MOST + 1):
        for label in "AB" if made % 2 else "BA":
            mean = SECONDS * (1 + (slowdown if label == "B" else 0.0))
            times = synthetic.step_times(rng, STEPS, mean, spread)
            sides[label].append(times[WARMUP:])
        if made < sequential.FIRST:
            continue
        levels = repeats.levels(OPTIONS if every_look else {}, made)
        ratio = statistics.compare_times(sides["A"], sides["B"], levels=levels)
        if repeats.half_width(repeats.deciding(ratio)) <= wanted:
            break
    truth = 1 + slowdown
    return Outcome(made, ratio.decided, ratio.low <= truth <= ratio.high)


def many(trials, *args, seed=5, **more):
    rng = np.random.default_rng(seed)
    with mock.patch.object(statistics, "block_bootstrap", remembered()):
        return [one(rng, *args, **more) for _ in range(trials)]


def remembered():
    """The bootstrap, made once for each run instead of once for each look at it."""
    made, known = statistics.block_bootstrap, {}

    def drawn(values, rng):
        key = values.tobytes()
        if key not in known:
            known[key] = made(values, rng)
        return known[key]

    return drawn


def table(trials=200):
    """Lines of Markdown."""
    slower = (0.02, 0.05, 0.1)
    head = ["runs differ by", "false alarms", "interval misses", "repeats, mean", "at most"]
    head += [f"+{x:.0%} found" for x in slower]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for machine in TABLE:
        equal = many(trials, machine)
        found = [many(trials // 4, machine, slowdown) for slowdown in slower]
        cells = [
            f"{np.mean([o.decided != 0 for o in equal]):.1%}",
            f"{np.mean([not o.covers for o in equal]):.1%}",
            f"{np.mean([o.repeats for o in equal]):.1f}",
            str(max(o.repeats for o in equal)),
            *(f"{np.mean([o.decided > 0 for o in each]):.0%}" for each in found),
        ]
        lines.append(f"| {machine} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    statistics.DRAWS = DRAWS
    text = PAGE.read_text()
    made = "\n".join(table(*map(int, sys.argv[1:])))
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    PAGE.write_text(re.sub(pattern, lambda match: BEGIN + made + "\n" + END, text, flags=re.S))
