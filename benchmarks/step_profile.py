"""Where a training step goes: GPU busy time by kind of kernel and by phase, and what the CPU did
while the GPU waited.

`summarise` reads the events of a Chrome trace of torch.profiler; `profile` makes one.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

# In this order: the first pattern that is found in a kernel's name says its kind.
KINDS: Tuple[Tuple[str, str], ...] = (
    (
        "attention",
        r"fmha|flash|attention|softmax|^_?(rows|keys|queries|forward|combine|pad|join|sum)_(kernel|rows)",
    ),
    ("optimizer", r"multi_tensor|adam|lpnorm|foreach"),
    ("norm", r"batch_norm|batchnorm|\bbn_|layer_norm|layernorm|gammabeta"),
    ("convolution", r"conv|wgrad|dgrad|fprop|winograd|cudnn|nchw|nhwc|im2col"),
    ("matmul", r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|matmul"),
    ("copy", r"memcpy|memset|copy|catarray|transpose|fill"),
    ("dropout", r"dropout|philox|distribution"),
    ("index, sort, reduce", r"index|scatter|gather|sort|reduce|topk|scan|cub::"),
    ("elementwise", r"elementwise|pointwise|where|triton_"),
)
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
GAP_US = 5.0  # shorter waits are between any two kernels
Span = Tuple[float, float]


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), "other")


def union(spans: Sequence[Span]) -> List[Span]:
    """Overlapping (start, end) joined, in order."""
    joined: List[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def _span(event: Dict[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


class _Innermost:
    """The shortest of some named events that covers a time."""

    def __init__(self, events: Sequence[Dict[str, Any]]) -> None:
        self.events = sorted((*_span(e), e["name"]) for e in events)
        self.longest = max((end - start for start, end, _ in self.events), default=0.0)
        self.starts = [start for start, _, _ in self.events]

    def at(self, time: float, otherwise: str, widest: bool = False) -> str:
        import bisect

        found = []
        for i in range(bisect.bisect_right(self.starts, time) - 1, -1, -1):
            start, end, name = self.events[i]
            if time - start > self.longest:
                break
            if end >= time:
                found.append((end - start, name))
        return (max(found) if widest else min(found))[1] if found else otherwise


def summarise(
    events: Sequence[Dict[str, Any]], steps: int, phases: Sequence[str], top: int = 15
) -> Dict[str, Any]:
    """Milliseconds a step: wall, GPU busy, kernels by kind and by phase, waits of the GPU, calls
    that block the CPU."""
    events = [e for e in events if e.get("ph") == "X" and "dur" in e]
    device = [e for e in events if e.get("cat") in GPU]
    marks = [
        e for e in events if e.get("cat") == "user_annotation" and e["name"] in (*phases, "step")
    ]
    launched = {
        e["args"]["correlation"]: float(e["ts"])
        for e in events
        if str(e.get("cat", "")).startswith("cuda_") and "correlation" in e.get("args", {})
    }
    phase = _Innermost([e for e in marks if e["name"] != "step"])
    whole = [_span(e) for e in marks if e["name"] == "step"]

    def ms(us: float) -> float:
        return round(us / 1e3 / steps, 3)

    by_kind: Dict[str, float] = defaultdict(float)
    by_phase: Dict[str, List[float]] = defaultdict(lambda: [0.0, 0])
    kernels: Dict[str, List[float]] = defaultdict(lambda: [0.0, 0])
    for e in device:
        kind = "copy" if e["cat"] != "kernel" else kind_of(e["name"])
        by_kind[kind] += e["dur"]
        where = phase.at(
            launched.get(e.get("args", {}).get("correlation"), float(e["ts"])), "between"
        )
        by_phase[where][0] += e["dur"]
        by_phase[where][1] += 1
        kernels[e["name"][:110]][0] += e["dur"]
        kernels[e["name"][:110]][1] += 1
    busy = union([_span(e) for e in device])
    working = _Innermost([e for e in events if e.get("cat") == "cpu_op"])
    gaps: Dict[str, List[float]] = defaultdict(lambda: [0.0, 0])
    for (_, end), (start, _) in zip(busy, busy[1:]):
        if start - end >= GAP_US:
            middle = (start + end) / 2
            key = f"{phase.at(middle, 'between')}: {working.at(middle, 'Python', widest=True)}"
            gaps[key][0] += start - end
            gaps[key][1] += 1
    blocking: Dict[str, List[float]] = defaultdict(lambda: [0.0, 0])
    for e in events:
        if re.search(
            r"synchronize|cudamemcpy\b|cudamemcpyasync|cudamalloc|cudafree", e["name"].lower()
        ) and str(e.get("cat", "")).startswith("cuda_"):
            blocking[e["name"]][0] += e["dur"]
            blocking[e["name"]][1] += 1

    def table(found: Dict[str, List[float]]) -> List[Dict[str, Any]]:
        ordered = sorted(found.items(), key=lambda item: -item[1][0])[:top]
        return [
            {"name": name, "ms": ms(us), "count": round(count / steps, 1)}
            for name, (us, count) in ordered
        ]

    wall = sum(end - start for start, end in whole)
    on_gpu = sum(end - start for start, end in busy)
    return {
        "steps": steps,
        "wall_ms": ms(wall),
        "gpu_busy_ms": ms(on_gpu),
        "gpu_waits_ms": ms(wall - on_gpu),
        "kernels": round(len(device) / steps, 1),
        "phase_wall_ms": {
            name: ms(sum(e["dur"] for e in marks if e["name"] == name)) for name in phases
        },
        "phase_gpu_ms": {
            name: {"ms": ms(us), "kernels": round(count / steps, 1)}
            for name, (us, count) in by_phase.items()
        },
        "kind_ms": {
            kind: ms(us) for kind, us in sorted(by_kind.items(), key=lambda item: -item[1])
        },
        "top_kernels": table(kernels),
        "gaps": table(gaps),
        "blocking_calls": table(blocking),
    }


@contextmanager
def marked(owner: Any, method: str, name: str) -> Iterator[None]:
    """`owner.method` appears as `name` in a profile."""
    import torch

    original = getattr(owner, method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return original(*args, **kwargs)

    had = method in vars(owner)
    setattr(owner, method, wrapper)
    try:
        yield
    finally:
        setattr(owner, method, original) if had else delattr(owner, method)


def profile(
    step: Callable[[int], Any], steps: int, phases: Sequence[str], cuda: bool
) -> Dict[str, Any]:
    """Profile `step(i)` for `steps` steps that were warmed up before."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        for i in range(steps):
            with torch.profiler.record_function("step"):
                step(i)
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        recorded.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    finally:
        os.unlink(path)
    return summarise(events, steps, phases)
