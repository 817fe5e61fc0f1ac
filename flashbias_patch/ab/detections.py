"""Are the detections the same? Two predictions files, matched box by box, and mAP and NDS given
ground truth.

    {"classes": [...], "samples": [{"token": ..., "boxes": [[x, y, z, w, l, h, yaw, vx, vy], ...],
     "scores": [...], "labels": [...], "gt_boxes": [[...], ...], "gt_labels": [...]}, ...]}

Metres, radians, metres a second; gt_* are optional. mAP and NDS are nuscenes-devkit's functions,
not ours.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from .records import Experiment

MATCH_WITHIN = 2.0  # metres between centres: nuScenes' own threshold for its true-positive errors
BOX_FIELDS = 9
# Differences that two roundings of one network may show; larger ones are differences, unless A from
# A shows them too.
TOLERANCE = {
    "centre (m)": 0.01,
    "size (m)": 0.01,
    "yaw (rad)": 0.01,
    "velocity (m/s)": 0.01,
    "score": 0.01,
}
NOISE = 3.0  # times what A from A shows


class BadPredictions(ValueError):
    """A predictions file that is not in the format; the message says where."""


def load(path: str) -> Dict[str, Any]:
    """Read and check a predictions file; raises BadPredictions naming the file, the sample and the
    field."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        if isinstance(document, dict) and "frames" in document:
            document = _from_frames(document)
    except FileNotFoundError as error:
        raise BadPredictions(
            f"{path} was not written: CMD is given this path for {{predictions}}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadPredictions(
            f"{path}: cannot be read as predictions: {type(error).__name__}: {error}"
        ) from error
    if (
        not isinstance(document, dict)
        or not isinstance(document.get("samples"), list)
        or not document.get("classes")
    ):
        raise BadPredictions(f"{path}: expected an object with `classes` and `samples`")
    for number, sample in enumerate(document["samples"]):
        where = f"{path}: sample {number}"
        if "token" not in sample:
            raise BadPredictions(f"{where}: `token` is missing")
        count = len(_boxes(sample, "boxes", where))
        for name in ("scores", "labels"):
            if len(sample.get(name, ())) != count:
                raise BadPredictions(
                    f"{where}: `{name}` has {len(sample.get(name, ()))} entries for {count} boxes"
                )
        if "gt_boxes" in sample and len(sample.get("gt_labels", ())) != len(
            _boxes(sample, "gt_boxes", where)
        ):
            raise BadPredictions(
                f"{where}: `gt_labels` has {len(sample.get('gt_labels', ()))} entries for "
                f"{len(sample['gt_boxes'])} boxes"
            )
        for name in ("labels", "gt_labels"):
            if any(not 0 <= label < len(document["classes"]) for label in sample.get(name, ())):
                raise BadPredictions(
                    f"{where}: `{name}` must index `classes` (0 to {len(document['classes']) - 1})"
                )
    return document


def _from_frames(document: Dict[str, Any]) -> Dict[str, Any]:
    """mini_cmt's `--eval` file: by frame, boxes as (x, y, z, l, w, h, ...)."""

    def swapped(boxes: List[List[float]]) -> List[List[float]]:
        return [[*box[:3], box[4], box[3], *box[5:]] for box in boxes]

    return {
        "classes": document["classes"],
        "samples": [
            {
                "token": frame["token"],
                "boxes": swapped(frame["predictions"]["boxes"]),
                "scores": frame["predictions"]["scores"],
                "labels": frame["predictions"]["labels"],
                "gt_boxes": swapped(frame["ground_truth"]["boxes"]),
                "gt_labels": frame["ground_truth"]["labels"],
            }
            for frame in document["frames"]
        ],
    }


def _boxes(sample: Dict[str, Any], name: str, where: str) -> np.ndarray:
    boxes = np.array(sample.get(name, []), dtype=float)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != BOX_FIELDS):
        raise BadPredictions(f"{where}: `{name}` must be a list of [x, y, z, w, l, h, yaw, vx, vy]")
    return boxes.reshape(-1, BOX_FIELDS)


def match(a: np.ndarray, b: np.ndarray, within: float = MATCH_WITHIN) -> List[Tuple[int, int]]:
    """Pairs (i, j) of boxes whose centres are nearest, each used once, nearest pairs first. (n, 9),
    (m, 9) metres.
    """
    if not len(a) or not len(b):
        return []
    distance = np.linalg.norm(a[:, None, :2] - b[None, :, :2], axis=-1)
    pairs = []
    used_a, used_b = set(), set()
    for flat in np.argsort(distance, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(b))
        if distance[i, j] > within:
            break
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            pairs.append((i, j))
    return pairs


