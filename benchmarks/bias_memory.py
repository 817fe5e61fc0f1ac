"""Peak memory and time of a biased attention, forward and backward, at CMT's shape: exact low rank
against dense.

    python benchmarks/bias_memory.py [--out benchmarks/results/bias_memory_h200.json]        (needs
    a GPU)

Each bias is built from parameters that learn, so that the dense one pays for its gradient too.
`extra_mib` is the peak above the attention's own inputs and outputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

import flashbias_patch
from flashbias_patch.bias import (
    AlibiBias,
    DenseBias,
    LowRankBias,
    ModalityBias,
    SquaredDistanceBias,
)

B, M, N, H, D = 2, 1490, 22384, 8, 32
LENGTHS = (128 * 128,) + (20 * 50,) * 6


def biases(device: str) -> dict:
    """Name -> function that builds the bias from fresh leaves."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, requires_grad=True)

    def dense() -> DenseBias:
        factors = leaf(B, M, 1, 8), leaf(B, N, 1, 8)
        return DenseBias(LowRankBias(*factors).dense().expand(B, H, M, N).contiguous())

    return {
        "none": lambda: None,
        "LowRankBias rank 8, half": lambda: LowRankBias(
            leaf(B, M, 1, 8).half(), leaf(B, N, 1, 8).half()
        ),
        "LowRankBias rank 8, float32 (24 columns)": lambda: LowRankBias(
            leaf(B, M, 1, 8), leaf(B, N, 1, 8)
        ),
        "ModalityBias, 7 segments": lambda: ModalityBias(leaf(B, M, 7), LENGTHS),
        "SquaredDistanceBias": lambda: SquaredDistanceBias(
            leaf(B, M, 2), torch.randn(1, N, 2, device=device), 0.01
        ),
        "AlibiBias": lambda: AlibiBias(torch.rand(H, device=device, requires_grad=True), M, N),
        "DenseBias": dense,
    }


def measure(build, backend=None, repeats: int = 7) -> dict:
    times, peak = [], 0.0
    q, k, v = (
        torch.randn(B, n, H, D, device="cuda", dtype=torch.float16, requires_grad=True)
        for n in (M, N, N)
    )
    grad = torch.randn_like(q)
    for _ in range(repeats + 2):
        bias = build()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = flashbias_patch.flash_bias_attention(q, k, v, bias, backend=backend)
        out.backward(grad)
        stop.record()
        torch.cuda.synchronize()
        peak = max(peak, (torch.cuda.max_memory_allocated() - before) / 2**20)
        times.append(start.elapsed_time(stop))
        q.grad = k.grad = v.grad = None
        del out, bias
    return {"ms": statistics.median(times[2:]), "extra_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = {}
    for name, build in biases("cuda").items():
        flashbias_patch.telemetry.reset()
        rows[name] = {**measure(build), "backends": dict(flashbias_patch.telemetry.calls)}
        print(
            f"{name:<45} {rows[name]['ms']:8.3f} ms {rows[name]['extra_mib']:10.1f} MiB "
            f"{rows[name]['backends']}",
            flush=True,
        )
    result = {
        "command": "python " + " ".join(sys.argv),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "shape": {"B": B, "M": M, "N": N, "H": H, "D": D},
        "dtype": "float16",
        "rows": rows,
        "fallbacks": flashbias_patch.telemetry.fallbacks(),
    }
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
