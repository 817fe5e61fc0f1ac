"""The `aqr=dict(...)` of a transformer's config and FLASHBIAS_AQR: one set of options, checked by name."""
from __future__ import annotations

import ast
import math
from typing import Any, Dict, NamedTuple, Optional

from .. import settings

PER = ("scalar", "head", "layer")
# option -> least, largest, the same in words
NUMBERS = {
    "init_bias_scale": (-math.inf, math.inf, "a finite number"),
    "drop": (0.0, 1.0, "a number from 0 to 1"),
    "supervision": (0.0, math.inf, "a finite number of at least 0"),
}


class Options(NamedTuple):
    """What `aqr=dict(enable=True, ...)` may hold."""

    enable: bool = False
    per: str = "scalar"
    init_bias_scale: float = 1.0
    cameras: Optional[int] = None  # camera segments: 1 = all as one, V = one each; None: as the transformer has it
    locality: Any = False
    hidden_dims: Optional[int] = None
    eps: float = 1e-6
    drop: float = 0.0  # probability of dropping a sensor, in training
    supervision: float = 0.0  # weight of the cross entropy against the dropped sensor


def read(given: Any, source: str = "aqr") -> Options:
    """A bool, or a dict of options; ValueError or TypeError names what is wrong."""
    if isinstance(given, bool):
        return Options(enable=given)
    if not isinstance(given, dict):
        raise TypeError(f"{source}: expected True, False or a dict, got {type(given).__name__}")
    unknown = sorted(str(name) for name in given if name not in Options._fields)
    if unknown:
        near = {name: settings.nearest(name, Options._fields) for name in unknown}
        named = ", ".join(f"{name} (the nearest is {near[name]})" if near[name] else name for name in unknown)
        raise ValueError(f"{source}: unknown option {named}; known: {', '.join(Options._fields)}")
    options = Options(**given)
    if options.locality in (0, 1):
        options = options._replace(locality=bool(options.locality))
    if not isinstance(options.enable, int) or options.enable not in (0, 1):
        raise TypeError(f"{source}.enable: expected True or False, got {options.enable!r}")
    options = options._replace(enable=bool(options.enable))
    if options.per not in PER:
        near_per = settings.nearest(str(options.per), PER)
        raise ValueError(f"{source}.per: expected one of {', '.join(PER)}, got {options.per!r}"
                         + (f"; the nearest is {near_per!r}" if near_per else ""))
    for name, (low, high, words) in NUMBERS.items():
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{source}.{name}: expected a number, got {value!r}")
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{source}.{name}: expected {words}, got {value!r}")
    for name, least in (("cameras", 0), ("hidden_dims", 1)):
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{source}.{name}: expected an integer or None, got {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{source}.{name}: expected an integer of at least {least}, got {value!r}")
    return options


def from_environment() -> Optional[Options]:
    """FLASHBIAS_AQR: a switch ("1", "off"), or "key=value,..." with enable implied; None where unset."""
    text = settings.current().aqr
    if not text:
        return None
    if text.lower() in settings.TRUE + settings.FALSE:
        return Options(enable=text.lower() in settings.TRUE)
    given: Dict[str, Any] = {"enable": True}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"FLASHBIAS_AQR={text!r}: expected 1, 0 or key=value,..., got {part!r}")
        given[key.strip()] = _value(value.strip())
    return read(given, "FLASHBIAS_AQR")


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
