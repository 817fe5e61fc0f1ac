"""Bootstraps of fewer draws than users get: tests judge hundreds of experiments."""

from __future__ import annotations

import pytest

from flashbias_patch.ab import statistics


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 400)
