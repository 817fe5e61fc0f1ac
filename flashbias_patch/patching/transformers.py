"""The transformer seam: `aqr=dict(enable=True, ...)` in a config builds a router, and its bias
reaches every layer.

`__init__` takes the key, which the repository's class does not know; `forward` reads segments and
queries off its own arguments and opens `attention_bias(..., kind="cross")` around the repository's
code. The head's seams hand over what a transformer is not given: where its queries are, and a place
among the losses.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import weakref
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from .. import aqr, telemetry
from .._torch_internals import WeakIdKeyDictionary
from ..aqr import options as aqr_options
from ..aqr.geometry import Places, places, take_geometry
from ..aqr.options import ONLY, WINDOW
from ..aqr.router import AdaptiveQueryRouter
from ..aqr.window_router import WindowRouter
from ..attention.recovery import replay
from . import context
from .call_adapter import Parameters

KEY = "aqr"
BOTH = ("per", "hidden_dims", "init_bias_scale")  # options of every router
PETR_CAMERAS = (
    6  # nuScenes; how many there are is only seen in forward, and a router is built before
)

# What a module is being constructed, or run, by one of these wrappers: an inner call of the same
# one passes through.
_constructing: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "flashbias_constructing", default=None
)
_running: contextvars.ContextVar[Any] = contextvars.ContextVar("flashbias_running", default=None)

# router -> the supervision losses of forwards, oldest first, until the head's loss takes each; and
# outputs of a head -> the loss of the forward that made them, None where it has none. Beside the
# modules, so that they pickle and deep-copy as ever.
MOST = 16  # forwards without a loss that are remembered
_pending: weakref.WeakKeyDictionary[AdaptiveQueryRouter, List[Tensor]] = weakref.WeakKeyDictionary()
_of_output: Any = WeakIdKeyDictionary()


class Keys(NamedTuple):
    """The keys of one call: lidar (B, C, h, w), cameras (B, V, C, h, w) and flat memory (B, N, C),
    any of them None."""

    batch: int
    lidar: Optional[Tensor] = None
    cameras: Optional[Tensor] = None
    flat: Optional[Tensor] = None


def _cmt_keys(get: Callable[[str], Any]) -> Keys:
    lidar, images = get("x"), get("x_img")
    batch = lidar.shape[0]
    return Keys(batch, lidar, None if images is None else images.unflatten(0, (batch, -1)))


def _image_keys(get: Callable[[str], Any]) -> Keys:
    images, batch = get("x_img"), get("bs")
    return Keys(batch, cameras=images.unflatten(0, (batch, -1)))


class Layout(NamedTuple):
    """How a class of transformers takes its queries and keys."""

    query: str  # the parameter that holds (B, M, C) or (M, C)
    keys: Callable[[Callable[[str], Any]], Keys]
    lidar: bool = False  # the first segment is the lidar BEV
    cameras: int = 0  # camera segments unless the options say otherwise
    grid: bool = True  # whether rows and columns of the keys are known


LAYOUTS: Dict[str, Layout] = {
    "CmtTransformer": Layout("query_embed", _cmt_keys, lidar=True, cameras=1),
    "CmtLidarTransformer": Layout(
        "query_embed", lambda get: Keys(len(get("x")), get("x")), lidar=True
    ),
    "CmtImageTransformer": Layout("query_embed", _image_keys, cameras=PETR_CAMERAS),
    "PETRTransformer": Layout(
        "query_embed", lambda get: Keys(len(get("x")), cameras=get("x")), cameras=PETR_CAMERAS
    ),
    "PETRDNTransformer": Layout(
        "query_embed", lambda get: Keys(len(get("x")), cameras=get("x")), cameras=PETR_CAMERAS
    ),
    "PETRTemporalTransformer": Layout(
        "query_pos",
        lambda get: Keys(len(get("memory")), flat=get("memory")),
        cameras=PETR_CAMERAS,
        grid=False,
    ),
}


def layout_of(cls: type) -> Layout:
    return next(LAYOUTS[base.__name__] for base in cls.__mro__ if base.__name__ in LAYOUTS)


# -- construction ----------------------------------------------------------------------------------


class ConstructorSeam:
    """__init__(..., aqr=...): the router becomes the module's `aqr`, built last, before any
    optimiser can exist."""

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__
        self.layout = layout_of(cls)
        self.knows_key = KEY in inspect.signature(inspect.unwrap(cls.__init__)).parameters  # type: ignore[misc]

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
        if _constructing.get() is module or self.knows_key:
            return wrapped(*args, **kwargs)
        given = kwargs.get(KEY)
        options = aqr_options.from_environment() if given is None else aqr_options.read(given)
        token = _constructing.set(module)
        try:
            wrapped(*args, **{name: value for name, value in kwargs.items() if name != KEY})
        finally:
            _constructing.reset(token)
        if options is not None and options.enable:
            module.aqr = self._router(module, options)

    def _router(self, module: Any, options: aqr.Options) -> AdaptiveQueryRouter:
        return build_router(
            self.name,
            self.layout,
            options,
            embed_dims=module.embed_dims,
            num_heads=_num_heads(module),
            num_layers=len(module.decoder.layers),
        )


def build_router(
    name: str, layout: Layout, options: aqr.Options, **sizes: Any
) -> AdaptiveQueryRouter:
    """The router of a transformer class `name`; ValueError names an option that does not fit it.
    sizes: embed_dims, num_heads and num_layers."""
    windows = options.bias == WINDOW
    cameras = layout.cameras if options.cameras is None else options.cameras
    if not layout.lidar and not cameras or not layout.cameras and cameras:
        raise ValueError(f"aqr.cameras: {cameras} does not fit {name}")
    if windows and not layout.grid:
        raise ValueError(
            f"aqr.bias: 'window' needs rows and columns of the keys, which {name} is not given; "
            "use bias='modality'"
        )
    if windows:
        cameras = min(layout.cameras, 1)  # one weight for all cameras
    segments = int(layout.lidar) + cameras
    if (options.drop or options.supervision) and not (layout.lidar and cameras):
        raise ValueError(
            f"aqr.drop and aqr.supervision need lidar and cameras; {name} has one of them"
        )
    if options.supervision and not options.drop:
        raise ValueError(
            "aqr.supervision: needs aqr.drop > 0, it is the dropped sensor that it teaches"
        )
    if windows:
        router: AdaptiveQueryRouter = WindowRouter(
            num_segments=segments,
            **{name: getattr(options, name) for name in (*BOTH, *ONLY[WINDOW])},
            **sizes,
        )
    else:
        if segments == 1 and not options.locality:
            telemetry.once(
                (name, "one segment"),
                "warning",
                "aqr: %s has one segment, a bias that is the same for all its keys does nothing; "
                "set locality=True",
                name,
            )
        router = AdaptiveQueryRouter(
            num_segments=segments,
            locality=options.locality,
            eps=options.eps,
            **{name: getattr(options, name) for name in BOTH},
            **sizes,
        )
    if options.drop:
        router.drop = aqr.ModalityDrop(options.drop, torch.initial_seed(), telemetry.rank())
    router.supervision = float(options.supervision)
    telemetry.once(
        (name, "router"),
        "info",
        "aqr: %s has a router over %d segments (bias=%r)",
        name,
        segments,
        options.bias,
    )
    return router


def _num_heads(module: Any) -> Optional[int]:
    attentions = getattr(module.decoder.layers[0], "attentions", ())
    return next(
        (int(a.num_heads) for a in reversed(list(attentions)) if hasattr(a, "num_heads")), None
    )


# -- forward ---------------------------------------------------------------------------------------


class TransformerSeam:
    """forward(...): the bias from its own arguments, in play for its cross attentions."""

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__
        self.layout = layout_of(cls)
        self.parameters = Parameters(cls)
        signature = inspect.signature(inspect.unwrap(cls.forward)).parameters  # type: ignore[attr-defined]
        self.defaults = {
            name: p.default for name, p in signature.items() if p.default is not p.empty
        }

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
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
            # The router reads and does not steer: its gradient would move reference points to
            # change their weights.
            routing = router.route(
                (query if query.dim() == 3 else query[None]).detach(),
                _mean_features(keys, router.num_segments, self.layout).detach(),
                self._places(keys),
            )
            # A recomputation computes it too: checkpoints compare the tensors that were saved.
            loss = aqr.supervision_loss(routing.logits, dropped) if supervised else None  # type: ignore[arg-type]
        if loss is not None and not replay.recomputing():
            losses = _pending.setdefault(router, [])
            losses.append(loss)
            del losses[:-MOST]
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

    def _with(
        self, args: Tuple[Any, ...], kwargs: Dict[str, Any], values: Dict[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """The same call with other values for some parameters."""
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
    """What is dropped in this forward, and in every recomputation of it."""
    if replay.out_of_reach():
        raise RuntimeError(
            "aqr.drop: the torch.autograd.Function around this transformer does not hand its ctx "
            "to forward(), so that a "
            "recomputation could not drop the same; use torch.utils.checkpoint.checkpoint(..., "
            "use_reentrant=False)"
        )
    return replay.once(lambda: drop.draw(batch))  # type: ignore[no-any-return]


def _segments(keys: Keys, wanted: int, layout: Layout, name: str) -> Tuple[int, ...]:
    """Lengths in key order, from the tensors. A call without image has no camera keys: lengths of
    0."""
    cameras = wanted - int(layout.lidar)
    lengths = [] if keys.lidar is None else [keys.lidar.shape[-2] * keys.lidar.shape[-1]]
    if keys.flat is not None:
        count = keys.flat.shape[1]
        if count % cameras:
            raise ValueError(
                f"aqr.cameras: {name} got {count} keys, which are not those of {cameras} cameras "
                "alike; "
                "set aqr.cameras to their number, or to 1"
            )
        return (count // cameras,) * cameras
    if keys.cameras is None:
        return (*lengths, *(0,) * cameras)
    views, height, width = keys.cameras.shape[1], *keys.cameras.shape[-2:]
    if cameras not in (1, views):
        raise ValueError(
            f"aqr.cameras: {name} got {views} views, the router was built for {cameras}; "
            f"set aqr.cameras={views}, or 1 for all as one segment"
        )
    return (*lengths, *(views // cameras * height * width,) * cameras)


def _mean_features(keys: Keys, wanted: int, layout: Layout) -> Tensor:
    """(B, S, C): each segment's mean feature; zeros where there is nothing."""
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


