"""Inside every Python process of a measured command: one JSON line for each training iteration.

Started by sitecustomize when FLASHBIAS_PROBE names a directory. Imports no torch; it waits for the
command to. Lines, in order of appearance (all times in seconds, memory in bytes, no number that
JSON does not have: "nan", "inf" and "-inf" are strings):

    {"event": "process", argv, pid, ppid, rank, env, ...}   at start
    {"event": "environment", torch, gpu, ...}               at the first step
    {"event": "step", step, wall_s, cuda_s, loss, loss_parts, grad_norm, params, param_grads,
     memory, calls, loader_s, loaders}
    {"event": "fallbacks", "fallbacks": [...]}              whenever there are new ones
    {"event": "profile", steps, device, kernels, rest_s}    after the timed steps
    {"event": "restart"}                                    the steps so far were no iterations
    {"event": "stop", steps}                                the requested number of steps is reached
    {"event": "end", error, calls}                          the interpreter shut down in order

A file without its last line belongs to a process that was killed. On CUDA a step's values are
copied to pinned memory and picked up by a later step once their event has passed, so that no step
waits for the device. `wall_s` and `cuda_s` run from the end of one step's recording to the
beginning of the next one's: neither holds what the recording itself takes.

A step is an iteration: backward passes, then whatever optimisers step (iterations.py). Steps are
counted, and the command is stopped after the requested number, also where nothing can be written.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, Mapping, Optional

from . import iterations, lines, process_lines
from . import probe_variables as variables

MAX_FAILURES = 3  # of recording, after which steps are only counted

_recorder: Optional[Recorder] = None


def start(environ: Optional[Mapping[str, str]] = None) -> Optional[Recorder]:
    """Begin recording in this process; None if FLASHBIAS_PROBE is unset. Never raises, imports no
    torch."""
    global _recorder
    environ = os.environ if environ is None else environ
    directory = environ.get(variables.DIRECTORY)
    if not directory or _recorder is not None:
        return _recorder
    try:
        _recorder = Recorder(directory, environ)
        _recorder.begin()
        if environ.get(variables.STAND_IN):
            from . import stand_in

            stand_in.offer()
    except Exception as error:
        with contextlib.suppress(Exception):  # standard error may be closed
            print(f"flashbias: this process cannot be recorded: {error!r}", file=sys.stderr)
    return _recorder


class Recorder:
    """Listens to this process and writes `rank<rank>-pid<pid>.jsonl`."""

    def __init__(self, directory: str, environ: Mapping[str, str]) -> None:
        self.directory = directory
        self.environ = environ
        self.limit = int(environ.get(variables.STEPS) or 0)
        self.suffixes = [
            s for s in environ.get(variables.PARAMS, variables.DEFAULT_PARAMS).split(",") if s
        ]
        self.seed = environ.get(variables.SEED)
        self.nudge = variables.Nudge.parse(environ.get(variables.NUDGE) or "")
        watcher = environ.get(variables.WATCHER) or "0"
        self.watcher = int(watcher) if watcher.isdigit() and lines.alive(int(watcher)) else 0
        self.torch: Any = None
        self.inbox: Any = None
        self.gpu: Any = None
        self.waits: Any = None
        self.sketch: Any = None  # of inference
        self.nudged = 0  # identity of the module whose parameters were nudged before its first pass
        self.infers = environ.get(variables.MODE) == "infer"
        self.profiled = int(environ.get(variables.PROFILE) or 0)
        self._fresh()

    def _fresh(self) -> None:
        self.file: Optional[lines.Lines] = None
        self.pending: Deque[Any] = deque()
        self.step = 0
        self.failures = 0
        self.stopping = False
        self.counter = iterations.Counter()
        self.parameters: Dict[str, Any] = {}
        self.last_end: Optional[float] = None
        self.fallbacks = 0
        self.profiler: Any = None
        self.forward: Optional[str] = None  # class of the first module that was called

    # -- life of the process -----------------------------------------------------------------------

    def begin(self) -> None:
        import wrapt

        self._open()
        atexit.register(self.end)
        os.register_at_fork(after_in_child=self._fresh)  # a forked worker records only if it trains
        if self.seed is not None:
            import random

            random.seed(self._own_seed())
            wrapt.register_post_import_hook(
                lambda m: m.random.seed(self._own_seed() % 2**32), "numpy"
            )
        wrapt.register_post_import_hook(self._torch_arrived, "torch")

    def _own_seed(self) -> int:
        return int(self.seed or 0) + int(self.environ.get("RANK") or 0)

    def _torch_arrived(self, torch: Any) -> None:
        try:
            # profiling and step_lines: so that they are not imported within an iteration
            from . import capture, cuda, inference, profiling, step_lines, waits  # noqa: F401

            self.torch, self.inbox, self.gpu = torch, capture.Inbox(torch), cuda.Gpu(torch)
            self.waits = waits.Waits()
            waits.listen(self.waits)
            capture.listen(torch, self.inbox, self.on_backward, self.on_skipped)
            if self.infers:
                name = self.environ.get(variables.MODULE) or ""
                self.sketch = inference.Sketcher(torch)
                heard = self._before_forward, self.on_forward, self._restart
                inference.Listener(torch, self.gpu, *heard, name).listen()
            else:
                capture.on_optimizer_step(self.on_step, self.inbox)
                inference.first_call(torch, self._heard)
            if self.seed is not None:
                torch.manual_seed(self._own_seed())
            self.write({"event": "torch", "version": torch.__version__})
        except Exception as error:  # a probe must not break an import
            self._note(error)

    def _open(self) -> None:
        os.makedirs(self.directory, exist_ok=True)
        rank = self.environ.get("RANK", "0")
        self.file = lines.Lines(os.path.join(self.directory, f"rank{rank}-pid{os.getpid()}.jsonl"))
        self.write(process_lines.process(self.environ, rank))

    def write(self, line: Dict[str, Any]) -> None:
        if self.file is None:
            self._open()
            util = sys.modules.get("multiprocessing.util")
            if util is not None:  # forked workers leave by os._exit: atexit never runs there
                util.Finalize(None, self.end, exitpriority=10)
        assert self.file is not None
        self.file.write(line)

    def end(self) -> None:
        """Write what is pending and the last line; safe to call twice."""
        if self.file is None:
            return
        try:
            self._write_arrived(everything=True)
            if self.profiler is not None:
                self._end_profile()
            error = getattr(sys, "last_value", None)
            if (
                self.torch is not None and not self.step
            ):  # inference: all that there will be to tell
                self.write(process_lines.environment(self.torch, self.gpu, self.environ))
            self.write(
                {
                    "event": "end",
                    "steps": self.step,
                    "calls": self._calls(),
                    "forward": self.forward,
                    "error": None if error is None else f"{type(error).__name__}: {error}"[:500],
                }
            )
        except Exception as error:
            self._note(error)
        finally:
            if self.file is not None:
                self.file.close()
            self.file = None
            self.limit = 0

    def _note(self, error: BaseException) -> None:
        self.failures += 1
        with contextlib.suppress(Exception):
            self.write({"event": "note", "text": f"probe: {type(error).__name__}: {error}"[:500]})

    # -- a step ------------------------------------------------------------------------------------

    def on_step(self, optimizer: Any) -> None:
        """After an optimiser's step."""
        self._react(self.counter.stepped, optimizer)

    def on_backward(self) -> None:
        """After an outermost backward pass."""
        self._react(self.counter.ended_backward, None)

    def on_skipped(self, optimizer: Any) -> None:
        """A gradient scaler met infinities and left the optimiser's step out: an iteration all the
        same."""
        self._react(self.counter.skipped, optimizer)

    def _react(self, count: Any, optimizer: Any) -> None:
        begin = time.perf_counter()
        if self.stopping:
            raise SystemExit(0)
        ended = None
        try:
            if not self.gpu.capturing():  # a capture of a CUDA graph computes nothing
                ended = count(self.inbox, optimizer)
        except Exception as error:
            self._note(error)
        if ended is None:
            return

        def record() -> None:
            if ended.new:
                self.gpu.follow(ended.optimizer)
            self._record(ended, begin, self.gpu.event())

        self._iterate(record)

    def on_forward(self, module: Any, seconds: float, output: Any) -> None:
        """After a forward pass of the top module, where these are the iterations."""
        begin = time.perf_counter()
        if self.stopping:
            raise SystemExit(0)
        self._iterate(lambda: self._record_forward(module, seconds, output, begin))

    def _iterate(self, record: Callable[[], None]) -> None:
        """An iteration ended: `record()` it, or, once there are enough, profile the next ones."""
        if self.profiler is not None:
            self.inbox.clear()
            if self.profiler.step():
                self._end_profile()
                self._stop()
            return
        try:
            if self.failures < MAX_FAILURES:
                record()
        except Exception as error:
            self.gpu.last = None
            self._note(error)
        self.inbox.clear()
        self.step += 1
        gone = bool(self.watcher) and not lines.alive(self.watcher)
        if (gone or (self.limit and self.step >= self.limit)) and (
            gone or not self._begin_profile()
        ):
            self._stop()
        self.last_end = time.perf_counter()

    def _stop(self) -> None:
        self.stopping = True
        with contextlib.suppress(Exception):
            self._write_arrived(everything=True)
            self.write({"event": "stop", "steps": self.step})
        raise SystemExit(0)

    def _begin_profile(self) -> bool:
        """Begin the profile if one is requested; return whether it has begun."""
        if not self.profiled:
            return False
        try:
            from . import profiling

            self._write_arrived(everything=True)
            self.profiler = profiling.Profiler(self.torch, self.profiled, self.gpu)
            self.profiler.start()
        except Exception as error:
            self.profiler = None
            self._note(error)
        return self.profiler is not None

    def _end_profile(self) -> None:
        profiler, self.profiler = self.profiler, None
        try:
            self.write(profiler.stop())
        except Exception as error:
            profiler.cancel()
            self._note(error)

    def _heard(self, name: str) -> None:
        self.forward = name

    def _restart(self) -> None:
        """A larger module turned out to be the top one: the steps so far were no iterations."""
        self.pending.clear()
        self.step, self.last_end = 0, None
        self.write({"event": "restart"})

    def _before_forward(self, module: Any) -> None:
        """Nudge the parameters before the first pass; never raises."""
        if self.step or self.nudge is None or self.nudged == id(module):
            return
        self.nudged = id(module)
        try:
            from . import capture, step_lines

            parameters = list(module.parameters())
            half = any(p.element_size() < 4 for p in parameters[:1])
            size = step_lines.NUDGE_SIZES[
                "half" if half or self.torch.is_autocast_enabled() else "float32"
            ]
            capture.nudge_parameters(self.torch, parameters, size, self.nudge.seed)
        except Exception as error:
            self._note(error)

    def _record_forward(self, module: Any, seconds: float, output: Any, begin: float) -> None:
        from . import step_lines

        if self.step == 0:
            self.write(process_lines.environment(self.torch, self.gpu, self.environ))
        first = next(module.parameters(), None)
        line: Dict[str, Any] = {
            "event": "step",
            "step": self.step,
            "time": time.time(),
            "wall_s": seconds,
        }
        waited = self.waits.take()
        if self.last_end is not None:
            line["loop_s"] = begin - self.last_end
            line.update({"loader_s": sum(waited.values())} if waited else {})
            line.update({"loaders": waited} if len(waited) > 1 else {})
        step_lines.put_outputs(line, self.torch, self.sketch, output)
        if self.inbox.half or (first is not None and first.element_size() < 4):
            line["half"] = True
        line["memory"] = {**process_lines.resident_memory(), **self.gpu.memory()}
        calls = self._calls()
        if calls is not None:
            line["calls"] = calls
        if self.step == 0:
            line["random"] = self.gpu.random_state()
        if self.nudge is not None and self.nudge.redraw:
            self.gpu.redraw_in_step(self.nudge.seed)
        self.write(line)

    def _record(self, ended: iterations.Ended, begin: float, begun: Any) -> None:
        from . import capture, step_lines

        if self.step == 0:
            self.write(process_lines.environment(self.torch, self.gpu, self.environ))
            try:
                self.parameters = (
                    capture.find_parameters(self.torch, self.suffixes) if self.suffixes else {}
                )
            except Exception as error:  # somebody's half-made module
                self._note(error)
        inbox = self.inbox
        line: Dict[str, Any] = {
            "event": "step",
            "step": self.step,
            "time": time.time(),
            "backwards": len(inbox.losses),
            **({"skipped": True} if ended.skipped else {}),
        }
        waited = self.waits.take()
        if self.last_end is not None:
            line["wall_s"] = begin - self.last_end
            if waited:
                line["loader_s"] = sum(waited.values())
            if len(waited) > 1:
                line["loaders"] = waited
        figures = step_lines.Figures(line)
        figures.put_training(self.torch, inbox, self.gpu, ended, self.parameters)
        if inbox.half:
            line["half"] = True
        line["memory"] = {**process_lines.resident_memory(), **self.gpu.memory()}
        calls = self._calls()
        if calls is not None:
            line["calls"] = calls
        if self.step == 0:
            line["random"] = self.gpu.random_state()
            if self.nudge is not None:
                size = step_lines.NUDGE_SIZES["half" if inbox.half else "float32"]
                for each in ended.optimizers:
                    capture.nudge(self.torch, each, size, self.nudge.seed)
        if self.nudge is not None and self.nudge.redraw:
            self.gpu.redraw_in_step(self.nudge.seed)
        line["probe_s"] = time.perf_counter() - begin
        self.pending.append(self.gpu.send(line, figures.places, figures.tensors, begun))
        self._write_arrived()

    def _write_arrived(self, everything: bool = False) -> None:
        while self.pending and (everything or self.pending[0].arrived()):
            pending = self.pending.popleft()
            try:
                self.write(pending.complete())
            except Exception as error:  # the step was made, though its figures are lost
                self.write(pending.line)
                self._note(error)

    def _calls(self) -> Optional[Dict[str, int]]:
        if self.environ.get("FLASHBIAS_PATCH") == "0":
            return None
        status = getattr(sys.modules.get("flashbias_patch"), "status", None)
        if not callable(status):
            return None
        report = dict(status())
        fallbacks = list(report.get("fallbacks") or [])
        if len(fallbacks) != self.fallbacks:
            self.fallbacks = len(fallbacks)
            self.write({"event": "fallbacks", "fallbacks": fallbacks})
        return dict(report.get("calls") or {})
