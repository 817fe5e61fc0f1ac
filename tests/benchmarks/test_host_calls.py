"""The host's work per call is held: a patched call makes few more function calls than an unpatched
one, and no more operators. Counts have no noise; they are those of benchmarks/host_calls.py."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import pytest
import torch

from flashbias_patch import settings
from tests import stand_ins

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13),
    reason="how many functions torch's own attention calls differs between versions",
)
# patched / unpatched function calls, with a margin of a few calls
LARGEST = {
    ("auto", "eval"): 1.15, ("auto", "training"): 1.28, ("auto", "backward"): 1.15,
    ("fused", "eval"): 1.15, ("fused", "training"): 1.26, ("fused", "backward"): 1.9,
}  # fmt: skip
# Dropout on the CPU is in matrix products, whose backward is kept away from autocast (guard.py).
# In training four calls put the attention weights into the graph. 1.28 in a process of its own;
# what other tests import adds up to five calls.
LARGEST_WITH_DROPOUT = {
    **LARGEST, ("auto", "training"): 1.33, ("auto", "backward"): 1.42,
}  # fmt: skip


@pytest.fixture
def host_calls(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import host_calls

    gc.collect()  # modules of other tests that unreachable.py may still look for
    return host_calls


def counted(host_calls, call):
    for _ in range(host_calls.WARM_UP):
        call()
    python, c, _ = host_calls.function_calls(call)
    return python + c, len(host_calls.operators(call))


@pytest.mark.parametrize("path", ("auto", "fused"))
@pytest.mark.parametrize("name, dropout", (("CMT", 0.0), ("StreamPETR", 0.0), ("CMT", 0.1)))
def test_a_patched_call_makes_few_more_calls(host_calls, name, dropout, path):
    if path == "fused":
        pytest.importorskip("triton", minversion="3.0")
    target = host_calls.TARGETS[name]
    without = host_calls.fused_without_launches() if path == "fused" else contextlib.nullcontext()
    with stand_ins.repository(target.repository) as load_module, without:
        module = host_calls.attention(host_calls.load(target, load_module), target, "cpu", dropout)
        given = host_calls.operands("cpu", False)
        found = {}
        for way in (contextlib.nullcontext, host_calls.patched):
            with way():
                for case in host_calls.cases(module, given, False):
                    found.setdefault(case.name, []).append(counted(host_calls, case.prepare()))
    largest = LARGEST_WITH_DROPOUT if dropout else LARGEST
    for case, ((calls, operators), (patched_calls, patched_operators)) in found.items():
        assert patched_calls <= largest[path, case] * calls, (case, calls, patched_calls)
        if not dropout or path == "fused":
            assert patched_operators <= operators, (case, operators, patched_operators)


FORWARD = ["visible_kernel", "forward_kernel"]
BACKWARD = ["rows_kernel", "visible_kernel", "keys_kernel", "queries_kernel"]


@pytest.mark.parametrize(
    "dtype, calls, casts_of",
    [
        (
            "fp16", {"eval": 170, "training": 195, "backward": 120},
            ([], ["peaks_kernel", "divide_kernel"]),
        ),
        ("bf16", {"eval": 170, "training": 170, "backward": 95}, (["_to_copy"], [])),
    ],
)  # fmt: skip
def test_casts_are_few_launches(host_calls, monkeypatch, dtype, calls, casts_of):
    """FLASHBIAS_DTYPE on float32 code: q, k and v are cast in one launch, as are their gradients;
    without gradients the kernel writes float32."""
    pytest.importorskip("triton", minversion="3.0")
    by_torch, before = casts_of
    expected = {
        "eval": (["cast_kernel", *FORWARD], []),
        "training": (["cast_kernel", *FORWARD], ["_to_copy"]),
        "backward": ([*before, *BACKWARD, "cast_kernel"], by_torch),
    }
    target = host_calls.TARGETS["CMT"]
    monkeypatch.setenv("FLASHBIAS_DTYPE", dtype)
    settings.reload()
    try:
        with stand_ins.repository("cmt") as load, host_calls.fused_without_launches() as launched:
            module = host_calls.attention(host_calls.load(target, load), target, "cpu")
            given = host_calls.operands("cpu", False)
            with host_calls.patched():
                for case in host_calls.cases(module, given, False):
                    call = case.prepare()
                    for _ in range(host_calls.WARM_UP):
                        call()
                    del launched[:]
                    python, c, _ = host_calls.function_calls(call)
                    kernels, by_pytorch = expected[case.name]
                    assert launched == kernels, case.name
                    assert python + c <= calls[case.name], (case.name, python, c)
                    names = host_calls.operators(call)
                    copies = [name for name in names if "_to_copy" in name]
                    assert len(copies) == len(by_pytorch), (case.name, copies)
    finally:
        monkeypatch.undo()
        settings.reload()


@pytest.mark.parametrize("name", ["CMT", "PETR batch first"])
def test_projections_of_several_samples_are_single_products(host_calls, monkeypatch, name):
    """As in torch's own: not one small product for each query, nor a bias added afterwards."""
    pytest.importorskip("triton", minversion="3.0")
    monkeypatch.setattr(host_calls, "B", 3)
    target, found = host_calls.TARGETS[name], []
    kinds = ("addmm.default", "bmm.default", "add.Tensor")
    with stand_ins.repository(target.repository) as load, host_calls.fused_without_launches():
        module = host_calls.attention(host_calls.load(target, load), target, "cpu")
        given = host_calls.operands("cpu", bool(target.keywords))
        for way in (contextlib.nullcontext, host_calls.patched):
            with way():
                calls = {
                    case.name: case.prepare() for case in host_calls.cases(module, given, False)
                }
                for case in ("eval", "training"):
                    for _ in range(host_calls.WARM_UP):
                        calls[case]()
                    names = host_calls.operators(calls[case])
                    found.append([names.count(f"aten.{kind}") for kind in kinds] + [len(names)])
    unpatched, patched = found[:2], found[2:]
    for theirs, ours in zip(unpatched, patched):
        assert ours[0] == theirs[0] > 0 and all(b <= a for a, b in zip(theirs, ours)), found
