"""The one table of causes: why a parameter does not learn, and what to change. `monitor` uses it
too."""

from __future__ import annotations

from typing import Any, Dict, NamedTuple


class Cause(NamedTuple):
    """The link that is broken, what was found ({} are filled in), and what to change."""

    link: str
    finding: str
    change: str


CAUSES: Dict[str, Cause] = {
    # -- exists
    "missing": Cause(
        "exists",
        "no module has a parameter called {name}{near}",
        "give the full name, or build the module",
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
    "no model": Cause(
        "exists", "no module was called in this command", "give the command that trains"
    ),
    # -- learnable
    "frozen": Cause(
        "learnable",
        "it does not require a gradient (frozen)",
        "remove it from what freezes parameters, or call requires_grad_(True) before the "
        "optimizer is built",
    ),
    # -- optimizer
    "no step": Cause("optimizer", "no optimizer made a step", "give the command that trains"),
    "not held": Cause(
        "optimizer",
        "the optimizer does not hold it; it was built before the parameter, or filters by name",
        "build the optimizer after the whole model, and hand it every parameter",
    ),
    "replaced": Cause(
        "optimizer",
        "the optimizer holds an earlier object of this name: the parameter was replaced{where}",
        "assign into the parameter (with torch.no_grad(): p.copy_(...)) instead of replacing it",
    ),
    "lr 0": Cause("optimizer", "its learning rate is 0{key}", "give it a learning rate{how}"),
    # -- forward
    "unused": Cause(
        "forward",
        "no operation of the forward pass received it{owner}",
        "call the module that uses it, or turn its branch on",
    ),
    # -- loss
    "detached": Cause(
        "loss",
        "it is detached from the graph: {op} at {site}",
        "remove that call, or keep it for logging only",
    ),
    "no_grad": Cause(
        "loss",
        "it is used with gradients turned off: {op} at {site}",
        "move that code out of torch.no_grad() or torch.inference_mode()",
    ),
    "reentrant": Cause(
        "loss",
        "it is lost by reentrant checkpointing: {op} at {site} runs in a checkpoint whose "
        "recomputation does not reach it",
        "checkpoint with use_reentrant=False, or hand the bias to the checkpointed function as a "
        "tensor "
        "argument; patched by flashbias_patch it survives",
    ),
    "not differentiable": Cause(
        "loss", "{op} at {site} has no gradient", "replace that operation by a differentiable one"
    ),
    "dropped": Cause(
        "loss",
        "{where} received a tensor made from it and dropped it: its output does not depend on it",
        "run patched (flashbias run), or use a class that adds its attn_mask; a flash attention "
        "class drops it",
    ),
    "no effect": Cause(
        "loss",
        "the bias made from it has no effect: {reason}",
        "see that line in docs/troubleshooting.md",
    ),
    "not in loss": Cause(
        "loss",
        "what is made from it ({op} at {site}) does not reach the loss",
        "add that result to the scores, or that loss to the total",
    ),
    # -- gradient
    "no gradient": Cause(
        "gradient",
        "{op} returns no gradient for it",
        "that operation cannot train it: replace it, or run patched",
    ),
    "cleared": Cause(
        "gradient",
        "a gradient arrives in backward and is gone when the optimizer steps",
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
        "use a GradScaler (or bfloat16), or compute this part in float32",
    ),
    "masked": Cause(
        "gradient",
        "all that it adds is masked out at {op}{site}",
        "see the mask: it covers all that the bias is for",
    ),
    "times zero": Cause(
        "gradient",
        "it is multiplied by 0 at {op}{site}",
        "see the other factor: weights of exactly 0",
    ),
    "nothing matched": Cause(
        "gradient",
        "{op}{site} is over no entries: nothing was selected in this batch",
        "see what selects: no query matched, or every entry is filtered out",
    ),
    "saturated": Cause(
        "gradient",
        "the softmax is saturated at {op}{site}: one key takes all, and its gradient is 0",
        "a smaller scale, or bounds on the bias",
    ),
    "cancels": Cause(
        "gradient",
        "its gradient is rounding only ({size:.2g} of {total:.2g} before summing): the bias is the "
        "same for all keys of a query, which softmax does not see",
        "let the bias differ between keys: more than one segment, weights that are not uniform",
    ),
    "zero": Cause(
        "gradient",
        "its gradient is exactly 0{after}",
        "see that operation: the bias is the same for all keys, multiplied by 0, or outside of a "
        "bound",
    ),
    "zero from loss": Cause(
        "gradient",
        "the gradient is 0 already before it reaches anything made from it",
        "see the loss: its weight is 0, or nothing matched in these batches",
    ),
    # -- finite
    "not finite": Cause(
        "finite",
        "its gradient is not finite ({number}), first at step {step}",
        "look at the batch and the loss of that step; in float16 use a GradScaler",
    ),
    "skipped": Cause(
        "finite",
        "GradScaler left out every step: some gradient is not finite at every scale",
        "look for nan or inf in the loss; see docs/troubleshooting.md",
    ),
    # -- update
    "too small": Cause(
        "update",
        "its update is smaller than {dtype}'s spacing at {value:.6g} ({spacing:.2g}); learning "
        "rate {lr:.2g}, gradient {gradient:.2g}",
        "a larger learning rate for it, or keep it in float32",
    ),
    # -- stays
    "set back": Cause(
        "stays",
        "each step moves it and something sets it back{writer}",
        "exclude it from that, or do it before the optimizer's step",
    ),
    "overwritten": Cause(
        "stays",
        "it is overwritten between steps{writer}",
        "exclude it from that (EMA, weight sync, re-initialisation, a checkpoint loaded again)",
    ),
}


def describe(cause: str, **values: Any) -> Dict[str, str]:
    """A broken link: link, cause, finding and change, in words."""
    found = CAUSES[cause]
    return {
        "link": found.link,
        "cause": cause,
        "finding": found.finding.format(**values),
        "change": found.change.format(**values),
    }
