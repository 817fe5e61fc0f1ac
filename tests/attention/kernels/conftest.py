"""The kernels run in Triton's interpreter, on the CPU. Triton reads the variable when a kernel is
decorated."""

import importlib.util
import os

import pytest

from tests.support import internals

os.environ.setdefault("TRITON_INTERPRET", "1")


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
