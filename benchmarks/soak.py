"""Train mini_cmt for thousands of steps with faults injected at random: does memory stay, does
training go on?

    python benchmarks/soak.py --steps 3000                      # a GPU python benchmarks/soak.py
    --steps 150 --device cpu          # the same, quickly python benchmarks/soak.py --steps 20
    --profile              # counts synchronisations, patched and unpatched

A fault strikes the backend that is about to answer (forward), or one's backward, at random steps:
compile errors, launch failures, out of memory. Every call's backward is guarded
(recovery/guard.py), small as these are. Breakers are closed again every 100 steps, so that there is
always something to break. In the first 100 steps each fault has its turn, so that what each way
down allocates for good (a library's workspace) is there. Exits 1 if the memory in tensors at a
step's end grew after that, or a loss was not finite.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

os.environ.setdefault("FLASHBIAS_PATCH", "0")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from provenance import about  # noqa: E402

import flashbias_patch  # noqa: E402
from flashbias_patch import telemetry  # noqa: E402
from flashbias_patch.attention import dispatch  # noqa: E402
from flashbias_patch.attention.backends.base import Backend  # noqa: E402
from flashbias_patch.attention.recovery import guard  # noqa: E402

ERRORS: Dict[str, Callable[[], Exception]] = {
    "compile": lambda: RuntimeError("PassManager::run failed (injected)"),
    "launch": lambda: RuntimeError("CUDA error: invalid configuration argument (injected)"),
    "resources": lambda: RuntimeError("out of resource: shared memory (injected)"),
    "memory": lambda: torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB (injected)"
    ),
}
SYNCHRONISING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "Memcpy DtoH",
    "Memcpy HtoD (Pageable",
)
REOPEN, SETTLED = 100, 100
TURNS = [(kind, where) for kind in ERRORS for where in ("forward", "backward")] * 2
SIZES = {
    "tiny": ["--image-size", "96x48", "--bev", "6", "--queries", "24", "--layers", "2"],
    "mini": [],
    "cmt": [],
}


class Sabotage:
    """Errors waiting for the next call, or the next backward, of a sabotaged backend."""

    def __init__(self) -> None:
        self.forward: List[Exception] = []
        self.backward: List[Exception] = []
        self.struck: Dict[str, int] = {}

    def strike(self, where: str) -> None:
        waiting: List[Exception] = getattr(self, where)
        if waiting:
            error = waiting.pop()
            told = f"{where}: {error}"
            self.struck[told] = self.struck.get(told, 0) + 1
            raise error


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sabotage: Sabotage, out: torch.Tensor) -> torch.Tensor:
        ctx.sabotage = sabotage
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        ctx.sabotage.strike("backward")
        return None, grad_out


class Saboteur(Backend):
    """A backend that fails when told to, and is the real one otherwise."""

    def __init__(self, real: Any, sabotage: Sabotage) -> None:
        self.real, self.name, self.sabotage = real, real.name, sabotage
        self.recovers = real.recovers

    def why_not(self, inputs: Any) -> List[str]:
        return self.real.why_not(inputs)

    def __call__(self, inputs: Any) -> torch.Tensor:
        self.sabotage.strike("forward")
        return _Failing.apply(self.sabotage, self.real(inputs))

    def recovering(self, inputs: Any, on_failure: Any) -> torch.Tensor:
        self.sabotage.strike("forward")
        # The fused operator recovers inside its own backward: that is where it is struck.
        return self.real.recovering(inputs, on_failure)


def sabotage_fused_backward(sabotage: Sabotage) -> None:
    from flashbias_patch.attention.kernels import launcher

    real = launcher.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        sabotage.strike("backward")
        return real(*args, **kwargs)

    launcher.backward = backward


def load_train() -> Any:
    """examples/mini_cmt/tools/train.py as a module."""
    path = ROOT / "examples" / "mini_cmt" / "tools" / "train.py"
    spec = importlib.util.spec_from_file_location("mini_cmt_train", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Run:
    """mini_cmt and its optimiser, step by step."""

    def __init__(self, device: str, size: str) -> None:
        self.module = load_train()
        argv = ["--device", device, "--preset", "cmt" if size == "cmt" else "mini", *SIZES[size]]
        argv += ["--fp16"] if device == "cuda" else []
        self.args = self.module.parse_args(argv)
        self.device, _, _ = self.module.setup_device(self.args)
        config, model = self.module.build(self.args)
        self.model = model.to(self.device).train()
        batch = self.module.make_batch(self.module.load_frames(self.args), **config["data"])
        self.batch = self.module.to_device(batch, self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.scaler = self.module.GradScaler(enabled=device == "cuda")

    def step(self, number: int) -> torch.Tensor:
        self.module.draw_step(self.batch, self.args, number, 0)
        with torch.autocast(
            self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"
        ):
            loss = sum(self.model(**self.batch).values())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def soak(
    run: Run, steps: int, rate: float, seed: int, seconds: Optional[float] = None
) -> Dict[str, Any]:
    rng, sabotage = random.Random(seed), Sabotage()
    guard.LARGE = 0
    for name in ("triton", "flash", "sdpa"):
        dispatch.loaded[name] = Saboteur(dispatch.backend(name), sabotage)
    if run.device.type == "cuda":
        sabotage_fused_backward(sabotage)
    memory: List[Tuple[int, int]] = []
    bad, start = 0, time.perf_counter()
    for number in range(steps):
        if seconds is not None and time.perf_counter() - start > seconds:
            steps = number
            break
        warming = number < SETTLED
        if number % (SETTLED // len(TURNS) if warming else REOPEN) == 0:
            dispatch.breakers.close()
        sabotage.forward.clear()
        sabotage.backward.clear()
        turn = number // (SETTLED // len(TURNS))
        if warming and number % (SETTLED // len(TURNS)) == 1 and turn < len(TURNS):
            kind, where = TURNS[turn]
            getattr(sabotage, where).append(ERRORS[kind]())
        elif not warming and rng.random() < rate:
            getattr(sabotage, rng.choice(("forward", "backward"))).append(
                rng.choice(list(ERRORS.values()))()
            )
        bad += not torch.isfinite(run.step(number)).item()
        memory.append(held(run))
        if number % 500 == 499:
            print(
                f"step {number + 1}, {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    # What the largest of the first steps held at its end, and the largest of all later ones.
    first, rest = memory[:SETTLED], memory[SETTLED:] or memory[-1:]
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
        "struck": sabotage.struck,
        "not_finite": bad,
        "in_tensors_mib": {
            "first 100": max(m[0] for m in first) / 2**20,
            "later": max(m[0] for m in rest) / 2**20,
        },
        "reserved_mib": {
            "first 100": max(m[1] for m in first) / 2**20,
            "later": max(m[1] for m in rest) / 2**20,
        },
        "growth_mib_after_first_100": round(
            max(0, max(m[0] for m in rest) - max(m[0] for m in first)) / 2**20, 3
        ),
        "calls": dict(telemetry.calls),
        "fallbacks": sum(f["count"] for f in telemetry.fallbacks()),
    }


def held(run: Run) -> Tuple[int, int]:
    """Bytes in tensors, and held by the allocator; on the CPU the process' peak, twice."""
    if run.device.type == "cuda":
        return torch.cuda.memory_allocated(run.device), torch.cuda.memory_reserved(run.device)
    peak = run.module.peak_memory(run.device) << 20
    return peak, peak


