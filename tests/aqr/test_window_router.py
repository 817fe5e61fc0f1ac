"""AQR with bias='window': its windows, output and every gradient against dense float64, options,
state."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch

from flashbias_patch import aqr, settings
from flashbias_patch.aqr.geometry import take_geometry
from flashbias_patch.aqr.window_router import window_places
from flashbias_patch.bias import Grid, WindowBias
from flashbias_patch.patching import install
from tests.support.scripts import load

from . import family

B, M, V = family.B, family.M, family.V
BEV, VIEW, SIZE = (3, 4), (2, 3), (20, 30)
WIDE = 8.0  # a focal length with which cameras overlap
LOW, EXTENT = torch.tensor([-10.0, -10.0, -2.0]), torch.tensor([20.0, 20.0, 4.0])
OPTIONS = {
    "first camera": dict(window=3),
    "all cameras, per layer": dict(window=2, lidar_window=3, camera_windows="all", per="layer"),
    "Gaussian, per head": dict(window=3, lidar_window=2, gaussian=1.5, per="head"),
    "all cameras, Gaussian": dict(window=3, gaussian=0.7, camera_windows="all"),
}


def head_of(with_cp=False, **options):
    torch.manual_seed(0)
    transformer = family.CmtTransformer(
        decoder=dict(with_cp=with_cp), aqr=dict(enable=True, bias="window", **options)
    )
    with torch.no_grad():  # weights that differ enough to be seen
        transformer.aqr.segment_proj.mul_(50)
        transformer.aqr.bias_scale.add_(
            torch.linspace(-0.5, 0.5, transformer.aqr.bias_scale.numel()).view_as(
                transformer.aqr.bias_scale
            )
        )
        transformer.aqr.visible_gain.fill_(0.3)
    return family.CmtHead(transformer).double().train()


def inputs(seed=0):
    given, _, _ = family.inputs("CmtTransformer", seed)
    reference, metas = family.geometry(seed, WIDE)
    return (
        given["x"].double().requires_grad_(),
        given["x_img"].double().requires_grad_(),
        metas,
        reference.double(),
    )


def profiles(reference, metas, window, lidar_window=None, gaussian=None, camera_windows="first"):
    """(B, M, N, 2): what a weight of 1 for the lidar, and for the cameras, adds to each key. Cell
    by cell."""
    found = torch.zeros(B, M, BEV[0] * BEV[1] + V * VIEW[0] * VIEW[1], 2, dtype=torch.float64)

    def paint(entries, side, grid, row, column):
        for r in range(grid[0]):
            for c in range(grid[1]):
                dy, dx = r - row, c - column
                if -((side - 1) // 2) <= dy <= side // 2 and -((side - 1) // 2) <= dx <= side // 2:
                    entries[r * grid[1] + c] = (
                        1.0
                        if gaussian is None
                        else math.exp(-(dy * dy + dx * dx) / (2 * gaussian**2))
                    )

    for b in range(B):
        for m in range(M):
            x, y, _ = reference[b, m].tolist()
            lidar = found[b, m, :, 0]
            paint(
                lidar,
                lidar_window or window,
                BEV,
                min(int(y * BEV[0]), BEV[0] - 1),
                min(int(x * BEV[1]), BEV[1] - 1),
            )
            point = torch.cat([reference[b, m].float() * EXTENT + LOW, torch.ones(1)])
            for view in range(V):
                u, v, depth, _ = (torch.tensor(metas[b]["lidar2img"][view]) @ point).tolist()
                if depth <= 0.1 or not (0 <= u / depth < SIZE[1] and 0 <= v / depth < SIZE[0]):
                    continue
                first = BEV[0] * BEV[1] + view * VIEW[0] * VIEW[1]
                paint(
                    found[b, m, first:, 1],
                    window,
                    VIEW,
                    int(v / depth / SIZE[0] * VIEW[0]),
                    int(u / depth / SIZE[1] * VIEW[1]),
                )
                if camera_windows == "first":
                    break
    return found


def dense_biases(router, logits, options, reference, metas):
    """(B, H|1, M, N) for each layer, differentiable in the logits and the scale."""
    painted = profiles(
        reference, metas, **{name: value for name, value in options.items() if name != "per"}
    )
    bias = (painted * logits.double().tanh()[:, :, None]).sum(-1)[:, None]
    scale = router.bias_scale.double().clamp(0.5, 5.0)
    if router.per == "layer":
        return [bias * one for one in scale]
    return [bias * (scale[:, None, None] if router.per == "head" else scale)] * family.L


def dense_run(head, options, x, x_img, metas, reference):
    """The repository's own code, unpatched, with the bias as the mask of every cross attention."""
    transformer = head.transformer
    router, decoder = transformer.aqr, transformer.decoder
    query = head.query_embed(reference, metas)[0]
    means = torch.stack([x.mean((-2, -1)), x_img.unflatten(0, (B, V)).mean((1, 3, 4))], 1)
    matrices = torch.stack(
        [torch.stack([torch.tensor(m) for m in meta["lidar2img"]]) for meta in metas]
    )
    aqr.provide_geometry(reference, head.pc_range, matrices, SIZE)
    routing = router.route(
        query.detach(), means.detach(), aqr.places(take_geometry(), BEV, (V, *VIEW))
    )
    masks = dense_biases(router, routing.logits, options, reference, metas)

    def forward(query, attn_masks=None, **kwargs):
        outs = []
        for layer, mask in zip(decoder.layers, masks):
            mask = mask.expand(B, family.H, -1, -1).flatten(0, 1)
            query = layer._forward(
                query,
                kwargs["key"],
                kwargs["value"],
                kwargs["query_pos"],
                kwargs["key_pos"],
                [None, mask],
            )
            outs.append(query)
        return torch.stack(outs)

    decoder.forward = forward
    return head(x, x_img, metas, reference)


