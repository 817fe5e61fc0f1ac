"""Turn facts into a chain of links per parameter; the first broken link is the diagnosis."""

from __future__ import annotations

from typing import Any, Dict, List

from .links import CHECKS, Link, broken, ok


def diagnose(facts: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return a diagnosis per parameter.

    A diagnosis: {name, verdict, broken (a link or None), also (further broken links), links,
    evidence}.

    A link: {link, status ("ok", "broken", "note" or "unknown"), finding, change, cause}.
    """
    if not facts["parameters"]:
        return [_finished(",".join(facts["patterns"]), [_missing(facts)], {})]
    held = {entry["name"].split(" (of ")[0] for entry in facts["parameters"] if entry["groups"]}
    copies = [
        e for e in facts["parameters"] if not e["groups"] and e["name"].split(" (of ")[0] in held
    ]
    return [_of_parameter(entry, facts) for entry in facts["parameters"] if entry not in copies]


def _missing(facts: Dict[str, Any]) -> Link:
    name, others = ",".join(facts["patterns"]), facts["others"]
    if not facts["roots"]:
        return broken("no model")
    if others.get("attributes"):
        attribute = others["attributes"][0]
        link = broken("not a parameter", name=attribute["name"], what=attribute["what"])
    elif others.get("switches"):
        return broken("switched off", name=name, switches=", ".join(others["switches"]))
    else:
        near = f"; there are {', '.join(others['near'])}" if others.get("near") else ""
        return broken("missing", name=name, near=near)
    if others.get("switches"):
        link["finding"] += f" ({', '.join(others['switches'])})"
    return link


def _of_parameter(entry: Dict[str, Any], facts: Dict[str, Any]) -> Dict[str, Any]:
    links: List[Link] = [
        ok(
            "exists",
            f"{entry['name']}, {entry['dtype']}, shape {tuple(entry['shape'])}, in "
            f"{entry['owner']}, value {entry['value']:.6g}",
        )
    ]
    for check in CHECKS:
        link = check(entry, facts)
        if link is not None:
            links.append(link)
    return _finished(entry["name"], links, entry)


def _finished(name: str, links: List[Link], entry: Dict[str, Any]) -> Dict[str, Any]:
    broken_links = [link for link in links if link["status"] == "broken"]
    if broken_links:
        verdict = f"{name}: {broken_links[0]['finding']}"
    else:
        notes = [link["finding"] for link in links if link["status"] == "note"]
        verdict = f"{name}: it learns" + (f"; {notes[0]}" if notes else "")
        if not any(link["link"] == "update" and link["status"] == "ok" for link in links):
            verdict = f"{name}: no broken link, but no optimizer step was observed either"
    return {
        "name": name,
        "verdict": verdict,
        "broken": broken_links[0] if broken_links else None,
        "also": broken_links[1:],
        "links": links,
        "evidence": {
            "received": entry.get("received", {}),
            "steps": entry.get("steps", []),
            "groups": entry.get("groups", []),
        },
    }
