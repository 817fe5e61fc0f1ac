"""One process of several whose backend fails: the part `fault` of benchmarks/distributed.py."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import torch
from installed import patched
from ranks import Builder, Processes, Samples, distance, freeze_statistics, freeze_unused, loss_of
from torch import Tensor

from flashbias_patch import telemetry
from flashbias_patch.attention import dispatch
from flashbias_patch.attention.backends.base import Backend


class Broken(Backend):
    """A backend that fails in its forward from step 1 on, and is the real one otherwise."""

    def __init__(self, real: Any) -> None:
        self.real, self.name, self.armed, self.struck = real, real.name, False, 0
        self.recovers = real.recovers

    def why_not(self, inputs: Any) -> Any:
        return self.real.why_not(inputs)

    def __call__(self, inputs: Any) -> Tensor:
        self.strike()
        return self.real(inputs)

    def recovering(self, inputs: Any, on_failure: Any) -> Tensor:
        self.strike()
        return self.real.recovering(inputs, on_failure)

    def strike(self) -> None:
        if self.armed:
            self.struck += 1
            raise RuntimeError("injected")


def fault(builder: Builder, processes: Processes, each: int, steps: int) -> Dict[str, Any]:
    """Losses with and without the fault on the last rank, what it struck and what the journal
    says."""
    name = "triton" if processes.cuda else "sdpa"

    def run(broken: bool) -> Any:
        dispatch.reset()
        real = dispatch.backend(name)
        culprit = Broken(real)
        backward = [0]
        undo = _break_backward(backward, culprit) if broken and name == "triton" else None
        if broken and processes.rank == processes.world - 1:
            dispatch.loaded[name] = culprit
        detector = builder.build(each, 0.0)
        samples = Samples(detector, each * processes.world, processes.device)
        freeze_statistics(detector.net, samples.take(0, 1))
        freeze_unused(detector.net, samples.take(0, 1))
        net = processes.ddp(detector.net)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
        losses = []
        for i in range(steps):
            culprit.armed = i >= 2 and broken and processes.rank == processes.world - 1
            backward[0] = -1 if i == 1 and broken and processes.rank == processes.world - 1 else 0
            torch.manual_seed(100 + i + 1000 * processes.rank)
            loss = loss_of(net, samples.take(processes.rank * each, each))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 35.0)
            optimizer.step()
            losses.append(float(loss))
        if undo is not None:
            undo()
        weights = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
        return losses, weights, culprit.struck

    with patched():
        healthy, weights, _ = run(False)
        again, _, _ = run(False)
        before = len(telemetry.fallbacks())
        failing, fallen, struck = run(True)
        told = [f"{f['source']}: {f['reason']}" for f in telemetry.fallbacks()[before:]]
        dispatch.reset()
    return {
        "backend": name,
        "steps": steps,
        "struck": processes.gather(struck),
        "fallbacks": processes.gather(told),
        "losses": processes.gather(healthy),
        "losses_again": processes.gather(again),
        "losses_with_fault": processes.gather(failing),
        "weights": distance(fallen, weights),
        "ranks_agree": len(set(processes.gather(float(fallen.sum())))) == 1,
    }


def _break_backward(flag: List[int], culprit: Broken) -> Callable[[], None]:
    """The fused operator rescues inside its own backward: fail there while flag[0] is not 0."""
    from flashbias_patch.attention.kernels import launcher

    real = launcher.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        if flag[0]:
            culprit.struck += 1
            raise RuntimeError("injected")
        return real(*args, **kwargs)

    launcher.backward = backward

    def undo() -> None:
        launcher.backward = real

    return undo
