"""The recorded data of a comparison: processes, trainings, runs, and the whole experiment."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

OUT_OF_MEMORY = "out of memory"  # the status of a run


class NotARecord(ValueError):
    """The directory holds no A/B run."""


@dataclass
class Process:
    """One Python process of a run, as its probe saw it."""

    path: str
    header: Dict[str, Any] = field(default_factory=dict)
    environment: Dict[str, Any] = field(default_factory=dict)
    steps: List[Dict[str, Any]] = field(default_factory=list)
    fallbacks: List[Dict[str, Any]] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    stopped: bool = False
    ended: bool = False
    truncated: bool = False
    error: Optional[str] = None
    calls: Optional[Dict[str, int]] = None  # attention calls by backend, in all
    profile: Dict[str, Any] = field(default_factory=dict)  # of profiling.py
    forward: Optional[str] = None  # class of the first module that was called

    @property
    def rank(self) -> int:
        return _whole(self.environment.get("rank", self.header.get("rank")))

    @property
    def world_size(self) -> int:
        return max(1, _whole(self.environment.get("world_size")))

    @property
    def started(self) -> float:
        """Seconds since the epoch; 0 if unknown."""
        found = _number(self.header.get("time"))
        return found if math.isfinite(found) else 0.0

    @property
    def name(self) -> str:
        """The script or module that the process runs."""
        argv = self.header.get("argv")
        words = [str(word) for word in argv] if isinstance(argv, list) else []
        script = next((word for word in words[1:] if word.endswith(".py")), None)
        if script is not None:
            return os.path.basename(script)
        if "-m" in words[:-1]:
            return words[words.index("-m") + 1]
        return "python"


@dataclass
class Training:
    """One training of a command: its processes, one per rank, rank 0 first."""

    key: Any
    ranks: List[Process] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return min((len(p.steps) for p in self.ranks), default=0)

    @property
    def name(self) -> str:
        return self.ranks[0].name


def trainings(processes: Sequence[Process]) -> List[Training]:
    """The trainings among `processes`, in the order in which they began. Ranks of one training have
    one parent."""
    found: List[Training] = []
    for process in sorted((p for p in processes if p.steps), key=lambda p: p.started):
        key = (
            ("parent", process.header.get("ppid"))
            if process.world_size > 1
            else ("process", process.path)
        )
        training = next((t for t in reversed(found) if t.key == key), None)
        if training is None or any(p.rank == process.rank for p in training.ranks):
            training = Training(key)
            found.append(training)
        training.ranks.append(process)
    for training in found:
        training.ranks.sort(key=lambda p: p.rank)
    return found


def missing_ranks(run: Run) -> int:
    """Ranks of the training that is judged that recorded no step."""
    return max((p.world_size for p in run.ranks), default=0) - len(run.ranks)


@dataclass
class Run:
    """One run of the command: `label` A (unpatched), B (patched), or the letter of a further
    side."""

    label: str
    index: int
    status: str = "ok"
    message: str = ""
    exit_code: Optional[int] = 0
    seconds: float = 0.0
    directory: str = ""
    command: List[str] = field(default_factory=list)
    env: Dict[str, str] = field(default_factory=dict)
    processes: List[Process] = field(default_factory=list)
    log_tail: str = ""
    nudged: bool = False  # parameters changed by a few units in the last place after the first step
    redrawn: bool = False  # nudged, and drawing other random numbers from there on
    started: float = 0.0  # seconds since the epoch
    others: float = 0.0  # CPUs that processes other than the command's kept busy, on average
    busy: float = 0.0  # share of all CPUs that was busy
    gpus: List[Dict[str, Any]] = field(default_factory=list)  # of clocks.summary
    saved: str = ""  # the directory of an earlier comparison that it was copied from (saved.py)
    training: Optional[int] = None  # the number of the training that is judged; None: the longest

    @property
    def name(self) -> str:
        return f"{self.label}{self.index + 1}"

    @property
    def ranks(self) -> List[Process]:
        """The processes of the training that is judged, one per rank, rank 0 first."""
        found = trainings(self.processes)
        if not found:
            return []
        if self.training is None:
            return max(found, key=lambda t: t.steps).ranks
        return found[self.training].ranks if self.training < len(found) else []

    @property
    def steps(self) -> int:
        return min((len(p.steps) for p in self.ranks), default=0)

    @property
    def killed(self) -> bool:
        """A training process has no last line: it was killed, and what it had recorded was kept."""
        return any(not p.ended for p in self.ranks)

    def per_step(self, *keys: str) -> np.ndarray:
        """(ranks, steps) values under the path `keys`; NaN where a line has none, inf where it has
        no finite one."""
        ranks = self.ranks
        steps = min((len(p.steps) for p in ranks), default=0)
        rows = [[_dig(line, keys) for line in p.steps[:steps]] for p in ranks]
        return np.array(rows, dtype=float).reshape(len(rows), steps)

    def series(self, *keys: str) -> np.ndarray:
        """(steps,) mean over the ranks that recorded it."""
        return _reduce(np.nanmean, self.per_step(*keys))

    def startup_seconds(self) -> float:
        """From the start of the command to the end of its first step; NaN if unknown."""
        times = [_dig(p.steps[0], ("time",)) for p in self.ranks]
        begun = self.started or min((p.started for p in self.ranks), default=0.0)
        return max(times) - begun if times and begun else float("nan")

    def step_seconds(self) -> np.ndarray:
        """(steps,) seconds a step: by CUDA events where there are any, else wall time; the slowest
        rank's."""
        cuda = _reduce(np.nanmax, self.per_step("cuda_s"))
        wall = _reduce(np.nanmax, self.per_step("wall_s"))
        return cuda if np.isfinite(cuda).any() else wall

    @property
    def clock(self) -> str:
        return "CUDA events" if np.isfinite(self.per_step("cuda_s")).any() else "wall clock"

    def memory_kind(self) -> str:
        """The memory that is compared: "cuda" if the run used a GPU, else "rss", the process's
        resident memory."""
        return "cuda" if np.isfinite(self.per_step("memory", "cuda_peak")).any() else "rss"

    def peak_memory(self, of: str = "peak") -> float:
        """Bytes at most, over steps and ranks; NaN if nothing was recorded. `of`: peak, or a GPU's
        reserved_peak."""
        values = self.per_step("memory", f"{self.memory_kind()}_{of}")
        return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")

    def memory(self, name: str) -> np.ndarray:
        """(steps,) bytes that a step's line has under `name` (rss, cuda_peak), the fullest
        rank's."""
        return _reduce(np.nanmax, self.per_step("memory", name))

    def named(self, section: str) -> Dict[str, np.ndarray]:
        """{name: (steps,)} of a section of names: loss_parts, params, param_grads."""
        names: Dict[str, None] = {}
        for process in self.ranks[:1]:
            for line in process.steps:
                names.update(dict.fromkeys(line.get(section) or {}))
        return {name: self.series(section, name) for name in names}

    def calls(self) -> Dict[str, int]:
        """Attention calls by backend, over all ranks; without any step (inference) over all
        processes."""
        total: Dict[str, int] = {}
        for process in self.ranks or self.processes:
            made = process.steps[-1].get("calls") if process.steps else process.calls
            for backend, count in (made or {}).items():
                total[backend] = total.get(backend, 0) + int(count)
        return total

    def fallbacks(self) -> List[Dict[str, Any]]:
        return [entry for process in self.ranks or self.processes for entry in process.fallbacks]

    @property
    def random(self) -> Optional[str]:
        """The state of torch's generators after the first step of rank 0."""
        return self.ranks[0].steps[0].get("random") if self.ranks else None

    def no_finite(self, *keys: str) -> Optional[Tuple[int, int]]:
        """(step, rank) of the first value under `keys` that is not finite; None if all are."""
        bad = np.isinf(self.per_step(*keys))
        if not bad.any():
            return None
        step = int(np.argmax(bad.any(axis=0)))
        return step, self.ranks[int(np.argmax(bad[:, step]))].rank

    @property
    def half(self) -> bool:
        return any(line.get("half") for p in self.ranks for line in p.steps[:3])

    @property
    def environment(self) -> Dict[str, Any]:
        return next((p.environment for p in self.ranks or self.processes if p.environment), {})


