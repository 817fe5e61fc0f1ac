"""Does a real detector train the same patched? Gradients of the first step and a hundred losses.

    python benchmarks/real_parity.py --cmt DIR --frame DIR --out F.json [--steps 100] [--jobs 4]
    ... --hold-lidar                            the lidar branch's output is a given one
    ... --device cpu --tiny --steps 4           a proof that it runs, with the camera detector

DIRs as for real_models.py; CMT's fusion detector (voxel0100) without dropout, from the same weights
on the same frame: unpatched, unpatched again (the noise of the machine), unpatched with every
parameter changed in the last place (the noise of any change), and patched. Each in a process of its
own, several at the same time: nothing is timed.

The lidar branch computes in another order in each run on a GPU, so that two unpatched runs differ
by some per cent. --hold-lidar computes its output once and gives it to every run: what differs then
is attention. Its gradient is compared as that of the lidar branch.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import at_once
from ways import NOISE, WAYS, add_arguments, checked, trainer_of

CLIP = 35.0  # real_worker.Trainer clips the norm of all gradients to it
LIDAR = "lidar features"  # the process that computes them
PARTS = (  # of a detector, by the beginning of its parameters' names
    ("decoder", "pts_bbox_head.transformer."),
    ("head", "pts_bbox_head."),
    ("image branch", "img_"),
    ("lidar branch", "pts_"),
)


def part_of(name: str) -> str:
    return next((part for part, begin in PARTS if name.startswith(begin)), "rest")


def distances(found: Sequence[float], base: Sequence[float]) -> Dict[str, Any]:
    """Relative distance of two loss curves over the steps that both have: the largest, the median,
    the median of each tenth of the curve, and the first step of more than 1e-3."""
    apart = [abs(a - b) / abs(b) for a, b in zip(found, base)]
    if not apart:
        return {"steps": 0}
    length = max(1, math.ceil(len(apart) / 10))
    return {
        "steps": len(apart),
        "largest": max(apart),
        "median": statistics.median(apart),
        "by_tenth": [
            statistics.median(apart[i : i + length]) for i in range(0, len(apart), length)
        ],
        "first_beyond_1e-3": next((i for i, value in enumerate(apart) if value > 1e-3), None),
    }


def summary(runs: Dict[str, Dict[str, Any]], noise: Sequence[str]) -> Dict[str, Any]:
    """Each run's curve against that of "unpatched"; `within`: by the name of a noisy run, whether
    largest and median distance are at most its own."""
    base = runs.get("unpatched", {}).get("losses")
    if not base:
        return {}
    found = {
        name: distances(run["losses"], base)
        for name, run in runs.items()
        if name != "unpatched" and run.get("losses")
    }
    for name, each in found.items():
        heard = {} if name in noise else {other: found[other] for other in noise if other in found}
        each["within"] = {
            other: each["largest"] <= limit["largest"] and each["median"] <= limit["median"]
            for other, limit in heard.items()
            if each["steps"] and limit["steps"]
        }
    return found


def gradient_distances(found: Dict[str, Any], base: Dict[str, Any]) -> Dict[str, float]:
    """Relative distance (L2) of the gradients by name, of all and of each part."""
    squares: Dict[str, List[float]] = {}
    for name, known in base.items():
        for part in ("all", part_of(name)):
            sums = squares.setdefault(part, [0.0, 0.0])
            sums[0] += float((found[name].double() - known.double()).square().sum())
            sums[1] += float(known.double().square().sum())
    return {part: math.sqrt(a / b) if b else 0.0 for part, (a, b) in squares.items()}


def save_lidar(args: argparse.Namespace, folder: str) -> None:
    """Compute the output of the lidar branch for all runs."""
    import detectors
    import torch

    logging.disable(logging.INFO)
    with trainer_of(args, "unpatched") as trainer:
        features = detectors.lidar_features(trainer.detector.net, trainer.batch(0))
        torch.save(features, lidar_of(folder))


def lidar_of(folder: str) -> str:
    return os.path.join(folder, "lidar.pt")


def child(args: argparse.Namespace, name: str, folder: str) -> None:
    import detectors
    import torch
    from real_worker import about

    import flashbias_patch

    logging.disable(logging.INFO)
    out = path_of(folder, name)
    with trainer_of(args, name) as trainer:
        held: List[Any] = []
        if args.hold_lidar:
            features = torch.load(lidar_of(folder), map_location=trainer.device)
            held = detectors.hold_lidar(trainer.detector.net, features)
        record: Dict[str, Any] = {"about": about(args.device), "losses": [], "grad_norms": []}
        for i in range(args.steps):
            loss = float(trainer.step(i))
            norm = float(trainer.norm)
            record["losses"].append(loss)
            record["grad_norms"].append(norm)
            if i == 0:
                scale = max(1.0, norm / CLIP)
                gradients = {
                    name: p.grad.float().cpu() * scale
                    for name, p in trainer.detector.net.named_parameters()
                    if p.grad is not None
                }
                for number, feature in enumerate(held):
                    gradients[f"pts_features.{number}"] = feature.grad.cpu()
                torch.save(gradients, out + ".partial")
                os.replace(out + ".partial", gradients_of(folder, name))
            if i % 10 == 0 or i == args.steps - 1:
                record["peak_MiB"] = round(trainer.peak_mib(), 1)
                record["calls"] = flashbias_patch.status()["calls"]
                at_once.write(out, record)
                print(f"{name:<18} step {i + 1:>4}  loss {loss:.4f}", flush=True)


def path_of(folder: str, name: str) -> str:
    return os.path.join(folder, name.replace(" ", "_") + ".json")


def gradients_of(folder: str, name: str) -> str:
    return path_of(folder, name) + ".pt"


class Report:
    """The results so far, saved after each addition."""

    def __init__(self, args: argparse.Namespace, folder: str, noise: Sequence[str]) -> None:
        self.args, self.folder, self.noise = args, folder, noise
        self.runs: Dict[str, Dict[str, Any]] = {}
        self.about: Dict[str, Any] = {}
        self.gradients: Dict[str, Dict[str, float]] = {}

    def changed(self, name: str, record: Dict[str, Any]) -> None:
        self.about.update(record.get("about", {}))
        self.runs[name] = {key: value for key, value in record.items() if key != "about"}
        if "error" in record:
            print(f"{name}: {record['error']}", flush=True)
        self.compare_gradients()
        if self.args.out:
            at_once.write(self.args.out, self.document())

    def compare_gradients(self) -> None:
        import torch

        base = gradients_of(self.folder, "unpatched")
        fresh = [
            name
            for name in self.runs
            if name not in self.gradients and os.path.exists(gradients_of(self.folder, name))
        ]
        if not os.path.exists(base):
            return
        known = torch.load(base) if set(fresh) - {"unpatched"} else {}
        for name in fresh:
            if name != "unpatched":
                found = torch.load(gradients_of(self.folder, name))
                self.gradients[name] = gradient_distances(found, known)

    def document(self) -> Dict[str, Any]:
        from provenance import command_of

        return {
            **self.about,
            "command": command_of(*self.args.paths),
            "family": self.args.family,
            "bs": self.args.bs,
            "steps": self.args.steps,
            "lidar_held": self.args.hold_lidar,
            "gradients": self.gradients,
            "curves": summary(self.runs, self.noise),
            "runs": self.runs,
        }


def main(argv: Optional[Sequence[str]] = None) -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--hold-lidar", action="store_true", help="give every run one output of the lidar branch"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # way, folder
    args = checked(parser, parser.parse_args(argv))
    if args.child:
        name, folder = args.child
        save_lidar(args, folder) if name == LIDAR else child(args, name, folder)
        return
    given = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        report = Report(args, folder, NOISE)

        def command(name: str) -> List[str]:
            return [str(Path(__file__).resolve()), *given, "--child", name, folder]

        if args.hold_lidar:
            subprocess.run([sys.executable, *command(LIDAR)], check=True, timeout=args.timeout)
        jobs = [
            at_once.Job(name, command(name), path_of(folder, name), WAYS[name].gib)
            for name in args.ways
        ]
        at_once.run(jobs, args.jobs, args.memory, args.timeout, report.changed)
    print(json.dumps({"gradients": report.gradients, "curves": report.document()["curves"]}))


if __name__ == "__main__":
    main()