# -- the head --------------------------------------------------------------------------------------


class HeadSeam:
    """forward of a head: its outputs keep their supervision; geometry and supervision of an aborted
    call are forgotten."""

    def __init__(self, cls: type) -> None:
        pass

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
        router = router_of(module)
        if router is None or replay.recomputing():
            return wrapped(*args, **kwargs)
        take_geometry()
        if not router.supervision:
            return wrapped(*args, **kwargs)
        awaited = {
            id(loss) for loss in _of_output.values()
        }  # outputs that nobody holds have no loss to come
        earlier = [loss for loss in _pending.pop(router, ()) if id(loss) in awaited]
        outputs = wrapped(*args, **kwargs)
        own = _pending.get(router, [])
        if len(own) > 1:  # a transformer that is called for each of several levels
            own = [torch.stack(own).mean()]
        _pending[router] = earlier + own
        for tensor in _tensors(outputs):
            _of_output[tensor] = own[0] if own else None
        return outputs


class QueryEmbedSeam:
    """query_embed(ref_points, img_metas) of a CMT head: where the queries are, for the transformer
    called next."""

    def __init__(self, cls: type) -> None:
        pass

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
        router = router_of(module)
        if router is not None and router.needs_places:
            points = args[0] if args else kwargs["ref_points"]
            metas = args[1] if len(args) > 1 else kwargs["img_metas"]
            matrices = shape = None
            if all("lidar2img" in meta for meta in metas):
                matrices = torch.stack(
                    [
                        torch.stack(
                            [torch.as_tensor(m, dtype=torch.float32) for m in meta["lidar2img"]]
                        )
                        for meta in metas
                    ]
                )
                shape = metas[0]["pad_shape"][0][:2]
            aqr.provide_geometry(points, module.pc_range, matrices, shape)
        return wrapped(*args, **kwargs)


