"""Attention maps: attention weights of selected queries, and pictures of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .painting import paint
    from .recording import AttentionMap, attention_map

__all__ = ["AttentionMap", "attention_map", "paint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import painting, recording

    return painting.paint if name == "paint" else getattr(recording, name)
