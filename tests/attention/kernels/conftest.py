"""Tests of the kernels: each begins with no launch settled by another."""

import importlib.util

import pytest

from tests.support import internals


@pytest.fixture(autouse=True)
def nothing_kept():
    """Launches that another test settled, with its tile shapes, are made anew."""
    if importlib.util.find_spec("triton") is None:  # test_concatenate runs without it
        return
    from flashbias_patch.attention.kernels import tiles

    tiles.generation += 1


@pytest.fixture
def untuned(monkeypatch, tmp_path):
    """Nothing tuned, nothing tried, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    internals.forget_tiles(monkeypatch)
