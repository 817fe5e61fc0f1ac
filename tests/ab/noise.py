"""Made-up training curves by the shape of their noise, and how often `flashbias ab` would say
"differs" of them.

    python -m tests.ab.noise [TRIALS]       prints the table of docs/ab.md

Each shape is the factor on a falling loss of one run: (rng, steps, side) -> (steps,), where side is
A, B, or N for an A that was nudged in the last place. Nothing differs between A and B but what
rounding does.
"""

from __future__ import annotations

import sys

import numpy as np

from flashbias_patch.ab import further_runs, parity

STEPS = 40
SHAPES = {}
EFFECTS = {
    "+2% throughout": lambda n: np.full(n, 1.02),
    "+10% from half": lambda n: np.where(np.arange(n) >= n // 2, 1.1, 1.0),
    "grows to +20%": lambda n: 1 + 0.2 * np.arange(n) / n,
    "+30% throughout": lambda n: np.full(n, 1.3),
}


def shape(name):
    def add(function):
        SHAPES[name] = function
        return function

    return add


def wander(rng, n, persistence):
    x = np.zeros(n)
    x[0] = rng.normal()
    for i in range(1, n):
        x[i] = persistence * x[i - 1] + np.sqrt(1 - persistence**2) * rng.normal()
    return x


def chaos(rng, n, growth, most, start):
    """Grows from rounding to `most`, as training amplifies it."""
    envelope = start * np.exp(growth * np.arange(n))
    return 1 + envelope * most / (envelope + most) * wander(rng, n, 0.6)


ULP = {
    "A": 2e-8,
    "N": 1e-6,
    "B": 6e-7,
}  # one weight's last place; all weights' last places; other sums everywhere


@shape("one ulp of noise in A, growing")
def _(rng, n, side):
    return chaos(rng, n, 0.35, 0.05, ULP[side])


@shape("the same, growing fast")
def _(rng, n, side):
    return chaos(rng, n, 1.5, 0.3, ULP[side])


@shape("A deterministic, rounding grows")
def _(rng, n, side):
    return np.ones(n) if side == "A" else chaos(rng, n, 0.35, 0.05, ULP[side])


@shape("late discrete flip in half of the runs")
def _(rng, n, side):
    return flip(rng, n, n / np.log(2))


@shape("late discrete flip in a fifth of the runs")
def _(rng, n, side):
    return flip(rng, n, n / np.log(1.25))


def flip(rng, n, mean):
    at, factor = rng.exponential(mean), np.ones(n)
    if at < n:
        factor[int(at) :] += 0.05 * rng.choice([-1, 1])
    return factor


@shape("runs of two kinds, evenly")
def _(rng, n, side):
    return np.full(n, 1.05 if rng.random() < 0.5 else 1.0)


@shape("runs of two kinds, one rare")
def _(rng, n, side):
    return np.full(n, 1.05 if rng.random() < 0.2 else 1.0)


@shape("white")
def _(rng, n, side):
    return 1 + 0.01 * rng.normal(size=n)


@shape("heavy tails, by step")
def _(rng, n, side):
    return 1 + 0.003 * np.clip(rng.standard_t(1.5, size=n), -100, 100)


@shape("heavy tails, by run")
def _(rng, n, side):
    return np.full(n, 1 + 0.003 * np.clip(rng.standard_t(1.0), -100, 100))


@shape("random walk")
def _(rng, n, side):
    return 1 + 0.002 * np.cumsum(rng.normal(size=n))


@shape("drift, its slope by run")
def _(rng, n, side):
    return 1 + 0.02 * rng.normal() * np.arange(n) / n


@shape("autocorrelated")
def _(rng, n, side):
    return 1 + 0.01 * wander(rng, n, 0.97)


@shape("variance that grows late")
def _(rng, n, side):
    return 1 + 0.02 * (np.arange(n) / n) ** 3 * rng.normal(size=n)


@shape("spikes")
def _(rng, n, side):
    return 1 + 0.001 * rng.normal(size=n) + 0.5 * (rng.random(n) < 0.03)


@shape("few distinct values")
def _(rng, n, side):
    return 1 + np.round(2 * rng.normal(size=n)) * 2.0**-10


@shape("other random numbers in B (dropout)")
def _(rng, n, side):
    return np.ones(n) if side == "A" else 1 + 0.03 * wander(rng, n, 0.3)


def word_of(rng, name, repeats, effect=None, parts=1):
    """What `flashbias ab --repeats R` says of such runs, with the further runs that it makes
    (further_runs.next_run).

    `parts`: so many curves, each with noise of its own, as parts of a loss. `effect`: a factor on
    B's first one.
    """
    factor, base = SHAPES[name], 5 * np.exp(-np.arange(STEPS) / 40)

    def runs(side, count):
        made = [[base * factor(rng, STEPS, side) for _ in range(parts)] for _ in range(count)]
        if side == "B" and effect is not None:
            for curves in made:
                curves[0] = curves[0] * EFFECTS[effect](STEPS)
        return made

    a, b, nudged = runs("A", max(2, repeats)), runs("B", repeats), []
    while True:
        judged = parity.judge_together(
            [
                parity.Curves(
                    "loss",
                    "loss",
                    None,
                    False,
                    *([run[i] for run in side] for side in (a, b, nudged)),
                    0.0,
                )
                for i in range(parts)
            ],
            redrawn="random numbers" in name,
        )
        word = parity.worst(judged)
        if word == "identical" or (nudged and word != "differs"):
            return word
        if len(nudged) < further_runs.MOST_CONFIRMATIONS:
            nudged += runs("N", 1)
        elif len(b) < 2:
            b += runs("B", 1)
        else:
            return word


def share(word, name, trials, **more):
    rng = np.random.default_rng(5)
    return sum(word_of(rng, name, **more) == word for _ in range(trials)) / trials


def table(trials=200):
    """Lines of Markdown."""
    head = [
        "noise",
        *(f"false, {r} repeat{'s' * (r > 1)}" for r in (1, 2, 3)),
        "false, 12 parts",
        *EFFECTS,
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in SHAPES:
        cells = [share("differs", name, trials, repeats=r) for r in (1, 2, 3)]
        cells.append(share("differs", name, trials // 2, repeats=2, parts=12))
        power = [
            share("differs", name, trials // 2, repeats=2, effect=effect) for effect in EFFECTS
        ]
        lines.append(
            "| "
            + " | ".join([name, *(f"{x:.1%}" for x in cells), *(f"{x:.0%}" for x in power)])
            + " |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(table(*map(int, sys.argv[1:]))))
