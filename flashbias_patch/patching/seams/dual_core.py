"""The seam of FlashMHA's later generation: query/key/value or q/k/v, a dense bias as `attn_bias`,
torch's SDPA inside.

    forward(query=None, key=None, value=None, q=None, k=None, v=None, attn_mask=None,
            key_padding_mask=None, attn_bias=None, **kwargs)

Batch first; biases are (B, M, N), (B*H, M, N), (B, H, M, N) or, as such repositories hand them on,
(M, B, N). How a fork reads boolean masks, and what it returns beside its output, is not known. So
calls with boolean masks or key padding run the original, and before the first other one a small
call is compared with it.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from ... import settings
from ..._torch_internals import autocast
from ...attention import dispatch
from ...attention.api import attention_output
from ...attention.recovery import errors
from ...attention.selfcheck import undisturbed
from .. import call_adapter, route, unreachable
from ..call_adapter import Bias, check_lengths
from ..exporting import exporting
from . import core
from .base import Args, Kwargs
from .comparison import integers, plain_attributes
from .original_code import note_original

NAMES = (("query", "q"), ("key", "k"), ("value", "v"))
MASKS = ("attn_mask", "attn_bias")
BIASED = (
    "a bias of flashbias_patch cannot be exported through this generation of FlashMHA: hand "
    "it on as attn_bias"
)
QUERIES, KEYS = 3, 5  # of the small call
BLIND = "its output projection is zero or next to it, so that a comparison shows nothing yet"
KEPT = 256  # verdicts: a module may count in an integer what the comparison does not see


class Verdict(NamedTuple):
    """The result of the comparison: the form of what the class returns, or the reason why its
    original code runs."""

    returned: Optional[Callable[[Tensor], Any]] = None  # output -> what the forward returns
    reason: Optional[str] = None


class Sequences(NamedTuple):
    """query, key and value as a call has them."""

    query: Any
    key: Any
    value: Any


class DualCoreSeam(core.CoreSeam):
    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        known = (
            *(name for pair in NAMES for name in pair),
            *MASKS,
            "key_padding_mask",
            "attention_bias",
        )
        self.options = self.parameters.defaults_without(known)
        self.checking = False
        self.verdicts: Dict[Tuple[Any, ...], Verdict] = {}  # by kind of module and call
        self.counters: Set[str] = set()  # integer attributes that a forward changes

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        if self.checking:
            return wrapped(*args, **kwargs)
        args, kwargs, own = call_adapter.take_biases(self.parameters, args, kwargs)
        sequences = self._sequences(args, kwargs)
        opened = route.current()
        if opened is None:
            opened, own = core.new_route(module, own, sequences.query, sequences.key)
        elif opened.biases:
            unreachable.remember(module)
        opened.reached = True
        masks = [self.parameters.get(name, args, kwargs) for name in MASKS]
        if exporting():
            if own or opened.biases:
                raise NotImplementedError(BIASED)
            return wrapped(*args, **kwargs)
        why = self._unsupported(module, sequences, masks, args, kwargs)
        if why is None:
            returned, why = self._verdict(wrapped, module, sequences.query)
            if returned is not None:
                biases = (*own, *(mask for mask in masks if mask is not None))
                try:
                    return returned(self._output(module, sequences, opened, biases))
                except dispatch.NoBackendError as error:
                    if own or opened.biases or settings.current().strict:
                        raise
                    why = str(error)
        assert why is not None
        note_original(self.name, why, opened, own)
        return wrapped(*args, **kwargs)

    def _sequences(self, args: Args, kwargs: Kwargs) -> Sequences:
        sequences = []
        for name, short_name in NAMES:
            sequence = self.parameters.get(name, args, kwargs)
            if sequence is None:
                sequence = self.parameters.get(short_name, args, kwargs)
            sequences.append(sequence)
        return Sequences(*sequences)

    def _unsupported(
        self, module: Any, sequences: Sequences, masks: List[Any], args: Args, kwargs: Kwargs
    ) -> Optional[str]:
        if not all(isinstance(sequence, Tensor) and sequence.dim() == 3 for sequence in sequences):
            return "its query, key and value are not all given as (B, L, E)"
        if self.parameters.get("key_padding_mask", args, kwargs) is not None:
            return "key padding of this generation is not supported"
        if any(
            mask is not None and not mask.is_floating_point()
            for mask in masks
            if isinstance(mask, Tensor)
        ):
            return "boolean masks of this generation are not supported"
        if set(kwargs) - set(self.parameters.position):
            return (
                f"{', '.join(sorted(set(kwargs) - set(self.parameters.position)))} is not supported"
            )
        return self._unknown_option(args, kwargs) or core.why_unsupported(module, sequences.query)

    def _output(
        self, module: Any, sequences: Sequences, opened: route.Route, biases: Tuple[Bias, ...]
    ) -> Tensor:
        q, k, v = sequences
        check_lengths(q, k, v, batch_first=True)
        heads = call_adapter.project(
            q, k, v, module.in_proj_weight, module.in_proj_bias, module.num_heads
        )
        queries, _, _ = heads
        B, M, H, D = queries.shape
        N = k.shape[1]
        bias = opened.total_bias(biases, B, H, M, N) if biases or opened.biases else None
        out = attention_output(
            *heads,
            bias,
            dropout_p=_dropout_of(module),
            dtype=call_adapter.compute_dtype(queries.dtype),
            fitted=True,
        )
        projected: Tensor = module.out_proj(out.reshape(B, M, H * D))
        return projected

    def _verdict(self, wrapped: Callable[..., Any], module: Any, query: Tensor) -> Verdict:
        key = self._key(module, query)
        if key not in self.verdicts:
            if query.is_cuda and torch.cuda.is_current_stream_capturing():
                return Verdict(reason="a CUDA graph is captured")
            before = dict(integers(module))
            verdict = self._judge(wrapped, module, query)
            self.counters |= {name for name, value in integers(module) if before.get(name) != value}
            if verdict.reason == BLIND:
                return verdict
            if len(self.verdicts) >= KEPT:
                self.verdicts.clear()
            key = self._key(module, query)
            self.verdicts[key] = verdict
        return self.verdicts[key]

    def _key(self, module: Any, query: Tensor) -> Tuple[Any, ...]:
        return (
            type(module),
            plain_attributes(module),
            tuple(each for each in integers(module) if each[0] not in self.counters),
            module.in_proj_weight.shape,
            module.num_heads,
            module.in_proj_bias is None,
            module.in_proj_weight.dtype,
            query.dtype,
            query.device.type,
            torch.is_autocast_enabled(),
        )

    def _judge(self, wrapped: Callable[..., Any], module: Any, query: Tensor) -> Verdict:
        modes = [(each, each.training) for each in module.modules()]
        casting = torch.is_autocast_enabled()
        self.checking = True
        try:
            for each, _ in modes:
                each.training = False
            with undisturbed(query.device), torch.no_grad(), autocast(
                query.device.type, enabled=casting
            ):
                return self._compare(wrapped, module, query)
        except Exception as error:
            if not errors.survivable(error):
                raise
            return Verdict(reason=f"its check failed: {errors.first_line(error)}")
        finally:
            self.checking = False
            for each, mode in modes:
                each.training = mode

    def _compare(self, wrapped: Callable[..., Any], module: Any, like: Tensor) -> Verdict:
        draw = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(like.device, like.dtype)

        width = module.in_proj_weight.shape[1]
        sequences = Sequences(
            drawn(2, QUERIES, width), drawn(2, KEYS, width), drawn(2, KEYS, width)
        )
        constant = module.out_proj(
            torch.zeros_like(drawn(1, 1, module.in_proj_weight.shape[0] // 3))
        )
        returned: Optional[Callable[[Tensor], Any]] = None
        for bias in (None, drawn(2, QUERIES, KEYS)):
            more = {} if bias is None else {"attn_bias": bias}
            first, second = (
                wrapped(**dict(zip(names, sequences)), **more)
                for names in ([name for name, _ in NAMES], [short for _, short in NAMES])
            )
            ours = self._output(
                module, sequences, route.Route(module, ()), () if bias is None else (bias,)
            )
            kind, others, returned = type(first).__name__, [], _output_alone
            if isinstance(first, tuple):
                (first, *others), (second, *_) = first, second
                returned = _OutputAndNone(len(others))
            if not isinstance(first, Tensor) or any(one is not None for one in others):
                return Verdict(reason=f"it returns {kind}")
            tolerance = 2e-2 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-4
            rounding = torch.finfo(ours.dtype).eps * largest(first)
            by_query = largest(first - first.mean(1, keepdim=True))
            if not by_query > 64 * rounding and largest(ours - first) <= 64 * rounding:
                return Verdict(reason=BLIND)
            for other in (first, second):
                gap = largest(ours.double() - other.double())
                allowed = tolerance * largest(other - constant) + 8 * rounding
                if other.dtype != ours.dtype or not gap <= allowed:
                    return Verdict(reason=f"its output is not that of attention (off by {gap:.2g})")
        return Verdict(returned)


def largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().amax())


def _output_alone(out: Tensor) -> Tensor:
    return out


class _OutputAndNone:
    """Makes a tuple of an output and `count` times None."""

    def __init__(self, count: int) -> None:
        self.rest = (None,) * count

    def __call__(self, out: Tensor) -> Tuple[Any, ...]:
        return (out, *self.rest)


def _dropout_of(module: Any) -> float:
    dropout = getattr(module, "dropout", 0.0)
    if isinstance(dropout, nn.Module):
        return float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
    return float(dropout) if module.training else 0.0
