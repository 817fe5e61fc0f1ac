"""Reads what runs left on disk: tolerant of files that end in the middle of a line."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import numpy as np

LOG_TAIL = 4000  # bytes of a run's output shown when it failed


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

    @property
    def rank(self) -> int:
        return int(self.environment.get("rank", self.header.get("rank", 0)))


@dataclass
class Run:
    """One run of the command: `label` A (unpatched) or B (patched)."""

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
    load: float = 0.0  # the machine's load average when the run started

    @property
    def name(self) -> str:
        return f"{self.label}{self.index + 1}"

    @property
    def ranks(self) -> List[Process]:
        """The training processes: one a rank, rank 0 first; of several of a rank, the one of most steps."""
        best: Dict[int, Process] = {}
        for process in self.processes:
            if process.steps and len(process.steps) > len(
                best[process.rank].steps if process.rank in best else []
            ):
                best[process.rank] = process
        return [best[rank] for rank in sorted(best)]

    @property
    def steps(self) -> int:
        return min((len(p.steps) for p in self.ranks), default=0)

    @property
    def killed(self) -> bool:
        """A training process has no last line: it was killed, and what it had recorded was kept."""
        return any(not p.ended for p in self.ranks)

    def per_step(self, *keys: str) -> np.ndarray:
        """(ranks, steps) values under the path `keys`; NaN where a line has none."""
        rows = [[_dig(line, keys) for line in p.steps[: self.steps]] for p in self.ranks]
        return np.array(rows, dtype=float).reshape(len(rows), self.steps)

    def series(self, *keys: str) -> np.ndarray:
        """(steps,) mean over the ranks that recorded it."""
        return _reduce(np.nanmean, self.per_step(*keys))

    def step_seconds(self) -> np.ndarray:
        """(steps,) seconds a step: by CUDA events where there are any, else wall time; the slowest rank's."""
        cuda = _reduce(np.nanmax, self.per_step("cuda_s"))
        wall = _reduce(np.nanmax, self.per_step("wall_s"))
        return cuda if np.isfinite(cuda).any() else wall

    @property
    def clock(self) -> str:
        return "CUDA events" if np.isfinite(self.per_step("cuda_s")).any() else "wall clock"

    def memory_kind(self) -> str:
        """Which memory the run is judged by: the GPU's if it used one, else the process's resident memory."""
        return "cuda" if np.isfinite(self.per_step("memory", "cuda_peak")).any() else "rss"

    def peak_memory(self, of: str = "peak") -> float:
        """Bytes at most, over steps and ranks; NaN if nothing was recorded. `of`: peak, or a GPU's reserved_peak."""
        values = self.per_step("memory", f"{self.memory_kind()}_{of}")
        return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")

    def memory(self) -> np.ndarray:
        """(steps,) bytes held at the end of each step, the fullest rank's."""
        return _reduce(np.nanmax, self.per_step("memory", self.memory_kind()))

    def named(self, section: str) -> Dict[str, np.ndarray]:
        """{name: (steps,)} of a section of names: loss_parts, params, param_grads."""
        names: Dict[str, None] = {}
        for process in self.ranks[:1]:
            for line in process.steps:
                names.update(dict.fromkeys(line.get(section) or {}))
        return {name: self.series(section, name) for name in names}

    def calls(self) -> Dict[str, int]:
        """Attention calls by backend, over all ranks; without any step (inference) over all processes."""
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
        """Where torch's generators stood after the first step of rank 0."""
        return self.ranks[0].steps[0].get("random") if self.ranks else None

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

    def side(self, label: str) -> List[Run]:
        """The runs of A or B that recorded at least one step and were not hung or crashed early."""
        return [run for run in self.runs if run.label == label and run.steps > 0]

    def patched(self) -> List[Run]:
        """The runs of B that say what answered its attention calls: those with steps, or all of an inference."""
        if self.options.get("inference"):
            return [run for run in self.runs if run.label == "B"]
        return self.side("B")


def load(directory: str) -> Experiment:
    """Read an output directory of `flashbias ab`; raises NotARecord if it is none."""
    path = os.path.join(directory, "ab.json")
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise NotARecord(
            f"{directory!r} holds no ab.json: give the --out directory of a flashbias ab run"
        ) from error
    except ValueError as error:
        raise NotARecord(f"{path} is not valid JSON: {error}") from error
    return Experiment(
        directory=directory,
        command=document["command"],
        options=document.get("options", {}),
        runs=[_load_run(directory, entry) for entry in _all_runs(directory, document)],
        host=document.get("host", {}),
        cwd=document.get("cwd", ""),
        schedule=document.get("schedule", ""),
        started=document.get("started", 0.0),
    )


def _all_runs(directory: str, document: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The listed runs, and one that was going on when `flashbias ab` itself was killed."""
    listed = list(document["runs"])
    known = {entry["directory"] for entry in listed}
    root = os.path.join(directory, "runs")
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else ():
        number, _, label = name.partition("-")
        if name not in known and number.isdigit() and label in ("A", "B"):
            listed.append(
                {
                    "label": label,
                    "index": int(number) - 1,
                    "directory": name,
                    "status": "interrupted",
                    "message": "flashbias ab was killed during this run",
                    "exit_code": None,
                }
            )
    return listed


def _load_run(directory: str, entry: Dict[str, Any]) -> Run:
    place = os.path.join(directory, "runs", entry["directory"])
    probes = os.path.join(place, "probe")
    names = sorted(os.listdir(probes)) if os.path.isdir(probes) else []
    return Run(
        label=entry["label"],
        index=entry["index"],
        status=entry.get("status", "ok"),
        message=entry.get("message", ""),
        exit_code=entry.get("exit_code"),
        seconds=entry.get("seconds", 0.0),
        directory=entry["directory"],
        command=entry.get("command", []),
        env=entry.get("env", {}),
        load=entry.get("load", 0.0),
        nudged=entry.get("nudged", False),
        redrawn=entry.get("redrawn", False),
        processes=[load_process(os.path.join(probes, n)) for n in names if n.endswith(".jsonl")],
        log_tail=_tail(os.path.join(place, "log.txt")),
    )


def load_process(path: str) -> Process:
    """Read one probe file; a line cut off or garbled is skipped, and marks the process as truncated."""
    process = Process(path)
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw.decode("utf-8"))
                _take(process, line)
            except (ValueError, KeyError, TypeError):
                process.truncated = True
    return process


def _take(process: Process, line: Dict[str, Any]) -> None:
    event = line["event"]
    if event == "step":
        process.steps.append(line)
    elif event == "process":
        process.header = line
    elif event == "environment":
        process.environment = line
    elif event == "fallbacks":
        process.fallbacks = line["fallbacks"]
    elif event == "note":
        process.notes.append(line["text"])
    elif event == "stop":
        process.stopped = True
    elif event == "end":
        process.ended, process.error, process.calls = True, line.get("error"), line.get("calls")


def _dig(line: Any, keys: Any) -> float:
    for key in keys:
        line = line.get(key) if isinstance(line, dict) else None
    return float(line) if isinstance(line, (int, float)) else float("nan")


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


def _tail(path: str) -> str:
    """The end of a log as text: undecodable bytes and control characters shown as what they are."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - LOG_TAIL))
            text = file.read().decode("utf-8", "backslashreplace")
    except OSError:
        return ""
    return "".join(
        c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text.replace("\r", "\n")
    )
