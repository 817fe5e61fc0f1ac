"""Telemetry of this process: calls per backend, fallbacks with reasons, biases without effect.

It also logs each line only once.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections import Counter

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from typing import Any, Dict, Hashable, List, Optional, Set, Tuple

calls: Counter[str] = Counter()
_fallbacks: Dict[Tuple[str, str, str], int] = {}
_factorized: Dict[str, Dict[str, Any]] = {}
_unreached: Dict[Tuple[str, str], int] = {}
_logged_keys: Set[Hashable] = set()
_lock = allocate_lock()


def logger() -> logging.Logger:
    """Return the logger of the package. `logging` is imported on first use."""
    import logging

    return logging.getLogger("flashbias_patch")


def configure(level: Optional[str]) -> None:
    """Log to stderr from `level` (FLASHBIAS_LOG_LEVEL) on, without propagation to other
    handlers."""
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

    On ranks other than 0 the line begins with the rank.
    """
    if key in _logged_keys:
        return
    with _lock:
        if key in _logged_keys:
            return
        _logged_keys.add(key)
    prefix = f"[rank {rank()}] " if rank() else ""
    getattr(logger(), level)(prefix + message, *args)


def rank() -> int:
    """Return RANK of this process; 0 if it is unset, empty or not a number."""
    text = os.environ.get("RANK", "").strip()
    return int(text) if text.isdigit() else 0


def environment(problems: List[str]) -> None:
    """Log problems with the environment as errors, each once for this process and its children."""
    if problems:
        from . import settings

        for problem in settings.unnamed(problems):
            once(problem, "error", "%s", problem)


def fallback(source: str, call: str, reason: str, level: str = "warning") -> None:
    """Count that `source` (a backend or a patched class) did not compute `call`, and log it once.

    call: a description of the call signature. reason: why `source` was not used.
    """
    key = (source, call, reason)
    with _lock:
        _fallbacks[key] = _fallbacks.get(key, 0) + 1
    once(key, level, "%s not used for %s: %s", source, call, reason)


def fallbacks() -> List[Dict[str, Any]]:
    """Return the fallbacks: source, call, reason and count of each."""
    with _lock:
        return [
            {"source": source, "call": call, "reason": reason, "count": count}
            for (source, call, reason), count in _fallbacks.items()
        ]


def unreached(where: str, reason: str) -> None:
    """Count that a bias had no effect, and log it once.

    where: "attention_bias(...)", or the class that received the bias. reason: why it had no effect.
    """
    with _lock:
        _unreached[where, reason] = _unreached.get((where, reason), 0) + 1
    once(("unreached", where, reason), "warning", "%s has no effect: %s", where, reason)


def unreached_biases() -> List[Dict[str, Any]]:
    """Return the biases that had no effect: where, reason and count of each."""
    with _lock:
        return [
            {"where": where, "reason": reason, "count": count}
            for (where, reason), count in _unreached.items()
        ]


def factorized(where: str, rank: int, relative_error: float, reason: str) -> None:
    """Record the latest factorisation of a dense bias.

    reason: why the dense bias was used instead of its factors; empty if the factors were used.
    """
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
    """Return the latest factorisation of each place where a dense bias was factorised."""
    with _lock:
        return [dict(entry) for entry in _factorized.values()]


def reset() -> None:
    """Reset the counters and the keys of logged lines (for tests and between measured phases)."""
    with _lock:
        calls.clear()
        _fallbacks.clear()
        _factorized.clear()
        _unreached.clear()
        _logged_keys.clear()
