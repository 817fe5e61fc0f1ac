"""Tables of measurements in docs/ are what their JSON says."""

import json

import pytest

from tests.support.scripts import ROOT, load

RESULTS = ROOT / "benchmarks" / "results"
ROUTED = next(
    (
        path
        for path in (RESULTS / f"aqr_real_cmt_{where}.json" for where in ("h200", "cpu"))
        if path.exists()
    ),
    None,
)


def test_reliability_page():
    made = load("docs/make_reliability.py")
    assert made.PAGE.read_text() == made.page()


def between(begin, end):
    return (ROOT / "docs" / "aqr.md").read_text().partition(begin)[2].partition(end)[0].strip()


def test_router_on_mini_cmt():
    made = load("benchmarks/aqr.py")
    assert between(made.BEGIN, made.END) == made.tables(
        json.loads((RESULTS / "aqr_cpu.json").read_text())
    )


@pytest.mark.skipif(ROUTED is None, reason="not measured yet")
def test_router_on_the_real_cmt():
    made = load("examples/aqr/real_cmt.py")
    report = json.loads(ROUTED.read_text())
    assert between(*made.MARKS[report.get("windows") is not None]) == made.tables(report)
