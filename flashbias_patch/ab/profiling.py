"""Steps under torch.profiler, after the timed ones, inside the command's process."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, List

MOST_NAMES = 300  # of kernels, those of the most time; the rest is kept as a sum
LONGEST_NAME = 300
# Ranges on the GPU's timeline that hold kernels and are none.
RANGES = ("ProfilerStep", "Optimizer.", "nccl:", "## ", "DistributedDataParallel")


class Profiler:
    """`steps` iterations from `start` on."""

    def __init__(self, torch: Any, steps: int, gpu: Any) -> None:
        self.torch, self.steps, self.gpu = torch, steps, gpu
        self.made = 0
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU] + ([kinds.CUDA] if gpu.used() else [])
        self.profile = torch.profiler.profile(activities=activities)

    def start(self) -> None:
        self._synchronize()
        self.profile.start()

    def step(self) -> bool:
        """An iteration ended. True once there are enough."""
        self.made += 1
        return self.made >= self.steps

    def stop(self) -> Dict[str, Any]:
        """The line for the record: kernels (or a CPU's operators) as [name, seconds, calls], over
        all steps."""
        self._synchronize()
        self.profile.stop()
        on_gpu = self.gpu.used()
        found: List[List[Any]] = []
        for each in self.profile.key_averages():
            if on_gpu != (getattr(each.device_type, "name", "CPU") != "CPU"):
                continue
            if on_gpu and (
                getattr(each, "is_user_annotation", False) or each.key.startswith(RANGES)
            ):
                continue
            seconds = _microseconds(each, on_gpu) / 1e6
            if seconds > 0:
                found.append([each.key[:LONGEST_NAME], seconds, int(each.count)])
        found.sort(key=lambda row: -row[1])
        return {
            "event": "profile",
            "steps": self.made,
            "device": "cuda" if on_gpu else "cpu",
            "kernels": found[:MOST_NAMES],
            "rest_s": sum(row[1] for row in found[MOST_NAMES:]),
        }

    def cancel(self) -> None:
        with contextlib.suppress(Exception):  # it may not have started
            self.profile.stop()

    def _synchronize(self) -> None:
        if self.gpu.used():
            self.torch.cuda.synchronize(self.gpu.device)


def _microseconds(row: Any, on_gpu: bool) -> float:
    """Self time; the GPU's has another name before torch 2.4."""
    if not on_gpu:
        return float(row.self_cpu_time_total)
    value = getattr(row, "self_device_time_total", None)
    return float(row.self_cuda_time_total if value is None else value)
