"""The cost of guarding a call once its class is settled: dispatch.attend against calling the
backend.

    python benchmarks/guarding.py       (or as a part of benchmarks/overhead.py)

The backend here does no work, so that the difference is guarding alone: the class of the call, its
verdict, the random state where there is dropout. A backend's own `why_not` is asked at every call
and is shown beside it. Then what the guarded backward (attention/recovery/guard.py) adds to a call
that is large enough for it, forward and both passes together.
"""

from __future__ import annotations

import functools
import os
import time
import timeit
from typing import Any, Callable, Dict

os.environ.setdefault("FLASHBIAS_PATCH", "0")

import torch

from flashbias_patch.attention import dispatch
from flashbias_patch.attention.backends.base import Backend
from flashbias_patch.attention.breaker import TRUSTED
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.attention.recovery import guard
from flashbias_patch.attention.signature import signature_of

CALLS, REPEATS = 5000, 15


class Nothing(Backend):
    """Takes every call and does no work."""

    name = "triton"

    def why_not(self, inputs: AttentionInputs) -> list:
        return []

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        return inputs.q


class Identity(torch.autograd.Function):
    """The cheapest backward there is."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None, None


class Differentiable(Nothing):
    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        return Identity.apply(inputs.q, inputs.k, inputs.v)  # type: ignore[no-any-return]


def call(device: str, dtype: torch.dtype, features: str) -> AttentionInputs:
    B, M, N, H, D, R = 2, 149, 223, 8, 32, 8

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    made: Dict[str, Any] = {
        "q": zeros(B, M, H, D).requires_grad_(),
        "k": zeros(B, N, H, D),
        "v": zeros(B, N, H, D),
    }
    if "factors" in features:
        made.update(q_factor=zeros(B, M, 1, R), k_factor=zeros(1, N, 1, R))
    if "mask" in features:
        made.update(mask=torch.zeros(1, 1, M, N, dtype=torch.bool, device=device))
    return AttentionInputs(**made, scale=0.2, dropout_p=0.1 if "dropout" in features else 0.0)


def microseconds(function: Callable[[], Any]) -> float:
    return (
        min(timeit.repeat(function, timer=time.process_time, number=CALLS, repeat=REPEATS))
        / CALLS
        * 1e6
    )


def measure() -> Dict[str, float]:
    """Microseconds of guarding a call, by features; prints each as it is known."""
    found = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    print(
        f"torch {torch.__version__}, {device}; microseconds of processor time a call, best of "
        f"{REPEATS}"
    )
    for features in ("plain", "factors", "factors, mask", "factors, dropout"):
        inputs = call(device, dtype, features)
        dispatch.reset()
        own = {}
        for name in ("triton", "flash"):
            ask = functools.partial(dispatch.backend(name).why_not, inputs)
            own[name] = microseconds(ask)
        nothing = Nothing()
        dispatch.loaded["triton"] = nothing
        dispatch.breakers.verdicts(signature_of(inputs))["triton"] = TRUSTED
        guarded = microseconds(lambda i=inputs: dispatch.attend(i))
        direct = microseconds(lambda i=inputs, n=nothing: n(i))
        asked = ", ".join(f"{name}.why_not {cost:.1f}" for name, cost in own.items())
        print(f"{features:18s} guarding {guarded - direct:5.2f}   ({asked})")
        found[features] = guarded - direct
        dispatch.reset()
    return found


def measure_guarded_backward() -> Dict[str, float]:
    """Microseconds that a guarded backward adds to a call of guard.LARGE scores or more."""
    torch.set_num_threads(1)
    q, k, v = (
        torch.zeros(1, length, 2, 4) for length in (2, 3, 3)
    )  # small: only the processor's time counts
    inputs = AttentionInputs(q.requires_grad_(), k, v, scale=0.5)
    dispatch.reset()
    dispatch.loaded["triton"] = Differentiable()
    dispatch.breakers.verdicts(signature_of(inputs))["triton"] = TRUSTED
    large = guard.LARGE
    gradient, found = torch.zeros_like(inputs.q), {}
    passes: Dict[str, Callable[[], Any]] = {
        "forward": lambda: dispatch.attend(inputs),
        "forward and backward": lambda: torch.autograd.grad(
            dispatch.attend(inputs), inputs.q, gradient
        ),
    }
    for name, run in passes.items():
        times = []
        for guard.LARGE in (0, 1 << 62):
            times.append(microseconds(run))
        found[name] = times[0] - times[1]
        print(f"{name:22s} of a large call: the guarded backward adds {found[name]:.1f}")
    guard.LARGE = large
    dispatch.reset()
    return found


if __name__ == "__main__":
    measure()
    measure_guarded_backward()
