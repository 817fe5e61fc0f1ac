"""Detections: matching, differences, and nuscenes-devkit's own mAP and NDS."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest

from flashbias_patch.ab import detections, judging, records, report
from flashbias_patch.ab.detections import BadPredictions, accuracy, compare, load, match

CLASSES = ["car", "truck", "pedestrian"]


def document(seed=0, samples=3, boxes=12):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(samples):
        truth = np.column_stack(
            [
                rng.uniform(-30, 30, (boxes, 2)),
                rng.normal(size=boxes),
                rng.uniform(1, 4, (boxes, 3)),
                rng.uniform(-3, 3, boxes),
                rng.normal(size=(boxes, 2)),
            ]
        )
        labels = rng.integers(0, 3, boxes).tolist()
        found.append(
            {
                "token": f"sample{number}",
                "boxes": truth.tolist(),
                "scores": rng.uniform(0.1, 1, boxes).tolist(),
                "labels": labels,
                "gt_boxes": truth.tolist(),
                "gt_labels": labels,
            }
        )
    return {"classes": CLASSES, "samples": found}


def test_matching_is_one_to_one_nearest_first_and_bounded():
    a = np.zeros((3, 9))
    a[:, 0] = [0, 1, 50]
    b = np.zeros((3, 9))
    b[:, 0] = [0.9, 0.2, 90]
    assert sorted(match(a, b)) == [(0, 1), (1, 0)]
    assert match(a, np.zeros((0, 9))) == []


def test_same_detections_in_another_order_differ_in_nothing():
    a = document()
    b = copy.deepcopy(a)
    for sample in b["samples"]:
        for name in ("boxes", "scores", "labels"):
            sample[name] = sample[name][::-1]
    found = compare(a, b)
    assert (found["matched"], found["only_a"], found["only_b"], found["labels_changed"]) == (
        36,
        0,
        0,
        0,
    )
    assert all(value["largest"] == 0 for value in found["differences"].values())


def test_known_differences_are_measured():
    a, b = document(samples=1), document(samples=1)
    box = b["samples"][0]["boxes"][4]
    box[0] += 0.3
    box[1] += 0.4
    box[6] += 2 * math.pi + 0.1
    b["samples"][0]["scores"][4] -= 0.05
    b["samples"][0]["labels"][4] = (b["samples"][0]["labels"][4] + 1) % 3
    for name in ("boxes", "scores", "labels"):
        b["samples"][0][name].pop()
    found = compare(a, b)
    assert (found["matched"], found["only_a"], found["labels_changed"]) == (11, 1, 1)
    differences = {name: value["largest"] for name, value in found["differences"].items()}
    assert differences["centre (m)"] == pytest.approx(0.5)
    assert differences["yaw (rad)"] == pytest.approx(0.1)
    assert differences["score"] == pytest.approx(0.05)
    assert differences["size (m)"] == 0


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda d: d["samples"][0].pop("token"), "`token` is missing"),
        (lambda d: d["samples"][0]["scores"].pop(), "`scores` has 11 entries for 12 boxes"),
        (lambda d: d["samples"][1]["labels"].__setitem__(0, 3), "must index `classes`"),
        (lambda d: d["samples"][0].__setitem__("boxes", [[1, 2]]), r"must be a list of \[x, y, z"),
        (lambda d: d.pop("classes"), "expected an object"),
    ],
)
def test_bad_predictions_are_named(tmp_path, change, says):
    broken = document()
    change(broken)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(BadPredictions, match=says):
        load(str(path))
    path.write_text("{")
    with pytest.raises(BadPredictions, match="cannot be read"):
        load(str(path))


def test_frames_as_mini_cmt_writes_them(tmp_path):
    boxes = [[1, 2, 3, 4.0, 2.0, 1.5, 0.1, 0, 0]]  # length 4, width 2
    group = {"boxes": boxes, "labels": [0], "scores": [0.5]}
    (tmp_path / "p.json").write_text(
        json.dumps(
            {
                "classes": CLASSES,
                "frames": [{"token": "t", "predictions": group, "ground_truth": group}],
            }
        )
    )
    assert load(str(tmp_path / "p.json"))["samples"][0]["boxes"] == [
        [1, 2, 3, 2.0, 4.0, 1.5, 0.1, 0, 0]
    ]


def test_no_ground_truth_and_no_devkit_are_reported(monkeypatch):
    bare = document()
    for sample in bare["samples"]:
        del sample["gt_boxes"], sample["gt_labels"]
    assert "no ground truth" in accuracy(bare)["why_not"]
    import sys

    monkeypatch.setitem(sys.modules, "nuscenes.eval.common.config", None)
    assert "flashbias-patch[nuscenes]" in accuracy(document())["why_not"]


def test_map_and_nds_by_the_devkit():
    pytest.importorskip("nuscenes.eval.detection.algo")
    perfect = accuracy(document())
    present = {name: perfect["AP"][name] for name in CLASSES}
    assert present == {name: pytest.approx(1.0, abs=1e-6) for name in CLASSES}
    assert perfect["mAP"] == pytest.approx(0.3, abs=1e-6)  # three of ten classes have ground truth
    worse = document()
    for sample in worse["samples"]:
        for box in sample["boxes"]:
            box[0] += 0.75  # right at thresholds 1, 2 and 4 m, wrong at 0.5 m
    assert accuracy(worse)["AP"]["car"] == pytest.approx(0.75, abs=0.05)
    assert accuracy(worse)["NDS"] < perfect["NDS"]


def test_nothing_in_common_has_no_differences():
    a, b = document(samples=1), document(samples=1)
    for box in b["samples"][0]["boxes"]:
        box[0] += 500
    pair = detections.compare(a, b)
    found = {"a_b": pair, "word": detections.judge(pair, None)}
    assert (
        detections.sentence(found) == "Patched does not detect the same: 0 boxes in common, 24 not."
    )
    assert "within" not in detections.pair_text(
        "A against B", pair
    ) and "at most" not in detections.pair_text("", pair)


def test_comparison_of_runs(tmp_path):
    runs = []
    for index, label in enumerate("ABA"):
        place = tmp_path / "runs" / f"{index + 1:02d}-{label}"
        place.mkdir(parents=True)
        changed = document()
        changed["samples"][0]["scores"][0] += 0.01 if label == "B" else 0.0
        (place / "predictions.json").write_text(json.dumps(changed))
        runs.append(records.Run(label, index, directory=place.name))
    found = detections.compare_runs(records.Experiment(str(tmp_path), ["x"], {}, runs))
    assert found["a_b"]["differences"]["score"]["largest"] == pytest.approx(0.01)
    assert found["a_a"]["differences"]["score"]["largest"] == 0
    assert "A against B: 36 matched" in detections.text(found)
    (tmp_path / "runs" / "02-B" / "predictions.json").unlink()
    found = detections.compare_runs(records.Experiment(str(tmp_path), ["x"], {}, runs))
    assert "no predictions of both sides" in found["error"]
    (problem,) = found["problems"]
    assert problem.startswith("B2: ") and problem.endswith(
        "was not written: CMD is given this path for {predictions}"
    )


def test_markdown_shows_the_detections():
    pair = compare(document(samples=1), document(samples=1))
    found = {
        "word": "identical",
        "a_b": pair,
        "a_a": None,
        "accuracy": {"A": {"why_not": "no *truth*"}},
        "problems": [],
    }
    experiment = records.Experiment("nowhere", ["x"], {"inference": True}, [])
    text = report.markdown(experiment, judging.judge(experiment, detections=found))
    assert (
        "### Detections\n- detections, A against B: 12 matched" in text
        and "- A: no \\*truth\\*\n" in text
    )
