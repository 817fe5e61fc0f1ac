"""The measurements of `flashbias bench`: every backend on this machine's device, at the attention
shapes of known models.

Times on CUDA are medians of events, synchronised once at the end: the time of a call on an idle
GPU, or of its launches where these take longer. Times on the CPU are medians of the wall clock.
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any, Callable, Dict, List, Sequence

import torch
from torch import Tensor

from .. import __version__, telemetry
from ..bias import LowRankBias
from . import dispatch, selection
from .inputs import AttentionInputs, build
from .recovery import errors
from .reference_attention import attend


def _shape(
    batch: int, queries: int, keys: int, heads: int, head_dim: int, rank: int = 8
) -> Dict[str, int]:
    return dict(batch=batch, queries=queries, keys=keys, heads=heads, head_dim=head_dim, rank=rank)


# CMT attends to six image maps at a sixteenth of the image's size and to a bird's-eye grid of 128
# or 180 squared.
SHAPES: Dict[str, Dict[str, int]] = {
    "tiny": _shape(1, 64, 256, 2, 32),
    "square-1024": _shape(2, 1024, 1024, 4, 32),
    "petr-900x6000": _shape(2, 900, 6000, 8, 32),
    "streampetr-r50": _shape(2, 1072, 4224, 8, 32),
    "mome-100x56400": _shape(2, 100, 56400, 8, 32),
    "cmt-800x320": _shape(2, 1490, 22384, 8, 32),
    "cmt-1600x640": _shape(2, 1490, 56400, 8, 32),
    "cmt-camera": _shape(2, 900, 24000, 8, 32),
    "square-4096": _shape(2, 4096, 4096, 4, 32),
    "square-16384": _shape(2, 16384, 16384, 4, 32),
    "head-dim-64": _shape(2, 1490, 22384, 4, 64),
    "head-dim-128": _shape(2, 1490, 22384, 2, 128),
}
BACKENDS = tuple(selection.MODULES)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CPU_SCORES = 1 << 24  # the most for a CPU: such shapes take seconds, larger ones minutes
SAMPLE = 64  # queries whose output is compared with float64
WARM_UP, REPEATS = 3, {"cuda": 20, "cpu": 3}


def run(
    shapes: Sequence[str],
    backends: Sequence[str],
    dtype: str,
    progress: Callable[[int, int, str], None],
) -> Dict[str, Any]:
    """Measure `backends` at `shapes` (names of SHAPES and BACKENDS), `dtype` one of DTYPES.

    `progress(done, total, what)` is called before each measurement and after the last.

    Returns {"environment": {what: text}, "rows": [...]}; a row has shape, sizes, backend and either
    why_not or forward_ms, total_ms (forward and backward, gradients of q, k, v and both factors),
    extra_mib (peak of both, None on the CPU) and error (output against float64, relative, on a
    sample of queries). Ctrl-C ends it with the rows there are, and "interrupted": True.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: List[Dict[str, Any]] = []
    found: Dict[str, Any] = {"environment": environment(device, dtype), "rows": rows}
    try:
        for shape in shapes:
            _measure_shape(
                shape, backends, DTYPES[dtype], device, rows, progress, len(shapes) * len(backends)
            )
        progress(len(rows), len(rows), "")
    except KeyboardInterrupt:
        found["interrupted"] = True
    return found


def has_gpu() -> bool:
    return torch.cuda.is_available()


def fits_a_cpu(shape: str) -> bool:
    """True if a CPU measures the named shape in seconds."""
    return _scores(shape) <= CPU_SCORES


def _scores(shape: str) -> int:
    sizes = SHAPES[shape]
    return sizes["batch"] * sizes["heads"] * sizes["queries"] * sizes["keys"]


def _measure_shape(
    shape: str,
    backends: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    rows: List[Dict[str, Any]],
    progress: Callable[[int, int, str], None],
    total: int,
) -> None:
    """Add a row for each backend."""
    sizes = SHAPES[shape]
    inputs = make(sizes, dtype, device) if device.type == "cuda" or fits_a_cpu(shape) else None
    for name in backends:
        progress(len(rows), total, f"{shape} {name}")
        if inputs is None:
            found: Dict[str, Any] = {
                "why_not": f"too large for a CPU ({_scores(shape):.0e} scores), needs a GPU"
            }
        else:
            found = measure(inputs, name)
        rows.append({"shape": shape, "sizes": sizes, "backend": name, "forward_ms": None, **found})
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next backend finds the memory free


