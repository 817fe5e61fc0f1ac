"""One kernel run by itself on one call: its class, its results for comparison, its time on the
GPU."""

from __future__ import annotations

import math
import time
from typing import Any, Callable, List, Sequence

import torch
from torch import Tensor

from .._torch_internals import cuda_sleep
from . import selfcheck
from .inputs import AttentionInputs
from .kernels import autograd, launcher, problem
from .kernels.arguments import Arguments
from .kernels.tiles import KERNELS, Key
from .signature import signature_of

SMALL = selfcheck.LONG  # odd lengths, which exercise the tails of tiles
LEAST = 1 << 24  # scores, B * H * M * N, below which launching takes longer than the kernels


def long(inputs: AttentionInputs) -> bool:
    """True if such a call takes longer in the kernels than in launching them."""
    B, M, H, _ = inputs.q.shape
    return B * M * H * inputs.k.shape[1] >= LEAST


def class_of(inputs: AttentionInputs, kernel: str = KERNELS[0]) -> Key:
    """The key under which the tile shape for this call is kept."""
    others = inputs.dense, inputs.mask, inputs.key_padding
    segments = inputs.segment_weights is not None
    return problem.key_of(kernel, inputs.q, inputs.rank, segments, others, inputs.dropout_p)


def small_call(inputs: AttentionInputs) -> AttentionInputs:
    """A call of the same class with odd lengths, at which a tile with a wrong tail fails."""
    small = selfcheck.problem_of(signature_of(inputs), inputs.rank, *SMALL)
    return small._replace(dropout_p=inputs.dropout_p)


def cuda_times(function: Callable[[], Any], repeats: int) -> List[float]:
    """Milliseconds that each of `repeats` runs took on the GPU.

    They are queued behind a pause: otherwise the GPU would wait for the host between short kernels,
    and be timed at that.
    """
    began = time.perf_counter()
    function()
    host = time.perf_counter() - began
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    if cuda_sleep is not None:
        cuda_sleep(
            int(2e9 * min(0.1, 1.5 * host * repeats))
        )  # clock cycles; no GPU has more than 2e9 per second
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


class Trial:
    """One call, and how each kernel is run on it by itself."""

    def __init__(self, inputs: AttentionInputs) -> None:
        parts: List[Any] = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
        given = AttentionInputs(*parts)
        self.problem = autograd.problem_of(
            Arguments(
                given.q,
                given.k,
                given.v,
                given.q_factor,
                given.k_factor,
                given.segment_weights,
                (given.segment_lengths or ()) if given.segment_weights is not None else (),
                given.dense,
                given.mask,
                given.key_padding,
                given.dropout_p,
                given.scale,
            )
        )
        self.counts = long(inputs)
        q = inputs.q
        self.generator = torch.Generator(q.device).manual_seed(0)
        self.seed = (
            torch.full((1,), 20, dtype=torch.int64, device=q.device) if inputs.dropout_p else None
        )
        dense = inputs.dense is not None and inputs.dense.requires_grad
        nothing = launcher.Needs(False, False, False, False, False, False, False)
        self.needs = {
            "keys": nothing._replace(
                k=True, v=True, k_factor=given.k_factor is not None, dense=dense
            ),
            "queries": nothing._replace(
                q=True,
                q_factor=given.q_factor is not None,
                weights=given.segment_weights is not None,
            ),
        }
        self._forward: Any = None
        self._grad_out: Any = None

    def prepare(self, kernel: str) -> None:
        """Compute the tensors that the backward kernels need."""
        if kernel != "forward" and self._forward is None:
            self._forward = launcher.forward(self.problem, self.seed, True)
            out, _, _ = self._forward
            noise = torch.randn(out.shape, device=out.device, generator=self.generator)
            self._grad_out = noise.to(out.dtype)

    def run(self, kernel: str) -> Any:
        if kernel == "forward":
            return launcher.forward(self.problem, self.seed, True)
        out, low, lse = self._forward
        passed = launcher.Passed(self._grad_out, out, low, lse, self.seed)
        return launcher.backward(self.problem, self.needs[kernel], passed)

    def results(self, kernel: str) -> List[Tensor]:
        """The results, which may not depend on the tile shape except for rounding."""
        found = self.run(kernel)
        if kernel != "forward":
            return [grad for grad in found if grad is not None]
        out, low, lse = found
        return [out if low is None else out.float() + low.float(), lse]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference, in L2 or at the worst element; not a number where only one
    is."""
    worst = [torch.zeros((), device=expected[0].device)]
    for one, other in zip(found, expected):
        one, other = one.float(), other.float()
        gap = torch.where(
            one == other, torch.zeros_like(one), one - other
        )  # a row without keys has inf twice
        size = other.masked_fill(other.isinf(), 0.0)
        tiny = 1e-30
        worst += [gap.norm() / (size.norm() + tiny), gap.abs().max() / (size.abs().max() + tiny)]
    together = torch.stack(worst)
    return math.nan if bool(together.isnan().any()) else float(together.max())
