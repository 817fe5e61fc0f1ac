"""`fused_attention`: the kernels as one differentiable operator, registered with torch.library if
torch has custom_op."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, Callable, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from ...bias.grids import WindowMaskParts, WindowParts
from . import cached_call, launcher, tiles
from .arguments import NO_WINDOWS, Arguments, ForwardResult
from .cached_launch import Kept, stream_of
from .problem import (
    Problem,
    aligned_rows,
    as_bytes,
    block_columns,
    in_memory,
    is_given,
    is_negated,
    keeps_apart,
    scales_q,
    unit_last,
)
from .recompute import Call, differentiable_backward, plain_backward

# Modules of windows are imported by the first call with windows: Triton reads the source of every
# kernel when its module is imported, and half the kernels are theirs.
if TYPE_CHECKING:
    from .window_tables import Windows

log = logging.getLogger("flashbias_patch")
_told = False
# cached_call.py's, by the signatures of the tensors. Each call reads `steps` itself, with
# tiles.generation in its key: Kept.find, which compares it, is one more Python call.
_forward_plans, _backward_plans = Kept(), Kept()


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


# on_failure(call, grad_out, error) -> the eight gradients, in the order of launcher.Needs
OnFailure = Callable[[Call, Tensor, BaseException], Tuple[Any, ...]]


def _either(new: Optional[Tensor], old: Any) -> Any:
    return old if new is None else new


def problem_of(inputs: Arguments, made: Optional[ForwardResult] = None) -> Problem:
    """The call as the kernels need it; `made` has the copies of q, q_factor and k_factor that
    forward made."""
    q, k, v, q_factor, k_factor, weights, lengths, dense, mask, padding, dropout_p, scale, *_ = (
        inputs
    )
    rank = 0 if q_factor is None else q_factor.shape[-1]
    if made is None:
        q, q_factor, k_factor = launcher.prepare(q, q_factor, k_factor, scale)
    else:
        q, q_factor, k_factor = (
            _either(made.scaled_q, q),
            _either(made.padded_q_factor, q_factor),
            _either(made.padded_k_factor, k_factor),
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
        _windows(inputs),
    )


def _windows(inputs: Arguments) -> Optional[Windows]:
    weights, centres, mask_centres = (
        inputs.window_weights,
        inputs.window_centres,
        inputs.mask_centres,
    )
    if weights is None and centres is None and mask_centres is None:
        return None
    from .window_tables import make

    return make(
        weights,
        centres,
        mask_centres,
        inputs.frames,
        inputs.sides,
        inputs.sigmas,
        inputs.mask_sides,
    )


def _forward(
    inputs: Tuple[Any, ...], training: bool, out_dtype: Optional[torch.dtype] = None
) -> Tuple[Any, ...]:
    """The fields of ForwardResult. inputs: those of Arguments. out_dtype: the output's, if other
    than q's."""
    (
        q, k, v, q_factor, k_factor, weights, lengths, dense, mask, padding, dropout_p, scale,
        window_weights, window_centres, mask_centres, *_,
    ) = inputs  # fmt: skip
    terms = (
        q_factor, k_factor, weights, dense, padding, window_weights, window_centres, mask_centres,
    )  # fmt: skip
    if True in map(is_negated, filter(is_given, (q, k, v, *terms))):
        return _forward(tuple(map(in_memory, inputs)), training, out_dtype)
    plain = window_weights is None and window_centres is None and mask_centres is None
    key, plan = None, None
    stream = stream_of(q) if plain else None
    if stream is not None:
        signature, addresses = cached_call.signed(
            (q, k, v, q_factor, k_factor, weights, dense, mask, padding)
        )
        key = (
            signature, tuple(lengths), dropout_p, scale, training, out_dtype, tiles.generation,
        )  # fmt: skip
        plan = _forward_plans.steps.get(key)
        if plan:
            planned: Tuple[Any, ...] = plan(addresses, stream)
            return planned
    given = Arguments(*inputs)
    problem = problem_of(given)
    if out_dtype is not None:
        problem = problem._replace(out_dtype=out_dtype)
    seed = (
        torch.randint(1 << 62, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0 else None
    )
    out, low, lse = launcher.forward(problem, seed, training)
    padded = q_factor is not None and block_columns(problem.rank) != problem.rank
    factors = (problem.q_factor, problem.k_factor) if padded else (None, None)
    if key is not None and plan is None:
        prepare = (
            None
            if q_factor is None or k_factor is None
            else launcher.prepared(q, q_factor, k_factor, scale)
        )
        step = launcher.forward_step(problem, seed, training)
        plan = cached_call.forward_plan(given, problem, step, prepare, training)
        _forward_plans.keep(key, plan or False)  # False: always the long way
    return ForwardResult(out, low, lse, seed, problem.q if problem.scaled else None, *factors)


def _backward(
    grad_out: Tensor,
    saved: Tuple[Any, ...],
    constants: Tuple[Any, ...],
    needs: Tuple[bool, ...],
    on_failure: OnFailure = _recompute,
) -> Tuple[Optional[Tensor], ...]:
    """The eight gradients in the order of launcher.Needs, None for each that is not needed. saved,
    constants: see _save."""
    try:
        if True in map(is_negated, filter(is_given, (grad_out, *saved))):
            grad_out, saved = in_memory(grad_out), tuple(map(in_memory, saved))
        (
            out, low, lse, seed, scaled_q, padded_q_factor, padded_k_factor,
            q, k, v, q_factor, k_factor, weights, dense, mask, padding,
            window_weights, window_centres, mask_centres,
        ) = saved  # fmt: skip
        lengths, dropout_p, scale, *_ = constants
        plain = window_weights is None and window_centres is None and mask_centres is None
        key, plan = None, None
        stream = stream_of(grad_out) if plain else None
        if stream is not None:
            rank = 0 if q_factor is None else q_factor.shape[-1]
            q = q if scaled_q is None else scaled_q
            q_factor = q_factor if padded_q_factor is None else padded_q_factor
            k_factor = k_factor if padded_k_factor is None else padded_k_factor
            given = (
                q, k, v, q_factor, k_factor, weights, dense, mask, padding,
                grad_out, out, low, lse, seed,
            )  # fmt: skip
            signature, addresses = cached_call.signed(given)
            key = (
                signature, tuple(lengths), dropout_p, scale, rank, needs, internals.deterministic(),
                tiles.generation,
            )  # fmt: skip
            plan = _backward_plans.steps.get(key)
            if plan:
                planned: Tuple[Optional[Tensor], ...] = plan(addresses, stream)
                return planned
        made, inputs = _records(saved, constants)
        problem = problem_of(inputs, made)
        wanted, passed = launcher.Needs(*needs), launcher.Passed(grad_out, out, low, lse, seed)
        grads = launcher.backward(problem, wanted, passed)
        if key is not None and plan is None:
            kept = launcher.backward_steps(problem, wanted, passed)
            if kept is not None:
                steps, passed, two_streams = kept
                plan = cached_call.backward_plan(given, problem, passed, wanted, steps, two_streams)
            _backward_plans.keep(key, plan or False)
        return grads
    except Exception as error:
        return on_failure(_call(*_records(saved, constants), needs), grad_out, error)


def _differentiable_backward(
    grad_out: Tensor, saved: Tuple[Any, ...], constants: Tuple[Any, ...], needs: Tuple[bool, ...]
) -> Tuple[Optional[Tensor], ...]:
    """_backward by plain PyTorch, for create_graph=True and batches of gradients."""
    return differentiable_backward(_call(*_records(saved, constants), needs), grad_out)


def _call(made: ForwardResult, inputs: Arguments, needs: Sequence[bool]) -> Call:
    """The call as plain PyTorch needs it."""
    windows = _windows(inputs)
    bias, mask = None, None
    if windows is not None:
        from .window_tables import parts

        bias, mask = parts(windows)
    return Call(
        q=inputs.q,
        k=inputs.k,
        v=inputs.v,
        q_factor=inputs.q_factor,
        k_factor=inputs.k_factor,
        segment_weights=inputs.weights,
        segment_lengths=inputs.lengths,  # type: ignore[arg-type]  # a list in a compiled graph
        dense=inputs.dense,
        mask=inputs.mask,
        key_padding=inputs.padding,
        dropout_p=inputs.dropout_p,
        scale=inputs.scale,
        seed=made.lse.new_empty(0, dtype=torch.int64) if made.seed is None else made.seed,
        needs=tuple(needs),
        windows=bias,
        window_mask=mask,
    )


def _full(tensors: Iterable[Optional[Tensor]], like: Tensor) -> List[Tensor]:
    """Empty tensors in place of None: the outputs of a registered operator are tensors."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _registered_forward(*inputs: Any) -> Tuple[Tensor, ...]:
    made = ForwardResult(*_forward(Arguments(*inputs), True))
    seed = made.out.new_empty(0, dtype=torch.int64) if made.seed is None else made.seed
    return tuple(_full(made._replace(seed=seed), made.out))


def _forward_fake(*inputs: Any) -> Tuple[Optional[Tensor], ...]:
    given = Arguments(*inputs)
    q, k, q_factor, k_factor = given.q, given.k, given.q_factor, given.k_factor
    nothing = q.new_empty(0)
    B, M, H, _ = q.shape
    padded = []
    for factor in (q_factor, k_factor):
        columns = 0 if factor is None else block_columns(factor.shape[-1])
        if factor is not None and columns != factor.shape[-1]:
            padded.append(factor.new_empty(*factor.shape[:3], columns))
        else:
            padded.append(q.new_empty(0))
    padded_q_factor, padded_k_factor = padded
    masked = given.mask_centres is not None
    apart = keeps_apart(given.weights, given.dense, given.mask, given.padding, masked)
    has_low = q.dtype != torch.float32 and q.numel() and k.numel()
    seeds = 1 if given.dropout_p > 0 else 0
    result = ForwardResult(
        out=q.new_empty(q.shape),
        low=q.new_empty(q.shape) if has_low else nothing,
        lse=q.new_empty((B * H, M, 2) if apart else (B * H, M), dtype=torch.float32),
        seed=torch.empty(seeds, dtype=torch.int64, device=q.device),
        scaled_q=q.new_empty(q.shape) if scales_q(q_factor, given.scale) else q.new_empty(0),
        padded_q_factor=padded_q_factor,
        padded_k_factor=padded_k_factor,
    )
    return tuple(result)  # as _registered_forward: torch does not treat the two alike


def _registered_backward(
    grad_out: Tensor,
    out: Tensor,
    low: Tensor,
    lse: Tensor,
    seed: Tensor,
    scaled_q: Tensor,
    padded_q_factor: Tensor,
    padded_k_factor: Tensor,
    *rest: Any,
) -> List[Tensor]:
    *inputs, needs = rest
    copies = (low, lse, seed, scaled_q, padded_q_factor, padded_k_factor)
    made = (out, *[t if t.numel() else None for t in copies])
    saved, constants = _kept(inputs, made)
    return [
        grad.contiguous()
        for grad in _full(_backward(grad_out, saved, constants, tuple(needs)), out)
    ]


def _backward_fake(grad_out: Tensor, *rest: Any) -> List[Tensor]:
    _, _, _, _, _, _, _, *inputs, needs = rest  # without the fields of ForwardResult
    return [
        t.new_empty(t.shape) if need and t is not None else grad_out.new_empty(0)
        for need, t in zip(needs, _learnable(Arguments(*inputs)))
    ]


def _learnable(inputs: Arguments) -> Tuple[Any, ...]:
    """The arguments that can need a gradient, in the order of launcher.Needs."""
    q, k, v, q_factor, k_factor, weights, _, dense, _, _, _, _, window_weights, *_ = inputs
    return q, k, v, q_factor, k_factor, weights, dense, window_weights


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_factor, Tensor? k_factor, Tensor? weights, int[] "
    "lengths, "
    "Tensor? dense, Tensor? mask, Tensor? padding, float dropout_p, float scale, Tensor? "
    "window_weights{none}, "
    "Tensor? window_centres{none}, Tensor? mask_centres{none}, int[] frames{empty}, int[] "
    "sides{empty}, "
    "float[] sigmas{empty}, int[] mask_sides{empty}"
)


def _kept(
    inputs: Sequence[Any], made: Sequence[Optional[Tensor]]
) -> Tuple[Tuple[Any, ...], Tuple[Any, ...]]:
    """(the tensors, the constants) that a backward pass needs. inputs: the fields of Arguments;
    made: those of ForwardResult."""
    (
        q, k, v, q_factor, k_factor, weights, lengths, dense, mask, padding, dropout_p, scale,
        window_weights, window_centres, mask_centres, frames, sides, sigmas, mask_sides,
    ) = inputs  # fmt: skip
    return (
        *made, q, k, v, q_factor, k_factor, weights, dense, mask, padding,
        window_weights, window_centres, mask_centres,
    ), (lengths, dropout_p, scale, frames, sides, sigmas, mask_sides)  # fmt: skip


def _records(saved: Tuple[Any, ...], constants: Tuple[Any, ...]) -> Tuple[ForwardResult, Arguments]:
    """The records of what `_kept` gives."""
    (
        out, low, lse, seed, scaled_q, padded_q_factor, padded_k_factor,
        q, k, v, q_factor, k_factor, weights, dense, mask, padding,
        window_weights, window_centres, mask_centres,
    ) = saved  # fmt: skip
    lengths, dropout_p, scale, frames, sides, sigmas, mask_sides = constants
    return ForwardResult(
        out, low, lse, seed, scaled_q, padded_q_factor, padded_k_factor
    ), Arguments(
        q, k, v, q_factor, k_factor, weights, lengths, dense, mask, padding, dropout_p, scale,
        window_weights, window_centres, mask_centres, frames, sides, sigmas, mask_sides,
    )  # fmt: skip


def _save(ctx: Any, inputs: Sequence[Any], made: Sequence[Optional[Tensor]]) -> None:
    saved, ctx.constants = _kept(inputs, made)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)


def _gradients(
    run: Callable[..., Any], ctx: Any, grad_out: Optional[Tensor], asked: Sequence[bool]
) -> Tuple[Any, ...]:
    """The gradients of the operator's arguments; `asked`: which arguments need one."""
    (
        q, k, v, q_factor, k_factor, weights, _, dense, _, _, _, _, window_weights, *_,
    ) = asked  # fmt: skip
    needs = q, k, v, q_factor, k_factor, weights, dense, window_weights
    if grad_out is None or True not in needs:
        return (None,) * len(asked)
    grads = run(grad_out, ctx.saved_tensors, ctx.constants, needs)
    q, k, v, q_factor, k_factor, weights, dense, window_weights = grads
    return (
        q, k, v, q_factor, k_factor, weights, None, dense, None, None, None, None,
        window_weights, None, None, None, None, None, None,
    )  # fmt: skip


if hasattr(torch.library, "custom_op"):
    _NAME = "flashbias_patch::fused_attention"
    _op: Any = torch.library.custom_op(
        _NAME, _registered_forward, mutates_args=(),
        schema="({}) -> ({})".format(_INPUTS.format(none="=None", empty="=[]"),
        ", ".join(["Tensor"] * 7)),
    )  # fmt: skip
    _op_backward = torch.library.custom_op(
        _NAME + "_backward", _registered_backward, mutates_args=(),
        schema="(Tensor grad_out, Tensor out, Tensor low, Tensor lse, Tensor seed, "
               "Tensor scaled_q, Tensor padded_q_factor, Tensor padded_k_factor, "
               "{}, bool[] needs) -> Tensor[]".format(_INPUTS.format(none="", empty="")),
    )  # fmt: skip
    _op.register_fake(_forward_fake)
    _op_backward.register_fake(_backward_fake)

    def _run_registered(
        grad_out: Tensor,
        saved: Tuple[Any, ...],
        constants: Tuple[Any, ...],
        needs: Tuple[bool, ...],
    ) -> List[Optional[Tensor]]:
        made, inputs = _records(saved, constants)
        grads = _op_backward(grad_out, *made, *inputs, needs)
        return [grad if need else None for grad, need in zip(grads, needs)]

    def _setup_registered(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        # torch leaves out the last arguments where they are the schema's defaults.
        _save(ctx, Arguments(*inputs), output)

    def _backward_registered(ctx: Any, grad_out: Optional[Tensor], *unused: Any) -> Tuple[Any, ...]:
        asked = ctx.needs_input_grad
        absent = len(Arguments._fields) - len(asked)
        every = _gradients(_run_registered, ctx, grad_out, (*asked, *[False] * absent))
        return every[: len(asked)]

    _op.register_autograd(_backward_registered, setup_context=_setup_registered)
else:
    _op = None


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, on_failure: OnFailure, *inputs: Any) -> Tensor:
        made = _forward(inputs, True in ctx.needs_input_grad)
        _save(ctx, inputs, made)
        ctx.on_failure = on_failure
        out: Tensor
        out, *_ = made
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Optional[Tensor]) -> Any:
        _, *asked = ctx.needs_input_grad  # of on_failure, and of Arguments
        if (
            torch.is_grad_enabled()
            or internals.current_transform() is not None
            or (grad_out is not None and internals.is_batch(grad_out))
        ):
            return (None, *_gradients(_differentiable_backward, ctx, grad_out, asked))
        backward = functools.partial(_backward, on_failure=ctx.on_failure)
        return (None, *_gradients(backward, ctx, grad_out, asked))


