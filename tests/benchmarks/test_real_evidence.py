"""Scripts on what the fusion detector computes: what can be tested without third-party code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.support.scripts import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def beside_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_jobs_start_while_there_is_room_for_them():
    import at_once

    assert at_once.fits(90.0, [], 1, 72.0)  # alone it may be as large as it likes
    assert at_once.fits(30.0, [30.0], 2, 72.0)
    assert not at_once.fits(30.0, [30.0, 30.0], 3, 72.0)
    assert not at_once.fits(5.0, [5.0, 5.0], 2, 72.0)


def test_all_jobs_run_and_what_they_wrote_is_seen(tmp_path):
    import at_once

    code = "import at_once, sys; at_once.write(sys.argv[1], {'n': 1}); sys.exit(int(sys.argv[2]))"
    jobs = [
        at_once.Job(status, ["-c", code, str(tmp_path / status), status], str(tmp_path / status))
        for status in ("0", "3")
    ]
    seen = {}
    at_once.run(jobs, 2, 0.0, 600.0, seen.__setitem__)
    assert seen["0"] == {"n": 1}
    assert seen["3"] == {"error": "the process died (exit status 3)", "n": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"0", "3"}


def test_a_job_that_does_not_end_is_ended(tmp_path):
    import at_once

    seen = {}
    job = at_once.Job("late", ["-c", "import time; time.sleep(600)"], str(tmp_path / "late"))
    at_once.run([job], 1, 0.0, 0.1, seen.__setitem__)
    assert seen == {"late": {"error": "no end after 0.1 s (exit status -9)"}}


def test_distance_of_curves():
    import real_parity

    base = [100.0, 50.0, 20.0, 10.0]
    found = real_parity.distances([100.0, 50.01, 20.1, 11.0], base)
    assert found["steps"] == 4 and found["largest"] == pytest.approx(0.1)
    assert found["median"] == pytest.approx((0.0002 + 0.005) / 2)
    assert found["by_tenth"] == pytest.approx([0.0, 0.0002, 0.005, 0.1])
    assert found["first_beyond_1e-3"] == 2
    assert real_parity.distances([1.0, 2.0], [1.0])["steps"] == 1  # the other goes on
    assert real_parity.distances([], base) == {"steps": 0}


def test_a_curve_is_held_against_each_noisy_one():
    import real_parity

    runs = {
        "unpatched": {"losses": [10.0, 10.0]},
        "unpatched again": {"losses": [10.0, 10.1]},
        "unpatched, nudged": {"losses": [10.0, 11.0]},
        "patched": {"losses": [10.0, 10.5]},
        "patched fp16": {"error": "out of memory"},
    }
    found = real_parity.summary(runs, ("unpatched again", "unpatched, nudged"))
    assert found["patched"]["within"] == {"unpatched again": False, "unpatched, nudged": True}
    assert found["unpatched again"]["within"] == {} and "patched fp16" not in found
    assert real_parity.summary({"patched": runs["patched"]}, ()) == {}


def test_distance_of_gradients_by_part():
    import real_parity

    names = ("img_backbone.w", "pts_backbone.w", "pts_bbox_head.w", "pts_bbox_head.transformer.w")
    base = {name: torch.tensor([3.0, 4.0]) for name in names}
    found = {**base, "pts_bbox_head.transformer.w": torch.tensor([3.0, 4.5])}
    apart = real_parity.gradient_distances(found, base)
    assert apart == {
        "all": pytest.approx(0.5 / math.sqrt(100)),
        "decoder": pytest.approx(0.1),
        "head": 0.0,
        "image branch": 0.0,
        "lidar branch": 0.0,
    }


def test_nudged_parameters_differ_in_the_last_place():
    import ways

    net = torch.nn.Linear(3, 2)
    before = net.weight.detach().clone()
    ways.nudge(net)
    assert (net.weight != before).all()
    assert torch.allclose(net.weight, before, rtol=2.0**-22, atol=0)
    assert net.weight.requires_grad and net.weight.is_leaf


def test_the_page_has_what_is_known_of_unfinished_runs():
    import real_parity

    runs = {
        "unpatched": {"losses": [10.0, 9.0]},
        "unpatched again": {"losses": [10.0]},
        "patched": {"error": "the process died"},
    }
    result = {
        **{"family": "fusion0100", "bs": 2, "steps": 2, "runs": runs},
        "gradients": {"unpatched again": {"all": 1e-7}},
        "curves": real_parity.summary(runs, ("unpatched again",)),
    }
    make = load("docs/make_performance.py")
    text = "\n".join(make.evidence.parity(json.loads(json.dumps(result))))
    assert "| unpatched again | 1.0e-07 | 0.0e+00 | 0.0e+00 | 10.000, 10.000 | 1 |" in text
    assert "| patched |  |  |  | the process died | 0 |" in text
    assert "reproducible" not in text  # the first losses are equal; the rest is not known
    runs["unpatched again"]["losses"] = [10.0, 9.0]
    assert "reproducible there" in "\n".join(make.evidence.parity(result))
    runs["unpatched again"]["losses"] = [11.0]
    assert "not reproducible: 1.0e-01" in "\n".join(make.evidence.parity(result))


def test_the_learning_rate_grows_and_falls():
    import real_accuracy

    rates = [real_accuracy.rate(i, 100, 2e-4) for i in range(100)]
    assert rates[0] == pytest.approx(2e-5) and max(rates) == rates[10] == pytest.approx(2e-4)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 3e-6
    assert real_accuracy.rate(0, 1, 1.0) == 1.0


def test_boxes_are_given_in_nuscenes_order():
    import real_accuracy

    class Boxes:
        tensor = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]])  # l 4, w 5, h 6
        gravity_center = torch.tensor([[1.0, 2.0, 6.0]])

    assert real_accuracy.nuscenes_boxes(Boxes()) == [[1.0, 2.0, 6.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0]]
    assert Boxes.tensor[0, 2] == 3.0  # the detector's own are left as they are


def test_running_statistics_are_those_of_the_last_weights():
    import real_accuracy

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, momentum=0.01))
    x = torch.randn(512, 3) * 5 + 2
    real_accuracy.settle(net, lambda: net(x))
    expected = net(x).detach()
    assert net[1].momentum == 0.01
    assert torch.allclose(net.eval()(x), expected, atol=5e-3)  # the variance is unbiased


def test_confident_boxes():
    import real_accuracy

    sample = {
        "token": "t",
        "boxes": [[1], [2], [3]],
        "scores": [0.9, 0.1, 0.3],
        "labels": [4, 5, 6],
    }
    found = real_accuracy.confident({"classes": ["car"], "samples": [sample]})
    assert found["samples"] == [
        {"token": "t", "boxes": [[1], [3]], "scores": [0.9, 0.3], "labels": [4, 6]}
    ]
    assert len(sample["boxes"]) == 3


def test_the_page_on_accuracy():
    from flashbias_patch.ab import detections

    box = [1.0, 2.0, 0.0, 2.0, 4.0, 1.5, 0.0, 0.0, 0.0]
    sample = {"token": "t", "boxes": [box], "scores": [0.9], "labels": [0]}
    predictions = {"classes": ["car"], "samples": [sample]}
    pair = detections.compare(predictions, predictions)
    accuracy = {"mAP": 0.5, "NDS": 0.4}
    result = {
        **{"family": "fusion0100", "bs": 2, "steps": 400, "lr": 2e-4, "confident": 0.3},
        "trained": {
            "unpatched": {"losses": [3.0, 2.0], "accuracy": accuracy},
            "patched": {
                **{"losses": [3.0, 2.5], "accuracy": {"why_not": "no devkit"}},
                **{"boxes": pair, "confident_boxes": pair},
            },
            "patched fp16": {"losses": [3.0], "error": "the process died"},
        },
        "evaluated": {
            "fp16": {
                **{"word": "same", "a_b": pair, "a_a": None},
                "accuracy": {"A": accuracy, "B": {**accuracy, "mAP": 0.25}},
            },
            "bf16": {"error": "flashbias ab ended with 1"},
        },
    }
    make = load("docs/make_performance.py")
    text = "\n".join(make.evidence.accuracy(json.loads(json.dumps(result))))
    assert "| unpatched | 2.000 | 0.5000 | 0.4000 |  |" in text
    assert "| patched | 2.500 | no devkit |  | 1 of 1 | 1 of 1 |" in text
    assert "| patched fp16 | the process died |" in text
    assert "| `FLASHBIAS_DTYPE=fp16` | same | 1 of 1 |" in text and "0.2500" in text
    assert "flashbias ab ended with 1" in text
    assert "### Accuracy after" in text and "### `flashbias ab --eval` after" in text
    alone = {**result, "trained": {"unpatched": result["trained"]["unpatched"]}}
    text = "\n".join(make.evidence.accuracy(alone))
    assert "### Accuracy" not in text and "| `FLASHBIAS_DTYPE=fp16` | same |" in text
    result["evaluated"] = {}
    assert "ab --eval" not in "\n".join(make.evidence.accuracy(result))


def test_a_path_is_held_against_the_dense_one():
    import real_windows

    dense = {"losses": [10.0, 9.0], "scales": [[2.5], [2.4]], "gradients": [[2.0], [1.0]]}
    found = {"losses": [10.0, 9.9], "scales": [[2.5], [2.45]], "gradients": [[2.02], [3.0]]}
    result = real_windows.against(found, dense)
    assert result["gradient_error"] == pytest.approx(0.01)  # of the first step
    assert result["path"]["moved"] == pytest.approx(0.1)
    assert result["path"]["relative"] == pytest.approx(0.5)
    assert result["losses"]["largest"] == pytest.approx(0.1)
    without = real_windows.against({"losses": [9.0], "scales": [], "gradients": []}, dense)
    assert set(without) == {"losses"}


def test_gradients_are_those_before_clipping():
    import real_windows

    router = torch.nn.Module()
    router.bias_scale = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    assert real_windows.gradient_of(router, 70.0) == []
    router.bias_scale.grad = torch.tensor([1.0, -2.0])
    assert real_windows.gradient_of(router, 70.0) == [2.0, -4.0]
    assert real_windows.gradient_of(router, 3.0) == [1.0, -2.0]  # nothing was clipped


def test_first_gradients_leave_the_training_as_it_was():
    import real_windows

    torch.manual_seed(0)
    router = torch.nn.Module()
    router.bias_scale = torch.nn.Parameter(torch.tensor(2.5))
    other = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.AdamW([other, router.bias_scale], lr=1e-2)
    real_windows.own_rate(optimizer, router.bias_scale, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.5]

    class Trainer:
        norm = 70.0

        def step(self, i):
            optimizer.zero_grad()
            (3 * router.bias_scale + other).backward()
            optimizer.step()

    Trainer.optimizer = optimizer
    found = real_windows.first_gradients(Trainer(), router, 3)
    assert found == [[6.0]] * 3  # before clipping
    assert (router.bias_scale.item(), other.item()) == (2.5, 1.0)
    assert not optimizer.state and [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.5]
    Trainer().step(0)
    assert router.bias_scale.item() == pytest.approx(2.5 - 0.5, abs=0.1)
    assert other.item() == pytest.approx(1.0 - 1e-2, abs=1e-3)


def test_mean_and_standard_error():
    import real_windows

    found = real_windows.mean_and_error([[1.0, 5.0], [3.0, 5.0]])
    assert found == {"mean": [2.0, 5.0], "standard_error": [pytest.approx(1.0), 0.0]}
    assert real_windows.mean_and_error([[1.5]]) == {"mean": [1.5], "standard_error": [0.0]}


def test_windows_by_configuration_in_patched_runs_alone():
    import real_windows

    named = {name: real_windows.of_aqr("window=8", way) for name, way in real_windows.WAYS.items()}
    assert named["windows"] == named["windows fp16"] == "bias=window,window=8"
    assert named["windows, trained with drops"].startswith("bias=window,window=8,drop=")
    assert not any(named[name] for name in ("dense", "no windows, patched"))
    assert real_windows.of_aqr("", real_windows.WAYS["windows"]) == "bias=window"


@pytest.mark.parametrize(
    ("name", "sensor", "zero"),
    [
        ("CmtTransformer", "lidar", (True, False, False)),
        ("CmtTransformer", "cameras", (False, True, False)),
        ("CmtTransformer", None, (False, False, False)),
        ("CmtImageTransformer", "lidar", (False, False, False)),
        ("CmtImageTransformer", "cameras", (True, False, False)),
    ],
)
def test_a_sensor_is_zeroed_in_front_of_the_transformer(name, sensor, zero):
    import real_windows

    transformer = type(name, (torch.nn.Module,), {"forward": lambda self, *args: args})()
    seen = []
    transformer.register_forward_pre_hook(lambda module, args: seen.append(args))  # dense biases
    handle = real_windows.zeroing(transformer, sensor)
    out = transformer(*(torch.ones(2) for _ in range(3)))
    assert tuple(bool((value == 0).all()) for value in out) == zero
    assert all(torch.equal(a, b) for a, b in zip(seen[0], out))  # comes first
    handle.remove()
    assert all((value == 1).all() for value in transformer(torch.ones(2), torch.ones(2)))


def test_the_page_on_windows():
    drop = {
        key: {"loss": value, "weights": [0.25, -0.5]}
        for key, value in (("none", 5.0), ("lidar", 7.0), ("cameras", 6.0))
    }
    path = {"losses": [9.0, 8.0], "scales": [[2.5], [2.4]], "peak_MiB": 100.0}
    bare = {key: {**value, "weights": []} for key, value in drop.items()}
    result = {
        **{"family": "fusion0100", "bs": 2, "steps": 2, "windows": "window=8"},
        "timed": {
            "dense": {"step_s": 0.5, "times": [3.0, 0.5], "peak_MiB": 40000.0},
            "windows": {"step_s": 0.25, "times": [4.0, 0.25], "peak_MiB": 5000.0},
            "windows fp16": {"error": "the process died"},
        },
        "against_dense": {
            "windows": {
                "losses": {"steps": 2, "median": 0.0, "largest": 1e-3},
                "path": {"steps": 2, "apart": 1e-4, "moved": 0.1, "relative": 1e-3},
                "gradient_error": 1e-6,
            }
        },
        "paths": {
            "dense": {**path, "under_drop": bare},
            "windows": {**path, "under_drop": drop},
            "windows fp16": {"losses": [], "error": "the process died"},
        },
    }
    make = load("docs/make_performance.py")
    text = "\n".join(make.evidence.windows(json.loads(json.dumps(result))))
    assert "| windows | 0.250 | 0.50x | 4.0 | 5000 | 0.12x |" in text
    assert "| windows | 2 | 2.50000, 2.40000 | 1.0e-06 | 1.0e-04 | 1.0e-03 |" in text
    assert "| windows | 5.000 | 7.000 | 6.000 | 0.25, -0.50 |" in text
    assert text.count("the process died") >= 2
    first = {"windows": {"mean": [0.25, -0.5], "standard_error": [0.01, 0.0]}}
    result.update(timed={}, first_gradient=first, bias_lr=5e-3)
    text = "\n".join(make.evidence.windows(json.loads(json.dumps(result))))
    assert "### Windows over 2 steps, bias_scale's learning rate 0.005" in text
    assert "Times and memory" not in text
    assert "| windows | 0.2500 ± 0.0100 | -0.5000 ± 0.0000 |" in text
