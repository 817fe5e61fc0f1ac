"""Ground truth: known slowdowns, memory differences and divergences, found or not found as they should be."""

from __future__ import annotations

import numpy as np
import pytest

from flashbias_patch.ab import statistics
from flashbias_patch.ab.statistics import compare_peaks, compare_times, judge, midmean, parity

from . import synthetic

TRIALS = 50
ALLOWED = 0.05


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 800)


def speed_words(slowdown, repeats, **more):
    return [
        judge(synthetic.trial(seed, slowdown, repeats=repeats, **more)).speed_word for seed in range(TRIALS)
    ]


@pytest.mark.parametrize("spread", [0.004, 0.01])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_equal_speed_raises_no_alarm(repeats, spread):
    words = speed_words(0.0, repeats, spread=spread)
    assert sum(word in ("slower", "faster") for word in words) <= ALLOWED * TRIALS


def alarms(rng, spread, repeats, trials, shift=lambda run: 0.0):
    """In how many of `trials` two equal sides are called different; `shift(run)` slows the run-th run."""
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
    assert alarms(rng, 0.004, 2, 100, shift=lambda run: 0.15 * (rng.random() < 0.1)) <= ALLOWED * 100


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


def test_quantiles_of_student_t():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 8, 20, 60):
        assert statistics.student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=4e-3)


def test_speedup_is_found():
    assert speed_words(-0.10, 3).count("faster") >= 0.95 * TRIALS


def test_interval_covers_the_truth():
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


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.01])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_same_training_raises_no_alarm(noise, repeats):
    words = [judge(synthetic.trial(seed, noise=noise, repeats=repeats)).parity_word for seed in range(TRIALS)]
    assert words.count("differs") <= ALLOWED * TRIALS
    assert set(words) <= {"identical", "within noise", "differs"}


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.002])
@pytest.mark.parametrize("step", [0, 1, 20, 45])
def test_divergence_is_found_where_it_begins(noise, step, repeats):
    verdicts = [
        judge(synthetic.trial(seed, noise=noise, part_at=step, jump=0.10, repeats=repeats))
        for seed in range(TRIALS)
    ]
    assert [v.parity_word for v in verdicts].count("differs") >= 0.95 * TRIALS
    exact = [v.first_step == step for v in verdicts]
    assert sum(exact) >= (1.0 if noise == 0 else 0.85) * TRIALS


def curves(steps=30):
    return 5 * np.exp(-np.arange(steps) / 40)


def test_identical_means_bit_for_bit():
    assert parity("loss", [curves(), curves()], [curves()]).word == "identical"
    assert parity("loss", [curves(), curves()], [curves() * (1 + 1e-12)]).word == "within rounding"


def test_deterministic_command_is_held_to_rounding():
    off = curves() * (1 + 5e-3)
    assert parity("loss", [curves(), curves()], [off]).first_step == 0
    assert parity("loss", [curves(), curves()], [off], half=True).word == "differs"
    assert parity("loss", [curves(), curves()], [curves() * (1 + 1e-3)], half=True).word == "within rounding"


def test_nudged_run_shows_how_far_rounding_may_drift():
    wild = curves() * (1 + 0.05 * (1 - np.exp(-np.arange(30) / 5.0)) * np.sin(np.arange(30)))
    other = curves() * (1 + 0.05 * (1 - np.exp(-np.arange(30) / 5.0)) * np.cos(np.arange(30)))
    assert parity("loss", [curves(), curves()], [other]).word == "differs"
    judged = parity("loss", [curves(), curves()], [other], [wild])
    assert judged.word == "within rounding" and judged.drift > 0.01 and judged.noise == 0


def test_noise_of_the_patched_side_alone_is_a_difference():
    wobble = 0.01 * np.sin(np.arange(30))
    noisy = [curves() * (1 + wobble), curves() * (1 + 0.3 * wobble)]
    assert parity("loss", [curves(), curves() * (1 + 1e-7)], noisy).word == "differs"
    assert parity("loss", noisy, [curves(), curves() * (1 + 1e-7)]).word == "within noise"


def chaotic(rng, steps, growth, most):
    """A falling loss whose distance from the others grows from rounding to `most`, as training does on a GPU."""
    envelope = 1e-7 * np.exp(growth * np.arange(steps))
    envelope = envelope * most / (envelope + most)
    wander = np.zeros(steps)
    for i in range(steps):
        wander[i] = 0.6 * (wander[i - 1] if i else 0) + 0.8 * rng.normal()
    return 300 * np.exp(-np.arange(steps) / 15) * (1 + envelope * wander)


