"""Time and error of turning a dense bias into a low-rank one: exact SVD, randomized, warm-started.

    python benchmarks/factorize.py --device cpu --shapes 1490x22384
    python benchmarks/factorize.py --device cuda --shapes 1490x22384 900x56400

The bias has true rank 8 and white noise of relative size 1e-3. Between warm-started calls it moves
as a learned bias does between optimiser steps: relative change 1e-3, in rows and columns alike.
Rank 8 is asked for, so that all methods do the same job. Times are medians, seconds; one warm-up
call each but for the exact SVD.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import Tensor

from flashbias_patch.bias import factorize

RANK, NOISE, MOVE = 8, 1e-3, 1e-3
TARGET = 1 / 20  # warm-started over exact SVD


def planted(rows: int, columns: int, generator: torch.Generator) -> Tuple[Tensor, Tensor, Tensor]:
    """(left, right, noise): the bias is left @ right^T + noise, entries of size 1."""
    device = generator.device
    left = torch.randn(rows, RANK, generator=generator, device=device) / RANK**0.5
    right = torch.randn(columns, RANK, generator=generator, device=device)
    return left, right, NOISE * torch.randn(rows, columns, generator=generator, device=device)


def moved(left: Tensor, right: Tensor, generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    parts = []
    for factor in (left, right):
        step = torch.randn(factor.shape, generator=generator, device=factor.device)
        parts.append(factor + MOVE * factor.norm() / step.norm() * step)
    return parts[0], parts[1]


def timed(call: Callable[[], Any], device: str) -> Tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(rows: int, columns: int, device: str, repeats: int) -> List[Dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(0)
    left, right, noise = planted(rows, columns, generator)
    dense = left @ right.mT + noise
    found = []

    def record(method: str, seconds: List[float], result: Any) -> None:
        found.append(
            {
                "rows": rows,
                "columns": columns,
                "method": method,
                "seconds": statistics.median(seconds),
                "calls": len(seconds),
                "rank": result.rank,
                "relative_error": result.relative_error,
                "used_dense": result.used_dense,
            }
        )
        print(json.dumps(found[-1]))

    exact_calls = repeats if device == "cuda" else 1
    runs = [
        timed(lambda: factorize(dense, rank=RANK, method="svd"), device) for _ in range(exact_calls)
    ]
    record("svd", [seconds for seconds, _ in runs], runs[-1][1])

    factorize(dense, rank=RANK, method="randomized")
    runs = [
        timed(lambda: factorize(dense, rank=RANK, method="randomized"), device)
        for _ in range(repeats)
    ]
    record("randomized", [seconds for seconds, _ in runs], runs[-1][1])

    state, seconds = runs[-1][1].state, []
    for step in range(repeats + 1):
        left, right = moved(left, right, generator)
        dense = left @ right.mT + noise
        spent, result = timed(
            partial(factorize, dense, rank=RANK, method="randomized", warm_start=state), device
        )
        state = result.state
        if step:
            seconds.append(spent)
    record("warm", seconds, result)
    times = {entry["method"]: entry["seconds"] for entry in found}
    found[-1]["share_of_svd"] = times["warm"] / times["svd"]
    print(f"{rows}x{columns}: warm / svd = {found[-1]['share_of_svd']:.4f}, target {TARGET}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", default=["1490x22384", "900x56400"], metavar="MxN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the results to this JSON file")
    arguments = parser.parse_args()

    results = []
    for shape in arguments.shapes:
        rows, columns = (int(side) for side in shape.split("x"))
        results += measure(rows, columns, arguments.device, arguments.repeats)
    report = {
        "command": "python benchmarks/factorize.py --device {} --shapes {} --repeats {}".format(
            arguments.device, " ".join(arguments.shapes), arguments.repeats
        ),
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "true_rank": RANK,
        "noise": NOISE,
        "move": MOVE,
        "results": results,
    }
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    shares = [entry["share_of_svd"] for entry in results if "share_of_svd" in entry]
    return 0 if all(share <= TARGET for share in shares) else 1


if __name__ == "__main__":
    sys.exit(main())
