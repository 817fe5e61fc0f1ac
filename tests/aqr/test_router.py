"""The router by itself: formula, places, gradients, precision, state."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from flashbias_patch import aqr
from flashbias_patch.aqr.router import Routing

from . import family

B, M, C, S = 2, 5, 16, 2
SEGMENTS = (4, 6)


def made(seed=0, **kwargs):
    torch.manual_seed(seed)
    router = aqr.AdaptiveQueryRouter(C, S, **kwargs)
    return router, torch.randn(B, M, C), torch.randn(B, S, C)


def written_out(router, query, features=None):
    """The docstring's formula in float64, entry by entry of the segments."""

    def norm(x):
        x = x.double()
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, unbiased=False) + 1e-5
        ).sqrt()

    p = {name: value.detach().double() for name, value in router.named_parameters()}
    hidden = nn.functional.gelu(norm(query) @ p["query_proj"].T + p["query_proj_bias"])
    logits = hidden @ p["segment_proj"].T + p["segment_bias"]
    if features is not None:
        content = norm(features) @ p["feature_proj"].T
        logits = logits + torch.einsum("bmd,bsd->bms", hidden, content) / hidden.shape[-1] ** 0.5
    bias = p["bias_scale"] * (logits.softmax(-1) + router.eps).log()
    return torch.repeat_interleave(bias, torch.tensor(SEGMENTS), dim=-1)[:, None]


@pytest.mark.parametrize("with_features", [False, True])
def test_bias_is_the_formula(with_features):
    router, query, features = made(init_bias_scale=0.7)
    features = features if with_features else None
    bias = router(query, SEGMENTS, features=features)
    assert bias.shape == (B, 1, M, 10) and bias.segments() is not None and bias.rank == S
    torch.testing.assert_close(
        bias.dense().double(), written_out(router, query, features), rtol=1e-5, atol=1e-5
    )


def test_per_head_and_per_layer_scales():
    router, query, _ = made(per="head", num_heads=3)
    with torch.no_grad():
        router.bias_scale.copy_(torch.tensor([0.0, 1.0, -2.0]))
    dense = router(query, SEGMENTS).dense()
    assert dense.shape == (B, 3, M, 10)
    assert dense[:, 0].abs().max() == 0.0
    torch.testing.assert_close(dense[:, 2], -2 * dense[:, 1])
    router, query, _ = made(per="layer", num_layers=2)
    with torch.no_grad():
        router.bias_scale.copy_(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(
        router(query, SEGMENTS, layer=1).dense(), 3 * router(query, SEGMENTS, layer=0).dense()
    )
    with pytest.raises(ValueError, match="layer"):
        router(query, SEGMENTS)


@pytest.mark.parametrize(
    "bad",
    [
        dict(per="rank"),
        dict(per="head"),
        dict(eps=0.0),
        dict(locality=dict(bev=-1.0)),
        dict(locality=dict(lidar=1.0)),
        dict(hidden_dims=0),
    ],
)
def test_bad_arguments_are_named_in_the_error(bad):
    with pytest.raises(
        ValueError,
        match=next(iter(bad)) if "per" not in bad or bad["per"] == "rank" else "num_heads",
    ):
        aqr.AdaptiveQueryRouter(C, S, **bad)


def test_building_a_router_follows_the_seed_and_keeps_the_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = aqr.AdaptiveQueryRouter(C, S)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    other = aqr.AdaptiveQueryRouter(C, S)
    assert not torch.equal(first.query_proj, other.query_proj)


def test_dropped_sensor_shows_in_the_logits():
    router, query, features = made()
    dropped = features.clone()
    dropped[:, 1] = 0
    whole, without = router.route(query, features).logits, router.route(query, dropped).logits
    torch.testing.assert_close(whole[..., 0], without[..., 0])
    assert (whole[..., 1] - without[..., 1]).abs().min() > 0


def test_autocast_and_half_parameters_compute_in_float32():
    router, query, features = made()
    expected = router(query, SEGMENTS, features=features).dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(query, SEGMENTS, features=features).dense()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    got = router.half()(query.half(), SEGMENTS, features=features.half()).dense()
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def places(seed=0):
    reference, metas = family.geometry(seed)
    matrices = torch.stack(
        [torch.stack([torch.tensor(m) for m in meta["lidar2img"]]) for meta in metas]
    )
    aqr.provide_geometry(reference, (-10, -10, -2, 10, 10, 2), matrices, (20, 30))
    from flashbias_patch.aqr.geometry import take_geometry

    geometry = take_geometry()
    assert take_geometry() is None
    return reference, matrices, aqr.places(geometry, (3, 4), (3, 2, 3))


def test_locality_is_the_squared_distance_in_metres_and_image_widths():
    reference, matrices, found = places()
    assert (
        found.lengths == (12, 6, 6, 6)
        and 0 < int(found.valid[..., 1:].sum()) < found.valid[..., 1:].numel()
    )
    torch.manual_seed(1)
    router = aqr.AdaptiveQueryRouter(C, 2, locality=dict(bev=0.1, camera=3.0), init_bias_scale=1.5)
    query = torch.randn(B, M, C)
    dense = (
        router(query, (12, 18), places=found).dense()
        - router.bias_scale
        * (
            router.route(query, places=found).weights.repeat_interleave(torch.tensor([12, 18]), -1)[
                :, None
            ]
            + router.eps
        ).log()
    )
    point = reference[1, 2] * torch.tensor([20.0, 20.0, 4.0]) - torch.tensor([10.0, 10.0, 2.0])
    row, column = 2, 1
    key = torch.tensor([-10 + 20 * (column + 0.5) / 4, -10 + 20 * (row + 0.5) / 3])
    expected = -1.5 * 0.1 * (point[:2] - key).pow(2).sum()
    torch.testing.assert_close(dense[1, 0, 2, row * 4 + column], expected, rtol=1e-4, atol=1e-4)
    seen = 0
    for b in range(B):
        for m in range(M):
            for v in range(3):
                point = reference[b, m] * torch.tensor([20.0, 20.0, 4.0]) - torch.tensor(
                    [10.0, 10.0, 2.0]
                )
                u, w, depth, _ = matrices[b, v] @ torch.cat([point, torch.ones(1)])
                visible = depth > 0.1 and 0 <= u / depth < 30 and 0 <= w / depth < 20
                key = torch.tensor([30 * 0.5 / 3, 20 * 1.5 / 2])  # row 1, column 0
                distance = (torch.stack([u / depth, w / depth]) - key).pow(2).sum() / 30**2
                expected = -1.5 * 3.0 * distance if visible else torch.tensor(0.0)
                torch.testing.assert_close(
                    dense[b, 0, m, 12 + 6 * v + 3], expected, rtol=1e-4, atol=1e-4
                )
                seen += bool(visible)
    assert seen > 0


def test_gradients_reach_every_parameter():
    _, _, found = places()
    router, query, features = made(locality=True)
    dense = router(query, (12, 18), features=features, places=found).dense()
    (dense * torch.randn_like(dense)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_locality_stays_positive_and_a_zero_bias_scale_disables_all():
    _, _, found = places()
    router, query, _ = made(locality=True, init_bias_scale=0.0)
    with torch.no_grad():
        router.locality_raw.fill_(-50.0)
    assert (router.locality_scales >= 0).all()
    assert router(query, (12, 18), places=found).dense().abs().max() == 0.0
    with pytest.raises(ValueError, match="provide_geometry"):
        router(query, (12, 18))


def test_checkpoint_without_router_loads_and_warns_by_name(caplog):
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "aqr": aqr.AdaptiveQueryRouter(C, S)})
    state = {"linear.weight": torch.zeros(2, 2), "linear.bias": torch.zeros(2)}
    with caplog.at_level(logging.WARNING, "flashbias_patch"):
        model.load_state_dict(state)
    assert "aqr.bias_scale" in caplog.text
    caplog.clear()
    state = model.state_dict()
    assert "aqr.bias_scale" in state
    del state["aqr.bias_scale"]  # half a router is a mistake
    with pytest.raises(RuntimeError, match="aqr.bias_scale"):
        model.load_state_dict(state)


