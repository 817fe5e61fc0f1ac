"""Runs a command unpatched (A) and patched (B), one fresh process tree at a time, and keeps what they leave.

OUT/ab.json              the command, the options, one entry a run; rewritten after each run
OUT/runs/01-A/log.txt    the run's output, as bytes
OUT/runs/01-A/probe/     what its processes recorded (probe.py)
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from .. import launch
from . import probe, records

POLL = 0.05
GRACE_TO_END = 20.0  # after its N steps, how long a command may take to come to its end by itself
GRACE_TO_DIE = 5.0  # between SIGTERM and SIGKILL

Progress = Callable[[str, Dict[str, Any]], None]


class Options(NamedTuple):
    """How to run. `timeout`: seconds without a step or a byte of output after which a run counts as hung.

    `inference`: the command makes no optimiser steps and is to run to its end.
    """

    repeats: int = 1
    steps: int = 30
    warmup: int = 5
    seed: int = 0
    noise_run: bool = True
    timeout: float = 600.0
    params: Sequence[str] = (probe.DEFAULT_PARAMS,)
    env_a: Mapping[str, str] = {}
    env_b: Mapping[str, str] = {}
    inference: bool = False


def schedule(repeats: int, noise_run: bool = True) -> str:
    """Which run is what, in order: A B B A A B ..., so that a drift of the machine falls on both alike.

    A against A needs two As: one more is added where there would be one only.
    """
    order = "".join("AB" if i % 2 == 0 else "BA" for i in range(repeats))
    return order + ("A" if noise_run and repeats == 1 else "")


def run_all(
    command: Sequence[str], out: str, options: Options, progress: Optional[Progress] = None
) -> List[Dict[str, Any]]:
    """Run the whole schedule; returns the entries of ab.json's "runs". Ctrl-C ends the run and the schedule.

    A side that failed is not repeated: what is left of the schedule then has nothing to add. Where two As
    agree bit for bit, A against A says nothing about rounding, so one more A is run whose parameters are
    nudged by a few units in the last place after its first step: how far that one drifts is how far rounding
    alone carries this command. Where B draws other random numbers than A (dropout), that A draws others too.
    """
    progress = progress or (lambda event, run: None)
    out = os.path.abspath(out)
    os.makedirs(out, exist_ok=True)
    order = schedule(options.repeats, options.noise_run)
    document: Dict[str, Any] = {
        "format": 1,
        "command": list(command),
        "cwd": os.getcwd(),
        "schedule": order,
        "options": {**options._asdict(), "env_a": dict(options.env_a), "env_b": dict(options.env_b)},
        "host": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "started": time.time(),
        "runs": [],
    }
    _save(out, document)
    failed = set()
    for index, label in enumerate(order):
        if label in failed:
            continue
        run = run_one(
            command, os.path.join(out, "runs", f"{index + 1:02d}-{label}"), label, index, options, progress
        )
        document["runs"].append(run)
        _save(out, document)
        progress("done", run)
        if run["status"] == "interrupted":
            break
        if run["status"] != "ok":
            failed.add(label)
    else:
        yardstick = _yardstick(out) if options.noise_run and not failed and not options.inference else None
        if yardstick:
            place = os.path.join(out, "runs", f"{len(order) + 1:02d}-A")
            run = run_one(command, place, "A", len(order), options, progress, yardstick)
            document["runs"].append(run)
            _save(out, document)
            progress("done", run)
    return document["runs"]


def _yardstick(out: str) -> Optional[str]:
    """What one more A is to be, to hold the Bs against: "redraw", "1" for nudged only, None for no such run."""
    experiment = records.load(out)
    a, b = experiment.side("A"), experiment.side("B")
    (first, *others), patched = [[run.series("loss") for run in side] for side in (a, b)]
    if not np.isfinite(first).any() or all(np.array_equal(first, x, equal_nan=True) for x in patched):
        return None
    if any(run.random != a[0].random for run in b):
        return "redraw"
    return "1" if others and all(np.array_equal(first, x, equal_nan=True) for x in others) else None


def run_one(
    command: Sequence[str],
    directory: str,
    label: str,
    index: int,
    options: Options,
    progress: Progress,
    nudge: Optional[str] = None,
) -> Dict[str, Any]:
    """One fresh process tree; never raises for what the command does. Returns its entry for ab.json."""
    probes = os.path.join(directory, "probe")
    os.makedirs(probes, exist_ok=True)
    words = [word.replace("{predictions}", os.path.join(directory, "predictions.json")) for word in command]
    overrides = options.env_a if label == "A" else options.env_b
    env = launch.prepare_environment(
        os.environ,
        patch=label == "B",
        extra={
            "PYTHONHASHSEED": str(options.seed),
            probe.DIRECTORY: probes,
            probe.STEPS: str(options.steps),
            probe.PARAMS: ",".join(options.params),
            probe.SEED: str(options.seed),
            **({probe.NUDGE: nudge} if nudge else {}),
            **overrides,
        },
    )
    run: Dict[str, Any] = {
        "label": label,
        "index": index,
        "directory": os.path.basename(directory),
        "command": words,
        "env": dict(overrides),
        "started": time.time(),
        "load": _load(),
        "nudged": nudge is not None,
        "redrawn": nudge == "redraw",
    }
    progress("start", run)
    begin = time.monotonic()
    with open(os.path.join(directory, "log.txt"), "wb") as log:
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            run.update(status="not started", message=f"cannot be started: {error}", exit_code=None)
        else:
            run.update(
                _watch(
                    child, probes, log.name, options, lambda steps: progress("steps", {**run, "steps": steps})
                )
            )
    run["seconds"] = time.monotonic() - begin
    return run


def _load() -> float:
    """The machine's load average; 0 where it cannot be had, as in some containers."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def _watch(
    child: Any, probes: str, log: str, options: Options, on_steps: Callable[[int], None]
) -> Dict[str, Any]:
    """Wait for the end of a run, or bring it about; then end what it left running."""
    signs = Signs(probes, log)
    asked_to_stop = None
    ending = None
    try:
        while child.poll() is None:
            time.sleep(POLL)
            signs.look()
            if signs.news:
                on_steps(signs.steps)
            if signs.stopped and asked_to_stop is None:
                asked_to_stop = time.monotonic()
            if asked_to_stop and time.monotonic() - asked_to_stop > GRACE_TO_END:
                ending = "stopped"
                break
            if time.monotonic() - signs.last > options.timeout:
                ending = "hung"
                break
        end_processes(child, probes)
    except KeyboardInterrupt:
        ending = "interrupted"
        with _deaf_to_interrupts():
            end_processes(child, probes)
    signs.look()
    return {**_outcome(ending, child.returncode, signs, options), "exit_code": child.returncode}


