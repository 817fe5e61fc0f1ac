"""AQR's windows on a real detector: bias_scale's path against a dense bias, time, memory, and the
loss without a sensor.

    python benchmarks/real_windows.py --cmt DIR --frame DIR --out F.json [--steps 200] [--jobs 4]
    ... --windows window=8                      options of the windows (default: window=15)
    ... --timed                                 no ways to time: paths only
    ... --bias-lr 5e-3                          a learning rate of bias_scale's own
    ... --device cpu --tiny --steps 3 --time-steps 2     a proof that it runs, camera detector

DIRs as for real_models.py; CMT's fusion detector (voxel0100) without dropout, from the same
weights on the same frame. `dense` is a repository without this package: the same router, its
windows painted into a dense bias (B, M, N) and repeated over the heads, as the mask of each cross
attention. First each of --timed is timed in a process of its own, alone. Then the paths over
--steps, several processes at the same time; in front of them bias_scale's first gradient, --first
times at the same weights, since the detector's own kernels are not deterministic. At their end the
loss with nothing, the lidar's and the cameras' features set to zero.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import at_once
from real_parity import CLIP, distances
from ways import PATCHED, UNPATCHED, add_arguments, checked, plan_of, run_of

DROPS = "drop=0.5,supervision=1"  # sensors zeroed in half of the steps, and the router told so
SEEDS = range(10_000, 10_004)  # of the denoising queries under which the loss at the end is taken


class Way(NamedTuple):
    patch: bool = True
    dtype: str = "auto"
    dense: bool = False
    windows: bool = True
    more: str = ""
    gib: float = PATCHED


WAYS = {
    "dense": Way(False, dense=True, gib=UNPATCHED + 10),
    "dense again": Way(False, dense=True, gib=UNPATCHED + 10),
    "windows": Way(),
    "windows fp16": Way(dtype="fp16"),
    "windows, trained with drops": Way(more=DROPS),
    "no windows, unpatched": Way(False, windows=False, gib=UNPATCHED),
    "no windows, patched": Way(windows=False),
}
TIMED = ("dense", "windows", "windows fp16", "no windows, unpatched", "no windows, patched")


def of_aqr(windows: str, way: Way) -> str:
    """FLASHBIAS_AQR of a way; empty for none."""
    parts = ("bias=window", windows, way.more)
    return ",".join(part for part in parts if part) if way.patch and way.windows else ""


def scale_of(router: Any) -> List[float]:
    return [float(value) for value in router.bias_scale.detach().flatten()]


def gradient_of(router: Any, norm: float) -> List[float]:
    """bias_scale's gradient as it was before the step clipped it."""
    gradient = router.bias_scale.grad
    if gradient is None:
        return []
    return [float(value) * max(1.0, norm / CLIP) for value in gradient.flatten()]


def own_rate(optimizer: Any, parameter: Any, rate: float) -> None:
    """Train the parameter at a learning rate of its own."""
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if each is not parameter]
    optimizer.add_param_group({"params": [parameter], "lr": rate})


def first_gradients(trainer: Any, router: Any, count: int) -> List[List[float]]:
    """bias_scale's gradient in the first step, `count` times at the same weights."""
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    found = []
    for _ in range(count):
        trainer.step(0)
        found.append(gradient_of(router, float(trainer.norm)))
    for group, rate in zip(trainer.optimizer.param_groups, rates):
        group["lr"] = rate
    trainer.optimizer.state.clear()
    return found


def mean_and_error(gradients: Sequence[Sequence[float]]) -> Dict[str, Any]:
    """Means over repeats, and the standard errors of these."""
    columns = list(zip(*gradients))
    deviations = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    return {
        "mean": [statistics.mean(column) for column in columns],
        "standard_error": [each / len(gradients) ** 0.5 for each in deviations],
    }


