"""FlashAttention-4 under a low-rank bias: no bias, concatenated by hand (torch.cat), the `flash`
backend.

    python benchmarks/flash_backend.py --out benchmarks/results/flash_backend_h200.json

Milliseconds are medians of triton.testing.do_bench (which clears the L2 cache between calls), all
methods of a case in one process, in turns. Errors are ||x - exact|| / ||exact||, exact in float64,
output and gradients.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from triton.testing import do_bench

from flashbias_patch.attention.backends import flash_attention
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.bias.precision import split_factors

B, H, D = 2, 8, 32
SCALE = D**-0.5
TARGETS = {"forward": 0.90, "forward_backward": 0.92}  # of concatenating by hand, at the first case
TURNS = 3
# Joined head dims and v's, FlashAttention-4 alone: what widths cost, and which do not compile.
WIDTHS = [(32, 32), (40, 32), (48, 32), (64, 32), (64, 64), (80, 32), (96, 32)]


class Case(NamedTuple):
    queries: int
    keys: int
    rank: int  # columns as the kernel sees them
    shared: bool = False  # q_factor over heads, k_factor over batch and heads
    split: bool = False  # float32 factors of a third of the rank
    padding: bool = False  # a float key padding of zeros, as CMT gives

    @property
    def name(self) -> str:
        words = [f"{self.queries}x{self.keys}", f"rank {self.rank}"]
        return " ".join(
            words + [word for word in ("shared", "split", "padding") if getattr(self, word)]
        )


CASES = [
    Case(1490, 22384, 8),
    Case(1490, 22384, 8, shared=True),
    Case(1490, 22384, 16),
    Case(1490, 22384, 24, split=True),
    Case(1490, 22384, 8, padding=True),
    Case(1490, 22384, 0, padding=True),
    Case(900, 24000, 8),
    Case(1490, 56400, 8),
]


def operands(case: Case, seed: int = 0) -> Tuple[List[Tensor], Optional[Tensor], Tensor]:
    """([q, k, v, q_factor, k_factor], key padding, gradient of the output)."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    M, N, R = case.queries, case.keys, case.rank
    leaves = [draw(B, M, H, D), draw(B, N, H, D), draw(B, N, H, D)]
    if R:
        dtype, rank = (torch.float32, R // 3) if case.split else (torch.float16, R)
        factors = [
            draw(B, M, 1 if case.shared else H, rank, dtype=dtype),
            draw(*((1, N, 1) if case.shared else (B, N, H)), rank, dtype=dtype),
        ]
        leaves += split_factors(*factors, torch.float16) if case.split else factors
    padding = torch.zeros(B, N, device="cuda") if case.padding else None
    return [leaf.detach().requires_grad_() for leaf in leaves], padding, draw(B, M, H, D)


Method = Callable[[List[Tensor], Optional[Tensor]], Tensor]


def by_hand(flash: Callable[..., Any]) -> Method:
    def attend(leaves: List[Tensor], padding: Optional[Tensor]) -> Tensor:
        q, k, v, *factors = leaves
        q_columns, k_columns = [q * SCALE], [k]
        if factors:
            q_columns.append(factors[0].expand(*q.shape[:3], -1))
            k_columns.append(factors[1].expand(*k.shape[:3], -1))
        if padding is not None:  # a column of ones, and enough to keep the head dim a multiple of 8
            q_columns.append(q.new_ones(1, 1, 1, 8).expand(*q.shape[:3], -1))
            k_columns.append((padding.half() / 8)[:, :, None, None].expand(*k.shape[:3], 8))
        q, k = torch.cat(q_columns, -1), torch.cat(k_columns, -1)
        if (
            48 < q.shape[-1] <= 64
        ):  # with v at 32, FlashAttention-4's backward pass does not compile on Hopper
            v = torch.nn.functional.pad(v, (0, 64 - D))
        return flash(q, k, v, softmax_scale=1.0)[0][..., :D]

    return attend


def by_backend(leaves: List[Tensor], padding: Optional[Tensor]) -> Tensor:
    q, k, v, *factors = leaves
    inputs = AttentionInputs(q, k, v, *(factors or (None, None)), key_padding=padding, scale=SCALE)
    assert not flash_attention.backend.why_not(inputs), flash_attention.backend.why_not(inputs)
    return flash_attention.backend(inputs)


def exact(leaves: List[Tensor], gradient: Tensor) -> Tuple[Tensor, ...]:
    """Output and gradients in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = in_pytorch(leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, gradient.double()))


def in_pytorch(leaves: List[Tensor]) -> Tensor:
    q, k, v, *factors = (leaf.transpose(1, 2) for leaf in leaves)
    scores = q @ k.transpose(-1, -2) * SCALE
    if factors:
        scores = scores + factors[0] @ factors[1].transpose(-1, -2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def errors(out: Tensor, grads: Tuple[Tensor, ...], truth: Tuple[Tensor, ...]) -> Dict[str, float]:
    names = ("out", "q", "k", "v", "q_factor", "k_factor")
    found = (out, *grads)
    return {
        name: ((x.double() - y).norm() / y.norm()).item() for name, x, y in zip(names, found, truth)
    }


def measure(case: Case, flash: Callable[..., Any]) -> Dict[str, Any]:
    leaves, padding, gradient = operands(case)
    methods: Dict[str, Tuple[Method, List[Tensor], Optional[Tensor]]] = {
        "no bias": (lambda x, _: flash(*x, softmax_scale=SCALE)[0], leaves[:3], None),
        "by hand": (by_hand(flash), leaves, padding),
        "backend": (by_backend, leaves, padding),
    }
    truth = exact(leaves, gradient)
    found: Dict[str, Any] = {"case": case._asdict(), "name": case.name, "methods": {}}
    plain = in_pytorch(leaves)
    found["pytorch_half_errors"] = errors(
        plain, torch.autograd.grad(plain, leaves, gradient), truth
    )
    del plain
    steps: Dict[str, Tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name, (method, tensors, pad) in methods.items():

        def forward(method: Method = method, tensors: Any = tensors, pad: Any = pad) -> Any:
            with torch.no_grad():
                return method(tensors, pad)

        def both(method: Method = method, tensors: Any = tensors, pad: Any = pad) -> Any:
            out = method(tensors, pad)
            return out, torch.autograd.grad(out, tensors, gradient)

        steps[name] = forward, both
        found["methods"][name] = {"errors": None if name == "no bias" else errors(*both(), truth)}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        found["methods"][name]["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    del truth
    torch.cuda.empty_cache()
    times: Dict[Tuple[str, str], List[float]] = {}
    for _ in range(TURNS):
        for name, pair in steps.items():
            for what, step in zip(("forward", "forward_backward"), pair):
                took = do_bench(step, warmup=20, rep=100, return_mode="median")
                times.setdefault((name, what), []).append(took)
    for (name, what), taken in times.items():
        found["methods"][name][what] = {"ms": statistics.median(taken), "turns": taken}
    return found


def core(flash: Callable[..., Any], width: int, v_width: int) -> Dict[str, Any]:
    """FlashAttention-4 alone, on operands that are joined already, at the first case's lengths."""
    queries, keys = CASES[0][:2]
    shapes = ((queries, width), (keys, width), (keys, v_width), (queries, v_width))
    *leaves, gradient = (
        torch.randn(B, length, H, d, device="cuda", dtype=torch.float16) for length, d in shapes
    )
    for leaf in leaves:
        leaf.requires_grad_()
    found: Dict[str, Any] = {"width": width, "v_width": v_width}

    def forward() -> Tensor:
        with torch.no_grad():
            return flash(*leaves, softmax_scale=SCALE)[0]

    def both() -> Tuple[Tensor, ...]:
        return torch.autograd.grad(flash(*leaves, softmax_scale=SCALE)[0], leaves, gradient)

    for what, step in (("forward", forward), ("forward_backward", both)):
        try:
            found[what] = {"ms": do_bench(step, warmup=20, rep=100, return_mode="median")}
        except Exception as error:  # the compiler's own, of several kinds
            found[what] = {"fails": f"{type(error).__name__}: {str(error).strip()[:200]}"}
    print(
        f"FlashAttention-4 alone, head dims {width} / {v_width}:",
        found["forward"],
        found["forward_backward"],
    )
    return found


def report(found: Dict[str, Any]) -> None:
    hand = found["methods"]["by hand"]
    for name, numbers in found["methods"].items():
        times = [
            f"{numbers[w]['ms']:.3f} ms ({numbers[w]['ms'] / hand[w]['ms']:.2f})" for w in TARGETS
        ]
        print(
            f"{found['name']:30s} {name:8s}",
            *times,
            f"{numbers['peak_mib']:4.0f} MiB",
            worst(numbers["errors"]),
        )
    print(
        f"{found['name']:30s} plain PyTorch in half",
        worst(found["pytorch_half_errors"]),
        flush=True,
    )


def worst(found: Optional[Dict[str, float]]) -> str:
    if found is None:
        return ""
    name = max(found, key=lambda key: found[key])
    return f"error {found['out']:.1e}, worst {found[name]:.1e} ({name})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument(
        "--cases", type=int, default=len(CASES), help="how many of the cases, from the first"
    )
    arguments = parser.parse_args()
    from flash_attn.cute import flash_attn_func

    widths = [core(flash_attn_func, *pair) for pair in WIDTHS]
    results = []
    for case in CASES[: arguments.cases]:
        found = measure(case, flash_attn_func)
        results.append(found)
        report(found)
    if arguments.out:
        about = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "B": B,
            "H": H,
            "D": D,
            "dtype": "float16",
            "targets": TARGETS,
        }
        with open(arguments.out, "w") as file:
            json.dump({"about": about, "widths": widths, "cases": results}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