@pytest.mark.parametrize("growth", [0.5, 2.0])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_chaotic_training_raises_no_alarm(growth, repeats):
    rng = np.random.default_rng(3)
    differs = 0
    for _ in range(TRIALS):
        a, b, nudged = (
            [chaotic(rng, 40, growth, 0.05) for _ in range(n)] for n in (max(2, repeats), repeats, 1)
        )
        differs += parity("loss", a, b).word == "differs"
        exact = 300 * np.exp(-np.arange(40) / 15)
        differs += parity("loss", [exact, exact], b, nudged).word == "differs"
    assert differs <= ALLOWED * 2 * TRIALS


def test_one_spike_is_no_parting_but_three_steps_are():
    spike = curves()
    spike[10] *= 1.5
    assert parity("loss", [curves(), curves()], [spike]).word == "within rounding"
    spike[10:13] = curves()[10:13] * 1.5
    assert parity("loss", [curves(), curves()], [spike]).first_step == 10


def test_nan_on_one_side_parts_and_on_both_does_not():
    broken = curves()
    broken[12:] = np.nan
    judged = parity("loss", [curves(), curves()], [broken])
    assert (judged.word, judged.first_step, judged.largest_at) == ("differs", 12, 12)
    assert parity("loss", [broken, broken], [broken]).word == "identical"


def test_nothing_recorded_is_not_compared():
    nothing = np.full(10, np.nan)
    assert parity("loss", [nothing], [curves(10)]).word == "not compared"
    assert parity("loss", [curves(0)], [curves(0)]).word == "not compared"
    assert compare_times([nothing], [curves(10)]) is None
    assert compare_peaks([float("nan")], [1.0]) is None


def test_few_steps_give_a_ratio_without_an_interval():
    ratio = compare_times([np.array([1.0, 1.0])], [np.array([2.0, 2.0])])
    assert (ratio.value, ratio.low, ratio.decided) == (2.0, None, 0)


def test_a_run_cut_short_counts_only_where_its_side_has_no_other():
    found = synthetic.trial(0, 0.2, repeats=2, part_at=30, jump=0.5)
    cut = found.runs[2]
    cut.status, cut.processes[0].steps = "interrupted", cut.processes[0].steps[:6]
    verdict = judge(found)
    assert verdict.first_step == 30 and verdict.parities[0].steps == 60
    found.runs[1].status, found.runs[1].processes[0].steps = "hung", found.runs[1].processes[0].steps[:20]
    assert judge(found).parities[0].steps == 6


def test_warmup_is_cut_where_runs_are_short():
    verdict = judge(synthetic.trial(0, steps=8), warmup=20)
    assert verdict.speed.low is not None
    assert any("too few for a warm-up" in note for note in verdict.notes)


def test_without_a_repeat_the_spread_between_runs_is_assumed():
    runs = synthetic.trial(0, 0.01, repeats=1).runs[:2]
    verdict = judge(synthetic.experiment(runs))
    assert verdict.speed_word != "slower"
    assert any("no run was repeated" in note for note in verdict.notes)
    assert judge(synthetic.experiment(synthetic.trial(0, 0.20, repeats=1).runs[:2])).speed_word == "slower"


def test_no_verdict_on_speed_on_a_busy_machine():
    found = synthetic.trial(0, slowdown=0.5)
    assert judge(found).speed_word == "slower"
    found.runs[0].load = 100.0  # of 64 CPUs
    verdict = judge(found)
    assert verdict.speed_word == "undecided" and verdict.fails(["slower"]) == []
    assert any("load 100.0 on 64 CPUs" in note for note in verdict.notes)


def test_fail_if():
    verdict = judge(synthetic.trial(0, 0.2, memory=1.5, part_at=10, jump=0.5))
    assert verdict.fails(["slower", "differs", "more-memory"]) == ["slower", "differs", "more-memory"]
    same = judge(synthetic.trial(0))
    assert same.fails(["slower", "differs", "more-memory"]) == []


def test_midmean_is_the_mean_of_the_middle_half():
    assert midmean(np.array([100.0, 1.0, 2.0, 3.0])) == 2.5
    assert midmean(np.array([7.0])) == 7.0
