"""Reads what runs left on disk: tolerant of files that end in the middle of a line."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import fields
from typing import Any, Dict, List, Optional

from .records import Experiment, NotARecord, Process, Run, choose

MOST_LOST = 100_000  # steps in a row whose lines are missing
LOG_TAIL = 4000  # bytes of a run's output shown when it failed


def load(directory: str, process: Optional[str] = None) -> Experiment:
    """Read an output directory of `flashbias ab`; raises NotARecord if it is none. `process`: see
    `choose`."""
    path = os.path.join(directory, "ab.json")
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise NotARecord(
            f"{directory!r} holds no ab.json: give the --out directory of a flashbias ab run"
        ) from error
    except (ValueError, RecursionError) as error:
        raise NotARecord(f"{path} is not valid JSON: {error}") from error
    try:
        entries = _all_runs(directory, document)
        experiment = build(directory, document, [load_run(directory, entry) for entry in entries])
    except (KeyError, TypeError, AttributeError) as error:
        raise NotARecord(
            f"{path} is not what flashbias ab writes: {type(error).__name__}: {error}"
        ) from error
    choose(experiment, process or experiment.options.get("process"))
    return experiment


def build(directory: str, document: Dict[str, Any], runs: List[Run]) -> Experiment:
    """An experiment from the content of ab.json and its runs."""
    return Experiment(
        directory=directory,
        command=[str(word) for word in document["command"]],
        options=dict(document.get("options") or {}),
        runs=runs,
        host=dict(document.get("host") or {}),
        cwd=document.get("cwd", ""),
        schedule=document.get("schedule", ""),
        started=document.get("started", 0.0),
        commit=str(document.get("commit") or ""),
        stopped=str(document.get("stopped") or ""),
    )


def _all_runs(directory: str, document: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The listed runs, and one that was going on when `flashbias ab` itself was killed."""
    listed = list(document["runs"])
    known = {entry["directory"] for entry in listed}
    root = os.path.join(directory, "runs")
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else ():
        number, _, label = name.partition("-")
        if name not in known and number.isdigit() and re.fullmatch("[A-Z]", label):
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


def load_run(directory: str, entry: Dict[str, Any]) -> Run:
    """The run of an entry of ab.json, from its files."""
    place = os.path.join(directory, "runs", entry["directory"])
    probes = os.path.join(place, "probe")
    names = sorted(os.listdir(probes)) if os.path.isdir(probes) else []
    processes = [load_process(os.path.join(probes, n)) for n in names if n.endswith(".jsonl")]
    return make_run(entry, processes, tail_of(os.path.join(place, "log.txt")))


def make_run(entry: Dict[str, Any], processes: List[Process], log_tail: str) -> Run:
    """The run of an entry of ab.json."""
    known = {f.name for f in fields(Run)} - {"processes", "log_tail", "training"}
    kept = {key: value for key, value in entry.items() if key in known and value is not None}
    kept["exit_code"] = entry.get("exit_code")
    return Run(**kept, processes=processes, log_tail=log_tail)


def load_process(path: str) -> Process:
    """Read one probe file."""
    with open(path, "rb") as file:
        return parse_process(path, file.read())


def parse_process(path: str, content: bytes) -> Process:
    """The process of a probe file; a line cut off or garbled is skipped, and marks the process as
    truncated."""
    process = Process(path)
    for raw in content.splitlines():
        if not raw.strip():
            continue
        try:
            _take(process, json.loads(raw.decode("utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError):
            process.truncated = True
    return process


def _take(process: Process, line: Dict[str, Any]) -> None:
    event = line["event"]
    if event == "step":
        lost = int(line.get("step", len(process.steps))) - len(process.steps)
        process.steps += [{}] * max(0, min(lost, MOST_LOST))  # lines that could not be written
        process.steps.append(dict(line))
    elif event == "process":
        process.header = dict(line)
    elif event == "environment":
        process.environment = dict(line)
    elif event == "fallbacks":
        process.fallbacks = [dict(entry) for entry in line["fallbacks"]]
    elif event == "note":
        process.notes.append(line["text"])
    elif event == "stop":
        process.stopped = True
    elif event == "end":
        process.ended, process.error, process.calls = True, line.get("error"), line.get("calls")
        process.forward = line.get("forward")
    elif event == "profile":
        process.profile = dict(line)
    elif event == "restart":
        process.steps.clear()


def tail_of(path: Any) -> str:
    """The end of a log (a path, or a file open for reading) as text: undecodable bytes and control
    characters escaped."""
    try:
        with open(path, "rb") if isinstance(path, str) else contextlib.nullcontext(path) as file:
            size = os.fstat(file.fileno()).st_size
            text = os.pread(file.fileno(), LOG_TAIL, max(0, size - LOG_TAIL)).decode(
                "utf-8", "backslashreplace"
            )
    except OSError:
        return ""
    return "".join(
        c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}"
        for c in text.replace("\r", "\n")
    )
