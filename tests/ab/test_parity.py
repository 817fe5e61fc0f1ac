"""Do curves part? Known divergences and harmless noise of many shapes."""

from __future__ import annotations

import numpy as np
import pytest

from flashbias_patch.ab import parity as parities
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.parity import parity
from flashbias_patch.ab.statistics import compare_peaks, compare_times
from tests.support.scripts import ROOT

from . import noise as noises
from . import synthetic

TRIALS = 50
ALLOWED = 0.05


def judged(experiment):
    """The parities of an experiment without speed and memory."""
    return parities.of_runs(experiment.side("A"), experiment.side("B"), [], half=False)


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.01])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_same_training_raises_no_alarm(noise, repeats):
    words = [
        parities.worst(judged(synthetic.trial(seed, noise=noise, repeats=repeats)))
        for seed in range(TRIALS)
    ]
    assert (
        words.count("differs") <= ALLOWED * TRIALS
        and words.count("undecided") <= 2 * ALLOWED * TRIALS
    )
    assert set(words) <= {"identical", "within noise", "differs", "undecided"}


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.002])
@pytest.mark.parametrize("step", [0, 1, 20, 45])
def test_divergence_is_found_where_it_begins(noise, step, repeats):
    found = [
        judged(synthetic.trial(seed, noise=noise, part_at=step, jump=0.10, repeats=repeats))
        for seed in range(TRIALS)
    ]
    assert [parities.worst(each) for each in found].count("differs") >= 0.95 * TRIALS
    exact = [
        min((p.first_step for p in each if p.first_step is not None), default=None) == step
        for each in found
    ]
    assert sum(exact) >= (1.0 if noise == 0 else 0.85) * TRIALS


def curves(steps=30):
    return 5 * np.exp(-np.arange(steps) / 40)


def test_identical_means_bit_for_bit():
    assert parity("loss", [curves(), curves()], [curves()]).word == "identical"
    assert parity("loss", [curves(), curves()], [curves() * (1 + 1e-12)]).word == "within rounding"


def test_deterministic_command_is_compared_within_rounding():
    off = curves() * (1 + 5e-3)
    assert parity("loss", [curves(), curves()], [off]).first_step == 0
    assert parity("loss", [curves(), curves()], [off], half=True).word == "differs"
    assert (
        parity("loss", [curves(), curves()], [curves() * (1 + 1e-3)], half=True).word
        == "within rounding"
    )


def test_perturbed_run_shows_how_far_rounding_may_drift():
    wild = curves() * (1 + 0.05 * (1 - np.exp(-np.arange(30) / 5.0)) * np.sin(np.arange(30)))
    other = curves() * (1 + 0.05 * (1 - np.exp(-np.arange(30) / 5.0)) * np.cos(np.arange(30)))
    assert parity("loss", [curves(), curves()], [other]).word == "differs"
    judged = parity("loss", [curves(), curves()], [other], [wild])
    assert judged.word == "within noise" and judged.drift > 0.01 and judged.noise == 0


def test_noise_of_the_patched_side_alone_is_a_difference():
    wobble = 0.01 * np.sin(np.arange(30))
    noisy = [curves() * (1 + wobble), curves() * (1 + 0.3 * wobble)]
    assert parity("loss", [curves(), curves() * (1 + 1e-7)], noisy).word == "differs"
    assert parity("loss", noisy, [curves(), curves() * (1 + 1e-7)]).word == "within noise"


def chaotic(rng, steps, growth, most):
    """A falling loss whose distance from the others grows from rounding to `most`, as training does
    on a GPU."""
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
            [chaotic(rng, 40, growth, 0.05) for _ in range(n)]
            for n in (max(2, repeats), repeats, 1)
        )
        differs += parity("loss", a, b).word == "differs"
        exact = 300 * np.exp(-np.arange(40) / 15)
        differs += parity("loss", [exact, exact], b, nudged).word == "differs"
    assert differs <= ALLOWED * 2 * TRIALS


def test_one_spike_is_no_parting_but_three_steps_are():
    spike = curves()
    spike[10] *= 1.5
    judged = parity("loss", [curves(), curves()], [spike])
    assert (judged.word, judged.why) == ("undecided", "a difference of 50.0% at step 10")
    spike[10:13] = curves()[10:13] * 1.5
    assert parity("loss", [curves(), curves()], [spike]).first_step == 10


def test_nan_on_one_side_parts_and_on_both_does_not():
    broken = curves()
    broken[12:] = np.inf
    judged = parity("loss", [curves(), curves()], [broken])
    assert (judged.word, judged.first_step, judged.largest_at) == ("differs", 12, 12)
    assert (
        parity("loss", [curves(), curves()], [broken, curves()]).word == "differs"
    )  # one patched run is enough
    for b in ([broken], [curves()]):
        judged = parity("loss", [broken, broken], b)
        assert judged.word == "not finite" and judged.why.startswith(
            "unpatched from step 12 on, and patched "
        )
    once = curves()
    once[7] = np.inf
    assert "at step 7" in parity("loss", [once, curves()], [curves()]).why
    broken[3:6] *= 2  # they part before that
    assert parity("loss", [once, once], [broken]).first_step == 3


