"""The host's work per attention call, counted: function calls, torch operators, allocations; on a
GPU launches and times.

    python benchmarks/host_calls.py --out benchmarks/results/host_calls_cpu.json
    python benchmarks/host_calls.py --path fused --out benchmarks/results/host_calls_fused.json
    python benchmarks/host_calls.py --part decoders --out host_calls_h200.json       on a GPU

Counts have no noise. Of one steady-state call of each target class, unpatched and patched: calls of
Python functions and of C functions (sys.setprofile), operators (TorchDispatchMode), allocations
and, on a GPU, kernel launches (torch.profiler). Forward in eval without gradients, forward in
training, backward, with and without a bias, and a checkpointed decoder layer. On a GPU also the
median time from entering to leaving the outer forward. `--part decoders` times steps of a decoder
of six layers at small sizes. The classes are the stand-ins of tests/stand_ins.

`--path fused` counts the fused path on a machine without a GPU: launches of compiled kernels are
replaced by nothing, and results are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

os.environ.setdefault("FLASHBIAS_PATCH", "0")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch
from provenance import about
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashbias_patch
from flashbias_patch import settings
from flashbias_patch.bias import LowRankBias
from tests import stand_ins

PETR = stand_ins.UTILS + ".petr_transformer"
E, H = 64, 2  # small: only the host's work counts
B, M, N = 1, 24, 40
WARM_UP = 4


class Target(NamedTuple):
    """A class of a stand-in repository."""

    repository: str
    module: str
    name: str
    keywords: Dict[str, Any] = {}
    flash: bool = False  # unpatched it needs flash-attn, and a GPU


TARGETS: Dict[str, Target] = {
    "CMT": Target("cmt", PETR, "PETRMultiheadAttention"),
    "CMT flash": Target("cmt", PETR, "PETRMultiheadFlashAttention", flash=True),
    "StreamPETR": Target("streampetr", PETR, "PETRMultiheadAttention"),
    "PETR batch first": Target("petr", PETR, "PETRMultiheadAttention", {"batch_first": True}),
    "mmcv": Target("petr", "mmcv.cnn.bricks.transformer", "MultiheadAttention"),
    "mmdet3d": Target("mmdet3d", "projects.PETR.petr.petr_transformer", "PETRMultiheadAttention"),
}
LAYER = ["self_attn", "norm", "cross_attn", "norm", "ffn", "norm"]


# -- counting --------------------------------------------------------------------------------------


class Counts(NamedTuple):
    python: int
    c: int
    operators: int
    allocations: int
    launches: Optional[int] = None
    host_us: Optional[float] = None  # from entering to leaving the outer forward, median

    @property
    def calls(self) -> int:
        return self.python + self.c


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: List[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import torch._dynamo, and the counts of later calls change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def function_calls(call: Callable[[], Any]) -> Tuple[int, int, List[str]]:
    """(Python, C) function calls inside `call()`, and their names in order."""
    names: List[str] = []
    counted = [0, 0]

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            counted[0] += 1
            names.append(
                f"py {frame.f_code.co_name} "
                f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
            )
        elif event == "c_call":
            counted[1] += 1
            names.append(f"c  {getattr(argument, '__qualname__', argument)}")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    # Without call() itself, and without setprofile(None).
    return counted[0] - 1, counted[1] - 1, names[1:-1]


def operators(call: Callable[[], Any]) -> List[str]:
    with _Operators() as mode:
        call()
    return mode.names


def profiled(call: Callable[[], Any], cuda: bool) -> Tuple[int, Optional[int]]:
    """(allocations, kernel launches or None) inside `call()`."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=True) as prof:
        call()
        if cuda:
            torch.cuda.synchronize()
    events = prof.profiler.kineto_results.events()  # type: ignore[union-attr]
    device = torch.profiler._utils.DeviceType.CUDA if cuda else torch.profiler._utils.DeviceType.CPU
    allocations = sum(
        e.name() == "[memory]" and e.nbytes() > 0 and e.device_type() == device for e in events
    )
    launches = sum("LaunchKernel" in e.name() for e in events) if cuda else None
    return allocations, launches


def counts_of(call: Callable[[], Any], cuda: bool = False, timed: bool = True) -> Counts:
    """Of a steady-state call: it has run a few times before."""
    for _ in range(WARM_UP):
        call()
    python, c, _ = function_calls(call)
    names = operators(call)
    allocations, launches = profiled(call, cuda)
    return Counts(
        python, c, len(names), allocations, launches, host_time(call) if cuda and timed else None
    )


