"""Implement `flashbias doctor --config FILE`: find out which layers of a config receive a bias.

Python configs of mmcv and mmengine are read without importing either: the files are executed as
plain assignments, `_base_` files first. Configs that cannot be read like this (lazy configs, YAML)
are passed to the Config class of mmengine or mmcv, if installed. `aqr` is checked by the code that
builds the router in a run.
"""

from __future__ import annotations

import contextlib
import math
import os
import runpy
import sys
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from .. import settings
from . import config_options

KEYS = ("aqr", "enable_aqr", "attention_bias", "attn_bias")
FLASH_CLASSES = ("PETRMultiheadFlashAttention", "MultiheadFlashAttention")
HANDING_OVER = ("Cmt",)  # transformers whose heads provide the positions of the queries
EMBED_DIMS, NUM_HEADS = (
    8,
    2,
)  # of a router that is built to check the options; these do not depend on the sizes


class ConfigError(ValueError):
    """Raised for a config that cannot be read; the message names the file and the reason."""


def check(config_path: str, cfg_options: Sequence[str] = ()) -> Dict[str, Any]:
    """Return a JSON-able report: switches (path, value, on), transformers with layers, notes.

    Each attention of a decoder layer has its type, its kind ("cross" or "self"), whether the bias
    is applied in a patched and in an unpatched run, and the reasons why it would be dropped.

    Args:
        config_path: a config file of mmcv or mmengine.
        cfg_options: KEY=VALUE overrides, as --cfg-options of training scripts.

    Raises:
        ConfigError: the config cannot be read.
    """
    config, missing = load(config_path)
    try:
        config_options.merge(config, config_options.parse(cfg_options))
    except ValueError as error:
        raise ConfigError(f"--cfg-options: {error}") from error
    transformers = [
        _transformer(path, node)
        for path, node in _dicts(config)
        if "decoder" in node and "type" in node
    ]
    routers = {item["path"]: item.pop("aqr") for item in transformers}
    switches = [
        {"path": path, "value": plain(value), "on": _is_on(path, value, routers)}
        for path, value in _find(config, KEYS)
    ]
    if settings.current().aqr:
        on = any(state.built and state.from_environment for state in routers.values())
        switches.append(
            {
                "path": "FLASHBIAS_AQR",
                "value": settings.current().aqr,
                "on": on if transformers else _asks_for_a_router(),
            }
        )
    return {
        "config": config_path,
        "switches": switches,
        "transformers": transformers,
        "notes": missing + _notes(switches, transformers, config),
    }


def text(report: Dict[str, Any]) -> str:
    """Format a report of `check` as text."""
    lines = [f"config {report['config']}:"]
    for switch in report["switches"]:
        lines.append(f"  {switch['path']} = {switch['value']!r}: {'on' if switch['on'] else 'off'}")
    if not report["switches"]:
        lines.append(f"  none of {', '.join(KEYS)} is set")
    for item in report["transformers"]:
        lines.append(
            f"  {item['path']} ({item['type']}, {item['num_layers']} layers, checkpointing "
            f"{'on' if item['with_cp'] else 'off'}): {item['router']}"
        )
        for attention in item["attentions"]:
            patched, unpatched = (
                "applied" if attention[key] else "dropped" for key in ("patched", "unpatched")
            )
            lines.append(
                f"    {attention['kind']:<5} {attention['type']}: a bias is {patched} in a "
                f"patched run, {unpatched} in an unpatched "
                f"run{attention['why'] and ': ' + attention['why']}"
            )
    return "\n".join(lines + [f"  note: {note}" for note in report["notes"]])


# -- reading ---------------------------------------------------------------------------------------