def gradients(head, out, *tensors):
    out.backward(
        torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    )
    return {
        **{n: p.grad for n, p in head.named_parameters()},
        **{str(i): t.grad for i, t in enumerate(tensors)},
    }


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_every_gradient_are_those_of_the_dense_bias(claimed, options, with_cp):
    options = OPTIONS[options]
    given = inputs()
    head = head_of(with_cp, **options)
    out = head(*given)
    found = gradients(head, out, *given[:2])
    install.uninstall()
    exact, given = copy.deepcopy(head), inputs()
    exact.zero_grad()
    expected = dense_run(exact, options, *given)
    true = gradients(exact, expected, *given[:2])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert found.keys() == true.keys()
    for name, grad in true.items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert (true["transformer.aqr.bias_scale"] != 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_dense_stand_in_of_the_benchmark_has_the_same_bias(claimed, options):
    options = {name: value for name, value in OPTIONS[options].items() if name != "per"}
    benchmark = load("benchmarks/aqr.py")
    given = inputs()
    head = head_of(**options)
    out = head(*given)
    found = gradients(head, out, *given[:2])
    install.uninstall()
    exact, given = copy.deepcopy(head), inputs()
    exact.zero_grad()
    benchmark.give_dense_windows(exact)
    expected = exact(*given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for name, grad in gradients(exact, expected, *given[:2]).items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_windows_are_passed_on_as_windows(claimed, monkeypatch):
    from flashbias_patch.patching import context

    passed = []
    own = context.attention_bias
    monkeypatch.setattr(
        context,
        "attention_bias",
        lambda bias, *rest: passed.append((bias, *rest)) or own(bias, *rest),
    )
    head_of(window=3, camera_windows="all", per="layer")(*inputs())
    assert [(type(bias), kind, layers) for bias, kind, layers in passed] == [
        (WindowBias, "cross", (layer,)) for layer in range(family.L)
    ]
    (first, *_), (second, *_) = passed
    assert (
        first.centres.data_ptr() == second.centres.data_ptr()
    )  # layers share the tables made of it
    assert first.frames == (Grid(*BEV), *[Grid(*VIEW)] * V)


@pytest.mark.parametrize("with_cp", [False, True])
def test_training_moves_the_scale_as_with_the_dense_bias(claimed, with_cp):
    losses, scales = [], []
    patched_head = head_of(with_cp, window=3)
    for patched, head in ((True, patched_head), (False, copy.deepcopy(patched_head))):
        if not patched:
            install.uninstall()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
        ran = []
        for step in range(4):
            given = inputs(step)
            optimizer.zero_grad()
            out = head(*given) if patched else dense_run(head, dict(window=3), *given)
            loss = (out - 1).pow(2).sum()
            loss.backward()
            optimizer.step()
            ran.append(loss.item())
            head.transformer.decoder.__dict__.pop("forward", None)
        losses.append(ran)
        scales.append(head.transformer.aqr.bias_scale.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and scales[0] == pytest.approx(
        scales[1], rel=1e-5
    )
    assert abs(scales[0] - 2.5) > 1e-3


@pytest.mark.parametrize(
    "value, used, learns",
    [
        (0.1, 0.5, False),
        (0.5, 0.5, True),
        (1.0, 1.0, True),
        (5.0, 5.0, True),
        (9.0, 5.0, False),
        (-3.0, 0.5, False),
    ],
)
def test_the_scale_is_clamped_in_use(claimed, value, used, learns):
    head = head_of(window=3)
    router = head.transformer.aqr
    with torch.no_grad():
        router.bias_scale.fill_(used)
        expected = head(*inputs())
        router.bias_scale.fill_(value)
    out = head(*inputs())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.pow(2).sum().backward()
    assert (router.bias_scale.grad != 0) == learns


def test_autocast_and_half_parameters_compute_in_float32(claimed):
    head = head_of(window=3, camera_windows="all").float()
    given = [value.detach().float() if torch.is_tensor(value) else value for value in inputs()]

    def weights():
        with aqr.record_routing() as seen:
            out = head(*given)
        return seen[0].weights, out

    expected, exact = weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, out = weights()
    assert got.dtype == torch.float32 and (got - expected).abs().max() < 0.05
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
    head.transformer.aqr.half()
    got, out = weights()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out, exact, rtol=1e-2, atol=1e-2)
    out.pow(2).sum().backward()
    assert head.transformer.aqr.bias_scale.grad.dtype == torch.float16


# -- where the windows are -------------------------------------------------------------------------


def places_of(points, views=None):
    """(M, 3) metres; cameras: matrices or None."""
    reference = (torch.as_tensor(points, dtype=torch.float32) - LOW) / EXTENT
    _, metas = family.geometry(0, WIDE)
    matrices = torch.stack([torch.tensor(m) for m in metas[0]["lidar2img"]])[None]
    aqr.provide_geometry(reference, (-10, -10, -2, 10, 10, 2), matrices, SIZE)
    return aqr.places(take_geometry(), BEV, views)


def test_first_camera_all_cameras_and_none():
    # cameras look along x, -x and y, sixty degrees to each side
    points = [
        [5.0, 0.1, 0.0],
        [-5.0, 0.1, 0.0],
        [5.0, 5.0, 0.0],
        [0.1, -5.0, 0.0],
        [-5.0, 5.0, 0.0],
    ]
    seen = [[0], [1], [0, 2], [], [1, 2]]
    found = places_of(points, (V, *VIEW))
    centres, visible, frames = window_places(found, "first")
    assert frames == (Grid(*BEV), Grid(*VIEW, V)) and centres.shape == (1, 5, 2, 3)
    assert visible[0, :, 0].all() and visible[0, :, 1].tolist() == [
        bool(cameras) for cameras in seen
    ]
    assert [int(centres[0, m, 1, 0]) for m, cameras in enumerate(seen) if cameras] == [
        c[0] for c in seen if c
    ]
    every, all_visible, frames = window_places(found, "all")
    assert frames == (Grid(*BEV), *[Grid(*VIEW)] * V)
    assert [all_visible[0, m, 1:].nonzero().flatten().tolist() for m in range(5)] == seen
    assert torch.equal(every[..., 0], torch.zeros_like(every[..., 0]))
    for m, cameras in enumerate(seen):
        if cameras:
            assert torch.equal(every[0, m, 1 + cameras[0], 1:], centres[0, m, 1, 1:])


def test_points_on_the_edge_beyond_it_and_not_a_number():
    points = [[-10.0, -10.0, 0.0], [10.0, 10.0, 0.0], [30.0, -30.0, 0.0], [math.nan, 0.0, 0.0]]
    found = places_of(points)
    centres, visible, frames = window_places(found, "first")
    assert frames == (Grid(*BEV),) and visible.all()
    assert centres[0, :3, 0].tolist() == [[0, 0, 0], [0, 2, 3], [0, 0, 3]]
    bias = WindowBias(torch.ones(1, 4, 1), centres, frames, 1).dense()
    assert bias.sum((0, 1, 3)).tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "name", ["CmtLidarTransformer", "CmtImageTransformer", "PETRTransformer", "PETRDNTransformer"]
)
def test_every_class_with_grids_of_keys(claimed, name):
    given, _, lengths = family.inputs(name)
    torch.manual_seed(0)
    module = getattr(family, name)(aqr=dict(enable=True, bias="window", window=2))
    reference, metas = family.geometry(0, WIDE)
    matrices = torch.stack(
        [torch.stack([torch.tensor(m) for m in meta["lidar2img"]]) for meta in metas]
    )
    with pytest.raises(ValueError, match="window: the router needs .*provide_geometry"):
        module(**given)
    aqr.provide_geometry(reference, (-10, -10, -2, 10, 10, 2), matrices, SIZE)
    with aqr.record_routing() as seen:
        out = module(**given)[0]
    assert seen[0].weights.shape[-1] == 1 and seen[0].places.lengths == lengths
    assert module.aqr.windows(seen[0]).shape[-1] == sum(lengths)
    out.pow(2).sum().backward()
    assert module.aqr.bias_scale.grad != 0


def test_a_batch_without_images_has_windows_on_the_lidar_alone(claimed):
    head = head_of(window=3)
    x, _, metas, reference = inputs()
    with aqr.record_routing() as seen:
        out = head(x, None, metas, reference)
    assert head.transformer.aqr.windows(seen[0]).frames == (Grid(*BEV),)
    out.pow(2).sum().backward()
    assert all(p.grad is not None for p in head.transformer.aqr.parameters())


# -- options and state -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(bias="windows"), "aqr.bias: expected one of modality, window.*nearest is 'window'"),
        (dict(bias=True), "aqr.bias"),
        (dict(bias="window", window=0), "aqr.window"),
        (dict(bias="window", window=True), "aqr.window"),
        (dict(bias="window", window=7.0), "aqr.window"),
        (dict(bias="window", window=None), "aqr.window"),
        (dict(bias="window", lidar_window=0), "aqr.lidar_window"),
        (dict(bias="window", lidar_window="9"), "aqr.lidar_window"),
        (dict(bias="window", gaussian=True), "aqr.gaussian"),
        (dict(bias="window", gaussian=0.0), "aqr.gaussian"),
        (dict(bias="window", gaussian=math.inf), "aqr.gaussian"),
        (dict(bias="window", gaussian="wide"), "aqr.gaussian"),
        (dict(bias="window", camera_windows="both"), "camera_windows"),
        (dict(bias="window", init_bias_scale=0.1), "aqr.init_bias_scale: .*0.5 to 5.0"),
        (dict(bias="window", init_bias_scale=6), "aqr.init_bias_scale"),
        (dict(bias="window", min_scale=3.0), "min_scale"),
        (dict(bias="window", min_scale=-1.0), "aqr.min_scale"),
        (dict(bias="window", max_scale="5"), "aqr.max_scale"),
        (dict(bias="window", max_scale=math.inf), "aqr.max_scale"),
        (dict(bias="window", window_size=3), "nearest is window"),
        (dict(bias="window", cameras=1), "aqr.cameras: an option of bias='modality'"),
        (dict(bias="window", locality=True), "aqr.locality: an option of bias='modality'"),
        (dict(bias="window", eps=1e-3), "aqr.eps"),
        (dict(window=7), "aqr.window: an option of bias='window'"),
        (dict(camera_windows="all"), "aqr.camera_windows"),
        (dict(gaussian=3.0), "aqr.gaussian"),
        (dict(min_scale=0.1), "aqr.min_scale"),
        (dict(bias="window", supervision=1.0), "aqr.drop"),
    ],
)
def test_options_are_strict(claimed, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        family.CmtTransformer(aqr={"enable": True, **options})


def test_defaults_and_the_environment_variable(claimed, monkeypatch):
    module = family.CmtTransformer(aqr=dict(enable=True, bias="window"))
    assert isinstance(module.aqr, aqr.WindowRouter) and module.aqr.bias_scale == 2.5
    assert (module.aqr.window, module.aqr.lidar_window, module.aqr.gaussian) == (15, 15, None)
    assert type(family.CmtTransformer(aqr=dict(enable=True)).aqr) is aqr.AdaptiveQueryRouter
    assert (
        family.CmtTransformer(aqr=dict(enable=True, bias="window", gaussian=False)).aqr.gaussian
        is None
    )
    monkeypatch.setenv(
        "FLASHBIAS_AQR", "bias=window,window=8,gaussian=2.5,camera_windows=all,per=layer"
    )
    settings.reload()
    router = family.CmtTransformer().aqr
    assert (router.window, router.gaussian, router.camera_windows) == (8, 2.5, "all")
    assert router.bias_scale.tolist() == [2.5] * family.L


def test_a_class_whose_keys_are_no_grid_is_an_error(claimed):
    with pytest.raises(ValueError, match="aqr.bias: 'window' needs rows and columns"):
        family.PETRTemporalTransformer(aqr=dict(enable=True, bias="window"))


def test_state_dict_has_the_names_of_the_other_router_and_loads_without(claimed, caplog):
    window, modality = (
        family.CmtTransformer(aqr=dict(enable=True, bias=bias)) for bias in ("window", "modality")
    )
    assert window.state_dict().keys() == modality.state_dict().keys()
    plain = family.CmtTransformer()
    with caplog.at_level(logging.WARNING, "flashbias_patch"):
        window.load_state_dict(plain.state_dict())  # strict
    assert "aqr.bias_scale" in caplog.text and window.aqr.bias_scale == 2.5
    half = window.state_dict()
    del half["aqr.bias_scale"]
    with pytest.raises(RuntimeError, match="aqr.bias_scale"):
        window.load_state_dict(half)
    before = {n: p.clone() for n, p in window.aqr.named_parameters()}
    window.init_weights()
    for other in (copy.deepcopy(window), pickle.loads(pickle.dumps(window.aqr))):
        router = getattr(other, "aqr", other)
        assert router.max_scale == 5.0 and all(
            torch.equal(before[n], p) for n, p in router.named_parameters()
        )


def test_the_rest_of_the_model_is_drawn_as_without(claimed):
    states = []
    for options in ({}, dict(aqr=dict(enable=True, bias="window"))):
        torch.manual_seed(0)
        states.append((family.CmtTransformer(**options).state_dict(), torch.get_rng_state()))
    assert all(torch.equal(states[1][0][name], value) for name, value in states[0][0].items())
    assert torch.equal(states[0][1], states[1][1])


def test_drop_and_supervision(claimed):
    head = head_of(window=3, drop=1.0, supervision=0.5)
    losses = head.loss(head(*inputs()))
    assert set(losses) == {"loss_cls", "loss_aqr"} and losses["loss_aqr"] > 0
    losses["loss_aqr"].backward()
    assert head.transformer.aqr.segment_bias.grad.abs().max() > 0
