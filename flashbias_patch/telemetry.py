"""What happened in this process: calls by backend, fallbacks with reasons, biases that had no
effect, and each log line only once."""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections import Counter

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from typing import Any, Dict, Hashable, List, Optional, Set, Tuple

calls: Counter = Counter()
_fallbacks: Dict[Tuple[str, str, str], int] = {}
_factorized: Dict[str, Dict[str, Any]] = {}
_unreached: Dict[Tuple[str, str], int] = {}
_said: Set[Hashable] = set()
_lock = allocate_lock()


def logger() -> logging.Logger:
    """The package's logger. `logging` is imported when there is something to say."""
    import logging

    return logging.getLogger("flashbias_patch")


def configure(level: Optional[str]) -> None:
    """FLASHBIAS_LOG_LEVEL: log to stderr from this level on, and nowhere else (never twice)."""
    if level is None:
        return
    import logging

    log = logger()
    log.setLevel(level.upper())
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.propagate = False


def once(key: Hashable, level: str, message: str, *args: Any) -> None:
    """Log `message` at `level` ("info", "warning", "error") the first time `key` is seen.

    Other ranks than 0 say who they are.
    """
    if key in _said:
        return
    with _lock:
        if key in _said:
            return
        _said.add(key)
    prefix = f"[rank {rank()}] " if rank() else ""
    getattr(logger(), level)(prefix + message, *args)


def rank() -> int:
    """RANK of this process; 0 where it is unset, empty or no number."""
    text = os.environ.get("RANK", "").strip()
    return int(text) if text.isdigit() else 0


def environment(problems: List[str]) -> None:
    """Log problems with the environment as errors: each once for a process and all that it
    starts."""
    if problems:
        from . import settings

        for problem in settings.unnamed(problems):
            once(problem, "error", "%s", problem)


def fallback(source: str, call: str, reason: str, level: str = "warning") -> None:
    """Count that `source` (a backend or a seam) could not answer a class of `call`, and why; log it
    once."""
    key = (source, call, reason)
    with _lock:
        _fallbacks[key] = _fallbacks.get(key, 0) + 1
    once(key, level, "%s passed over for %s: %s", source, call, reason)


def fallbacks() -> List[Dict[str, Any]]:
    with _lock:
        return [
            {"source": source, "call": call, "reason": reason, "count": count}
            for (source, call, reason), count in _fallbacks.items()
        ]


def unreached(where: str, reason: str) -> None:
    """Count that a bias had no effect, and why; log it once. where: "attention_bias(...)", or the
    class it was given to."""
    with _lock:
        _unreached[where, reason] = _unreached.get((where, reason), 0) + 1
    once(("unreached", where, reason), "warning", "%s has no effect: %s", where, reason)


def unreached_biases() -> List[Dict[str, Any]]:
    with _lock:
        return [
            {"where": where, "reason": reason, "count": count}
            for (where, reason), count in _unreached.items()
        ]


def factorized(where: str, rank: int, relative_error: float, reason: str) -> None:
    """Note the latest factorisation of a dense bias; `reason` says why the dense bias was used
    after all."""
    with _lock:
        count = _factorized.get(where, {}).get("count", 0) + 1
        _factorized[where] = {
            "where": where,
            "rank": rank,
            "relative_error": relative_error,
            "used_dense": reason or None,
            "count": count,
        }
    if reason:
        once(
            ("factorized", where),
            "warning",
            "%s: the dense bias is used as it is: %s",
            where,
            reason,
        )


def factorizations() -> List[Dict[str, Any]]:
    with _lock:
        return [dict(entry) for entry in _factorized.values()]


def reset() -> None:
    """Forget counts and said lines (tests, and between measured phases)."""
    with _lock:
        calls.clear()
        _fallbacks.clear()
        _factorized.clear()
        _unreached.clear()
        _said.clear()
