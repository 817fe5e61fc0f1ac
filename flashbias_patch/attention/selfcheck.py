"""A backend earns trust: before its first answer to a class of call, it answers a small problem of
it.

Lengths are odd (less than a tile, and beyond one; on the CPU only the first), or multiples of 128
where the class says so; operands are strided as projections leave them; a row is fully masked where
masks are in play. Where terms are added, once more with values that break kernels: rows wholly at
the least finite number ("masked" without -inf) or at -200, segment weights of -inf. Kernels that
are compiled already (a library's) meet more lengths, and each gradient alone. The output and every
gradient are compared with float64: they may err by at most FACTOR times what plain PyTorch errs by
in the same precision, plus FLOOR.

With dropout, numbers are compared without it, and then the dropout itself is checked: what is kept,
its mean, and that backward drops what forward dropped.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from .. import telemetry
from ..bias import Grid, WindowMaskParts, WindowParts
from .backends import reference
from .inputs import TENSORS, AttentionInputs
from .signature import ALIGNMENT, Key, describe
from .values import shift_of

FACTOR = 4.0
FLOOR = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-5, torch.float64: 1e-6}
BATCH, HEADS = 2, 3
SHORT, LONG, ALIGNED = (37, 63), (131, 259), (ALIGNMENT, 2 * ALIGNMENT)
LIBRARY = (
    (12, 64),
    (1, 65),
)  # keys % 128 == 64 and % 32 == 1, and one query: what SDPA's CUDA kernels got wrong
USUAL, LOW, LEAST = range(
    3
)  # additive terms of a problem: around 0, some rows at -200, some at finfo.min
DROPOUT_P = 0.3
CPU = torch.device("cpu")
LEAVES = ("q", "k", "v", "q_factor", "k_factor", "segment_weights", "dense", "window_weights")
PLACES = {name: TENSORS.index(name) for name in LEAVES}
COLUMNS = (
    7  # of the grids that windows lie on: every number of keys above is a multiple of it, or of 8
)


def possible(inputs: AttentionInputs) -> bool:
    """Whether a check can run now: not while a call is traced, captured into a CUDA graph or
    transformed, nor on meta."""
    if type(inputs.q) not in (Tensor, torch.nn.Parameter) or torch.jit.is_tracing():
        return False
    if inputs.q.is_meta or inputs.q.is_cuda and internals.stream_capturing():
        return False
    return internals.current_transform() is None


def check(
    backend: Any, key: Key, rank: int, evidence: Optional[Dict[str, Any]] = None
) -> Optional[str]:
    """Why `backend` must not answer calls of this class; None if it is right on the small problems.

    The caller's random state, grad mode, autocast, function modes and saved-tensor hooks are left
    alone. Exceptions of the backend come through. `evidence` gets the lengths of the problems, the
    largest error as a share of what is tolerated, and the seconds that it took.
    """
    evidence = {} if evidence is None else evidence
    began = time.perf_counter()
    with undisturbed(key[0]):
        problem = _check(backend, key, rank, evidence)
    seconds = time.perf_counter() - began
    evidence["seconds"] = round(seconds, 3)
    if seconds > 5:
        message = "%s took %.0f s to compile and be checked for %s"
        telemetry.once(
            ("slow check", backend.name, key), "info", message, backend.name, seconds, describe(key)
        )
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
        enter(internals.own_saved_tensors(Tensor.detach, lambda saved: saved))
        yield


_random_lock = threading.RLock()


@contextlib.contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Random numbers of a generator of its own, always the same ones, in this thread.

    On a GPU, kernels draw from the default generator: its state is put back, and one thread at a
    time may borrow it. The state of the CPU's generator is not touched on the CPU, where other
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawing = None if kwargs.get("generator") is not None else _with_generator(func)
        if drawing is None:
            return func(*args, **kwargs)
        return drawing(*args, **{**kwargs, "generator": self.generator})


# Before torch 1.13 the default generator is borrowed on the CPU too.
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


def _check(backend: Any, key: Key, rank: int, evidence: Dict[str, Any]) -> Optional[str]:
    device, aligned, dropout, grad = key[0], key[4], key[5], key[6]
    attend = getattr(
        backend, "without_recovery", backend
    )  # a backward that fails is a failure of the check
    library = getattr(backend, "library", False)
    refused: List[str] = []
    accepted: List[AttentionInputs] = []
    for lengths, far in _problems(key, library):
        inputs = problem_of(key, rank, *lengths, far)
        refused = backend.why_not(inputs)
        if refused:
            continue
        accepted.append(inputs)
        evidence.setdefault("problems", []).append("{} x {}".format(*lengths))
        # What is right is worked out on the CPU: small operators take a GPU longer to launch than
        # these to compute.
        twin = inputs if device.type == "cpu" else problem_of((CPU, *key[1:]), rank, *lengths, far)
        found = _compare(
            attend, inputs, twin, grad, key, far, library and len(accepted) == 1, evidence
        )
        if found:
            where = "" if aligned else f" (multiples of {ALIGNMENT} are checked on their own)"
            values = ("", ", rows at -200", ", rows at the least finite number")[far]
            return f"{found} at {lengths[0]} x {lengths[1]}{values}{where}"
    if not accepted:
        return f"it refuses the check's own problem: {'; '.join(refused)}"
    if not dropout:
        return None
    longest = max(
        accepted, key=lambda inputs: inputs.q.shape[1]
    )  # the first of several: with usual values
    with own_random_numbers(device):
        return _check_dropout(attend, longest, grad)


def _problems(key: Key, library: bool) -> List[Tuple[Tuple[int, int], int]]:
    """(lengths, values of the additive terms) of the problems for this class."""
    device, aligned, segments, dense, padding = key[0], key[4], key[10], key[11], key[13]
    usual = [ALIGNED] if aligned else [SHORT] if device.type == "cpu" else [SHORT, LONG]
    found = [(lengths, USUAL) for lengths in usual]
    if segments is not None or dense is not None or padding not in (None, torch.bool):
        found.append((usual[0], LEAST))
    if library and device.type == "cuda" and not aligned:
        found += [(lengths, LOW) for lengths in LIBRARY]
    return found


def problem_of(key: Key, rank: int, M: int, N: int, far: int = USUAL) -> AttentionInputs:
    """A call of class `key`, without dropout, with every operand that can have a gradient asking
    for it.

    far: LOW or LEAST: in some rows all keys are there; LEAST: some segment weights are -inf.
    """
    (
        device,
        dtype,
        D,
        Dv,
        _,
        _,
        _,
        positive,
        _,
        factors,
        segments,
        dense,
        mask,
        padding,
        windows,
        window_mask,
    ) = key
    B, H = BATCH, HEADS
    draw = _Draw(device, M * 1000 + N)
    # Strided as packed projections of (L, B, E) tensors are.
    q = draw((M, B, H, D), dtype).transpose(0, 1)
    k, v = draw((N, B, H, D + Dv), dtype).transpose(0, 1).split([D, Dv], -1)
    made: Dict[str, Any] = {"q": q, "k": k, "v": v, "scale": D**-0.5 if positive else -(D**-0.5)}
    if factors is not None:
        _, _, Bq, Hq, Bk, Hk = factors
        made["q_factor"] = draw((1 if Bq else B, M, 1 if Hq else H, rank), dtype, rank**-0.25)
        made["k_factor"] = draw((1 if Bk else B, N, 1 if Hk else H, rank), dtype, rank**-0.25)
    if segments is not None:
        S, weights_dtype, Bw, Hw = segments
        made["segment_weights"] = draw((1 if Bw else B, M, 1 if Hw else H, S), weights_dtype)
        made["segment_lengths"] = tuple(N // S + (place < N % S) for place in range(S))
        if far == LEAST:
            made["segment_weights"][:, 7, :, 0] = made["segment_weights"][:, 8] = -math.inf
    if dense is not None:
        dense_dtype, _, Bd, Hd, Md = dense
        shape = (1 if Bd else B, 1 if Hd else H, 1 if Md else M, N)
        hidden = draw.below(0.1, shape)
        if not Md and M > 5:
            hidden[:, :, 5] = True
        made["dense"] = draw(shape, dense_dtype).masked_fill_(hidden, -math.inf)
        if far:
            made["dense"][-1, -1, -1] = -200.0 if far == LOW else torch.finfo(dense_dtype).min
    if mask is not None:
        made["mask"] = draw.below(
            0.2, tuple(1 if one else full for one, full in zip(mask, (B, H, M))) + (N,)
        )
        if not mask[2] and M > 3:
            made["mask"][:, :, 3] = True
    if padding is not None:
        hidden = torch.arange(N, device=device) >= torch.tensor([[N], [N - N // 4]], device=device)
        made["key_padding"] = hidden
        if padding is not torch.bool:
            made["key_padding"] = draw((B, N), padding).masked_fill_(hidden, -math.inf)
            if far:
                made["key_padding"][1] = -200.0 if far == LOW else torch.finfo(padding).min
    if windows is not None:
        S, box, weights_dtype, Bw, Hw, Bc = windows
        frames, sides = grids_of(N, S)
        weights = draw((1 if Bw else B, M, 1 if Hw else H, S), weights_dtype)
        sigmas = None if box else tuple(1.5 + place for place in range(S))
        made["windows"] = WindowParts(
            weights, draw.centres(1 if Bc else B, M, frames), frames, sides, sigmas
        )
    if window_mask is not None:
        S, Bc = window_mask
        frames, sides = grids_of(N, S)
        made["window_mask"] = WindowMaskParts(
            draw.centres(1 if Bc else B, M, frames), frames, sides
        )
    return AttentionInputs(**made)


def grids_of(N: int, count: int) -> Tuple[Tuple[Grid, ...], Tuple[int, ...]]:
    """(`count` grids of N keys together, a side for each): odd and even sides, one view and two."""
    columns = next(c for c in (COLUMNS, 8, 1) if N % c == 0)
    columns = columns if N // columns >= count else 1
    frames = []
    for place in range(count):
        rows = N // columns // count + (place < N // columns % count)
        views = 2 if place and rows % 2 == 0 else 1
        frames.append(Grid(rows // views, columns, views))
    return tuple(frames), tuple(3 + (place + N) % 2 for place in range(count))


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
    twin: AttentionInputs,
    grad: bool,
    key: Key,
    far: int,
    apart: bool,
    evidence: Dict[str, Any],
) -> Optional[str]:
    """`twin` is `inputs` on the CPU; `apart`: each gradient by itself too."""
    dense_grad = key[11] is not None and key[11][1]
    wanted = []
    if grad:
        held = inputs.tensors()
        wanted = [n for n in LEAVES if held[PLACES[n]] is not None and (n != "dense" or dense_grad)]
    grad_out = _Draw(CPU, 7)((*inputs.q.shape[:3], inputs.v.shape[-1]), inputs.q.dtype)
    given = _run(attend, inputs, wanted, grad_out.to(inputs.q.device))
    exact = _run(reference.attend_dense, _cast(twin, torch.float64), wanted, grad_out.double())
    plain = _run(_plain_relative if far else _plain, twin, wanted, grad_out)
    names = ["output", *("gradient of " + name for name in wanted)]
    if apart and len(wanted) > 1:
        alone = [_run(attend, inputs, [name], grad_out.to(inputs.q.device))[1] for name in wanted]
        given, exact, plain = given + alone, exact + exact[1:], plain + plain[1:]
        names += [f"gradient of {name} alone" for name in wanted]
    given = [tensor.cpu() for tensor in given]
    errors = torch.stack(
        [_error(x, e) for x, e in zip((*given, *plain), (*exact, *exact))]
    ).tolist()
    for name, error, tolerable in zip(names, errors, errors[len(names) :]):
        bound = FACTOR * tolerable + FLOOR.get(inputs.q.dtype, 1e-3)
        evidence["worst"] = max(evidence.get("worst", 0.0), round(error / bound, 4))
        if not error <= bound:  # also when it is not a number
            what = "is not finite" if math.isnan(error) else f"is off by {error:.2g}"
            return f"{name} {what} where plain PyTorch is off by {tolerable:.2g}"
    return None


def _run(attend: Any, inputs: AttentionInputs, wanted: List[str], grad_out: Tensor) -> List[Tensor]:
    """[output, gradients of `wanted` ...]; strides of the operands are kept."""
    held = inputs.tensors()
    leaves: List[Tensor] = []
    for name in wanted:
        leaf = held[PLACES[name]] = held[PLACES[name]].detach().requires_grad_()  # type: ignore[union-attr]
        leaves.append(leaf)
    out = attend(inputs.with_tensors(held))
    if not wanted:
        return [out]
    found = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves))]


def _cast(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    held = inputs.tensors()
    for place in PLACES.values():
        tensor = held[place]
        held[place] = None if tensor is None else tensor.to(dtype)
    return inputs.with_tensors(held)


def _plain_relative(inputs: AttentionInputs) -> Tensor:
    """_plain with scores relative to their row's largest, as half precision has no numbers for
    others."""
    return _plain(inputs, relative=True)


def _plain(inputs: AttentionInputs, relative: bool = False) -> Tensor:
    """What torch's own operators give in the inputs' precision: every intermediate is rounded to
    it."""
    dtype = inputs.q.dtype

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(torch.promote_types(torch.float32, dtype))

    bare = AttentionInputs(inputs.q, inputs.k, inputs.v, scale=inputs.scale)
    s = rounded(reference.scores(bare))
    added = reference.scores(inputs._replace(q=inputs.q.detach() * 0))
    s = s + added if relative else rounded(s + rounded(added))
    if relative:
        s = rounded(s - shift_of(s.detach().amax(-1, keepdim=True)))
    dead = s.detach().amax(-1, keepdim=True) == -math.inf
    p = rounded(torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0))
    return (p @ inputs.v.to(p.dtype).transpose(1, 2)).transpose(1, 2).to(dtype)


def _error(found: Tensor, exact: Tensor) -> Tensor:
    """The larger of the relative errors in L2 and at the worst element, where one wrong row shows;
    0-d."""
    exact = exact.detach().double()
    gap = found.detach().double() - exact
    if not gap.numel():
        return gap.new_zeros(())
    tiny = 1e-30
    return torch.maximum(
        gap.norm() / (exact.norm() + tiny), gap.abs().amax() / (exact.abs().amax() + tiny)
    )


def _check_dropout(attend: Any, inputs: AttentionInputs, grad: bool) -> Optional[str]:
    """Kept weights scaled by 1/(1-p): the mean is the output without dropout, the square grows by
    1/(1-p).

    Backward with the output itself as gradient: v . dv is then the output squared if it drops the
    same.
    """
    plain = attend(inputs).detach().double()
    v = inputs.v.detach().requires_grad_(grad)
    out = attend(inputs._replace(v=v, dropout_p=DROPOUT_P))
    given, square = out.detach().double(), (plain * plain).sum()
    ratios = [(given * plain).sum() / square, (given * given).sum() / square * (1 - DROPOUT_P)]
    if grad:
        (dv,) = torch.autograd.grad(out, v, out.detach())
        ratios.append((dv.double() * v.detach().double()).sum() / (given * given).sum())
    mean, spread, same = (*torch.stack(ratios).tolist(), 1.0)[:3]
    if not abs(mean - 1) <= 0.1:
        return f"dropout changes the mean by a factor of {mean:.3g}"
    if not abs(spread - 1) <= 0.2:
        return f"dropout keeps the wrong share: mean square off by a factor of {spread:.3g}"
    if not abs(same - 1) <= 0.03:
        return f"backward does not drop what forward dropped (v . dv off by a factor of {same:.3g})"
    return None
