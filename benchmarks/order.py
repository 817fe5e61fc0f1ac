r"""Which backend is fastest for which class and size of call on this GPU: what attention/order.py
ships.

    python benchmarks/order.py --out benchmarks/results/order_h200.json python benchmarks/order.py
    --features mask --out benchmarks/results/order_masks_h200.json python benchmarks/order.py
    --table benchmarks/results/order_h200.json benchmarks/results/order_masks_h200.json

The last prints TABLE of order.py, which takes no GPU; of rows that several runs have, the last
run's count.

Backends are called as the dispatcher calls them, all in one run, interleaved: LAYERS calls on
operands of their own, then one backward pass through all of them, as a decoder's. `wall` is the
host's clock, `gpu` the GPU's, queued behind a pause; both a call. Which of the two a step pays
depends on what else is in it, so backends are ranked by their sum.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from typing import Any, Dict, List, Optional, Tuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch
from provenance import about

from flashbias_patch.attention import order
from flashbias_patch.attention.inputs import AttentionInputs

# (batch, queries, keys): StreamPETR, self attention, PETR, MoME, CMT camera and 800x320, with 8
# heads of 32
SHAPES = [
    (2, 300, 900),
    (2, 1072, 4224),
    (2, 1490, 1490),
    (2, 900, 6000),
    (2, 100, 56400),
    (2, 900, 24000),
    (2, 1490, 22384),
]
HEADS, HEAD_DIM, RANK = 8, 32, 8
FEATURES = [
    "",
    "factors",
    "segments",
    "padding",
    "dropout",
    "dropout padding",
    "dropout mask",
    "mask",
]
BACKENDS = ("triton", "flash", "sdpa")
LAYERS = 6
FAR = 2.5  # times as long as the fastest: measured once
PAUSE = 12_000_000  # clock cycles, in which the host queues all that a measurement of the GPU takes


def make(shape: Tuple[int, int, int], dtype: torch.dtype, features: str) -> AttentionInputs:
    (B, M, N), H, D = shape, HEADS, HEAD_DIM
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator).to(dtype).requires_grad_()

    inputs = AttentionInputs(
        random(B, M, H, D), random(B, N, H, D), random(B, N, H, D), scale=D**-0.5
    )
    if "factors" in features:
        inputs = inputs._replace(q_factor=random(1, M, 1, RANK), k_factor=random(1, N, 1, RANK))
    if "segments" in features:
        weights = torch.randn(B, M, 1, 2, device="cuda", generator=generator, requires_grad=True)
        inputs = inputs._replace(
            segment_weights=weights, segment_lengths=(N * 3 // 4, N - N * 3 // 4)
        )
    if "padding" in features:
        inputs = inputs._replace(key_padding=torch.zeros(B, N, device="cuda"))
    if "mask" in features:
        inputs = inputs._replace(
            mask=torch.rand(1, 1, M, N, device="cuda", generator=generator) < 0.3
        )
    if "dropout" in features:
        inputs = inputs._replace(dropout_p=0.1)
    return inputs


def runs_of(backend: Any, inputs: AttentionInputs) -> Dict[bool, Any]:
    """{with gradient: function of nothing}, each LAYERS calls."""
    layers, leaves = [], []
    for _ in range(LAYERS):
        own = [
            x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.requires_grad else x
            for x in inputs
        ]
        layers.append(AttentionInputs(*own))
        leaves += [x for x in own if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = [torch.randn_like(inputs.q)] * LAYERS

    def forward() -> None:
        with torch.no_grad():
            for layer in layers:
                backend(layer)

    def both() -> None:
        torch.autograd.grad([backend(layer) for layer in layers], leaves, grads)

    return {False: forward, True: both}


def backends() -> Dict[str, Any]:
    from flashbias_patch.attention import dispatch

    return {name: dispatch.backend(name) for name in BACKENDS}


def warm(features_of: List[str], place: int, parts: int) -> None:
    """Compile every parts-th class, so that timing finds Triton's cache filled."""
    cells = [(features, dtype) for features in features_of for dtype in ("float16", "float32")]
    for features, dtype in cells[place::parts]:
        for shape in SHAPES:
            try:
                for run in runs_of(
                    backends()["triton"], make(shape, getattr(torch, dtype), features)
                ).values():
                    run()
            except Exception as error:
                print(features, dtype, shape, error)


