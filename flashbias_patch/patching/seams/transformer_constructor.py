"""The seam of a transformer's constructor: `aqr=dict(enable=True, ...)` in a config builds a
router."""

from __future__ import annotations

import contextvars
import inspect
from typing import Any, Callable, Optional

import torch

from ... import aqr, telemetry
from ...aqr import options as aqr_options
from ...aqr.options import ONLY, WINDOW
from ...aqr.router import AdaptiveQueryRouter
from ...aqr.window_router import WindowRouter
from .base import Args, Kwargs, Seam
from .transformer_layouts import Layout, layout_of

KEY = "aqr"
BOTH = ("per", "hidden_dims", "init_bias_scale")  # options of every router
# The module that is being constructed by this seam: an inner call of the same one passes through.
_constructing: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "flashbias_constructing", default=None
)


class ConstructorSeam(Seam):
    """__init__(..., aqr=...): the router becomes the module's `aqr`, built last, before any
    optimiser can exist."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.layout = layout_of(cls)
        self.knows_key = KEY in inspect.signature(inspect.unwrap(cls.__init__)).parameters  # type: ignore[misc]

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        if _constructing.get() is module or self.knows_key:
            return wrapped(*args, **kwargs)
        config = kwargs.get(KEY)
        options = aqr_options.from_environment() if config is None else aqr_options.read(config)
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
            "aqr.supervision requires aqr.drop > 0: its targets are the dropped sensors"
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
                "aqr: %s has one segment: a bias that is equal for all keys changes nothing; "
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
