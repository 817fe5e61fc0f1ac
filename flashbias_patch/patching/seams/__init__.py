"""The seams: the wrappers for each kind of class, one file per seam.

outer.py, core.py, dual_core.py, layer.py: attentions and the decoder layers around them.
transformer_constructor.py, transformer.py, head.py: adaptive query routing.
bias_generator.py: a module that makes a window bias as a tensor.
inner_attention.py, inner_forward.py, functional_attention.py: torch's own attention inside an outer
forward.
"""

from __future__ import annotations

from typing import Callable, Dict

from .base import Seam as Seam
from .bias_generator import GeneratorSeam
from .core import CoreSeam
from .dual_core import DualCoreSeam
from .head import HeadSeam, LossSeam, QueryEmbedSeam
from .layer import LayerSeam
from .outer import OuterSeam
from .transformer import TransformerSeam
from .transformer_constructor import ConstructorSeam

SEAMS: Dict[str, Callable[[type], Seam]] = {
    "outer": OuterSeam,
    "core": CoreSeam,
    "dual core": DualCoreSeam,
    "layer": LayerSeam,
    "transformer": TransformerSeam,
    "transformer constructor": ConstructorSeam,
    "head": HeadSeam,
    "head queries": QueryEmbedSeam,
    "head loss": LossSeam,
    "bias generator": GeneratorSeam,
}
