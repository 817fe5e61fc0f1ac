"""The table of docs/reliability.md: faults tried and survived.

python -m pytest tests/attention/recovery/test_fault_matrix.py -m "slow or not slow"

runs every case, then writes the table.
"""

from __future__ import annotations

from collections import Counter
from typing import Iterable, List, Set

from tests.support.fake_backends import FAULTS, Case
from tests.support.scripts import ROOT

PAGE = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- faults: written by tests/attention/recovery/fault_table.py -->"
END = "<!-- end of faults -->"
survived: Set[str] = set()  # the cases that passed in this process


def lines(found: Iterable[Case]) -> List[str]:
    """One row for a fault, pass and moment: in how many backend x layer combinations it was
    survived, and how."""
    count = Counter((c.fault.name, c.passing, c.layer >= 0) for c in found)
    table = ["| fault | in | begins | runs | what happens |", "|---|---|---|---|---|"]
    for fault in FAULTS:
        for passing in ("forward", "backward"):
            for late in (False, True):
                runs = count[fault.name, passing, late]
                if runs:
                    moment = "in mid-training" if late else "before the first step"
                    how = fault.outcome
                    if not late and fault.name not in ("OOM", "slow compile"):
                        how = "the self-check finds it: " + how
                    elif not late and fault.name == "OOM":
                        how = "the self-check finds it: small chunks for each such call"
                    table.append(f"| {fault.name} | {passing} | {moment} | {runs} | {how} |")
    return table


def write(found: Iterable[Case]) -> None:
    """Replace the table in the page."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(head + BEGIN + "\n" + "\n".join(lines(found)) + "\n" + END + tail)


def on_page() -> List[str]:
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
