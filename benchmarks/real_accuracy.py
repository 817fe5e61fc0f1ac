"""Does a real detector detect the same patched? Overfitted on one real frame in several ways.

    python benchmarks/real_accuracy.py --cmt DIR --frame DIR --out F.json [--steps 300] [--jobs 4]
    ... --reports DIR                           keeps the pages of `flashbias ab` and predictions
    ... --device cpu --tiny --steps 3           a proof that it runs, with the camera detector

DIRs as for real_models.py. First, CMT's fusion detector (voxel0100) is trained without dropout from
the same weights in each way (ways.py), and detects the frame in the same way: its boxes, as CMT's
own get_bboxes decodes them, are matched with those of the first unpatched one, and mAP and NDS are
nuscenes-devkit's. Then `flashbias ab --eval` compares detections from the weights that the
unpatched run trained: unpatched against patched, patched fp16, patched bf16. Several processes
work at the same time: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import at_once
from ways import NUDGED, WAYS, add_arguments, checked, run_of, trainer_of

CONFIDENT = 0.3  # least score of the boxes that are matched a second time, alone
WARM, LAST = 0.1, 0.01  # part of the steps in which the rate grows; its end, of the largest
DTYPES = ("auto", "fp16", "bf16")  # of `flashbias ab --eval`'s patched side


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: linear to `peak`, then half a cosine down."""
    warm = max(1, round(WARM * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * done)))


def nuscenes_boxes(boxes: Any) -> List[List[float]]:
    """mmdet3d's LiDAR boxes as [x, y, z, w, l, h, yaw, vx, vy] with z of the centre; it has them as
    (x, y, bottom, l, w, h, ...)."""
    import torch

    found = boxes.tensor.detach().float().cpu().clone()
    found[:, :3] = boxes.gravity_center.detach().float().cpu()
    return found[:, torch.tensor([0, 1, 2, 4, 3, 5, 6, 7, 8])].tolist()


def confident(predictions: Dict[str, Any], least: float = CONFIDENT) -> Dict[str, Any]:
    """The boxes with at least this score."""
    samples = []
    for sample in predictions["samples"]:
        kept = [i for i, score in enumerate(sample["scores"]) if score >= least]
        samples.append(
            {
                **sample,
                **{key: [sample[key][i] for i in kept] for key in ("boxes", "scores", "labels")},
            }
        )
    return {**predictions, "samples": samples}


def settle(net: Any, forward: Callable[[], Any]) -> None:
    """Set the running statistics of batch norms to those of one training pass at the last weights:
    averages over the last steps lag behind, and there is one frame only."""
    import torch

    norms = [
        each for each in net.modules() if isinstance(each, torch.nn.modules.batchnorm._BatchNorm)
    ]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        forward()
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum


def detect(detector: Any) -> Dict[str, Any]:
    """Predictions on the frame, in the format of `flashbias ab --eval`, with its ground truth."""
    import detectors
    import torch

    batch = detector.resize(1)(0)
    net = detector.net.eval()
    given = {name: [batch[name]] for name in ("img", "img_metas")}
    if batch["points"] is not None:
        given["points"] = [batch["points"]]
    with torch.no_grad():
        found = net(return_loss=False, **given)[0]["pts_bbox"]
    net.train()
    return {
        "classes": list(detectors.CLASSES),
        "samples": [
            {
                "token": batch["img_metas"][0]["sample_idx"],
                "boxes": nuscenes_boxes(found["boxes_3d"]),
                "scores": found["scores_3d"].float().tolist(),
                "labels": found["labels_3d"].tolist(),
                "gt_boxes": nuscenes_boxes(batch["gt_bboxes_3d"][0]),
                "gt_labels": batch["gt_labels_3d"][0].tolist(),
            }
        ],
    }


def path_of(folder: str, name: str, end: str = ".json") -> str:
    return os.path.join(folder, name.replace(" ", "_") + end)


def train(args: argparse.Namespace, name: str, folder: str) -> None:
    """A way's training and its detections, in this process."""
    import torch
    from real_worker import about

    import flashbias_patch
    from flashbias_patch.ab import detections

    with trainer_of(args, name) as trainer:
        record: Dict[str, Any] = {"about": about(args.device), "losses": []}
        for i in range(args.steps):
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate(i, args.steps, args.lr)
            record["losses"].append(round(float(trainer.step(i)), 5))
            if i % 50 == 0:
                at_once.write(path_of(folder, name), record)
                print(f"{name:<18} step {i + 1:>4}  loss {record['losses'][-1]:.4f}", flush=True)
        net = trainer.detector.net
        settle(net, lambda: net(return_loss=True, **trainer.batch(0)))
        weights = path_of(folder, name, ".pth")
        torch.save(net.state_dict(), weights + ".partial")
        os.replace(weights + ".partial", weights)
        predictions = detect(trainer.detector)
        record["calls"] = flashbias_patch.status()["calls"]
    at_once.write(path_of(folder, name, ".predictions.json"), predictions)
    record["accuracy"] = detections.accuracy(predictions)
    at_once.write(path_of(folder, name), record)
    accuracy = record["accuracy"]
    print(
        f"{name:<18} loss {record['losses'][-1]:.4f}  "
        + (accuracy.get("why_not") or f"mAP {accuracy['mAP']:.4f}  NDS {accuracy['NDS']:.4f}"),
        flush=True,
    )


