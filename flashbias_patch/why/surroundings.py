"""Collect the facts of a process; if a parameter is missing, also similar names and options."""

from __future__ import annotations

import gc
import re
import sys
from typing import Any, Dict, List

from .. import telemetry
from ..settings import nearest
from .subjects import matching

SWITCH = re.compile(r"(learn|enable|use|with)[a-z_]*|[a-z_]*(aqr|bias)[a-z_]*")
HAVING = ("aqr", "bias", "learnable", "scale", "rout")


def facts(observer: Any) -> Dict[str, Any]:
    """Return the observations of `observer` as a JSON-able dict."""
    if observer.trace is not None and any(observer.trace.events.values()):
        observer._collect_events()  # events of an unfinished iteration
    torch = sys.modules.get("torch")
    found: Dict[str, Any] = {
        "argv": getattr(sys, "orig_argv", None) or sys.argv,
        "patterns": list(observer.patterns),
        "steps": observer.steps,
        "backwards": observer.backwards,
        "skipped": observer.skipped,
        "roots": [type(root).__name__ for root in observer.roots[:20]],
        "errors": list(observer.errors),
        "torch": getattr(torch, "__version__", None),
        "calls": dict(telemetry.calls),
        "unreached": telemetry.unreached_biases(),
        "patched": _patched(),
        "called": sorted(observer.called),
        "paramwise": [_plain(entry) for entry in observer.paramwise],
        "parameters": [],
        "writes": [],
        "others": {},
    }
    if observer.trace is None:
        return found
    from .loading import LOADS

    found["errors"] += observer.trace.errors
    found["writes"] = observer.trace.writes
    for subject in observer.subjects.values():
        entry = subject.as_dict()
        entry["loads"] = [load.facts for load in LOADS if load.parameter is subject.parameter]
        found["parameters"].append(entry)
    if not observer.subjects:
        found["others"] = _others(observer)
    return found


def _patched() -> List[str]:
    hooks = sys.modules.get("flashbias_patch.patching.install")
    return [] if hooks is None else sorted({entry["class"] for entry in hooks.patched()})


def _plain(entry: Dict[str, Any]) -> Dict[str, Any]:
    keys = (entry["paramwise_cfg"] or {}).get("custom_keys") or {}
    return {
        "base_lr": entry["base_lr"],
        "custom_keys": {
            str(k): {n: float(v) for n, v in dict(options).items() if isinstance(v, (int, float))}
            for k, options in dict(keys).items()
        },
    }


def _others(observer: Any) -> Dict[str, Any]:
    """Find similar names, attributes and buffers of that name, and options that are off.

    All modules that exist in the process are searched.
    """
    torch = observer.torch
    names: List[str] = []
    attributes: List[Dict[str, str]] = []
    switches: List[str] = []
    last = [pattern.rsplit(".", 1)[-1].strip("*") for pattern in observer.patterns]
    for module in [
        o
        for o in gc.get_objects()
        if issubclass(type(o), torch.nn.Module) and "_parameters" in vars(o)
    ]:
        for name in module._parameters:
            names.append(name)
        for name, value in [*module._buffers.items(), *vars(module).items()]:
            if name.startswith("_") or value is None:
                continue
            if name in last or matching(name, observer.patterns):
                kind = "a buffer" if name in module._buffers else f"a plain {type(value).__name__}"
                attributes.append({"name": f"{type(module).__name__}.{name}", "what": kind})
            if value is False and SWITCH.fullmatch(name) and any(word in name for word in HAVING):
                switches.append(f"{type(module).__name__}.{name} is False")
        if vars(module).get("aqr", 0) is None or module._modules.get("aqr", 0) is None:
            switches.append(f"{type(module).__name__}.aqr is None")
    near = sorted({name for pattern in last for name in [nearest(pattern, set(names))] if name})
    near += sorted(
        {
            name
            for name in names
            if any(word in name for word in ("bias_scale", "aqr", "logit_scale"))
        }
        - set(near)
    )
    return {"near": near[:5], "attributes": attributes[:5], "switches": sorted(set(switches))[:5]}
