"""What the scripts that write docs/performance.md share: reading a result, tables, sources."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterable, List

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> Dict[str, Any]:
    result: Dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> List[str]:
    head = list(head)
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
        "",
    ]


def apart(losses: Iterable[float], others: Iterable[float]) -> List[float]:
    """Relative differences of two loss curves."""
    return [abs(a - b) / abs(b) for a, b in zip(losses, others)]


def source(name: str) -> str:
    """Where a section's figures come from: file, commit, and what produced it."""
    path = RESULTS / f"{name}.json"
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", str(path)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout.strip()
    result = load(name)
    about = result.get("about") or result.get("environment", result)
    command = result.get("command", f"python benchmarks/{name.rsplit('_', 1)[0]}.py")
    device = about.get("device") or about.get("gpu") or "CPU"
    version = about.get("flashbias_patch")
    return (
        f"From `benchmarks/results/{name}.json` (last changed in commit {commit}); {device}, torch "
        f"{about['torch']}{f', flashbias_patch {version}' if version else ''}; "
        f"`{command}`."
    )
