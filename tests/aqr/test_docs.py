"""The page's figures are those of the results."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.scripts import ROOT, load


def test_tables_are_made_from_the_results():
    benchmark = load("benchmarks/aqr.py")
    page = (ROOT / "docs" / "aqr.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "aqr_cpu.json").read_text())
    assert benchmark.with_tables(page, report) == page
    assert all(
        item["relative_error"] < 1e-3
        for case in report["cases"].values()
        for item in case["gradient"]
    )


def test_pictures_of_windows_show_windows_around_the_objects(monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "mini_cmt"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "projects"]:
        monkeypatch.delitem(sys.modules, name)  # another test's repository; back after this test
    drawing = load("docs/make_windows.py")
    from projects.mmdet3d_plugin.datasets import synthetic_frame

    seen = drawing.windows(synthetic_frame(0), window=15)
    cell = ((seen["boxes"][:, :2] + 54.0) / 108.0 * 180).astype(int)
    for place, (column, row) in enumerate(cell):
        rows, columns = seen["bev"][place].nonzero()
        assert (rows.min(), rows.max()) == (max(row - 7, 0), min(row + 7, 179))
        assert (columns.min(), columns.max()) == (max(column - 7, 0), min(column + 7, 179))
        assert sum(view.any() for view in seen["cameras"][place]) <= 1
    assert seen["cameras"].any()
    for name in [name for name in sys.modules if name.partition(".")[0] == "projects"]:
        del sys.modules[name]
