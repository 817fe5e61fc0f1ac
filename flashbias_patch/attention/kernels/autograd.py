"""`fused_attention`: the kernels as one differentiable operator, registered with torch.library
where torch has it."""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from ...bias.grids import WindowMaskParts, WindowParts
from . import cached_call, launcher
from . import window_tables as win
from .cached_launch import Kept
from .problem import (
    Problem,
    aligned_rows,
    as_bytes,
    block_columns,
    keeps_apart,
    scales_q,
    unit_last,
)
from .recompute import Call, differentiable_backward, plain_backward

log = logging.getLogger("flashbias_patch")
_told = False
Copies = Sequence[Optional[Tensor]]
Made = Tuple[
    Tensor,
    Optional[Tensor],
    Tensor,
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
]
# the arguments of _forward: twelve, and with windows seven more (window_tables.arguments)
Inputs = Any
PLAIN = 12
_forward_plans, _backward_plans = Kept(), Kept()  # cached_call.py, by the signatures of the tensors


def _recompute(call: Call, grad_out: Tensor, error: BaseException) -> Tuple[Any, ...]:
    global _told
    if not _told:
        _told = True
        log.warning(
            "the fused backward pass failed (%s); gradients are recomputed by plain PyTorch, "
            "slower",
            error,
        )
    return plain_backward(call, grad_out)


# on_failure(call, grad_out, error) -> the eight gradients
OnFailure = Callable[[Call, Tensor, BaseException], Tuple[Any, ...]]


def _either(new: Optional[Tensor], old: Any) -> Any:
    return old if new is None else new


def _problem(
    q: Tensor, k: Tensor, v: Tensor, q_factor: Optional[Tensor], k_factor: Optional[Tensor],
    weights: Optional[Tensor],
    lengths: Sequence[int], dense: Optional[Tensor], mask: Optional[Tensor],
    padding: Optional[Tensor],
    dropout_p: float, scale: float, copies: Optional[Copies] = None,
    windows: Optional[win.Windows] = None,
) -> Problem:  # fmt: skip
    """The call as the kernels want it; `copies` are what forward made of q, q_factor, k_factor for
    that."""
    rank = 0 if q_factor is None else q_factor.shape[-1]
    if copies is None:
        q, q_factor, k_factor = launcher.prepare(q, q_factor, k_factor, scale)
    else:
        new_q, new_qf, new_kf = copies
        q, q_factor, k_factor = (
            _either(new_q, q),
            _either(new_qf, q_factor),
            _either(new_kf, k_factor),
        )
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    dense = None if dense is None else aligned_rows(unit_last(dense))
    mask, padding = as_bytes(mask), as_bytes(padding)
    mask = None if mask is None else aligned_rows(mask)
    q_factor, k_factor, weights = (
        None if t is None else unit_last(t) for t in (q_factor, k_factor, weights)
    )
    lengths = tuple(lengths)
    return Problem(
        q,
        k,
        v,
        q_factor,
        k_factor,
        weights,
        lengths,
        dense,
        mask,
        padding,
        dropout_p,
        scale,
        rank,
        windows,
    )


def _windows(inputs: Inputs) -> Optional[win.Windows]:
    return (
        win.make(*inputs[PLAIN:]) if any(t is not None for t in inputs[PLAIN : PLAIN + 3]) else None
    )


