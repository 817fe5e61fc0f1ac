"""Defer patching until torch is imported, so that processes without torch start fast.

Every module that defines a class to patch imports torch first. wrapt and the hooks are loaded then.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Trigger:
    """A meta path finder that finds no module; it installs the hooks when torch is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch":
            disarm()
            _install()


_trigger = _Trigger()


def arm() -> None:
    """Install now if torch is imported already, else as soon as it is."""
    if "torch" in sys.modules:
        _install()
    elif _trigger not in sys.meta_path:
        sys.meta_path.insert(0, _trigger)


def disarm() -> None:
    if _trigger in sys.meta_path:
        sys.meta_path.remove(_trigger)


def armed() -> bool:
    return _trigger in sys.meta_path


def _install() -> None:
    try:
        from . import install

        install.install()
    except (
        ImportError
    ) as error:  # wrapt is missing: an interpreter that finds this package by PYTHONPATH alone
        from .. import telemetry

        telemetry.logger().error("not installed: this process runs unpatched: %s", error)
    except Exception:  # an error here must not fail the user's import
        from .. import telemetry

        telemetry.logger().exception("not installed: this process runs unpatched")
