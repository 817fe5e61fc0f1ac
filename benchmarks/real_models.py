"""Real detectors on a real frame, unpatched and patched: time, memory, losses, largest batch, and
where a step goes.

    python benchmarks/real_models.py --cmt DIR --frame DIR --out
    benchmarks/results/real_cmt_h200.json ... --petr DIR --streampetr DIR       these two as well
    (decoder, head and ResNet-50) ... --only 'B .*bias|A .*bias'        runs whose name matches;
    --list prints the names ... --parts train|batch|profile       some of the three parts ...
    --repeats 3                       training runs of each kind (default 2), for intervals ...
    --timeout 1800                    seconds after which a run is ended and the next one begun ...
    --quick                           4 steps a run ... --device cpu --tiny               a proof
    that it runs: 160x64, one frame, two layers, two steps

DIRs are checkouts of junjie18/CMT, megvii-research/PETR and exiawsh/StreamPETR as they are, and the
folder of one nuScenes frame in mmdet3d's info format. Every run is a fresh process
(real_worker.py). An unpatched run and the patched ones that are held against it are repeated in the
order A B B A A B ... (A B C C B A ... for several), as `flashbias ab` does: a drift of the machine
falls on both alike. Names: A unpatched, B patched; `cp` with_cp, `amp` mmcv's fp16, `bias` a
learned bias on every cross attention (unpatched: dense, as attn_mask), `drop0` no dropout.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

HERE = Path(__file__).resolve().parent
FLASH = "PETRMultiheadFlashAttention"
CAPS = (24, 40, 80)
DETECTOR = (
    "CMT camera (junjie18/CMT {cmt}), ResNet-50, batch 2, one nuScenes frame; step_s: median "
    "after two steps; "
    "PETR and StreamPETR from megvii-research/PETR {petr} and exiawsh/StreamPETR {streampetr}"
)


ORDER = (
    "{repeats} runs of each kind, a fresh process each, in the order A B B A (of an unpatched "
    "run and those measured "
    "against it, forwards and backwards in turn)"
)


class Run(NamedTuple):
    """A training run. Names begin with A (unpatched) or B (patched); `dtype` is FLASHBIAS_DTYPE;
    `bias`: a learned one."""

    name: str
    patch: bool
    dtype: str = "auto"
    attn: str = "PETRMultiheadAttention"
    size: str = "1600x640"
    bs: int = 2
    with_cp: bool = False
    fp16: bool = False
    dropout: float = 0.1
    bias: bool = False
    steps: int = 8
    layers: int = 6
    repeat: int = 0

    def twin(self) -> Tuple[Any, ...]:
        """Runs that start from the same weights and should compute the same."""
        return (self.attn, self.size, self.bs, self.dropout, self.bias, self.layers)


def run(name: str, **fields: Any) -> Dict[str, Any]:
    return Run(name, name.startswith("B"), **fields)._asdict()


def counterpart(name: str) -> str:
    """The unpatched run that a patched one is measured against."""
    return (
        name.replace("B flash amp", "A amp")
        .replace("B flash", "A fp32")
        .replace(" dtype=fp16", "")
        .replace("B ", "A ")
    )


def in_order(runs: Sequence[Dict[str, Any]], repeats: int) -> List[Dict[str, Any]]:
    """Each run `repeats` times: per unpatched run, it and those measured against it, forwards and
    backwards in turn."""
    groups: Dict[str, List[Dict[str, Any]]] = {}
    for fields in sorted(runs, key=lambda fields: bool(fields["patch"])):
        groups.setdefault(counterpart(fields["name"]), []).append(fields)
    return [
        {**fields, "repeat": repeat}
        for group in groups.values()
        for repeat in range(repeats)
        for fields in (group if repeat % 2 == 0 else group[::-1])
    ]


def cmt_runs() -> List[Dict[str, Any]]:
    fp16: Dict[str, Any] = {"dtype": "fp16"}
    full = [
        run("A fp32"),
        run("A fp32 cp", with_cp=True),
        run("A amp", fp16=True, steps=6),
        run("A amp cp", fp16=True, with_cp=True, steps=6),
        run("A fp32 bias", bias=True, steps=6),
        run("A fp32 bias cp", bias=True, with_cp=True, steps=6),
        run("A fp32 drop0", dropout=0.0),
        run("A fp32 drop0 bias", dropout=0.0, bias=True, steps=6),
        run("B fp32"),
        run("B fp32 dtype=fp16", **fp16),
        run("B flash", attn=FLASH),
        run("B fp32 cp", with_cp=True, steps=6),
        run("B fp32 dtype=fp16 cp", with_cp=True, **fp16),
        run("B flash cp", attn=FLASH, with_cp=True, steps=6),
        run("B amp", fp16=True, steps=6),
        run("B amp dtype=fp16", fp16=True, steps=6, **fp16),
        run("B flash amp", attn=FLASH, fp16=True, steps=6),
        run("B amp dtype=fp16 cp", fp16=True, with_cp=True, steps=6, **fp16),
        run("B fp32 bias", bias=True, steps=6),
        run("B fp32 dtype=fp16 bias", bias=True, steps=6, **fp16),
        run("B fp32 dtype=fp16 bias cp", bias=True, with_cp=True, steps=6, **fp16),
        run("B flash bias", bias=True, attn=FLASH, steps=6),
        run("B fp32 drop0", dropout=0.0),
        run("B fp32 dtype=fp16 drop0", dropout=0.0, **fp16),
        run("B flash drop0", dropout=0.0, attn=FLASH, steps=6),
        run("B fp32 drop0 bias", dropout=0.0, bias=True, steps=6),
    ]
    small = [
        {**fields, "name": fields["name"] + " 800x320", "size": "800x320"}
        for fields in full
        if fields["name"]
        in (
            "A fp32",
            "A fp32 cp",
            "A fp32 drop0",
            "B fp32",
            "B fp32 dtype=fp16",
            "B flash",
            "B fp32 dtype=fp16 cp",
            "B fp32 drop0",
            "B fp32 dtype=fp16 drop0",
        )
    ]
    return sorted(full + small, key=lambda fields: fields["patch"])


def family_runs(size: str, flash: bool) -> List[Dict[str, Any]]:
    rest: Dict[str, Any] = {"size": size, "dropout": 0.0}
    runs = [
        run("A fp32 drop0", **rest),
        run("A fp32 drop0 cp", with_cp=True, **rest),
        run("B fp32 drop0", **rest),
        run("B fp32 dtype=fp16 drop0", dtype="fp16", **rest),
        run("B fp32 dtype=fp16 drop0 cp", dtype="fp16", with_cp=True, **rest),
    ]
    return runs + ([run("B flash drop0", attn=FLASH, **rest)] if flash else [])


RUNS = {
    "cmt": cmt_runs(),
    "petr": family_runs("1408x512", False),
    "streampetr": family_runs("704x256", True),
}
BATCH = [
    run("A fp32"),
    run("A fp32 800x320", size="800x320"),
    run("B fp32 dtype=fp16", dtype="fp16"),
    run("B fp32 dtype=fp16 800x320", dtype="fp16", size="800x320"),
]
PROFILE = [run("A fp32"), run("B fp32 dtype=fp16", dtype="fp16"), run("B flash", attn=FLASH)]
TINY = {"bs": 1, "layers": 2, "steps": 2, "size": "160x64"}


def chosen(
    runs: Sequence[Dict[str, Any]], only: str, quick: bool, tiny: bool
) -> List[Dict[str, Any]]:
    found = [dict(fields) for fields in runs if re.search(only, fields["name"])]
    for fields in found:
        if quick:
            fields["steps"] = 4
        if tiny:
            fields.update(TINY)
    return found


def work(plan: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """Lines of the workers as they end, about the machine first; one fresh process per run of
    plan["runs"]."""
    with tempfile.TemporaryDirectory() as folder:
        for number, fields in enumerate(plan["runs"]):
            given, out = Path(folder, "plan.json"), Path(folder, "out.jsonl")
            given.write_text(json.dumps({**plan, "runs": [fields], "gradients": folder}))
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
            if all("about" in line for line in lines):
                lines.append({**fields, "family": plan["family"], "error": died})
            yield from ({**line, "order": number} if "name" in line else line for line in lines)


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
    elif "batches" in line:
        text = ", ".join(f"{row['cap_GiB']} GiB: {row['batch']}" for row in line["batches"])
    else:
        text = f"wall {line['wall_ms']} ms, GPU busy {line['gpu_busy_ms']} ms; {line['kind_ms']}"
    print(f"{line['family']:<11}{line['name']:<28} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for family in RUNS:
        parser.add_argument(
            f"--{family}", metavar="DIR", help=f"a checkout for the runs of {family}"
        )
        parser.add_argument(
            f"--{family}-commit", default="", metavar="HASH", help="where the checkout has no .git"
        )
    parser.add_argument("--frame", metavar="DIR")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("train", "batch", "profile"),
        default=["train", "batch", "profile"],
    )
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--caps", type=float, nargs="+", default=CAPS, metavar="GiB")
    parser.add_argument("--limit", type=int, default=64, help="no larger batch is tried")
    parser.add_argument(
        "--repeats", type=int, default=2, metavar="R", help="training runs of each kind"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800,
        metavar="S",
        help="seconds after which a run is ended",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", metavar="F.json")
    args = parser.parse_args()
    if args.list:
        print(
            "\n".join(
                f"{family}: {fields['name']}"
                for family, runs in RUNS.items()
                for fields in chosen(runs, args.only, False, False)
            )
        )
        return
    checkouts = {family: getattr(args, family) for family in RUNS if getattr(args, family)}
    if not checkouts or not args.frame:
        parser.error("--frame and at least one of --cmt, --petr, --streampetr are needed")
    parts = [
        ("train", RUNS[family], family, "runs" if family == "cmt" else "family")
        for family in checkouts
    ]
    if "cmt" in checkouts:
        parts += [("batch", BATCH, "cmt", "batches"), ("profile", PROFILE, "cmt", "profiles")]
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
    }
    about: Dict[str, Any] = {}

    def part(task: str, runs: Sequence[Dict[str, Any]], family: str, where: str) -> None:
        plan = {
            "family": family,
            "checkout": os.path.abspath(checkouts[family]),
            "frame": os.path.abspath(args.frame),
            "device": args.device,
            "task": task,
            "timeout": args.timeout,
            "runs": in_order(
                chosen(runs, args.only, args.quick, args.tiny),
                args.repeats if task == "train" else 1,
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
                for family in RUNS
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
                        "order": ORDER.format(repeats=args.repeats),
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
