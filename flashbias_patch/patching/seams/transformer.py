"""The transformer seam: the bias of its router reaches every layer.

`forward` reads segments and queries off its own arguments and opens `attention_bias(...,
kind="cross")` around the repository's code. The head's seams hand over what a transformer is not
given: where its queries are, and a place among the losses.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ... import aqr
from ...aqr.geometry import Places, places, take_geometry
from ...aqr.router import AdaptiveQueryRouter
from ...attention.recovery import replay
from .. import context
from ..call_adapter import Parameters
from . import pending_losses
from .base import Args, Kwargs, Seam
from .transformer_constructor import KEY
from .transformer_layouts import Keys, Layout, layout_of

# The module that is being run by this seam: an inner call of the same one passes through.
_running: contextvars.ContextVar[Any] = contextvars.ContextVar("flashbias_running", default=None)


class TransformerSeam(Seam):
    """forward(...): the bias from its own arguments, in force for its cross attentions."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.layout = layout_of(cls)
        self.parameters = Parameters(cls)
        signature = inspect.signature(inspect.unwrap(cls.forward)).parameters  # type: ignore[attr-defined]
        self.defaults = {
            name: p.default for name, p in signature.items() if p.default is not p.empty
        }

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        router = module._modules.get(KEY)
        if not isinstance(router, AdaptiveQueryRouter) or _running.get() is module:
            return wrapped(*args, **kwargs)

        def get(name: str) -> Any:
            given = name in kwargs or self.parameters.position.get(name, len(args)) < len(args)
            return self.parameters.get(name, args, kwargs) if given else self.defaults.get(name)

        dropped = None
        if module.training and router.drop is not None and get("x_img") is not None:
            dropped = _draw(router.drop, len(get("x")))
            x, x_img = aqr.drop_modalities(get("x"), get("x_img"), dropped)
            args, kwargs = self._with(args, kwargs, {"x": x, "x_img": x_img})
        keys = self.layout.keys(get)
        query = get(self.layout.query)
        segments = _segments(keys, router.num_segments, self.layout, self.name)
        supervised = dropped is not None and bool(router.supervision)
        # The loss needs the logits' graph also where a checkpoint around the transformer runs
        # without gradients.
        with (
            torch.enable_grad() if supervised and replay.in_function() else contextlib.nullcontext()
        ):
            # Inputs are detached: the router's gradient must not move reference points.
            routing = router.route(
                (query if query.dim() == 3 else query[None]).detach(),
                _mean_features(keys, router.num_segments, self.layout).detach(),
                self._places(keys),
            )
            # A recomputation computes it too: checkpoints compare the tensors that were saved.
            loss = aqr.supervision_loss(routing.logits, dropped) if supervised else None  # type: ignore[arg-type]
        if loss is not None and not replay.recomputing():
            pending_losses.add(router, loss)
        if module.training and torch.is_grad_enabled():
            query = query + router.zero().to(query.dtype)
            args, kwargs = self._with(args, kwargs, {self.layout.query: query})
        token = _running.set(module)
        try:
            with contextlib.ExitStack() as stack:
                for bias, layers in router.biases(routing, segments):
                    stack.enter_context(context.attention_bias(bias, "cross", layers))
                return wrapped(*args, **kwargs)
        finally:
            _running.reset(token)

    def _places(self, keys: Keys) -> Optional[Places]:
        provided = take_geometry()
        first = replay.once(
            lambda: provided
        )  # a recomputation of the transformer alone is not provided with it again
        geometry = first if provided is None else provided
        if geometry is None or keys.flat is not None:
            return None
        bev = None if keys.lidar is None else (keys.lidar.shape[-2], keys.lidar.shape[-1])
        views = None if keys.cameras is None else (keys.cameras.shape[1], *keys.cameras.shape[-2:])
        return places(geometry, bev, views)

    def _with(self, args: Args, kwargs: Kwargs, values: Dict[str, Any]) -> Tuple[Args, Kwargs]:
        """Return args and kwargs with other values for some parameters."""
        positional = list(args)
        named = dict(kwargs)
        for name, value in values.items():
            index = self.parameters.position[name]
            if name not in named and index < len(positional):
                positional[index] = value
            else:
                named[name] = value
        return tuple(positional), named


def _draw(drop: aqr.ModalityDrop, batch: int) -> List[Optional[str]]:
    """Return the sensor that each sample drops in this forward; a recomputation drops the same."""
    if replay.out_of_reach():
        raise RuntimeError(
            "aqr.drop: the torch.autograd.Function around this transformer does not hand its ctx "
            "to forward(), so that a "
            "recomputation could not drop the same; use torch.utils.checkpoint.checkpoint(..., "
            "use_reentrant=False)"
        )
    dropped: List[Optional[str]] = replay.once(lambda: drop.draw(batch))
    return dropped


def _segments(keys: Keys, wanted: int, layout: Layout, name: str) -> Tuple[int, ...]:
    """Return the segment lengths in key order. A call without images has camera lengths of 0."""
    cameras = wanted - int(layout.lidar)
    lengths = [] if keys.lidar is None else [keys.lidar.shape[-2] * keys.lidar.shape[-1]]
    if keys.flat is not None:
        count = keys.flat.shape[1]
        if count % cameras:
            raise ValueError(
                f"aqr.cameras: {name} got {count} keys, which is not a multiple of {cameras} "
                "cameras; set aqr.cameras to their number, or to 1"
            )
        return (count // cameras,) * cameras
    if keys.cameras is None:
        return (*lengths, *(0,) * cameras)
    views, height, width = keys.cameras.shape[1], *keys.cameras.shape[-2:]
    if cameras not in (1, views):
        raise ValueError(
            f"aqr.cameras: {name} got {views} views, but the router was built for {cameras}; "
            f"set aqr.cameras={views}, or 1 for all as one segment"
        )
    return (*lengths, *(views // cameras * height * width,) * cameras)


def _mean_features(keys: Keys, wanted: int, layout: Layout) -> Tensor:
    """Return the mean feature per segment (B, S, C); zeros for a segment without keys."""
    cameras = wanted - int(layout.lidar)
    parts = [] if keys.lidar is None else [keys.lidar.mean((-2, -1))[:, None]]
    if keys.flat is not None:
        parts.append(keys.flat.unflatten(1, (cameras, -1)).mean(2))
    elif keys.cameras is not None:
        each = keys.cameras.mean((-2, -1))
        parts.append(each if cameras == each.shape[1] else each.mean(1, keepdim=True))
    elif cameras:
        parts.append(parts[0].new_zeros(keys.batch, cameras, parts[0].shape[-1]))
    return torch.cat(parts, 1)
