"""The self-check on this machine: its verdict, its first time (compilation) and its warm time, by
class of call and backend.

    python benchmarks/selfcheck.py --out selfcheck.json                       # a GPU; compiles in
    several processes first FLASHBIAS_HOME=DIR python benchmarks/selfcheck.py --backends upstream
    --out upstream.json    # FlashBias' own kernel python benchmarks/selfcheck.py --device cpu
    --backends sdpa               # the same, quickly

Warm: median of 5, once the class was checked. `at size` is a backend's error at CMT's own shape
(1490 queries, 22384 keys) and at whole tiles (1536 x 22528), forward and gradients, against float32
plain PyTorch in chunks, checked or not: it shows what the verdicts are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

os.environ.setdefault("FLASHBIAS_PATCH", "0")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from provenance import about  # noqa: E402

from flashbias_patch.attention import dispatch, selection, selfcheck  # noqa: E402
from flashbias_patch.attention.backends import reference  # noqa: E402
from flashbias_patch.attention.inputs import AttentionInputs  # noqa: E402
from flashbias_patch.attention.recovery import errors  # noqa: E402
from flashbias_patch.attention.signature import signature_of  # noqa: E402

B, H, D = 2, 4, 32
# dtype, rank, features
CLASSES = [
    ("float16", 0, ""),
    ("float16", 8, ""),
    ("float16", 24, ""),
    ("float16", 2, "whole"),
    ("float16", 8, "whole"),
    ("bfloat16", 8, ""),
    ("bfloat16", 8, "whole"),
    ("float32", 0, ""),
    ("float32", 8, ""),
    ("float32", 24, ""),
    ("float16", 8, "dropout"),
    ("float16", 0, "mask dropout"),
    ("float32", 0, "mask dropout"),
    ("float16", 8, "padding"),
    ("float16", 0, "segments"),
    ("float16", 0, "dense"),
    ("float16", 8, "no grad"),
]
LENGTHS = {"odd, CMT's own": (1490, 22384), "whole tiles": (1536, 22528)}
REPEATS = 5


def call(
    device: str, dtype: str, rank: int, features: str, M: int = 9, N: int = 14, heads: int = H
) -> AttentionInputs:
    """An example of a class."""
    if "whole" in features:
        M, N = 128, 256
    generator = torch.Generator().manual_seed(M)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))
        return drawn.requires_grad_("no grad" not in features)

    made: Dict[str, Any] = {
        "q": draw(B, M, heads, D),
        "k": draw(B, N, heads, D),
        "v": draw(B, N, heads, D),
    }
    if rank:
        made.update(q_factor=draw(1, M, 1, rank), k_factor=draw(1, N, 1, rank))
    if "mask" in features:
        made.update(mask=torch.zeros(1, 1, M, N, dtype=torch.bool, device=device))
    if "padding" in features:
        made.update(key_padding=torch.zeros(B, N, dtype=torch.bool, device=device))
    if "dense" in features:
        made.update(dense=draw(1, heads, M, N))
    if "segments" in features:
        made.update(
            segment_weights=torch.zeros(B, M, 1, 2, device=device),
            segment_lengths=(N // 2, N - N // 2),
        )
    return AttentionInputs(**made, dropout_p=0.1 if "dropout" in features else 0.0, scale=D**-0.5)


def verdict(name: str, inputs: AttentionInputs, repeats: int) -> Dict[str, Any]:
    key, candidate = signature_of(inputs), dispatch.backend(name)
    refused = candidate.why_not(inputs)
    if refused:
        return {"refuses": refused}
    times: List[float] = []
    problem: Optional[str] = None
    try:
        for _ in range(1 + repeats):
            start = time.perf_counter()
            problem = selfcheck.check(candidate, key, inputs.rank)
            times.append(time.perf_counter() - start)
    except Exception as error:
        problem = errors.first_line(error)
        if errors.sticky(error):
            raise
    found: Dict[str, Any] = {
        "verdict": problem or "trusted",
        "first_s": round(times[0], 3) if times else None,
    }
    if len(times) > 1:
        found["warm_ms"] = round(1e3 * statistics.median(times[1:]), 2)
    return found


def at_size(name: str, device: str, dtype: str, rank: int, M: int, N: int) -> Dict[str, Any]:
    """Relative errors (L2) of output and gradients; the verdict is not asked."""
    inputs = call(device, dtype, rank, "", M, N, heads=8)
    candidate = dispatch.backend(name)
    refused = candidate.why_not(inputs)
    if refused:
        return {"refuses": refused}
    names = [n for n in ("q", "k", "v", "q_factor", "k_factor") if getattr(inputs, n) is not None]
    leaves = [getattr(inputs, n) for n in names]
    exact_leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    exact = reference.backend(inputs._replace(**dict(zip(names, exact_leaves))))
    gradient = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3)).to(device)
    expected = [exact, *torch.autograd.grad(exact, exact_leaves, gradient)]
    try:
        out = candidate(inputs)
        given = [out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]
    except Exception as error:
        if errors.sticky(error):
            raise
        return {"raises": errors.first_line(error)}
    return {
        n: float((g.detach().double() - e.detach().double()).norm() / e.detach().double().norm())
        for n, g, e in zip(["output", *("gradient of " + n for n in names)], given, expected)
    }


def compile_ahead(args: argparse.Namespace) -> Dict[str, Any]:
    """Each class for the first time, in `args.processes` processes; {class: {backend: seconds}}."""
    found: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, f"{part}.json") for part in range(args.processes)]
        children = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    "--device",
                    args.device,
                    "--backends",
                    *args.backends,
                    "--part",
                    f"{part}/{args.processes}",
                    "--out",
                    file,
                ]
            )
            for part, file in enumerate(files)
        ]
        for child, file in zip(children, files):
            if child.wait() == 0:
                found.update(json.loads(Path(file).read_text())["classes"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["triton", "flash", "upstream", "sdpa"],
        choices=sorted(selection.MODULES),
    )
    parser.add_argument(
        "--processes", type=int, default=8, help="that compile first (GPU; 0: measure at once)"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in a child: which classes
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args()
    first = (
        compile_ahead(args) if args.device == "cuda" and args.processes and not args.part else {}
    )
    part, parts = map(int, (args.part or "0/1").split("/"))
    classes: Dict[str, Any] = {}
    for dtype, rank, features in CLASSES[part::parts]:
        if args.device == "cpu" and dtype != "float32":
            continue
        inputs = call(args.device, dtype, rank, features)
        words = signature_of(inputs).describe()
        classes[words] = {}
        for name in args.backends:
            entry = verdict(name, inputs, 0 if args.part else REPEATS)
            if name in first.get(words, {}) and "first_s" in entry:
                entry["first_s"] = first[words][name].get("first_s")
            classes[words][name] = entry
            if not args.part:
                print(f"{words:60s} {name:10s} {json.dumps(entry)}", flush=True)
    cuda = args.device == "cuda"
    report = dict(about(args.out, device=args.device), classes=classes)
    warm = [e["warm_ms"] for c in classes.values() for e in c.values() if "warm_ms" in e]
    report["warm_ms_largest"] = max(warm) if warm else None
    print("warm, largest:", report["warm_ms_largest"])
    if args.out:  # before a kernel at full size can take the process with it
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    if not args.part:
        dtype, sizes = (
            ("float16", LENGTHS)
            if cuda
            else ("float32", {"odd": (49, 223), "whole tiles": (128, 256)})
        )
        report["at size"] = {
            name: {
                words: {
                    f"R{rank}": at_size(name, args.device, dtype, rank, *lengths) for rank in (2, 8)
                }
                for words, lengths in sizes.items()
            }
            for name in args.backends
        }
        print(json.dumps(report["at size"], indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
