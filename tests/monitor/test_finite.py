"""FiniteWatch names the first value that is not finite."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import flashbias_patch
from flashbias_patch.monitor import FiniteWatch


class Model(nn.Module):
    def __init__(self, fault=lambda x: x):
        super().__init__()
        self.first, self.middle, self.last, self.fault = (
            nn.Linear(4, 4),
            Fault(),
            nn.Linear(4, 1),
            fault,
        )
        self.middle.function = fault

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Fault(nn.Module):
    def forward(self, x):
        return self.function(x)


def step(model, x=None):
    model(torch.ones(3, 4) if x is None else x).sum().backward()


def test_a_finite_training_is_silent(caplog):
    model = Model()
    watch = FiniteWatch(model)
    with caplog.at_level(logging.WARNING, "flashbias_patch"):
        for _ in range(3):
            step(model)
            assert watch.update() is None
    assert watch.first is None and not caplog.records


def test_an_output_is_named_once_with_its_step(caplog):
    model = Model()
    watch = FiniteWatch(model)
    with caplog.at_level(logging.WARNING, "flashbias_patch"):
        step(model)
        watch.update(10)
        model.middle.function = lambda x: (x - x).log() * 0.0  # 0 * -inf
        for number in (11, 12):
            step(model)
            watch.update(number)
    found = watch.first
    assert (found.what, found.module, found.kind, found.step, found.entries) == (
        "output",
        "middle",
        "Fault",
        11,
        (12, 0, 12),
    )
    assert (
        len(caplog.records) == 1 and "belongs to middle (Fault, float32) at step 11" in caplog.text
    )


def test_a_gradient_is_named_where_outputs_are_finite():
    model = Model(lambda x: (x - x).abs().sqrt())  # 0, with a gradient of 0/0
    watch = FiniteWatch(model)
    step(model)
    found = watch.update()
    assert (found.what, found.module, found.kind) == (
        "gradient",
        "first",
        "Linear",
    ) and "root" in found.advice
    assert found.entries[0] == 12


def test_the_batch_and_a_module_that_overflows_float16():
    model = Model()
    watch = FiniteWatch(model)
    step(model, torch.full((3, 4), float("inf")))
    assert watch.update().what == "input" and "batch" in watch.first.advice
    model = Model(lambda x: (x.half() * 0 + 60000) * 2)
    model.last = nn.Identity()
    watch = FiniteWatch(model)
    model(torch.ones(3, 4))
    found = watch.update()
    assert (found.module, found.dtype, found.entries) == (
        "middle",
        "float16",
        (0, 12, 12),
    ) and "bfloat16" in found.advice


def test_a_skipped_step_is_forgiven_and_stop_raises():
    model = Model(lambda x: (x - x).abs().sqrt())
    watch = FiniteWatch(model, stop=True)
    step(model)
    assert watch.update(skipped=True) is None
    step(model)
    with pytest.raises(FloatingPointError, match="step 2"):
        watch.update()
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_names_its_backend_and_the_original(patched):
    torch.manual_seed(0)
    attention = patched.PETRMultiheadAttention(embed_dims=32, num_heads=4)
    query, key = torch.randn(5, 2, 32), torch.randn(7, 2, 32)
    key[0] = float("nan")
    watch = FiniteWatch(attention, names=("attn",))
    attention(query, key, key)
    found = watch.update()
    assert found.what == "input" and found.module.startswith("attn")
    key[0] = 1.0
    with torch.no_grad():
        attention.attn.out_proj.weight.fill_(3e38)
    watch = FiniteWatch(attention)
    attention(query, key, key)
    found = watch.update()
    assert (
        found.backends == ("sdpa",)
        and found.module == "attn"
        and "FLASHBIAS_BACKEND=reference" in found.advice
    )
    assert flashbias_patch.status()["calls"]


def test_hooks_keep_no_model_alive():
    import gc
    import weakref

    model = Model()
    watch = FiniteWatch(model)
    alive = weakref.ref(watch)
    step(model)
    del watch
    gc.collect()
    assert alive() is None
    step(model)
