"""`flashbias doctor --config FILE`: is a bias on, which layers will receive it, and what on the way would drop it.

Reads mmcv / mmengine Python configs without importing either: the file is executed as the plain assignments it is,
`_base_` files first. What that cannot read (lazy configs, YAML) goes to mmengine's or mmcv's own Config, if installed.
"""
from __future__ import annotations

import os
import runpy
from typing import Any, Dict, Iterator, List, Optional, Tuple

KEYS = ("aqr", "enable_aqr", "attention_bias", "attn_bias")
FLASH_CLASSES = ("PETRMultiheadFlashAttention",)


class ConfigError(ValueError):
    """A config file that cannot be read; the message says which and why."""


def check(config_path: str) -> Dict[str, Any]:
    """A JSON-able report: switches (path, value, on), transformers with their layers, notes. ConfigError if unreadable.

    Each attention of a decoder layer: its type, "cross" or "self", whether the bias reaches it patched and unpatched,
    and what would drop it.
    """
    config, missing = load(config_path)
    switches = [{"path": path, "value": value, "on": _is_on(value)} for path, value in _find(config, KEYS)]
    transformers = [_transformer(path, node) for path, node in _dicts(config) if "decoder" in node and "type" in node]
    return {"config": config_path, "switches": switches, "transformers": transformers,
            "notes": missing + _notes(switches, transformers, config)}


def text(report: Dict[str, Any]) -> str:
    lines = [f"config {report['config']}:"]
    for switch in report["switches"]:
        lines.append(f"  {switch['path']} = {switch['value']!r}: {'on' if switch['on'] else 'off'}")
    if not report["switches"]:
        lines.append(f"  none of {', '.join(KEYS)} is set")
    for item in report["transformers"]:
        lines.append(f"  {item['path']} ({item['type']}, {item['num_layers']} layers, checkpointing "
                     f"{'on' if item['with_cp'] else 'off'}): {item['router']}")
        for attention in item["attentions"]:
            patched, unpatched = ("applied" if attention[key] else "dropped" for key in ("patched", "unpatched"))
            lines.append(f"    {attention['kind']:<5} {attention['type']}: a bias is {patched} patched, {unpatched} "
                         f"unpatched{attention['why'] and ': ' + attention['why']}")
    return "\n".join(lines + [f"  note: {note}" for note in report["notes"]])


# -- reading -----------------------------------------------------------------------------------------------------------


def load(path: str) -> Tuple[Dict[str, Any], List[str]]:
    """The config as nested dicts, `_base_` resolved, `_delete_` obeyed, and a note for each base that is missing."""
    if not os.path.isfile(path):
        raise ConfigError(f"--config: {path!r} is not a file")
    missing: List[str] = []
    try:
        return _load_python(os.path.abspath(path), (), missing), missing
    except ConfigError:
        raise
    except Exception as error:
        config = _load_with_library(path)
        if config is None:
            raise ConfigError(f"--config: {path!r} cannot be read without mmcv or mmengine: "
                              f"{type(error).__name__}: {error}") from error
        return config, []


def _load_python(path: str, above: Tuple[str, ...], missing: List[str]) -> Dict[str, Any]:
    if path in above:
        raise ConfigError(f"--config: {path!r} is its own _base_")
    if above and not os.path.isfile(path):  # often mmdetection3d's, beside the repository
        missing.append(f"the _base_ {path} is not there: what it sets is not seen")
        return {}
    names = runpy.run_path(path)
    own = {name: value for name, value in names.items() if not name.startswith("__") and not _is_code(value)}
    bases = own.pop("_base_", [])
    merged: Dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        below = os.path.normpath(os.path.join(os.path.dirname(path), base))
        _merge(merged, _load_python(below, (*above, path), missing))
    _merge(merged, own)
    return merged


def _is_code(value: Any) -> bool:
    return callable(value) or type(value).__name__ == "module"