def wall_of(run: Any) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / LAYERS * 1e3


def gpu_of(run: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / LAYERS


def measure_row(
    dtype: str, features: str, shape: Tuple[int, int, int], repeats: int
) -> Dict[str, Any]:
    """Milliseconds a call, the least of `repeats`; of what is far behind the fastest, of one."""
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
                run()  # compiles
                run()  # settles launches
                alive[name, grad] = run
        except Exception as error:
            why[name] = f"{type(error).__name__}: {str(error)[:120]}"
    found = {cell: ([wall_of(run)], [gpu_of(run)]) for cell, run in alive.items()}
    for _ in range(repeats - 1):
        for (name, grad), (walls, gpus) in found.items():
            if walls[0] + gpus[0] <= FAR * min(
                w[0] + g[0] for (_, other), (w, g) in found.items() if other is grad
            ):
                walls.append(wall_of(alive[name, grad]))
                gpus.append(gpu_of(alive[name, grad]))
    row: Dict[str, Any] = dict(
        dtype=dtype, features=features, shape=shape, scores=shape[0] * HEADS * shape[1] * shape[2]
    )
    for grad, mode in ((False, "forward"), (True, "both")):
        for place, kind in enumerate(("wall", "gpu")):
            row[f"{kind} {mode}"] = {
                name: round(min(times[place]), 4) for (name, g), times in found.items() if g is grad
            }  # fmt: skip
    row["why_not"] = why
    print(dtype, features or "plain", shape, row["wall both"], row["gpu both"], flush=True)
    return row


def table(*reports: Dict[str, Any]) -> Dict[Tuple[bool, str, bool], order.Rows]:
    """order.py's rows: by class of call, the sizes measured and the backends from the fastest
    on."""
    latest = {}
    for report in reports:
        latest.update(
            {(row["dtype"], row["features"], tuple(row["shape"])): row for row in report["rows"]}
        )
    classes: Dict[Tuple[bool, str, bool], List[Tuple[int, Tuple[str, ...]]]] = {}
    for row in latest.values():
        for grad, mode in ((False, "forward"), (True, "both")):
            wall, gpu = row["wall " + mode], row["gpu " + mode]
            cost = {name: wall[name] + gpu[name] for name in wall}
            ranked = tuple(sorted(cost, key=cost.__getitem__))
            classes.setdefault((row["dtype"] == "float16", row["features"], grad), []).append(
                (row["scores"], ranked)
            )
    return {key: order.shorten(sorted(rows)) for key, rows in sorted(classes.items())}


def source(*reports: Dict[str, Any]) -> str:
    """The table as order.py has it."""
    lines = []
    for key, rows in table(*reports).items():
        lines.append(f"        {key!r}: (".replace("'", '"'))
        for bound, names in rows:
            written = "UNBOUNDED" if bound == order.UNBOUNDED else repr(bound)
            lines.append(f"            ({written}, {names!r}),".replace("'", '"'))
        lines.append("        ),")
    return "\n".join(lines)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--features", nargs="*", choices=FEATURES, default=FEATURES)
    parser.add_argument("--table", nargs="+", help="print order.py's rows from these JSONs")
    args = parser.parse_args(argv)
    if args.table:
        with contextlib.ExitStack() as stack:
            print(source(*[json.load(stack.enter_context(open(path))) for path in args.table]))
        return
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.starmap(warm, [(args.features, place, args.jobs) for place in range(args.jobs)])
    report = dict(about(args.out), arch=torch.cuda.get_device_capability()[0], rows=[])
    for dtype in ("float16", "float32"):
        for features in args.features:
            report["rows"] += [
                measure_row(dtype, features, shape, args.repeats) for shape in SHAPES
            ]
            if args.out:
                with open(args.out, "w") as file:
                    json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
