"""The options of `flashbias ab`: their parser, and what may not be combined."""

from __future__ import annotations

import argparse
import math
import shutil
from typing import Any, Dict, List, Optional, Tuple

FAIL_IF = ("slower", "differs", "more-memory", "fails")
MOST_SEED = 2**32 - 1  # of numpy's and of PYTHONHASHSEED


def _pair(word: str) -> Tuple[str, str]:
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {word!r}")
    return name, value


def _side(text: str) -> Tuple[str, Dict[str, str]]:
    from ..ab import sides

    try:
        return sides.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least(kind: Any, least: Any, most: float = math.inf) -> Any:
    def parse(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            upper = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(
                f"expected a number of at least {least}{upper}, got {word!r}"
            )
        return value

    return parse


def _repeats(word: str) -> Any:
    return word if word == "auto" else _at_least(int, 1)(word)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats",
        type=_repeats,
        default=2,
        metavar="R",
        help="runs of each side, in the order A B B A A B ... (default 2; with 1, a second A is "
        "run to compare A with A); auto: until the interval of the time per step is narrow enough",
    )
    parser.add_argument(
        "--half-width",
        type=_at_least(float, 0.1),
        metavar="PERCENT",
        help="of the interval that is narrow enough for --repeats auto (default 2)",
    )
    parser.add_argument(
        "--max-time",
        type=_at_least(float, 0),
        metavar="MINUTES",
        help="begin no further pair of runs that would end later than this",
    )
    parser.add_argument(
        "--steps",
        type=_at_least(int, 1),
        default=30,
        metavar="N",
        help="optimiser steps after which a run is stopped (default 30)",
    )
    parser.add_argument(
        "--warmup",
        type=_at_least(int, 0),
        default=5,
        metavar="W",
        help="first steps left out of the timing (default 5)",
    )
    parser.add_argument(
        "--seed",
        type=_at_least(int, 0, MOST_SEED),
        default=0,
        metavar="S",
        help="given to every run before its own code starts; its own seeding wins (default 0)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where everything is written (default runs/ab-DATE-TIME)"
    )
    parser.add_argument(
        "--against",
        metavar="OLD",
        help="take A from the directory of an earlier run instead of running A again; "
        "refused where the machine, versions, command or options that A depends on differ",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="also write a row per metric, run and step, as `flashbias report --csv` does",
    )
    parser.add_argument(
        "--env-a",
        type=_pair,
        action="append",
        default=[],
        metavar="K=V",
        help="environment of A only",
    )
    parser.add_argument(
        "--env-b",
        type=_pair,
        action="append",
        default=[],
        metavar="K=V",
        help="environment of B only",
    )
    parser.add_argument(
        "--side",
        type=_side,
        action="append",
        default=[],
        metavar="NAME:K=V[,K=V...]",
        help="a further side, patched with this environment on top, compared with A as B is; may "
        "be given several times",
    )
    parser.add_argument(
        "--mode",
        choices=("train", "infer"),
        default="train",
        help="infer: CMD has no optimizer; forward passes in eval mode or without gradients are "
        "timed, and their outputs compared",
    )
    parser.add_argument(
        "--module",
        metavar="NAME",
        default="",
        help="with --mode infer: the module whose forward passes count, by class or by its place "
        "in the model (default: the largest that CMD calls)",
    )
    parser.add_argument(
        "--profile",
        type=_at_least(int, 0),
        default=0,
        metavar="N",
        help="N more steps of each side under torch.profiler, after the timed ones: the time by "
        "class of kernels",
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME",
        help="record parameters whose name ends in NAME (default bias_scale)",
    )
    parser.add_argument(
        "--timeout",
        type=_at_least(float, 1),
        default=600.0,
        metavar="S",
        help="seconds without a step or any output after which a run is taken for hung (default "
        "600)",
    )
    parser.add_argument(
        "--no-aa",
        action="store_true",
        help="no runs for the command's own noise: no second A, no nudged A",
    )
    parser.add_argument(
        "--process",
        metavar="WHICH",
        help="of several trainings in one command, the one that is judged: its number in the "
        "order of their start, or "
        "part of its script's name (default: the longest)",
    )
    parser.add_argument(
        "--stand-in-for-a",
        action="store_true",
        help="where flash-attn is not installed, A gets functions of its names, computed by "
        "torch's "
        "scaled_dot_product_attention",
    )
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        choices=FAIL_IF,
        help="exit with 1 if so, and, given any of them, if a run failed; may be given several "
        "times",
    )
    parser.add_argument(
        "--eval",
        metavar="CHECKPOINT",
        help="CMD runs inference from CHECKPOINT: compare the detections it "
        "writes to {predictions}; {checkpoint} in CMD stands for CHECKPOINT",
    )
    parser.add_argument(
        "cmd", nargs=argparse.REMAINDER, metavar="CMD", help="the command, after an optional --"
    )


def problem_with(args: argparse.Namespace, command: List[str]) -> Optional[str]:
    if not command:
        return "CMD is missing: say what to run, e.g. flashbias ab -- python tools/train.py CONFIG"
    if shutil.which(command[0]) is None:
        return f"CMD: {command[0]!r} is not a program on PATH"
    if args.module and args.mode != "infer":
        return "--module: only with --mode infer"
    if args.mode == "infer" and args.eval is not None:
        return "--mode infer: not with --eval, which compares what CMD writes"
    problem = _side_problem(args)
    if problem:
        return problem
    if args.eval is not None and not any("{predictions}" in word for word in command):
        return "--eval: CMD has no {predictions}, the file its detections are written to"
    if args.eval is not None and args.repeats == "auto":
        return "--repeats auto: not with --eval, which compares detections and no times"
    if args.against is not None and (args.eval is not None or args.repeats == "auto"):
        with_what = "--eval" if args.eval is not None else "--repeats auto"
        return f"--against: not with {with_what}, which needs runs of A and B in turns"
    if args.half_width is not None and args.repeats != "auto":
        return "--half-width: only with --repeats auto"
    return None


def _side_problem(args: argparse.Namespace) -> Optional[str]:
    """Return the problem with --side, --env-a or --env-b, with the option's name, or None."""
    from ..ab import sides

    problem = sides.check(args.side)
    if problem:
        return f"--side: {problem}"
    if args.side and args.eval is not None:
        return "--side: not with --eval, which compares the detections of A and B"
    for option, env in (("--env-a", args.env_a), ("--env-b", args.env_b)):
        problem = sides.mistake(dict(env))
        if problem:
            return f"{option}: {problem}"
    return None
