"""Windows on grids in the kernels, interpreted, against float64: error at most twice plain
PyTorch's, plus 1e-5."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", minversion="3.0")
from flashbias_patch.attention import chunked_attention
from flashbias_patch.attention.kernels import launcher, tiles, window_patches, window_tables
from flashbias_patch.attention.kernels import problem as problem_module
from flashbias_patch.attention.kernels.autograd import fused_attention
from flashbias_patch.attention.kernels.tiles import Config
from flashbias_patch.bias.grids import Grid, hidden
from tests.attention.kernels.test_operator import bfloat16_products  # noqa: F401  a fixture
from tests.support import internals
from tests.support.scripts import load
from tests.support.splits import in_parts

cases = load("benchmarks/window_cases.py")
Case, CASES, WIDE, SMALL, fail = cases.Case, cases.CASES, cases.WIDE, cases.SMALL, cases.fail
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
# Block sizes, and into how many parts the loops are cut.
TILES = {"pairs of patches, split": (32, 128, 3), "small": (16, 64, 0), "small, split": (16, 64, 3)}
# Of CASES, those that run by default; the others are slow ones.
QUICK = (
    "half, dropout",
    "gauss and the same mask",
    "mask on grids below a patch",
    "segments, half",
)


def quick(names, chosen):
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    def filled(*size, **options):
        return torch.full(*size, float("nan"), **options)

    monkeypatch.setattr(problem_module, "empty", filled)
    internals.kept_window_tables().clear()


def check(case):
    found = case.errors()
    assert max(found.values()) <= 1, found


def tile(monkeypatch, block_m, block_n, splits=0):
    def candidates(key):
        return [
            Config(block_m, 64 if "keys" in key.kernel or "mask" in key.kernel else block_n, 4, 1)
        ]

    monkeypatch.setattr(tiles, "candidates", candidates)
    if splits:
        in_parts(monkeypatch, splits)
    tiles.generation += 1


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_against_float64(name):
    check(Case(**CASES[name]))


def test_pairs_of_patches(monkeypatch):
    tile(monkeypatch, *TILES["pairs of patches, split"])
    check(Case(**CASES["half"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["gauss", "mask", "segments, half", "half, dropout", "everything", "grids below a patch"],
)
@pytest.mark.parametrize("size", TILES)
def test_tiles_and_splits(monkeypatch, case, size):
    tile(monkeypatch, *TILES[size])
    check(Case(**CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["half", "half, dropout", "half mask"])
def test_bfloat16(bfloat16_products, case):  # noqa: F811
    check(Case(**{**CASES[case], "dtype": BRAIN}))


@pytest.mark.slow
def test_large_weights():
    """1e4 as exact as it is to float32, and beyond: the softmax of what is far above the rest."""
    case = Case(dtype=FULL, B=1)
    case.leaves["windows"] *= 5e3
    check(case)
    largest = torch.finfo(FULL).max  # beside which float64 loses the scores: as 1e9
    for value, dtypes in (
        (1e9, (FULL, HALF)),
        (-1e9, (FULL,)),
        (largest, (HALF,)),
        (-math.inf, (FULL,)),
    ):
        for dtype in dtypes:
            case.leaves["windows"] = torch.full_like(case.leaves["windows"], min(value, 1e9))
            want = cast(case, dtype).plain(torch.float64)
            case.leaves["windows"] = torch.full_like(case.leaves["windows"], value)
            got = case.fused()
            for ours, exact in zip(got, want):
                exact = exact.nan_to_num(0.0)  # the weights' own gradient, of -inf
                assert (ours - exact).norm() <= 5e-3 * max(exact.norm(), 1.0), value


def cast(case, dtype):
    for name in ("q", "k", "v"):
        case.leaves[name] = case.leaves[name].to(dtype)
    case.dtype, case.grad = dtype, case.grad.to(dtype)
    return case


def test_a_row_that_sees_nothing():
    case = Case(bias="", mask=True)
    out, dq, dk, dv = case.fused()
    dead = hidden(case.window_mask).all(-1)[:, 0]
    assert dead.any() and not dead.all()
    assert not out[dead].any() and not dq[dead].any()
    assert torch.isfinite(dk).all() and torch.isfinite(dv).all()


@pytest.mark.slow
def test_twice_the_same():
    for case in (Case(dtype=HALF, p=0.1, R=5, segments=True, B=1), Case(bias="", mask=True, B=1)):
        for one, two in zip(case.fused(), case.fused()):
            assert torch.equal(one, two)
        torch.use_deterministic_algorithms(True)
        try:
            check(case)
        finally:
            torch.use_deterministic_algorithms(False)


def test_only_touched_patches_are_listed():
    case = Case(M=33, bias="", mask=True, frames=(Grid(64, 64),), sides=(3,), B=1)
    tables = window_tables.tables_of(
        window_tables.make(*window_tables.arguments(None, case.window_mask))
    )
    _, numbers, counts, flags = tables.lists(16)
    listed = int(counts.sum())
    assert 0 < listed == int(flags.sum()) < flags.numel() / 2
    order = tables.order[0, :33].long()
    cells = ~hidden(case.window_mask)[0, 0, order]  # (33, 4096)
    seen = cells.view(33, 8, 8, 8, 8).any(4).any(2).view(33, 64)
    for block in range(3):
        touched = seen[16 * block : 16 * block + 16].any(0)
        assert torch.equal(flags[block].bool(), touched)


def test_tables_are_shared_and_follow_the_centres():
    case = Case()
    made = window_tables.make(*window_tables.arguments(case.windows, None))
    first = window_tables.tables_of(made)
    other = case.windows._replace(
        centres=case.windows.centres.detach(), weights=case.windows.weights * 2
    )
    assert (
        window_tables.tables_of(window_tables.make(*window_tables.arguments(other, None))) is first
    )
    case.windows.centres.add_(1)
    assert window_tables.tables_of(made) is not first
    check(case)
    assert len(internals.kept_window_tables()) <= window_tables.ROOM
    del case, other, made
    window_tables.tables_of(window_tables.make(*window_tables.arguments(Case(M=7).windows, None)))
    assert len(internals.kept_window_tables()) == 1


@pytest.mark.slow
def test_recomputed_gradients(monkeypatch):
    for case in (Case(p=0.2, centre_batch=1), Case(mask=True, bias="gauss", B=1)):
        leaves = {name: t.clone().requires_grad_() for name, t in case.leaves.items()}
        want = case.fused()

        def broken(*args):
            raise RuntimeError("no kernel")

        torch.manual_seed(3)
        out = fused_attention(*case.inputs(leaves))
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "backward", broken)
            patch.setitem(chunked_attention.CHUNK_BYTES, "cpu", 32000)
            found = torch.autograd.grad(out, list(leaves.values()), case.grad)
        for one, two in zip(found, want[1:]):
            assert torch.allclose(one, two, atol=2e-5)


def test_counted_keys_number_each_key_once():
    for frames in (WIDE, SMALL):
        keys = window_patches.counted_keys(frames, torch.device("cpu"))
        assert len(keys.unique()) == len(keys) == sum(frame.size for frame in frames)
        words = window_patches.tables(
            frames, (1,) * len(frames), (1,) * len(frames), None, (), torch.device("cpu")
        )[0]
        assert int(keys.max()) < 64 * len(words)


@pytest.mark.skipif(not hasattr(torch.library, "custom_op"), reason="torch < 2.4")
@pytest.mark.parametrize(
    "case", quick(["box", "segments and mask", "gauss and the same mask"], ["box"])
)
def test_compiles_into_one_graph(case):
    case = Case(**{**CASES[case], "dtype": FULL})
    want = case.fused()

    def attend(inputs):
        return fused_attention(*inputs)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for one, two in zip(case.run(compiled), want):
        assert torch.allclose(one, two, atol=1e-6)
    inputs = case.inputs({name: t.detach() for name, t in case.leaves.items()})
    lengths = list(inputs.segment_lengths or ())
    given = (
        *inputs[:6],
        lengths,
        *inputs[7:12],
        *window_tables.arguments(inputs.windows, inputs.window_mask),
    )
    torch.library.opcheck(
        internals.operator(), given, test_utils=("test_schema", "test_faketensor")
    )


def test_no_queries():
    case = Case()
    leaves = {name: t[:, :0] if name in ("q", "windows") else t for name, t in case.leaves.items()}
    centres = case.windows.centres[:, :0]
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    case.windows = case.windows._replace(centres=centres)
    out = fused_attention(*case.inputs(leaves), on_failure=fail)
    found = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert out.shape[1] == 0 and all(not grad.any() for grad in found)
