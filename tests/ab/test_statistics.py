"""Ground truth: known slowdowns and memory differences, found or not found as they should be."""

from __future__ import annotations

import numpy as np
import pytest

from flashbias_patch.ab import statistics, words
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.statistics import compare_peaks, compare_times, midmean

from . import synthetic

TRIALS = 50
ALLOWED = 0.05


def speed_words(slowdown, repeats, **more):
    return [
        judge(synthetic.trial(seed, slowdown, repeats=repeats, **more)).speed_word
        for seed in range(TRIALS)
    ]


@pytest.mark.parametrize("spread", [0.004, 0.01])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_equal_speed_raises_no_alarm(repeats, spread):
    words = speed_words(0.0, repeats, spread=spread)
    assert sum(word in ("slower", "faster") for word in words) <= at_most(TRIALS)


def alarms(rng, spread, repeats, trials, shift=lambda run: 0.0):
    """In how many of `trials` two equal sides are called different; `shift(run)` slows the run-th
    run."""
    order = "ABA" if repeats == 1 else "".join("AB" if i % 2 == 0 else "BA" for i in range(repeats))
    found = 0
    for _ in range(trials):
        sides = {"A": [], "B": []}
        for run, label in enumerate(order):
            times = synthetic.step_times(rng, 35, 0.1 * (1 + shift(run)), spread)
            sides[label].append(times[5:])
        found += compare_times(sides["A"], sides["B"]).decided != 0
    return found


def at_most(trials):
    """Alarms in so many trials that a rate of 5% explains (two standard errors above)."""
    return ALLOWED * trials + 2 * np.sqrt(trials * ALLOWED * (1 - ALLOWED))


@pytest.mark.parametrize("spread", [0.001, 0.02, 0.05])
@pytest.mark.parametrize("repeats", [1, 2, 3, 6])
def test_equal_speed_raises_no_alarm_however_much_runs_differ(repeats, spread):
    assert alarms(np.random.default_rng(7), spread, repeats, 200) <= at_most(200)


def test_a_machine_that_warms_up_or_hiccups_raises_no_alarm():
    rng = np.random.default_rng(11)
    assert alarms(rng, 0.004, 2, 100, shift=lambda run: 0.01 * run) <= ALLOWED * 100
    assert (
        alarms(rng, 0.004, 2, 100, shift=lambda run: 0.15 * (rng.random() < 0.1)) <= ALLOWED * 100
    )


@pytest.mark.parametrize(
    "slowdown,repeats,spread,share",
    [
        (0.02, 3, 0.004, 0.75),
        (0.02, 6, 0.004, 0.95),
        (0.20, 1, 0.004, 0.75),
        (0.10, 2, 0.004, 0.95),
        (0.10, 3, 0.004, 1.0),
        (0.10, 2, 0.01, 0.9),
        (0.10, 3, 0.01, 1.0),
        (0.10, 3, 0.02, 0.9),
    ],
)
def test_slowdown_is_found(slowdown, repeats, spread, share):
    words = speed_words(slowdown, repeats, spread=spread)
    assert words.count("slower") >= share * TRIALS
    assert "faster" not in words


def test_undecided_names_the_repeats_that_would_decide():
    ratio = compare_times(
        [np.full(20, 1.00), np.full(20, 1.03)], [np.full(20, 1.04), np.full(20, 1.07)]
    )
    needed = ratio.repeats_needed()
    assert ratio.decided == 0 and 3 <= needed <= 5
    times = {"A": [1.00, 1.03] * needed, "B": [1.04, 1.07] * needed}
    many = compare_times(*([np.full(20, x) for x in times[side][:needed]] for side in "AB"))
    assert many.decided == 1 and many.repeats_needed() <= needed
    verdict = judge(synthetic.trial(1, 0.03, repeats=2, spread=0.02))
    assert verdict.speed_word == "undecided"
    assert any("repeats, or more steps, to decide" in note for note in verdict.notes)
    assert compare_times([np.ones(20)], [np.ones(20)]).repeats_needed() is None


def test_speedup_is_found():
    assert speed_words(-0.10, 3).count("faster") >= 0.95 * TRIALS


def test_interval_covers_the_true_ratio():
    covered = 0
    for seed in range(TRIALS):
        ratio = judge(synthetic.trial(seed, 0.05)).speed
        covered += ratio.low <= 1.05 <= ratio.high
    assert covered >= 0.9 * TRIALS  # 95% nominal; 90% leaves room for 50 trials


