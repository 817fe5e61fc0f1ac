"""Check each link between a parameter and its learning: one function per link."""

from __future__ import annotations

import math
import re
from typing import Any, Callable, Dict, List, Optional, Tuple

from .causes import describe

LINKS = {
    "exists": "the parameter exists",
    "learnable": "it requires a gradient",
    "optimizer": "an optimizer holds it, with a learning rate",
    "loaded": "loading of a checkpoint",
    "forward": "the forward pass uses it",
    "loss": "the loss depends on it",
    "gradient": "it gets a gradient other than 0",
    "finite": "the gradient is finite",
    "update": "the step changes it",
    "stays": "the new value stays",
    "visible": "the change is visible in a log",
}
TINY = 1e-4  # share of the gradient of other parameters below which a note is written
ROUNDING = 1e-6  # share of the sum before cancellation below which only rounding error is left
# distance in nodes from the parameter within which that sum is read; farther nodes hold the batch
NEAR = 6
FEW = 16  # largest number of entries of a parameter that a log prints
DIGITS = 4  # digits that logs print
Link = Dict[str, str]


def _learnable(entry: Dict[str, Any], facts: Dict[str, Any]) -> Link:
    return ok("learnable") if entry["requires_grad"] else broken("frozen")


def _optimizer(entry: Dict[str, Any], facts: Dict[str, Any]) -> Link:
    if not entry["groups"]:
        if facts["skipped"] and not facts["steps"]:
            return unknown("optimizer", "GradScaler skipped every step")
        if not facts["steps"]:
            return broken("no step")
        if entry["replaced"] or entry["stale"]:
            return broken("replaced", where=f" in {entry['owner']}")
        return broken("not held")
    if entry["replaced"]:
        return broken("replaced", where=f" in {entry['owner']}")
    group = entry["groups"][0]
    keys = matching_keys(entry["name"], facts["paramwise"])
    key = (
        f" (paramwise_cfg.custom_keys[{keys[0][0]!r}], the longest key that is part of its name)"
        if keys
        else ""
    )
    if all(step["lr"] == 0 for step in entry["steps"]):
        how = (
            f": change that key, or add a longer one such as {entry['name'].rsplit('.', 1)[-1]!r}"
            if keys
            else ""
        )
        return broken("lr 0", key=key, how=how)
    finding = f"{group['optimizer']}, group {group['index']} of {group['of']}, lr {group['lr']:.3g}"
    if group["largest_lr"] > 0 and group["lr"] < group["largest_lr"]:
        finding += f" ({group['lr'] / group['largest_lr']:.3g}x of the largest group's)"
    finding += f", weight decay {group['weight_decay']:.3g}"
    for name, options in keys[:1]:
        finding += (
            f", multipliers of custom_keys[{name!r}]: "
            f"{', '.join(f'{k} {v:g}' for k, v in options.items())}"
        )
    return ok("optimizer", finding)


def matching_keys(name: str, paramwise: List[Dict[str, Any]]) -> List[Tuple[str, Dict[str, float]]]:
    """Return the custom_keys that are part of the name, the one that counts first.

    mmcv and mmengine use the longest key, and of equally long ones the first in the alphabet.
    """
    matches = [
        (key, options)
        for each in paramwise
        for key, options in each["custom_keys"].items()
        if key in name
    ]
    return sorted(sorted(matches), key=lambda item: len(item[0]), reverse=True)


def _loaded(entry: Dict[str, Any], facts: Dict[str, Any]) -> Optional[Link]:
    loads = [load for load in entry.get("loads", []) if load["step"] == 0]
    if not loads:
        return None
    last = loads[-1]
    if not last["found"]:
        return ok("loaded", f"the checkpoint has no {last['key']}: its initial value stays")
    if last["before"] != last["after"]:
        return note(
            "loaded",
            f"a checkpoint set it before the first step: {_value(last['before'])} -> "
            f"{_value(last['after'])} ({last['key']})",
        )
    return ok("loaded", f"the checkpoint's {last['key']} has the same value")


def _forward(entry: Dict[str, Any], facts: Dict[str, Any]) -> Optional[Link]:
    events = _events(entry)
    if not events:
        if any(it["reaches"] for it in entry["iterations"]):
            return ok("forward")
        if not entry["iterations"]:
            return unknown("forward", "no iteration was observed")
        owner = (
            f"; its module, {entry['owner']}, was never called"
            if entry["owner"] not in facts.get("called", ())
            else ""
        )
        return broken("unused", owner=owner)
    used = next((event for event in events if event["kind"] == "used"), events[0])
    by = [
        f"{name} ({'used' if kept else 'dropped'})"
        for name, (kept, _) in entry["received"].items()
        if not kept or re.search("attention|mha|decoder", name, re.IGNORECASE)
    ]
    return ok(
        "forward",
        f"first in {used['op']} at {used['site']}"
        + (f"; received by {', '.join(by[:6])}" if by else ""),
    )


