"""What the subcommands share in a terminal: names that are not known, a bar, an aligned table."""

from __future__ import annotations

import sys
from typing import Any, List, Optional, Sequence


def unknown(option: str, given: List[str], known: Any) -> Optional[str]:
    """What to say of names in `given` that are none of `known`; None if all are."""
    bad = [name for name in given if name not in known]
    return f"{option}: {', '.join(bad)}: not one of {', '.join(known)}" if bad else None


class progress:
    """`progress(done, total, what)`: a bar where rich and a terminal are, nothing otherwise."""

    def __enter__(self) -> Any:
        self.bar = None
        try:
            if sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import Progress

                self.bar = Progress(console=Console(stderr=True), transient=True)
                self.bar.start()
                self.task = self.bar.add_task("", total=None)
        except ImportError:
            pass
        return self.update

    def update(self, done: float, total: float, what: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=what)

    def __exit__(self, *exc: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def aligned(rows: Sequence[Sequence[str]], left: Optional[int] = None) -> str:
    """Rows, the header first, in columns; those from `left` on to the right. A row that ends early
    may run over its last."""
    columns = len(rows[0])
    widths = [
        max(len(row[i]) for row in rows if i < len(row) - (len(row) < columns))
        for i in range(columns)
    ]
    left = columns if left is None else left
    return "\n".join(
        "  ".join(
            word.ljust(width) if i < left else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