def against(found: Dict[str, Any], base: Dict[str, Any]) -> Dict[str, Any]:
    """A run against the dense one: bias_scale's gradients in the first step, where all weights
    agree, its path over all steps, and the losses."""
    result: Dict[str, Any] = {"losses": distances(found["losses"], base["losses"])}
    if not found.get("scales") or not base.get("scales"):
        return result
    pairs = list(zip(found["scales"], base["scales"]))
    moved = max(abs(a - b) for last in base["scales"] for a, b in zip(last, base["scales"][0]))
    apart = max(abs(a - b) for pair in pairs for a, b in zip(*pair))
    result["path"] = {
        "steps": len(pairs),
        "apart": apart,
        "moved": moved,
        "relative": apart / moved if moved else None,
    }
    if found["gradients"] and base["gradients"] and base["gradients"][0]:
        ours, theirs = found["gradients"][0], base["gradients"][0]
        square = sum((a - b) ** 2 for a, b in zip(ours, theirs))
        known = sum(b * b for b in theirs)
        result["gradient_error"] = (square / known) ** 0.5 if known else None
    return result


def zeroing(transformer: Any, sensor: Optional[str]) -> Any:
    """A hook that zeroes the lidar's or the cameras' features in front of the transformer."""
    lidar = type(transformer).__name__ == "CmtTransformer"  # (x, x_img, ...); else (x_img, ...)
    place = {"lidar": 0 if lidar else None, "cameras": 1 if lidar else 0}.get(sensor or "")

    def hook(module: Any, args: Any) -> Any:
        return tuple(
            value * 0.0 if place is not None and i == place else value
            for i, value in enumerate(args)
        )

    return transformer.register_forward_pre_hook(hook, prepend=True)


def under_drop(trainer: Any) -> Dict[str, Any]:
    """Loss, and the router's mean weights, with nothing, the lidar or the cameras zeroed."""
    import torch

    from flashbias_patch import aqr

    net = trainer.detector.net
    transformer = net.pts_bbox_head.transformer
    router = getattr(transformer, "aqr", None)
    if router is not None:
        router.drop = None
    found: Dict[str, Any] = {}
    for sensor in (None, "lidar", "cameras"):
        losses, weights = [], []
        handle = zeroing(transformer, sensor)
        try:
            for seed in SEEDS:
                torch.manual_seed(seed)
                with torch.no_grad(), aqr.record_routing() as seen:
                    out = net(return_loss=True, **trainer.batch(0))
                losses.append(
                    sum(
                        float(value)
                        for name, value in out.items()
                        if "loss" in name and "aqr" not in name
                    )
                )
                weights += [routing.weights.flatten(0, -2).mean(0).tolist() for routing in seen]
        finally:
            handle.remove()
        found[sensor or "none"] = {
            "loss": statistics.mean(losses),
            "weights": [statistics.mean(column) for column in zip(*weights)],
        }
    return found


def work(
    args: argparse.Namespace, name: str, timed: bool, write: Callable[[Dict[str, Any]], None]
) -> None:
    """A way's steps in this process."""
    import contextlib

    from dense_windows import watch
    from installed import patched
    from real_worker import Trainer, about

    import flashbias_patch
    from flashbias_patch.aqr import options as aqr_options

    way, steps = WAYS[name], args.time_steps if timed else args.steps
    run = run_of(args, name, way)._replace(steps=steps)
    if way.dense:
        watch(aqr_options.pairs(args.windows, "--windows"))
    aqr = of_aqr(args.windows, way)
    record: Dict[str, Any] = {"about": about(args.device), "aqr": aqr}
    record.update(losses=[], times=[], scales=[], gradients=[])
    peak = 0.0
    with patched(run.dtype, aqr) if run.patch else contextlib.nullcontext():
        trainer = Trainer(run, plan_of(args))
        router = getattr(trainer.detector.net.pts_bbox_head.transformer, "aqr", None)
        assert (router is not None) == way.windows, "the router is not where it should be"
        if router is not None and args.bias_lr:
            own_rate(trainer.optimizer, router.bias_scale, args.bias_lr)
        if router is not None and not timed:
            record["first_gradients"] = first_gradients(trainer, router, args.first)
        for i in range(steps):
            if router is not None:
                record["scales"].append(scale_of(router))
            trainer.synchronize()
            start = time.perf_counter()
            loss = trainer.step(i)
            trainer.synchronize()
            record["times"].append(round(time.perf_counter() - start, 4))
            record["losses"].append(float(loss))
            if router is not None:
                record["gradients"].append(gradient_of(router, float(trainer.norm)))
            peak = max(peak, trainer.peak_mib())
            if i % 20 == 0 or i == steps - 1:
                record.update(peak_MiB=round(peak, 1))
                record["calls"] = flashbias_patch.status()["calls"]
                write(record)
                scale = record["scales"][-1][0] if router is not None else float("nan")
                print(
                    f"{name:<28} step {i + 1:>4}  loss {record['losses'][-1]:.4f}  "
                    f"bias_scale {scale:.5f}  {record['times'][-1]:.3f} s",
                    flush=True,
                )
        if timed:
            record["step_s"] = statistics.median(record["times"][2:] or record["times"])
        else:
            record["under_drop"] = under_drop(trainer)
            print(f"{name:<28} {json.dumps(record['under_drop'])}", flush=True)
    write(record)