class LossSeam:
    """loss(...) of a head -> dict: with aqr.supervision, `loss_aqr` beside the others."""

    def __init__(self, cls: type) -> None:
        pass

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
        losses = wrapped(*args, **kwargs)
        router = router_of(module)
        if (
            router is not None
            and _pending.get(router)
            and isinstance(losses, dict)
            and "loss_aqr" not in losses
        ):
            supervision = _take(_pending[router], (args, kwargs))
            if supervision is not None:
                losses["loss_aqr"] = router.supervision * supervision
        return losses


def _take(pending: List[Tensor], given: Any) -> Optional[Tensor]:
    """The loss of the forward that made a tensor of `given`; where no forward is known to have, the
    oldest. Once each."""
    made = [_of_output[tensor] for tensor in _tensors(given) if tensor in _of_output]
    wanted = made[0] if made else pending[0]
    index = next((i for i, loss in enumerate(pending) if loss is wanted), None)
    return None if index is None else pending.pop(index)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def router_of(head: nn.Module) -> Optional[AdaptiveQueryRouter]:
    """The router of a head's transformer, if it has one; also where the transformer is wrapped
    (CheckpointWrapper, FSDP)."""
    module = head._modules.get("transformer")
    while module is not None:
        router = module._modules.get(KEY)
        if isinstance(router, AdaptiveQueryRouter):
            return router
        children = list(module._modules.values())
        module = children[0] if len(children) == 1 else None
    return None


SEAMS: Dict[str, Callable[[type], Any]] = {
    "transformer": TransformerSeam,
    "transformer constructor": ConstructorSeam,
    "head": HeadSeam,
    "head queries": QueryEmbedSeam,
    "head loss": LossSeam,
}
