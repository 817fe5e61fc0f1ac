"""A quick look at detections: average precision by centre distance, in the manner of nuScenes."""

from __future__ import annotations

from typing import Dict, List, Sequence

import numpy as np

from .boxes import CLASS_NAMES

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # metres, on the ground


def average_precision(frames: Sequence[dict], label: int, threshold: float) -> float:
    """Area under precision over recall of one class; nan without objects of it."""
    total = sum(int((np.asarray(f["ground_truth"]["labels"]) == label).sum()) for f in frames)
    if total == 0:
        return float("nan")
    scores: List[float] = []
    hits: List[bool] = []
    for frame in frames:
        truth, found = frame["ground_truth"], frame["predictions"]
        objects = [b[:2] for b, c in zip(truth["boxes"], truth["labels"]) if c == label]
        free = np.ones(len(objects), dtype=bool)
        triples = zip(found["scores"], found["boxes"], found["labels"])
        candidates = [(s, b[:2]) for s, b, c in triples if c == label]
        for score, centre in sorted(candidates, key=lambda pair: -pair[0]):
            distances = np.linalg.norm(np.reshape(objects, (-1, 2)) - centre, axis=1)
            distances[~free] = np.inf
            hit = len(distances) > 0 and distances.min() < threshold
            if hit:
                free[distances.argmin()] = False
            scores.append(score)
            hits.append(bool(hit))
    true_positives = np.cumsum(
        np.asarray(hits, dtype=float)[np.argsort(-np.asarray(scores), kind="stable")]
    )
    if len(true_positives) == 0:
        return 0.0
    precision = np.maximum.accumulate(
        (true_positives / np.arange(1, len(true_positives) + 1))[::-1]
    )[::-1]
    return float((np.diff(true_positives, prepend=0.0) * precision).sum() / total)


def mean_average_precision(frames: Sequence[dict]) -> Dict[str, float]:
    """AP of each class that occurs, over the four distances, and their mean as `mAP`."""
    result = {}
    for label, name in enumerate(CLASS_NAMES):
        values = [average_precision(frames, label, threshold) for threshold in THRESHOLDS]
        if np.isfinite(values).all():
            result[name] = float(np.mean(values))
    result["mAP"] = float(np.mean(list(result.values()))) if result else 0.0
    return result
