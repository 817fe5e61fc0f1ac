"""Capture the numbers of a step by small wrappers around torch and OpenMMLab that change nothing.

Nothing here reads a value from the device: tensors are kept as they are and read later by the
probe.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any, Callable, Dict, List, Optional

MAX_PARTS = 64
USER_FRAMES = 3  # how far up from backward() to look for the parts of a plain loop's loss

# Functions that return (loss, log_vars) or take log_vars: the loss's parts as OpenMMLab names them.
PARSE_LOSSES = (
    ("mmdet.models.detectors.base", "BaseDetector", "_parse_losses"),
    ("mmengine.model.base_model.base_model", "BaseModel", "parse_losses"),
)
LOG_BUFFER = ("mmcv.runner.log_buffer", "LogBuffer", "update")


class Inbox:
    """The losses and norms that were captured since the last optimiser step."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.depth = 0  # > 0 inside a backward pass: checkpointing's inner ones are not losses
        self.half = False
        self.steps = 0  # of any optimiser, in all
        self.clear()

    def clear(self) -> None:
        self.losses: List[Any] = []
        self.parts: Dict[str, Any] = {}
        self.clip_norm: Any = None
        self.before_step: Optional[int] = None

    def begin_step(self) -> None:
        """An optimiser's step begins; backward passes from here to its end are those of a
        closure."""
        self.before_step = len(self.losses)

    def end_step(self) -> None:
        """Of a closure's losses the first is kept: later ones belong to trial steps of a line
        search."""
        self.steps += 1
        if self.before_step is not None:
            del self.losses[self.before_step + 1 :]
            self.before_step = None

    def hear_backward(self, roots: Any, frame: Any) -> None:
        if isinstance(roots, (list, tuple)) and len(roots) == 1:
            roots = roots[0]
        if not self._scalar(roots):
            return
        unscaled = getattr(roots, "_flashbias_unscaled", None)
        loss = roots if unscaled is None else unscaled
        self.losses.append(loss.detach())
        self.half = self.half or unscaled is not None or loss.element_size() < 4
        if not self.parts:
            self._hear_frames(frame, loss)

    def hear_parts(self, values: Any) -> None:
        if not isinstance(values, dict):
            return
        for name, value in values.items():
            if isinstance(name, str) and "loss" in name.lower() and len(self.parts) < MAX_PARTS:
                if isinstance(value, (int, float)):
                    self.parts[name] = float(value)
                elif self._scalar(value):
                    self.parts[name] = value.detach()

    def _hear_frames(self, frame: Any, loss: Any) -> None:
        """A plain loop: scalars called ...loss... (or in a dictionary, under such a key) near
        backward()."""
        looked = 0
        while frame is not None and looked < USER_FRAMES and not self.parts:
            module = frame.f_globals.get("__name__", "")
            if not module.startswith(("torch.", "flashbias_patch.")):
                looked += 1
                found: Dict[str, Any] = {}
                for name, value in list(frame.f_locals.items()):
                    if type(value) is dict or type(value).__name__ == "OrderedDict":
                        found.update(
                            (k, v)
                            for k, v in list(value.items())[: 4 * MAX_PARTS]
                            if isinstance(k, str) and self._scalar(v)
                        )
                    elif self._scalar(value):
                        found.setdefault(name, value)
                self.hear_parts({k: v for k, v in found.items() if v is not loss})
            frame = frame.f_back

    def _scalar(self, value: Any) -> bool:
        return (
            isinstance(value, self.torch.Tensor)
            and value.numel() == 1
            and value.is_floating_point()
        )


