"""A settled call of the fused operator: from the addresses of its tensors to the launches, with
nothing to decide.

The long way (autograd.py, launcher.py) makes a Problem of a call's tensors and steps of that.
Where the kernels take the tensors as they are, a later call of the same signature needs their
addresses alone. Such a call is a plan here: memory that is allocated and launches that follow, in
order. Small calls wait for the processor, so this is their time.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..._torch_internals import current_cuda_device, current_cuda_stream
from .arguments import Arguments, ForwardResult, new
from .cached_launch import Launch
from .launcher_backward import ByKeys, Needs, Passed, Rows
from .launcher_forward import Forward, Keys, Prepare
from .launcher_sums import Sums
from .problem import Problem

Signed = Tuple[Tuple[Any, ...], List[int]]


def signed(tensors: Sequence[Optional[Tensor]]) -> Signed:
    """(what a launch depends on of these tensors, their addresses, 0 for None): as
    cached_launch.signature."""
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    return tuple([
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, address & 15)
        for t, address in zip(tensors, addresses)
    ]), addresses  # fmt: skip


def stream_of(tensor: Tensor) -> Optional[int]:
    """The current stream of the tensor's GPU; None where another GPU is the current one."""
    if not tensor.is_cuda:
        return 0
    index = tensor.device.index
    if current_cuda_device is None or current_cuda_stream is None or current_cuda_device() != index:
        return None
    return current_cuda_stream(index)


class Blocks(NamedTuple):
    """The keys' blocks of a step (launch_forward.Keys) by address; 0 stands for q's."""

    blocks: int
    ends: int
    visible: Optional[Launch]
    shape: Tuple[int, int]

    def __call__(self, stream: int, padding: int, device: torch.device) -> Tuple[int, int, Any]:
        """Addresses of ORDER and COUNTS, and what holds their memory."""
        if self.visible is None:
            return self.ends, self.ends, None
        batch, _ = self.shape
        order = torch.empty(self.shape, dtype=torch.int32, device=device)
        counts = torch.empty((batch,), dtype=torch.int32, device=device)
        p_order, p_counts = order.data_ptr(), counts.data_ptr()
        self.visible.at(stream, padding, self.blocks, p_order, p_counts)
        return p_order, p_counts, (order, counts)


def blocks_of(keys: Keys, padding: Optional[Tensor]) -> Blocks:
    if keys.table is None:
        return Blocks(0, 0, None, (0, 0))
    batch = 0 if padding is None else padding.shape[0]
    blocks, ends = keys.table
    return Blocks(blocks.data_ptr(), ends.data_ptr(), keys.visible, (batch, keys.count))


def _compiled(*launches: Optional[Launch]) -> bool:
    return all(launch is None or launch.run is not None for launch in launches)


def _same(given: Sequence[Optional[Tensor]], used: Sequence[Optional[Tensor]]) -> bool:
    """Whether the kernels' tensors are those of the caller, where they lie."""
    return all(
        (a is None) == (b is None) and (a is None or b is None or a.data_ptr() == b.data_ptr())
        for a, b in zip(given, used)
    )


class ForwardPlan:
    """A forward pass: `prepare` copies q and the factors, where there are factors."""

    def __init__(self, problem: Problem, step: Forward, prepare: Optional[Prepare]) -> None:
        self.step, self.prepare, self.keys = step, prepare, step.keys
        self.blocks = blocks_of(step.keys, problem.padding)
        self.dropout = problem.dropout_p > 0

    @staticmethod
    def of(
        inputs: Arguments, problem: Problem, step: Any, prepare: Optional[Prepare]
    ) -> Optional[ForwardPlan]:
        """The plan of a call that the long way has computed; None where its tensors are copied
        otherwise."""
        if type(step) is not Forward or problem.scaled and prepare is None:
            return None
        names = ["k", "v", "weights", "dense", "mask", "padding"]
        if not problem.scaled:
            names.append("q")
        given, used = ([getattr(of, name) for name in names] for of in (inputs, problem))
        copied = None if prepare is None or not prepare.launches else prepare.copy
        combined = step.combine if step.splits > 1 else None
        if not _same(given, used) or not _compiled(
            step.attend, step.keys.visible, combined, copied
        ):
            return None
        return ForwardPlan(problem, step, prepare)

    def __call__(self, q: Tensor, at: Sequence[int], stream: int) -> ForwardResult:
        """at: the addresses of q, k, v, both factors, weights, dense, mask, padding."""
        step, prepare = self.step, self.prepare
        device, dtype = q.device, q.dtype
        pq, pk, pv, pqf, pkf, pw, pd, pm, pp = at
        new_q = new_qf = new_kf = low = seed = parts = part_lse = None
        if prepare is not None:
            new_q = torch.empty(q.shape, dtype=dtype, device=device)
            given, pq, new_a, new_b = pq, new_q.data_ptr(), pqf, pkf
            if prepare.padded:
                new_qf = torch.empty(prepare.q_factor_shape, dtype=dtype, device=device)
                new_kf = torch.empty(prepare.k_factor_shape, dtype=dtype, device=device)
                new_a, new_b = new_qf.data_ptr(), new_kf.data_ptr()
            if prepare.launches:
                prepare.copy.at(stream, given, pq, pqf, new_a, pkf, new_b)
            pqf, pkf = new_a, new_b
        if self.dropout:
            seed = torch.randint(1 << 62, (1,), dtype=torch.int64, device=device)
        out = torch.empty(step.shape, dtype=dtype, device=device)
        if step.has_low:
            low = torch.empty(step.shape, dtype=dtype, device=device)
        lse = torch.empty(step.rows, dtype=torch.float32, device=device)
        p_out, p_low, p_lse = out.data_ptr(), pq if low is None else low.data_ptr(), lse.data_ptr()
        to, to_lse = p_out, p_lse
        if step.splits > 1:
            parts = torch.empty((step.splits, *step.shape), dtype=torch.float32, device=device)
            part_lse = torch.empty((step.splits, *step.rows), dtype=torch.float32, device=device)
            to, to_lse = parts.data_ptr(), part_lse.data_ptr()
        blocks, ends, order, counts, held = pq, pq, pq, pq, None
        if self.blocks.blocks:
            blocks, ends = self.blocks.blocks, self.blocks.ends
            order, counts, held = self.blocks(stream, pp, device)
        step.attend.at(
            stream, pq, pk, pv, pqf or pq, pkf or pq, pw or pq, ends, pd or pq, pm or pq, pp or pq,
            blocks, order, counts,
            pq if seed is None else seed.data_ptr(), to, p_low, to_lse,
        )  # fmt: skip
        if step.splits > 1:
            step.combine.at(stream, to, to_lse, p_out, p_low, p_lse)
        del held, parts, part_lse  # until here
        result: ForwardResult = new(ForwardResult, (out, low, lse, seed, new_q, new_qf, new_kf))
        return result


