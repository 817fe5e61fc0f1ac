"""The page's figures are those of the results."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_made_from_the_results():
    spec = importlib.util.spec_from_file_location("aqr_benchmark", str(ROOT / "benchmarks" / "aqr.py"))
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    page = (ROOT / "docs" / "aqr.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "aqr_cpu.json").read_text())
    assert benchmark.with_tables(page, report) == page
    assert all(item["relative_error"] < 1e-3 for case in report["cases"].values() for item in case["gradient"])
