"""The gallery page: its code runs, and every section has its picture."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import flashbias_patch.bias as biases

DOCS = Path(__file__).resolve().parents[2] / "docs"
SECTIONS = runpy.run_path(str(DOCS / "make_gallery.py"))["sections"]()


@pytest.mark.parametrize("image, code", SECTIONS, ids=[Path(image).stem for image, _ in SECTIONS])
def test_code_runs_and_picture_is_there(image, code):
    names = {}
    exec(compile(code, "bias-gallery.md", "exec"), names)
    assert isinstance(names["bias"], biases.AttentionBias)
    assert 0 < (DOCS / image).stat().st_size < 60_000


def test_every_bias_has_a_section():
    page = (DOCS / "bias-gallery.md").read_text(encoding="utf-8")
    assert page.count("```python") == len(SECTIONS)
    for name in biases.__all__:
        value = getattr(biases, name)
        if isinstance(value, type) and issubclass(value, biases.AttentionBias):
            assert name in ("AttentionBias", "SumBias") or f"\n## {name}\n" in page
