"""One process of benchmarks/real_models.py: a run of one repository's detector, one JSON line.

    real_worker.py PLAN.json OUT.jsonl        PLAN: {family, checkout, frame, device, task, runs:
                                              [Run as a dict], gradients: a folder that the runs of
                                              a benchmark share, ...}

Started with FLASHBIAS_PATCH=0 and this package on PYTHONPATH: it is installed here, for a patched
run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import statistics
import sys
import time
import warnings
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import detectors
import torch
from installed import patched
from real_runs import Run
from step_profile import marked, profile
from torch import Tensor, nn

import flashbias_patch

RANK = 3
PHASES = ("backbone", "neck", "head", "transformer", "loss", "backward", "clip", "optimizer")
GIB = 2**30


def options(run: Run, device: str) -> detectors.Options:
    width, height = map(int, run.size.split("x"))
    return detectors.Options(
        device, run.bs, (width, height), run.attn, run.dropout, run.with_cp, run.fp16, run.layers
    )


class _Shapes(Exception):
    """Carries (B, M, N) out of a decoder that is not run."""


def _decoder(net: nn.Module) -> nn.Module:
    return net.pts_bbox_head.transformer.decoder


@contextlib.contextmanager
def _before_decoder(net: nn.Module, change: Callable[[Dict[str, Any]], None]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, kwargs: Dict[str, Any]) -> Any:
        change(kwargs)
        return args, kwargs

    handle = _decoder(net).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def attention_shape(detector: detectors.Detector) -> Tuple[int, int, int]:
    """(B, M, N) of the cross attention."""

    def stop(kwargs: Dict[str, Any]) -> None:
        raise _Shapes(kwargs["query"].shape[1], kwargs["query"].shape[0], kwargs["key"].shape[0])

    with _before_decoder(detector.net, stop), torch.no_grad():
        try:
            detector.net(return_loss=True, **detector.batch(0))
        except _Shapes as found:
            return found.args
    raise RuntimeError("the decoder was not called")


class LearnedBias(nn.Module):
    """bias_scale times a fixed map of rank RANK: as factors for a patched model, dense as attn_mask
    for another."""

    def __init__(self, shape: Tuple[int, int, int], heads: int = 8) -> None:
        super().__init__()
        B, M, N = shape
        g = torch.Generator().manual_seed(7)
        self.bias_scale = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("a", torch.randn(B, M, heads, RANK, generator=g))
        self.register_buffer("b", torch.randn(B, N, heads, RANK, generator=g))

    @contextlib.contextmanager
    def open(self, net: nn.Module, patched: bool) -> Iterator[None]:
        if patched:
            with flashbias_patch.attention_bias(
                flashbias_patch.bias.LowRankBias(self.a * self.bias_scale, self.b), kind="cross"
            ):
                yield
            return

        def add(kwargs: Dict[str, Any]) -> None:
            dense = torch.einsum("bmhr,bnhr->bhmn", self.a * self.bias_scale, self.b).flatten(0, 1)
            kwargs["attn_masks"] = [kwargs["attn_masks"][0], dense]

        with _before_decoder(net, add):
            yield


class Trainer:
    """A detector with its optimiser; `step(i)` is one training step and returns its loss."""

    def __init__(self, run: Run, plan: Dict[str, Any]) -> None:
        self.run, self.device = run, plan["device"]
        self.cuda = self.device.startswith("cuda")
        self.detector = detectors.build(
            plan["family"], plan["checkout"], plan["frame"], options(run, plan["device"])
        )
        self.batch = self.detector.batch
        self.bias: Optional[LearnedBias] = None
        if run.bias:
            self.bias = LearnedBias(attention_shape(self.detector)).to(plan["device"])
        self.parameters = [
            *self.detector.net.parameters(),
            *(self.bias.parameters() if self.bias else ()),
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01)
        self.norm: Any = 0.0

    def step(self, i: int) -> Tensor:
        mark = torch.profiler.record_function
        torch.manual_seed(100 + i)
        net = self.detector.net
        with self.bias.open(net, self.run.patch) if self.bias else contextlib.nullcontext():
            out = net(return_loss=True, **self.batch(i))
            loss = sum(value for name, value in out.items() if "loss" in name)
            with mark("backward"):
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
        with mark("clip"):
            self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, 35.0)
        with mark("optimizer"):
            self.optimizer.step()
        return loss.detach()

    def move(self, device: str) -> None:
        """Take weights, gradients and moments to the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.detector.net.to(device)
        if self.bias is not None:
            self.bias.to(device)
        for state in self.optimizer.state.values():
            state.update({name: state[name].to(device) for name in ("exp_avg", "exp_avg_sq")})

    def decoder_gradient(self) -> Tensor:
        grads = [
            p.grad.flatten() for p in _decoder(self.detector.net).parameters() if p.grad is not None
        ]
        return torch.cat(grads).float().cpu()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else 0.0


