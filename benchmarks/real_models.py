"""Real detectors on a real frame, unpatched and patched: time, memory, losses, latency, largest
batch, and where a step goes.

    python benchmarks/real_models.py --cmt DIR --frame DIR --out F.json
    ... --petr DIR --streampetr DIR       these two as well (decoder, head and ResNet-50)
    ... --families fusion0100             some of the families that the checkouts hold
    ... --only 'B .*bias|A .*bias'        runs whose name matches; --list prints the names
    ... --parts train|infer|batch|profile some of the four parts
    ... --repeats 3                       runs of each kind (default 2), for intervals
    ... --together                        blocks of runs in one process instead of a process a run
    ... --timeout 1800                    seconds after which a run is ended and the next one begun
    ... --quick                           4 steps a run
    ... --device cpu --tiny               a proof that it runs: 160x64, one frame, two layers

DIRs are checkouts of junjie18/CMT (camera, and with spconv the fusion detectors: ResNet-50,
voxel0100 at 800x320 and voxel0075 at 1600x640), megvii-research/PETR and exiawsh/StreamPETR as
they are, and the folder of one nuScenes frame in mmdet3d's info format. Every run is a fresh
process (real_worker.py), or with --together a block of steps in a process that its counterparts
share: for times on a machine that varies, and many runs in few minutes. An unpatched run and the
patched ones that are held against it are repeated in the order A B B A A B ... (A B C C B A ...
for several), as `flashbias ab` does: a drift of the machine falls on both alike. Inference is the
forward pass from images and points to the head's output, without the boxes' decoding. Names: see
real_runs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

from real_runs import BATCH, CHECKOUTS, INFERENCE, PROFILE, RUNS, chosen, in_order, in_processes

HERE = Path(__file__).resolve().parent
CAPS = (24, 40, 80)
DETECTOR = (
    "CMT (junjie18/CMT {cmt}), ResNet-50, one nuScenes frame; step_s: median after two steps; "
    "PETR and StreamPETR from megvii-research/PETR {petr} and exiawsh/StreamPETR {streampetr}"
)


ORDER = (
    "{repeats} runs of each kind, {where}, in the order A B B A (of an unpatched run and those "
    "measured against it, forwards and backwards in turn)"
)
FRESH = "a fresh process each"
TOGETHER = (
    "blocks of one process per unpatched run; at the beginning of each block two steps (in "
    "evaluation ten calls) are not counted"
)


def work(plan: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """Lines of the workers as they end, about the machine first; one fresh process per run of
    plan["runs"], or per group of them."""
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        for runs in in_processes(plan["runs"], plan["together"]):
            given, out = Path(folder, "plan.json"), Path(folder, "out.jsonl")
            given.write_text(json.dumps({**plan, "runs": runs, "gradients": folder}))
            out.write_text("")
            environment = {
                **os.environ,
                "FLASHBIAS_PATCH": "0",
                "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            }
            words = [sys.executable, str(HERE / "real_worker.py"), str(given), str(out)]
            try:
                died = (
                    "the process died: "
                    f"{subprocess.run(words, env=environment, timeout=plan['timeout']).returncode}"
                )
            except subprocess.TimeoutExpired:
                died = f"no end after {plan['timeout']:g} s"
            lines = [
                json.loads(line) for line in out.read_text().splitlines(True) if line.endswith("\n")
            ]
            if not lines and number == 0:  # as all others would
                raise SystemExit(f"{plan['family']}: the first worker did not start ({died})")
            ended = [line for line in lines if "name" in line]
            lines += [
                {**fields, "family": plan["family"], "error": died} for fields in runs[len(ended) :]
            ]
            for line in lines:
                yield {**line, "order": number} if "name" in line else line
                number += "name" in line


def commit_of(checkout: str, given: str) -> str:
    if given or not checkout:
        return given or "not run"
    found = (
        subprocess.run(
            ["git", "-C", checkout, "log", "-1", "--format=%h"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if os.path.isdir(os.path.join(checkout, ".git"))
        else None
    )
    return found.stdout.strip() if found and found.returncode == 0 else "?"


def show(line: Dict[str, Any]) -> None:
    if "error" in line:
        text = line["error"]
    elif "losses" in line:
        text = (
            f"{line['step_s']:.3f} s  {line['peak_MiB']:.0f} MiB  loss "
            f"{line['losses'][0]:.3f} .. {line['losses'][-1]:.3f}"
        )
        if "gradient_error" in line:
            text += f"  gradient {line['gradient_error']:.1e}"
    elif "latency_ms" in line:
        text = (
            f"{line['latency_ms']:.1f} ms ({line['first_ms']:.0f} the first)  "
            f"{line['frames_per_s']:.1f} frames/s  {line['peak_MiB']:.0f} MiB"
        )
    elif "batches" in line:
        text = ", ".join(f"{row['cap_GiB']} GiB: {row['batch']}" for row in line["batches"])
    else:
        text = f"wall {line['wall_ms']} ms, GPU busy {line['gpu_busy_ms']} ms; {line['kind_ms']}"
    print(f"{line['family']:<11}{line['name']:<32} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for family in set(RUNS) - set(CHECKOUTS):
        parser.add_argument(
            f"--{family}", metavar="DIR", help=f"a checkout for the runs of {family}"
        )
        parser.add_argument(
            f"--{family}-commit", default="", metavar="HASH", help="where the checkout has no .git"
        )
    parser.add_argument("--frame", metavar="DIR")
    parser.add_argument(
        "--families", nargs="+", choices=RUNS, metavar="FAMILY", help=", ".join(RUNS)
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("train", "infer", "batch", "profile"),
        default=["train", "infer", "batch", "profile"],
    )
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--caps", type=float, nargs="+", default=CAPS, metavar="GiB")
    parser.add_argument("--limit", type=int, default=64, help="no larger batch is tried")
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        metavar="R",
        help="runs of each kind, training and inference",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800,
        metavar="S",
        help="seconds after which a run is ended",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="an unpatched run and those measured against it in one process, block by block",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", metavar="F.json")
    args = parser.parse_args()
    if args.list:
        print(
            "\n".join(
                f"{family}: {fields['name']}{note}"
                for note, table in (("", RUNS), (" (inference)", INFERENCE))
                for family, runs in table.items()
                for fields in chosen(runs, args.only, False, False)
            )
        )
        return
    given = {family: getattr(args, CHECKOUTS.get(family, family)) for family in RUNS}
    lidar = not args.device.startswith("cpu")  # spconv needs a GPU
    wanted = args.families or [family for family in RUNS if lidar or family not in CHECKOUTS]
    checkouts = {family: given[family] for family in wanted if given[family]}
    if not checkouts or not args.frame:
        parser.error("--frame and at least one of --cmt, --petr, --streampetr are needed")
    parts = [
        ("train", RUNS[family], family, "runs" if family == "cmt" else "family")
        for family in checkouts
    ]
    parts += [("infer", INFERENCE[family], family, "inference") for family in checkouts]
    for task, tables, where in (("batch", BATCH, "batches"), ("profile", PROFILE, "profiles")):
        parts += [(task, tables[family], family, where) for family in checkouts if family in tables]
    parts = [
        each for each in parts if each[0] in args.parts and chosen(each[1], args.only, False, False)
    ]
    if not parts:
        parser.error(
            f"nothing to run: no {' or '.join(args.parts)} run of {', '.join(checkouts)} has a "
            "name that --only "
            f"{args.only!r} matches; --list prints the names"
        )
    found: Dict[str, List[Dict[str, Any]]] = {
        "runs": [],
        "batches": [],
        "profiles": [],
        "family": [],
        "inference": [],
    }
    about: Dict[str, Any] = {}

    def part(task: str, runs: Sequence[Dict[str, Any]], family: str, where: str) -> None:
        plan = {
            "family": family,
            "checkout": os.path.abspath(checkouts[family]),
            "frame": os.path.abspath(args.frame),
            "device": args.device,
            "together": args.together,
            "task": task,
            "timeout": args.timeout,
            "runs": in_order(
                chosen(runs, args.only, args.quick, args.tiny),
                args.repeats if task in ("train", "infer") else 1,
            ),
            "caps": list(args.caps),
            "limit": 2 if args.tiny else args.limit,
            "profile_steps": 1 if args.tiny else 3,
        }
        for line in work(plan):
            if "about" in line:
                about.update(line["about"])
                continue
            found[where].append(line)
            show(line)
            save()

    def save() -> None:
        if args.out:
            commits = {
                family: commit_of(getattr(args, family) or "", getattr(args, f"{family}_commit"))
                for family in set(RUNS) - set(CHECKOUTS)
            }
            words = "python " + " ".join(
                [
                    "benchmarks/real_models.py",
                    *(os.path.basename(a.rstrip("/")) if "/" in a else a for a in sys.argv[1:]),
                ]
            )
            Path(args.out).write_text(
                json.dumps(
                    {
                        **about,
                        "command": words,
                        "detector": DETECTOR.format(**commits),
                        "order": ORDER.format(
                            repeats=args.repeats, where=TOGETHER if args.together else FRESH
                        ),
                        **found,
                    },
                    indent=1,
                )
                + "\n"
            )

    for each in parts:
        part(*each)


if __name__ == "__main__":
    main()
