"""Write the records of the monitor to JSONL and TensorBoard files.

If a file cannot be written, this is logged once, and the file is not written any more.
"""

from __future__ import annotations

import json
import math
from typing import Any, Callable, Dict, List, Optional

SCALARS = ("value", "grad_norm", "change")


class Sinks:
    """Write records; `warn(key, message, *args)` logs a failure once."""

    def __init__(
        self, jsonl: Optional[str], tensorboard: Optional[str], warn: Callable[..., None]
    ) -> None:
        self._jsonl, self._warn = jsonl, warn
        self._board: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(tensorboard)
            except Exception as error:
                self._failed("tensorboard", tensorboard, error)

    def write(self, records: List[Dict[str, Any]]) -> None:
        if self._jsonl is not None:
            try:
                with open(self._jsonl, "a") as file:
                    file.write(
                        "".join(
                            json.dumps(strict(record), allow_nan=False) + "\n" for record in records
                        )
                    )
            except (OSError, ValueError) as error:
                self._failed("jsonl", self._jsonl, error)
                self._jsonl = None
        if self._board is not None:
            try:
                for record in records:
                    for key in SCALARS:
                        if record[key] is not None:
                            self._board.add_scalar(
                                f"{record['name']}/{key}", record[key], record["step"]
                            )
            except Exception as error:  # the writer's thread passes on any exception
                self._failed("tensorboard", self._board.log_dir, error)
                self._board = None

    def close(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            try:
                board.close()
            except Exception as error:
                self._failed("tensorboard", board.log_dir, error)

    def _failed(self, kind: str, where: Any, error: Exception) -> None:
        self._warn(
            ("sink", kind),
            "monitor: %s %s cannot be written, nothing more goes there: %s: %s",
            kind,
            where,
            type(error).__name__,
            error,
        )


def strict(record: Dict[str, Any]) -> Dict[str, Any]:
    """Replace numbers that JSON cannot represent by None; `not_finite` lists their keys."""
    not_finite = [
        key for key in SCALARS if record[key] is not None and not math.isfinite(record[key])
    ]
    if not not_finite:
        return record
    values: Dict[str, Any] = dict.fromkeys(not_finite)
    if "values" in record:
        values["values"] = [v if math.isfinite(v) else None for v in record["values"]]
    return {**record, **values, "not_finite": not_finite}
