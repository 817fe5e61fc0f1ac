"""Helpers of the subcommands: checks of names and output paths, a progress bar, aligned tables."""

from __future__ import annotations

import os
import sys
from typing import Any, List, Optional, Sequence


def unknown(option: str, names: List[str], known: Any) -> Optional[str]:
    """Return an error message for the `names` that are not in `known`, or None if all are."""
    wrong = [name for name in names if name not in known]
    return f"{option}: {', '.join(wrong)}: not one of {', '.join(known)}" if wrong else None


def unwritable(option: str, path: str, directory: bool = False) -> Optional[str]:
    """Return an error message if `path` cannot be made or written, else None. Creates nothing."""
    wanted = "a directory" if directory else "a file"
    problem = None
    if os.path.isdir(path) and not directory:
        problem = "it is a directory"
    elif os.path.exists(path) and not os.path.isdir(path) and directory:
        problem = "it is a file"
    elif os.path.exists(path):
        problem = None if os.access(path, os.W_OK) else "no permission to write to it"
    else:
        parent = os.path.dirname(os.path.abspath(path))
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent):
            problem = f"{parent!r} is not a directory"
        elif not os.access(parent, os.W_OK | os.X_OK):
            problem = f"no permission to write to {parent!r}"
    if problem is None:
        return None
    return f"{option}: expected {wanted} that can be written, got {path[:200]!r}: {problem}"


class progress:
    """Show a progress bar on stderr if rich is installed and stderr is a terminal, else nothing.

    As a context manager it returns `update(done, total, text)`.
    """

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

    def update(self, done: float, total: float, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=text)

    def __exit__(self, *exc: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def aligned(rows: Sequence[Sequence[str]], left: Optional[int] = None) -> str:
    """Align `rows` in columns; the first row is the header.

    Columns from number `left` on are aligned to the right; None: all to the left. The last cell of
    a row that has fewer cells than the header may be wider than its column.
    """
    columns = len(rows[0])
    widths = [
        max(len(row[i]) for row in rows if i < len(row) - (len(row) < columns))
        for i in range(columns)
    ]
    left = columns if left is None else left
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
