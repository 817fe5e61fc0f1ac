"""Plans of the fused operator: a repeated call is launched by the addresses of its tensors alone.

The first call of a signature (autograd.py, launcher.py) makes a Problem of its tensors, and steps
of the Problem. If the kernels use the tensors as they are, a later call of the same signature needs
their addresses only: its plan allocates tensors and launches the steps, in order. Small calls wait
for the processor, whose time this saves.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import problem as pb
from .arguments import Arguments, ForwardResult
from .cached_launch import Launch
from .launcher_backward import ByKeys, Needs, Passed, Rows
from .launcher_forward import Forward, Keys, Prepare
from .launcher_sums import AT_ONCE, Sum, Sums
from .problem import Problem
from .side_by_side import side_by_side, streams_of

Signed = Tuple[Tuple[Any, ...], List[int]]

# The tensors that `signed` gets, in order; a plan's names for them.
FORWARD = ("q", "k", "v", "q_factor", "k_factor", "weights", "dense", "mask", "padding")
BACKWARD = (*FORWARD, *Passed._fields)

SCRATCH = "scratch"
ALIGN = 128  # bytes: parts of SCRATCH begin where a cache line does

_layout: Callable[[Tensor], Tuple[Any, ...]] = operator.attrgetter("shape", "dtype", "device")


def signed(tensors: Sequence[Optional[Tensor]]) -> Signed:
    """(the properties that a launch depends on, as in cached_launch.signature; the addresses of the
    tensors that are not None)."""
    given: Tuple[Tensor, ...] = tuple(filter(pb.is_given, tensors))  # type: ignore[arg-type]
    addresses = [*map(Tensor.data_ptr, given)]
    odd = functools.reduce(operator.or_, addresses) & 15
    return (
        tuple(map(pb.is_given, tensors)), tuple(map(_layout, given)),
        tuple(map(Tensor.stride, given)),
        tuple([address & 15 for address in addresses]) if odd else None,
    ), addresses  # fmt: skip


class Draft:
    """A plan while it is made: its tensors by name, and the names that each launch takes.

    A call's q is passed in place of a tensor that the call does not have. The kernel does not read
    it there.
    """

    def __init__(self, names: Sequence[str], given: Sequence[Optional[Tensor]]) -> None:
        q, *_ = given
        assert q is not None
        self.device, self.q = q.device, "q"
        self.given = [name for name, tensor in zip(names, given) if tensor is not None]
        self.makes: Dict[str, Callable[[], Tensor]] = {}
        self.parts: Dict[str, Tuple[str, int]] = {}  # name: (of which tensor, bytes from there)
        self.room = 0  # bytes of SCRATCH
        self.tables: Dict[str, Tensor] = {}
        self.launches: List[Tuple[Launch, Sequence[str]]] = []
        # The index of the keys kernel, after which the queries kernel comes, if they run on two
        # streams.
        self.side_by_side: Optional[int] = None
        self.sums: Dict[str, Sum] = {}  # of the parts that PyTorch sums

    def make(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, zeros: bool = False
    ) -> None:
        make = torch.zeros if zeros else pb.empty
        self.makes[name] = functools.partial(make, shape, dtype=dtype, device=self.device)

    def scratch(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """A tensor that no result is: a part of one allocation, which the pass frees at its end."""
        self.parts[name] = SCRATCH, self.room
        self.room += pb.cdiv(math.prod(shape) * dtype.itemsize, ALIGN) * ALIGN
        self.make(SCRATCH, (self.room // 4,), torch.float32)

    def launch(self, launch: Launch, *names: str) -> None:
        has = {*self.given, *self.makes, *self.parts, *self.tables}
        self.launches.append((launch, [name if name in has else self.q for name in names]))

    def blocks(self, keys: Keys, padding: Optional[Tensor], of: str) -> Tuple[str, str, str, str]:
        """The names of BLOCKS, ENDS, ORDER and COUNTS of the step `of`, as Keys has them."""
        if keys.table is None:
            return (self.q,) * 4
        blocks, ends, order, counts = (
            f"{of} {name}" for name in ("blocks", "ends", "order", "counts")
        )
        self.tables[blocks], self.tables[ends] = keys.table
        if keys.visible is None or padding is None:
            return blocks, ends, ends, ends
        numbers, at_counts = keys.room(padding)
        self.scratch(order, (numbers,), torch.int32)
        self.parts[counts] = order, 4 * at_counts
        self.launch(keys.visible, "padding", blocks, order, counts)
        return blocks, ends, order, counts


class Plan:
    """A pass of repeated calls: tensors to make, and launches on these and on the given ones.

    A launch picks its tensors from one list of addresses: of the given tensors, of the made ones,
    of parts of these, and of tables, which are kept.
    """

    def __init__(self, draft: Draft, results: Sequence[str]) -> None:
        names = [*draft.given, *draft.makes, *draft.parts, *draft.tables]
        places = {name: place for place, name in enumerate(names)}
        self.makes = [*draft.makes.values()]
        self.parts = [(places[name], offset) for name, offset in draft.parts.values()]
        self.held = [*draft.tables.values()]
        self.tables = [table.data_ptr() for table in self.held]
        self.device = draft.device
        launches = [
            (launch, operator.itemgetter(*[places[name] for name in taken]))
            for launch, taken in draft.launches
        ]
        at = len(launches) if draft.side_by_side is None else draft.side_by_side
        # One after another; keys and queries, if they run on two streams; then the rest.
        self.launches, self.two, self.last = (
            launches[:at],
            launches[at : at + 2],
            launches[at + 2 :],
        )
        made = {name: place for place, name in enumerate(draft.makes)}
        self.sums = [(made[name], total) for name, total in draft.sums.items()]
        # None lies behind the last one.
        self.results = operator.itemgetter(*[made.get(name, len(made)) for name in results])

    def __call__(self, at: List[int], stream: int) -> Any:
        """The tensors named by `results`, None for those not made. at: the addresses of the given
        tensors, from `signed`."""
        made: List[Optional[Tensor]] = [make() for make in self.makes]
        at += map(Tensor.data_ptr, made)  # type: ignore[arg-type]
        for place, offset in self.parts:
            at += (at[place] + offset,)
        at += self.tables
        for launch, pick in self.launches:
            launch.at(stream, pick(at))
        if self.two:
            self._on_two_streams(at, stream)
        for place, total in self.sums:
            made[place] = total.plain(made[place])  # type: ignore[arg-type]
        made += (None,)
        return self.results(made)

    def _on_two_streams(self, at: List[int], stream: int) -> None:
        (keys, of_keys), (queries, of_queries) = self.two
        side_by_side(
            streams_of(self.device),
            lambda other: queries.at(other, of_queries(at)),
            lambda: keys.at(stream, of_keys(at)),
        )
        for launch, pick in self.last:
            launch.at(stream, pick(at))


def _compiled(draft: Draft) -> bool:
    return all(launch.run is not None for launch, _ in draft.launches)


def _same(given: Sequence[Optional[Tensor]], used: Sequence[Optional[Tensor]]) -> bool:
    """True if the kernels use the caller's tensors themselves, not copies."""
    return all(
        (a is None) == (b is None) and (a is None or b is None or a.data_ptr() == b.data_ptr())
        for a, b in zip(given, used)
    )


