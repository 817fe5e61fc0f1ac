"""The order in which backends are asked comes from what was measured."""

import json

import pytest
import torch

from flashbias_patch.attention import order, selection
from flashbias_patch.attention.inputs import AttentionInputs
from tests.support import internals
from tests.support.scripts import ROOT, load


def benchmark():
    return load("benchmarks/order.py")


def test_the_table_is_what_was_measured():
    names = "order_h200", "order_masks_h200"
    reports = [
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in names
    ]
    assert order.TABLE[reports[0]["arch"]] == benchmark().table(*reports)


def test_of_rows_that_two_runs_have_the_last_ones_count():
    def run(of_a, of_b):
        times = {
            f"{clock} {mode}": {"a": of_a, "b": of_b}
            for clock in ("wall", "gpu")
            for mode in ("forward", "both")
        }
        return {"rows": [dict(dtype="float16", features="", shape=[1, 2, 3], scores=48, **times)]}

    assert benchmark().table(run(2, 1), run(2, 9))[True, "", True] == (
        (order.UNBOUNDED, ("a", "b")),
    )


def test_neighbours_that_agree_become_one_row():
    rows = [(100, ("a", "b")), (400, ("a", "b")), (1600, ("b", "a"))]
    assert order.shorten(rows) == ((800, ("a", "b")), (order.UNBOUNDED, ("b", "a")))


def test_unmeasured_devices_have_no_order():
    q = torch.zeros(1, 2, 1, 8)
    assert order.fastest(AttentionInputs(q, q, q), True) == ()


@pytest.mark.parametrize("M, first", [(10, "sdpa"), (10**6, "triton")])
def test_the_row_is_chosen_by_class_and_size(monkeypatch, M, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (99, 0))
    monkeypatch.setitem(
        order.TABLE,
        99,
        {(True, "dropout", True): ((1000, ("sdpa",)), (order.UNBOUNDED, ("triton",)))},
    )
    internals.forget_order()

    class OnCuda:
        device, dtype, shape = torch.device("cuda", 0), torch.float16, (1, M, 1, 8)

    inputs = AttentionInputs(OnCuda(), torch.zeros(1, 3, 1, 8), OnCuda(), dropout_p=0.5)
    assert order.fastest(inputs, True) == (first,)
    assert order.fastest(inputs._replace(dropout_p=0.0), True) == ()
    internals.forget_order()


def test_what_was_not_measured_comes_after_in_the_usual_order():
    names = tuple(selection.MODULES)
    found = internals.in_measured_order(("sdpa", "triton", "gone"), names)
    assert found.names == ("sdpa", "triton", "flash", "upstream", "reference")
    assert internals.in_measured_order((), names).names == names