def test_memory_difference():
    found = [judge(synthetic.trial(seed, memory=1.02)).memory_word for seed in range(TRIALS)]
    equal = [judge(synthetic.trial(seed)).memory_word for seed in range(TRIALS)]
    assert found == ["more memory"] * TRIALS
    assert equal == ["no difference"] * TRIALS
    assert judge(synthetic.trial(0, memory=0.4)).memory_word == "less memory"


@pytest.mark.parametrize("spread", [0.0005, 0.01, 0.03])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_memory_of_noisy_peaks(repeats, spread):
    """Resident memory differs from run to run, a GPU's allocator hardly does."""
    rng, kind = np.random.default_rng(13), "cuda" if spread < 0.001 else "rss"

    def found(factor):
        count = max(2, repeats), repeats
        sides = [8e9 * np.exp(spread * rng.normal(size=n)) for n in count]
        return compare_peaks(sides[0], sides[1] * factor, kind).decided

    assert sum(found(1.0) != 0 for _ in range(200)) <= at_most(200)
    factor = 1.02 if kind == "cuda" else 0.4
    share = 0.95 if repeats > 1 else 0.5
    assert sum(found(factor) == (1 if factor > 1 else -1) for _ in range(TRIALS)) >= share * TRIALS


def test_few_steps_give_a_ratio_without_an_interval():
    ratio = compare_times([np.array([1.0, 1.0])], [np.array([2.0, 2.0])])
    assert (ratio.value, ratio.low, ratio.decided) == (2.0, None, 0)


def test_the_ends_of_an_interval_over_orders_of_magnitude_are_not_printed():
    """Two runs of A, 22% apart, and one of B: with several sides the level is 98.33%, and the
    quantile of one degree of freedom 38."""
    steps = np.full(60, 0.1)
    wide = compare_times([steps, 1.22 * steps], [0.8 * steps], levels=(98.33, 99.67))
    assert wide.high > 100 * wide.low and wide.decided == 0
    assert words.ends(wide) == words.ends(wide.mean) == "too few runs to tell"
    close = compare_times([steps, 1.01 * steps], [0.8 * steps], levels=(95.0, 99.0))
    assert words.ends(close) == f"{close.low:.3f} to {close.high:.3f}"


@pytest.mark.parametrize("factor", [1.001, 1.02])
def test_an_effect_too_small_to_matter_is_not_decided(factor):
    """However narrow the interval is."""

    def decided(value):
        ratio = statistics.Ratio(value, value / 1.0001, value * 1.0001, 1.0, value, 9)
        return ratio.excludes_one

    matters = factor > 1 + statistics.SMALLEST_EFFECT
    assert (decided(factor), decided(1 / factor)) == ((1, -1) if matters else (0, 0))


def test_midmean_is_the_mean_of_the_middle_half():
    assert midmean(np.array([100.0, 1.0, 2.0, 3.0])) == 2.5
    assert midmean(np.array([7.0])) == 7.0


@pytest.mark.parametrize("every,factor", [(5, 3), (5, 10), (10, 20)])
@pytest.mark.parametrize("repeats", [2, 3])
def test_stalls_are_slower_though_the_usual_step_is_not(every, factor, repeats):
    rng, found = np.random.default_rng(3), []
    for _ in range(TRIALS):
        steps = [
            np.exp(rng.normal(0, 0.002)) * np.exp(rng.normal(0, 0.03, 30))
            for _ in range(2 * repeats)
        ]
        stalling = np.where(np.arange(30) % every == every - 1, factor, 1.0)
        found.append(compare_times(steps[:repeats], [s * stalling for s in steps[repeats:]]))
    assert [ratio.word("slower", "faster") for ratio in found].count("slower") >= 0.7 * TRIALS
    assert all(
        ratio.disagree and 0.9 < ratio.value < 1.1 and ratio.mean.value > 1.3 for ratio in found
    )
    assert statistics.stalls([steps[0] * stalling])[:2] == (30 // every, 30)


def test_a_faster_usual_step_is_not_faster_where_stalls_outweigh_it():
    steps = np.full(30, 1.0)
    stalling = np.where(np.arange(30) % 10 == 9, 8.0, 0.8)
    ratio = compare_times([steps, steps], [stalling, stalling * 1.001])
    assert ratio.excludes_one == -1 and ratio.word("slower", "faster") != "faster"
