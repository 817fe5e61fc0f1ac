"""Define the FLASHBIAS_* environment variables: meaning, default and accepted values.

The environment is parsed once per process. A bad value never breaks an import: the log names the
variable and the allowed values, and the default is used. The command line does not start
(`Settings.problems`). An unknown variable is reported with the nearest known name
(`Settings.unknown`). An empty variable counts as unset.
"""

from __future__ import annotations

import os
from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

TRUE = ("1", "true", "on", "yes", "y", "enable", "enabled")
FALSE = ("0", "false", "off", "no", "n", "none", "disable", "disabled")


# Variables of this package that are not settings: those of `flashbias ab` (ab/probe_variables.py),
# of the tests and benchmarks, and the list of problems that this process or a parent process has
# reported.
NAMED = "FLASHBIAS_NAMED"
INTERNAL = (NAMED, "FLASHBIAS_PROBE", "FLASHBIAS_FUZZ", "FLASHBIAS_FRAME", "FLASHBIAS_TEST")
# Variables of earlier versions, without effect now -> the reason, and what to do instead.
RETIRED = {
    "FLASHBIAS_TUNE": "tile shapes are not tuned during a run; run `flashbias tune` before it"
}


class Bad(ValueError):
    """Raised for a value that a variable does not accept; the message names the accepted values."""


def nearest(text: str, known: Iterable[str], cutoff: float = 0.6) -> Optional[str]:
    """Return the name in `known` that is most similar to `text`, ignoring case, or None."""
    from difflib import get_close_matches

    by_lower = {name.lower(): name for name in known}
    matches = get_close_matches(text.lower(), list(by_lower), 1, cutoff)
    return by_lower[matches[0]] if matches else None


def _words(text: str, allowed: Sequence[str]) -> str:
    """List the allowed values, and the one that `text` is most similar to."""
    near = nearest(text, allowed)
    return ", ".join(allowed) + (f"; the nearest is {near!r}" if near else "")