def _forward(inputs: Inputs, training: bool) -> Made:
    """out, what it lost by rounding, lse, the dropout seed, and the copies made of q, q_factor,
    k_factor; None for what was not made."""
    q, q_factor, dropout_p = inputs[0], inputs[3], inputs[10]
    place, plan = None, None
    stream = cached_call.stream_of(q) if len(inputs) == PLAIN else None
    if stream is not None:
        signature, addresses = cached_call.signed((*inputs[:6], *inputs[7:10]))
        place = signature, tuple(inputs[6]), dropout_p, inputs[11], training
        plan = _forward_plans.find(place)
        if plan:
            made: Made = plan(inputs, addresses, stream)
            return made
    problem = _problem(*inputs[:PLAIN], None, _windows(inputs))  # type: ignore[call-arg]
    seed = (
        torch.randint(1 << 62, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0 else None
    )
    out, low, lse = launcher.forward(problem, seed, training)
    padded = q_factor is not None and block_columns(problem.rank) != problem.rank
    factors = (problem.q_factor, problem.k_factor) if padded else (None, None)
    if place is not None and plan is None:
        prepare = (
            None if q_factor is None else launcher.prepared(q, q_factor, inputs[4], inputs[11])
        )
        plan = cached_call.ForwardPlan.of(
            inputs, problem, launcher.forward_step(problem, seed, training), prepare
        )
        _forward_plans.keep(place, plan or False)  # False: always the long way
    return (out, low, lse, seed, problem.q if problem.scaled else None, *factors)


def _backward(
    grad_out: Tensor,
    made: Made,
    inputs: Inputs,
    needs: Sequence[bool],
    on_failure: OnFailure = _recompute,
) -> Tuple[Optional[Tensor], ...]:
    """The eight gradients, None for each that is not needed."""
    out, low, lse, seed = made[:4]
    try:
        plain = (
            not any(t is not None for t in inputs[PLAIN : PLAIN + 3])
            if len(inputs) > PLAIN
            else True
        )
        place, plan = None, None
        stream = cached_call.stream_of(grad_out) if plain else None
        if stream is not None:
            new_q, new_qf, new_kf = made[4:]
            given = (
                inputs[0] if new_q is None else new_q, *inputs[1:3],
                inputs[3] if new_qf is None else new_qf,
                inputs[4] if new_kf is None else new_kf, inputs[5], *inputs[7:10],
            )  # fmt: skip
            signature, addresses = cached_call.signed((*given, grad_out, out, low, lse, seed))
            rank = 0 if inputs[3] is None else inputs[3].shape[-1]
            place = (
                signature, tuple(inputs[6]), *inputs[10:12], rank, tuple(needs),
                internals.deterministic()
            )  # fmt: skip
            plan = _backward_plans.find(place)
            if plan:
                gradients: Tuple[Optional[Tensor], ...] = plan(given[0], addresses, stream)
                return gradients
        problem = _problem(*inputs[:PLAIN], made[4:], _windows(inputs))  # type: ignore[call-arg]
        wanted, passed = launcher.Needs(*needs), launcher.Passed(grad_out, out, low, lse, seed)
        grads = launcher.backward(problem, wanted, passed)
        if place is not None and plan is None:
            kept = launcher.backward_steps(problem, wanted, passed)
            plan = kept and cached_call.BackwardPlan.of(
                given, grad_out, problem, kept[1], wanted, kept[0]
            )
            _backward_plans.keep(place, plan or False)
        return grads
    except Exception as error:
        return on_failure(_call(made, inputs, needs), grad_out, error)


def _differentiable_backward(
    grad_out: Tensor, made: Made, inputs: Inputs, needs: Sequence[bool]
) -> Tuple[Optional[Tensor], ...]:
    """As _backward, for create_graph=True and batches of gradients: by plain PyTorch."""
    return differentiable_backward(_call(made, inputs, needs), grad_out)


def _call(made: Made, inputs: Inputs, needs: Sequence[bool]) -> Call:
    """What plain PyTorch needs to know."""
    lse, seed, windows = made[2], made[3], _windows(inputs)
    seed = lse.new_empty(0, dtype=torch.int64) if seed is None else seed
    parts = (None, None) if windows is None else win.parts(windows)
    return Call(*inputs[:PLAIN], seed, tuple(needs), *parts)  # type: ignore[call-arg]


# As a registered operator: empty tensors for None, since an operator's outputs are tensors.


def _full(tensors: Iterable[Optional[Tensor]], like: Tensor) -> List[Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _registered_forward(
    *inputs: Any,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q = inputs[0]
    made = _forward(inputs, True)
    seed = q.new_empty(0, dtype=torch.int64) if made[3] is None else made[3]
    return (*_full(made[:3], q), seed, *_full(made[4:], q))  # type: ignore[return-value]


def _forward_fake(*inputs: Any) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, _, q_factor, k_factor, *_ = inputs
    dropout_p, scale = inputs[10:PLAIN]
    B, M, H, D = q.shape
    copies = [q.new_empty(q.shape) if scales_q(q_factor, scale) else q.new_empty(0)]
    for factor in (q_factor, k_factor):
        columns = 0 if factor is None else block_columns(factor.shape[-1])
        if factor is not None and columns != factor.shape[-1]:
            copies.append(factor.new_empty(*factor.shape[:3], columns))
        else:
            copies.append(q.new_empty(0))
    seed = torch.empty(1 if dropout_p > 0 else 0, dtype=torch.int64, device=q.device)
    masked = len(inputs) > PLAIN + 2 and inputs[PLAIN + 2] is not None
    lse = (B * H, M, 2) if keeps_apart(inputs[5], *inputs[7:10], masked) else (B * H, M)  # type: ignore[call-arg]
    return (
        q.new_empty(B, M, H, D),
        q.new_empty(B, M, H, D)
        if q.dtype != torch.float32 and q.numel() and k.numel()
        else q.new_empty(0),
        q.new_empty(lse, dtype=torch.float32),
        seed,
        copies[0],
        copies[1],
        copies[2],
    )


def _registered_backward(grad_out: Tensor, *rest: Any) -> List[Tensor]:
    made, inputs, needs = rest[:7], rest[7:-1], rest[-1]
    given = (made[0], *[t if t.numel() else None for t in made[1:]])
    grads = _backward(grad_out, given, inputs, needs)
    return [grad.contiguous() for grad in _full(grads, inputs[0])]


def _backward_fake(grad_out: Tensor, *rest: Any) -> List[Tensor]:
    inputs, needs = rest[7:-1], rest[-1]
    tensors = [inputs[place] for place in LEARNED]
    return [
        t.new_empty(t.shape) if need and t is not None else grad_out.new_empty(0)
        for need, t in zip(needs, tensors)
    ]


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_factor, Tensor? k_factor, Tensor? weights, int[] "
    "lengths, "
    "Tensor? dense, Tensor? mask, Tensor? padding, float dropout_p, float scale, Tensor? "
    "window_weights{none}, "
    "Tensor? window_centres{none}, Tensor? mask_centres{none}, int[] frames{empty}, int[] "
    "sides{empty}, "
    "float[] sigmas{empty}, int[] mask_sides{empty}"
)
LEARNED = (0, 1, 2, 3, 4, 5, 7, 12)  # places of what can need a gradient, in the order of Needs


def _save(ctx: Any, inputs: Inputs, output: Sequence[Optional[Tensor]]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:6], *inputs[7:10], *inputs[12:15])
    ctx.constants = (inputs[6], *inputs[10:12], *inputs[15:])


def _gradients(
    run: Callable[..., Any], ctx: Any, grad_out: Optional[Tensor], first: int = 0
) -> Tuple[Any, ...]:
    """Of the inputs; `first` is the place of q among the operator's arguments."""
    asked = ctx.needs_input_grad[first:]
    count = len(asked)
    needs = [asked[place] for place in LEARNED if place < count]
    if grad_out is None or True not in needs:
        return (None,) * count
    saved = ctx.saved_tensors
    lengths, dropout_p, scale, *static = ctx.constants
    inputs = (*saved[7:13], lengths, *saved[13:16], dropout_p, scale, *saved[16:], *static)
    grads = run(grad_out, saved[:7], inputs, needs)
    found: List[Optional[Tensor]] = [None] * count
    for place, grad in zip(LEARNED, grads):
        if place < count:
            found[place] = grad
    return tuple(found)


if hasattr(torch.library, "custom_op"):
    _names = ("flashbias_patch::fused_attention", "flashbias_patch::fused_attention_backward")
    _op: Any = torch.library.custom_op(
        _names[0], _registered_forward, mutates_args=(),
        schema="({}) -> ({})".format(_INPUTS.format(none="=None", empty="=[]"),
        ", ".join(["Tensor"] * 7)),
    )  # fmt: skip
    _op_backward = torch.library.custom_op(
        _names[1], _registered_backward, mutates_args=(),
        schema="(Tensor grad_out, Tensor out, Tensor low, Tensor lse, Tensor seed, Tensor new_q, "
               "Tensor new_qf, "
               "Tensor new_kf, {}, bool[] needs) -> Tensor[]".format(_INPUTS.format(none="",
               empty="")),
    )  # fmt: skip
    _op.register_fake(_forward_fake)
    _op_backward.register_fake(_backward_fake)

    def _run_registered(
        grad_out: Tensor, made: Sequence[Tensor], inputs: Inputs, needs: Sequence[bool]
    ) -> List[Optional[Tensor]]:
        rest: Tuple[Any, ...] = (
            None,
            None,
            None,
            [],
            [],
            [],
            [],
        )  # the arguments after PLAIN, where they were left out
        grads = _op_backward(grad_out, *made, *inputs, *rest[len(inputs) - PLAIN :], needs)
        return [grad if need else None for grad, need in zip(grads, needs)]

    _op.register_autograd(
        lambda ctx, grad, *unused: _gradients(_run_registered, ctx, grad), setup_context=_save
    )
else:
    _op = None


class _FusedAttention(internals.Function):
    @staticmethod
    def forward(ctx: Any, on_failure: OnFailure, *inputs: Any) -> Tensor:
        made = _forward(inputs, any(ctx.needs_input_grad))
        _save(ctx, inputs, made)
        ctx.on_failure = on_failure
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Optional[Tensor]) -> Any:
        if (
            torch.is_grad_enabled()
            or internals.current_transform() is not None
            or (grad_out is not None and internals.is_batch(grad_out))
        ):
            return (None, *_gradients(_differentiable_backward, ctx, grad_out, 1))
        backward = functools.partial(_backward, on_failure=ctx.on_failure)
        return (None, *_gradients(backward, ctx, grad_out, 1))


