"""Self-check: before its first call of a signature, a backend computes a small problem of that
signature, which is compared with float64.

Lengths are odd (less than a tile, and beyond one; on the CPU only the first), or multiples of 128
where the signature says so; operands are strided as projections leave them; a row is fully masked
where there are masks. Where terms are added, the check is repeated with values that break kernels:
rows wholly at the least finite number ("masked" without -inf) or at -200, segment weights of -inf.
Libraries, whose kernels are compiled already, get more lengths, and each gradient alone. The output
and every gradient may err by at most FACTOR times what plain PyTorch errs by in the same precision,
plus FLOOR.

With dropout, numbers are compared without it. Then the dropout itself is checked: the share of
weights that are kept, their mean, and that backward drops the weights that forward dropped.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from .. import telemetry
from ..bias import Grid, WindowMaskParts, WindowParts
from . import reference_attention
from .backends.base import Backend
from .inputs import TENSORS, AttentionInputs
from .signature import ALIGNMENT, CallSignature
from .values import shift_of

FACTOR = 4.0
FLOOR = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-5, torch.float64: 1e-6}
BATCH, HEADS = 2, 3
SHORT, LONG, ALIGNED = (37, 63), (131, 259), (ALIGNMENT, 2 * ALIGNMENT)
# Keys % 128 == 64 and % 32 == 1, and one query: where SDPA's CUDA kernels were wrong.
LIBRARY = ((12, 64), (1, 65))
DROPOUT_P = 0.3
CPU = torch.device("cpu")
LEAVES = ("q", "k", "v", "q_factor", "k_factor", "segment_weights", "dense", "window_weights")
INDICES = {name: TENSORS.index(name) for name in LEAVES}
# Columns of the grids on which windows lie: every number of keys above is a multiple of 7 or 8.
COLUMNS = 7


class Terms(enum.Enum):
    """Values of a problem's additive terms; the value of a member is what a message adds."""

    USUAL = ""
    LOW = ", rows at -200"
    LEAST = ", rows at the least finite number"


class Problem(NamedTuple):
    """Numbers of queries and keys, and values of the additive terms."""

    queries: int
    keys: int
    terms: Terms = Terms.USUAL


def possible(inputs: AttentionInputs) -> bool:
    """True if a check can run now: not while a call is traced, captured into a CUDA graph or
    transformed, nor on meta."""
    if type(inputs.q) not in (Tensor, torch.nn.Parameter) or torch.jit.is_tracing():
        return False
    if inputs.q.is_meta or inputs.q.is_cuda and internals.stream_capturing():
        return False
    return internals.current_transform() is None


def check(
    backend: Backend, signature: CallSignature, rank: int,
    evidence: Optional[Dict[str, Any]] = None, before: Optional[Callable[[], Any]] = None,
) -> Optional[str]:  # fmt: skip
    """Check a backend on small problems of a signature: the reason why it must not be used, or
    None.

    The caller's random state, grad mode, autocast, function modes and saved-tensor hooks stay as
    they are. Exceptions of the backend are raised. `evidence` gets the lengths of the problems, the
    largest error as a share of the tolerated one, and the seconds that it took. `before` runs
    first, and counts among these.
    """
    evidence = {} if evidence is None else evidence
    began = time.perf_counter()
    with undisturbed(signature.device):
        if before is not None:
            before()
        problem = _check(backend, signature, rank, evidence)
    seconds = time.perf_counter() - began
    evidence["seconds"] = round(seconds, 3)
    if seconds > 5:
        message = "%s took %.0f s to compile and be checked for %s"
        telemetry.once(
            ("slow check", backend.name, signature),
            "info", message, backend.name, seconds, signature.describe(),
        )  # fmt: skip
    return problem and f"self-check failed: {problem}"


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(internals.without_modes())
        enter(internals.all_functions_off())
        enter(torch.inference_mode(False))
        enter(torch.enable_grad())
        for kind in {"cpu", "cuda"} & {"cpu", device.type}:
            enter(internals.autocast(kind, enabled=False))
        enter(torch.autograd.set_detect_anomaly(False))
        # Inside a checkpoint, its hooks would take the check's tensors for the layer's own.
        enter(internals.uncounted_saved_tensors())
        yield


