"""The part of `flashbias doctor` on self-checks that earlier processes passed."""

from __future__ import annotations

from typing import Any, Dict, List


def kept() -> Dict[str, Any]:
    """Their file, and its rows; of this machine's GPU only, if it has one."""
    import torch

    from ..attention import kept_verdicts

    rows = kept_verdicts.rows()
    if torch.cuda.is_available():
        place = kept_verdicts.here(torch.device("cuda", torch.cuda.current_device()))
        rows = [row for row in rows if row["place"] == place]
    return {"file": kept_verdicts.path(), "rows": rows}


def text(report: Dict[str, Any]) -> List[str]:
    found = report.get("self_checks")
    if not found or not found["rows"]:
        return []
    used = "" if report["settings"]["verdicts"] else ", not used: FLASHBIAS_VERDICTS is off"
    lines = [f"self-checks passed in earlier processes ({found['file']}{used}):"]
    for row in found["rows"]:
        worst = row.get("worst")
        evidence = (
            f", error {worst} of what is tolerated" if isinstance(worst, (int, float)) else ""
        )
        lines.append(
            f"  {row['backend']:<10} {row['words']}: {row['checked']}{evidence}; {row['place']}"
        )
    return lines