def _apply(on_failure: OnFailure, *inputs: Any) -> Tensor:
    # Small problems wait for the processor: outside a compiled graph the registered operator's
    # layers only cost.
    compiling = _op is not None and torch.compiler.is_compiling()
    out: Tensor = _op(*inputs)[0] if compiling else _FusedAttention.apply(on_failure, *inputs)
    return out


# Function.apply without the Python that looks for transforms, inside which dispatch.py computes
# otherwise.
_apply_untransformed: Callable[..., Tensor] = getattr(
    super(torch.autograd.Function, _FusedAttention), "apply", _FusedAttention.apply
)


def attend(inputs: Any, on_failure: OnFailure) -> Tensor:
    """`fused_attention` of AttentionInputs, outside compiled graphs and transforms; no autograd
    node without gradients."""
    (
        q,
        k,
        v,
        q_factor,
        k_factor,
        weights,
        lengths,
        dense,
        mask,
        padding,
        dropout_p,
        scale,
        windows,
        window_mask,
    ) = inputs
    local: Tuple[Any, ...] = ()
    if windows is not None or window_mask is not None:
        local = win.arguments(windows, window_mask)
    given = (
        q, k, v, q_factor, k_factor, weights, () if weights is None else lengths, dense, mask,
        padding, dropout_p, scale,
        *local,
    )  # fmt: skip
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or inputs.holds_grad
    ):
        return _apply_untransformed(on_failure, *given)
    return _forward(given, False)[0]


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factor: Optional[Tensor] = None,
    k_factor: Optional[Tensor] = None,
    segment_weights: Optional[Tensor] = None,
    segment_lengths: Optional[Sequence[int]] = None,
    dense: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    key_padding: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    windows: Optional[WindowParts] = None,
    window_mask: Optional[WindowMaskParts] = None,
    on_failure: OnFailure = _recompute,
) -> Tensor:
    """softmax(q k^T * scale + bias) v by the Triton kernels; differentiable in all but mask and
    key_padding.

    Shapes as AttentionInputs has them, all tensors on one device: q (B, M, H, D), k and v (B, N, H,
    D) in float16, bfloat16 or float32; q_factor (B|1, M, H|1, R), k_factor (B|1, N, H|1, R) in q's
    dtype, R <= 64; segment_weights (B|1, M, H|1, S) with segment_lengths summing to N; dense (B|1,
    H|1, M|1, N) floating; mask (B|1, H|1, M|1, N) bool, True hides; key_padding (B, N) bool (True
    hides) or floating (added). windows and window_mask as bias/grids.py has them, both on the same
    frames (window_patches.why_not says which fit), not with a dense that requires a gradient. A
    row that sees no key gives zeros. `on_failure` gives the gradients where the backward kernels
    fail (not in a compiled graph, where plain PyTorch gives them). Inputs are not validated: use
    `flash_bias_attention` for that.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lengths = list(segment_lengths or ()) if segment_weights is not None else []
    local: Tuple[Any, ...] = ()
    if windows is not None or window_mask is not None:
        local = win.arguments(windows, window_mask)
    return _apply(
        on_failure,
        q,
        k,
        v,
        q_factor,
        k_factor,
        segment_weights,
        lengths,
        dense,
        mask,
        key_padding,
        dropout_p,
        scale,
        *local,
    )