_random_lock = threading.RLock()


@contextlib.contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Random numbers of a generator of its own, always the same ones, in this thread.

    On a GPU, kernels draw from the default generator: its state is put back, and one thread at a
    time may use it. The state of the CPU's generator is not touched on the CPU, where other
    threads (augmentation, other replicas) draw too.
    """
    if device.type != "cuda" and _OwnGenerator is not None:
        with _OwnGenerator():
            yield
        return
    with _random_lock, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(
            0
        )  # not torch.manual_seed, which seeds every device there is
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(0)
        yield


class _OwnGeneratorMode(internals.TorchDispatchMode or object):  # type: ignore[misc]
    """Gives operators that draw random numbers on the CPU a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import torch._dynamo for the method below, 1.7 s on the first call."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawing = None if kwargs.get("generator") is not None else _with_generator(func)
        if drawing is None:
            return func(*args, **kwargs)
        return drawing(*args, **{**kwargs, "generator": self.generator})


# Before torch 1.13 the default generator is used on the CPU too.
_OwnGenerator: Any = None if internals.TorchDispatchMode is None else _OwnGeneratorMode


@functools.lru_cache(maxsize=None)
def _with_generator(func: Any) -> Any:
    """The overload of an operator that takes `generator`: itself, or its sibling; None if it draws
    nothing."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
    packet = func._overloadpacket
    return getattr(packet, name) if name in packet.overloads() else None


def _check(
    backend: Backend, signature: CallSignature, rank: int, evidence: Dict[str, Any]
) -> Optional[str]:
    on_cpu = signature._replace(device=CPU)
    refusals: List[str] = []
    accepted: List[AttentionInputs] = []
    for problem in problems_of(signature, backend.compiled):
        inputs = problem_of(signature, rank, *problem)
        refusals = backend.why_not(inputs)
        if refusals:
            continue
        accepted.append(inputs)
        evidence.setdefault("problems", []).append(f"{problem.queries} x {problem.keys}")
        # The exact result is computed on the CPU: a GPU takes longer to launch these small
        # operators than a CPU to compute them.
        expected = inputs if signature.device.type == "cpu" else problem_of(on_cpu, rank, *problem)
        each_alone = backend.compiled and len(accepted) == 1
        difference = _compare(
            backend, inputs, expected, signature, problem.terms, each_alone, evidence
        )
        if difference:
            where = f"{problem.queries} x {problem.keys}{problem.terms.value}"
            alone = (
                "" if signature.aligned else f" (multiples of {ALIGNMENT} are checked on their own)"
            )
            return f"{difference} at {where}{alone}"
    if not accepted:
        return f"the backend does not take the self-check's inputs: {'; '.join(refusals)}"
    if not signature.dropout:
        return None
    with own_random_numbers(signature.device):
        return check_dropout(backend, longest(accepted), signature.grad)


def longest(accepted: List[AttentionInputs]) -> AttentionInputs:
    """The first of the longest: it has usual values."""
    return max(accepted, key=lambda inputs: inputs.q.shape[1])


def problems_of(signature: CallSignature, compiled: bool) -> List[Problem]:
    """The problems that are checked; compiled: by a backend whose kernels are compiled already."""
    on_cpu = signature.device.type == "cpu"
    usual = [ALIGNED] if signature.aligned else [SHORT] if on_cpu else [SHORT, LONG]
    problems = [Problem(*lengths) for lengths in usual]
    if (
        signature.segments is not None
        or signature.dense is not None
        or signature.key_padding not in (None, torch.bool)
    ):
        problems.append(Problem(*usual[0], Terms.LEAST))
    if compiled and signature.device.type == "cuda" and not signature.aligned:
        problems += [Problem(*lengths, Terms.LOW) for lengths in LIBRARY]
    return problems


def problem_of(
    signature: CallSignature, rank: int, M: int, N: int, terms: Terms = Terms.USUAL
) -> AttentionInputs:
    """A call of that signature, without dropout; every operand that can have a gradient requires
    one.

    terms: LOW or LEAST: the additive terms of some rows are all that low; LOW: those that factors
    make too; LEAST: some segment weights are -inf.
    """
    device, D, Dv = signature.device, signature.head_dim, signature.value_head_dim
    B, H = BATCH, HEADS
    draw = _Draw(device, M * 1000 + N)

    def sizes(*shared: Tuple[bool, int]) -> Tuple[int, ...]:
        return tuple(1 if one else size for one, size in shared)

    # Strided as packed projections of (L, B, E) tensors are.
    q = draw((M, B, H, D), signature.dtype).transpose(0, 1)
    k, v = draw((N, B, H, D + Dv), signature.dtype).transpose(0, 1).split([D, Dv], -1)
    scale = D**-0.5 if signature.positive_scale else -(D**-0.5)
    parts: Dict[str, Any] = {"q": q, "k": k, "v": v, "scale": scale}
    low = None if terms is Terms.USUAL else terms
    factors = signature.factors
    if factors is not None:
        for name, length, shared_batch, shared_heads in (
            ("q_factor", M, factors.shared_q_batch, factors.shared_q_heads),
            ("k_factor", N, factors.shared_k_batch, factors.shared_k_heads),
        ):
            batch, heads = sizes((shared_batch, B), (shared_heads, H))
            parts[name] = draw((batch, length, heads, rank), signature.dtype, rank**-0.25)
        if terms is Terms.LOW:  # a row whose keys are all at -200
            parts["q_factor"][:, -1, :, 0], parts["k_factor"][..., 0] = 200.0, -1.0
    segments = signature.segments
    if segments is not None:
        S = max(segments.number, 2)  # of one alone the gradient is zero: its rounding has no size
        batch, heads = sizes((segments.shared_batch, B), (segments.shared_heads, H))
        weights = draw((batch, M, heads, S), segments.dtype)
        if terms is Terms.LEAST:
            weights[:, 7, :, 0] = weights[:, 8] = -math.inf
        parts["segment_weights"] = weights
        parts["segment_lengths"] = tuple(N // S + (index < N % S) for index in range(S))
    if signature.dense is not None:
        _, _, shared_batch, shared_heads, shared_rows = signature.dense
        shape = (*sizes((shared_batch, B), (shared_heads, H), (shared_rows, M)), N)
        hidden = draw.below(0.1, shape)
        if not shared_rows and M > 5:
            hidden[:, :, 5] = True
        dense = draw(shape, signature.dense.dtype).masked_fill_(hidden, -math.inf)
        if low is not None:
            dense[-1, -1, -1] = _lowest(low, signature.dense.dtype)
        parts["dense"] = dense
    if signature.mask is not None:
        shared_batch, shared_heads, shared_rows = signature.mask
        mask = draw.below(0.2, (*sizes((shared_batch, B), (shared_heads, H), (shared_rows, M)), N))
        if not shared_rows and M > 3:
            mask[:, :, 3] = True
        parts["mask"] = mask
    dtype = signature.key_padding
    if dtype is not None:
        hidden = torch.arange(N, device=device) >= torch.tensor([[N], [N - N // 4]], device=device)
        if dtype is torch.bool:
            parts["key_padding"] = hidden
        else:
            padding = draw((B, N), dtype).masked_fill_(hidden, -math.inf)
            if low is not None:
                padding[1] = _lowest(low, dtype)
            parts["key_padding"] = padding
    windows = signature.windows
    if windows is not None:
        frames, sides = grids_of(N, windows.number)
        batch, heads, centred = sizes(
            (windows.shared_batch, B), (windows.shared_heads, H), (windows.shared_centres, B)
        )
        weights = draw((batch, M, heads, windows.number), windows.dtype)
        sigmas = None if windows.box else tuple(1.5 + index for index in range(windows.number))
        centres = draw.centres(centred, M, frames)
        parts["windows"] = WindowParts(weights, centres, frames, sides, sigmas)
    window_mask = signature.window_mask
    if window_mask is not None:
        frames, sides = grids_of(N, window_mask.number)
        (centred,) = sizes((window_mask.shared_centres, B))
        parts["window_mask"] = WindowMaskParts(draw.centres(centred, M, frames), frames, sides)
    return AttentionInputs(**parts, out_dtype=signature.output)


def _lowest(terms: Terms, dtype: torch.dtype) -> float:
    return -200.0 if terms is Terms.LOW else torch.finfo(dtype).min


def grids_of(N: int, count: int) -> Tuple[Tuple[Grid, ...], Tuple[int, ...]]:
    """(`count` grids of N keys together, one side per grid); odd and even sides, 1 or 2 views."""
    columns = next(c for c in (COLUMNS, 8, 1) if N % c == 0)
    columns = columns if N // columns >= count else 1
    frames = []
    for index in range(count):
        rows = N // columns // count + (index < N // columns % count)
        views = 2 if index and rows % 2 == 0 else 1
        frames.append(Grid(rows // views, columns, views))
    return tuple(frames), tuple(3 + (index + N) % 2 for index in range(count))


class _Draw:
    """Normal and boolean tensors from a generator of its own, on the CPU whatever the device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def __call__(self, shape: Tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float32) * size
        return drawn.to(self.device, dtype)

    def centres(self, batch: int, M: int, frames: Sequence[Grid]) -> Tensor:
        """(batch, M, S, 3) int32: cells of the frames, and some just outside."""
        drawn = torch.rand((batch, M, len(frames), 3), generator=self.generator)
        sizes = torch.tensor([[frame.views, frame.rows + 2, frame.columns + 2] for frame in frames])
        first = torch.tensor([0, -1, -1])
        return ((drawn * sizes).int() + first).to(self.device, torch.int32)

    def below(self, share: float, shape: Tuple[int, ...]) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)


