"""The route of one call of an outer forward: the biases its core adds, and which were added."""

from __future__ import annotations

import contextvars
from typing import Any, Dict, Optional, Tuple

from torch import Tensor

from ..attention.inputs import as_bias
from ..attention.recovery import replay
from ..bias import AttentionBias, BiasTensor, DenseBias
from . import auto_factorize
from .call_adapter import Bias


class Route:
    """The biases that the core below one outer forward adds to its masks.

    Attributes:
        module: the outer module; for a core that is called on its own, the core.
        biases: those that no argument of the core can carry.
        attn_mask, key_padding_mask: as the outer forward received them. Only a flash core looks at
            them, because the flash class drops them.
        reached: whether a core was called.
        used: indices of the `biases` that were added to the scores of some core.
        misfits: index -> the error of a bias that did not fit a core's sizes. A forward with two
            attentions may hold a bias for one of them, so the error is raised only if the bias fits
            none.
        unsupported: why a core could not add the biases.
        functional: whether F.multi_head_attention_forward is computed here too
            (inner_attention.FunctionalAttention).
    """

    __slots__ = (
        "module",
        "biases",
        "attn_mask",
        "key_padding_mask",
        "reached",
        "used",
        "misfits",
        "unsupported",
        "functional",
    )

    def __init__(
        self,
        module: Any,
        biases: Tuple[Bias, ...],
        attn_mask: Any = None,
        key_padding_mask: Any = None,
    ) -> None:
        self.module = module
        self.biases = biases
        self.attn_mask = attn_mask
        self.key_padding_mask = key_padding_mask
        self.reached = False
        self.used: Tuple[int, ...] = ()
        self.misfits: Dict[int, ValueError] = {}
        self.unsupported: Optional[str] = None
        self.functional = False

    def total_bias(
        self, own: Tuple[Bias, ...], B: int, H: int, M: int, N: int
    ) -> Optional[AttentionBias]:
        """The sum of the biases that fit a core of these sizes, and of its `own`; ValueError if one
        of `own` does not."""
        total: Optional[AttentionBias] = None
        for index, bias in enumerate((*self.biases, *own)):
            try:
                term = as_bias(batch_first(bias, B, M, N), B, H, M, N)
            except ValueError as error:
                if index >= len(self.biases):
                    raise
                self.misfits[index] = error
                continue
            if index < len(self.biases) and index not in self.used:
                self.used = (*self.used, index)
            if isinstance(term, DenseBias) and auto_factorize.enabled():
                term = auto_factorize.low_rank(self.module, bias, term)
            total = term if total is None else total + term
        checkpointed = None if total is None else replay.current()
        if checkpointed is not None:
            checkpointed.note_bias()
        return total

    def absorb(self, inner: Route) -> None:
        """Merge the state of an inner route, whose biases begin with those of this one."""
        own = range(len(self.biases))
        self.reached = self.reached or inner.reached
        self.used = (
            *self.used,
            *(index for index in inner.used if index in own and index not in self.used),
        )
        self.misfits.update(
            {index: error for index, error in inner.misfits.items() if index in own}
        )
        self.unsupported = self.unsupported or inner.unsupported

    def unused(self, first: int = 0) -> Tuple[int, ...]:
        """Return the indices, from `first` on, of biases that no core added; raise the error of one
        that fits no core."""
        unused = tuple(index for index in range(first, len(self.biases)) if index not in self.used)
        for index in unused:
            if index in self.misfits:
                raise self.misfits[index]
        return unused


def batch_first(bias: Bias, B: int, M: int, N: int) -> Bias:
    """Transpose a bias (M, B, N) to (B, M, N). Where M equals B it is read as (B, M, N)."""
    if isinstance(bias, Tensor) and bias.dim() == 3 and bias.shape == (M, B, N) and M != B:
        return bias.transpose(0, 1)
    return bias


variable: contextvars.ContextVar[Optional[Route]] = contextvars.ContextVar(
    "flashbias_route", default=None
)
current = variable.get
enter = variable.set
leave = variable.reset


def is_bias(mask: Any) -> bool:
    """Return True if an argument passed as a mask is a bias: a description, or a floating tensor
    that requires a gradient."""
    return isinstance(mask, (AttentionBias, BiasTensor)) or (
        isinstance(mask, Tensor) and mask.requires_grad
    )
