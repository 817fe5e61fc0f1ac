"""Define and check the options of `aqr=dict(...)` in a transformer config and of FLASHBIAS_AQR."""

from __future__ import annotations

import ast
import math
from typing import Any, Dict, NamedTuple, Optional

from .. import settings

MODALITY, WINDOW = "modality", "window"
# Options with a fixed set of values.
PER = ("scalar", "head", "layer")
CAMERA_WINDOWS = ("first", "all")
CHOICES = {"bias": (MODALITY, WINDOW), "per": PER, "camera_windows": CAMERA_WINDOWS}
# bias -> options that only this kind of bias has
ONLY = {
    MODALITY: ("cameras", "locality", "eps"),
    WINDOW: ("window", "lidar_window", "gaussian", "camera_windows", "min_scale", "max_scale"),
}
INIT_BIAS_SCALE = {MODALITY: 1.0, WINDOW: 2.5}
# option -> smallest value, largest value, description
NUMBERS = {
    "init_bias_scale": (-math.inf, math.inf, "a finite number"),
    "min_scale": (0.0, math.inf, "a finite number of at least 0"),
    "max_scale": (0.0, math.inf, "a finite number of at least 0"),
    "drop": (0.0, 1.0, "a number from 0 to 1"),
    "supervision": (0.0, math.inf, "a finite number of at least 0"),
}


class Options(NamedTuple):
    """The options of `aqr=dict(enable=True, ...)`."""

    enable: bool = False
    bias: str = MODALITY
    per: str = "scalar"
    init_bias_scale: float = INIT_BIAS_SCALE[
        MODALITY
    ]  # `read` uses the default of the selected bias
    # number of camera segments: 1 = one for all cameras, V = one per camera; None: by transformer
    cameras: Optional[int] = None
    locality: Any = False
    hidden_dims: Optional[int] = None
    eps: float = 1e-6
    drop: float = 0.0  # probability of dropping a sensor, in training
    supervision: float = 0.0  # weight of the cross entropy against the dropped sensor
    window: int = 15  # edge of a window in cells, in cameras and on the BEV grid
    lidar_window: Optional[int] = None  # the same on the BEV grid, if different
    gaussian: Optional[float] = None  # sigma of the profile in cells; None or False: a box
    camera_windows: str = "first"  # windows in the first camera that sees the query, or in "all"
    min_scale: float = 0.5  # bias_scale is clamped to [min_scale, max_scale]
    max_scale: float = 5.0


def read(given: Any, source: str = "aqr") -> Options:
    """Read a bool or a dict of options.

    source: the name for messages.

    Raises:
        TypeError, ValueError: an option is unknown or has a wrong value; the message names it.
    """
    if isinstance(given, bool):
        return Options(enable=given)
    if not isinstance(given, dict):
        raise TypeError(f"{source}: expected True, False or a dict, got {type(given).__name__}")
    unknown = sorted(str(name) for name in given if name not in Options._fields)
    if unknown:
        near = {name: settings.nearest(name, Options._fields) for name in unknown}
        named = ", ".join(
            f"{name} (the nearest is {near[name]})" if near[name] else name for name in unknown
        )
        raise ValueError(f"{source}: unknown option {named}; known: {', '.join(Options._fields)}")
    options = Options(**given)
    if options.locality in (0, 1):
        options = options._replace(locality=bool(options.locality))
    if not isinstance(options.enable, int) or options.enable not in (0, 1):
        raise TypeError(f"{source}.enable: expected True or False, got {options.enable!r}")
    options = options._replace(enable=bool(options.enable))
    for name, choices in CHOICES.items():
        value = getattr(options, name)
        if value not in choices:
            nearest = settings.nearest(str(value), choices)
            raise ValueError(
                f"{source}.{name}: expected one of {', '.join(choices)}, got {value!r}"
                + (f"; the nearest is {nearest!r}" if nearest else "")
            )
    if "init_bias_scale" not in given:
        options = options._replace(init_bias_scale=INIT_BIAS_SCALE[options.bias])
    if options.gaussian is False:
        options = options._replace(gaussian=None)
    for name, (low, high, expected) in NUMBERS.items():
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{source}.{name}: expected a number, got {value!r}")
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{source}.{name}: expected {expected}, got {value!r}")
    for name, least in (("cameras", 0), ("hidden_dims", 1), ("lidar_window", 1)):
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{source}.{name}: expected an integer or None, got {value!r}")
        if value is not None and value < least:
            raise ValueError(
                f"{source}.{name}: expected an integer of at least {least}, got {value!r}"
            )
    return _checked(options, source)


def _checked(options: Options, source: str) -> Options:
    """Check options that depend on each other."""
    for bias, names in ONLY.items():
        for name in names:
            if bias != options.bias and getattr(options, name) != Options._field_defaults[name]:
                raise ValueError(
                    f"{source}.{name}: an option of bias={bias!r}, got bias={options.bias!r}"
                )
    if (
        isinstance(options.window, bool)
        or not isinstance(options.window, int)
        or options.window < 1
    ):
        raise ValueError(
            f"{source}.window: expected an integer of at least 1, got {options.window!r}"
        )
    sigma = options.gaussian
    if sigma is not None:
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
            raise TypeError(
                f"{source}.gaussian: expected False or the width sigma in cells, got {sigma!r}"
            )
        if not 0.0 < sigma < math.inf:
            raise ValueError(
                f"{source}.gaussian: expected a positive width sigma in cells, got {sigma!r}"
            )
    if (
        options.bias == WINDOW
        and not options.min_scale <= options.init_bias_scale <= options.max_scale
    ):
        raise ValueError(
            f"{source}.init_bias_scale: expected a number from min_scale to max_scale, "
            f"{options.min_scale!r} to {options.max_scale!r}, got {options.init_bias_scale!r}"
        )
    return options


def from_environment() -> Optional[Options]:
    """Read FLASHBIAS_AQR: a switch ("1", "off") or "key=value,..."; return None if it is unset.

    Raises:
        TypeError, ValueError: as `read`.
    """
    text = settings.current().aqr
    if not text:
        return None
    if text.lower() in settings.TRUE + settings.FALSE:
        return Options(enable=text.lower() in settings.TRUE)
    return read({"enable": True, **pairs(text, f"FLASHBIAS_AQR={text!r}")}, "FLASHBIAS_AQR")


def pairs(text: str, source: str) -> Dict[str, Any]:
    """Parse "key=value,..."; raise ValueError for a part without "="."""
    options: Dict[str, Any] = {}
    for part in text.split(",") if text else ():
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"{source}: expected 1, 0 or key=value,..., got {part!r}")
        options[key.strip()] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
