"""Which backend is fastest for which class and size of call on this GPU: what attention/order.py ships.

    python benchmarks/order.py --out benchmarks/results/order_h200.json
    python benchmarks/order.py --table benchmarks/results/order_h200.json      # TABLE of order.py, no GPU needed

Backends are called as the dispatcher calls them, host time included, all in one run, interleaved.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from typing import Any, Dict, List, Optional, Tuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch

from flashbias_patch.attention import order
from flashbias_patch.attention.inputs import AttentionInputs

# (batch, queries, keys): StreamPETR, self attention, PETR, MoME, CMT camera and 800x320, with 8 heads of 32
SHAPES = [(2, 300, 900), (2, 1072, 4224), (2, 1490, 1490), (2, 900, 6000), (2, 100, 56400), (2, 900, 24000), (2, 1490, 22384)]
HEADS, HEAD_DIM, RANK = 8, 32, 8
FEATURES = ["", "factors", "segments", "padding", "dropout", "dropout padding", "dropout mask", "mask"]
BACKENDS = ("triton", "flash", "sdpa")
# From so many scores on the GPU is busy longer than the host, and in a model launching is hidden; then the fused kernels'
# shorter time on the GPU counts (attention_h200.json), which times of a lone call do not show.
HIDDEN = 90_000_000


def make(shape: Tuple[int, int, int], dtype: torch.dtype, features: str) -> AttentionInputs:
    (B, M, N), H, D = shape, HEADS, HEAD_DIM
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator).to(dtype).requires_grad_()

    inputs = AttentionInputs(random(B, M, H, D), random(B, N, H, D), random(B, N, H, D), scale=D**-0.5)
    if "factors" in features:
        inputs = inputs._replace(q_factor=random(1, M, 1, RANK), k_factor=random(1, N, 1, RANK))
    if "segments" in features:
        weights = torch.randn(B, M, 1, 2, device="cuda", generator=generator, requires_grad=True)
        inputs = inputs._replace(segment_weights=weights, segment_lengths=(N * 3 // 4, N - N * 3 // 4))
    if "padding" in features:
        inputs = inputs._replace(key_padding=torch.zeros(B, N, device="cuda"))
    if "mask" in features:
        inputs = inputs._replace(mask=torch.rand(1, 1, M, N, device="cuda", generator=generator) < 0.3)
    if "dropout" in features:
        inputs = inputs._replace(dropout_p=0.1)
    return inputs


def runs_of(backend: Any, inputs: AttentionInputs) -> Dict[bool, Any]:
    """{with gradient: function of nothing}."""
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    grad = torch.randn_like(inputs.q)

    def forward() -> None:
        with torch.no_grad():
            backend(inputs)

    def both() -> None:
        torch.autograd.grad(backend(inputs), leaves, grad)

    return {False: forward, True: both}


def backends() -> Dict[str, Any]:
    from flashbias_patch.attention import dispatch

    return {name: dispatch.backend(name) for name in BACKENDS}


def warm(place: int, parts: int) -> None:
    """Compile every parts-th class, so that timing finds Triton's cache filled."""
    cells = [(features, dtype) for features in FEATURES for dtype in ("float16", "float32")]
    for features, dtype in cells[place::parts]:
        for shape in SHAPES:
            try:
                for run in runs_of(backends()["triton"], make(shape, getattr(torch, dtype), features)).values():
                    run()
            except Exception as error:
                print(features, dtype, shape, error)


def measure(repeats: int) -> List[Dict[str, Any]]:
    rows = []
    for dtype in ("float16", "float32"):
        for features in FEATURES:
            for shape in SHAPES:
                inputs = make(shape, getattr(torch, dtype), features)
                alive: Dict[Tuple[str, bool], Any] = {}
                why: Dict[str, str] = {}
                for name, backend in backends().items():
                    reasons = backend.why_not(inputs)
                    if reasons:
                        why[name] = "; ".join(reasons)
                        continue
                    try:
                        for grad, run in runs_of(backend, inputs).items():
                            run(), run()
                            alive[name, grad] = run
                    except Exception as error:
                        why[name] = f"{type(error).__name__}: {str(error)[:120]}"
                times: Dict[Tuple[str, bool], List[float]] = {cell: [] for cell in alive}
                for _ in range(repeats):
                    for cell, run in alive.items():
                        torch.cuda.synchronize()
                        began = time.perf_counter()
                        for _ in range(3):  # as in a model: the host runs ahead
                            run()
                        torch.cuda.synchronize()
                        times[cell].append((time.perf_counter() - began) / 3 * 1e3)
                row = dict(dtype=dtype, features=features, shape=shape, scores=shape[0] * HEADS * shape[1] * shape[2])
                row["forward"] = {name: round(min(t), 4) for (name, grad), t in times.items() if not grad}
                row["both"] = {name: round(min(t), 4) for (name, grad), t in times.items() if grad}
                row["why_not"] = why
                rows.append(row)
                print(dtype, features or "plain", shape, row["forward"], row["both"], flush=True)
    return rows


def table(report: Dict[str, Any]) -> Dict[Tuple[bool, str, bool], order.Rows]:
    """order.py's rows: by class of call, the sizes measured and the backends from the fastest on."""
    classes: Dict[Tuple[bool, str, bool], List[Tuple[int, Tuple[str, ...]]]] = {}
    for row in report["rows"]:
        for grad, mode in ((False, "forward"), (True, "both")):
            late, times = row["scores"] >= HIDDEN, dict(row[mode])
            ranked = tuple(sorted(times, key=lambda name: (late and name == "sdpa", times[name])))
            classes.setdefault((row["dtype"] == "float16", row["features"], grad), []).append((row["scores"], ranked))
    return {key: order.shorten(sorted(rows)) for key, rows in sorted(classes.items())}


def source(report: Dict[str, Any]) -> str:
    """The table as order.py has it."""
    lines = []
    for key, rows in table(report).items():
        lines.append(f"        {key!r}: (".replace("'", '"'))
        for bound, names in rows:
            written = "UNBOUNDED" if bound == order.UNBOUNDED else repr(bound)
            lines.append(f"            ({written}, {names!r}),".replace("'", '"'))
        lines.append("        ),")
    return "\n".join(lines)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--table", help="print order.py's rows from this JSON")
    args = parser.parse_args(argv)
    if args.table:
        with open(args.table) as file:
            print(source(json.load(file)))
        return
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.starmap(warm, [(place, args.jobs) for place in range(args.jobs)])
    import triton

    report = dict(
        command="python benchmarks/order.py", device=torch.cuda.get_device_name(), torch=torch.__version__,
        triton=triton.__version__, arch=torch.cuda.get_device_capability()[0], rows=measure(args.repeats),
    )  # fmt: skip
    if args.out:
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
