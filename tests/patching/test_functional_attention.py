"""Forwards that call F.multi_head_attention_forward themselves, or code in the same module that
does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flashbias_patch import telemetry
from flashbias_patch.patching import install
from tests.patching.test_inner_attention import (
    E,
    H,
    M,
    N,
    given_masks,
    learned,
    same_as_original,
    sequences,
)
from tests.support.capabilities import FASTEST, since


@pytest.fixture(autouse=True)
def _installed(installed):
    pass


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.batch_first = H, False
        self.attn = nn.MultiheadAttention(E, H)

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_pos=None,
        attn_mask=None,
        key_padding_mask=None,
        **kwargs,
    ):
        return (
            query
            + call(
                query, key, value, self.attn, key_padding_mask=key_padding_mask, attn_mask=attn_mask
            )[0]
        )


def call(query, key, value, attention, **masks):
    functional = F.multi_head_attention_forward
    return functional(
        query,
        key,
        value,
        E,
        H,
        attention.in_proj_weight,
        attention.in_proj_bias,
        None,
        None,
        False,
        0.0,
        attention.out_proj.weight,
        attention.out_proj.bias,
        **masks,
    )


class OwnAttention(nn.Module):
    """No nn.MultiheadAttention at all."""

    def __init__(self):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.randn(3 * E, E) * 0.2), None
        self.out_proj = nn.Linear(E, E)

    def forward(self, query, key, value, **masks):
        return call(query, key, value, self, **masks)


def with_own(
    self,
    query,
    key=None,
    value=None,
    identity=None,
    query_pos=None,
    key_pos=None,
    attn_mask=None,
    key_padding_mask=None,
    **kwargs,
):
    return (
        query
        + self.own(query, key, value, key_padding_mask=key_padding_mask, attn_mask=attn_mask)[0]
    )


def make_own(self):
    nn.Module.__init__(self)
    self.num_heads, self.own = H, OwnAttention()


FORKS = {"direct": (Direct,), "own class": (Direct, {"__init__": make_own, "forward": with_own})}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("fork", list(FORKS))
def test_masks_and_biases(fork):
    base, *members = FORKS[fork]
    cls = type("PETRMultiheadAttention", (base,), *members or [{}])
    original = cls.forward
    assert install.claim(cls)
    for kwargs in given_masks().values():
        module, (query, key) = cls(), sequences()
        leaves = [query, key, *learned(kwargs), *module.parameters()]
        pairs = [(module(query, key, key, **kwargs), original(module, query, key, key, **kwargs))]
        if "attn_mask" not in kwargs:
            bias = torch.randn(M, N)
            pairs.append(
                (
                    module(query, key, key, **kwargs, attention_bias=bias),
                    original(module, query, key, key, **kwargs, attn_mask=bias),
                )
            )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs)
            for mine, base in zip(
                *(
                    torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
                    for out in (ours, theirs)
                )
            ):
                torch.testing.assert_close(mine, base, rtol=1e-3, atol=1e-4)
    assert telemetry.calls["original"] == 0 and telemetry.calls[FASTEST] >= len(given_masks())


def test_the_original_function_gets_the_bias():
    cls = type("PETRMultiheadAttention", (Direct,), {})
    original = cls.forward
    assert install.claim(cls)
    module, (query, key) = cls(), sequences()

    def zero_attn(query, key, value, attention, **masks):
        return F.multi_head_attention_forward(
            query,
            key,
            value,
            E,
            H,
            attention.in_proj_weight,
            attention.in_proj_bias,
            None,
            None,
            True,
            0.0,
            attention.out_proj.weight,
            attention.out_proj.bias,
            **masks,
        )

    globals()["call"], plain = zero_attn, call
    try:
        bias, padding = torch.randn(M, N), torch.zeros(key.shape[1], N)
        ours = module(query, key, key, attention_bias=bias, key_padding_mask=padding.bool())
        torch.testing.assert_close(
            ours, original(module, query, key, key, attn_mask=bias, key_padding_mask=padding)
        )
        assert telemetry.calls["original"] == 1
    finally:
        globals()["call"] = plain


def test_without_an_attention_inside():
    """`same_as_original` on a forward that computes by itself: masks reach it, and the original
    runs."""

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_pos=None,
        attn_mask=None,
        key_padding_mask=None,
        **kwargs,
    ):
        scores = torch.einsum("mbe,nbe->bmn", query, key)
        scores = scores if attn_mask is None else scores.masked_fill(attn_mask, float("-inf"))
        return query + torch.einsum("bmn,nbe->mbe", scores.softmax(-1), value)

    same_as_original(forward, {}, want_core=False)
    same_as_original(forward, {"attn_mask": given_masks()["bool"]["attn_mask"]}, want_core=False)


@since(2, 0, "setup_context")
def test_a_bias_in_a_function_without_ctx_around_the_call_is_an_error():
    """Nothing could tell its recomputation from another call."""
    from .test_checkpoints import WithSetupContext

    class Checkpointed(Direct):
        def forward(
            self,
            query,
            key=None,
            value=None,
            identity=None,
            query_pos=None,
            key_pos=None,
            attn_mask=None,
            key_padding_mask=None,
            **kwargs,
        ):
            return WithSetupContext.apply(
                lambda q, k: call(q, k, k, self.attn, attn_mask=attn_mask)[0], query, key
            )

    cls = type("PETRMultiheadAttention", (Checkpointed,), {})
    original = cls.forward
    assert install.claim(cls)
    module, (query, key) = cls(), sequences()
    with pytest.raises(
        RuntimeError, match="a recomputation of PETRMultiheadAttention would be without it"
    ):
        module(query, key, key, attention_bias=torch.randn(M, N))
    mask = torch.rand(M, N) < 0.3
    torch.testing.assert_close(
        module(query, key, key, attn_mask=mask), original(module, query, key, key, attn_mask=mask)
    )