class BackwardPlan:
    """A backward pass on one stream: the rows, one launch over the keys and one over the queries,
    and the sums."""

    def __init__(
        self, rows: Rows, steps: Sequence[Any], sums: Sums, problem: Problem, needs: Needs
    ) -> None:
        self.rows, self.steps, self.sums = rows, steps, sums
        self.blocks = [blocks_of(step.keys, problem.padding) for step in steps]
        self.sums_of_steps = [tuple(step.sums.items()) for step in steps]
        self.gradients = needs._fields

    @staticmethod
    def of(
        given: Sequence[Optional[Tensor]],
        grad_out: Tensor,
        problem: Problem,
        passed: Passed,
        needs: Needs,
        kept: Any,
    ) -> Optional[BackwardPlan]:
        """The plan of a call that the long way has computed; `given`: q to padding, with the copies
        that forward made."""
        rows, steps, sums = kept
        launches = [
            rows.launch,
            *(step.launch for step in steps),
            *(launch for _, launch in sums.launches),
        ]
        launches += [step.keys.visible for step in steps]
        q, k, v, q_factor, k_factor, weights, _, dense, mask, padding, *_ = problem
        used = (q, k, v, q_factor, k_factor, weights, dense, mask, padding, passed.grad_out)
        if (
            type(rows) is not Rows
            or not _same((*given, grad_out), used)
            or not _compiled(*launches)
        ):
            return None
        return BackwardPlan(rows, steps, sums, problem, needs)

    def __call__(self, q: Tensor, at: Sequence[int], stream: int) -> Tuple[Optional[Tensor], ...]:
        """The gradients, None where not needed. at: q, k, v, both factors, weights, dense, mask,
        padding, grad_out, out, low, lse, seed."""
        pq, pk, pv, pqf, pkf, pw, pd, pm, pp, p_grad, p_out, p_low, p_lse, p_seed = at
        pqf, pkf, pw, pd, pm, pp, p_seed = (
            pqf or pq,
            pkf or pq,
            pw or pq,
            pd or pq,
            pm or pq,
            pp or pq,
            p_seed or pq,
        )
        device, before = q.device, self.rows
        rows = torch.empty(before.shape, dtype=before.dtype, device=device)
        p_rows = rows.data_ptr()
        before.launch.at(stream, p_out, p_low or p_out, p_grad, p_lse, pw, pqf, p_rows)
        made: Dict[str, Tensor] = {}
        held = []
        for step, own, found in zip(self.steps, self.blocks, self.sums_of_steps):
            parts = {}
            for name, total in found:
                made[name] = tensor = total.make(q)
                parts[name] = tensor.data_ptr()
            blocks, ends, order, counts = own.blocks or pq, own.ends or pq, pq, pq
            if own.blocks:
                order, counts, memory = own(stream, pp, device)
                held += [memory]
            if type(step) is ByKeys:
                step.launch.at(
                    stream, pq, pk, pv, pqf, pkf, pd, pm, pp, blocks, p_seed, p_grad, p_rows,
                    *[parts[name] if name in parts else pq
                      for name in ("k", "v", "k_factor", "dense")],
                )  # fmt: skip
            else:
                step.launch.at(
                    stream, pq, pk, pv, pqf, pkf, pw, ends, pd, pm, pp, blocks, order, counts,
                    p_seed, p_grad, p_lse, p_rows,
                    *[parts[name] if name in parts else pq
                      for name in ("q", "q_factor", "weights")],
                )  # fmt: skip
        done = self.sums.at(made, stream)
        return tuple([done[name] if name in done else None for name in self.gradients])
