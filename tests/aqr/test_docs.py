"""The page's figures are those of the results."""
from __future__ import annotations

import json

from tests.scripts import ROOT, load


def test_tables_are_made_from_the_results():
    benchmark = load("benchmarks/aqr.py")
    page = (ROOT / "docs" / "aqr.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "aqr_cpu.json").read_text())
    assert benchmark.with_tables(page, report) == page
    assert all(item["relative_error"] < 1e-3 for case in report["cases"].values() for item in case["gradient"])
