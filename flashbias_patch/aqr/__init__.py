"""Adaptive query routing: turn weights over modalities into an AttentionBias with a learned scale.

Names are loaded on first use (PEP 562), because `options` is used before torch is imported.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .geometry import Geometry, Places, places, provide_geometry
    from .options import Options
    from .router import AdaptiveQueryRouter, Locality, Routing, record_routing
    from .supervision import ModalityDrop, drop_modalities, supervision_loss
    from .window_router import WindowRouter

_HOMES = {
    "geometry": ("Geometry", "Places", "places", "provide_geometry"),
    "options": ("Options",),
    "router": ("AdaptiveQueryRouter", "Locality", "Routing", "record_routing"),
    "supervision": ("ModalityDrop", "drop_modalities", "supervision_loss"),
    "window_router": ("WindowRouter",),
}

__all__ = [
    "AdaptiveQueryRouter",
    "Geometry",
    "Locality",
    "ModalityDrop",
    "Options",
    "Places",
    "Routing",
    "WindowRouter",
    "drop_modalities",
    "places",
    "provide_geometry",
    "record_routing",
    "supervision_loss",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