def synchronisations(run: Run, steps: int) -> Dict[str, int]:
    """The waits for the GPU over `steps` warm steps: runtime calls, and copies to and from
    pageable memory."""
    for number in range(5):
        run.step(number)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        for number in range(steps):
            run.step(number)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    return {e.key: e.count for e in profile.key_averages() if e.key.startswith(SYNCHRONISING)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--seconds",
        type=float,
        help="stop after so long; the result says how many steps there were",
    )
    parser.add_argument(
        "--rate", type=float, default=0.05, help="share of steps in which a fault is injected"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="tiny", choices=sorted(SIZES))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument("--profile", action="store_true", help="count synchronisations instead")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args()
    if args.profile:
        unpatched = synchronisations(Run(args.device, args.size), args.steps)
        flashbias_patch.install()
        report: Dict[str, Any] = {
            "unpatched": unpatched,
            "patched": synchronisations(Run(args.device, args.size), args.steps),
        }
        failed = any(count > unpatched.get(name, 0) for name, count in report["patched"].items())
    else:
        flashbias_patch.install()
        report = soak(Run(args.device, args.size), args.steps, args.rate, args.seed, args.seconds)
        failed = report["not_finite"] > 0 or (
            args.device == "cuda" and report["growth_mib_after_first_100"] > 0
        )
    report.update(about(args.out, device=args.device), size=args.size, failed=failed)
    print(json.dumps(report, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
