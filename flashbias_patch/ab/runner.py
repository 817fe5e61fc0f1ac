"""Runs a command unpatched (A), patched (B), and on further sides, one fresh process tree at a
time, and keeps what they leave.

OUT/ab.json              the command, the options, one entry a run; rewritten after each run
OUT/runs/01-A/log.txt    the run's output, as bytes
OUT/runs/01-A/probe/     what its processes recorded (probe.py)
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from .. import launch
from . import (
    clocks,
    further_runs,
    history,
    judging,
    lines,
    outcome,
    probe_variables,
    processes,
    reading,
    records,
    repeats,
    saved,
    sides,
    verdict,
)
from .outcome import INTERRUPTED, Signs
from .probe_variables import Nudge
from .records import Experiment
from .repeats import HALF_WIDTH

POLL = 0.05

OTHER_VERSIONS = "other versions"  # the status of a run, of saved.other_versions

Progress = Callable[[str, Dict[str, Any]], None]


class Options(NamedTuple):
    """Options of the runs. `timeout`: seconds without a step or a byte of output after which a run
    counts as hung.

    `inference`: the command makes no optimiser steps and is to run to its end. `stand_in`: A gets
    functions of flash_attn's names where it is not installed. `process`: the training that is
    judged (records.choose). `sides`: the further ones. `repeats`: a number, or "auto": until the
    interval is +-`half_width` percent. `max_time`: minutes after which no further pair of runs is
    begun. `mode`: infer where iterations are forward passes, of the top module or of `module`.
    `profile`: steps under torch.profiler, after the timed ones, in the first run of each side.
    `against`: the directory of an earlier comparison whose A is taken instead of running A.
    """

    repeats: Union[int, str] = 1
    steps: int = 30
    warmup: int = 5
    seed: int = 0
    noise_run: bool = True
    timeout: float = 600.0
    params: Sequence[str] = (probe_variables.DEFAULT_PARAMS,)
    env_a: Mapping[str, str] = {}
    env_b: Mapping[str, str] = {}
    inference: bool = False
    stand_in: bool = False
    process: Optional[str] = None
    sides: Sequence[sides.Side] = ()
    half_width: float = HALF_WIDTH
    max_time: Optional[float] = None
    mode: str = "train"
    module: str = ""
    profile: int = 0
    against: Optional[str] = None


def schedule(
    repeats: Union[int, str], noise_run: bool = True, others: str = "B", with_a: bool = True
) -> str:
    """The sides of the runs, in order: A B B A A B ..., so that a drift of the machine affects both
    equally. `others`: the sides beside A, as "BCD" for A B C D D C B A; `with_a`: A is run too.
    Empty for "auto": it grows as runs are made.

    A against A needs two As: one more is added where there would be one only.
    """
    if not isinstance(repeats, int):
        return ""
    once = "A" * with_a + others
    order = "".join(once if i % 2 == 0 else once[::-1] for i in range(repeats))
    return order + ("A" if with_a and noise_run and repeats == 1 else "")


class Prepared(NamedTuple):
    """A comparison that can be run: the content of its ab.json so far, and the A to be reused."""

    out: str
    options: Options
    document: Dict[str, Any]
    earlier: Optional[saved.Saved]


def run_all(
    command: Sequence[str], out: str, options: Options, progress: Optional[Progress] = None
) -> Experiment:
    """Prepare a comparison and run it: `prepare`, then `run`."""
    return run(prepare(command, out, options), progress)


def prepare(command: Sequence[str], out: str, options: Options) -> Prepared:
    """Check all that can be checked before any run; writes nothing.

    Raises:
        saved.Refused: `options.against` cannot be used.
    """
    out = os.path.abspath(out)
    document: Dict[str, Any] = {
        "format": 1,
        "command": list(command),
        "cwd": os.getcwd(),
        "commit": history.commit_of(os.getcwd()),
        "schedule": schedule(
            options.repeats,
            options.noise_run,
            sides.labels(options._asdict()),
            options.against is None,
        ),
        "options": {
            **options._asdict(),
            "env_a": dict(options.env_a),
            "env_b": dict(options.env_b),
            "sides": [[side.name, dict(side.env)] for side in options.sides],
        },
        "host": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "machine": saved.machine(),
        "started": time.time(),
        "runs": [],
    }
    earlier = None if options.against is None else saved.load(options.against, document)
    return Prepared(out, options, document, earlier)


def run(prepared: Prepared, progress: Optional[Progress] = None) -> Experiment:
    """Run the whole schedule, then the runs that the verdict still needs (further_runs.next_run).
    Ctrl-C ends both.

    A side that failed is not repeated: the rest of the schedule has then nothing to add. The
    experiment returned holds all that was recorded, also if the output directory vanished or its
    disk is full; the latter is in its `lost`.
    """
    progress = _careful(progress or (lambda event, run: None))
    out, options, document, earlier = prepared
    command = document["command"]
    experiment = reading.build(out, document, [])
    if earlier is not None:
        for entry in saved.copy(earlier, out):
            document["runs"].append(entry)
            experiment.runs.append(reading.load_run(out, entry))
    save_document(experiment, document)
    failed = set()

    def one(label: str, nudge: Optional[Nudge] = None) -> bool:
        """Make one run; False if it was interrupted."""
        index = len(document["runs"])
        if options.repeats == repeats.AUTO and nudge is None:
            document["schedule"] = experiment.schedule = document["schedule"] + label
        place = os.path.join(out, "runs", f"{index + 1:02d}-{label}")
        again = any(entry["label"] == label for entry in document["runs"])
        how = options._replace(profile=0) if again else options
        entry, recorded, tail = run_one(command, place, label, index, how, progress, nudge)
        run = reading.make_run(entry, recorded, tail)
        if earlier is not None and entry["status"] == "ok":
            why = saved.other_versions(experiment.runs[0], run)
            if why:
                entry.update(status=OTHER_VERSIONS, message=f"A is not comparable: {why}")
                run = reading.make_run(entry, recorded, tail)
        document["runs"].append(entry)
        experiment.runs.append(run)
        save_document(experiment, document)
        progress("done", entry)
        if entry["status"] != "ok":
            failed.add(label)
        return bool(entry["status"] != INTERRUPTED)

    def judge(experiment: Experiment) -> verdict.Verdict:
        records.choose(experiment, options.process)
        return judging.judge(experiment)

    try:
        plan = repeats.Plan(experiment, options, judge, progress)
        for label in plan:
            if label not in failed and not one(label):
                return experiment
        document["stopped"] = experiment.stopped = plan.stopped
        save_document(experiment, document)
        while "A" not in failed and options.noise_run:
            needed = further_runs.next_run(experiment, judge(experiment))
            if needed is None or (earlier is not None and needed.side == "A") or not one(*needed):
                break
    except KeyboardInterrupt:  # between two runs
        experiment.interrupted = True
    except records.NotARecord:  # no such training: the report says so
        pass
    return experiment


def _careful(progress: Progress) -> Progress:
    """`progress`, until it cannot write any more (its terminal is closed): that must not end the
    runs."""
    closed = False

    def careful(event: str, run: Dict[str, Any]) -> None:
        nonlocal closed
        try:
            if not closed:
                progress(event, run)
        except (OSError, ValueError):
            closed = True

    return careful


def run_one(
    command: Sequence[str],
    directory: str,
    label: str,
    index: int,
    options: Options,
    progress: Progress,
    nudge: Optional[Nudge] = None,
) -> Tuple[Dict[str, Any], List[records.Process], str]:
    """Run the command once in a fresh process tree; never raises for an error of the command.

    Returns its entry for ab.json, what its processes recorded, and the end of its output.
    """
    probes = os.path.join(directory, "probe")
    words = [
        word.replace("{predictions}", os.path.join(directory, "predictions.json"))
        for word in command
    ]
    overrides = sides.environment(options._asdict(), label)
    run: Dict[str, Any] = {
        "label": label,
        "index": index,
        "directory": os.path.basename(directory),
        "command": words,
        "env": dict(overrides),
        "started": time.time(),
        "nudged": nudge is not None,
        "redrawn": nudge is not None and nudge.redraw,
    }
    progress("start", run)
    begin, machine = time.monotonic(), processes.Machine()
    gpus = clocks.Watch({**os.environ, **overrides})
    signs, child, tail = None, None, ""
    try:
        os.makedirs(probes, exist_ok=True)
        with open(os.path.join(directory, "log.txt"), "wb+") as log:
            signs = Signs(probes, log)
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=run_environment(label, probes, options, nudge),
                start_new_session=True,
                preexec_fn=processes.end_with_parent(),
            )
            run.update(
                _watch(
                    child, signs, options, lambda steps: progress("steps", {**run, "steps": steps})
                )
            )
            tail = signs.tail()
    except OSError as error:
        run.update(status="not started", message=f"cannot be started: {error}", exit_code=None)
    except KeyboardInterrupt:  # before it was watched
        run.update(status=INTERRUPTED, message="interrupted at its start", exit_code=None)
        with processes.deaf_to_interrupts():
            if child is not None:
                processes.end(child, probes)
    run["seconds"] = time.monotonic() - begin
    run["gpus"] = gpus.stop()
    run.update(machine.since())
    return run, [] if signs is None else signs.recorded(), tail


def run_environment(
    label: str, probes: str, options: Options, nudge: Optional[Nudge]
) -> Dict[str, str]:
    """The environment of one run. Variables given for one side win, but PYTHONPATH keeps what loads
    the probe."""
    overrides = sides.environment(options._asdict(), label)
    patched = sides.is_patched(options._asdict(), label)
    stand_in = (
        {probe_variables.STAND_IN: "1", "FLASHBIAS_BACKEND": "sdpa"}
        if options.stand_in and not patched
        else {}
    )
    return launch.prepare_environment(
        {**os.environ, **overrides},
        patch=patched,
        extra={
            "PYTHONHASHSEED": str(options.seed),
            probe_variables.DIRECTORY: probes,
            probe_variables.STEPS: str(options.steps),
            probe_variables.PARAMS: ",".join(options.params),
            probe_variables.SEED: str(options.seed),
            probe_variables.WATCHER: str(os.getpid()),
            **({probe_variables.NUDGE: nudge.text} if nudge is not None else {}),
            **({probe_variables.MODE: options.mode} if options.mode != "train" else {}),
            **({probe_variables.MODULE: options.module} if options.module else {}),
            **({probe_variables.PROFILE: str(options.profile)} if options.profile else {}),
            **stand_in,
            **{name: value for name, value in overrides.items() if name != "PYTHONPATH"},
        },
    )


def _watch(
    child: Any, signs: Signs, options: Options, on_steps: Callable[[int], None]
) -> Dict[str, Any]:
    """Wait for the end of a run, or bring it about; then end what it left running, whatever happens
    here."""
    asked_to_stop = None
    ending = None
    try:
        while child.poll() is None:
            time.sleep(POLL)
            signs.look()
            if signs.news:
                on_steps(signs.steps)
            more = (
                signs.grown if options.process else signs.news
            )  # another training of the same command
            if signs.stopped and (asked_to_stop is None or more):
                asked_to_stop = time.monotonic()
            if asked_to_stop and time.monotonic() - asked_to_stop > outcome.GRACE_TO_END:
                ending = "stopped"
                break
            if time.monotonic() - signs.last > options.timeout:
                ending = "hung"
                break
    except KeyboardInterrupt:
        ending = INTERRUPTED
    except Exception as error:  # its record was removed, this process is out of descriptors, ...
        ending = f"{type(error).__name__}: {error}"
    finally:
        with processes.deaf_to_interrupts():
            processes.end(child, signs.probes)
    if ending in (None, "stopped"):
        try:
            signs.look()
        except OSError as error:
            ending = f"{type(error).__name__}: {error}"
    return {**outcome.of(ending, child.returncode, signs, options), "exit_code": child.returncode}


def save_document(experiment: Experiment, document: Dict[str, Any]) -> None:
    """Write ab.json; where that fails, say so in `experiment.lost` and go on."""
    path = os.path.join(experiment.directory, "ab.json")
    try:
        os.makedirs(experiment.directory, exist_ok=True)
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(lines.plain(document), file, indent=1, default=str, allow_nan=False)
        os.replace(path + ".part", path)
    except OSError as error:
        experiment.lost = str(error)


if sys.platform == "win32":
    raise ImportError("flashbias ab needs POSIX process groups; it does not run on Windows")
