"""The user's own AttentionBiasGenerator: patched, its bias is a description with the same values
and gradients."""

from __future__ import annotations

import logging

import pytest
import torch

import flashbias_patch
from flashbias_patch.bias import BiasTensor, ModalityBias, WindowBias
from flashbias_patch.patching.seams import bias_generator_check, window_description
from tests import stand_ins
from tests.support import internals

MODULE = f"{stand_ins.UTILS}.attention_bias_generator"
B, M = 2, 7
OPTIONS = {
    "box": {},
    "even": dict(window_size=4),
    "one cell": dict(window_size=1),
    "larger than a camera": dict(window_size=9),
    "gauss": dict(use_gaussian_window=True, gaussian_sigma=0.8),
    "gauss even": dict(use_gaussian_window=True, window_size=6),
    "global": dict(use_local_bias=False),
    "half": dict(fp16=True),
    "half gauss": dict(fp16=True, use_gaussian_window=True),
    "fixed": dict(learnable_scale=False),
    "scale below": dict(init_scale=0.1),
    "scale above": dict(init_scale=7.0),
    "clamped": dict(max_scale=8.0, init_scale=7.5),
    "clamped gauss": dict(max_scale=8.0, init_scale=7.5, use_gaussian_window=True),
}


@pytest.fixture
def generators():
    """(unpatched class, patched class)"""
    flashbias_patch.uninstall()
    with stand_ins.repository("aqr") as load:
        plain = load(MODULE).AttentionBiasGenerator
    with stand_ins.repository("aqr") as load:
        flashbias_patch.install()
        patched = load(MODULE).AttentionBiasGenerator
        yield plain, patched
        flashbias_patch.uninstall()


def call(batch=B, queries=M, seed=0, dtype=torch.float32, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    weights = [
        (torch.rand(batch, queries, generator=g) * 2 - 1).mul(spread).to(dtype).requires_grad_()
        for _ in range(2)
    ]
    cells = torch.randint(0, 36, (batch, queries), generator=g).float()
    places = torch.stack(
        [torch.randint(0, n, (batch, queries), generator=g) for n in (2, 3, 4)], -1
    )
    places[:, 0] = 0  # no camera sees it
    names = ("lidar_weights", "camera_weights", "pts_bev_indices", "pts_pers_indices")
    return dict(zip(names, (*weights, cells, places)))


FRACTIONS = {
    "truncate": torch.trunc,
    "round": torch.round,
    "ceil": torch.ceil,
    "a floor of twice the place": lambda t: torch.floor(2 * t) / 2,
}


@pytest.mark.parametrize("way", FRACTIONS)
@pytest.mark.parametrize("gauss", (False, True), ids=("box", "gauss"))
def test_a_fork_that_makes_cells_of_fractions_its_own_way(way, gauss):
    """Described with the same rounding, or left dense: never windows at other cells."""
    with stand_ins.repository("aqr") as load:
        plain = load(MODULE).AttentionBiasGenerator(use_gaussian_window=gauss)
    names = "pts_bev_indices", "pts_pers_indices"

    def forked(**given):
        return plain(**{**given, **{name: FRACTIONS[way](given[name]) for name in names}})

    given = call()
    for name in names:
        fractions = torch.rand(given[name].shape, generator=torch.Generator().manual_seed(3))
        given[name] = (given[name] + 0.9 * fractions).to(torch.float32)
    tensors = list(given.values())
    verdict = bias_generator_check.judge(forked, plain, tensors)
    if way == "ceil":
        assert verdict.recipe is None and "values are not those of windows" in verdict.reason
        return
    assert verdict.recipe.whole == ("round" if way == "round" else "truncate")
    ours = window_description.describe(plain, verdict.recipe, *tensors).numbers()
    torch.testing.assert_close(ours, forked(**given))


@pytest.mark.parametrize("how", ["replaced", "changed"])
def test_other_offsets_after_the_first_call(generators, how):
    """As a loaded checkpoint has them."""
    plain, patched = generators
    theirs, ours = plain(), patched()
    for module in (theirs, ours):
        module(**call())
        if how == "replaced":
            module.x_offsets = module.x_offsets + 1
        else:
            module.x_offsets.add_(1)
    compared(ours, theirs, call())


def compared(ours, theirs, given, form=lambda out: out):
    """Outputs, and gradients of weights and scale, of both."""
    found = []
    for module in (ours, theirs):
        out = form(module(**given))
        numbers = out.numbers() if type(out) is BiasTensor else out
        grad = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(5)).to(
            numbers.dtype
        )
        learned = [
            t
            for t in (given["lidar_weights"], given["camera_weights"], module.bias_scale)
            if t.requires_grad
        ]
        found.append((out, numbers, torch.autograd.grad(numbers, learned, grad, allow_unused=True)))
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch, queries", ((B, M), (1, 3), (3, 1)))
def test_every_option(generators, options, batch, queries, caplog):
    caplog.set_level(logging.INFO)
    plain, patched = (cls(**OPTIONS[options]) for cls in generators)
    (out, numbers, grads), (_, exact, true) = compared(patched, plain, call(batch, queries))
    near = (
        dict(rtol=1e-3, atol=1e-3) if exact.dtype is torch.float16 else dict(rtol=1e-5, atol=1e-6)
    )
    torch.testing.assert_close(numbers, exact, **near)
    for mine, other in zip(grads, true):
        torch.testing.assert_close(
            mine, other, rtol=2e-3 if exact.dtype is torch.float16 else 1e-4, atol=1e-4
        )
    if options == "clamped gauss":  # clamped Gaussians have no such form
        assert type(out) is torch.Tensor
    else:
        assert type(out) is BiasTensor and out.dtype == exact.dtype
        assert isinstance(
            internals.description_of(out), ModalityBias if options == "global" else WindowBias
        )
        assert "returns its bias as windows" in caplog.text


