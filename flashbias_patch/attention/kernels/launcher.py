"""From tensors to kernel launches: `prepare`, `forward`, `backward`, and the steps that they keep
for calls of the same class."""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .cached_launch import Kept, signature
from .launcher_backward import ByKeys, ByQueries, Made, Rows, differentiable, shapes_of
from .launcher_backward import Needs as Needs
from .launcher_backward import Passed as Passed
from .launcher_forward import Forward, Outputs, Prepare
from .launcher_sums import Sums
from .problem import Problem, on_device, scales_q, unit_last
from .side_by_side import Streams, side_by_side, streams_of
from .tiles import Config, first_working

OVERLAPPED = 1 << 26  # scores, B * H * M * N, from which backward's two kernels run side by side
ONLY_V = Needs(False, False, True, False, False, False, False)
_prepared, _forwards, _backwards = Kept(), Kept(), Kept()


class BackwardSteps(NamedTuple):
    """The steps of a backward pass, in their order."""

    rows: Any  # Rows or WindowRows
    steps: List[Any]  # by keys, by queries, or one of the two
    sums: Sums


def prepare(
    q: Tensor, q_factor: Optional[Tensor], k_factor: Optional[Tensor], scale: float
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """q, times scale if the scale goes into q, and the factors with their columns zero-padded to a
    power of two of at least 16 (not copied if they have that many)."""
    if q_factor is None or k_factor is None:
        if scales_q(q_factor, scale):
            q = torch.mul(
                q, scale, out=torch.empty(q.shape, dtype=q.dtype, device=q.device)
            )  # contiguous, as promised
        return q, q_factor, k_factor
    given = unit_last(q), unit_last(q_factor), unit_last(k_factor)
    key = signature(given), scale
    copy = _prepared.find(key) or _prepared.keep(key, Prepare(*given, scale))
    with on_device(q):
        return copy(*given)


def prepared(q: Tensor, q_factor: Tensor, k_factor: Tensor, scale: float) -> Optional[Prepare]:
    """The step that `prepare` keeps for such tensors; None if it would copy these first."""
    step: Optional[Prepare] = _prepared.find((signature((q, q_factor, k_factor)), scale))
    return step


def forward_step(problem: Problem, seed: Optional[Tensor], training: bool) -> Any:
    """The step that `forward` keeps for such a call."""
    return _forwards.find((_class_of(problem, (seed,)), training))


def backward_steps(problem: Problem, needs: Needs, passed: Passed) -> Any:
    """(the steps that `backward` keeps for such a call, their `passed`, whether they run on two
    streams); None if there are no steps."""
    passed = passed._replace(grad_out=unit_last(passed.grad_out))
    kept = _backwards.find(_backward_class(problem, needs, passed))
    if kept is None or problem.k.shape[1] == 1:
        return None
    return kept, passed, len(kept.steps) > 1 and _streams(problem) is not None


def forward(problem: Problem, seed: Optional[Tensor], training: bool) -> Outputs:
    """out (B, M, H, D); its rounding error if out is half precision and `training`; its logsumexp
    (problem.lse_shape), float32, in log2 units, +inf for a row without keys. `seed` (1,) int64 with
    dropout, else None.

    Backward's delta, the sum of grad_out * out over a row, is taken from the unrounded output: its
    error is common to all keys, and so adds up in gradients that are sums over keys.
    """
    q = problem.q
    if not q.numel() or not problem.k.numel():
        B, M, _, H, D = problem.sizes
        return (
            q.new_zeros(B, M, H, D, dtype=problem.out_dtype),
            None,
            torch.full(problem.lse_shape, math.inf, device=q.device),
        )
    key = _class_of(problem, (seed,)), training
    step = _forwards.find(key)
    with on_device(q):
        if step is not None:
            outputs: Outputs = step(problem, seed)
            return outputs

        def attempt(config: Config) -> Outputs:
            make: Any = Forward
            if problem.windows is not None:
                from .launcher_windows import WindowForward as make
            step = make(problem, training, config)
            answer: Outputs = step(problem, seed)
            _forwards.keep(key, step)
            return answer

        return first_working(problem.key("forward"), attempt)


def backward(problem: Problem, needs: Needs, passed: Passed) -> Tuple[Optional[Tensor], ...]:
    """Gradients in the order of Needs, each of its tensor's shape, None for those not needed."""
    k = problem.k
    if not problem.q.numel() or not k.numel():
        return _zeros(problem, needs)
    if k.shape[1] == 1:
        # The one key's weight is 1 (or 0) whatever its score, so that only v has a gradient:
        # exactly, where the difference of two rounded numbers would not be.
        q_grad, k_grad, v_grad, *others = _zeros(problem, needs._replace(v=False))
        if needs.v:
            _, _, v_grad, *_ = _gradients(problem, ONLY_V, passed)
        return (q_grad, k_grad, v_grad, *others)
    return _gradients(problem, needs, passed)


def _gradients(problem: Problem, needs: Needs, passed: Passed) -> Tuple[Optional[Tensor], ...]:
    passed = passed._replace(grad_out=unit_last(passed.grad_out))
    key = _backward_class(problem, needs, passed)
    kept = _backwards.find(key)
    with on_device(problem.q):
        if kept is None:
            kept, made = _settle(problem, needs, passed)
            _backwards.keep(key, kept)
        else:
            made = _repeat(kept.steps, problem, passed, kept.rows(problem, passed))
        grads = kept.sums({name: part for parts, _ in made for name, part in parts.items()})
    return tuple([grads[name] if need else None for name, need in zip(needs._fields, needs)])


def _settle(problem: Problem, needs: Needs, passed: Passed) -> Tuple[BackwardSteps, List[Made]]:
    """One backward pass by the first tile shapes that work: its steps, and the parts of gradients
    that they wrote."""
    make_rows: Any
    by_keys: Any
    by_queries: Any
    if problem.windows is None:
        make_rows, by_keys, by_queries = Rows, ByKeys, ByQueries
    else:
        from .launcher_windows import WindowByKeys, WindowByQueries, WindowRows

        make_rows, by_keys, by_queries = WindowRows, WindowByKeys, WindowByQueries
    before = make_rows(problem, passed)
    rows = before(problem, passed)

    def attempt(make: Callable[..., Any], config: Config) -> Tuple[Any, Made]:
        step = make(problem, needs, passed, before.padded, config)
        made = step.make(problem)
        step.run(problem, passed, rows, made)
        return step, made

    done: List[Tuple[Any, Made]] = []
    if needs.by_keys:
        done.append(first_working(problem.key("keys"), functools.partial(attempt, by_keys)))
    if needs.by_queries:
        done.append(first_working(problem.key("queries"), functools.partial(attempt, by_queries)))
    steps = [step for step, _ in done]
    sums = Sums({name: total for step in steps for name, total in step.sums.items()})
    return BackwardSteps(before, steps, sums), [made for _, made in done]


def _repeat(steps: List[Any], problem: Problem, passed: Passed, rows: Tensor) -> List[Made]:
    made = [step.make(problem) for step in steps]
    streams = _streams(problem) if len(steps) > 1 else None
    if streams is None:
        for step, own in zip(steps, made):
            step.run(problem, passed, rows, own)
        return made
    (keys, queries), (of_keys, of_queries) = steps, made
    side_by_side(
        streams,
        lambda stream: queries.run(problem, passed, rows, of_queries, stream),
        lambda: keys.run(problem, passed, rows, of_keys),
    )
    return made


def _streams(problem: Problem) -> Optional[Streams]:
    """The streams of backward's two kernels; None if running them side by side gains less than it
    costs the host."""
    B, M, N, H, _ = problem.sizes
    if not problem.q.is_cuda or B * H * M * N < OVERLAPPED:
        return None
    return streams_of(problem.q.device)


def _class_of(problem: Problem, others: Tuple[Optional[Tensor], ...]) -> Tuple[Any, ...]:
    """Everything that a problem's launches depend on, except the addresses of its tensors and of
    `others`."""
    (
        q, k, v, q_factor, k_factor, weights, lengths, dense, mask, padding, dropout_p, scale, rank,
        windows, out_dtype,
    ) = problem  # fmt: skip
    tensors = q, k, v, q_factor, k_factor, weights, dense, mask, padding, *others
    local = None if windows is None else windows.signature()
    return signature(tensors), lengths, dropout_p, scale, rank, local, out_dtype


def _backward_class(problem: Problem, needs: Needs, passed: Passed) -> Tuple[Any, ...]:
    return _class_of(problem, passed), needs, torch.are_deterministic_algorithms_enabled()


def _zeros(problem: Problem, needs: Needs) -> Tuple[Optional[Tensor], ...]:
    return tuple(
        torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        if need and tensor is not None
        else None
        for need, shape, tensor in zip(needs, shapes_of(problem), differentiable(problem))
    )