def listen(
    torch: Any,
    inbox: Inbox,
    after_backward: Callable[[], None] = lambda: None,
    skipped: Callable[[Any], None] = lambda optimizer: None,
) -> None:
    """Wrap torch's backward, gradient clipping, loss scaling and autocast, and OpenMMLab's loss
    parsing.

    `after_backward()` is called after each outermost backward pass, `skipped(optimizer)` where a
    gradient scaler leaves an optimiser's step out.
    """
    _wrap(torch.autograd, "backward", lambda original: _backward(original, inbox, after_backward))
    for module in (torch.nn.utils, torch.nn.utils.clip_grad):
        _wrap(module, "clip_grad_norm_", lambda original: _clip(original, inbox))
    for scaler in _scaler_classes(torch):
        _wrap(scaler, "scale", _scale)
        _wrap(scaler, "step", lambda original: _scaler_step(original, inbox, skipped))
    _wrap(
        getattr(torch, "autocast", None), "__enter__", lambda original: _autocast(original, inbox)
    )
    import wrapt

    def later(place: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        module_name, class_name, function = place
        wrapt.register_post_import_hook(
            lambda module: _wrap(getattr(module, class_name, None), function, make), module_name
        )

    for place in PARSE_LOSSES:
        later(place, lambda original: _parse_losses(original, inbox))
    later(LOG_BUFFER, lambda original: _log_buffer(original, inbox))


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = vars(owner).get(name) if owner is not None else None
    if callable(original) and not hasattr(original, "_flashbias_listens"):
        wrapped = functools.wraps(original)(make(original))
        wrapped._flashbias_listens = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _backward(
    original: Callable[..., Any], inbox: Inbox, after: Callable[[], None]
) -> Callable[..., Any]:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if inbox.depth == 0:
            inbox.hear_backward(tensors, sys._getframe(1))
        inbox.depth += 1
        try:
            result = original(tensors, *args, **kwargs)
        finally:
            inbox.depth -= 1
        if inbox.depth == 0:
            after()
        return result

    return backward


def _scaler_step(
    original: Callable[..., Any], inbox: Inbox, skipped: Callable[[Any], None]
) -> Callable[..., Any]:
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        before = inbox.steps
        result = original(self, optimizer, *args, **kwargs)
        if inbox.steps == before:
            skipped(optimizer)
        return result

    return step


def _clip(original: Callable[..., Any], inbox: Inbox) -> Callable[..., Any]:
    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        inbox.clip_norm = (
            norm  # the norm before clipping: afterwards it would be the limit, every step
        )
        return norm

    return clip_grad_norm_


def _scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(self: Any, outputs: Any) -> Any:
        scaled = original(self, outputs)
        if (
            scaled is not outputs and hasattr(outputs, "detach") and hasattr(scaled, "detach")
        ):  # the same if disabled
            scaled._flashbias_unscaled = outputs.detach()
        return scaled

    return scale


def _autocast(original: Callable[..., Any], inbox: Inbox) -> Callable[..., Any]:
    def __enter__(self: Any) -> Any:
        inbox.half = inbox.half or bool(getattr(self, "_enabled", False))
        return original(self)

    return __enter__


def _parse_losses(original: Callable[..., Any], inbox: Inbox) -> Callable[..., Any]:
    def parse_losses(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if isinstance(result, tuple) and len(result) == 2:
            inbox.hear_parts(result[1])
        return result

    return parse_losses


def _log_buffer(original: Callable[..., Any], inbox: Inbox) -> Callable[..., Any]:
    def update(self: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        inbox.hear_parts(values)
        return original(self, values, *args, **kwargs)

    return update


def _scaler_classes(torch: Any) -> List[Any]:
    """torch.amp.GradScaler (2.3 on), torch.cuda.amp.GradScaler (before; a subclass since)."""
    places = [getattr(torch, "amp", None), getattr(getattr(torch, "cuda", None), "amp", None)]
    classes = [getattr(place, "GradScaler", None) for place in places]
    return [c for c in classes if c is not None]


def on_optimizer_step(hook: Callable[[Any], None], inbox: Inbox) -> None:
    """Call `hook(optimizer)` after every optimiser's step: by torch's global hooks, or by class."""
    module = importlib.import_module(
        "torch.optim.optimizer"
    )  # torch.optim hides it as an attribute
    before = getattr(module, "register_optimizer_step_pre_hook", None)
    after = getattr(module, "register_optimizer_step_post_hook", None)

    def ended(optimizer: Any) -> None:
        inbox.end_step()
        hook(optimizer)

    if before is not None and after is not None:
        before(lambda optimizer, args, kwargs: inbox.begin_step())
        after(lambda optimizer, args, kwargs: ended(optimizer))
        return

    def init(original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            _wrap(type(self), "step", lambda step: _around(step, inbox, ended))

        return __init__

    _wrap(module.Optimizer, "__init__", init)


def _around(
    step: Callable[..., Any], inbox: Inbox, ended: Callable[[Any], None]
) -> Callable[..., Any]:
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        inbox.begin_step()
        result = step(self, *args, **kwargs)
        ended(self)
        return result

    return stepped


def gradients_of(optimizer: Any) -> List[Any]:
    """The gradients an optimiser just used: local shards of distributed ones, values of sparse
    ones."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            gradient = local(gradient.detach())
            found.append(gradient.coalesce().values() if gradient.is_sparse else gradient)
    return found


def local(tensor: Any) -> Any:
    """This rank's part of a distributed tensor; any other as it is. The whole would take a
    collective."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def norm_of(torch: Any, gradients: List[Any]) -> Optional[Any]:
    """L2 norm over all of them as a 0-d tensor, on their device; None if there are none."""
    from .._torch_internals import foreach_norm

    by_device: Dict[Any, List[Any]] = {}
    for gradient in gradients:
        by_device.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    norms: List[Any] = []
    for group in by_device.values():
        norms += [n.double() if n.device.type != "mps" else n.float() for n in foreach_norm(group)]
    if not norms:
        return None
    home = norms[-1].device
    return torch.stack([n.to(home) for n in norms]).square().sum().sqrt()


def nudge(torch: Any, optimizer: Any, relative: float, seed: int = 1) -> None:
    """Change every parameter by +-`relative` of itself, with signs from a generator of its own:
    simulated rounding."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nudge_parameters(torch, parameters, relative, seed)


def nudge_parameters(torch: Any, parameters: List[Any], relative: float, seed: int = 1) -> None:
    """`nudge` for these parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.is_floating_point() and not hasattr(parameter, "to_local"):
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + relative * signs.to(parameter.device, parameter.dtype))


def find_parameters(torch: Any, suffixes: List[str], limit: int = 8) -> Dict[str, Any]:
    """{name: parameter} of every live module's parameters whose name is, or ends in `.`, one of
    `suffixes`.

    Walks the garbage collector's objects, so it is for once, at the first step. `type()` rather
    than isinstance: lazy proxies answer the latter by importing what they stand for.
    """
    import gc

    modules = [o for o in gc.get_objects() if issubclass(type(o), torch.nn.Module)]
    children = {
        id(child) for module in modules for child in module._modules.values() if child is not None
    }
    found: Dict[str, Any] = {}
    seen = set()
    for root in modules:
        if id(root) in children:
            continue
        for name, parameter in root.named_parameters():
            if id(parameter) in seen or not any(
                name == s or name.endswith("." + s) for s in suffixes
            ):
                continue
            seen.add(id(parameter))
            if len(found) < limit:
                found[name] = parameter
    return found