class Gradients:
    """The first gradients of runs that should compute the same, in a folder that their processes
    share."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def error(self, run: Run, found: Tensor) -> Optional[float]:
        """Relative distance from the gradient of the first such unpatched run, which is kept; None
        without one."""
        path = os.path.join(self.folder, "-".join(str(value) for value in run.twin()) + ".pt")
        if not os.path.exists(path):
            if not run.patch:
                torch.save(found, path)
            return None
        known = torch.load(path)
        return float((found - known).norm() / known.norm())


class Trainers:
    """The trainers of one process. Runs of one model share one where plan["together"] is set; the
    others wait in the host's memory, so that a peak is that of the run alone."""

    def __init__(self, plan: Dict[str, Any]) -> None:
        self.plan = plan
        self.kept: Dict[Tuple[Any, ...], Trainer] = {}

    def of(self, run: Run) -> Trainer:
        if not self.plan["together"]:
            return Trainer(run, self.plan)
        for model, trainer in self.kept.items():
            if model != run.model():
                trainer.move("cpu")
        release()
        if run.model() not in self.kept:
            self.kept[run.model()] = Trainer(run, self.plan)
        trainer = self.kept[run.model()]
        trainer.run = run
        trainer.move(trainer.device)
        return trainer


def train(run: Run, plan: Dict[str, Any], trainer: Trainer, gradients: Gradients) -> Dict[str, Any]:
    """The record of a run. First gradients without dropout are compared with those of the first
    unpatched twin, where each run begins with the same weights."""
    losses, norms, times, scales, peak = [], [], [], [], 0.0
    error = None
    for i in range(run.steps):
        trainer.synchronize()
        if trainer.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = trainer.step(i)
        trainer.synchronize()
        times.append(time.perf_counter() - start)
        peak = max(peak, trainer.peak_mib())
        losses.append(round(float(loss), 5))
        norms.append(round(float(trainer.norm), 4))
        if trainer.bias is not None:
            grad = trainer.bias.bias_scale.grad
            scales.append([trainer.bias.bias_scale.item(), None if grad is None else grad.item()])
        if i == 0 and run.dropout == 0.0 and not plan["together"]:
            error = gradients.error(run, trainer.decoder_gradient())
    result = {
        "losses": losses,
        "grad_norms": norms,
        "grad_norm": norms[-1],
        "peak_MiB": round(peak, 1),
        "step_s": round(statistics.median(times[2:] or times), 4),
        "first_step_s": round(times[0], 3),
        "times": [round(t, 4) for t in times],
    }
    if error is not None:
        result["gradient_error"] = error
    if scales:
        result["bias_scale_and_gradient"] = scales
    return result


def largest(fits: Callable[[int], bool], low: int, limit: int) -> int:
    """The largest n in low .. limit with fits(n), by doubling and bisection; `low` - 1 where not
    even `low` fits."""
    good, bad = low - 1, limit + 1
    trial = max(low, 1)
    while trial < bad:
        if fits(trial):
            good = trial
            trial = min(2 * trial, limit) if good < limit else bad
        else:
            bad = trial
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def batch_search(
    run: Run, plan: Dict[str, Any], trainer: Trainer, gradients: Gradients
) -> Dict[str, Any]:
    """The largest batch that trains within each of plan["caps"] GiB, two steps a trial."""
    trainer.batch = trainer.detector.resize(1)
    trainer.step(0)  # kernels are compiled and checked without a cap
    total = torch.cuda.get_device_properties(0).total_memory if trainer.cuda else 0
    rows: List[Dict[str, Any]] = []
    low, caps = 1, sorted(plan["caps"])
    for cap in caps:
        seconds: Dict[int, float] = {}

        def fits(bs: int, seconds: Dict[int, float] = seconds) -> bool:
            trainer.batch = trainer.detector.resize(bs)
            try:
                for i in range(2):
                    start = time.perf_counter()
                    trainer.step(i)
                    trainer.synchronize()
                seconds[bs] = time.perf_counter() - start
                return True
            except torch.cuda.OutOfMemoryError:
                return False
            finally:
                trainer.optimizer.zero_grad(set_to_none=True)
                release()

        if trainer.cuda:
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total))
        best = largest(fits, low, plan["limit"])
        rows.append(
            {
                "cap_GiB": cap,
                "available_GiB": round(min(cap, total / GIB), 1),
                "batch": best,
                "step_s": round(seconds[best], 3) if best in seconds else None,
                "limit": plan["limit"],
            }
        )
        low = max(best, 1)
    if trainer.cuda:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"batches": rows}