def _switch(text: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise Bad("one of " + _words(text, TRUE + FALSE))


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise Bad("one of " + _words(text, allowed))
        return text.lower()

    return parse


def _number(kind: type, low: float, high: float, expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise Bad(expected) from None
        if not low <= value <= high:
            raise Bad(expected)
        return value

    return parse


def _names(text: str) -> Tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Variable(namedtuple("Variable", "field default parse help")):
    """An environment variable FLASHBIAS_<FIELD>: default, parser and help text."""

    @property
    def name(self) -> str:
        field: str = self.field
        return "FLASHBIAS_" + field.upper()

    def shown(self, value: Any) -> str:
        """Format the parsed `value` as README.md does: on, off, unset, all, or the value itself."""
        if isinstance(value, bool):
            return "on" if value else "off"
        if value is None:
            return "unset"
        if isinstance(value, tuple):
            return ", ".join(value) or ("all" if self.default == () else "none")
        return str(value)


VARIABLES: Tuple[Variable, ...] = (
    Variable("patch", True, _switch, "install on import; off touches nothing"),
    Variable(
        "backend",
        "auto",
        _choice("auto", "triton", "flash", "upstream", "sdpa", "reference"),
        "the backend to try first; if it does not support a call, the others are tried; auto: the "
        "first that supports the call",
    ),
    Variable("strict", False, _switch, "a fallback raises, with every backend's reasons"),
    Variable(
        "targets",
        (),
        _names,
        "comma-separated class names to patch, or -ClassName to exclude one; empty: all of the "
        "catalog",
    ),
    Variable("home", None, str, "a checkout of FlashBias (holds flash_bias_triton.py)"),
    Variable(
        "dtype",
        "auto",
        _choice("auto", "fp16", "bf16", "fp32"),
        "precision inside attention; auto: that of the patched class",
    ),
    Variable(
        "masks",
        "upstream",
        _choice("upstream", "honour"),
        "flash classes drop boolean masks and key padding; honour applies them",
    ),
    Variable(
        "rank",
        None,
        _number(int, 1, 256, "an integer from 1 to 256"),
        "factorise dense biases to this rank",
    ),
    Variable(
        "energy",
        None,
        _number(float, 1e-6, 1.0, "a number in (0, 1]"),
        "factorise dense biases to the smallest rank that keeps this share of the squared singular "
        "values",
    ),
    Variable(
        "max_error",
        2e-2,
        _number(float, 0.0, 1.0, "a number from 0 to 1"),
        "relative error above which the dense bias is used instead of its factors",
    ),
    Variable(
        "aqr",
        None,
        str,
        "adaptive query routing without a change of the config: 1, or key=value,...",
    ),
    Variable("compat", ("all",), _names, "comma-separated compatibility patches, `all` or `none`"),
    Variable(
        "verdicts",
        True,
        _switch,
        "keep on disk which backends passed the self-check on this machine, and Triton's key of "
        "its installation; off: check and compute again in every process",
    ),
    Variable(
        "summary",
        False,
        _switch,
        "one line at exit: classes patched, calls, fallbacks, biases without effect; `flashbias "
        "run` sets it",
    ),
    Variable(
        "log_level",
        None,
        _choice("debug", "info", "warning", "error"),
        "log to stderr from this level on; unset: Python's own logging settings",
    ),
)


class Settings:
    """The parsed variables as attributes.

    problems: one message per bad value. unknown: one message per unknown variable name.
    """

    problems: List[str]
    unknown: List[str]

    def __init__(self, environ: Optional[Mapping[str, str]] = None) -> None:
        environ = os.environ if environ is None else environ
        self.problems = []
        for variable in VARIABLES:
            setattr(
                self, variable.field, self._value(variable, environ.get(variable.name, "").strip())
            )
        self.unknown = [message for name in sorted(environ) for message in _unknown(name)]

    def _value(self, variable: Variable, text: str) -> Any:
        if not text:
            return variable.default
        try:
            return variable.parse(text)
        except Bad as allowed:
            self.problems.append(
                f"{variable.name}={text!r} is not understood: expected {allowed}. "
                f"The default is {variable.default!r}."
            )
            return variable.default

    def __getattr__(self, name: str) -> Any:  # for unknown names; gives mypy typed access
        raise AttributeError(f"no setting {name!r}; known: {', '.join(v.field for v in VARIABLES)}")

    def leaves_out(self, name: str) -> str:
        """Return the reason why FLASHBIAS_TARGETS excludes the class `name`, or "" if it does
        not."""
        if "-" + name in self.targets:
            return f"FLASHBIAS_TARGETS leaves {name} out"
        named = [target for target in self.targets if not target.startswith("-")]
        return f"FLASHBIAS_TARGETS does not name {name}" if named and name not in named else ""

    def as_dict(self) -> Dict[str, Any]:
        return {v.field: getattr(self, v.field) for v in VARIABLES}


def _unknown(name: str) -> List[str]:
    """Return a message if `name` looks like a misspelt variable of this package, else nothing."""
    upper = name.upper()
    if not upper.startswith("FLASH") or name in _KNOWN or name.startswith(INTERNAL):
        return []
    if upper in RETIRED:
        return [f"{name} has no effect any more: {RETIRED[upper]}."]
    if upper.startswith("FLASHBIAS_"):
        field = nearest(upper[len("FLASHBIAS_") :], [variable.field for variable in VARIABLES])
        near = field and "FLASHBIAS_" + field.upper()
    else:
        near = nearest(upper, _KNOWN, 0.85)
        if near is None:  # FLASH_ATTENTION_SKIP_CUDA_BUILD and the like
            return []
    known = f"the nearest known is {near}" if near else f"known: {', '.join(_KNOWN)}"
    return [f"{name} is not a variable of flashbias_patch and has no effect: {known}."]


_KNOWN = tuple(variable.name for variable in VARIABLES)


def unnamed(problems: Iterable[str]) -> List[str]:
    """Return the `problems` that neither this process nor a parent process has reported yet.

    They count as reported from now on.
    """
    from zlib import crc32

    named = os.environ.get(NAMED, "").split(",")
    new = {f"{crc32(problem.encode()):08x}": problem for problem in problems}
    new = {key: problem for key, problem in new.items() if key not in named}
    if new:
        os.environ[NAMED] = ",".join([*filter(None, named), *new])
    return list(new.values())


_current: Optional[Settings] = None


def current() -> Settings:
    """Return the settings of this process, parsed from the environment on first use."""
    global _current
    if _current is None:
        _current = Settings()
    return _current


def reload(environ: Optional[Mapping[str, str]] = None) -> Settings:
    """Parse the environment (or `environ`) again and make the result the current settings."""
    global _current
    _current = Settings(environ)
    return _current
