"""Define the router: it weights the modalities for each object query by a bias on attention
scores."""

from __future__ import annotations

import contextlib
import contextvars
import math
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import telemetry
from .._torch_internals import current_graph_task
from ..bias import AttentionBias, LowRankBias, ModalityBias, SquaredDistanceBias
from ..bias.factors import full_precision
from .geometry import Places
from .options import PER
from .supervision import ModalityDrop

EXTRA = "_extra_state"  # torch's key suffix for state that is not a tensor of the module


class Locality(NamedTuple):
    """Initial scales of the locality term: `bev` in 1/m^2, `camera` in 1/(image width)^2; 1 / (2
    sigma^2)."""

    bev: float = 0.005  # sigma 10 m
    camera: float = 8.0  # sigma a quarter of the image's width


class Routing(NamedTuple):
    """The result of a router: logits and weights (B|1, M, S), and the places it received."""

    logits: Tensor
    weights: Tensor
    places: Optional[Places]


_recorder: contextvars.ContextVar[Optional[List[Routing]]] = contextvars.ContextVar(
    "flashbias_routing", default=None
)


@contextlib.contextmanager
def record_routing() -> Iterator[List[Routing]]:
    """Record the detached logits and weights of every router: `with record_routing() as
    routings:`."""
    routings: List[Routing] = []
    token = _recorder.set(routings)
    try:
        yield routings
    finally:
        _recorder.reset(token)


