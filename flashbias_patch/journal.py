"""What happened in this process: calls by backend, fallbacks with reasons, and each log line only once."""
from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from typing import Any, Dict, Hashable, List, Optional, Set, Tuple

logger = logging.getLogger("flashbias_patch")

calls: Counter = Counter()
_fallbacks: Dict[Tuple[str, str, str], int] = {}
_said: Set[Hashable] = set()
_lock = threading.Lock()


def configure(level: Optional[str]) -> None:
    """FLASHBIAS_LOG_LEVEL: log to stderr from this level on, and nowhere else (never twice)."""
    if level is None:
        return
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def once(key: Hashable, level: int, message: str, *args: Any) -> None:
    """Log `message` the first time `key` is seen. Other ranks than 0 say who they are."""
    if key in _said:
        return
    with _lock:
        if key in _said:
            return
        _said.add(key)
    rank = os.environ.get("RANK", "0")
    logger.log(level, message if rank == "0" else f"[rank {rank}] {message}", *args)


def fallback(source: str, call: str, reason: str, level: int = logging.WARNING) -> None:
    """Count that `source` (a backend or a seam) could not answer a class of `call`, and why; log it once."""
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


def reset() -> None:
    """Forget counts and said lines (tests, and between measured phases)."""
    with _lock:
        calls.clear()
        _fallbacks.clear()
        _said.clear()
