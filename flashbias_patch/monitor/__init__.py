"""What training tells you: named parameters such as bias_scale to log lines, JSONL and TensorBoard.

`ParameterMonitor` for a loop of one's own; `FiniteWatch` names the first output or gradient that is
nan or infinite; `BiasScaleMonitorHook` for mmcv 1.x and mmengine (monitor/hooks.py), which is why
importing this package imports no torch.
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