class AdaptiveQueryRouter(nn.Module):
    """Score each query over S key segments (lidar BEV, cameras); the scores become an attention
    bias.

        w = softmax(logits)                                    (B, M, S)
        bias[b, h, m, n] = bias_scale * (log(w[b, m, s(n)] + eps) - locality[b, m, n])

    The scoring follows the idea of MoME's Adaptive Query Router (CVPR 2025, arXiv 2503.19776),
    which sends each query to one of {camera, lidar, fused} experts; here the choice is soft:
    softmax(scores + log w) gives a segment w times the attention it would have had. With the
    learned, non-negative scales of `locality`, the squared distance between key and query in the
    BEV plane and in each camera is subtracted; a query outside a camera's view gets no such term
    there. With bias_scale = 0 the model is the one without a router.

    logits: a hidden layer on the query, then a linear layer over the segments; plus, with
    `features`, the product of that hidden layer with a projection of each segment's mean feature
    (which detects a zeroed sensor); plus, with `places`, a learned gain if the query is in view of
    the segment. Without places `visible_gain` gets a gradient of 0. A CMT head provides places only
    for `locality` or windows, see geometry.provide_geometry.

    Args:
        embed_dims: C, width of the queries.
        num_segments: S.
        num_heads, num_layers: needed by per="head" and per="layer".
        per: bias_scale is one number ("scalar"), one per head (H,), or one per layer (L,).
        hidden_dims: width of the hidden layer; default embed_dims // 2.
        init_bias_scale: its initial value.
        locality: None, True, or initial scales as a Locality or a dict(bev=..., camera=...).
        eps: added to w before the logarithm; bounds the bias from below by bias_scale * log(eps).

    It computes in float32, independently of autocast and the dtype of the parameters. Its
    parameters are drawn without using the global random state, and none is called `weight`, so
    generic initialisers do not change them.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    # Set from a transformer's config, and read by the seam that built the router.
    drop: Optional[ModalityDrop] = None
    supervision: float = 0.0

    def __init__(
        self,
        embed_dims: int,
        num_segments: int,
        *,
        num_heads: Optional[int] = None,
        num_layers: Optional[int] = None,
        per: str = "scalar",
        hidden_dims: Optional[int] = None,
        init_bias_scale: float = 1.0,
        locality: Union[None, bool, Locality, Dict[str, float]] = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes: Dict[str, Any] = {
            "embed_dims": embed_dims,
            "num_segments": num_segments,
            "hidden_dims": max(embed_dims // 2, 1) if hidden_dims is None else hidden_dims,
        }
        if per == "head":
            sizes["num_heads"] = num_heads
        if per == "layer":
            sizes["num_layers"] = num_layers
        _check_sizes(sizes, per)
        if isinstance(eps, bool) or not isinstance(eps, float) or not 0.0 < eps < 1.0:
            raise ValueError(f"eps: expected a float in (0, 1), got {eps!r}")
        self.embed_dims, self.num_segments, self.per, self.eps = embed_dims, num_segments, per, eps
        scale_shape: Any = {"scalar": (), "head": (num_heads,), "layer": (num_layers,)}[per]
        self.bias_scale = nn.Parameter(torch.full(scale_shape, float(init_bias_scale)))
        generator = torch.Generator().manual_seed(torch.initial_seed() & 0x7FFF_FFFF)

        def drawn(rows: int, columns: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns).normal_(std=std, generator=generator))

        hidden = sizes["hidden_dims"]
        self.query_proj = drawn(hidden, embed_dims, embed_dims**-0.5)
        self.query_proj_bias = nn.Parameter(torch.zeros(hidden))
        self.feature_proj = drawn(hidden, embed_dims, 0.02)
        self.segment_proj = drawn(num_segments, hidden, 0.02)
        self.segment_bias = nn.Parameter(torch.zeros(num_segments))
        self.visible_gain = nn.Parameter(torch.zeros(num_segments))
        scales = _locality(locality)
        if scales is None:
            self.register_parameter("locality_raw", None)
        else:  # the scale is softplus of it
            self.locality_raw = nn.Parameter(
                torch.tensor([math.log(math.expm1(value)) for value in scales])
            )

        # Not get_extra_state: without `drop` there must be no such key.
        register: Any = self._register_state_dict_hook  # torch has no annotations for it
        register(_save_drop)

    @property
    def locality_scales(self) -> Optional[Tensor]:
        """Scales (2,), non-negative: BEV in 1/m^2, camera in 1/(image width)^2; None without
        locality."""
        return None if self.locality_raw is None else F.softplus(self.locality_raw.float())

    def route(
        self, query: Tensor, features: Optional[Tensor] = None, places: Optional[Places] = None
    ) -> Routing:
        """Return logits and weights (B, M, S).

        query (B|1, M, C); features (B, S, C): the mean feature of each segment.

        Raises:
            ValueError: a shape does not fit.
        """
        if query.dim() != 3 or query.shape[-1] != self.embed_dims:
            raise ValueError(
                f"query: expected (B, M, C) with C = {self.embed_dims}, got {tuple(query.shape)}"
            )
        if features is not None and features.shape[1:] != (self.num_segments, self.embed_dims):
            raise ValueError(
                f"features: expected (B, S, C) with S, C = {self.num_segments}, {self.embed_dims}, "
                f"got {tuple(features.shape)}"
            )
        with full_precision(query.device):
            hidden = F.gelu(_linear(_normed(query), self.query_proj, self.query_proj_bias))
            logits = _linear(hidden, self.segment_proj, self.segment_bias)
            if features is not None:
                content = _linear(_normed(features), self.feature_proj)
                logits = logits + hidden @ content.transpose(1, 2) * hidden.shape[-1] ** -0.5
            if places is not None:
                logits = (
                    logits + places.visible(self.num_segments).float() * self.visible_gain.float()
                )
            routing = Routing(logits, self._weights(logits), places)
        recorder = _recorder.get()
        if recorder is not None and current_graph_task() == -1:  # not in a recomputation
            recorder.append(Routing(logits.detach(), routing.weights.detach(), places))
        return routing

    def _weights(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    @property
    def needs_places(self) -> bool:
        """True if `bias` needs the positions of the queries."""
        return self.locality_raw is not None

    def biases(
        self, routing: Routing, segments: Sequence[int]
    ) -> List[Tuple[AttentionBias, Optional[Tuple[int, ...]]]]:
        """Return the biases, each with the indices of its layers (None: all)."""
        if self.per != "layer":
            return [(self.bias(routing, segments), None)]
        return [
            (self.bias(routing, segments, layer), (layer,)) for layer in range(len(self.bias_scale))
        ]

    def _scale(self, layer: Optional[int]) -> Tensor:
        """Return bias_scale of all layers or of one, float32: (1,) or (H,)."""
        if (layer is None) == (self.per == "layer"):
            raise ValueError(
                f"layer: expected an index with per='layer' and None otherwise, got {layer!r} "
                f"with per={self.per!r}"
            )
        scale = (self.bias_scale if layer is None else self.bias_scale[layer]).float()
        return scale if self.per == "head" else scale.reshape(1)

    def bias(
        self, routing: Routing, segments: Sequence[int], layer: Optional[int] = None
    ) -> AttentionBias:
        """Return the bias (B|1, H|1, M, N) over keys in S segments of these lengths.

        layer: selects the scale for per="layer". The bias is exact, of rank S; with locality 4 more
        per frame (BEV, each camera).

        Raises:
            ValueError: segments, layer or the places of the routing do not fit.
        """
        scale = self._scale(layer)
        if len(segments) != self.num_segments:
            raise ValueError(
                f"segments: expected {self.num_segments} lengths, got {tuple(segments)}"
            )
        log_weights = (routing.weights + self.eps).log()
        modality = ModalityBias(log_weights.unsqueeze(2) * scale[:, None], segments)
        if self.locality_raw is None:
            return modality
        if routing.places is None:
            raise ValueError(
                "locality: the router needs the queries' reference points; call "
                "flashbias_patch.aqr.provide_geometry(...) before the transformer, or set "
                "locality=False"
            )
        return modality + self._locality(routing.places, scale)

    def forward(
        self,
        query: Tensor,
        segments: Sequence[int],
        *,
        features: Optional[Tensor] = None,
        places: Optional[Places] = None,
        layer: Optional[int] = None,
    ) -> AttentionBias:
        """Return `bias(route(query, features, places), segments, layer)`."""
        return self.bias(self.route(query, features, places), segments, layer)

    def _locality(self, places: Places, scale: Tensor) -> AttentionBias:
        """Return -bias_scale * s * |x - y|^2: exact factors of the distance, scaled on the query
        side."""
        unit = SquaredDistanceBias(
            places.query_xy, places.key_xy, 1.0, places.lengths, places.valid
        )
        q_factor, k_factor = unit.factors()
        scales = self.locality_scales
        assert scales is not None
        a_frame = scales[places.kinds(scales.device)].repeat_interleave(
            unit.rank // len(places.lengths)
        )
        return LowRankBias(q_factor * (scale[:, None] * a_frame), k_factor)

    def zero(self) -> Tensor:
        """Return 0 with a gradient path to every parameter, so that DDP finds no unused
        parameter."""
        return (
            torch.cat([parameter.float().reshape(-1) for parameter in self.parameters()]) * 0.0
        ).sum()

    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        own_keys = [prefix + name for name, _ in self.named_parameters()]
        if not any(name in state_dict for name in own_keys):  # a checkpoint from before the router
            telemetry.once(
                ("aqr checkpoint", prefix),
                "warning",
                "the checkpoint has no router: %s keep their initial values",
                ", ".join(own_keys),
            )
            return
        load: Any = super()._load_from_state_dict  # some versions have no annotations for it
        load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if prefix + EXTRA in unexpected_keys:
            unexpected_keys.remove(prefix + EXTRA)
        if self.drop is not None and prefix + EXTRA in state_dict:
            try:
                self.drop.restore(state_dict[prefix + EXTRA])
            except ValueError as error:
                error_msgs.append(f"{prefix}{EXTRA}: {error}")

    def extra_repr(self) -> str:
        """Return the options that differ between routers, for `print(model)`."""
        locality = "" if self.locality_raw is None else ", locality"
        return f"{self.embed_dims}, segments={self.num_segments}, per={self.per!r}{locality}"


def _save_drop(
    router: AdaptiveQueryRouter, state_dict: Dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Save the random state of `drop` (a state dict hook, which mmcv 1.x calls too)."""
    if router.drop is not None:
        state_dict[prefix + EXTRA] = router.drop.state()


def _linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:])


def _check_sizes(sizes: Dict[str, Any], per: str) -> None:
    if per not in PER:
        raise ValueError(f"per: expected one of {', '.join(PER)}, got {per!r}")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size!r}")


def _locality(
    value: Union[None, bool, Tuple[float, float], Dict[str, float]],
) -> Optional[Locality]:
    if value is None or value is False:
        return None
    if value is True:
        return Locality()
    try:
        scales = Locality(**value) if isinstance(value, dict) else Locality(*value)
        if all(float(scale) > 0.0 for scale in scales):
            return Locality(*map(float, scales))
    except TypeError:
        pass
    raise ValueError(
        "locality: expected True, False or dict(bev=..., camera=...) of positive numbers, got "
        f"{value!r}"
    )