def test_round_trip_copy_and_pickle():
    router, query, features = made(per="head", num_heads=2, locality=True)
    other = aqr.AdaptiveQueryRouter(
        C, S, per="head", num_heads=2, locality=True, init_bias_scale=9.0
    )
    other.load_state_dict(router.state_dict())
    expected = router.route(query, features).logits
    for same in (other, copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert torch.equal(same.route(query, features).logits, expected)


def test_drop_and_supervision():
    x, x_img = torch.ones(3, 4, 2, 2), torch.ones(6, 4, 2, 2)
    a, b = aqr.drop_modalities(x, x_img, ["lidar", None, "camera"])
    assert a.sum((1, 2, 3)).tolist() == [0, 16, 16] and b.sum((1, 2, 3)).tolist() == [
        16,
        16,
        16,
        16,
        0,
        0,
    ]
    draws = aqr.ModalityDrop(0.5, seed=1).draw(4000)
    assert (
        abs(draws.count(None) / 4000 - 0.5) < 0.03
        and abs(draws.count("lidar") / 4000 - 0.25) < 0.03
    )
    logits = torch.randn(3, M, S, requires_grad=True)
    loss = aqr.supervision_loss(logits, ["lidar", None, "camera"])
    log = logits.log_softmax(-1)
    torch.testing.assert_close(loss, -(log[0, :, 1].mean() + log[2, :, 0].mean()) / 2)
    none = aqr.supervision_loss(logits, [None] * 3)
    none.backward()
    assert none.item() == 0.0 and logits.grad.abs().max() == 0.0


def test_recording():
    router, query, _ = made()
    with aqr.record_routing() as seen:
        router.route(query)
    router.route(query)
    assert (
        len(seen) == 1 and seen[0].weights.shape == (B, M, S) and not seen[0].weights.requires_grad
    )


def test_eps_bounds_the_bias_from_below():
    router = aqr.AdaptiveQueryRouter(8, 2, eps=1e-4)
    logits = torch.tensor([[[200.0, -200.0]]])
    routing = Routing(logits, logits.softmax(-1), None)  # the second weight is 0 in float32
    dense = router.bias(routing, (2, 3)).dense()[0, 0, 0]
    torch.testing.assert_close(dense[2:], torch.full((3,), math.log(1e-4)))
