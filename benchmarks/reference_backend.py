"""Time and peak memory of the reference backend, beside plain attention that holds all scores.

    python benchmarks/reference_backend.py --out reference.json
    python benchmarks/reference_backend.py --batch 2 --queries 1490 --keys 22384 --dropout 0.1
    python benchmarks/reference_backend.py --old ../old-checkout

Forward and backward, gradients of q, k and v (and of the factors, with --rank). "plain" is
softmax(bmm) bmm; "weights" is that with what torch.nn.MultiheadAttention(need_weights=True) does
besides: the mean of the weights over the heads. Every row is measured in a process of its own, in
rounds, so that a drift of the machine meets all rows: median time over the rounds, peak memory
above that of the operands (CUDA's allocator; on the CPU the process's largest resident size).
--old: a checkout with another version of the package, measured as "old".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from provenance import command_of

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("batch", "queries", "keys", "heads", "head_dim", "rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in zip(SIZES, (1, 900, 20000, 8, 32, 0)):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--padding", action="store_true", help="hide a tenth of the keys")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="calls per round")
    parser.add_argument("--old", type=Path, help="a checkout to compare with")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=("plain", "weights", "reference"), help="internal")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given)))
        return
    rows = ["plain", "weights", "reference"] + (["old"] if given.old else [])
    found: Dict[str, List[Dict[str, Any]]] = {name: [] for name in rows}
    for _ in range(given.rounds):
        for name in rows:
            found[name].append(in_a_process(name, given))
    plain = found["plain"]
    report: Dict[str, Any] = {
        "command": command_of(str(given.out) if given.out else None),
        "environment": found["reference"][0]["environment"],
        "rows": {},
    }
    for name, runs in found.items():
        ms = statistics.median(run["ms"] for run in runs)
        mib = statistics.median(run["mib"] for run in runs)
        report["rows"][name] = {
            "ms": round(ms, 2),
            "mib": round(mib, 1),
            "time / plain": round(ms / statistics.median(run["ms"] for run in plain), 3),
            "memory / plain": round(mib / statistics.median(run["mib"] for run in plain), 3),
            "ms of each round": [round(run["ms"], 2) for run in runs],
        }
    text = json.dumps(report, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


def in_a_process(name: str, given: argparse.Namespace) -> Dict[str, Any]:
    root = given.old if name == "old" else ROOT
    arguments = [f"--{n.replace('_', '-')}={getattr(given, n)}" for n in SIZES]
    arguments += [f"--{n}={getattr(given, n)}" for n in ("dtype", "dropout", "repeats")]
    arguments += ["--padding"] * given.padding
    arguments += ["--measure", "reference" if name == "old" else name]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "FLASHBIAS_PATCH": "0"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.decode().splitlines()[-1])  # type: ignore[no-any-return]


def measure(given: argparse.Namespace) -> Dict[str, Any]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype)
    B, M, N, H, D, R = (getattr(given, name) for name in SIZES)
    torch.manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    leaves = [random(B, M, H, D), random(B, N, H, D), random(B, N, H, D)]
    leaves += [random(1, M, 1, R), random(1, N, 1, R)] if R else []
    padding = torch.arange(N, device=device).expand(B, N) >= N - N // 10 if given.padding else None
    grad = torch.randn_like(leaves[0])
    attend = plain if given.measure != "reference" else reference

    def call() -> None:
        out = attend(leaves, padding, given.dropout, given.measure == "weights")
        torch.autograd.grad(out, leaves, grad)

    def small() -> None:  # imports and threads, but none of the memory
        few = [leaf[:, :3].detach().requires_grad_() for leaf in leaves]
        out = attend(few, None, given.dropout, given.measure == "weights")
        torch.autograd.grad(out, few, grad[:, :3])

    small()
    before = memory(device, torch)
    taken = [milliseconds(call, device, torch) for _ in range(given.repeats + 1)][1:]
    return {
        "ms": statistics.median(taken),
        "mib": memory(device, torch) - before,
        "environment": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "flashbias_patch": version(),
        },
    }


def version() -> str:
    import flashbias_patch

    return flashbias_patch.__version__


def plain(leaves: List[Any], padding: Any, dropout: float, weights: bool) -> Any:
    import torch

    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if len(leaves) > 3:
        q_factor, k_factor = (x.transpose(1, 2) for x in leaves[3:])
        scores = scores + q_factor @ k_factor.transpose(-1, -2)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    p = torch.softmax(scores, -1)
    if dropout:
        p = torch.nn.functional.dropout(p, dropout)
    if weights:
        p.mean(1)
    return (p @ v).transpose(1, 2)


def reference(leaves: List[Any], padding: Any, dropout: float, weights: bool) -> Any:
    import flashbias_patch
    from flashbias_patch.bias import LowRankBias

    bias = LowRankBias(*leaves[3:]) if len(leaves) > 3 else None
    return flashbias_patch.flash_bias_attention(
        *leaves[:3], bias, key_padding_mask=padding, dropout_p=dropout, backend="reference"
    )


def milliseconds(call: Callable[[], None], device: Any, torch: Any) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def memory(device: Any, torch: Any) -> float:
    """MiB, the largest so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated() / 2**20)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    main()