def _compare(
    attend: Any,
    inputs: AttentionInputs,
    on_cpu: AttentionInputs,
    signature: CallSignature,
    terms: Terms,
    each_alone: bool,
    evidence: Dict[str, Any],
) -> Optional[str]:
    """The first output or gradient that is wrong, in words; None if all are correct.

    on_cpu: `inputs` on the CPU. each_alone: check each gradient by itself too.
    """
    needed = wanted(inputs, signature)
    grad_out = _Draw(CPU, 7)((*inputs.q.shape[:3], inputs.v.shape[-1]), inputs.q.dtype)
    results = run(attend, inputs, needed, grad_out.to(inputs.q.device))
    exact = run(reference_attention.attend, _cast(on_cpu, torch.float64), needed, grad_out.double())
    rounding = _plain if terms is Terms.USUAL else _plain_relative
    plain = run(rounding, on_cpu, needed, grad_out)
    names = ["output", *("gradient of " + name for name in needed)]
    if each_alone and len(needed) > 1:
        for name in needed:
            _, gradient = run(attend, inputs, [name], grad_out.to(inputs.q.device))
            results.append(gradient)
        exact, plain = exact + exact[1:], plain + plain[1:]
        names += [f"gradient of {name} alone" for name in needed]
    results = [tensor.cpu() for tensor in results]
    errors = torch.stack(
        [_error(x, e) for x, e in zip((*results, *plain), (*exact, *exact))]
    ).tolist()
    for name, error, tolerable in zip(names, errors, errors[len(names) :]):
        bound = FACTOR * tolerable + FLOOR.get(inputs.q.dtype, 1e-3)
        evidence["worst"] = max(evidence.get("worst", 0.0), round(error / bound, 4))
        if not error <= bound:  # also when it is not a number
            fault = "is not finite" if math.isnan(error) else f"is off by {error:.2g}"
            return f"{name} {fault} where plain PyTorch is off by {tolerable:.2g}"
    return None