def test_gaussians_of_no_query(generators):
    module = generators[1](use_gaussian_window=True)
    module(**call())
    for batch, queries in ((0, M), (B, 0)):
        given = {name: t.new_zeros(batch, queries, *t.shape[2:]) for name, t in call().items()}
        assert module(**given).shape[:2] == (batch, queries)


def test_weights_beyond_one_and_gaussians(generators):
    plain, patched = (cls(use_gaussian_window=True) for cls in generators)
    (out, numbers, _), (_, exact, _) = compared(patched, plain, call(spread=3.0))
    assert type(out) is torch.Tensor and torch.equal(numbers, exact)
    (out, numbers, _), (_, exact, _) = compared(patched, plain, call())
    assert type(out) is BiasTensor


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_weights_in_half(generators, dtype):
    plain, patched = (cls() for cls in generators)
    (out, numbers, _), (_, exact, _) = compared(patched, plain, call(dtype=dtype))
    assert type(out) is BiasTensor and out.dtype == exact.dtype
    torch.testing.assert_close(numbers, exact, rtol=2e-2, atol=2e-2)


def test_positional_arguments_and_no_grad(generators):
    plain, patched = (cls() for cls in generators)
    given = call()
    with torch.no_grad():
        out = patched(*given.values())
        assert type(out) is BiasTensor and not out.requires_grad
        torch.testing.assert_close(out.numbers(), plain(*given.values()))
    assert patched(**given).requires_grad


def test_debug_prints_are_unharmed(generators, capsys):
    said = []
    for cls in generators:
        module = cls()
        for place in range(1003):
            with torch.no_grad():
                module(**call(seed=place % 3))
        said.append(capsys.readouterr().out)
        assert module.calls == 1003
    assert said[0] == said[1] and said[0].count("mean") == 2


def test_the_check_leaves_nothing_behind(generators):
    _, patched = generators
    module = patched(init_scale=3.0)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    parameter, generator = module.bias_scale, torch.get_rng_state()
    module(**call())
    assert (
        module.bias_scale is parameter
        and parameter.grad is None
        and torch.equal(torch.get_rng_state(), generator)
    )
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_modules_of_one_kind_are_checked_once(generators, monkeypatch):
    """nn.DataParallel makes new modules in every step."""
    from flashbias_patch.patching.seams import bias_generator as seam

    checked, judge = [], seam.judge
    monkeypatch.setattr(seam, "judge", lambda *args: checked.append(1) or judge(*args))
    _, patched = generators
    for options in ({}, {}, dict(window_size=4), dict(window_size=4)):
        module = patched(**options)
        replica = module._replicate_for_data_parallel()
        replica.bias_scale = module.bias_scale * 1.0
        replica._parameters = {}
        assert type(module(**call())) is BiasTensor and type(replica(**call())) is BiasTensor
    assert len(checked) == 2


@pytest.mark.parametrize("twist", (
    lambda out, module: out * 1.01,
    lambda out, module: out.roll(1, -1),
    lambda out, module: out.detach(),
    lambda out, module: setattr(module, "last", out) or out,
    lambda out, module: module.y_offsets.add_(0) is None or out[:, :, :-1],
), ids=("values", "places", "gradient", "keeps it", "shape"))  # fmt: skip
def test_forks_that_do_something_else_stay_as_they_are(generators, twist, caplog):
    flashbias_patch.uninstall()
    plain, _ = generators

    class AttentionBiasGenerator(plain):
        def forward(self, lidar_weights, camera_weights, pts_bev_indices, pts_pers_indices):
            return twist(
                plain.forward(
                    self, lidar_weights, camera_weights, pts_bev_indices, pts_pers_indices
                ),
                self,
            )

    from flashbias_patch.patching import install

    flashbias_patch.install()
    assert install.claim(AttentionBiasGenerator)
    out = AttentionBiasGenerator()(**call())
    assert type(out) is torch.Tensor
    assert "keeps its dense bias" in caplog.text


def test_another_class_of_that_name_is_left_alone(generators, caplog):
    class AttentionBiasGenerator(torch.nn.Module):
        def forward(self, lidar_weights, camera_weights, pts_bev_indices, pts_pers_indices):
            return lidar_weights + pts_bev_indices

    from flashbias_patch.patching import install

    assert install.claim(AttentionBiasGenerator)  # its attributes are only seen in a call
    out = AttentionBiasGenerator()(**call())
    assert type(out) is torch.Tensor and out.shape == (B, M)
    assert "it has no bev_h" in caplog.text


def test_compiled_and_traced_code_gets_numbers(generators):
    plain, patched = (cls() for cls in generators)
    given = call()
    exact = plain(**given)
    compiled = torch.compile(lambda **kwargs: patched(**kwargs) * 2, backend="eager")
    out = compiled(**given)
    torch.testing.assert_close(out.numbers() if type(out) is BiasTensor else out, exact * 2)