def forward_plan(
    inputs: Arguments, problem: Problem, step: Any, prepare: Optional[Prepare], training: bool
) -> Optional[Plan]:
    """The plan of a forward pass that was computed without one; None if other tensors were copied
    than those of `prepare`, which copies q and the factors if there are factors.

    Its results are `out`, and in training the other fields of ForwardResult too.
    """
    if type(step) is not Forward or problem.scaled and prepare is None:
        return None
    unchanged = ["k", "v", "weights", "dense", "mask", "padding"]
    if not problem.scaled:
        unchanged.append("q")
    given, used = ([getattr(of, name) for name in unchanged] for of in (inputs, problem))
    if not _same(given, used):
        return None
    draft = Draft(FORWARD, [getattr(inputs, name) for name in FORWARD])
    dtype = problem.q.dtype
    q, q_factor, k_factor, out, lse = "q", "q_factor", "k_factor", "out", "lse"
    make = draft.make if training else draft.scratch
    if prepare is not None:
        draft.q = q = "scaled_q"
        make(q, problem.q.shape, dtype)
        if prepare.padded:
            q_factor, k_factor = "padded_q_factor", "padded_k_factor"
            make(q_factor, prepare.q_factor_shape, dtype)
            make(k_factor, prepare.k_factor_shape, dtype)
        if prepare.launches:
            draft.launch(
                prepare.copy, "q", q, "q_factor", q_factor, "k_factor", k_factor
            )  # fmt: skip
    if problem.dropout_p > 0:
        draft.makes["seed"] = functools.partial(
            torch.randint, 1 << 62, (1,), dtype=torch.int64, device=draft.device
        )
    draft.make("out", step.shape, step.dtype)
    if step.has_low:
        make("low", step.shape, step.dtype)
    make("lse", step.rows, torch.float32)
    if step.splits > 1:
        out, lse = "parts of out", "parts of lse"
        draft.scratch(out, (step.splits, *step.shape), torch.float32)
        draft.scratch(lse, (step.splits, *step.rows), torch.float32)
    blocks, ends, order, counts = draft.blocks(step.keys, problem.padding, "forward")
    draft.launch(
        step.attend, q, "k", "v", q_factor, k_factor, "weights", ends, "dense", "mask", "padding",
        blocks, order, counts, "seed", out, "low", lse,
    )  # fmt: skip
    if step.splits > 1:
        draft.launch(step.combine, out, lse, "out", "low", "lse")
    return Plan(draft, ForwardResult._fields) if _compiled(draft) else None


