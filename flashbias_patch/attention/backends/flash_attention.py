"""An installed flash-attn, of any generation that takes the call, under a low-rank bias.

The bias and key padding become columns of q and k (kernels/concatenate.py). Flash-attn is never
required; it is looked for once, and only when a call could use it.

    generation  import                                    runs on            dropout  head dims of q
    and v 4           flash_attn.cute.flash_attn_func           Hopper, Blackwell  no       may
    differ 3           flash_attn_interface.flash_attn_func      Hopper             no       made
    equal by padding v 2           flash_attn.flash_attn_func                Ampere and later   yes
    made equal by padding v
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import AttentionInputs
from ..kernels.concatenate import PADDING_COLUMNS, Plan, join
from ..selfcheck import possible
from ..values import any_far, rows_without_keys, shift_of
from . import reference
from .base import Backend
from .sdpa import HALF, segments_to_factors

ALIGN = 16  # of the joined head dim: the tensor cores' step, so narrower columns cost the same
# With 40 / 32, 40 / 40 and 48 / 32 columns of q and v, 4.0.0b36 gave a gradient of q on Hopper that
# is wrong by 1.3 relative, with 32 / 32 and 64 / 64 a correct one
# (benchmarks/results/attention_peers_h200.json, flash_backend_h200.json).
HOPPER_BACKWARD_ALIGN = 64
V_ALIGN = 8  # 16 bytes: every generation needs head dims of such multiples
INSTALL = "pip install flashbias-patch[fa4]"


class Generation(NamedTuple):
    number: int
    module: str
    dropout: bool
    unequal: bool  # q's head dim may differ from v's
    head_dims: Dict[int, int]  # compute capability (major) -> largest head dim


GENERATIONS = (
    Generation(4, "flash_attn.cute", False, True, {9: 256, 10: 128, 11: 128}),
    Generation(3, "flash_attn_interface", False, False, {9: 256}),
    Generation(2, "flash_attn", True, False, {8: 256, 9: 256, 10: 256, 12: 256}),
)


class FlashAttention(Backend):
    name = "flash"
    dtypes = HALF
    supports_empty = False
    supports_dense = supports_mask = supports_windows = False  # they have no low-rank factors
    supports_key_padding_grad = False
    compiled = True

    def why_not(self, inputs: AttentionInputs) -> List[str]:
        reasons = super().why_not(inputs)
        if reasons:
            return reasons
        for generation in GENERATIONS:
            own = _reasons_of(generation, inputs)
            if not own:
                return []
            reasons.append(f"FlashAttention-{generation.number}: {'; '.join(own)}")
        return reasons

    def other_reasons(self, inputs: AttentionInputs) -> List[str]:
        if _capability(inputs.q.device) is None:
            return [f"needs an NVIDIA GPU, got {inputs.q.device}"]
        return []

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        generation = next(g for g in GENERATIONS if not _reasons_of(g, inputs))
        # flash-attn and `join` read memory, which does not know of PyTorch's negative bit.
        inputs = inputs.with_tensors(
            [None if tensor is None else tensor.resolve_neg() for tensor in inputs.tensors()]
        )
        original, masked_rows = inputs, _fully_masked_rows(inputs)
        padding = inputs.key_padding
        if padding is not None and padding.dtype is not torch.bool:
            # Half precision cannot represent keys that are all at -1e9: they are shifted by the
            # sample's largest.
            top = padding.amax(-1, keepdim=True)
            if possible(inputs) and any_far(top):
                return reference.backend(original)
            inputs = inputs._replace(key_padding=padding - shift_of(top))
        q, k, scale = _columns(inputs)
        head_dim = inputs.v.shape[-1]
        v = _padded(inputs.v, _v_width(inputs, q.shape[-1]) if generation.unequal else q.shape[-1])
        arguments: Dict[str, Any] = {"softmax_scale": scale}
        if torch.are_deterministic_algorithms_enabled():
            arguments["deterministic"] = True
        if inputs.dropout_p:
            arguments["dropout_p"] = inputs.dropout_p
        out = _function(generation.module)(q, k, v, **arguments)  # type: ignore[operator]
        if isinstance(out, tuple):  # generations 3 and 4 return the logsumexp too
            out, *_ = out
        if masked_rows is not None:
            out = out.masked_fill(masked_rows, 0.0)
        cut: Tensor = out[..., :head_dim] if out.shape[-1] != head_dim else out
        return cut


backend = FlashAttention()


def _reasons_of(generation: Generation, inputs: AttentionInputs) -> List[str]:
    """Reasons why this generation does not take the call. Imports it only if there is no other
    reason."""
    reasons = []
    if inputs.dropout_p and not generation.dropout:
        reasons.append("no support for dropout")
    major = _capability(inputs.q.device)
    largest = generation.head_dims.get(major or 0)
    if largest is None:
        known = ", ".join(f"{capability}.x" for capability in generation.head_dims)
        reasons.append(f"only for compute capability {known}, this GPU has {major}.x")
    else:
        width, v_width = _widest(inputs), inputs.v.shape[-1]
        if width > largest:
            reasons.append(f"head dim {width} (the bias' columns included), at most {largest}")
        if v_width > (largest if generation.unequal else inputs.q.shape[-1]):
            limit = f"at most {largest}" if generation.unequal else "at most that of q"
            reasons.append(f"head dim {v_width} of v, {limit}")
    if not reasons:
        function = _function(generation.module)
        if isinstance(function, str):
            reasons.append(function)
    return reasons


def _capability(device: torch.device) -> Optional[int]:
    """Compute capability (major) of a CUDA device, None of any other. Tests replace it."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return _major(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=None)
