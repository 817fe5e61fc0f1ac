"""The config key, the environment variable, and the bias on its way into every layer."""

from __future__ import annotations

import copy

import pytest
import torch

from flashbias_patch import aqr, settings
from flashbias_patch.patching import context

from . import family

TRANSFORMERS = [cls.__name__ for cls in family.CLASSES if cls.__name__.endswith("Transformer")]


def build(name, cameras=None, with_cp=False, **options):
    torch.manual_seed(0)
    config = dict(enable=True, **options)
    if cameras:
        config["cameras"] = cameras
    return getattr(family, name)(decoder=dict(with_cp=with_cp), aqr=config)


def with_dense_bias(module, given, dense):
    """The repository's own code, the bias given as the mask of every cross attention."""
    decoder, own = module.decoder, module.decoder.forward
    mask = dense.expand(family.B, family.H, -1, -1).flatten(0, 1)

    def forward(query, attn_masks=None, **kwargs):
        return own(query, attn_masks=[attn_masks[0], mask], **kwargs)

    decoder.forward = forward
    router = module._modules.pop("aqr")
    try:
        return module(**given)[0]
    finally:
        decoder.forward = own
        module.aqr = router


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_layer_gets_the_bias(claimed, name, with_cp):
    given, cameras, lengths = family.inputs(name)
    module = build(name, cameras, with_cp, init_bias_scale=2.0)
    with torch.no_grad():  # weights that differ enough to be seen
        module.aqr.segment_proj.mul_(50)
    module.train()
    got = module(**given)[0]
    got.pow(2).sum().backward()
    grads = {n: p.grad.clone() for n, p in module.named_parameters()}
    assert all(torch.isfinite(g).all() for g in grads.values())
    if len(lengths) > 1:
        assert grads["aqr.bias_scale"].abs().max() > 0

    module.zero_grad()
    with aqr.record_routing() as seen:
        module(**given)
    logits = seen[0].logits
    dense = (module.aqr.bias_scale * (logits.softmax(-1) + 1e-6).log()).repeat_interleave(
        torch.tensor(lengths), -1
    )
    for layer in module.decoder.layers:
        layer.use_checkpoint = False
    expected = with_dense_bias(module, given, dense[:, None])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    expected.pow(2).sum().backward()
    torch.testing.assert_close(
        grads["aqr.bias_scale"], module.aqr.bias_scale.grad, rtol=1e-3, atol=1e-4
    )
    if len(lengths) > 1:
        router = module._modules.pop("aqr")
        plain = module(**given)[0]
        module.aqr = router
        assert (plain - got).abs().max() > 1e-3  # the bias matters here


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize(
    "options", [{}, {"aqr": None}, {"aqr": False}, {"aqr": dict(enable=False, per="head")}]
)
def test_unset_means_no_parameter_and_the_same_numbers(claimed, name, options):
    given, _, _ = family.inputs(name)
    torch.manual_seed(0)
    module = getattr(family, name)(**options)
    assert not [n for n, _ in module.named_parameters() if "aqr" in n] and not hasattr(
        module, "aqr"
    )
    got = module(**given)[0]
    claimed_off = type(module).forward.__wrapped__
    assert torch.equal(claimed_off(module, **given)[0], got)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_bias_scale_zero_is_the_model_without_router(claimed, name):
    given, cameras, _ = family.inputs(name)
    torch.manual_seed(0)
    plain = getattr(family, name)()
    after_plain = torch.get_rng_state()
    module = build(name, cameras, init_bias_scale=0.0)
    assert torch.equal(
        torch.get_rng_state(), after_plain
    )  # the rest of the model is drawn as without a router
    torch.testing.assert_close(module(**given)[0], plain(**given)[0], rtol=1e-5, atol=1e-6)


def test_unpatched_the_key_is_upstreams_error():
    with pytest.raises(TypeError, match="aqr"):
        family.CmtTransformer(aqr=dict(enable=True))


def test_positional_calls_and_no_grad(claimed):
    given, cameras, _ = family.inputs("CmtTransformer")
    module = build("CmtTransformer", cameras).eval()
    with torch.no_grad():
        assert torch.equal(module(*given.values())[0], module(**given)[0])


@pytest.mark.parametrize(
    "text, scale", [("1", 1.0), ("init_bias_scale=0.25,per=head", 0.25), ("enable=1", 1.0)]
)
def test_environment_variable(claimed, monkeypatch, text, scale):
    monkeypatch.setenv("FLASHBIAS_AQR", text)
    settings.reload()
    module = family.CmtTransformer()
    assert torch.all(module.aqr.bias_scale == scale)
    assert not hasattr(
        family.CmtTransformer(aqr=dict(enable=False)), "aqr"
    )  # a config that speaks wins


@pytest.mark.parametrize("text", ["0", "off", ""])
def test_environment_variable_off(claimed, monkeypatch, text):
    monkeypatch.setenv("FLASHBIAS_AQR", text)
    settings.reload()
    assert not hasattr(family.CmtTransformer(), "aqr")


