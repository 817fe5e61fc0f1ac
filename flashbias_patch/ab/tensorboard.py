"""A comparison as TensorBoard runs, one a run: `A1`, `B2`, ... Needs the tensorboard package
only."""

from __future__ import annotations

import os
from typing import Iterator, Tuple

import numpy as np

from .records import Experiment, Run
from .report import MissingExtra


def write(experiment: Experiment, directory: str) -> None:
    """Write event files under `directory`; raises MissingExtra without tensorboard."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise MissingExtra(
            'a TensorBoard export needs tensorboard: pip install "flashbias-patch[tensorboard]"'
        ) from error
    for run in experiment.runs:
        if not run.steps:
            continue
        writer = EventFileWriter(os.path.join(directory, run.name))
        when = run.series("time")
        for tag, values in scalars(run):
            for step, value in enumerate(values):
                if np.isfinite(value):
                    entry = Summary(value=[Summary.Value(tag=tag, simple_value=float(value))])
                    writer.add_event(
                        Event(
                            step=step,
                            wall_time=float(when[step]) if np.isfinite(when[step]) else 0.0,
                            summary=entry,
                        )
                    )
        writer.close()


def scalars(run: Run) -> Iterator[Tuple[str, np.ndarray]]:
    """(tag, (steps,) values) of everything a run recorded; memory in MiB, times in seconds."""
    yield "loss/total", run.series("loss")
    for section, tag in (
        ("loss_parts", "loss"),
        ("params", "parameter"),
        ("param_grads", "gradient of parameter"),
    ):
        for name, values in run.named(section).items():
            yield f"{tag}/{name}", values
    yield "gradient norm", run.series("grad_norm")
    yield "time/step", run.step_seconds()
    for key in ("cuda", "cuda_peak", "cuda_reserved_peak", "rss", "rss_peak"):
        yield f"memory/{key}", run.series("memory", key) / 2**20
    for backend in run.calls():
        yield f"attention calls/{backend}", run.series("calls", backend)
