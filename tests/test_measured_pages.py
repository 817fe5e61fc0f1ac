"""Tables of measurements in docs/ are what their JSON says."""

import json

import pytest

from tests.support.scripts import ROOT, load

RESULTS = ROOT / "benchmarks" / "results"


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


@pytest.mark.parametrize("name", ["aqr_real_cmt_h200", "aqr_windows_h200"])
def test_router_on_the_real_cmt(name):
    made = load("examples/aqr/real_cmt.py")
    report = json.loads((RESULTS / f"{name}.json").read_text())
    assert between(*made.MARKS[report.get("windows") is not None]) == made.tables(report)