def _merge(into: Dict[str, Any], new: Dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and not value.get("_delete_"):
            into[key] = dict(into[key])
            _merge(into[key], value)
        elif isinstance(value, dict):
            into[key] = {k: v for k, v in value.items() if k != "_delete_"}
        else:
            into[key] = value


def _load_with_library(path: str) -> Optional[Dict[str, Any]]:
    for library in ("mmengine", "mmcv"):
        try:
            module = __import__(f"{library}.config" if library == "mmengine" else library, fromlist=["Config"])
            return dict(module.Config.fromfile(path)._cfg_dict)
        except Exception:  # this one is a courtesy: the caller reports why the plain reading failed
            continue
    return None


# -- looking -----------------------------------------------------------------------------------------------------------


def _dicts(node: Any, path: str = "") -> Iterator[Tuple[str, Dict[str, Any]]]:
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    if isinstance(node, dict):
        yield path, node
    for key, value in items:
        yield from _dicts(value, f"{path}.{key}" if path else str(key))


def _find(config: Dict[str, Any], keys: Tuple[str, ...]) -> Iterator[Tuple[str, Any]]:
    for path, node in _dicts(config):
        for key in keys:
            if key in node:
                yield (f"{path}.{key}" if path else key), node[key]


def _is_on(value: Any) -> bool:
    return bool(value.get("enable", value.get("enabled", True))) if isinstance(value, dict) else bool(value)


def _transformer(path: str, node: Dict[str, Any]) -> Dict[str, Any]:
    from ..patching import catalog

    decoder = node["decoder"] if isinstance(node["decoder"], dict) else {}
    layer = decoder.get("transformerlayers", {})
    layer = layer[0] if isinstance(layer, (list, tuple)) and layer else layer
    layer = layer if isinstance(layer, dict) else {}
    cfgs = layer.get("attn_cfgs", [])
    cfgs = [cfgs] if isinstance(cfgs, dict) else cfgs
    kinds = [name[:-5] for name in layer.get("operation_order", ()) if name.endswith("_attn")]
    kinds = kinds if len(kinds) == len(cfgs) else ["cross" if i else "self" for i in range(len(cfgs))]
    known = catalog.targets()
    takes = node["type"] in known and known[node["type"]].seam == "transformer"
    router = ("aqr is built, its bias goes to every cross attention" if "aqr" in node and _is_on(node["aqr"]) and takes
              else "aqr is not a key of this class and not one that is patched: an error" if "aqr" in node and not takes
              else "takes aqr=dict(enable=True), off" if takes else "takes no aqr")
    return {"path": path, "type": node["type"], "num_layers": decoder.get("num_layers", 1), "router": router,
            "layer": layer.get("type"), "with_cp": bool(layer.get("with_cp", False)),
            "attentions": [_attention(cfg.get("type"), kind, known) for cfg, kind in zip(cfgs, kinds)]}


def _attention(name: Any, kind: str, known: Dict[str, Any]) -> Dict[str, Any]:
    patched = name in known and known[name].seam in ("outer", "core")
    unpatched = name not in FLASH_CLASSES
    why = ""
    if not patched:
        why = (f"{name} is no class that this package patches; a subclass of one is, under any name, and "
               "third parties add theirs by an entry point")
    elif not unpatched:
        why = "the flash class drops every attn_mask"
    return {"type": name, "kind": kind, "patched": patched, "unpatched": unpatched, "why": why}


def _notes(switches: List[Dict[str, Any]], transformers: List[Dict[str, Any]], config: Dict[str, Any]) -> List[str]:
    notes = []
    on = [switch for switch in switches if switch["on"]]
    if not transformers:
        notes.append("no dict with a type and a decoder: this reads transformers in mmcv's form")
    if on and any(item["with_cp"] for item in transformers):
        notes.append("with_cp=True loses a bias in attn_masks unpatched (reentrant checkpointing); patched it is kept")
    crossing = [a for item in transformers for a in item["attentions"] if a["kind"] == "cross"]
    if on and transformers and not any(a["patched"] for a in crossing):
        notes.append("a bias is on, and no cross attention here would receive it")
    if any(s["path"].rpartition(".")[2] == "aqr" and s["on"] for s in switches) and not _monitored(config):
        notes.append("custom_hooks=[dict(type='BiasScaleMonitorHook')] would watch bias_scale")
    return notes


def _monitored(config: Dict[str, Any]) -> bool:
    hooks = config.get("custom_hooks") or []
    return any(isinstance(hook, dict) and hook.get("type") == "BiasScaleMonitorHook" for hook in hooks)