def _loss(entry: Dict[str, Any], facts: Dict[str, Any]) -> Optional[Link]:
    iterations = entry["iterations"]
    if not iterations or not _events(entry) and not any(it["reaches"] for it in iterations):
        return None
    if any(it["reaches"] for it in iterations[-2:]):
        dropped = [name for name, (kept, lost) in entry["received"].items() if lost and not kept]
        if dropped:
            return note(
                "loss",
                f"the loss depends on it, but {', '.join(dropped[:3])} drops the tensor computed "
                "from it",
            )
        return ok("loss")
    if not entry["requires_grad"]:
        return unknown("loss", "it is frozen")
    events = _events(entry)
    reasons = facts["unreached"]
    cuts = [event for event in events if event["kind"] != "used"]
    live = [event for event in events if event["kind"] == "used"]
    dropped_by = next((it["dropped"] for it in iterations if it["dropped"]), "")
    in_checkpoint = [event for event in cuts if event["kind"] == "reentrant"]
    if in_checkpoint:
        return broken("reentrant", op=in_checkpoint[0]["op"], site=in_checkpoint[0]["site"])
    if dropped_by and any(it["checkpoints"] for it in iterations) and not cuts and not reasons:
        return broken("dropped", where=dropped_by)
    if reasons:
        return broken("no effect", reason=f"{reasons[0]['where']}: {reasons[0]['reason']}")
    if dropped_by:
        return broken("dropped", where=dropped_by)
    # A value that is only logged is detached too. The relevant cut is that of the last tensor
    # computed from the parameter.
    if cuts and (not live or cuts[-1]["kind"] != "detached" or _last_live_is_cut(events)):
        return broken(cuts[-1]["kind"], op=cuts[-1]["op"], site=cuts[-1]["site"])
    last = live[-1] if live else events[-1]
    return broken("not in loss", op=last["op"], site=last["site"])


def _last_live_is_cut(events: List[Dict[str, Any]]) -> bool:
    return bool(events[-1]["kind"] != "used")


_ENDS: Tuple[Tuple[str, str], ...] = (
    ("clamped", r"Clamp|Hardtanh|Minimum|Maximum|Relu|Threshold|Hardsigmoid"),
    ("masked", r"MaskedFill|Where|MaskedScatter|Index|Dropout|Slice"),
    ("saturated", r"Softmax"),
    ("times zero", r"Mul|Bmm|Mm|Div|Dot"),
)  # fmt: skip


def _gradient(entry: Dict[str, Any], facts: Dict[str, Any]) -> Optional[Link]:
    pairs = [(it, step) for it, step in zip(entry["iterations"], entry["steps"]) if it["reaches"]]
    if not pairs:
        late = [it for it in entry["iterations"] if it["reaches"]]
        if not late or entry["steps"]:
            return None
        return _of_gradient(entry, facts, late[-1], late[-1]["backward_gradient"], None)
    iteration, step = pairs[-1]
    return _of_gradient(entry, facts, iteration, step["gradient"], step)


def _of_gradient(
    entry: Dict[str, Any],
    facts: Dict[str, Any],
    iteration: Dict[str, Any],
    gradient: Optional[float],
    step: Optional[Dict[str, Any]],
) -> Link:
    path = iteration["path"]
    if gradient is None:
        if iteration["backward_gradient"] is not None:
            return broken("cleared")
        end = next(
            (n for n in path if n["called"] and n["entering"] and n["leaving"] is None), None
        )
        return broken("no gradient", op=_op(end) if end else "an operation")
    if gradient == 0.0:
        return _zero(entry, path)
    finding = f"norm {gradient:.3g}"
    total = max(
        (n["entering"][1] for n in path if n["entering"] and n["distance"] <= NEAR), default=0.0
    )
    through_softmax = any(
        re.search("softmax|attention|Fused|Guarded|Flash", n["name"], re.IGNORECASE) for n in path
    )
    if through_softmax and math.isfinite(gradient) and 0 < gradient < ROUNDING * total:
        return broken("cancels", size=gradient, total=total)
    if step is not None and step["rms"] is not None and step["neighbours"]:
        ratio = step["rms"] / step["neighbours"]
        finding += f", {ratio:.2g} times that of other parameters, per entry"
        if ratio < TINY:
            return note("gradient", finding)
    return ok("gradient", finding)


