"""Adaptive query routing: weights over modalities -> AttentionBias, scaled by a learned bias_scale."""
from __future__ import annotations

from .geometry import Geometry, Places, places, provide_geometry
from .options import Options
from .router import AdaptiveQueryRouter, Locality, Routing, record_routing
from .supervision import ModalityDrop, drop_modalities, supervision_loss

__all__ = ["AdaptiveQueryRouter", "Geometry", "Locality", "ModalityDrop", "Options", "Places", "Routing",
           "drop_modalities", "places", "provide_geometry", "record_routing", "supervision_loss"]
