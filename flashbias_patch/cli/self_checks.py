"""Report the self-checks that backends passed in earlier processes, for `flashbias doctor`."""

from __future__ import annotations

from typing import Any, Dict, List


def stored() -> Dict[str, Any]:
    """Return the file of passed self-checks and its rows, only those of the current GPU if any."""
    import torch

    from ..attention import kept_verdicts

    rows = kept_verdicts.rows()
    if torch.cuda.is_available():
        machine = kept_verdicts.here(torch.device("cuda", torch.cuda.current_device()))
        rows = [row for row in rows if row["place"] == machine]
    return {"file": kept_verdicts.path(), "rows": rows}


def text(report: Dict[str, Any]) -> List[str]:
    """Return the lines of the text report."""
    checks = report.get("self_checks")
    if not checks or not checks["rows"]:
        return []
    used = "" if report["settings"]["verdicts"] else ", not used: FLASHBIAS_VERDICTS is off"
    lines = [f"self-checks passed in earlier processes ({checks['file']}{used}):"]
    for row in checks["rows"]:
        worst = row.get("worst")
        evidence = f", error {worst} of the tolerance" if isinstance(worst, (int, float)) else ""
        lines.append(
            f"  {row['backend']:<10} {row['words']}: {row['checked']}{evidence}; {row['place']}"
        )
    return lines
