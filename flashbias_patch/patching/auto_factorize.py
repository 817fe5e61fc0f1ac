"""FLASHBIAS_RANK and FLASHBIAS_ENERGY: factorise dense biases that reach a patched layer.

A learned bias changes slowly, so each module's factorisation starts from its previous one. A
recomputation under checkpointing must compute the same factors: it is recognised by its tensor, and
starts from the state that its forward started from.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .. import settings, telemetry
from .._torch_internals import is_inference
from ..bias import AttentionBias, DenseBias, factorize
from ..bias.factorize import FactorState


class _Last(NamedTuple):
    tensor: Any  # weak reference to the dense bias
    version: int
    started_from: Optional[FactorState]
    state: Optional[FactorState]


_last: weakref.WeakKeyDictionary[Any, _Last] = weakref.WeakKeyDictionary()


def enabled() -> bool:
    """Return True if a rank or an energy is set; by default a dense bias is computed exactly."""
    read = settings.current()
    return read.rank is not None or read.energy is not None


def low_rank(module: Any, original: Any, dense: DenseBias) -> AttentionBias:
    """Return `dense` in low-rank form, or `dense` if the error exceeds FLASHBIAS_MAX_ERROR.

    original: the object that the caller passed as the bias; a recomputation passes the same.
    """
    read = settings.current()
    last = _last.get(module)
    tensor = original if isinstance(original, Tensor) else dense.tensor
    # Nothing is recomputed under inference_mode, and a state from there could not be used in
    # training.
    inference = is_inference(tensor) or torch.is_inference_mode_enabled()
    again = (
        not inference
        and last is not None
        and last.tensor() is tensor
        and last.version == tensor._version
    )
    start = None if last is None else last.started_from if again else last.state
    # An explicitly lower energy implies its own error; factorize knows.
    limit = (
        None
        if read.energy is not None and (1 - read.energy) ** 0.5 > read.max_error
        else read.max_error
    )
    result = factorize(dense, read.rank, read.energy, warm_start=start, max_error=limit)
    if not inference:
        _last[module] = _Last(weakref.ref(tensor), tensor._version, start, result.state)
    telemetry.factorized(
        type(module).__qualname__, result.rank, result.relative_error, result.reason
    )
    return result.bias