def _outcome(ending: Optional[str], code: Optional[int], signs: Signs, options: Options) -> Dict[str, Any]:
    """Status and message: ok, crashed, hung, interrupted, no steps."""
    steps = f"{signs.steps} step{'' if signs.steps == 1 else 's'} recorded"
    if ending == "interrupted":
        return {"status": "interrupted", "message": f"interrupted from the keyboard; {steps}"}
    if ending == "hung":
        return {
            "status": "hung",
            "message": f"no step and no output for {options.timeout:g} s, so it was ended; {steps}",
        }
    if code and not (signs.stopped and ending == "stopped"):
        how = f"ended by {_signal_name(-code)}" if code < 0 else f"exit status {code}"
        return {"status": "crashed", "message": f"{how}; {steps}; its last lines are in log.txt"}
    if options.inference:
        return {"status": "ok", "message": "finished"}
    if signs.steps == 0:
        return {"status": "no steps", "message": _no_steps(signs)}
    if ending == "stopped":
        return {
            "status": "ok",
            "message": f"ended {GRACE_TO_END:g} s after its {options.steps} steps; {steps}",
        }
    if signs.steps < options.steps:
        return {"status": "ok", "message": f"ended by itself; {steps} of {options.steps}"}
    return {"status": "ok", "message": steps}


