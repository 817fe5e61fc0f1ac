"""Every kernel once, forward and backward, on odd lengths and each feature: what to run under
compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitizer.py
compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/sanitizer.py
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

if __name__ == "__main__":
    os.environ.setdefault(
        "PYTORCH_NO_CUDA_MEMORY_CACHING", "1"
    )  # so that a tensor's end is an allocation's end
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch
import window_cases

from flashbias_patch.attention.kernels import launcher_backward, problem
from flashbias_patch.attention.kernels.autograd import fused_attention

# lengths, head dim, rank, dtype, which of segments, dense, mask, padding, dropout
CASES = [
    ((113, 203), 32, 8, "float16", ""),
    ((131, 777), 32, 0, "float16", "padding dropout"),
    ((65, 130), 40, 13, "bfloat16", "segments dense mask padding dropout"),
    ((33, 2100), 64, 3, "float16", "segments"),
    ((67, 150), 40, 0, "bfloat16", "segments dense mask padding"),
    ((70, 90), 32, 2, "float32", "added dropout"),
    ((40, 61), 128, 33, "float16", "dense"),
]


def fail(call: object, grad_out: object, error: BaseException) -> NoReturn:
    raise error


def run(lengths: tuple, D: int, R: int, dtype: str, features: str, device: str = "cuda") -> None:
    """One case; tests/attention/kernels/test_bounds.py runs its own on the CPU."""
    (M, N), B, H = lengths, 2, 2
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (
            torch.randn(*size, device=device, generator=generator)
            .to(getattr(torch, dtype))
            .requires_grad_()
        )

    tensors = [random(B, M, H, D), random(B, N, H, D), random(B, N, H, D), None, None, None, None]
    if R:
        tensors[3:5] = [random(1, M, H, R), random(B, N, 1, R)]
    if "segments" in features:
        tensors[5] = random(B, M, 1, 3)
    if "dense" in features:
        tensors[6] = random(1, H, M, N)
    mask = (
        torch.rand(B, 1, M, N, device=device, generator=generator) < 0.3
        if "mask" in features
        else None
    )
    padding = None
    if "padding" in features:
        padding = torch.arange(N, device=device)[None].expand(B, N) % 3 == 0
    elif "added" in features:
        padding = torch.zeros(B, N, device=device)
    p = 0.1 if "dropout" in features else 0.0
    split = [N // 3, N // 3, N - N // 3 * 2]
    out = fused_attention(*tensors[:6], split, tensors[6], mask, padding, p, on_failure=fail)
    torch.autograd.grad(out, [t for t in tensors if t is not None], torch.randn_like(out))


def main() -> None:
    for place, case in enumerate(CASES):
        launcher_backward.SEPARATE = (1 << 20) * (
            place % 2
        )  # gradients of shared factors both ways
        run(*case)
        torch.cuda.synchronize()
        print("ran", *case, flush=True)
    for name, options in window_cases.CASES.items():
        window_cases.Case(**options, device="cuda").fused()
        torch.cuda.synchronize()
        print("ran", name, flush=True)
    print("multiprocessors", problem.arch_of(torch.empty(0, device="cuda")).processors)


if __name__ == "__main__":
    main()
