"""The order in which backends are tried: a table measured by benchmarks/order.py, per GPU,
features and size of a call.

For a GPU or features that were not measured, the order is that of selection.MODULES.
"""

from __future__ import annotations

import functools
import itertools
from typing import Dict, List, Sequence, Tuple

import torch

from .inputs import AttentionInputs

Rows = Sequence[Tuple[int, Tuple[str, ...]]]

UNBOUNDED = 1 << 62
# compute capability (major) -> (half precision, features, with gradient) -> rows of (scores B*H*M*N
# up to, fastest first)
TABLE: Dict[int, Dict[Tuple[bool, str, bool], Rows]] = {
    9: {  # NVIDIA H200
        (False, "", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "", True): ((12387627, ("sdpa", "triton")), (UNBOUNDED, ("triton", "sdpa"))),
        (False, "dropout", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "dropout", True): ((12387627, ("sdpa", "triton")), (UNBOUNDED, ("triton", "sdpa"))),
        (False, "dropout mask", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "dropout mask", True): (
            (12387627, ("sdpa", "triton")),
            (UNBOUNDED, ("triton", "sdpa")),
        ),
        (False, "dropout padding", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "dropout padding", True): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "factors", False): (
            (12387627, ("sdpa", "triton")),
            (UNBOUNDED, ("triton", "sdpa")),
        ),
        (False, "factors", True): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "mask", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "mask", True): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "padding", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "padding", True): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "segments", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (False, "segments", True): ((UNBOUNDED, ("triton", "sdpa")),),
        (True, "", False): (
            (88299127, ("sdpa", "triton", "flash")),
            (429446275, ("triton", "flash", "sdpa")),
            (UNBOUNDED, ("flash", "triton", "sdpa")),
        ),
        (True, "", True): (
            (50730085, ("sdpa", "flash", "triton")),
            (88299127, ("flash", "sdpa", "triton")),
            (176598255, ("triton", "flash", "sdpa")),
            (UNBOUNDED, ("flash", "triton", "sdpa")),
        ),
        (True, "dropout", False): ((50730085, ("sdpa", "triton")), (UNBOUNDED, ("triton", "sdpa"))),
        (True, "dropout", True): (
            (50730085, ("sdpa", "triton")),
            (79118165, ("triton", "sdpa")),
            (88299127, ("sdpa", "triton")),
            (UNBOUNDED, ("triton", "sdpa")),
        ),
        (True, "dropout mask", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (True, "dropout mask", True): (
            (12387627, ("sdpa", "triton")),
            (UNBOUNDED, ("triton", "sdpa")),
        ),
        (True, "dropout padding", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (True, "dropout padding", True): ((UNBOUNDED, ("triton", "sdpa")),),
        (True, "factors", False): (
            (88299127, ("triton", "sdpa", "flash")),
            (429446275, ("triton", "flash", "sdpa")),
            (UNBOUNDED, ("flash", "triton", "sdpa")),
        ),
        (True, "factors", True): (
            (176598255, ("triton", "sdpa", "flash")),
            (UNBOUNDED, ("triton", "flash", "sdpa")),
        ),
        (True, "mask", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (True, "mask", True): ((12387627, ("sdpa", "triton")), (UNBOUNDED, ("triton", "sdpa"))),
        (True, "padding", False): ((UNBOUNDED, ("triton", "sdpa")),),
        (True, "padding", True): ((12387627, ("sdpa", "triton")), (UNBOUNDED, ("triton", "sdpa"))),
        (True, "segments", False): (
            (88299127, ("triton", "sdpa", "flash")),
            (429446275, ("triton", "flash", "sdpa")),
            (UNBOUNDED, ("triton", "sdpa", "flash")),
        ),
        (True, "segments", True): (
            (50730085, ("triton", "sdpa", "flash")),
            (79118165, ("triton", "flash", "sdpa")),
            (429446275, ("triton", "sdpa", "flash")),
            (UNBOUNDED, ("triton", "flash", "sdpa")),
        ),
    }
}


def shorten(rows: Rows) -> Rows:
    """Join neighbours of the same order into one row, up to halfway (in powers of two) to the next
    row; the last row has no bound."""
    bounds: List[int] = []
    orders: List[Tuple[str, ...]] = []
    following = [scores for scores, _ in rows[1:]]
    for (scores, names), larger in itertools.zip_longest(rows, following):
        bound = UNBOUNDED if larger is None else int((scores * larger) ** 0.5)
        if orders and orders[-1] == names:
            bounds[-1] = bound
        else:
            bounds.append(bound)
            orders.append(names)
    return tuple(zip(bounds, orders))


def fastest(inputs: AttentionInputs, grad: bool) -> Tuple[str, ...]:
    """Backend names, the fastest first, as measured for these features and this size; () where it
    was not measured."""
    q = inputs.q
    if q.device.type != "cuda":
        return ()
    has = (
        inputs.dropout_p > 0,
        inputs.q_factor is not None,
        inputs.mask is not None,
        inputs.key_padding is not None,
        inputs.segment_weights is not None,
        inputs.dense is not None,
        inputs.windows is not None,
        inputs.window_mask is not None,
    )
    B, M, H, _ = q.shape
    scores = B * H * M * inputs.k.shape[1]
    for bound, names in _rows(q.device.index or 0, q.dtype is not torch.float32, has, grad):
        if scores <= bound:
            return names
    return ()


@functools.lru_cache(maxsize=1024)
def _rows(index: int, half: bool, has: Tuple[bool, ...], grad: bool) -> Rows:
    major, _ = torch.cuda.get_device_capability(index)
    measured = TABLE.get(major, {})
    words = ("dropout", "factors", "mask", "padding", "segments", "dense", "windows", "window_mask")
    return measured.get(
        (half, " ".join(word for word, there in zip(words, has) if there), grad), ()
    )