def make(sizes: Dict[str, int], dtype: torch.dtype, device: torch.device) -> AttentionInputs:
    """A call of that size with a low-rank bias shared over batch and heads; every tensor requires a
    gradient."""
    generator = torch.Generator(device).manual_seed(0)
    B, M, N, H, D, R = (sizes[k] for k in ("batch", "queries", "keys", "heads", "head_dim", "rank"))

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator).to(dtype).requires_grad_()

    q, k, v, q_factor, k_factor = (
        random(*size)
        for size in ((B, M, H, D), (B, N, H, D), (B, N, H, D), (1, M, 1, R), (1, N, 1, R))
    )
    return build(q, k, v, LowRankBias(q_factor, k_factor))


def measure(inputs: AttentionInputs, name: str) -> Dict[str, Any]:
    """The columns of one row; `why_not` where the backend does not take the call or fails, or
    another one computed it."""
    against = dispatch.reasons_against(inputs, name)
    if against:
        return {"why_not": "; ".join(against)}
    given = inputs.q, inputs.k, inputs.v, inputs.q_factor, inputs.k_factor
    leaves = [t for t in given if t is not None]
    grad = torch.randn_like(inputs.q)  # v is as wide as q here
    before = _fallbacks(name)

    def forward() -> Tensor:
        return dispatch.attend(inputs, name)

    def both() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    try:
        out = forward()
        error = relative_error(inputs, out.detach())
        del out
        both()
        row = {"forward_ms": median_ms(forward, inputs.q), "total_ms": median_ms(both, inputs.q)}
        row["extra_mib"] = extra_mib(both, inputs.q)
    except Exception as failure:
        if not errors.survivable(failure):
            raise
        reasons = dispatch.reasons_against(inputs, name)
        return {"why_not": "; ".join(reasons) or errors.first_line(failure)}
    after = _fallbacks(name)
    if after != before:  # the time would be another backend's
        return {
            "why_not": next(
                reason for reason, count in after.items() if count != before.get(reason, 0)
            )
        }
    return {**row, "error": error}


def _fallbacks(name: str) -> Dict[str, int]:
    return {
        f"{e['call']}: {e['reason']}": e["count"]
        for e in telemetry.fallbacks()
        if e["source"] == name
    }


def median_ms(function: Callable[[], Any], like: Tensor) -> float:
    """The median time of a call in milliseconds, after warm-up, on the device of `like`."""
    for _ in range(WARM_UP if like.is_cuda else 1):
        function()
    repeats = REPEATS["cuda" if like.is_cuda else "cpu"]
    if not like.is_cuda:
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            function()
            taken.append((time.perf_counter() - began) * 1e3)
        return statistics.median(taken)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    elapsed: List[float] = [begin.elapsed_time(end) for begin, end in events]
    return statistics.median(elapsed)


def extra_mib(function: Callable[[], Any], like: Tensor) -> Any:
    """The peak GPU memory of a call above what was held before, in MiB; None on a CPU."""
    if not like.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.no_grad()
def relative_error(inputs: AttentionInputs, out: Tensor) -> float:
    """|out - exact| / |exact| (Frobenius) on SAMPLE queries spread over the length."""
    M = inputs.q.shape[1]
    rows = torch.arange(0, M, max(1, M // SAMPLE), device=out.device)
    assert inputs.q_factor is not None and inputs.k_factor is not None
    exact = attend(
        AttentionInputs(
            inputs.q[:, rows].double(), inputs.k.double(), inputs.v.double(),
            inputs.q_factor[:, rows].double(), inputs.k_factor.double(), scale=inputs.scale,
        )
    )  # fmt: skip
    return float((out[:, rows] - exact).norm() / exact.norm())


def environment(device: torch.device, dtype: str) -> Dict[str, str]:
    """The environment that the numbers depend on."""
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = ""
    gpu = device.type == "cuda"
    return {
        "GPU" if gpu else "CPU": torch.cuda.get_device_name()
        if gpu
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "torch": torch.__version__,
        "Triton": compiler,
        "Python": platform.python_version(),
        "flashbias_patch": __version__,
    }
