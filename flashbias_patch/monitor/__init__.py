"""Monitor training: parameters such as bias_scale, and the first value that is not finite.

`ParameterMonitor` logs named parameters and writes JSONL and TensorBoard files. `FiniteWatch` names
the first output or gradient that is nan or infinite. `BiasScaleMonitorHook` (runner_hooks.py) does
the first for mmcv 1.x and mmengine; because of that hook, importing this package imports no torch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["FiniteWatch", "ParameterMonitor"]


def __getattr__(name: str) -> Any:
    if name == "FiniteWatch":
        from .finite import FiniteWatch

        return FiniteWatch
    if name != "ParameterMonitor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .parameters import ParameterMonitor

    return ParameterMonitor