def path_of(folder: str, name: str, timed: bool) -> str:
    return os.path.join(folder, f"{name} {'timed' if timed else 'path'}.json".replace(" ", "_"))


class Report:
    """The results so far, saved after each addition."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.about: Dict[str, Any] = {}
        self.timed: Dict[str, Dict[str, Any]] = {}
        self.paths: Dict[str, Dict[str, Any]] = {}

    def of(self, where: Dict[str, Dict[str, Any]]) -> Callable[[str, Dict[str, Any]], None]:
        def changed(name: str, record: Dict[str, Any]) -> None:
            from provenance import command_of

            self.about.update(record.get("about", {}))
            where[name] = {key: value for key, value in record.items() if key != "about"}
            if "error" in record:
                print(f"{name}: {record['error']}", flush=True)
            if self.args.out:
                words = {"command": command_of(*self.args.paths)}
                at_once.write(self.args.out, {**self.about, **words, **self.document()})

        return changed

    def document(self) -> Dict[str, Any]:
        base = self.paths.get("dense", {})
        for run in self.timed.values():
            run.pop("gradients", None)
            run.pop("scales", None)
        return {
            **{key: getattr(self.args, key) for key in ("family", "bs", "steps", "windows")},
            "bias_lr": self.args.bias_lr,
            "first_gradient": {
                name: mean_and_error(run["first_gradients"])
                for name, run in self.paths.items()
                if run.get("first_gradients")
            },
            "timed": self.timed,
            "against_dense": {
                name: against(run, base)
                for name, run in self.paths.items()
                if name != "dense" and run.get("losses") and base.get("losses")
            },
            "paths": self.paths,
        }


def main(argv: Optional[Sequence[str]] = None) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(WAYS))
    parser.add_argument("--timed", nargs="*", choices=WAYS, default=list(TIMED), metavar="WAY")
    parser.add_argument("--steps", type=int, default=200, help="0: times only")
    parser.add_argument("--time-steps", type=int, default=12)
    parser.add_argument("--first", type=int, default=8, help="times that first gradients are taken")
    parser.add_argument("--bias-lr", type=float, metavar="RATE", help="default: the model's own")
    parser.add_argument("--windows", default="window=15", metavar="KEY=VALUE,...")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # way, timed, file
    given = list(sys.argv[1:] if argv is None else argv)
    args = checked(parser, parser.parse_args(given))
    if args.child:
        name, timed, out = args.child
        work(args, name, timed == "timed", lambda record: at_once.write(out, record))
        return
    report = Report(args)
    with tempfile.TemporaryDirectory() as folder:
        rounds = ((True, args.timed, 1), (False, args.ways if args.steps else (), args.jobs))
        for timed, names, most in rounds:
            jobs = [
                at_once.Job(
                    name,
                    [
                        *(str(Path(__file__).resolve()), *given),
                        *("--child", name, "timed" if timed else "path"),
                        path_of(folder, name, timed),
                    ],
                    path_of(folder, name, timed),
                    WAYS[name].gib,
                )
                for name in names
            ]
            where = report.timed if timed else report.paths
            at_once.run(jobs, most, args.memory, args.timeout, report.of(where))
    print(json.dumps(report.document()["against_dense"]))


if __name__ == "__main__":
    main()
