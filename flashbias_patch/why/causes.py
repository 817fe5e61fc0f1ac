"""Define the causes why a parameter does not learn, and what to change. `monitor` uses them too."""

from __future__ import annotations

from typing import Any, Dict, NamedTuple


class Cause(NamedTuple):
    """A broken link: its name, the finding (a format string), and what to change."""

    link: str
    finding: str
    change: str


CAUSES: Dict[str, Cause] = {
    # -- exists
    "missing": Cause(
        "exists",
        "no module has a parameter called {name}{near}",
        "use the full name of a parameter, or build the module that has it",
    ),
    "switched off": Cause(
        "exists",
        "no parameter is called {name}; {switches}",
        "set that option to True in the config",
    ),
    "not a parameter": Cause(
        "exists",
        "{name} is {what}, not a parameter: it does not learn",
        "make it an nn.Parameter (an option such as learnable_scale=True does that)",
    ),
    "no model": Cause("exists", "the command called no module", "use a command that trains"),
    # -- learnable
    "frozen": Cause(
        "learnable",
        "it does not require a gradient (frozen)",
        "remove it from what freezes parameters, or call requires_grad_(True) before the "
        "optimizer is built",
    ),
    # -- optimizer
    "no step": Cause("optimizer", "no optimizer made a step", "use a command that trains"),
    "not held": Cause(
        "optimizer",
        "the optimizer does not hold it: it was built before the parameter, or it filters by name",
        "build the optimizer after the whole model, with every parameter",
    ),
    "replaced": Cause(
        "optimizer",
        "the optimizer holds an old parameter of this name: the parameter was replaced{where}",
        "assign into the parameter (with torch.no_grad(): p.copy_(...)) instead of replacing it",
    ),
    "lr 0": Cause("optimizer", "its learning rate is 0{key}", "set a learning rate for it{how}"),
    # -- forward
    "unused": Cause(
        "forward",
        "no operation of the forward pass received it{owner}",
        "call the module that uses it, or enable its branch",
    ),
    # -- loss
    "detached": Cause(
        "loss",
        "it is detached from the graph: {op} at {site}",
        "remove that call, or use it for logging only",
    ),
    "no_grad": Cause(
        "loss",
        "it is used with gradients disabled: {op} at {site}",
        "move that code out of torch.no_grad() or torch.inference_mode()",
    ),
    "reentrant": Cause(
        "loss",
        "it is lost by reentrant checkpointing: {op} at {site} runs in a checkpoint whose "
        "recomputation does not reach it",
        "checkpoint with use_reentrant=False, or pass the bias to the checkpointed function as a "
        "tensor argument; runs patched by flashbias_patch keep it",
    ),
    "not differentiable": Cause(
        "loss", "{op} at {site} has no gradient", "replace that operation by a differentiable one"
    ),
    "dropped": Cause(
        "loss",
        "{where} received a tensor computed from it, but its output does not depend on it",
        "run patched (flashbias run), or use a class that adds its attn_mask; flash attention "
        "classes drop it",
    ),
    "no effect": Cause(
        "loss",
        "the bias computed from it has no effect: {reason}",
        "see this message in docs/troubleshooting.md",
    ),
    "not in loss": Cause(
        "loss",
        "the tensor computed from it ({op} at {site}) does not reach the loss",
        "add that tensor to the scores, or that loss to the total loss",
    ),
    # -- gradient
    "no gradient": Cause(
        "gradient",
        "{op} returns no gradient for it",
        "that operation cannot train it: replace the operation, or run patched",
    ),
    "cleared": Cause(
        "gradient",
        "it gets a gradient in backward, but has none when the optimizer makes a step",
        "call zero_grad() before backward(), not between backward() and step()",
    ),
    "clamped": Cause(
        "gradient",
        "it is at or beyond a bound of {op} at {site}, where the gradient is 0 (value {value:.6g})",
        "widen the bounds, start inside them, or use a smooth bound (softplus, sigmoid)",
    ),
    "underflow": Cause(
        "gradient",
        "its gradient underflows in {dtype} at {op}{site}: {size:.2g} becomes 0",
        "use GradScaler or bfloat16, or compute this part in float32",
    ),
    "masked": Cause(
        "gradient",
        "everything it is added to is masked out at {op}{site}",
        "check the mask: it masks out every key that the bias is for",
    ),
    "times zero": Cause(
        "gradient", "it is multiplied by 0 at {op}{site}", "check the other factor: it is exactly 0"
    ),
    "nothing matched": Cause(
        "gradient",
        "{op}{site} has no entries: nothing was selected in this batch",
        "check the selection: no query matched, or every entry is filtered out",
    ),
    "saturated": Cause(
        "gradient",
        "the softmax is saturated at {op}{site}: one key has all the weight, so its gradient is 0",
        "use a smaller scale, or bounds on the bias",
    ),
    "cancels": Cause(
        "gradient",
        "its gradient is only rounding error ({size:.2g} of {total:.2g} before summing): the bias "
        "is the same for all keys of a query, so softmax ignores it",
        "let the bias differ between keys: more than one segment, weights that are not uniform",
    ),
    "zero": Cause(
        "gradient",
        "its gradient is exactly 0{after}",
        "check that operation: the bias is the same for all keys, multiplied by 0, or outside a "
        "bound",
    ),
    "zero from loss": Cause(
        "gradient",
        "the gradient is already 0 before it reaches a tensor computed from it",
        "check the loss: its weight is 0, or nothing matched in these batches",
    ),
    # -- finite
    "not finite": Cause(
        "finite",
        "its gradient is not finite ({number}), first at step {step}",
        "check the batch and the loss of that step; in float16 use GradScaler",
    ),
    "skipped": Cause(
        "finite",
        "GradScaler skipped every step: a gradient is not finite at any scale",
        "check the loss for nan or inf; see docs/troubleshooting.md",
    ),
    # -- update
    "too small": Cause(
        "update",
        "its update is smaller than {dtype}'s spacing at {value:.6g} ({spacing:.2g}); learning "
        "rate {lr:.2g}, gradient {gradient:.2g}",
        "use a larger learning rate for it, or keep it in float32",
    ),
    # -- stays
    "set back": Cause(
        "stays",
        "each step changes it, and other code sets it back{writer}",
        "exclude it from that code, or run that code before the optimizer step",
    ),
    "overwritten": Cause(
        "stays",
        "it is overwritten between steps{writer}",
        "exclude it from that code (EMA, weight sync, re-initialisation, reloading a checkpoint)",
    ),
}


def describe(cause: str, **values: Any) -> Dict[str, str]:
    """Return link, cause, finding and change of a broken link as text."""
    entry = CAUSES[cause]
    return {
        "link": entry.link,
        "cause": cause,
        "finding": entry.finding.format(**values),
        "change": entry.change.format(**values),
    }