def host_time(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(100):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


# -- calls -----------------------------------------------------------------------------------------


def load(target: Target, load_module: Any) -> type:
    """The class, imported with the stand-ins for flash_attn; patched classes are put back."""
    flashbias_patch.install()
    cls: type = getattr(load_module(target.module), target.name)
    flashbias_patch.uninstall()
    return cls


def attention(cls: type, target: Target, device: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    keywords = {"attn_drop": 1.0 if target.flash else dropout, **target.keywords}
    return cls(E, H, **keywords).to(device)


def operands(device: str, batch_first: bool, masked: bool = True) -> Dict[str, Tensor]:
    def drawn(length: int) -> Tensor:
        return torch.randn((B, length, E) if batch_first else (length, B, E), device=device)

    query, key = drawn(M), drawn(N)
    found = {"query": query, "key": key, "value": key, "query_pos": drawn(M), "key_pos": drawn(N)}
    if masked:
        found["key_padding_mask"] = torch.zeros(
            B, N, device=device
        )  # CMT gives a floating mask of zeros
    return found


class Case(NamedTuple):
    """A call to be counted; `prepare()` returns it, what it needs done before."""

    name: str
    prepare: Callable[[], Callable[[], Any]]


def cases(module: Any, given: Dict[str, Any], bias: bool) -> Iterator[Case]:
    """Forward in eval, forward in training, backward."""
    learned = torch.zeros(1, device=given["query"].device, requires_grad=True)
    device = given["query"].device
    factors = torch.randn(B, M, 1, 8, device=device), torch.randn(B, N, 1, 8, device=device)

    def forward() -> Tensor:
        if bias:
            return module(**given, attention_bias=LowRankBias(*factors) * learned)
        return module(**given)

    def evaluated() -> Callable[[], Any]:
        module.eval()
        return torch.no_grad()(forward)

    def trained() -> Callable[[], Any]:
        module.train()
        return forward

    def backward() -> Callable[[], Any]:
        module.train()
        outs = [forward().sum() for _ in range(WARM_UP + 3)]
        return lambda: outs.pop().backward()

    yield Case("eval", evaluated)
    yield Case("training", trained)
    yield Case("backward", backward)


def decoder(
    load_module: Any, device: str, layers: int, checkpointed: bool, dropout: float, size: int
) -> Any:
    """Layers of CMT: self attention of mmcv, cross attention of the repository, a feed-forward
    network."""
    module = load_module(PETR)
    attention_of = [
        {
            "type": "MultiheadAttention",
            "embed_dims": size,
            "num_heads": size // 32,
            "dropout": dropout,
        },
        {
            "type": "PETRMultiheadAttention",
            "embed_dims": size,
            "num_heads": size // 32,
            "dropout": dropout,
        },
    ]
    torch.manual_seed(0)
    return torch.nn.ModuleList(
        module.PETRTransformerDecoderLayer(
            attn_cfgs=attention_of,
            operation_order=LAYER,
            with_cp=checkpointed,
            feedforward_channels=4 * size,
        )
        for _ in range(layers)
    ).to(device)


def run_decoder(layers: Any, given: Dict[str, Tensor]) -> Tensor:
    query = given["query"]
    for layer in layers:
        query = layer(
            query,
            given["key"],
            given["value"],
            given["query_pos"],
            given["key_pos"],
            [None, None],
            None,
            given["key_padding_mask"],
        )
    return query


@contextlib.contextmanager
def patched() -> Iterator[None]:
    flashbias_patch.install()
    try:
        yield
    finally:
        flashbias_patch.uninstall()


# -- the fused path without a GPU ------------------------------------------------------------------


@contextlib.contextmanager
def fused_without_launches() -> Iterator[List[str]]:
    """The fused backend takes calls on the CPU, and each launch of a kernel is only noted, by its
    name."""
    from flashbias_patch.attention import casts, dispatch
    from flashbias_patch.attention.backends import triton_fused
    from flashbias_patch.attention.kernels import cached_launch

    launched: List[str] = []

    def no_reasons(self: Any, inputs: Any) -> List[str]:
        return []

    def trusted(candidate: Any, name: str, inputs: Any, key: Any, verdicts: Any) -> bool:
        verdicts[name] = dispatch.TRUSTED
        return True

    def unchecked(kind: Any, made: Any, plain: Any) -> None:
        casts._checked.add(kind)

    def compiled(self: Any, tensors: Any) -> None:
        name = self.kernel.__name__
        self.run, self.rest = lambda *given, **options: launched.append(name), self.numbers

    with mock.patch.object(triton_fused.TritonFused, "why_not", no_reasons), mock.patch.object(
        dispatch, "_passes_self_check", trusted
    ), mock.patch.object(cached_launch.Launch, "first", compiled), mock.patch.object(
        casts, "DEVICE_TYPES", ("cpu",)
    ), mock.patch.object(casts, "_check", unchecked), mock.patch.object(
        casts, "dispatch_modes", int
    ):
        casts.reset()
        try:
            yield launched
        finally:
            casts.reset()


# -- tables ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def compute_dtype(name: str) -> Iterator[None]:
    """FLASHBIAS_DTYPE=name."""
    with mock.patch.dict(os.environ, FLASHBIAS_DTYPE=name):
        settings.reload()
        yield
    settings.reload()


def count_all(device: str, only: Optional[str] = None, fused: bool = False) -> List[Dict[str, Any]]:
    """The rows of the table. fused: calls are computed by the fused backend, which casts float32
    operands for FLASHBIAS_DTYPE."""
    cuda = device == "cuda"
    rows: List[Dict[str, Any]] = []
    for name, target in TARGETS.items():
        if only not in (None, name):
            continue
        with stand_ins.repository(target.repository) as load_module:
            cls = load(target, load_module)
            for dropout, bias in ((0.0, False), (0.1, False), (0.0, True)):
                if dropout and target.flash:
                    continue
                module = attention(cls, target, device, dropout)
                given = operands(device, bool(target.keywords.get("batch_first")))
                features = ", ".join(
                    word for word, has in (("dropout", dropout), ("bias", bias)) if has
                )
                row = {"class": name, "features": features}
                rows += compared(
                    row,
                    functools.partial(cases, module, given, bias),
                    cuda,
                    not (bias or target.flash),
                )
            for dtype in ("fp16", "bf16") if fused and name == "CMT" else ():
                module = attention(cls, target, device)
                given = operands(device, bool(target.keywords.get("batch_first")))
                row = {"class": name, "features": f"FLASHBIAS_DTYPE={dtype}"}
                with compute_dtype(dtype):
                    make = functools.partial(cases, module, given, False)
                    rows += compared(row, make, cuda, True)
    with stand_ins.repository("cmt") as load_module:
        if only is None:
            load(TARGETS["CMT"], load_module)
            layer = decoder(load_module, device, 1, True, 0.0, E)
            given = operands(device, False)
            row = {"class": "CMT decoder layer", "features": "checkpointed"}
            rows += compared(row, functools.partial(layer_cases, layer, given), cuda, True)
    return rows


def layer_cases(layer: Any, given: Dict[str, Tensor]) -> Iterator[Case]:
    query = given["query"].requires_grad_()

    def trained() -> Callable[[], Any]:
        layer.train()
        return lambda: run_decoder(layer, given)

    def backward() -> Callable[[], Any]:
        layer.train()
        outs = [run_decoder(layer, given).sum() for _ in range(WARM_UP + 3)]
        query.grad = None
        return lambda: outs.pop().backward()

    yield Case("training", trained)
    yield Case("backward", backward)


def compared(row: Dict[str, Any], make: Any, cuda: bool, unpatched: bool) -> List[Dict[str, Any]]:
    found: Dict[str, Dict[str, Any]] = {}
    for way in ("unpatched", "patched") if unpatched else ("patched",):
        with patched() if way == "patched" else contextlib.nullcontext():
            for case in make():
                counts = counts_of(
                    case.prepare(), cuda, case.name != "backward"
                )  # a graph is differentiated once
                found.setdefault(case.name, {**row, "call": case.name})[way] = counts._asdict()
    return list(found.values())


def median_times(call: Callable[[], Any], repeats: int) -> Dict[str, float]:
    """Milliseconds: of the host, from entering to leaving; and until the GPU is done. Medians."""
    host, whole = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - begin)
    return {"host_ms": statistics.median(host) * 1e3, "ms": statistics.median(whole) * 1e3}


# name: queries, keys, half precision by autocast, training, checkpointed
DECODERS = {
    "inference, camera 800x320": (900, 6000, False, False, False),
    "inference, camera 800x320, autocast": (900, 6000, True, False, False),
    "inference, StreamPETR 704x256": (900, 4224, False, False, False),
    "training, StreamPETR 704x256": (1100, 4224, False, True, False),
    "training, camera 800x320": (1490, 6000, False, True, False),
    "training, camera 800x320, autocast": (1490, 6000, True, True, False),
    "training, camera 800x320, checkpointed": (1490, 6000, False, True, True),
}


def decoders(repeats: int) -> List[Dict[str, Any]]:
    """Steps of a decoder of six layers on the GPU: unpatched and patched alternate in blocks."""
    rows = []
    with stand_ins.repository("cmt") as load_module:
        load(TARGETS["CMT"], load_module)
        for name, (queries, keys, half, training, checkpointed) in DECODERS.items():
            layers = decoder(load_module, "cuda", 6, checkpointed, 0.0, 256).train(training)
            parts = {}
            for part, length in (
                ("query", queries),
                ("key", keys),
                ("query_pos", queries),
                ("key_pos", keys),
            ):
                parts[part] = torch.randn(length, 1, 256, device="cuda", requires_grad=training)
            parts["value"] = parts["key"]
            parts["key_padding_mask"] = torch.zeros(1, keys, device="cuda")

            def step(
                layers: Any = layers,
                parts: Any = parts,
                training: bool = training,
                half: bool = half,
            ) -> None:
                with torch.set_grad_enabled(training), torch.autocast(
                    "cuda", torch.float16, enabled=half
                ):
                    out = run_decoder(layers, parts)
                if training:
                    out.sum().backward()

            row: Dict[str, Any] = {"decoder": name}
            times: Dict[str, List[Dict[str, float]]] = {"unpatched": [], "patched": []}
            for _ in range(2):
                for way in times:
                    with patched() if way == "patched" else contextlib.nullcontext():
                        if not times[way]:
                            torch.cuda.synchronize()
                            begin = time.perf_counter()
                            step()
                            torch.cuda.synchronize()
                            row["first_s_" + way] = time.perf_counter() - begin
                            for _ in range(WARM_UP):
                                step()
                            row["launches_" + way] = profiled(step, True)[1]
                        times[way].append(median_times(step, repeats))
            for way, found in times.items():
                for figure in ("host_ms", "ms"):
                    row[f"{figure}_{way}"] = min(one[figure] for one in found)
            for figure in ("host_ms", "ms", "launches"):
                row[figure + "_ratio"] = row[figure + "_patched"] / row[figure + "_unpatched"]
            rows.append(row)
            print(
                f"{name:42s} launches {row['launches_unpatched']:5d} -> "
                f"{row['launches_patched']:5d}   "
                f"host {row['host_ms_unpatched']:7.2f} -> {row['host_ms_patched']:7.2f} ms "
                f"({row['host_ms_ratio']:.2f}x)   "
                f"all {row['ms_unpatched']:7.2f} -> {row['ms_patched']:7.2f} ms "
                f"({row['ms_ratio']:.2f}x)   "
                f"first {row['first_s_unpatched']:.2f} -> {row['first_s_patched']:.2f} s",
                flush=True,
            )
    return rows


def show(rows: List[Dict[str, Any]]) -> None:
    for row in rows:
        ours, theirs = row["patched"], row.get("unpatched")
        line = f"{row['class']:18s} {row['features']:13s} {row['call']:9s}"
        for figure in ("python", "c", "operators", "allocations", "launches", "host_us"):
            if ours.get(figure) is not None:
                line += (
                    f"  {figure} {'-' if theirs is None else round(theirs[figure]):>4} -> "
                    f"{round(ours[figure]):<4}"
                )
        if theirs is not None:
            line += (
                f"  calls {(ours['python'] + ours['c']) / (theirs['python'] + theirs['c']):.2f}x"
            )
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--path", choices=("auto", "fused"), default="auto")
    parser.add_argument(
        "--part",
        choices=("counts", "decoders"),
        default="counts",
        help="decoders: launches and times of steps of a decoder of six layers, on a GPU",
    )
    parser.add_argument("--only", metavar="CLASS", help="one of " + ", ".join(TARGETS))
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of a decoder")
    parser.add_argument(
        "--compile-threads",
        type=int,
        help="threads that compile kernels before a first call, 1 for none; with an empty "
        "TRITON_CACHE_DIR and FLASHBIAS_HOME the first decoder starts cold",
    )
    parser.add_argument(
        "--names", action="store_true", help="list the function calls of the first class instead"
    )
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compile_threads:
        from flashbias_patch.attention.kernels import compile_ahead

        compile_ahead.THREADS = args.compile_threads
    path = fused_without_launches() if args.path == "fused" else contextlib.nullcontext()
    with path:
        if args.names:
            list_names(args.only or "CMT", args.device)
            return
        result = {**about(args.out, device=args.device), "path": args.path}
        if args.part == "decoders":
            result["decoders"] = decoders(args.repeats)
        else:
            result["counts"] = count_all(
                args.device, args.only, args.path == "fused" or args.device == "cuda"
            )
            show(result["counts"])
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file, indent=1)


def list_names(name: str, device: str) -> None:
    """The function calls and operators of one class, patched."""
    target = TARGETS[name]
    with stand_ins.repository(target.repository) as load_module:
        cls = load(target, load_module)
        module = attention(cls, target, device)
        with patched():
            for case in cases(
                module, operands(device, bool(target.keywords.get("batch_first"))), False
            ):
                call = case.prepare()
                for _ in range(WARM_UP):
                    call()
                print(f"== {case.name}")
                print("\n".join(function_calls(call)[2]))
                print(*operators(call))


if __name__ == "__main__":
    main()
