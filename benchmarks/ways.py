"""The ways in which benchmarks/real_parity.py and real_accuracy.py train one detector."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING, Any, Dict, Iterator, NamedTuple, Sequence

from real_runs import Run

if TYPE_CHECKING:
    from real_worker import Trainer

SIZES = {"cmt": "800x320", "fusion0100": "800x320", "fusion0075": "1600x640"}
# GiB of the GPU without dropout, for two samples of fusion0100
UNPATCHED, PATCHED = 30.0, 6.5


NUDGED = "unpatched, nudged"


class Way(NamedTuple):
    """`nudge`: all parameters are changed in the last place before the first step."""

    patch: bool = False
    dtype: str = "auto"
    nudge: bool = False
    gib: float = PATCHED


WAYS = {
    "unpatched": Way(gib=UNPATCHED),
    "unpatched again": Way(gib=UNPATCHED),
    NUDGED: Way(nudge=True, gib=UNPATCHED),
    "patched": Way(True),
    "patched fp16": Way(True, "fp16"),
    "patched bf16": Way(True, "bf16"),
}
# Against "unpatched": what the machine's own rounding amounts to, and what any other rounding does.
NOISE = ("unpatched again", NUDGED)


def add_arguments(parser: argparse.ArgumentParser, ways: Sequence[str] = tuple(WAYS)) -> None:
    """Those that the scripts have in common; `ways`: by default."""
    parser.add_argument("--cmt", metavar="DIR", help="a checkout of junjie18/CMT")
    parser.add_argument("--frame", metavar="DIR", help="a nuScenes frame in mmdet3d's info format")
    parser.add_argument("--family", choices=sorted(SIZES), help="default: fusion0100; CPU: cmt")
    parser.add_argument("--ways", nargs="+", choices=ways, default=list(ways), metavar="WAY")
    parser.add_argument("--bs", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=4, metavar="J", help="processes at a time")
    parser.add_argument(
        "--memory", type=float, default=72.0, metavar="GiB", help="of the GPU, for all together"
    )
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="of a process")
    parser.add_argument("--tiny", action="store_true", help="160x64, two layers, one sample")
    parser.add_argument("--out", metavar="F.json")


def size_of(args: argparse.Namespace) -> str:
    return "160x64" if args.tiny else SIZES[args.family]


def run_of(args: argparse.Namespace, name: str, way: Any) -> Run:
    """The fields of a training run without dropout. way: has `patch` and `dtype`."""
    return Run(
        name,
        way.patch,
        dtype=way.dtype,
        size=size_of(args),
        bs=1 if args.tiny else args.bs,
        layers=2 if args.tiny else 6,
        dropout=0.0,
        steps=args.steps,
    )


def plan_of(args: argparse.Namespace) -> Dict[str, Any]:
    """The plan that real_worker.Trainer takes."""
    return {"family": args.family, "checkout": args.cmt, "frame": args.frame, "device": args.device}


@contextlib.contextmanager
def trainer_of(args: argparse.Namespace, name: str) -> Iterator[Trainer]:
    """A trainer from the weights that all ways have in common, this package installed for a patched
    way."""
    from installed import patched
    from real_worker import Trainer

    way = WAYS[name]
    run = run_of(args, name, way)
    with patched(run.dtype) if run.patch else contextlib.nullcontext():
        trainer = Trainer(run, plan_of(args))
        if way.nudge:
            nudge(trainer.detector.net)
        yield trainer


def nudge(net: Any) -> None:
    """Change every parameter of a module to the next larger number of its precision."""
    import torch

    for parameter in net.parameters():
        parameter.data = torch.nextafter(parameter.data, parameter.new_tensor(float("inf")))


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with absolute folders and the family."""
    if not args.cmt or not args.frame:
        parser.error("--cmt and --frame are needed")
    args.paths = args.cmt, args.frame, args.out  # as given
    args.cmt, args.frame = os.path.abspath(args.cmt), os.path.abspath(args.frame)
    args.out = args.out and os.path.abspath(args.out)
    args.family = args.family or ("cmt" if args.device.startswith("cpu") else "fusion0100")
    return args
