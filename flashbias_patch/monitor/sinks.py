"""Files of the monitor: JSONL and TensorBoard. One that cannot be written is logged once and given
up."""

from __future__ import annotations

import json
import math
from typing import Any, Callable, Dict, List, Optional

SCALARS = ("value", "grad_norm", "change")


class Sinks:
    """Writes records; `say(key, message, *args)` logs a failure."""

    def __init__(
        self, jsonl: Optional[str], tensorboard: Optional[str], say: Callable[..., None]
    ) -> None:
        self._jsonl, self._say = jsonl, say
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
            except Exception as error:  # its writer's thread hands on whatever stopped it
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
        self._say(
            ("sink", kind),
            "monitor: %s %s cannot be written, nothing more goes there: %s: %s",
            kind,
            where,
            type(error).__name__,
            error,
        )


def strict(record: Dict[str, Any]) -> Dict[str, Any]:
    """The record with null for numbers that JSON has no word for; `not_finite` names their keys."""
    bad = [key for key in SCALARS if record[key] is not None and not math.isfinite(record[key])]
    if not bad:
        return record
    values: Dict[str, Any] = dict.fromkeys(bad)
    if "values" in record:
        values["values"] = [v if math.isfinite(v) else None for v in record["values"]]
    return {**record, **values, "not_finite": bad}
