"""Train mini_cmt for thousands of steps with faults injected at random: does memory stay, does training go on?

    python benchmarks/soak.py --steps 3000                      # a GPU
    python benchmarks/soak.py --steps 30 --device cpu           # the same, quickly
    python benchmarks/soak.py --steps 40 --profile              # counts synchronisations, patched and unpatched

A fault strikes the fused backend on its way to the answer (forward), or in its backward, at random steps: compile
errors, launch failures, out of memory. Breakers are closed again every 100 steps, so that there is always something
to break. Exits 1 if memory grew after the first 100 steps, or a loss was not finite.
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
from typing import Any, Callable, Dict, List, Optional

os.environ.setdefault("FLASHBIAS_PATCH", "0")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

import flashbias_patch  # noqa: E402
from flashbias_patch import journal  # noqa: E402
from flashbias_patch.attention import dispatch  # noqa: E402

ERRORS: Dict[str, Callable[[], Exception]] = {
    "compile": lambda: RuntimeError("PassManager::run failed (injected)"),
    "launch": lambda: RuntimeError("CUDA error: invalid configuration argument (injected)"),
    "resources": lambda: RuntimeError("out of resource: shared memory (injected)"),
    "memory": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)"),
}
SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
REOPEN, SETTLED = 100, 100


class Saboteur:
    """A backend that fails when told to, and is the real one otherwise."""

    def __init__(self, real: Any) -> None:
        self.real, self.name = real, real.name
        self.next: Optional[Exception] = None

    def why_not(self, inputs: Any) -> List[str]:
        return self.real.why_not(inputs)

    def __call__(self, inputs: Any) -> torch.Tensor:
        error, self.next = self.next, None
        if error is not None:
            raise error
        return self.real(inputs)


def sabotage_backward(pending: List[Exception]) -> None:
    """Let the fused operator's backward fail where `pending` holds an error."""
    from flashbias_patch.attention.kernels import launch

    real = launch.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        if pending:
            raise pending.pop()
        return real(*args, **kwargs)

    launch.backward = backward


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

    def __init__(self, device: str, preset: str) -> None:
        self.module = load_train()
        argv = ["--device", device, "--preset", preset] + (["--fp16"] if device == "cuda" else [])
        if device == "cpu":
            argv += ["--image-size", "96x48", "--bev", "6", "--queries", "24", "--layers", "2"]
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
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"):
            loss = sum(self.model(**self.batch).values())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def soak(run: Run, steps: int, rate: float, seed: int) -> Dict[str, Any]:
    rng, name = random.Random(seed), "triton" if run.device.type == "cuda" else "sdpa"
    saboteur, pending = Saboteur(dispatch.backend(name)), []  # type: ignore[var-annotated]
    dispatch._loaded[name] = saboteur
    if name == "triton":
        sabotage_backward(pending)
    injected: Dict[str, int] = {}
    memory: List[int] = []
    bad, start = 0, time.perf_counter()
    for number in range(steps):
        if number % REOPEN == 0:
            dispatch._verdicts.clear()
        if rng.random() < rate:
            kind = rng.choice(list(ERRORS))
            where = "backward" if name == "triton" and rng.random() < 0.5 else "forward"
            injected[f"{kind} in {where}"] = injected.get(f"{kind} in {where}", 0) + 1
            if where == "forward":
                saboteur.next = ERRORS[kind]()
            else:
                pending.append(ERRORS[kind]())
        bad += not torch.isfinite(run.step(number)).item()
        if run.device.type == "cuda":
            memory.append(torch.cuda.memory_allocated(run.device))
        else:
            memory.append(run.module.peak_memory(run.device) << 20)
    # Allocated at a step's end; the warm-up is what the largest of the first steps held.
    settled = max(memory[:SETTLED])
    growth = (max(memory[SETTLED:]) - settled) / 2**20 if len(memory) > SETTLED else 0.0
    return {
        "steps": steps, "seconds": round(time.perf_counter() - start, 1), "injected": injected, "not_finite": bad,
        "growth_mib_after_first_100": round(growth, 3), "calls": dict(journal.calls),
        "fallbacks": sum(f["count"] for f in journal.fallbacks()),
    }  # fmt: skip


def synchronisations(run: Run, steps: int) -> Dict[str, int]:
    """CUDA runtime calls that wait for the GPU, over `steps` warm steps."""
    for number in range(5):
        run.step(number)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU,
                                            torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number in range(steps):
            run.step(number)
    return {e.key: e.count for e in profile.key_averages() if e.key.startswith(SYNCHRONISING)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=0.05, help="share of steps in which a fault is injected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="mini", choices=("mini", "cmt"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--profile", action="store_true", help="count synchronisations instead")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args()
    if args.profile:
        unpatched = synchronisations(Run(args.device, args.preset), args.steps)
        flashbias_patch.install()
        report: Dict[str, Any] = {"unpatched": unpatched,
                                  "patched": synchronisations(Run(args.device, args.preset), args.steps)}
        failed = any(count > unpatched.get(name, 0) for name, count in report["patched"].items())
    else:
        flashbias_patch.install()
        report = soak(Run(args.device, args.preset), args.steps, args.rate, args.seed)
        failed = report["not_finite"] > 0 or (args.device == "cuda" and report["growth_mib_after_first_100"] > 0)
    print(json.dumps(report, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
