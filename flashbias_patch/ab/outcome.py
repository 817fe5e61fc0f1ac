"""The outcome of a run: its signs of life while it runs, then its status and message."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from . import reading, records

if TYPE_CHECKING:
    from .runner import Options

GRACE_TO_END = 20.0  # after its N steps, how long a command may take to come to its end by itself
INTERRUPTED = "interrupted"
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUDA error: out of "
    r"memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: (can't|not enough)|^MemoryError|HIP out of memory",
    re.MULTILINE,
)


def of(
    ending: Optional[str], code: Optional[int], signs: Signs, options: Options
) -> Dict[str, Any]:
    """Status and message: ok, crashed, out of memory, hung, interrupted, record lost, no steps."""
    steps = f"{signs.steps} step{'' if signs.steps == 1 else 's'} recorded"
    if ending == INTERRUPTED:
        return {"status": INTERRUPTED, "message": f"interrupted; {steps}"}
    if ending == "hung":
        return {
            "status": "hung",
            "message": f"no step and no output for {options.timeout:g} s, so it was ended; {steps}",
        }
    if ending not in (None, "stopped"):
        return {
            "status": "record lost",
            "message": f"it could not be watched and was ended ({ending}); {steps}",
        }
    if code and not (signs.stopped and ending == "stopped"):
        how = f"ended by {_signal_name(-code)}" if code < 0 else f"exit status {code}"
        if _out_of_memory(signs):
            return {"status": records.OUT_OF_MEMORY, "message": f"{how}; {steps}"}
        killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        how += ", as the kernel does where the host's memory runs out" if killed else ""
        return {"status": "crashed", "message": f"{how}; {steps}; its last lines are in log.txt"}
    if options.inference:
        return {"status": "ok", "message": "finished"}
    if signs.steps == 0:
        return {"status": "no steps", "message": _no_steps(signs, options)}
    if ending == "stopped":
        return {
            "status": "ok",
            "message": f"ended {GRACE_TO_END:g} s after its {options.steps} steps; {steps}",
        }
    if signs.steps < options.steps:
        return {"status": "ok", "message": f"ended by itself; {steps} of {options.steps}"}
    return {"status": "ok", "message": steps}


def _out_of_memory(signs: Signs) -> bool:
    """Did a process end by an out-of-memory error? By its last exception, or else by the end of the
    output."""
    errors = [p.error for p in signs.recorded() if p.error]
    return any(OUT_OF_MEMORY.search(text) for text in errors or [signs.tail()])


def _no_steps(signs: Signs, options: Options) -> str:
    if signs.processes == 0:
        return (
            "no Python process of the command loaded the probe: does it run Python with -S, -I "
            "or -E, "
            "set PYTHONPATH anew, or run inside a container?"
        )
    seen = f"{signs.processes} Python process{'' if signs.processes == 1 else 'es'} seen"
    if not signs.torch:
        return f"{seen}, none of which imported torch: is this the training command?"
    if options.mode == "infer":
        which = f"module {options.module!r}" if options.module else "module"
        return f"{seen}, but no {which} made a forward pass in eval mode or without gradients"
    forward = next((p.forward for p in signs.recorded() if p.forward), None)
    hint = f"; {forward} made a forward pass: is it inference (`--mode infer`)?" if forward else ""
    return f"{seen}, torch was imported, but no torch.optim optimizer made a step{hint}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Signs:
    """Signs of life of a run, read from its files: growth, steps (of the busiest process), whether
    it was stopped.

    What was read is kept, so that it outlives the files.
    """

    def __init__(self, probes: str, log: Any) -> None:
        self.probes, self.log = probes, log
        self.last = time.monotonic()
        self.size = -1
        self.steps = 0
        self.stopped = self.torch = False
        self.news = self.grown = False  # more steps, more lines of any kind, at the last look
        self.processes = 0
        self._read: Dict[str, bytearray] = {}
        self._steps: Dict[str, int] = {}

    def look(self) -> None:
        """Raises OSError where the files are gone."""
        size = os.fstat(self.log.fileno()).st_size
        names = sorted(os.listdir(self.probes))
        self.processes = len(names)
        before, written = sum(self._steps.values()), sum(map(len, self._read.values()))
        for name in names:
            kept = self._read.setdefault(name, bytearray())
            with open(os.path.join(self.probes, name), "rb") as file:
                file.seek(len(kept))
                new = file.read()
            kept += new
            self._steps[name] = self._steps.get(name, 0) + new.count(b'{"event": "step"')
            self.stopped = self.stopped or b'{"event": "stop"' in new
            self.torch = self.torch or b'{"event": "torch"' in new
            self.steps = max(self.steps, self._steps[name])
            size += len(kept)
        self.news = sum(self._steps.values()) != before
        self.grown = sum(map(len, self._read.values())) != written
        if size != self.size:
            self.size, self.last = size, time.monotonic()

    def recorded(self) -> List[records.Process]:
        return [
            reading.parse_process(os.path.join(self.probes, name), bytes(content))
            for name, content in sorted(self._read.items())
        ]

    def tail(self) -> str:
        """The end of the output."""
        return reading.tail_of(self.log)