def _major(index: int) -> int:
    major, _ = torch.cuda.get_device_capability(index)
    return major


@functools.lru_cache(maxsize=None)
def _function(module: str) -> Union[Callable[..., Any], str]:
    """flash_attn_func of that module, or the reason why there is none."""
    missing = f"{module}.flash_attn_func is not installed ({INSTALL})"
    try:
        function: Optional[Callable[..., Any]] = getattr(
            importlib.import_module(module), "flash_attn_func", None
        )
    except ModuleNotFoundError as error:
        top = module.split(".")[0]
        if error.name is None or error.name == module or error.name == top:
            return missing
        return f"{module} needs the missing module {error.name} ({INSTALL})"
    except Exception as error:  # built for another torch or CUDA: OSError, RuntimeError, ...
        return f"{module} does not import: {type(error).__name__}: {error}"
    # This package's stand-in for flash_attn would call this backend again.
    ours = __name__.split(".")[0] + "."
    if function is None or (getattr(function, "__module__", None) or "").startswith(ours):
        return missing
    return function


def _fully_masked_rows(inputs: AttentionInputs) -> Optional[Tensor]:
    """(B|1, M|1, H|1, 1) bool: the fully masked rows; None if there are none."""
    padding, weights, visible = inputs.key_padding, inputs.segment_weights, None
    if padding is not None:
        visible = ~padding if padding.dtype is torch.bool else padding != float("-inf")
    if weights is not None and inputs.segment_lengths is not None:
        visible = None if visible is None else visible[:, None, None]
        return rows_without_keys(weights, inputs.segment_lengths, visible).transpose(1, 2)
    return None if visible is None else ~visible.any(-1)[:, None, None, None]


def _columns(inputs: AttentionInputs) -> Tuple[Tensor, Tensor, float]:
    """(q', k', softmax scale)."""
    q, k, padding, scale = inputs.q, inputs.k, inputs.key_padding, inputs.scale
    if _as_it_is(inputs):
        return q, k, scale
    weights = inputs.segment_weights
    if weights is not None and inputs.q_factor is None and scale > 0:
        # Divided in float32 before they are split, so that no digit is lost.
        power, remainder = _power_and_remainder(scale)
        inputs = segments_to_factors(inputs._replace(segment_weights=weights / remainder))
        plan = Plan(power, 1.0, False, remainder, _rounded(_count(inputs), inputs))
    else:
        inputs = segments_to_factors(inputs)
        plan = _plan(inputs)
    q, k = join(q, k, inputs.q_factor, inputs.k_factor, padding, plan)
    return q, k, plan.softmax_scale


def _plan(inputs: AttentionInputs) -> Plan:
    """The plan that splits the scale between q and softmax_scale. Scores are (q' . k') *
    softmax_scale; write scale = r * 2**e with 1 <= r < 2.

    Multiplying q by the scale rounds q, and so every score, once more in half precision.
    Multiplying q by 2**e is exact and r is applied by flash-attn in float32, if the factors are
    divided by r. Dividing rounds them: what that loses goes into columns of its own, which are free
    where they fit into the padding. Where they do not fit, the scale goes into q: dividing alone
    would lose the digits that split factors keep.
    """
    columns = _count(inputs)
    width = _rounded(columns, inputs)
    if inputs.scale > 0:
        power, remainder = _power_and_remainder(inputs.scale)
        low = inputs.rank if remainder != 1.0 else 0
        if columns + low <= width:
            return Plan(power, 1.0 / remainder, low > 0, remainder, width)
    return Plan(inputs.scale, 1.0, False, 1.0, width)


def _as_it_is(inputs: AttentionInputs) -> bool:
    """True if nothing is added to q and k."""
    no_terms = (
        inputs.q_factor is None and inputs.segment_weights is None and inputs.key_padding is None
    )
    D = inputs.q.shape[-1]
    aligned = (
        D == 32 or D % HOPPER_BACKWARD_ALIGN == 0 if _hopper_backward(inputs) else D % V_ALIGN == 0
    )
    return no_terms and inputs.scale > 0 and aligned


def _count(inputs: AttentionInputs) -> int:
    return inputs.q.shape[-1] + inputs.rank + (0 if inputs.key_padding is None else PADDING_COLUMNS)


def _widest(inputs: AttentionInputs) -> int:
    """The joined head dim, at most: segment weights become up to three columns each."""
    if _as_it_is(inputs):
        return inputs.q.shape[-1]
    segments = 0 if inputs.segment_weights is None else 3 * inputs.segment_weights.shape[-1]
    return _rounded(_count(inputs) + segments, inputs)


def _rounded(columns: int, inputs: AttentionInputs) -> int:
    return columns + -columns % (HOPPER_BACKWARD_ALIGN if _hopper_backward(inputs) else ALIGN)


def _v_width(inputs: AttentionInputs, width: int) -> int:
    """v's head dim for generation 4, which may differ from q's but in Hopper's backward pass."""
    if _hopper_backward(inputs):
        return max(width, inputs.v.shape[-1])
    return inputs.v.shape[-1] + -inputs.v.shape[-1] % V_ALIGN


def _hopper_backward(inputs: AttentionInputs) -> bool:
    return inputs.needs_grad and _capability(inputs.q.device) == 9


@functools.lru_cache(maxsize=64)
def _power_and_remainder(scale: float) -> Tuple[float, float]:
    mantissa, exponent = math.frexp(scale)  # mantissa in [0.5, 1)
    return math.ldexp(1.0, exponent - 1), 2.0 * mantissa


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] != width else x