def backward_plan(
    given: Sequence[Optional[Tensor]],
    problem: Problem,
    passed: Passed,
    needs: Needs,
    kept: Tuple[Any, Sequence[Any], Sums],
    two_streams: bool,
) -> Optional[Plan]:
    """The plan of a backward pass that was computed without one: the rows, a launch over the keys,
    one over the queries, and the sums. None if its tensors were copied.

    given: the tensors of BACKWARD, with the copies that forward made. passed: as the kernels got
    it. kept, two_streams: of launcher.backward_steps.
    """
    before, steps, sums = kept
    q, k, v, q_factor, k_factor, weights, _, dense, mask, padding, *_ = problem
    used = (q, k, v, q_factor, k_factor, weights, dense, mask, padding, passed.grad_out)
    if type(before) is not Rows or not _same(given, used):
        return None
    draft = Draft(BACKWARD, given)
    low = "out" if passed.low is None else "low"
    draft.scratch("rows", before.shape, before.dtype)
    draft.launch(before.launch, "out", low, "grad_out", "lse", "weights", "q_factor", "rows")
    all_blocks = []
    for step in steps:
        for name, total in step.sums.items():
            if name in sums.plain or total.zeros:
                draft.make(f"gradient of {name}", total.parts, total.kept, total.zeros)
            else:
                draft.scratch(f"gradient of {name}", total.parts, total.kept)
        by_keys = type(step) is ByKeys
        all_blocks.append(
            draft.blocks(
                step.keys, None if by_keys else padding, "keys'" if by_keys else "queries'"
            )
        )
    if two_streams:
        draft.side_by_side = len(draft.launches)
    for step, (blocks, ends, order, counts) in zip(steps, all_blocks):
        written = {name: f"gradient of {name}" for name in step.sums}
        if type(step) is ByKeys:
            draft.launch(
                step.launch, "q", "k", "v", "q_factor", "k_factor", "dense", "mask", "padding",
                blocks, "seed", "grad_out", "rows",
                *[written.get(name, "q") for name in ("k", "v", "k_factor", "dense")],
            )  # fmt: skip
        else:
            draft.launch(
                step.launch, "q", "k", "v", "q_factor", "k_factor", "weights", ends, "dense",
                "mask", "padding", blocks, order, counts, "seed", "grad_out", "lse", "rows",
                *[written.get(name, "q") for name in ("q", "q_factor", "weights")],
            )  # fmt: skip
    results = {name: f"gradient of {name}" for name in needs._fields}
    for name in sums.plain:
        if not sums.sums[name].whole:
            draft.sums[results[name]] = sums.sums[name]
    for names, launch in sums.launches:
        pairs: List[str] = []
        for name in names:
            total, parts = sums.sums[name], results[name]
            results[name] = f"sum of {name}"
            draft.make(results[name], total.shape, total.dtype)
            pairs += [parts, results[name]]
        draft.launch(launch, *pairs, *pairs[:2] * (AT_ONCE - len(names)))
    return Plan(draft, [*results.values()]) if _compiled(draft) else None