def load(path: str) -> Tuple[Dict[str, Any], List[str]]:
    """Read a config; return it as nested dicts, and a note for each `_base_` that is missing.

    `_base_` and `_delete_` are applied. Output of the config itself goes to stderr.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"--config: {path!r} is not a file")
    missing: List[str] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return _load_python(os.path.abspath(path), (), missing), missing
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        config = _load_with_library(path)
        if config is None:
            reason = (
                "SystemExit: it ends the process"
                if isinstance(error, SystemExit)
                else _first_line(error)
            )
            raise ConfigError(
                f"--config: {path!r} cannot be read without mmcv or mmengine: {reason}"
            ) from error
        return config, []


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _load_python(path: str, above: Tuple[str, ...], missing: List[str]) -> Dict[str, Any]:
    if path in above:
        raise ConfigError(f"--config: {path!r} is a _base_ of itself")
    if above and not os.path.isfile(
        path
    ):  # often a file of mmdetection3d, which lies beside the repository
        missing.append(f"the _base_ {path} does not exist: its values are missing here")
        return {}
    names = runpy.run_path(path)
    values = {
        name: value
        for name, value in names.items()
        if not name.startswith("__") and not _is_code(value)
    }
    bases = values.pop("_base_", [])
    merged: Dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        below = os.path.normpath(os.path.join(os.path.dirname(path), base))
        config_options.merge(merged, _load_python(below, (*above, path), missing))
    config_options.merge(merged, values)
    return merged


def _is_code(value: Any) -> bool:
    return callable(value) or type(value).__name__ == "module"


def _load_with_library(path: str) -> Optional[Dict[str, Any]]:
    for library in ("mmengine", "mmcv"):
        try:
            module = __import__(
                f"{library}.config" if library == "mmengine" else library, fromlist=["Config"]
            )
            with contextlib.redirect_stdout(sys.stderr):
                return dict(module.Config.fromfile(path)._cfg_dict)
        except (
            Exception,
            SystemExit,
        ):  # optional: the caller reports why executing the file failed
            continue
    return None


# -- looking ---------------------------------------------------------------------------------------


def _dicts(
    node: Any, path: str = "", above: Tuple[int, ...] = ()
) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Yield every dict in nested dicts, lists and tuples, with its path; cycles are not
    followed."""
    if id(node) in above:
        return
    items: Any = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, (list, tuple))
        else ()
    )
    if isinstance(node, dict):
        yield path, node
    for key, value in items:
        yield from _dicts(value, f"{path}.{key}" if path else str(key), (*above, id(node)))


def plain(value: Any, above: Tuple[int, ...] = ()) -> Any:
    """Convert `value` to JSON types: keys and other objects become strings, a cycle becomes
    "..."."""
    if id(value) in above:
        return "..."
    above = (*above, id(value))
    if isinstance(value, dict):
        return {str(key): plain(entry, above) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, above) for entry in value]
    is_json = (
        value is None
        or isinstance(value, (bool, int, str))
        or isinstance(value, float)
        and math.isfinite(value)
    )
    return value if is_json else str(value)


def _asks_for_a_router() -> bool:
    """Return True if FLASHBIAS_AQR builds routers in transformers that the config does not show."""
    from ..aqr import options as aqr_options

    try:
        options = aqr_options.from_environment()
    except (TypeError, ValueError):
        return False
    return options is not None and bool(options.enable)


def _find(config: Dict[str, Any], keys: Tuple[str, ...]) -> Iterator[Tuple[str, Any]]:
    for path, node in _dicts(config):
        for key in keys:
            if key in node:
                yield (f"{path}.{key}" if path else key), node[key]


def _is_on(path: str, value: Any, routers: Dict[str, Router]) -> bool:
    owner, _, key = path.rpartition(".")
    if key == "aqr" and owner in routers and routers[owner].judged:
        return routers[owner].built
    if key == "aqr" and isinstance(value, dict):
        return bool(value.get("enable", False))
    return (
        bool(value.get("enable", value.get("enabled", True)))
        if isinstance(value, dict)
        else bool(value)
    )


class Router(NamedTuple):
    """The router that a run builds for one transformer, if any."""

    text: str
    built: bool = False
    from_environment: bool = False
    # False if no patched class reads `aqr`: then only the value in the config is known
    judged: bool = True


def _router(node: Dict[str, Any], name: Any, known: Dict[str, Any], num_layers: Any) -> Router:
    takes = name in known and known[name].seam == "transformer" and not left_out(name)
    value = node.get("aqr")
    if not takes:
        if "aqr" in node:
            return Router("error: this class has no argument aqr and is not patched", judged=False)
        return Router("aqr is not supported")
    try:
        from ..aqr import options as aqr_options
        from ..patching.seams.transformer_constructor import build_router
        from ..patching.seams.transformer_layouts import LAYOUTS
    except ImportError as error:  # without torch no router can be built
        return Router(f"aqr is not checked: {error}", judged=False)
    source = "FLASHBIAS_AQR" if value is None else "aqr"
    try:
        options = aqr_options.from_environment() if value is None else aqr_options.read(value)
        if options is None:
            return Router("aqr is off; aqr=dict(enable=True) turns it on")
        if not options.enable:
            without = isinstance(value, dict) and "enable" not in value
            return Router(
                "aqr is off: it has no enable=True" if without else f"aqr is off ({source})"
            )
        layers = num_layers if isinstance(num_layers, int) and num_layers > 0 else 1
        build_router(
            name,
            LAYOUTS[name],
            options,
            embed_dims=EMBED_DIMS,
            num_heads=NUM_HEADS,
            num_layers=layers,
        )
    except (TypeError, ValueError) as error:
        return Router(f"error: {error}")
    effect = "its bias goes to every cross attention"
    if options.bias == aqr_options.WINDOW:
        effect = "its windows go to every cross attention"
        if not name.startswith(HANDING_OVER):
            effect += (
                "; its head needs flashbias_patch.aqr.provide_geometry(...) before the "
                "transformer is called"
            )
    return Router(f"aqr is built ({source}), {effect}", True, value is None)


