"""Several processes at the same time on one machine, and a report that is saved as they go.

A job is a command that writes a JSON file, whole, as often as it likes. Jobs start in their order
while there is room: fewer than `most` at work, and less than `memory` GiB between them. Times are
not comparable between processes that share a GPU: this is for results that do not depend on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

HERE = Path(__file__).resolve().parent
EVERY = 0.5  # seconds between two looks


class Job(NamedTuple):
    """`words` follow the Python interpreter; `out` is the file that the job writes; `gib` what it
    takes of the GPU's memory."""

    name: str
    words: Sequence[str]
    out: str
    gib: float = 0.0


def write(path: str, document: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    folder, name = os.path.split(os.path.abspath(path))
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=name, delete=False) as file:
        json.dump(document, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)


def environment() -> Dict[str, str]:
    """Of a job: this package on the path, and not installed by itself."""
    path = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "FLASHBIAS_PATCH": "0", "PYTHONPATH": os.pathsep.join(path)}


def fits(gib: float, at_work: Sequence[float], most: int, memory: float) -> bool:
    """Return True if one more job may start; the first one always may."""
    return not at_work or (len(at_work) < most and sum(at_work) + gib <= memory)


def run(
    jobs: Sequence[Job],
    most: int,
    memory: float,
    timeout: float,
    changed: Callable[[str, Dict[str, Any]], None],
) -> None:
    """Run the jobs; `changed(name, document)` whenever one has written, and at its end if it failed
    (the document then has "error"). A job is ended `timeout` seconds after its start."""
    waiting = list(jobs)
    running: List[Any] = []  # (job, process, started)
    seen: Dict[str, Dict[str, Any]] = {}
    written: Dict[str, int] = {}

    def look(job: Job) -> None:
        if os.path.exists(job.out) and os.stat(job.out).st_mtime_ns != written.get(job.name):
            written[job.name] = os.stat(job.out).st_mtime_ns
            seen[job.name] = json.loads(Path(job.out).read_text())
            changed(job.name, seen[job.name])

    try:
        while waiting or running:
            for job in list(waiting):
                if fits(job.gib, [each.gib for each, _, _ in running], most, memory):
                    waiting.remove(job)
                    process = subprocess.Popen([sys.executable, *job.words], env=environment())
                    running.append((job, process, time.monotonic()))
            time.sleep(EVERY)
            for entry in list(running):
                job, process, started = entry
                late = time.monotonic() - started > timeout
                if process.poll() is None and late:
                    process.kill()
                    process.wait()
                look(job)
                if process.poll() is None:
                    continue
                running.remove(entry)
                if process.returncode:
                    why = f"no end after {timeout:g} s" if late else "the process died"
                    known = seen.get(job.name, {})
                    changed(
                        job.name, {"error": f"{why} (exit status {process.returncode})", **known}
                    )
    finally:
        for _, process, _ in running:
            process.kill()
            process.wait()