@dataclass
class Experiment:
    """Everything `flashbias ab` left in a directory."""

    directory: str
    command: List[str]
    options: Dict[str, Any]
    runs: List[Run]
    host: Dict[str, Any] = field(default_factory=dict)
    cwd: str = ""
    schedule: str = ""
    started: float = 0.0
    lost: str = ""  # why something could not be written, if so
    interrupted: bool = False  # between two runs
    judged: str = "B"  # the side that is compared with A
    commit: str = ""  # of the directory that the command ran in (history.commit_of)
    stopped: str = ""  # why no more repeats were made (repeats.Plan)

    def side(self, label: str) -> List[Run]:
        """The runs of A or B that recorded at least one step and were not hung or crashed early."""
        return [run for run in self.runs if run.label == label and run.steps > 0]

    def patched(self) -> List[Run]:
        """The runs of the side that is judged that tell which backends computed its attention:
        those with steps, or all of an inference."""
        if self.options.get("inference"):
            return [run for run in self.runs if run.label == self.judged]
        return self.side(self.judged)


def choose(experiment: Experiment, process: Optional[str] = None) -> None:
    """Choose the training that is judged, the same of every run. `process`: its number from 1, or
    part of its name.

    Without `process` it is the one of most steps, over all runs; the first of several. Raises
    NotARecord if no run has the training.
    """
    found = [trainings(run.processes) for run in experiment.runs]
    count = max(map(len, found), default=0)
    if process:
        named = {i for each in found for i, t in enumerate(each) if process in t.name}
        number = int(process) - 1 if process.isdigit() else min(named, default=-1)
        if count and not 0 <= number < count:
            longest = max(found, key=lambda each: len(each))
            names = ", ".join(f"{i + 1} {t.name}" for i, t in enumerate(longest))
            raise NotARecord(f"--process {process}: the command's trainings are {names}")
    else:
        totals = [sum(each[i].steps for each in found if i < len(each)) for i in range(count)]
        number = totals.index(max(totals)) if totals else 0
    for run in experiment.runs:
        run.training = number


def _dig(line: Any, keys: Any) -> float:
    """The number under `keys`: NaN where there is none, inf where it is not finite."""
    for key in keys:
        line = line.get(key) if isinstance(line, dict) else None
    if line is None:
        return float("nan")
    value = _number(line)
    return value if math.isfinite(value) else float("inf")


def _number(value: Any) -> float:
    """A number, or a string that stands for one ("nan", "inf"); NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _whole(value: Any) -> int:
    number = _number(value)
    return int(number) if math.isfinite(number) else 0


def _reduce(function: Any, values: np.ndarray) -> np.ndarray:
    """nanmean/nanmax over ranks, without warnings where a step has no value at all."""
    if not values.size:
        return np.full(values.shape[1:] or (0,), np.nan)
    known = np.isfinite(values)
    filled = function(np.where(known, values, np.nan)[:, known.any(axis=0)], axis=0)
    result = np.full(values.shape[1], np.nan)
    result[known.any(axis=0)] = filled
    # An infinite loss on some rank is a fact, not a gap.
    result[np.isinf(values).any(axis=0)] = np.inf
    return result
