"""Observe the named parameters in each Python process of `flashbias why`, and write facts.

sitecustomize starts it if FLASHBIAS_PROBE names a directory and FLASHBIAS_PROBE_WHY the parameters.
It never changes a value of the command. After the requested steps it writes
`rank<rank>-pid<pid>.json` and ends the process.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

NAMES = "FLASHBIAS_PROBE_WHY"
STEPS = "FLASHBIAS_PROBE_STEPS"
DIRECTORY = "FLASHBIAS_PROBE"
MOST_SUBJECTS = 16
BACKWARDS_PER_STEP = 64  # so many backward passes without a step count as an iteration

_observer: Optional[Observer] = None


def start(environ: Optional[Mapping[str, str]] = None) -> None:
    """Observe this process. torch is not imported here; the observer waits for its import."""
    global _observer
    environ = os.environ if environ is None else environ
    if _observer is None and environ.get(NAMES):
        import wrapt

        _observer = Observer(environ)
        wrapt.register_post_import_hook(_observer.torch_imported, "torch")
        for module in (
            "mmcv.runner.optimizer.default_constructor",
            "mmengine.optim.optimizer.default_constructor",
        ):
            wrapt.register_post_import_hook(_observer.constructor_imported, module)


class Observer:
    """Observe the modules, backward passes and optimizers of this process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.directory, self.environ = environ[DIRECTORY], environ
        self.patterns = tuple(part for part in environ[NAMES].split(",") if part)
        self.limit = int(environ.get(STEPS) or 5)
        self.pid = os.getpid()
        self.steps = self.backwards = self.skipped = self.since_step = 0
        self.subjects: Dict[int, Any] = {}  # id(parameter) -> subjects.Subject
        self.errors: List[str] = []
        self.paramwise: List[
            Dict[str, Any]
        ] = []  # paramwise_cfg of mmcv's and mmengine's optimizer constructors
        self.roots: List[Any] = []
        self.called: Set[str] = set()
        self._local = threading.local()
        self.depth = 0
        self.optimizer_steps = 0
        self.trace: Any = None
        self.stopping = self.done = False

    @property
    def stack(self) -> List[Tuple[str, Any]]:
        """Return the modules that are running in this thread, outermost first."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: List[Tuple[str, Any]] = self._local.stack
        return stack

    # -- installing --------------------------------------------------------------------------------

    def torch_imported(self, torch: Any) -> None:
        try:
            self._install(torch)
        except Exception as error:  # must not break the import of torch
            self.note_error(error)

    def _install(self, torch: Any) -> None:
        from torch.nn.modules import module as modules
        from torch.optim import optimizer as optim

        from .._torch_internals import all_functions_off
        from ..ab import capture
        from . import loading
        from .trace import Trace

        self.torch, self.functions_off = torch, all_functions_off
        self.trace = Trace(lambda: self.stack[-1][0] if self.stack else "")
        self.trace.__enter__()  # until the process ends
        modules.register_module_forward_pre_hook(self._before_forward)
        try:
            modules.register_module_forward_hook(
                self._after_forward, with_kwargs=True, always_call=True
            )
        except TypeError:
            modules.register_module_forward_hook(
                lambda m, args, out: self._after_forward(m, args, {}, out)
            )
        optim.register_optimizer_step_pre_hook(self._before_step)
        optim.register_optimizer_step_post_hook(self._after_step)
        capture._wrap(torch.autograd, "backward", self._around_backward)
        capture._wrap(
            torch.nn.Module,
            "_load_from_state_dict",
            lambda original: loading.around(original, self),
        )
        for scaler in capture._scaler_classes(torch):
            capture._wrap(scaler, "step", self._around_scaler)
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self.finish)

    def constructor_imported(self, module: Any) -> None:
        from ..ab import capture

        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__name__ == "DefaultOptimizerConstructor":
                capture._wrap(cls, "__call__", self._around_constructor)

    def _around_constructor(self, original: Any) -> Any:
        def __call__(constructor: Any, *args: Any, **kwargs: Any) -> Any:
            self.paramwise.append(
                {
                    "paramwise_cfg": getattr(constructor, "paramwise_cfg", None) or {},
                    "base_lr": getattr(constructor, "base_lr", None),
                }
            )
            return original(constructor, *args, **kwargs)

        return __call__

    def _forked(self) -> None:
        self.done = True
        if self.trace is not None:
            self.trace.off = True

    def note_error(self, error: BaseException) -> None:
        if len(self.errors) < 10:
            self.errors.append(f"{type(error).__name__}: {error}"[:300])

    # -- modules -----------------------------------------------------------------------------------

    def _before_forward(self, module: Any, args: Any) -> None:
        if self.done:
            return
        try:
            if not self.stack:
                self._watch_parameters(module)
            self.stack.append((type(module).__name__, module))
            self.called.add(type(module).__name__)
        except Exception as error:
            self.note_error(error)
        if self.stopping and len(self.stack) == 1 and self.depth == 0:
            self._stop()

    def _after_forward(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        if self.done:
            return
        try:
            while self.stack and self.stack[-1][1] is not module:
                self.stack.pop()  # its forward raised (torch without always_call)
            if self.stack:
                self.stack.pop()
            if self.torch.is_grad_enabled():
                with self.functions_off():
                    self._received(module, args, kwargs, out)
        except Exception as error:
            self.note_error(error)

    def _received(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record if a module received a marked tensor, and if its output depends on it."""
        from . import graph
        from .trace import Mark, tensors_in

        marks = [
            mark
            for mark in map(self.trace.mark_of, tensors_in((args, kwargs), 4))
            if mark is not None and mark.live
        ]
        if not marks:
            return
        names = frozenset().union(*(mark.names for mark in marks))
        outputs = [t for t in tensors_in(out, 4) if t.is_floating_point()]
        marked_names: Set[str] = set()
        for mark in map(self.trace.mark_of, outputs):
            marked_names |= mark.names if mark is not None and mark.live else set()
        for subject in self.subjects.values():
            if subject.name not in names:
                continue
            depends_on_it = subject.name in marked_names or graph.depends(
                outputs, [subject.parameter]
            )
            if depends_on_it:
                for tensor in outputs:
                    if tensor.requires_grad and self.trace.mark_of(tensor) is None:
                        self.trace.mark(tensor, Mark(frozenset((subject.name,)), True))
            subject.note_received(type(module).__name__, depends_on_it)

    def _watch_parameters(self, root: Any) -> None:
        """Watch the parameters of a module that is called at top level; each module only once."""
        if any(root is known for known in self.roots):
            return
        self.roots.append(root)
        from ..monitor.models import named
        from .subjects import Subject

        for name, parameter in named(root, self.patterns).items():
            if id(parameter) not in self.subjects and len(self.subjects) < MOST_SUBJECTS:
                is_taken = any(subject.name == name for subject in self.subjects.values())
                label = f"{name} (of {type(root).__name__})" if is_taken else name
                subject = Subject(label, name, parameter, root)
                self.subjects[id(parameter)] = subject
                self.trace.watch(label, parameter)

    # -- backward ----------------------------------------------------------------------------------

    def _around_backward(self, original: Any) -> Any:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self.done:
                return original(tensors, *args, **kwargs)
            if self.stopping and self.depth == 0:
                self._stop()
            with self.functions_off():
                paths = self._watch_graph(tensors)
            self.depth += 1
            try:
                result = original(tensors, *args, **kwargs)
            finally:
                self.depth -= 1
                try:
                    for subject, nodes, handles in paths:
                        subject.end_backward(nodes)
                        for handle in handles:
                            handle.remove()
                except Exception as error:
                    self.note_error(error)
            if self.depth == 0:
                self.backwards += 1
                self.since_step += 1
                if self.since_step >= BACKWARDS_PER_STEP * self.limit:
                    self._stop()
            return result

        return backward

    def _watch_graph(self, tensors: Any) -> List[Any]:
        """Register hooks on the nodes between the loss and each parameter.

        This is also done for backward passes inside the recomputation of a checkpoint.
        """
        from . import graph

        watched = []
        try:
            if self.depth == 0:
                for subject in self.subjects.values():
                    subject.begin_iteration()
            roots = graph.roots_of(tensors)
            parents = graph.parents_of(roots)
            if self.depth == 0:
                checkpoints = sum("CheckpointFunction" in node.name() for node in parents)
                for subject in self.subjects.values():
                    subject.checkpoints = checkpoints
            for subject in self.subjects.values():
                nodes = graph.path(parents, subject.parameter)
                if nodes or any(
                    getattr(node, "variable", None) is subject.parameter for node in parents
                ):
                    subject.reaches = True
                handles = []
                for node, measured in nodes:
                    measured.site = self.trace.sites.get(node)
                    handles.append(node.register_hook(measured.hook))
                watched.append((subject, [measured for _, measured in nodes], handles))
        except Exception as error:
            self.note_error(error)
        return watched

    # -- optimizers --------------------------------------------------------------------------------

    def _around_scaler(self, original: Any) -> Any:
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before = self.optimizer_steps
            result = original(scaler, optimizer, *args, **kwargs)
            if self.optimizer_steps == before and not self.done:
                self.skipped += 1
                self._iteration_ended()
            return result

        return step

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.done:
            return
        self.optimizer_steps += 1
        try:
            self.trace.stepping = True
            for subject in self.subjects.values():
                subject.before_step(optimizer)
        except Exception as error:
            self.note_error(error)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.done:
            return
        try:
            self.trace.stepping = False
            with self.functions_off():
                for subject in self.subjects.values():
                    subject.after_step(optimizer)
        except Exception as error:
            self.note_error(error)
        if self.since_step:
            self.steps += 1
            self._iteration_ended()

    def _iteration_ended(self) -> None:
        self.since_step = 0
        try:
            self._collect_events()
        except Exception as error:
            self.note_error(error)
        if self.steps + self.skipped >= self.limit:
            self.stopping = True

    def _collect_events(self) -> None:
        for subject in self.subjects.values():
            subject.end_iteration(self.trace.events.get(subject.name, []))
        self.trace.clear()

    # -- the end -----------------------------------------------------------------------------------

    def _stop(self) -> None:
        """End the process, one forward or backward pass after the last step.

        Code that writes to parameters between steps has run by then.
        """
        with self.functions_off():
            for subject in self.subjects.values():
                subject.note_value()
        self.finish()
        try:
            with open(os.path.join(self.directory, "stopped"), "w"):
                pass
        except OSError as error:
            self.note_error(error)
        raise SystemExit(0)

    def finish(self) -> None:
        """Write the facts, once. Never raises."""
        if self.done or os.getpid() != self.pid:
            return
        self.done = True
        if self.trace is not None:
            self.trace.off = True
        try:
            from . import surroundings

            facts = surroundings.facts(self)
            os.makedirs(self.directory, exist_ok=True)
            name = f"rank{self.environ.get('RANK', '0')}-pid{self.pid}.json"
            with open(os.path.join(self.directory, name), "w") as file:
                json.dump(facts, file)
        except Exception as error:
            print(f"flashbias: this process cannot be recorded: {error!r}", file=sys.stderr)