def step_profile(
    run: Run, plan: Dict[str, Any], trainer: Trainer, gradients: Gradients
) -> Dict[str, Any]:
    for i in range(3):
        trainer.step(i)
    net = trainer.detector.net
    parts = [
        (net.img_backbone, "forward", "backbone"),
        (net.img_neck, "forward", "neck"),
        (net.pts_bbox_head, "forward", "head"),
        (net.pts_bbox_head.transformer, "forward", "transformer"),
        (net.pts_bbox_head, "loss", "loss"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, method, name in parts:
            stack.enter_context(marked(owner, method, name))

        def step(i: int) -> None:
            trainer.step(3 + i)
            trainer.synchronize()

        return profile(step, plan["profile_steps"], PHASES, trainer.cuda)


def infer(run: Run, plan: Dict[str, Any], trainer: Trainer, gradients: Gradients) -> Dict[str, Any]:
    """Latency of forward passes in evaluation mode, from the batch to the head's output."""
    net = trainer.detector.net.eval()
    # The flag of the detector alone: StreamPETR's gives features a time by it. All parts are in
    # evaluation mode.
    net.training = True
    outputs: List[Any] = []

    def keep(*arguments: Any, **named: Any) -> Dict[str, Any]:
        """In the place of the head's loss: the pass ends here."""
        outputs[:] = [*arguments, *named.values()]
        return {}

    net.pts_bbox_head.loss = keep
    times: List[float] = []
    if trainer.cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        for i in range(run.steps):
            given = trainer.batch(i)
            trainer.synchronize()
            start = time.perf_counter()
            net(return_loss=True, **given)
            trainer.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    latency = statistics.median(times[10:] or times)
    return {
        "latency_ms": round(latency, 3),
        "first_ms": round(times[0], 1),
        "frames_per_s": round(1e3 * run.bs / latency, 2),
        "peak_MiB": round(trainer.peak_mib(), 1),
        "times": [round(t, 3) for t in times],
        "digest": digest(outputs),
    }


def digest(value: Any) -> float:
    """Mean absolute value over all floating tensors of nested outputs: equal runs agree."""
    sums = [0.0, 0]

    def visit(value: Any) -> None:
        if torch.is_tensor(value):
            if value.is_floating_point():
                sums[0] += float(value.double().abs().sum())
                sums[1] += value.numel()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)

    visit(value)
    return round(sums[0] / max(sums[1], 1), 6)


TASKS = {"train": train, "infer": infer, "batch": batch_search, "profile": step_profile}


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def about(device: str) -> Dict[str, Any]:
    import mmcv
    import mmdet
    import mmdet3d

    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "triton": version,
        "python": sys.version.split()[0],
        "mmcv": mmcv.__version__,
        "mmdet": mmdet.__version__,
        "mmdet3d": mmdet3d.__version__,
        "flashbias_patch": flashbias_patch.__version__,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # init_weights tells of every parameter
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    with open(sys.argv[2], "a") as out:

        def write(line: Dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        write({"about": about(plan["device"])})
        gradients, trainers = Gradients(plan["gradients"]), Trainers(plan)
        for fields in plan["runs"]:
            run = Run(**fields)
            start, before = time.perf_counter(), dict(flashbias_patch.status()["calls"])
            try:
                with (
                    patched(run.dtype, run.aqr, run.backend)
                    if run.patch
                    else contextlib.nullcontext()
                ):
                    result = TASKS[plan["task"]](run, plan, trainers.of(run), gradients)
                    fallbacks = [
                        f"{f['source']}: {f['reason']}"
                        for f in flashbias_patch.status()["fallbacks"]
                    ]
            except Exception as error:  # of one run: the others go on
                said = str(error).partition("\n")[0]
                result, fallbacks = {"error": f"{type(error).__name__}: {said}"}, []
            release()
            calls = {
                name: count - before.get(name, 0)
                for name, count in flashbias_patch.status()["calls"].items()
                if count != before.get(name, 0)
            }
            write(
                {
                    **run._asdict(),
                    **result,
                    "calls": calls,
                    **({"fallbacks": fallbacks} if fallbacks else {}),
                    "family": plan["family"],
                    "wall_s": round(time.perf_counter() - start, 1),
                    "torch": torch.__version__,
                }
            )


if __name__ == "__main__":
    main()