def compare(a: Dict[str, Any], b: Dict[str, Any]) -> Dict[str, Any]:
    """Differences of B's detections from A's, over the samples that both hold; samples that one
    lacks are counted."""
    of_b = {sample["token"]: sample for sample in b["samples"]}
    of_a = {sample["token"] for sample in a["samples"]}
    shared = [(sample, of_b[sample["token"]]) for sample in a["samples"] if sample["token"] in of_b]
    centre, size, yaw, velocity, score = [], [], [], [], []
    only_a = only_b = changed = 0
    for x, y in shared:
        boxes = _boxes(x, "boxes", "A"), _boxes(y, "boxes", "B")
        pairs = match(*boxes)
        only_a += len(boxes[0]) - len(pairs)
        only_b += len(boxes[1]) - len(pairs)
        for i, j in pairs:
            p, q = boxes[0][i], boxes[1][j]
            centre.append(np.linalg.norm(p[:3] - q[:3]))
            size.append(np.abs(p[3:6] - q[3:6]).max())
            yaw.append(abs(math.remainder(p[6] - q[6], 2 * math.pi)))
            velocity.append(np.linalg.norm(p[7:] - q[7:]))
            score.append(abs(x["scores"][i] - y["scores"][j]))
            changed += x["labels"][i] != y["labels"][j]
    differences = {
        name: {"largest": float(np.max(v)) if v else 0.0, "mean": float(np.mean(v)) if v else 0.0}
        for name, v in (
            ("centre (m)", centre),
            ("size (m)", size),
            ("yaw (rad)", yaw),
            ("velocity (m/s)", velocity),
            ("score", score),
        )
    }
    return {
        "samples": len(shared),
        "missing_a": len(of_b.keys() - of_a),
        "missing_b": len(of_a - of_b.keys()),
        "matched": len(centre),
        "only_a": only_a,
        "only_b": only_b,
        "labels_changed": int(changed),
        "differences": differences,
    }


def accuracy(document: Dict[str, Any]) -> Dict[str, Any]:
    """mAP, NDS and the five errors, by nuscenes-devkit's accumulate, calc_ap and calc_tp.

    Returns {"mAP", "NDS", "errors"} or {"why_not": ...}. Classes without ground truth count as the
    devkit counts them: with an average precision of 0 - so compare A with B, not with a
    leaderboard. No attributes: AAE is 1.
    """
    if not any(sample.get("gt_boxes") for sample in document["samples"]):
        return {"why_not": "the predictions hold no ground truth (gt_boxes, gt_labels)"}
    try:
        from nuscenes.eval.common.config import config_factory
        from nuscenes.eval.common.data_classes import EvalBoxes
        from nuscenes.eval.common.utils import center_distance
        from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
        from nuscenes.eval.detection.constants import TP_METRICS
        from nuscenes.eval.detection.data_classes import DetectionMetrics
    except ImportError as error:
        return {
            "why_not": f"nuscenes-devkit does not import ({error}): pip install "
            '"flashbias-patch[nuscenes]"'
        }
    config = config_factory("detection_cvpr_2019")
    unknown = sorted(set(document["classes"]) - set(config.class_names))
    if unknown:
        return {"why_not": f"not classes of nuScenes detection: {', '.join(unknown)}"}
    truth, predicted = EvalBoxes(), EvalBoxes()
    for sample in document["samples"]:
        truth.add_boxes(
            sample["token"],
            _devkit_boxes(sample, document["classes"], config.class_range, truth=True),
        )
        predicted.add_boxes(
            sample["token"],
            _devkit_boxes(sample, document["classes"], config.class_range, truth=False),
        )
    metrics = DetectionMetrics(config)
    for name in config.class_names:
        for threshold in config.dist_ths:
            data = accumulate(truth, predicted, name, center_distance, threshold)
            metrics.add_label_ap(
                name, threshold, calc_ap(data, config.min_recall, config.min_precision)
            )
            if threshold == config.dist_th_tp:
                for metric in TP_METRICS:
                    undefined = (
                        name == "traffic_cone"
                        and metric in ("attr_err", "vel_err", "orient_err")
                        or name == "barrier"
                        and metric in ("attr_err", "vel_err")
                    )
                    value = float("nan") if undefined else calc_tp(data, config.min_recall, metric)
                    metrics.add_label_tp(name, metric, value)
    return {
        "mAP": float(metrics.mean_ap),
        "NDS": float(metrics.nd_score),
        "errors": {name: float(value) for name, value in metrics.tp_errors.items()},
        "AP": {name: float(value) for name, value in metrics.mean_dist_aps.items()},
    }


def _devkit_boxes(
    sample: Dict[str, Any], classes: List[str], ranges: Dict[str, float], truth: bool
) -> List[Any]:
    """The sample's boxes as DetectionBox, those beyond their class's evaluation range left out, as
    the devkit does.
    """
    from nuscenes.eval.detection.data_classes import DetectionBox

    boxes = _boxes(
        sample, "gt_boxes" if truth else "boxes", "ground truth" if truth else "predictions"
    )
    labels = sample.get("gt_labels" if truth else "labels", [])
    scores = [-1.0] * len(boxes) if truth else sample["scores"]
    found = []
    for box, label, score in zip(boxes, labels, scores):
        name = classes[label]
        if np.hypot(box[0], box[1]) > ranges[name]:
            continue
        found.append(
            DetectionBox(
                sample_token=sample["token"],
                translation=tuple(box[:3]),
                size=tuple(box[3:6]),
                rotation=(math.cos(box[6] / 2), 0.0, 0.0, math.sin(box[6] / 2)),
                velocity=tuple(box[7:9]),
                ego_translation=tuple(box[:3]),
                num_pts=1 if truth else -1,
                detection_name=name,
                detection_score=float(score),
                attribute_name="",
            )
        )
    return found