def predict(args: argparse.Namespace, weights: str, out: str) -> None:
    """The command of `flashbias ab --eval`: it neither installs this package nor forbids it."""
    import detectors
    import torch
    from real_worker import options

    run = run_of(args, "unpatched", WAYS["unpatched"])
    detector = detectors.build(args.family, args.cmt, args.frame, options(run, args.device))
    detector.net.load_state_dict(torch.load(weights, map_location=args.device))
    at_once.write(out, detect(detector))


def compare(words: Sequence[str], dtype: str, folder: str) -> None:
    """`flashbias ab --eval` from the unpatched run's weights, with a patched side of this dtype."""
    from flashbias_patch.cli import main as cli

    reports = os.path.join(folder, "ab_" + dtype)
    status = cli.main(
        [
            *("ab", "--repeats", "1", "--eval", path_of(folder, "unpatched", ".pth")),
            *("--out", reports, "--env-b", f"FLASHBIAS_DTYPE={dtype}", "--"),
            *(sys.executable, str(Path(__file__).resolve()), *words),
            *("--predict", "{checkpoint}", "{predictions}"),
        ]
    )
    record: Dict[str, Any] = {"status": status}
    summary = Path(reports, "summary.json")
    if summary.exists():
        found = json.loads(summary.read_text())
        record.update(
            {key: found[key] for key in ("headline", "notes", "problems") if key in found}
        )
        record.update(found.get("detections", {}))
    if "a_b" not in record:
        record["error"] = f"flashbias ab ended with {status} and compared nothing"
    at_once.write(path_of(folder, "ab " + dtype), record)


class Report:
    """The results so far, saved after each addition."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.args, self.folder = args, folder
        self.about: Dict[str, Any] = {}
        self.trained: Dict[str, Dict[str, Any]] = {}
        self.evaluated: Dict[str, Dict[str, Any]] = {}

    def of_training(self, name: str, record: Dict[str, Any]) -> None:
        from flashbias_patch.ab import detections

        self.about.update(record.get("about", {}))
        self.trained[name] = {key: value for key, value in record.items() if key != "about"}
        files = [path_of(self.folder, each, ".predictions.json") for each in self.trained]
        known = {
            each: detections.load(path)
            for each, path in zip(self.trained, files)
            if os.path.exists(path)
        }
        for each, predictions in known.items():
            if each != "unpatched" and "unpatched" in known:
                base = known["unpatched"]
                self.trained[each]["boxes"] = detections.compare(base, predictions)
                self.trained[each]["confident_boxes"] = detections.compare(
                    confident(base), confident(predictions)
                )
        self.save(record)

    def of_evaluation(self, name: str, record: Dict[str, Any]) -> None:
        self.evaluated[name] = record
        self.save(record)

    def save(self, record: Dict[str, Any]) -> None:
        from provenance import command_of

        if "error" in record:
            print(record["error"], flush=True)
        if not self.args.out:
            return
        at_once.write(
            self.args.out,
            {
                **self.about,
                "command": command_of(*self.args.paths),
                **{key: getattr(self.args, key) for key in ("family", "bs", "steps", "lr")},
                "confident": CONFIDENT,
                "trained": self.trained,
                "evaluated": self.evaluated,
            },
        )


def main(argv: Optional[Sequence[str]] = None) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, [name for name in WAYS if name != NUDGED])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=4e-4, help="the largest learning rate")
    parser.add_argument("--reports", metavar="DIR", help="keep what the processes wrote")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)  # way, folder
    parser.add_argument("--compare", nargs=2, help=argparse.SUPPRESS)  # dtype, folder
    parser.add_argument("--predict", nargs=2, help=argparse.SUPPRESS)  # checkpoint, predictions
    given = list(sys.argv[1:] if argv is None else argv)
    args = checked(parser, parser.parse_args(given))
    if args.train:
        train(args, *args.train)
    elif args.predict:
        predict(args, *args.predict)
    elif args.compare:
        compare(given[: given.index("--compare")], *args.compare)
    else:
        with tempfile.TemporaryDirectory() as folder:
            orchestrate(args, given, folder)


def orchestrate(args: argparse.Namespace, given: Sequence[str], folder: str) -> None:
    sys.path.append(str(at_once.HERE.parent))  # this package, of which the parent reads files only
    report = Report(args, folder)
    script = str(Path(__file__).resolve())
    jobs = [
        at_once.Job(
            name, [script, *given, "--train", name, folder], path_of(folder, name), WAYS[name].gib
        )
        for name in args.ways
    ]
    at_once.run(jobs, args.jobs, args.memory, args.timeout, report.of_training)
    if os.path.exists(path_of(folder, "unpatched", ".pth")):
        jobs = [
            at_once.Job(
                dtype,
                [script, *given, "--compare", dtype, folder],
                path_of(folder, "ab " + dtype),
                WAYS["patched"].gib,
            )
            for dtype in DTYPES
        ]
        at_once.run(jobs, args.jobs, args.memory, args.timeout, report.of_evaluation)
    if args.reports:
        keep(folder, args.reports)


def keep(folder: str, target: str) -> None:
    """All but weights."""
    import shutil

    shutil.copytree(
        folder, target, ignore=shutil.ignore_patterns("*.pth", "*.partial"), dirs_exist_ok=True
    )


if __name__ == "__main__":
    main()