@pytest.mark.parametrize("text", ["yess", "enable=1,lokality=1", "enable=2"])
def test_environment_variable_misspelt(claimed, monkeypatch, text):
    monkeypatch.setenv("FLASHBIAS_AQR", text)
    settings.reload()
    with pytest.raises((ValueError, TypeError), match="FLASHBIAS_AQR"):
        family.CmtTransformer()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(scale=1), "unknown option scale"),
        (dict(drop="a"), "aqr.drop"),
        (dict(supervision=1.0), "aqr.drop"),
        (dict(per="query"), "per"),
        (dict(cameras=0), None),
        (dict(lokality=True), "the nearest is locality"),
        (dict(per="haed"), "nearest is 'head'"),
        (dict(cameras="2"), "aqr.cameras"),
        (dict(cameras=True), "aqr.cameras"),
        (dict(cameras=-1), "aqr.cameras"),
        (dict(hidden_dims=0), "aqr.hidden_dims"),
        (dict(enable=2), "aqr.enable"),
        (dict(init_bias_scale=float("nan")), "aqr.init_bias_scale"),
        (dict(drop=float("nan")), "aqr.drop"),
        (dict(drop=0.5, supervision=-1.0), "aqr.supervision"),
        (dict(drop=1.5), "aqr.drop"),
    ],
)
def test_options_are_checked(claimed, options, words):
    if words is None:
        assert family.CmtTransformer(aqr=dict(enable=True, **options)).aqr.num_segments == 1
        return
    with pytest.raises((ValueError, TypeError), match=words):
        family.CmtTransformer(aqr={"enable": True, **options})


def test_wrong_number_of_cameras_says_what_to_set(claimed):
    given, _, _ = family.inputs("PETRTransformer")
    with pytest.raises(ValueError, match="aqr.cameras=3"):
        build("PETRTransformer")(**given)


def test_cameras_one_by_one_and_per_layer(claimed):
    given, _, _ = family.inputs("CmtTransformer")
    module = build("CmtTransformer", cameras=3, per="layer")
    assert module.aqr.num_segments == 4 and module.aqr.bias_scale.shape == (family.L,)
    module(**given)[0].pow(2).sum().backward()
    assert (module.aqr.bias_scale.grad != 0).all()
    with torch.no_grad():  # only the last layer's scale: the first layer's output must not move
        module.aqr.segment_proj.mul_(100)
        before = module(**given)[0]
        module.aqr.bias_scale[1] = 5.0
        after = module(**given)[0]
    assert torch.equal(before[0], after[0]) and (before[1] - after[1]).abs().max() > 1e-4


def test_a_batch_without_images_uses_the_lidar_alone_and_every_parameter(claimed):
    given, _, _ = family.inputs("CmtTransformer")
    module = build("CmtTransformer", 1)
    out = module(**{**given, "x_img": None})[0]
    plain = module._modules.pop("aqr")
    torch.testing.assert_close(out, module(**{**given, "x_img": None})[0], rtol=1e-5, atol=1e-5)
    module.aqr = plain
    out.sum().backward()
    assert all(p.grad is not None for p in module.aqr.parameters())


def test_transformer_init_weights_leaves_the_router_alone(claimed):
    module = build("CmtTransformer", init_bias_scale=0.3, locality=True)
    before = {n: p.clone() for n, p in module.aqr.named_parameters()}
    module.init_weights()
    assert all(torch.equal(before[n], p) for n, p in module.aqr.named_parameters())


def test_subclass_with_a_constructor_and_forward_of_its_own(claimed):
    from flashbias_patch.patching import install

    class MyTransformer(family.CmtTransformer):
        def __init__(self, *, depth=1, decoder=None):
            super().__init__(decoder=decoder)

        def forward(self, x, x_img, query_embed, *args, **kwargs):
            assert len(context.biases_for(self, "cross")) == 1
            out = super().forward(x, x_img, query_embed, *args, **kwargs)
            return out

    assert install.claim(MyTransformer)
    given, _, _ = family.inputs("CmtTransformer")
    module = MyTransformer(depth=2, aqr=dict(enable=True))
    assert isinstance(module.aqr, aqr.AdaptiveQueryRouter)
    module(**given)
    assert not context.biases_for(module, "cross")


def test_a_class_with_an_aqr_of_its_own_keeps_it(installed):
    from flashbias_patch.patching import install

    class CmtTransformer(family.Base):
        def __init__(self, aqr=None):
            super().__init__()
            self.mine = aqr

        forward = family.CmtTransformer.forward

    assert install.claim(CmtTransformer)
    module = CmtTransformer(aqr="theirs")
    assert module.mine == "theirs" and not hasattr(module, "aqr")


def head(**options):
    torch.manual_seed(0)
    return family.CmtHead(family.CmtTransformer(aqr=dict(enable=True, **options)))


def test_head_hands_over_the_geometry(claimed):
    given, _, _ = family.inputs("CmtTransformer")
    reference, metas = family.geometry()
    module = head(locality=True)
    with aqr.record_routing() as seen:
        module(given["x"], given["x_img"], metas, reference).pow(2).sum().backward()
    assert seen[0].places.lengths == (12, 6, 6, 6)
    assert (module.transformer.aqr.locality_raw.grad != 0).all()
    with pytest.raises(
        ValueError, match="provide_geometry"
    ):  # taken once: no stale places in a later call
        module.transformer(**given)


