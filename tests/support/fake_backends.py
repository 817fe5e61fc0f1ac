"""Faults, and a backend that has them: a stand-in for the real ones, under their names, that runs
on the CPU."""

from __future__ import annotations

import time
from typing import Any, Callable, List, NamedTuple, Optional

import torch

from flashbias_patch.attention.backends.base import Backend
from flashbias_patch.attention.inputs import TENSORS
from flashbias_patch.attention.kernels.recompute import Call
from flashbias_patch.attention.reference_attention import attend as attend_dense
from tests.support.small_training import B, H


class CompilationError(Exception):
    """As triton.compiler.errors.CompilationError."""


class OutOfResources(Exception):
    """As triton.runtime.errors.OutOfResources."""


def _raise(error: BaseException) -> Callable[..., Any]:
    def act(result: Any) -> Any:
        raise error

    return act


def _slow(result: Any) -> Any:
    time.sleep(0.02)
    return result


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda r: (
        change(r)
        if isinstance(r, torch.Tensor)
        else tuple(None if t is None else change(t) for t in r)
    )


class Fault(NamedTuple):
    """`act` gets the right result, and returns the wrong one or raises. `silent`: only the
    self-check can tell."""

    name: str
    act: Callable[..., Any]
    silent: bool = False
    outcome: str = "not used for this signature; the next backend computes the call"


FAULTS = (
    Fault("ImportError", _raise(ImportError("libcudart.so.11.0: cannot open shared object file"))),
    Fault("CompilationError", _raise(CompilationError("at 41:12: unsupported operand"))),
    Fault(
        "OutOfResources", _raise(OutOfResources("out of resource: shared memory, Required: 294912"))
    ),
    Fault("RuntimeError", _raise(RuntimeError("CUDA error: invalid configuration argument"))),
    Fault(
        "OOM",
        _raise(
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        ),
        outcome="this call in small chunks; no breaker opens",
    ),
    Fault("NaN output", _each(lambda t: t * float("nan")), silent=True),
    Fault("wrong output", _each(lambda t: torch.cat([t[:, :-1], t[:, -1:] + 0.5], 1)), silent=True),
    Fault("slow compile", _slow, outcome="the call waits for it"),
    Fault(
        "unwritable cache directory",
        _raise(PermissionError(13, "Permission denied: '.triton/cache'")),
    ),
    Fault("corrupt cache", _raise(ValueError("Expecting value: line 1 column 1 (char 0)"))),
)


class _Answer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, owner, inputs, seed, on_failure, *tensors):
        ctx.owner, ctx.inputs, ctx.seed, ctx.on_failure = owner, inputs, seed, on_failure
        # Recomputation follows the forward, last layer first: 2, 3, 0, 1. Reentrant, it is what has
        # a backward; otherwise the forward has.
        ctx.place = {1: 0, 2: 1, 3: 2, 4: 3, 5: 2, 6: 3, 7: 0, 8: 1}.get(owner.place)
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return owner.compute(inputs, seed)

    @staticmethod
    def backward(ctx, grad_out):
        leaves = {
            n: t.detach().requires_grad_(need) if t.is_floating_point() else t
            for n, t, need in zip(TENSORS, ctx.saved_tensors, ctx.needs_input_grad[4:])
            if t is not None
        }
        inputs, owner = ctx.inputs.with_tensors([leaves.get(n) for n in TENSORS]), ctx.owner
        wanted = [t for t in leaves.values() if t.requires_grad]

        def gradients():
            with torch.enable_grad():
                return iter(torch.autograd.grad(owner.compute(inputs, ctx.seed), wanted, grad_out))

        if (
            owner.fault is not None
            and owner.passing == "backward"
            and owner.fires(inputs, ctx.place)
        ):
            try:
                found = iter(owner.fault.act(tuple(gradients())))
            except Exception as error:
                if ctx.on_failure is None:
                    raise
                # What the fused operator does (kernels/autograd.py).
                needs = tuple(
                    n in leaves and leaves[n].requires_grad for n in (*TENSORS[:6], "dense")
                )
                call = Call(
                    *(getattr(inputs, n) for n in TENSORS[:6]),
                    inputs.segment_lengths or (),
                    inputs.dense,
                    inputs.mask,
                    inputs.key_padding,
                    0.0,
                    inputs.scale,
                    torch.empty(0, dtype=torch.int64),
                    needs,
                )
                rescued = ctx.on_failure(call, grad_out, error)
                found = iter([g for g in rescued if g is not None])
        else:
            found = gradients()
        return (
            None,
            None,
            None,
            None,
            *(next(found) if n in leaves and leaves[n].requires_grad else None for n in TENSORS),
        )


class Faulty(Backend):
    """A right backend under a real one's name; `fault` strikes in `passing`, at once or from
    `step`, at `layer`."""

    def __init__(
        self, name: str, fault: Optional[Fault] = None, passing: str = "forward", layer: int = -1
    ) -> None:
        self.name, self.fault, self.passing, self.layer = name, fault, passing, layer
        self.from_start, self.striking = layer < 0, layer < 0
        self.place = 0
        self.recovers = name == "triton"  # in its own backward, as the fused operator does
        self.on_failure = None
        self.needs_self_check = name == "upstream"
        self.answered: List[str] = []

    def why_not(self, inputs):
        return []

    @staticmethod
    def is_real(inputs) -> bool:
        return inputs.q.shape[0] == B and inputs.q.shape[2] == H

    def on_step(self, step: int) -> None:
        self.place, self.striking = 0, self.from_start or step >= 1

    def fires(self, inputs, place) -> bool:
        return self.from_start or self.striking and self.is_real(inputs) and place == self.layer

    def compute(self, inputs, seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return attend_dense(inputs, generator=generator)

    def recovering(self, inputs, on_failure):
        self.on_failure = on_failure
        try:
            return self(inputs)
        finally:
            self.on_failure = None

    def __call__(self, inputs):
        fires = (
            self.fault is not None and self.passing == "forward" and self.fires(inputs, self.place)
        )
        if self.is_real(inputs):
            self.place += 1
        seed = int(torch.randint(1 << 31, ())) if inputs.dropout_p else None
        out = _Answer.apply(
            self, inputs.with_tensors(inputs.tensors()), seed, self.on_failure, *inputs.tensors()
        )
        if fires:
            out = self.fault.act(out)
        if self.is_real(inputs):
            self.answered.append(self.name)
        return out


class Case(NamedTuple):
    """`layer` -1: the fault is there from the beginning, so that the self-check meets it."""

    backend: str
    fault: Fault
    passing: str
    layer: int

    def __str__(self) -> str:
        when = "from the start" if self.layer < 0 else f"from step 1 in attention {self.layer}"
        return f"{self.backend}, {self.fault.name} in {self.passing}, {when}"


BACKENDS = ("triton", "flash", "upstream", "sdpa")


def cases() -> List[Case]:
    """Everything that is survived. A later silent fault is not seen by anyone (docs/reliability.md
    says so)."""
    found = []
    for backend in BACKENDS:
        for fault in FAULTS:
            for passing in ("forward", "backward"):
                found.append(Case(backend, fault, passing, -1))
                if not fault.silent:
                    found += [Case(backend, fault, passing, layer) for layer in range(4)]
    return found
