"""Made-up runs of which the truth is known."""

from __future__ import annotations

import numpy as np

from flashbias_patch.ab.records import Experiment, Process, Run

STEP_SECONDS = 0.1
PEAK = 8 * 2**30


def step_times(rng, steps, mean, spread=0.004, noise=0.03, persistence=0.3):
    """(steps,) seconds: a run's own speed, correlated noise, a slow start and a few stragglers."""
    level = np.zeros(steps)
    for i in range(steps):
        level[i] = persistence * (level[i - 1] if i else 0) + rng.normal() * noise * np.sqrt(
            1 - persistence**2
        )
    values = mean * np.exp(rng.normal() * spread + level)
    stragglers = rng.random(steps) < 0.03
    values[stragglers] *= rng.uniform(1.5, 4, stragglers.sum())
    values[:5] *= np.linspace(6, 1.2, min(5, steps))[:steps]
    return values


def losses(rng, steps, noise=0.0):
    """(steps,) a falling loss; `noise` grows from zero, as the effect of nondeterministic kernels
    does."""
    drift = (
        np.cumsum(rng.normal(size=steps))
        / np.sqrt(np.arange(1, steps + 1))
        * (1 - np.exp(-np.arange(steps) / 10))
    )
    return 5 * np.exp(-np.arange(steps) / 40) * (1 + noise * drift)


def make_run(label, index, times, loss=None, peak=PEAK, grad_norm=None, **more):
    steps = []
    for i, seconds in enumerate(times):
        line = {
            "event": "step",
            "step": i,
            "wall_s": float(seconds),
            "time": 1e9 + i,
            "memory": {
                "cuda": peak * 0.9,
                "cuda_peak": peak,
                "cuda_reserved_peak": peak,
                "rss": 1e9,
                "rss_peak": 1e9,
            },
        }
        if loss is not None:
            line["loss"] = float(loss[i])
        if grad_norm is not None:
            line["grad_norm"] = float(grad_norm[i])
        if label == "B":
            line["calls"] = {"triton": 6 * (i + 1), "sdpa": i + 1}
        line.update({key: value(i) if callable(value) else value for key, value in more.items()})
        steps.append(line)
    process = Process(
        "",
        header={"rank": 0, "python": "3.11"},
        environment={"rank": 0, "torch": "2.8", "gpu": "Some GPU"},
        steps=steps,
        ended=True,
    )
    return Run(
        label,
        index,
        processes=[process],
        message=f"{len(steps)} steps recorded",
        directory=f"{index + 1:02d}-{label}",
    )


def experiment(runs, **options):
    return Experiment(
        "nowhere",
        ["python", "train.py"],
        {"warmup": 5, "steps": 60, "seed": 0, **options},
        list(runs),
        {"cpus": 64},
        "/home",
        "ABBA",
        1.7e9,
    )


def ranks(loss, count=4, steps=30):
    """An A B B A experiment of `count` ranks, their losses `loss(label, rank, step)`."""
    runs = []
    for index, label in enumerate("ABBA"):
        made = [
            make_run(label, index, np.ones(steps), [loss(label, r, i) for i in range(steps)])
            for r in range(count)
        ]
        for rank, each in enumerate(made):
            each.processes[0].environment.update(rank=rank, world_size=count)
            each.processes[0].header["ppid"] = 7
        made[0].processes = [each.processes[0] for each in made]
        runs.append(made[0])
    return experiment(runs)


def trial(
    seed,
    slowdown=0.0,
    memory=1.0,
    noise=0.002,
    part_at=None,
    jump=0.05,
    repeats=3,
    steps=60,
    spread=0.004,
):
    """An A B B A ... experiment whose B takes (1 + slowdown) the time and parts at a step, if at
    one.

    `spread`: how much runs of the same thing differ, relatively; `noise`: how far their losses
    drift apart.
    """
    rng = np.random.default_rng(seed)
    runs = []
    order = "".join("AB" if i % 2 == 0 else "BA" for i in range(repeats)) + (
        "A" if repeats == 1 else ""
    )
    for index, label in enumerate(order):
        b = label == "B"
        loss, norm = losses(rng, steps, noise), 3 * losses(rng, steps, noise)
        if b and part_at is not None:
            loss[part_at:] *= 1 + jump
        runs.append(
            make_run(
                label,
                index,
                step_times(rng, steps, STEP_SECONDS * (1 + slowdown if b else 1), spread),
                loss,
                PEAK * (memory if b else 1),
                norm,
            )
        )
    return experiment(runs)
