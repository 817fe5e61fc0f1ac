"""Recovery from a failed backward pass: the gradients are computed again in another way.

Without dropout plain PyTorch computes them, whatever the backend. With dropout the weights that the
forward dropped must be dropped again. The random numbers of the fused operator are known
(kernels/recompute.py). Other backends run once more from the random state of their forward; if that
fails too, no correct gradient is available.
"""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any, Callable, NoReturn, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ... import telemetry
from ..._torch_internals import OutOfMemoryError
from .. import chunked_attention, selection
from ..backends.base import Backend
from ..breaker import Phase, breakers
from ..chunked_attention import LEAST_BYTES
from ..inputs import TENSORS, AttentionInputs
from ..signature import CallSignature, signature_of
from . import blame, errors
from .blame import Blame

if TYPE_CHECKING:
    from .guard import Call

IN_CHUNKS = "out of memory in backward: gradients were computed in small chunks by plain PyTorch"
ONCE_MORE = "out of memory in backward: the cache was emptied and the call run once more"
TWICE = (
    "{} failed twice in backward or recomputation of a call with dropout ({}). No other backend "
    "can reproduce the dropout mask, so the gradient of this step is unavailable. Continue from "
    "your last checkpoint, with another FLASHBIAS_BACKEND"
)


class DropoutLostError(RuntimeError):
    """The dropout mask of a call cannot be reproduced: its backend failed twice in backward or in
    recomputation."""


def of_guarded(
    call: Call, inputs: AttentionInputs, needs: Sequence[bool], grad_out: Tensor, error: Exception
) -> Sequence[Optional[Tensor]]:
    """The gradients of a guarded call (guard.py) whose backward raised `error`, in the order of its
    operands."""
    dropout = inputs.dropout_p > 0

    def repeat(plain: AttentionInputs) -> Any:
        return call.once_more(call.operands(plain), needs, grad_out.detach())

    short = _judge(
        error,
        call.backend,
        call.name,
        inputs,
        call.signature,
        ONCE_MORE if dropout else IN_CHUNKS,
        repeat,
    )
    if dropout:
        try:
            return call.once_more(call.operands(inputs), needs, grad_out)
        except Exception as again:
            raise_failed_twice(again, call.name, inputs)
    names = [TENSORS[index] for index in call.present]
    try:
        chunks = chunked_attention.chunks_of(inputs, LEAST_BYTES if short else None)
        wanted = [*compress(names, needs)]
        gradients = chunked_attention.gradients(inputs, grad_out, wanted, chunks)
    except Exception as again:
        raise_with_advice(again, inputs)
    return [gradients.get(name) for name in names]


def of_fused(call: Any, grad_out: Tensor, error: BaseException) -> Tuple[Any, ...]:
    """The fused operator's backward raised `error`: the gradients by plain PyTorch, and the breaker
    opens.

    `call` is kernels.recompute.Call, which knows what the forward's dropout drew.
    """
    from ..kernels import recompute

    inputs = AttentionInputs(
        call.q, call.k, call.v, call.q_factor, call.k_factor, call.segment_weights,
        tuple(call.segment_lengths) or None, call.dense, call.mask, call.key_padding,
        call.dropout_p, call.scale, call.windows, call.window_mask,
    )  # fmt: skip
    candidate = selection.backend("triton")

    def repeat(plain: AttentionInputs) -> Any:
        out = candidate(plain)
        leaves = [t for t in plain.tensors() if t is not None and t.requires_grad]
        return torch.autograd.grad(out, leaves, grad_out.detach(), allow_unused=True)

    short = _judge(
        error, candidate, "triton", inputs, signature_of(inputs, grad=True), IN_CHUNKS, repeat
    )
    try:
        return recompute.plain_backward(call, grad_out, LEAST_BYTES if short else None)
    except Exception as again:
        raise_with_advice(again, inputs)


def _judge(
    error: BaseException,
    candidate: Backend,
    name: str,
    inputs: AttentionInputs,
    signature: CallSignature,
    if_short: str,
    repeat: Callable[[AttentionInputs], Any],
) -> bool:
    """True if memory ran out. Raises an error that is the caller's or not survivable; otherwise the
    circuit breaker opens at the next forward, because layers that are still recomputed in this pass
    use the backend of their forward.

    repeat: repeats the pass on other inputs.
    """
    if not errors.survivable(error):
        if errors.sticky(error):
            telemetry.once("sticky", "error", errors.STICKY_ADVICE)
        raise error
    short = errors.out_of_memory(error)
    if short:
        make_room(error, inputs)
        telemetry.fallback(name, signature.describe(), if_short)
    else:
        verdict = blame.of(error, candidate, inputs, signature, repeat)
        if verdict is Blame.CALLER:
            raise error
        if verdict is Blame.CONTEXT:
            reason = f"backward: {errors.first_line(error)} (this call only: {verdict.value})"
            telemetry.fallback(name, signature.describe(), reason)
        else:
            breakers.open(signature, name, errors.first_line(error), Phase.BACKWARD)
    selection.refuse_if_strict(inputs, signature, name, error)
    errors.forget_frames(error)
    return short


def make_room(error: BaseException, inputs: AttentionInputs) -> None:
    """Free the tensors of the failed attempt, and the cache of torch's allocator."""
    errors.forget_frames(error)
    if inputs.q.is_cuda:
        torch.cuda.empty_cache()


def raise_failed_twice(error: Exception, name: str, inputs: AttentionInputs) -> NoReturn:
    """Raise for a call with dropout whose backend failed a second time."""
    if errors.survivable(error) and not errors.out_of_memory(error):
        raise DropoutLostError(TWICE.format(name, errors.first_line(error))) from error
    raise_with_advice(error, inputs)


def raise_with_advice(error: Exception, inputs: AttentionInputs) -> NoReturn:
    """Raise the error itself, or if memory ran out, one that says which settings help."""
    if not errors.out_of_memory(error):
        raise error
    kind = MemoryError if isinstance(error, MemoryError) else OutOfMemoryError
    raise kind(errors.memory_advice(error, inputs)) from error
