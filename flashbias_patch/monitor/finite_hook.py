"""FiniteWatchHook for the runners of mmcv 1.x and mmengine (see runner_hooks.py)."""

from __future__ import annotations

from typing import Any, Iterator, Optional, Sequence

NAME = "FiniteWatchHook"


def make(base: Any, mmengine: bool) -> type:
    """Return the hook class for the runner of mmcv 1.x or mmengine."""

    class FiniteWatchHook(base):  # type: ignore[misc]
        """Name the first output or gradient that is nan or infinite; see monitor.FiniteWatch.

        names: watch only modules whose name starts with one of these. stop: end the training with
        FloatingPointError for a value that is not finite. At the default priority the hook comes
        after that of the optimizer. Gradients of a step that GradScaler skipped are ignored.
        """

        def __init__(self, names: Sequence[str] = ("",), stop: bool = False) -> None:
            super().__init__()
            if isinstance(names, str):
                raise TypeError(f"names must be a sequence of strings, got the string {names!r}")
            self.names, self.stop = tuple(names), stop
            self.watch: Any = None
            self._scale: Optional[float] = None

        def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            if self.watch is None:
                from .finite import FiniteWatch

                self.watch = FiniteWatch(runner.model, self.names, stop=self.stop)
                self._scale = _loss_scale(runner, mmengine)

        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            before, self._scale = self._scale, _loss_scale(runner, mmengine)
            skipped = before is not None and self._scale is not None and self._scale < before
            self.watch.update(runner.iter + 1, skipped=skipped)
            if self.watch.first is not None:
                self._close()

        def after_run(self, runner: Any) -> None:
            self._close()

        def _close(self) -> None:
            """Remove the hooks from the model, so that training is not slowed down any more."""
            if self.watch is not None:
                self.watch.close()

    return FiniteWatchHook


def _loss_scale(runner: Any, mmengine: bool) -> Optional[float]:
    """Return the scale of GradScaler, which decreases after a skipped step; None without
    one."""
    for owner in _owners(runner, mmengine):
        scaler: Any = getattr(owner, "loss_scaler", None)
        if hasattr(scaler, "get_scale"):
            return float(scaler.get_scale())
    return None


def _owners(runner: Any, mmengine: bool) -> Iterator[Any]:
    """Yield objects that may have a `loss_scaler`: the optimizer wrapper (mmengine) or hooks
    (mmcv)."""
    if mmengine:
        yield runner.optim_wrapper
    else:
        yield from runner.hooks