def _no_steps(signs: Signs) -> str:
    if signs.processes == 0:
        return (
            "no Python process of the command loaded the probe: does it run Python with -S, -I or -E, "
            "set PYTHONPATH anew, or run inside a container?"
        )
    seen = f"{signs.processes} Python process{'' if signs.processes == 1 else 'es'} seen"
    if not signs.torch:
        return f"{seen}, none of which imported torch: is this the training command?"
    return f"{seen}, torch was imported, but no torch.optim optimizer made a step"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Signs:
    """Signs of life of a run, read off its files: growth, steps (of the busiest process), whether it was
    stopped.
    """

    def __init__(self, probes: str, log: str) -> None:
        self.probes, self.log = probes, log
        self.last = time.monotonic()
        self.size = -1
        self.steps = 0
        self.stopped = self.torch = self.news = False
        self.processes = 0
        self._read: Dict[str, List[int]] = {}  # file -> [bytes read, steps]

    def look(self) -> None:
        size = os.path.getsize(self.log)
        names = sorted(os.listdir(self.probes))
        self.processes = len(names)
        before = self.steps
        for name in names:
            path = os.path.join(self.probes, name)
            state = self._read.setdefault(name, [0, 0])
            with open(path, "rb") as file:
                file.seek(state[0])
                new = file.read()
            state[0] += len(new)
            state[1] += new.count(b'{"event": "step"')
            self.stopped = self.stopped or b'{"event": "stop"' in new
            self.torch = self.torch or b'{"event": "torch"' in new
            self.steps = max(self.steps, state[1])
            size += state[0]
        self.news = self.steps != before
        if size != self.size:
            self.size, self.last = size, time.monotonic()


def end_processes(child: Any, probes: str) -> None:
    """End the command's processes: its group, and who left the group but has the run's environment."""
    for number, grace in ((signal.SIGTERM, GRACE_TO_DIE), (signal.SIGKILL, GRACE_TO_DIE)):
        deadline = time.monotonic() + grace
        alive = _signal_all(child, probes, number)
        while alive and time.monotonic() < deadline:
            time.sleep(POLL)
            child.poll()
            alive = _signal_all(child, probes, 0)
        if not alive:
            break
    child.poll()


def _signal_all(child: Any, probes: str, number: int) -> bool:
    """Signal every process of the run; True if there was one."""
    found = False
    for process in _marked(probes) - {os.getpid()}:
        try:
            os.kill(process, number)
            found = True
        except OSError:
            pass
    try:
        os.killpg(child.pid, number)
        # A zombie leader still has a group; poll() reaps it, and only others keep the group alive.
        found = found or child.poll() is None or _group_alive(child.pid)
    except OSError:
        pass
    return found


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
        return True
    except OSError:
        return False


def _marked(probes: str) -> set[int]:
    """Processes whose environment names this run's probe directory (torchrun gives its workers sessions of
    their own).
    """
    mark = f"{probe.DIRECTORY}={probes}".encode()
    found = set()
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if mark in file.read().split(b"\0"):
                        found.add(int(name))
            except OSError:
                continue
    return found


class _deaf_to_interrupts:
    """While children are being ended, a second Ctrl-C must not leave them behind."""

    def __enter__(self) -> None:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __exit__(self, *exc: Any) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)


def _save(out: str, document: Dict[str, Any]) -> None:
    path = os.path.join(out, "ab.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, default=str)
    os.replace(path + ".part", path)


if sys.platform == "win32":
    raise ImportError("flashbias ab needs POSIX process groups; it does not run on Windows")