def compare_runs(experiment: Experiment) -> Dict[str, Any]:
    """Compare the predictions of the first A with the first B, and A with A, with a word; {"error":
    ...} if there are none of both sides.
    """
    found: Dict[str, List[Dict[str, Any]]] = {"A": [], "B": []}
    problems = []
    for run in experiment.runs:
        path = os.path.join(experiment.directory, "runs", run.directory, "predictions.json")
        if run.status != "ok":
            problems.append(f"{run.name}: {run.status}: {run.message}")
            continue
        try:
            found[run.label].append(load(path))
        except BadPredictions as error:
            problems.append(f"{run.name}: {error}")
    if not found["A"] or not found["B"]:
        return {
            "error": "no predictions of both sides to compare",
            "word": "not compared",
            "problems": problems,
        }
    a_b = compare(found["A"][0], found["B"][0])
    a_a = compare(*found["A"][:2]) if len(found["A"]) > 1 else None
    return {
        "word": judge(a_b, a_a),
        "a_b": a_b,
        "a_a": a_a,
        "accuracy": {"A": accuracy(found["A"][0]), "B": accuracy(found["B"][0])},
        "problems": problems,
    }


def judge(a_b: Dict[str, Any], a_a: Optional[Dict[str, Any]]) -> str:
    """identical, same or differs: boxes, labels and samples of B against A, as far as A against A
    agree."""

    def apart(pair: Dict[str, Any]) -> Dict[str, float]:
        counts = {
            name: pair[name]
            for name in ("missing_a", "missing_b", "only_a", "only_b", "labels_changed")
        }
        return {**counts, **{name: value["largest"] for name, value in pair["differences"].items()}}

    found, noise = apart(a_b), apart(a_a) if a_a else {}
    if not any(found.values()):
        return "identical"
    allowed = {name: max(TOLERANCE.get(name, 0.0), NOISE * noise.get(name, 0.0)) for name in found}
    return "differs" if any(value > allowed[name] for name, value in found.items()) else "same"


def sentence(found: Dict[str, Any]) -> str:
    """The comparison in one sentence."""
    if "error" in found:
        return f"Nothing to compare: {found['error']}."
    pair, word = found["a_b"], found["word"]
    largest = {name: value["largest"] for name, value in pair["differences"].items()}
    matched = f"{pair['matched']} boxes in common, {pair['only_a'] + pair['only_b']} not"
    missing = pair["missing_a"] + pair["missing_b"]
    if word == "identical":
        return f"Patched detects exactly the same: {matched}, in {pair['samples']} samples."
    within = f"centres within {largest['centre (m)']:.2g} m, scores within {largest['score']:.2g}"
    if word == "same" and not pair["only_a"] + pair["only_b"] + pair["labels_changed"]:
        return f"Patched detects the same {pair['matched']} boxes: {within}, every label equal."
    lost = (
        f"{missing} of {pair['samples'] + missing} samples are on one side only; "
        if missing
        else ""
    )
    head = (
        "Patched does not detect the same"
        if word == "differs"
        else "Patched detects the same within A's own noise"
    )
    apart = f"; {within}, {pair['labels_changed']} labels changed" if pair["matched"] else ""
    return f"{head}: {lost}{matched}{apart}."


def text(found: Dict[str, Any]) -> str:
    """A few plain lines for the terminal."""
    if "error" in found:
        return "\n".join([f"detections: {found['error']}", *(f"  {p}" for p in found["problems"])])
    out = []
    for title, side in (("A against B", found["a_b"]), ("A against A", found["a_a"])):
        if side:
            out.append(pair_text(title, side))
    for side, value in found["accuracy"].items():
        out.append(f"  {side}: {_accuracy_line(value)}")
    return "\n".join([*out, *(f"  problem: {p}" for p in found["problems"])])


def pair_text(title: str, pair: Dict[str, Any]) -> str:
    """Counts of a comparison, and the largest differences of boxes that match, if any do."""
    largest = ", ".join(
        f"{name} {value['largest']:.2g}" for name, value in pair["differences"].items()
    )
    at_most = f"; at most: {largest}" if pair["matched"] else ""
    return (
        f"detections, {title}: {pair['matched']} matched, {pair['only_a']} and {pair['only_b']} "
        "unmatched, "
        f"{pair['labels_changed']} labels changed over {pair['samples']} samples, "
        f"{pair['missing_a'] + pair['missing_b']} samples on one side only{at_most}"
    )


def _accuracy_line(value: Dict[str, Optional[Any]]) -> str:
    return (
        str(value["why_not"])
        if "why_not" in value
        else f"mAP {value['mAP']:.4f}, NDS {value['NDS']:.4f}"
    )
