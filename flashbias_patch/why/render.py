"""Format the diagnoses of `flashbias why` as text or Markdown."""

from __future__ import annotations

from typing import Any, Dict, List

from .links import LINKS

SIGNS = {"ok": "ok", "broken": "BROKEN", "note": "note", "unknown": "?"}


def text(report: Dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [_head(report)]
    for diagnosis in report["diagnoses"]:
        lines += ["", diagnosis["verdict"]]
        if diagnosis["broken"]:
            lines.append(f"  change: {diagnosis['broken']['change']}")
        for link in diagnosis["links"]:
            finding = f": {link['finding']}" if link["finding"] else ""
            lines.append(f"  {SIGNS[link['status']]:<6}  {LINKS[link['link']]}{finding}")
        lines += [f"  also: {link['change']} ({LINKS[link['link']]})" for link in diagnosis["also"]]
    return "\n".join(lines + _notes(report))


def markdown(report: Dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [f"# {_head(report)}"]
    for diagnosis in report["diagnoses"]:
        lines += ["", f"## `{diagnosis['name']}`", "", f"**{_escaped(diagnosis['verdict'])}**"]
        if diagnosis["broken"]:
            lines += ["", f"Change: {_escaped(diagnosis['broken']['change'])}."]
        lines += ["", "| link | | finding |", "|---|---|---|"]
        lines += [
            f"| {LINKS[link['link']]} | {SIGNS[link['status']]} | {_escaped(link['finding'])} |"
            for link in diagnosis["links"]
        ]
    return "\n".join(lines + _notes(report))


def _head(report: Dict[str, Any]) -> str:
    how = "patched" if report["patched"] else "unpatched"
    classes = f" ({', '.join(report['classes'])})" if report["classes"] else ""
    return (
        f"flashbias why {report['name']}: {report['steps']} steps, {how}{classes}, torch "
        f"{report['torch']}"
    )


def _notes(report: Dict[str, Any]) -> List[str]:
    return ["", *(f"note: {note}" for note in report["notes"])] if report["notes"] else []


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
