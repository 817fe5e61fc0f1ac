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
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Tuple

from . import inference, iterations, lines, profiling

DIRECTORY = "FLASHBIAS_PROBE"
STEPS = "FLASHBIAS_PROBE_STEPS"
PARAMS = "FLASHBIAS_PROBE_PARAMS"
SEED = "FLASHBIAS_PROBE_SEED"
NUDGE = "FLASHBIAS_PROBE_NUDGE"
DEFAULT_PARAMS = "bias_scale"
STAND_IN = "FLASHBIAS_PROBE_STAND_IN"
WATCHER = (
    "FLASHBIAS_PROBE_WATCHER"  # process id of `flashbias ab`: without it the command is stopped
)
MAX_FAILURES = 3  # of recording, after which steps are only counted

# The relative change that a nudged run makes to its parameters, once: a few units in the last
# place.
NUDGES = {"float32": 2.0**-20, "half": 2.0**-10}

KEPT_ENV = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)

_recorder: Optional[Recorder] = None


def start(environ: Optional[Mapping[str, str]] = None) -> Optional[Recorder]:
    """Begin recording in this process; None if FLASHBIAS_PROBE is unset. Never raises, imports no
    torch."""
    global _recorder
    environ = os.environ if environ is None else environ
    directory = environ.get(DIRECTORY)
    if not directory or _recorder is not None:
        return _recorder
    try:
        _recorder = Recorder(directory, environ)
        _recorder.begin()
        if environ.get(STAND_IN):
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
        self.limit = int(environ.get(STEPS) or 0)
        self.suffixes = [s for s in environ.get(PARAMS, DEFAULT_PARAMS).split(",") if s]
        self.seed = environ.get(SEED)
        # "1", "2", ...: nudged, by signs of that seed; "redraw1", ...: drawing other random numbers
        # as well
        nudge = environ.get(NUDGE) or ""
        self.redraw = nudge.startswith("redraw")
        self.nudge = int(nudge[6 * self.redraw :] or 0)
        watcher = environ.get(WATCHER) or "0"
        self.watcher = int(watcher) if watcher.isdigit() and lines.alive(int(watcher)) else 0
        self.torch: Any = None
        self.inbox: Any = None
        self.gpu: Any = None
        self.waits: Any = None
        self.sketch: Any = None  # of inference
        self.nudged = 0  # identity of the module whose parameters were nudged before its first pass
        self.infers = environ.get(inference.MODE) == "infer"
        self.profiled = int(environ.get(profiling.PROFILE) or 0)
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
            from . import capture, cuda, waits

            self.torch, self.inbox, self.gpu = torch, capture.Inbox(torch), cuda.Gpu(torch)
            self.waits = waits.Waits()
            waits.listen(self.waits)
            capture.listen(torch, self.inbox, self.on_backward, self.on_skipped)
            if self.infers:
                name = self.environ.get(inference.MODULE) or ""
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
        kept = {
            k: v for k, v in self.environ.items() if k in KEPT_ENV or k.startswith("FLASHBIAS_")
        }
        self.write(
            {
                "event": "process",
                "pid": os.getpid(),
                "ppid": os.getppid(),
                "rank": int(rank) if rank.isdigit() else 0,
                "argv": getattr(sys, "orig_argv", None) or getattr(sys, "argv", []),
                "executable": sys.executable,
                "cwd": os.getcwd(),
                "python": sys.version.split()[0],
                "time": time.time(),
                "env": kept,
            }
        )

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
                self.write(self._environment())
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
        """Whether a profile was asked for and has begun."""
        if not self.profiled:
            return False
        try:
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
        if self.step or not self.nudge or self.nudged == id(module):
            return
        self.nudged = id(module)
        try:
            from . import capture

            parameters = list(module.parameters())
            half = any(p.element_size() < 4 for p in parameters[:1])
            size = NUDGES["half" if half or self.torch.is_autocast_enabled() else "float32"]
            capture.nudge_parameters(self.torch, parameters, size, self.nudge)
        except Exception as error:
            self._note(error)

    def _record_forward(self, module: Any, seconds: float, output: Any, begin: float) -> None:
        if self.step == 0:
            self.write(self._environment())
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
        with self.torch.no_grad():
            kept = inference.tensors_of(self.torch, output)
            values = [float(self.sketch(tensor)) for _, tensor in kept]
        line["outputs"] = {name: value for (name, _), value in zip(kept, values)}
        if values:
            line["output"] = sum(values)
        if self.inbox.half or (first is not None and first.element_size() < 4):
            line["half"] = True
        line["memory"] = {**_resident(), **self.gpu.memory()}
        calls = self._calls()
        if calls is not None:
            line["calls"] = calls
        if self.step == 0:
            line["random"] = self.gpu.random_state()
        if self.redraw:
            self.gpu.redraw_in_step(self.nudge)
        self.write(line)

    def _record(self, ended: iterations.Ended, begin: float, begun: Any) -> None:
        from . import capture

        if self.step == 0:
            self.write(self._environment())
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
        scalars: List[Tuple[Tuple[str, Optional[str]], Any]] = []

        def put(section: str, key: Optional[str], value: Any) -> None:
            if (
                value is not None
                and not isinstance(value, (int, float))
                and value.device.type == "cpu"
            ):
                value = float(
                    value.detach()
                )  # to send it to the GPU and back would make the step wait
            if value is None or isinstance(value, (int, float)):
                if key is None:
                    line[section] = value
                else:
                    line.setdefault(section, {})[key] = value
            else:
                scalars.append(((section, key), value))

        losses = inbox.losses
        if losses:
            put("loss", None, losses[0] if len(losses) == 1 else self.gpu.stack(losses).sum())
        for name, value in inbox.parts.items():
            put("loss_parts", name, value)
        norm = None if hasattr(inbox.clip_norm, "to_local") else inbox.clip_norm
        if norm is None:
            norm = ended.norm(self.torch)
        put("grad_norm", None, norm)
        for name, parameter in self.parameters.items():
            self._put_parameter(put, name, parameter)
        if inbox.half:
            line["half"] = True
        line["memory"] = {**_resident(), **self.gpu.memory()}
        calls = self._calls()
        if calls is not None:
            line["calls"] = calls
        if self.step == 0:
            line["random"] = self.gpu.random_state()
            if self.nudge:
                size = NUDGES["half" if inbox.half else "float32"]
                for each in ended.optimizers:
                    capture.nudge(self.torch, each, size, self.nudge)
        if self.redraw:
            self.gpu.redraw_in_step(self.nudge)
        line["probe_s"] = time.perf_counter() - begin
        self.pending.append(
            self.gpu.send(line, [p for p, _ in scalars], [v for _, v in scalars], begun)
        )
        self._write_arrived()

    def _put_parameter(self, put: Any, name: str, parameter: Any) -> None:
        from . import capture

        value = capture.local(parameter.detach())
        if not value.numel():
            return  # another rank holds it
        if value.numel() == 1:
            put("params", name, value)
        elif value.numel() <= 8:
            for i, entry in enumerate(value.reshape(-1)):
                put("params", f"{name}[{i}]", entry)
        else:
            put("params", f"|{name}|", value.float().norm())
        gradient = parameter.grad
        put(
            "param_grads",
            name,
            None if gradient is None else capture.local(gradient.detach()).float().norm(),
        )

    def _write_arrived(self, everything: bool = False) -> None:
        while self.pending and (everything or self.pending[0].arrived()):
            pending = self.pending.popleft()
            try:
                self.write(pending.complete())
            except Exception as error:  # the step was made, though its figures are lost
                self.write(pending.line)
                self._note(error)

    # -- the machine -------------------------------------------------------------------------------

    def _environment(self) -> Dict[str, Any]:
        torch = self.torch
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        numpy = sys.modules.get("numpy")
        found = {
            "event": "environment",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "numpy": getattr(numpy, "__version__", None),
            "threads": torch.get_num_threads(),
            "rank": torch.distributed.get_rank()
            if distributed
            else int(self.environ.get("RANK") or 0),
            "world_size": torch.distributed.get_world_size() if distributed else 1,
            "modules": {
                name: getattr(sys.modules[name], "__version__", "?")
                for name in (
                    "mmcv",
                    "mmengine",
                    "mmdet",
                    "mmdet3d",
                    "triton",
                    "flash_attn",
                    "flashbias_patch",
                )
                if name in sys.modules
            },
        }
        return {**found, **self.gpu.environment()}

    def _calls(self) -> Optional[Dict[str, int]]:
        if self.environ.get("FLASHBIAS_PATCH") == "0":
            return None
        status = getattr(sys.modules.get("flashbias_patch"), "status", None)
        if not callable(status):
            return None
        found = dict(status())
        fallbacks = list(found.get("fallbacks") or [])
        if len(fallbacks) != self.fallbacks:
            self.fallbacks = len(fallbacks)
            self.write({"event": "fallbacks", "fallbacks": fallbacks})
        return dict(found.get("calls") or {})


def _resident() -> Dict[str, int]:
    """Resident memory now and at most, in bytes.

    Not getrusage's maximum where /proc can be read: that one survives exec, and so starts at the
    launcher's size.
    """
    try:
        found = {}
        with open("/proc/self/status", "rb") as file:
            for row in file:
                if row.startswith(b"VmHWM"):
                    found["rss_peak"] = int(row.split()[1]) * 1024
                elif row.startswith(b"VmRSS"):
                    found["rss"] = int(row.split()[1]) * 1024
        return found
    except OSError:
        try:
            import resource
        except ImportError:
            return {}
        unit = 1 if sys.platform == "darwin" else 1024
        return {"rss_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
