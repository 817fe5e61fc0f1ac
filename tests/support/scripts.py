"""The repository's scripts, which are no package, as modules."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


def load(path):
    """The script at `path` of the repository, with its folder first on sys.path, as Python has it
    that runs it."""
    script = ROOT / path
    spec = importlib.util.spec_from_file_location(f"script_{script.stem}", str(script))
    module = importlib.util.module_from_spec(spec)
    with mock.patch("sys.path", [str(script.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module
