"""examples/mini_cmt as the repository to patch: imported fresh, and forgotten afterwards."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

MINI_CMT = Path(__file__).resolve().parents[2] / "examples" / "mini_cmt"
MODULE = "projects.mmdet3d_plugin.models.utils.petr_transformer"


def forget(prefix="projects"):
    for name in [n for n in sys.modules if n == prefix or n.startswith(prefix + ".")]:
        del sys.modules[name]


@pytest.fixture
def repository(monkeypatch):
    """A function that imports mini_cmt's petr_transformer anew."""
    monkeypatch.syspath_prepend(str(MINI_CMT))
    forget()

    def load():
        return importlib.import_module(MODULE)

    yield load
    forget()


@pytest.fixture
def patched(installed, repository):
    """mini_cmt's petr_transformer, imported with the patches on."""
    return repository()
