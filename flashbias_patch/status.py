"""Report the state of this process: patched classes, calls per backend, fallbacks and reasons."""

from __future__ import annotations

import sys
from typing import Any, Dict, List

from . import settings, telemetry


class Status(Dict[str, Any]):
    """A JSON-able dict of lists and numbers; `print` shows it as text."""

    def __str__(self) -> str:
        lines = [
            f"flashbias_patch {self['version']}: "
            f"{'installed' if self['installed'] else 'not installed'}"
        ]
        lines += _section(
            "patched", [f"{p['module']}.{p['class']}  ({p['seam']})" for p in self["patched"]]
        )
        lines += _section(
            "left alone", [f"{r['module']}.{r['class']}: {r['reason']}" for r in self["refused"]]
        )
        lines += _section("calls", [f"{name:<10} {count}" for name, count in self["calls"].items()])
        lines += _section(
            "fallbacks",
            [
                f"{f['source']}, {f['call']}: {f['reason']}  (x{f['count']})"
                for f in self["fallbacks"]
            ],
        )
        lines += (
            _section(
                "biases without effect",
                [f"{u['where']}: {u['reason']}  (x{u['count']})" for u in self["unreached"]],
            )
            if self["unreached"]
            else []
        )
        lines += (
            _section(
                "factorised biases",
                [
                    f"{f['where']}: rank {f['rank']}, relative error {f['relative_error']:.2g}"
                    + (f", used densely: {f['used_dense']}" if f["used_dense"] else "")
                    + f"  (x{f['count']})"
                    for f in self["factorizations"]
                ],
            )
            if self["factorizations"]
            else []
        )
        lines += _section("settings changed", [f"{k} = {v!r}" for k, v in self["settings"].items()])
        return "\n".join(lines)

    __repr__ = __str__


def _section(title: str, lines: List[str]) -> List[str]:
    return [f"  {title}:", *(f"    {line}" for line in lines or ["none"])]


def status() -> Status:
    """Return the state of this process as a dict.

    Keys: version, installed, patched, refused (classes left alone), calls, fallbacks, unreached
    (biases without effect), factorizations, settings (those that differ from the default).
    """
    from . import __version__

    install = sys.modules.get(f"{__package__}.patching.install")
    deferred = sys.modules.get(f"{__package__}.patching.deferred_install")
    return Status(
        version=__version__,
        installed=(install is not None and install.installed())
        or (deferred is not None and deferred.armed()),
        patched=[] if install is None else install.patched(),
        refused=[] if install is None else install.refused(),
        calls=dict(telemetry.calls),
        fallbacks=telemetry.fallbacks(),
        unreached=telemetry.unreached_biases(),
        factorizations=telemetry.factorizations(),
        settings={
            v.field: getattr(settings.current(), v.field)
            for v in settings.VARIABLES
            if getattr(settings.current(), v.field) != v.default
        },
    )