def left_out(name: str) -> str:
    """Return why the settings exclude a class of the catalog from patching, or ""."""
    return settings.current().leaves_out(name)


def _transformer(path: str, node: Dict[str, Any]) -> Dict[str, Any]:
    from ..patching import catalog

    known = catalog.targets()
    name = (
        node["type"]
        if isinstance(node["type"], str)
        else getattr(node["type"], "__name__", str(node["type"]))
    )
    decoder = node["decoder"] if isinstance(node["decoder"], dict) else {}
    layer = decoder.get("transformerlayers", {})
    layer = layer[0] if isinstance(layer, (list, tuple)) and layer else layer
    layer = layer if isinstance(layer, dict) else {}
    cfgs = layer.get("attn_cfgs") or []
    cfgs = [
        cfg if isinstance(cfg, dict) else {} for cfg in ([cfgs] if isinstance(cfgs, dict) else cfgs)
    ]
    order = layer.get("operation_order") or ()
    kinds = [step[:-5] for step in order if isinstance(step, str) and step.endswith("_attn")]
    kinds = (
        kinds if len(kinds) == len(cfgs) else ["cross" if i else "self" for i in range(len(cfgs))]
    )
    num_layers = decoder.get("num_layers", 1)
    router = _router(node, name, known, num_layers)
    return {
        "path": path,
        "type": name,
        "num_layers": num_layers,
        "router": router.text,
        "aqr": router,
        "layer": plain(layer.get("type")),
        "with_cp": bool(layer.get("with_cp", False)),
        "attentions": [
            _attention(plain(cfg.get("type")), kind, known) for cfg, kind in zip(cfgs, kinds)
        ],
    }


def _attention(name: Any, kind: str, known: Dict[str, Any]) -> Dict[str, Any]:
    target = known.get(name) if isinstance(name, str) else None
    patched = target is not None and target.seam in ("outer", "core") and not left_out(name)
    unpatched = name not in FLASH_CLASSES
    reasons = []
    if target is not None and left_out(name):
        reasons.append(left_out(name))
    elif not patched:
        reasons.append(
            f"{name} is not a patched class; subclasses of patched classes are patched under "
            "any name, and other packages can add classes by an entry point"
        )
    if not unpatched:
        reasons.append("the flash class drops every attn_mask")
    return {
        "type": name,
        "kind": kind,
        "patched": patched,
        "unpatched": unpatched,
        "why": "; ".join(reasons),
    }


def _notes(
    switches: List[Dict[str, Any]], transformers: List[Dict[str, Any]], config: Dict[str, Any]
) -> List[str]:
    notes = []
    on = [switch for switch in switches if switch["on"]]
    if not transformers:
        notes.append(
            "no dict has a type and a decoder: only transformers in the form of mmcv are recognised"
        )
    if on and any(item["with_cp"] for item in transformers):
        notes.append(
            "with_cp=True loses a bias in attn_masks in an unpatched run (reentrant "
            "checkpointing); a patched run keeps it"
        )
    crossing = [a for item in transformers for a in item["attentions"] if a["kind"] == "cross"]
    if on and transformers and not any(a["patched"] for a in crossing):
        notes.append("a bias is on, but no cross attention of this config would receive it")
    routed = any(
        s["path"].rpartition(".")[2] in ("aqr", "FLASHBIAS_AQR") and s["on"] for s in switches
    )
    if routed and not _monitored(config):
        notes.append("custom_hooks=[dict(type='BiasScaleMonitorHook')] would monitor bias_scale")
    return notes


def _monitored(config: Dict[str, Any]) -> bool:
    hooks = config.get("custom_hooks") or []
    return any(
        isinstance(hook, dict) and hook.get("type") == "BiasScaleMonitorHook" for hook in hooks
    )