def test_drop_and_supervision_need_no_edit(claimed):
    given, _, _ = family.inputs("CmtTransformer")
    reference, metas = family.geometry()
    module = head(drop=1.0, supervision=0.5).train()
    state = torch.get_rng_state()
    outs = module(given["x"], given["x_img"], metas, reference)
    assert torch.equal(state, torch.get_rng_state())
    copy.deepcopy(module)  # what is pending hangs on no module
    losses = module.loss(outs)
    assert set(losses) == {"loss_cls", "loss_aqr"} and losses["loss_aqr"] > 0
    losses["loss_aqr"].backward()
    assert module.transformer.aqr.segment_bias.grad.abs().max() > 0
    assert set(module.loss(outs)) == {"loss_cls"}  # once a forward
    module.eval()
    assert set(module.loss(module(given["x"], given["x_img"], metas, reference))) == {"loss_cls"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_forwards_before_their_losses_keep_their_supervision(claimed, order):
    given, _, _ = family.inputs("CmtTransformer")
    reference, metas = family.geometry()
    module = head(drop=1.0, supervision=0.5).train()
    with torch.no_grad():
        module.transformer.aqr.segment_proj.mul_(50)
    batches = [
        (given["x"], given["x_img"], metas, reference),
        (given["x"].flip(1), given["x_img"] * 3, metas, reference),
    ]
    expected = [module.loss(module(*batch))["loss_aqr"].item() for batch in batches]
    assert abs(expected[0] - expected[1]) > 1e-4
    module.transformer.aqr.drop = aqr.ModalityDrop(1.0, torch.initial_seed())
    module(*batches[0])  # nobody asks for its loss
    module.transformer.aqr.drop = aqr.ModalityDrop(1.0, torch.initial_seed())
    outs = [module(*batch) for batch in batches]
    module.eval()
    assert set(module.loss(module(*batches[0]))) == {"loss_cls"}
    for i in order:
        assert module.loss(outs[i])["loss_aqr"].item() == pytest.approx(expected[i], rel=1e-6)
        assert set(module.loss(outs[i])) == {"loss_cls"}


def test_losses_of_unknown_outputs_are_taken_in_order(claimed):
    given, _, _ = family.inputs("CmtTransformer")
    module = head(drop=1.0, supervision=0.5).train()
    for _ in range(2):
        module.transformer(**given)
    outs = torch.ones(2)
    assert [set(module.loss(outs)) for _ in range(3)] == [{"loss_cls", "loss_aqr"}] * 2 + [
        {"loss_cls"}
    ]


def test_a_resumed_run_goes_on_with_the_drops(claimed, monkeypatch):
    module = build("CmtTransformer", drop=0.5)
    drop = module.aqr.drop
    drop.draw(7)
    saved = module.state_dict()
    after = drop.draw(20)
    resumed = build("CmtTransformer", drop=0.5)
    resumed.aqr.drop = aqr.ModalityDrop(0.5, seed=2**64 - 1)
    resumed.load_state_dict(saved)
    assert resumed.aqr.drop.draw(20) == after
    other = aqr.ModalityDrop(0.5, torch.initial_seed(), rank=1)
    other.draw(7)
    resumed.aqr.drop = aqr.ModalityDrop(0.5, rank=1)
    resumed.load_state_dict(saved)
    assert resumed.aqr.drop.draw(20) == other.draw(20) != after

    plain = build("CmtTransformer")
    assert set(saved) - set(plain.state_dict()) == {"aqr._extra_state"}
    plain.load_state_dict(saved)  # strict
    resumed.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="expected two integers"):
        resumed.load_state_dict({**saved, "aqr._extra_state": torch.zeros(3)})


@pytest.mark.parametrize("provided, locality", [(False, False), (True, False), (False, True)])
def test_visible_gain_learns_where_the_geometry_is_known(claimed, provided, locality):
    given, _, _ = family.inputs("CmtTransformer")
    reference, metas = family.geometry()
    module = head(locality=locality)
    if provided:
        matrices = torch.stack([torch.as_tensor(m) for m in metas[0]["lidar2img"]]).expand(
            family.B, -1, -1, -1
        )
        aqr.provide_geometry(reference, module.pc_range, matrices, (20, 30))
        module.transformer(**given)[0].pow(2).sum().backward()
    else:
        module(given["x"], given["x_img"], metas, reference).pow(2).sum().backward()
    assert (module.transformer.aqr.visible_gain.grad != 0).any() == (provided or locality)


def test_uninstall_restores_constructor_and_forward():
    from flashbias_patch.patching import install

    own = dict(vars(family.CmtTransformer))
    install.install()
    assert install.claim(family.CmtTransformer)
    assert vars(family.CmtTransformer)["forward"] is not own["forward"]
    install.uninstall()
    assert dict(vars(family.CmtTransformer)) == own and "__init__" not in vars(
        family.CmtTransformer
    )