def _apply(on_failure: OnFailure, inputs: Arguments) -> Tensor:
    # Small problems wait for the processor: outside a compiled graph the registered operator's
    # layers only cost.
    out: Tensor
    if _op is not None and torch.compiler.is_compiling():
        out, *_ = _op(*inputs)
    else:
        out = _FusedAttention.apply(on_failure, *inputs)  # type: ignore[no-untyped-call]
    return out


# Inside transforms dispatch.py computes otherwise.
_apply_untransformed: Callable[..., Tensor] = internals.apply_of(_FusedAttention)


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
        out_dtype,
    ) = inputs
    local: Tuple[Any, ...] = NO_WINDOWS
    if windows is not None or window_mask is not None:
        from .window_tables import arguments

        local = arguments(windows, window_mask)
    given = (
        q, k, v, q_factor, k_factor, weights, () if weights is None else lengths, dense, mask,
        padding, dropout_p, scale, *local,
    )  # fmt: skip
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or inputs.holds_grad
    ):
        return _apply_untransformed(on_failure, *given)
    out: Tensor
    out, *_ = _forward(given, False, out_dtype)
    return out


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
    out_dtype: Optional[torch.dtype] = None,
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
    row that sees no key gives zeros. out_dtype: the output is cast to it. `on_failure` gives the
    gradients where the backward kernels fail (not in a compiled graph, where plain PyTorch gives
    them). Inputs are not validated: use `flash_bias_attention` for that.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lengths = list(segment_lengths or ()) if segment_weights is not None else []
    local: Tuple[Any, ...] = NO_WINDOWS
    if windows is not None or window_mask is not None:
        from .window_tables import arguments

        local = arguments(windows, window_mask)
    given = Arguments(
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
    out = _apply(on_failure, given)
    return out if out_dtype is None else out.to(out_dtype)
