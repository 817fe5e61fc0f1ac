"""Register hooks with the runners of mmcv 1.x and mmengine when either is imported.

custom_hooks = [dict(type='BiasScaleMonitorHook', interval=50, patience=50),
                dict(type='FiniteWatchHook')]
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Dict, Optional, Sequence

from .. import telemetry
from . import finite_hook

NAME = "BiasScaleMonitorHook"
MODULES = ("mmcv.runner.hooks", "mmengine.hooks")


def register(module: Any) -> None:
    """Register the hook classes; a post-import hook of mmcv.runner.hooks and mmengine.hooks.

    It never raises.
    """
    try:
        registry: Any = getattr(module, "HOOKS", None)
        if registry is None:  # mmengine.hooks does not export it
            registry = importlib.import_module("mmengine.registry").HOOKS
        for name, make_hook in ((NAME, make), (finite_hook.NAME, finite_hook.make)):
            if registry.get(name) is None:
                hook = make_hook(module.Hook, mmengine=module.__name__ == "mmengine.hooks")
                registry.register_module(name=name, module=hook)
    except Exception as error:  # must not break the import of mmcv or mmengine
        telemetry.once(
            ("monitor hook", module.__name__),
            "error",
            "%s and %s are not registered with %s: %s: %s",
            NAME,
            finite_hook.NAME,
            module.__name__,
            type(error).__name__,
            error,
        )


def make(base: Any, mmengine: bool) -> type:
    """Return the hook class for the runner of mmcv 1.x or mmengine."""

    class BiasScaleMonitorHook(base):  # type: ignore[misc]
        """Run a ParameterMonitor; its scalars also go to the log and TensorBoard of the runner.

        names: patterns of parameters. jsonl: a file, relative to work_dir of the runner, or None.
        At the default priority the hook runs after that of the optimizer and before the loggers.
        Iterations without an optimizer step (accumulation) repeat the scalars of the last step.
        """

        def __init__(
            self,
            names: Sequence[str] = ("*bias_scale",),
            interval: int = 50,
            patience: int = 50,
            jsonl: Optional[str] = "bias_scale.jsonl",
            tensorboard: Optional[str] = None,
        ) -> None:
            from .parameters import check_counts

            super().__init__()
            # Checked here, so that errors appear when the runner is built.
            check_counts(interval=interval, patience=patience)
            self.settings: Dict[str, Any] = {
                "names": names,
                "interval": interval,
                "patience": patience,
                "jsonl": jsonl,
                "tensorboard": tensorboard,
            }
            self.monitor: Any = None

        def before_run(self, runner: Any) -> None:
            if not mmengine:
                self._start(runner, runner.optimizer)

        def before_train(self, runner: Any) -> None:
            if mmengine:  # optim_wrapper is built after before_run
                self._start(runner, runner.optim_wrapper)

        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            self.monitor.update(runner.iter + 1)
            if not self.monitor.writes:
                return
            for name, record in self.monitor.last.items():
                for key in ("value", "grad_norm"):
                    if record[key] is None:
                        continue
                    if mmengine:
                        runner.message_hub.update_scalar(f"train/{name}/{key}", record[key])
                    else:
                        runner.log_buffer.update({f"{name}/{key}": record[key]})

        def after_run(self, runner: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

        def _start(self, runner: Any, optimizer: Any) -> None:
            from .parameters import ParameterMonitor

            settings = dict(self.settings)
            folder = getattr(runner, "work_dir", None)
            if settings["jsonl"] is not None and folder:
                settings["jsonl"] = os.path.join(folder, settings["jsonl"])
            self.monitor = ParameterMonitor(runner.model, optimizer=optimizer, **settings)

    return BiasScaleMonitorHook
