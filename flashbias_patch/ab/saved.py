"""A of an earlier comparison in place of new runs of it: `flashbias ab --against OLD`.

The runs are copied into the new directory, so that its reports need no other. They are refused
where anything that A's time, memory or numbers depend on differs, as far as it is recorded.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from .. import driver
from . import reading, records

# Environment variables that change how a command computes; those of this package change B alone.
PREFIXES: Tuple[str, ...] = (
    *("CUDA", "CUBLAS", "CUDNN", "GOMP", "KMP", "MKL", "NCCL", "NVIDIA", "OMP", "OPENBLAS"),
    *("PYTORCH", "TORCH", "TRITON", "XLA"),
)
# Options that A's runs depend on, with what they are called on the command line.
OPTIONS = {
    "steps": "--steps",
    "seed": "--seed",
    "params": "--param",
    "env_a": "--env-a",
    "stand_in": "--stand-in-for-a",
    "process": "--process",
    "mode": "--mode",
    "module": "--module",
}
VERSIONS = ("torch", "cuda", "cudnn", "numpy", "gpu", "threads", "world_size")
OTHERS = "flashbias_patch"  # a module whose version A does not depend on


class Refused(ValueError):
    """OLD's A cannot stand for a new one; the message says why."""


class Saved(NamedTuple):
    """A of an earlier comparison. `entries`: of ab.json, of A's runs, nudged ones included."""

    directory: str
    document: Dict[str, Any]
    entries: List[Dict[str, Any]]


def machine() -> Dict[str, Any]:
    """Describe the machine and its environment for ab.json; `load` compares it."""
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)}
    return {"name": socket.gethostname(), "driver": driver.version(), "environment": variables}


def load(directory: str, now: Mapping[str, Any]) -> Saved:
    """A of the comparison in `directory`, for one that would write the document `now`.

    Raises Refused if `directory` holds none, its A failed, or something differs.
    """
    try:
        experiment = reading.load(directory)
        with open(os.path.join(directory, "ab.json"), encoding="utf-8") as file:
            document = json.load(file)
    except (records.NotARecord, OSError) as error:
        raise Refused(str(error)) from error
    if "machine" not in document:
        raise Refused(f"{directory} was written by a version that did not record the machine")
    if experiment.options.get("inference"):
        raise Refused(f"{directory} compares detections (--eval); run A again")
    runs = [run for run in experiment.runs if run.label == "A"]
    for run in runs:
        if run.status != "ok":
            raise Refused(f"{directory}: {run.name}, an A, is no result: {run.status}")
    if not any(run.steps and not run.nudged for run in runs):
        raise Refused(f"{directory} holds no run of A")
    differing = list(_differing(document, now))
    if differing:
        lines = "".join(f"\n  {name}: {old!r} there, {new!r} here" for name, old, new in differing)
        raise Refused(f"{directory}: its A cannot stand for a new one:{lines}")
    return Saved(directory, document, [e for e in document["runs"] if e["label"] == "A"])


def _differing(old: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Tuple[str, Any, Any]]:
    """(name, value there, value here) of what differs."""

    def plain(value: Any) -> Any:
        return json.loads(json.dumps(value, default=str))

    pairs = [
        ("command", old["command"], now["command"]),
        ("directory", old.get("cwd"), now["cwd"]),
        ("commit", old.get("commit"), now["commit"]),
        *((name, old["host"].get(name), value) for name, value in now["host"].items()),
        ("machine", old["machine"].get("name"), now["machine"]["name"]),
        ("driver", old["machine"].get("driver"), now["machine"]["driver"]),
    ]
    theirs, ours = old["machine"].get("environment") or {}, now["machine"]["environment"]
    pairs += [(name, theirs.get(name), ours.get(name)) for name in sorted({*theirs, *ours})]
    options = old.get("options") or {}
    pairs += [(said, options.get(name), now["options"][name]) for name, said in OPTIONS.items()]
    for name, there, here in pairs:
        if plain(there) != plain(here):
            yield name, there, here
        elif name == "commit" and str(here).endswith("+"):
            yield "uncommitted changes", "not recorded", "not recorded"


def copy(saved: Saved, out: str) -> List[Dict[str, Any]]:
    """Copy the runs into `out`; their entries for its ab.json."""
    found = []
    for index, entry in enumerate(saved.entries):
        name = f"{index + 1:02d}-A"
        shutil.copytree(
            os.path.join(saved.directory, "runs", entry["directory"]),
            os.path.join(out, "runs", name),
        )
        found.append({**entry, "index": index, "directory": name, "saved": saved.directory})
    return found


def other_versions(a: records.Run, b: records.Run) -> Optional[str]:
    """Return the reason why the saved `a` is not of the machine and versions of `b`, or None.

    These are known only after B has run."""
    theirs, ours = dict(a.environment), dict(b.environment)
    if not ours:
        return None
    pairs = [(name, theirs.get(name), ours.get(name)) for name in VERSIONS]
    modules = [dict(each.get("modules") or {}) for each in (theirs, ours)]
    for name in sorted(set(modules[0]) & set(modules[1]) - {OTHERS}):
        pairs.append((name, modules[0][name], modules[1][name]))
    differing = [f"{name} {old} with A, {new} now" for name, old, new in pairs if old != new]
    return "; ".join(differing) or None


def notes(experiment: records.Experiment) -> List[str]:
    """Return a report's notes on an A that was not run again."""
    runs = [run for run in experiment.runs if run.saved]
    if not runs:
        return []
    when = datetime.datetime.fromtimestamp(runs[0].started).strftime("%Y-%m-%d %H:%M")
    plain = [run for run in runs if not run.nudged]
    found = [
        f"A was not run again: its runs were made on {when} ({runs[0].saved}). Runs of A "
        "and B do not alternate, so the ratios include any change of the machine in between; the "
        "interval is wider for that reason"
    ]
    if len(plain) < 2:
        found.append("there is one run of A, so the noise of A against A is unknown")
    if len(plain) == len(runs):
        found.append(
            "there is no nudged A, so losses that are not identical cannot be compared with "
            "rounding"
        )
    return found
