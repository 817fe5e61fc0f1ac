"""Parse and merge KEY=VALUE overrides of a config, as mmcv and mmengine do for --cfg-options."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

DELETE = "_delete_"


def parse(arguments: Sequence[str]) -> Dict[str, Any]:
    """Parse `model.head.aqr.enable=True`, `model.layers.0.type=X`, ... into nested dicts.

    Raises:
        ValueError: an argument is not of the form KEY=VALUE.
    """
    options: Dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or not all(key.split(".")):
            raise ValueError(f"expected KEY=VALUE with dots between keys, got {argument!r}")
        *path, last = key.split(".")
        node = options
        for part in path:
            if not isinstance(node.setdefault(part, {}), dict):
                raise ValueError(f"{key}: {part} is set to a value already")
            node = node[part]
        node[last] = _value(text)
    return options


def _value(text: str) -> Any:
    """Parse a number, a boolean, None or a string; commas or brackets make a list of them."""
    text = text.strip("'\"").replace(" ", "")
    if text[:1] + text[-1:] in ("()", "[]") and len(text) > 1:
        entries = [_value(part) for part in _split(text[1:-1]) if part]
        return tuple(entries) if text[0] == "(" else entries
    parts = _split(text)
    if len(parts) > 1:
        return [_value(part) for part in parts if part]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), None if text == "None" else text)


def _split(text: str) -> List[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def merge(into: Dict[str, Any], new: Dict[str, Any]) -> None:
    """Merge `new` into `into` by the rules of config inheritance.

    Dicts are merged key by key unless they hold `_delete_`; keys that are digits index lists.
    """
    for key, value in new.items():
        old = into.get(key)
        if not isinstance(value, dict):
            into[key] = value
        elif isinstance(old, dict) and not value.get(DELETE):
            into[key] = dict(old)
            merge(into[key], value)
        elif (
            isinstance(old, (list, tuple))
            and value
            and all(str(index).isdigit() for index in value)
        ):
            into[key] = _merged_list(key, old, value)
        else:
            into[key] = {k: v for k, v in value.items() if k != DELETE}


def _merged_list(key: str, old: Sequence[Any], new: Dict[str, Any]) -> List[Any]:
    entries = dict(enumerate(old))
    if any(int(index) not in entries for index in new):
        raise ValueError(
            f"{key}: the list has {len(entries)} entries and no entry {', '.join(new)}"
        )
    merge(entries, {int(index): value for index, value in new.items()})  # type: ignore[arg-type, misc]
    return list(entries.values())