def wanted(inputs: AttentionInputs, signature: CallSignature) -> List[str]:
    """Names of the tensors whose gradients are checked."""
    if not signature.grad:
        return []
    tensors = inputs.tensors()
    dense_grad = signature.dense is not None and signature.dense.requires_grad
    return [
        name
        for name in LEAVES
        if tensors[INDICES[name]] is not None and (name != "dense" or dense_grad)
    ]


def run(attend: Any, inputs: AttentionInputs, wanted: List[str], grad_out: Tensor) -> List[Tensor]:
    """[output, gradients of `wanted` ...]; the operands keep their strides."""
    tensors = inputs.tensors()
    leaves: List[Tensor] = []
    for name in wanted:
        tensor = tensors[INDICES[name]]
        assert tensor is not None
        leaf = tensors[INDICES[name]] = tensor.detach().requires_grad_()
        leaves.append(leaf)
    out = attend(inputs.with_tensors(tensors))
    if not wanted:
        return [out]
    gradients = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves)]
    return [out.detach(), *filled]


def _cast(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    tensors = inputs.tensors()
    for index in INDICES.values():
        tensor = tensors[index]
        tensors[index] = None if tensor is None else tensor.to(dtype)
    return inputs.with_tensors(tensors)


def _plain_relative(inputs: AttentionInputs) -> Tensor:
    """_plain with scores relative to their row's largest, as half precision has no numbers for
    others."""
    return _plain(inputs, relative=True)


def _plain(inputs: AttentionInputs, relative: bool = False) -> Tensor:
    """The output of torch's own operators in the inputs' precision, to which every intermediate is
    rounded."""
    dtype = inputs.q.dtype

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(torch.promote_types(torch.float32, dtype))

    bare = AttentionInputs(inputs.q, inputs.k, inputs.v, scale=inputs.scale)
    s = rounded(reference_attention.scores(bare))
    added = reference_attention.scores(inputs._replace(q=inputs.q.detach() * 0))
    s = s + added if relative else rounded(s + rounded(added))
    if relative:
        s = rounded(s - shift_of(s.detach().amax(-1, keepdim=True)))
    fully_masked = s.detach().amax(-1, keepdim=True) == -math.inf
    p = rounded(torch.softmax(s.masked_fill(fully_masked, 0.0), -1).masked_fill(fully_masked, 0.0))
    return (p @ inputs.v.to(p.dtype).transpose(1, 2)).transpose(1, 2).to(dtype)


def _error(result: Tensor, exact: Tensor) -> Tensor:
    """The larger of the relative errors in L2 and at the worst element, where one wrong row shows;
    0-d."""
    exact = exact.detach().double()
    gap = result.detach().double() - exact
    if not gap.numel():
        return gap.new_zeros(())
    tiny = 1e-30
    return torch.maximum(
        gap.norm() / (exact.norm() + tiny), gap.abs().amax() / (exact.abs().amax() + tiny)
    )


def check_dropout(attend: Any, inputs: AttentionInputs, grad: bool) -> Optional[str]:
    """Kept weights are scaled by 1/(1-p): the mean is the output without dropout, and the square
    grows by 1/(1-p).

    Backward with the output itself as gradient: v . dv is then the output squared if it drops the
    same weights.
    """
    plain = attend(inputs).detach().double()
    v = inputs.v.detach().requires_grad_(grad)
    out = attend(inputs._replace(v=v, dropout_p=DROPOUT_P))
    dropped, square = out.detach().double(), (plain * plain).sum()
    ratios = [
        (dropped * plain).sum() / square,
        (dropped * dropped).sum() / square * (1 - DROPOUT_P),
    ]
    if grad:
        (dv,) = torch.autograd.grad(out, v, out.detach())
        ratios.append((dv.double() * v.detach().double()).sum() / (dropped * dropped).sum())
    mean, spread, *others = torch.stack(ratios).tolist()
    same = others.pop() if grad else 1.0
    if not abs(mean - 1) <= 0.1:
        return f"dropout changes the mean by a factor of {mean:.3g}"
    if not abs(spread - 1) <= 0.2:
        return f"dropout keeps the wrong share: mean square off by a factor of {spread:.3g}"
    if not abs(same - 1) <= 0.03:
        return f"backward does not drop what forward dropped (v . dv off by a factor of {same:.3g})"
    return None