def _zero(entry: Dict[str, Any], path: List[Dict[str, Any]]) -> Link:
    """Find the node nearest to the parameter that receives a gradient other than 0."""
    for node in path:
        entering, leaving = node["entering"], node["leaving"]
        if not entering or not entering[0]:
            continue
        if leaving is not None and leaving[0]:
            continue
        op, where = _op(node), _where(node)
        if leaving is None and node["called"]:
            return broken("nothing matched", op=op, site=where)
        if node["dtype"] == "float16" or "ToCopy" in node["name"] and entering[0] < 1e-7:
            return broken("underflow", dtype="float16", op=op, site=where, size=entering[0])
        for cause, pattern in _ENDS:
            if re.search(pattern, node["name"]):
                site = where.replace(" at ", "", 1) if cause == "clamped" else where
                value = entry["steps"][-1]["value"] if entry["steps"] else math.nan
                return broken(cause, op=op, site=site or "?", value=value)
        return broken("zero", after=f" after {op}{where}")
    half = next((n for n in path if n["dtype"] == "float16"), None)
    if half is not None:
        return broken("underflow", dtype="float16", op=_op(half), site=_where(half), size=0.0)
    return broken("zero from loss")


def _finite(entry: Dict[str, Any], facts: Dict[str, Any]) -> Optional[Link]:
    for index, step in enumerate(entry["steps"], 1):
        if step["gradient"] is not None and not math.isfinite(step["gradient"]):
            return broken("not finite", number=f"{step['gradient']:g}", step=index)
    if facts["skipped"] and not facts["steps"]:
        return broken("skipped")
    return ok("finite") if any(step["gradient"] for step in entry["steps"]) else None


def _update(entry: Dict[str, Any], facts: Dict[str, Any]) -> Optional[Link]:
    steps = [step for step in entry["steps"] if "moved" in step and step["gradient"] and step["lr"]]
    if not steps:
        return None
    last = steps[-1]
    if all(step["moved"] == 0.0 for step in steps):
        return broken(
            "too small",
            dtype=entry["dtype"],
            value=last["value"],
            spacing=last["spacing"],
            lr=last["lr"],
            gradient=last["gradient"],
        )
    spacing = f"{entry['dtype']}'s spacing at {last['value']:.6g} is {last['spacing']:.2g}"
    return ok("update", f"by {last['moved']:.3g}; {spacing}")


def _stays(entry: Dict[str, Any], facts: Dict[str, Any]) -> Optional[Link]:
    steps = [step for step in entry["steps"] if step.get("moved") and "stayed" in step]
    if not steps:
        return None
    lost = [step for step in steps if not step["stayed"]]
    if len(lost) * 2 <= len(steps):
        return ok("stays")
    writes = [w for w in facts["writes"] if w["name"] == entry["name"]]
    loads = [load for load in entry.get("loads", []) if load["step"]]
    writer = f" ({writes[-1]['op']} at {writes[-1]['site']})" if writes else ""
    writer = (
        f" (a checkpoint is loaded into it: {loads[-1]['key']})" if loads and not writes else writer
    )
    return broken(
        "set back" if all(step["set_back"] for step in lost) else "overwritten", writer=writer
    )


def _visible(entry: Dict[str, Any], facts: Dict[str, Any]) -> Optional[Link]:
    steps = [step for step in entry["steps"] if step.get("moved")]
    if not steps or math.prod(entry["shape"]) > FEW:
        return None
    first, last = steps[0]["value"], steps[-1]["after"]
    if first == last or f"{first:.{DIGITS}f}" != f"{last:.{DIGITS}f}":
        return ok("visible", f"{first:.8g} -> {last:.8g} in {len(steps)} steps")
    needed = math.ceil(len(steps) * 0.5 * 10.0**-DIGITS / abs(last - first))
    return note(
        "visible",
        f"the change is too small for {DIGITS} printed digits: {first:.9g} -> {last:.9g} in "
        f"{len(steps)} steps; at this pace {DIGITS} digits show it after about {needed} "
        "steps: print more digits",
    )


CHECKS: Tuple[Callable[[Dict[str, Any], Dict[str, Any]], Optional[Link]], ...] = (
    _learnable, _optimizer, _loaded, _forward, _loss, _gradient, _finite, _update, _stays, _visible,
)  # fmt: skip


def _events(entry: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the operations of the last iteration that has any."""
    return next((it["events"] for it in reversed(entry["iterations"]) if it["events"]), [])


def _op(node: Optional[Dict[str, Any]]) -> str:
    if node is None:
        return "?"
    return str(node["site"]["op"]) if node["site"] else re.sub(r"Backward\d*$", "", node["name"])


def _where(node: Dict[str, Any]) -> str:
    return f" at {node['site']['site']}" if node["site"] else ""


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def broken(cause: str, **values: Any) -> Link:
    return {**describe(cause, **values), "status": "broken"}


def ok(link: str, finding: str = "") -> Link:
    return {"link": link, "status": "ok", "cause": "", "finding": finding, "change": ""}


def note(link: str, finding: str) -> Link:
    return {**ok(link, finding), "status": "note"}


def unknown(link: str, finding: str) -> Link:
    return {**ok(link, finding), "status": "unknown"}