def test_nothing_recorded_is_not_compared():
    nothing = np.full(10, np.nan)
    assert parity("loss", [nothing], [curves(10)]).word == "not compared"
    assert parity("loss", [curves(0)], [curves(0)]).word == "not compared"
    assert compare_times([nothing], [curves(10)]) is None
    assert compare_peaks([float("nan")], [1.0]) is None


def test_noise_as_large_as_the_loss_decides_nothing():
    wild = curves() * np.where(np.arange(30) >= 20, 1.97, 1.0)
    judged = parity("loss", [curves(), wild], [curves() * 1.3])
    assert judged.word == "differs" and judged.first_step == 0  # before the noise begins
    judged = parity("loss", [curves(), wild], [curves() * np.where(np.arange(30) >= 20, 1.3, 1.0)])
    assert (judged.word, judged.drowned_at) == ("undecided", 20) and judged.why.startswith(
        "A differs from A by "
    )


def test_every_patched_run_must_part():
    off = curves() * np.where(np.arange(30) >= 10, 1.1, 1.0)
    judged = parity("loss", [curves(), curves()], [off, curves()])
    assert (judged.word, judged.why) == ("undecided", "some patched runs differ and some do not")
    assert parity("loss", [curves(), curves()], [off, off * 1.001]).first_step == 10


def test_ranks_and_parts_are_judged_apart():
    """What one rank, or one part of the loss, does is not hidden by the others' mean."""
    verdict = judge(
        synthetic.ranks(lambda label, rank, i: 5.0 if label == "A" or rank != 2 or i < 9 else 5.6)
    )
    loss = verdict.parities[0]
    assert (loss.word, loss.rank, loss.first_step) == ("differs", 2, 9)
    verdict = judge(
        synthetic.ranks(lambda label, rank, i: float("nan") if rank == 1 and i == 4 else 5.0)
    )
    assert verdict.parity_word == "not finite" and verdict.parities[0].rank == 1
    assert verdict.fails(["differs"]) == ["differs"] and verdict.fails(["fails"]) == ["fails"]
    found = synthetic.trial(0, noise=0.0)
    for run in found.runs:
        for i, line in enumerate(run.processes[0].steps):
            line["loss_parts"] = {
                "loss_cls": 2.0 + (0.4 if run.label == "B" and i >= 7 else 0.0),
                "loss_box": 3.0 - (0.4 if run.label == "B" and i >= 7 else 0.0),
                "loss_tiny": 1e-6 * (2 if run.label == "B" else 1),  # of no weight in the loss
            }
    verdict = judge(found)
    words = {p.quantity: p.word for p in verdict.parities}
    assert words["loss"] == "identical" and words["loss_cls"] == words["loss_box"] == "differs"
    assert (
        words["loss_tiny"] != "differs"
        and verdict.parity_word == "differs"
        and verdict.first_step == 7
    )


@pytest.mark.parametrize("name", noises.SHAPES)
def test_noise_of_no_shape_is_a_difference(name):
    trials = 24
    for repeats in (1, 2):
        found = noises.share("differs", name, trials, repeats=repeats)
        assert found * trials <= ALLOWED * trials + 2 * np.sqrt(trials * ALLOWED * (1 - ALLOWED))
    assert noises.share("differs", name, 10, repeats=2, effect="+30% throughout") >= 0.2


@pytest.mark.slow
def test_the_table_of_the_docs():
    """False "differs" of at most 5% for every shape, and the power beside it."""
    lines = noises.table()
    assert "\n".join(lines) in (ROOT / "docs" / "ab.md").read_text()
    for line in lines[2:]:
        rates = [float(cell.strip().rstrip("%")) for cell in line.strip("|").split("|")[1:]]
        assert max(rates[:4]) <= 100 * ALLOWED and rates[-1] >= 30


def test_gradient_norms_that_overflow_under_a_scaler_are_no_finding():
    norms = np.ones(30)
    scaling = norms.copy()
    scaling[[0, 5]] = np.inf
    runs = [
        synthetic.make_run(label, i, np.ones(30), curves(), 1.0, norms, half=True)
        for i, label in enumerate("ABBA")
    ]
    for line, value in zip(runs[1].processes[0].steps, scaling):
        line["grad_norm"] = value
    found = {
        p.quantity: p.word for p in parities.of_runs([runs[0], runs[3]], runs[1:3], [], half=True)
    }
    assert (
        found["gradient norm"] in ("identical", "within rounding", "undecided")
        and found["loss"] == "identical"
    )
