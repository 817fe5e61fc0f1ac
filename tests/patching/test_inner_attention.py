"""A core gets what its outer forward hands to it: masks that the forward changes, makes or drops,
however often it calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashbias_patch
from flashbias_patch import telemetry
from flashbias_patch.bias import DenseBias, LowRankBias, ModalityBias, described
from flashbias_patch.patching import install
from tests import stand_ins
from tests.support import internals
from tests.support.capabilities import FASTEST, RELEASE, since

from .test_parity import assert_equal, flash_truth

E, H, B, M, N = 16, 2, 3, 5, 7


@pytest.fixture(autouse=True)
def _installed(installed):
    pass


class Prelude(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.embed_dims, self.num_heads, self.batch_first = E, H, False
        self.attn = nn.MultiheadAttention(E, H, **kwargs)
        self.null = nn.Parameter(torch.randn(1, 1, E))
        self.mask_scale = nn.Parameter(torch.tensor(0.5))


def outer(forward, name="PETRMultiheadAttention", **members):
    """A claimed class with that forward, and the forward as it was: (class, original forward)."""
    cls = type(name, (Prelude,), {"forward": forward, **members})
    assert install.claim(cls)
    return cls, forward


def sequences(grad=True):
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, B, E, generator=g).requires_grad_(grad) for n in (M, N))


def gradients(module, out, leaves):
    leaves = [*leaves, *module.parameters()]
    return torch.autograd.grad(
        out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out), allow_unused=True
    )


def same_as_original(forward, kwargs, leaves=(), want_core=True, **members):
    """Patched equals unpatched, output and gradients."""
    cls, original = outer(forward, **members)
    torch.manual_seed(0)
    module = cls()
    query, key = sequences()
    leaves = [query, key, *leaves]
    theirs = original(module, query, key, key, **kwargs)
    their_grads = gradients(module, theirs, leaves)
    telemetry.reset()
    ours = module(query, key, key, **kwargs)
    assert (sum(telemetry.calls.values()) - telemetry.calls["original"] > 0) is want_core, dict(
        telemetry.calls
    )
    assert_equal([ours, *gradients(module, ours, leaves)], [theirs, *their_grads])


def learned(kwargs):
    return [mask for mask in kwargs.values() if mask.requires_grad]


def changing(change):
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
        key, value, attn_mask, key_padding_mask = change(
            self, key, value, attn_mask, key_padding_mask
        )
        return (
            query
            + self.attn(query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[
                0
            ]
        )

    return forward


def null_key(self, k, v, m, p):
    token = self.null.expand(1, k.shape[1], -1)
    m = None if m is None else F.pad(m, (0, 1))
    return torch.cat([k, token]), torch.cat([v, token]), m, None if p is None else F.pad(p, (0, 1))


CHANGES = {
    "mask inverted": lambda self, k, v, m, p: (k, v, None if m is None else ~m, p),
    "padding inverted": lambda self, k, v, m, p: (k, v, m, None if p is None else ~p),
    "mask dropped": lambda self, k, v, m, p: (k, v, None, p),
    "padding dropped": lambda self, k, v, m, p: (k, v, m, None),
    "mask scaled": lambda self, k, v, m, p: (k, v, None if m is None else m * 0.1, p),
    "mask scaled by a parameter": lambda self, k, v, m, p: (
        k,
        v,
        None if m is None else m * self.mask_scale,
        p,
    ),
    "mask softened": lambda self, k, v, m, p: (k, v, None if m is None else m.bool() * -2.0, p),
    "mask made": lambda self, k, v, m, p: (
        k,
        v,
        torch.ones(M, N).triu(1).bool() if m is None else m,
        p,
    ),
    "padding made": lambda self, k, v, m, p: (
        k,
        v,
        m,
        torch.arange(N).expand(B, N) > 4 if p is None else p,
    ),
    "padding made a mask": lambda self, k, v, m, p: (
        (k, v, m, None)
        if p is None
        else (k, v, p[:, None, None].expand(B, H, M, N).reshape(B * H, M, N), None)
    ),
    "mask for each head": lambda self, k, v, m, p: (
        k,
        v,
        None if m is None else m.expand(B * H, M, N),
        p,
    ),
    "null key": null_key,
}


FLOATING_PADDING = RELEASE >= (2, 0)  # before, torch itself takes none beside a floating mask


def given_masks():
    g = torch.Generator().manual_seed(2)
    boolean, padding = torch.rand(M, N, generator=g) < 0.3, torch.rand(B, N, generator=g) < 0.3
    # No row masks every key, inverted or not: torch gives NaN for those.
    boolean[:, :3] = torch.tensor([False, True, False])
    padding[:, :3] = torch.tensor([False, False, True])
    return {
        "none": {},
        "bool": dict(attn_mask=boolean),
        "float": dict(attn_mask=torch.randn(M, N, generator=g)),
        "learned": dict(attn_mask=torch.randn(M, N, generator=g).requires_grad_()),
        "padding": dict(key_padding_mask=padding),
        "both": dict(attn_mask=boolean, key_padding_mask=padding),
        **(
            {"float padding": dict(key_padding_mask=torch.randn(B, N, generator=g))}
            if FLOATING_PADDING
            else {}
        ),
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("change", list(CHANGES))
def test_the_forward_changes_its_masks(change):
    for kwargs in given_masks().values():
        if "inverted" not in change or not any(
            torch.is_floating_point(mask) for mask in kwargs.values()
        ):
            same_as_original(changing(CHANGES[change]), kwargs, learned(kwargs))


def test_a_bias_is_added_to_the_masks_that_the_core_is_handed():
    """And it is what the changed mask plus the bias gives, gradients of the bias included."""
    cls, original = outer(changing(CHANGES["mask inverted"]))
    module, (query, key) = cls(), sequences()
    mask, bias = given_masks()["bool"]["attn_mask"], torch.randn(B, H, M, N, requires_grad=True)
    ours = module(query, key, key, attn_mask=mask, attention_bias=bias)
    dense = bias.flatten(0, 1).masked_fill(~mask, float("-inf"))
    theirs = (
        query
        + nn.MultiheadAttention.forward.__wrapped__(module.attn, query, key, key, attn_mask=dense)[
            0
        ]
    )
    assert_equal(
        [ours, *gradients(module, ours, [bias, query])],
        [theirs, *gradients(module, theirs, [bias, query])],
    )


def two_attentions(
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
    query = query + self.attn(query, query, query)[0]
    return (
        query
        + self.attn(query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]
    )


def often(
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
    for part in range(3):
        query = (
            query
            + self.attn(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                attn_mask=attn_mask if part else None,
                need_weights=False,
            )[0]
        )
    return query


@pytest.mark.parametrize("forward, calls", [(two_attentions, 2), (often, 3)])
def test_a_core_is_computed_each_time_it_is_called(forward, calls):
    for kwargs in given_masks().values():
        same_as_original(forward, kwargs, learned(kwargs))
        assert telemetry.calls["sdpa"] + telemetry.calls["reference"] == calls


def test_a_bias_goes_to_the_attention_that_it_fits():
    cls, original = outer(two_attentions)
    module, (query, key) = cls(), sequences()
    bias = torch.randn(M, N)
    torch.testing.assert_close(
        module(query, key, key, attention_bias=bias),
        original(module, query, key, key, attn_mask=bias),
    )
    with pytest.raises(ValueError, match="does not fit"):
        module(query, key, key, attention_bias=torch.randn(M, N + 1))


def test_torch_functions_of_an_ordinary_forward_are_not_watched():
    """A function mode costs time, and is needed only for code that calls
    F.multi_head_attention_forward itself."""

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
        self.modes = internals.torch_modes()
        return query + self.attn(query, key, value)[0]

    cls, _ = outer(forward)
    module, (query, key) = cls(), sequences()
    module(query, key, key)
    assert module.modes == [] and telemetry.calls[FASTEST] == 1


def test_a_subclass_hands_its_parent_other_masks_and_biases():
    cls, original = outer(changing(lambda self, k, v, m, p: (k, v, m, p)))

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
        first = cls.forward(self, query, key, value, attn_mask=~attn_mask, **kwargs)
        return first + cls.forward(self, query, key, value, attention_bias=self.extra) - query

    child = type("Child", (cls,), {"forward": forward})
    assert install.claim(child)
    module, (query, key) = child(), sequences()
    module.extra = torch.randn(M, N)
    mask, bias = (
        given_masks()["bool"]["attn_mask"],
        LowRankBias(torch.randn(1, M, H, 2), torch.randn(B, N, 1, 2)),
    )
    dense = bias.dense()
    wanted = (
        original(
            module, query, key, key, attn_mask=dense.masked_fill(~mask, float("-inf")).flatten(0, 1)
        )
        + original(module, query, key, key, attn_mask=(dense + module.extra).flatten(0, 1))
        - query
    )
    torch.testing.assert_close(module(query, key, key, attn_mask=mask, attention_bias=bias), wanted)


# -- an early return is one call's affair ----------------------------------------------------------


def leaving(
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
    self.runs = getattr(self, "runs", 0) + 1
    if key.shape[0] == 0:
        return query
    return (
        query
        + self.attn(query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]
    )


def test_an_early_return_runs_once_and_changes_nothing(caplog):
    cls, original = outer(leaving)
    first, other, (query, key) = cls(), cls(), sequences()
    first(query, key, key)
    padding = torch.zeros(B, 0, dtype=torch.bool)
    assert (
        other(query, key[:0], key[:0], key_padding_mask=padding, attention_bias=torch.zeros(M, 0))
        is query
    )
    assert other.runs == 1
    bias = torch.randn(M, N)
    torch.testing.assert_close(
        first(query, key, key, attention_bias=bias),
        original(first, query, key, key, attn_mask=bias),
    )
    assert telemetry.calls["original"] == 0 and not telemetry.fallbacks()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_first_early_return_does_not_count_for_later_calls():
    cls, original = outer(leaving)
    module, (query, key) = cls(), sequences()
    module(query, key[:0], key[:0])
    module(query, key, key)
    assert telemetry.calls["original"] == 1 and sum(telemetry.calls.values()) == 2


def test_a_bias_that_no_core_adds_is_warned_of_once(caplog):
    cls, _ = outer(leaving)
    module, (query, key) = cls(), sequences()
    for _ in range(3):
        module(query, key[:0], key[:0], attention_bias=torch.zeros(M, 0))
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert lines == [
        f"{cls.__qualname__}: attention_bias has no effect: its forward did not call its "
        "nn.MultiheadAttention or FlashMHA"
    ]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    "kind, layers, why",
    [
        (
            "self",
            None,
            "attention_bias(kind='self') has no effect: only cross attentions were called "
            "in the block",
        ),
        (
            "cross",
            [1, 2],
            "attention_bias(kind='cross') has no effect: 1 attentions of this kind "
            "were called, and none has "
            "an index in layers=(1, 2)",
        ),
        (
            "cross",
            None,
            "attention_bias(kind='cross') has no effect: no patched attention was called "
            "in the block; "
            "flashbias_patch.status() shows what is patched",
        ),
    ],
)
def test_a_block_whose_bias_is_not_used_is_warned_of_once(caplog, kind, layers, why):
    cls, original = outer(leaving)
    module, (query, key) = cls(), sequences()
    forward = original if "no patched" in why else cls.forward
    for _ in range(2):
        with flashbias_patch.attention_bias(torch.randn(M, N), kind=kind, layers=layers):
            forward(module, query, key, key)
    assert warnings_of(caplog) == [why]


def test_a_block_whose_bias_is_taken_or_that_fails_is_not_warned_of(caplog):
    cls, _ = outer(leaving)
    module, (query, key) = cls(), sequences()
    with flashbias_patch.attention_bias(torch.randn(M, N)):
        module(query, key, key)
    with pytest.raises(ZeroDivisionError), flashbias_patch.attention_bias(torch.randn(M, N)):
        raise ZeroDivisionError
    assert not warnings_of(caplog)


# -- structured biases where a mask is expected ----------------------------------------------------


def test_a_structured_bias_is_never_handed_to_the_forward():
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
        attention_bias=None,
        **kwargs,
    ):
        assert attn_mask is None or attn_mask.dtype == torch.bool
        if attention_bias is not None:  # as one generation of forks has it: (M, B, N)
            attn_mask = attention_bias.transpose(0, 1).repeat_interleave(H, 0)
        return (
            query
            + self.attn(query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[
                0
            ]
        )

    cls, original = outer(forward)
    module, (query, key) = cls(), sequences()
    dense = torch.randn(B, M, N)
    wanted = original(module, query, key, key, attention_bias=dense.transpose(0, 1))
    for kwargs in (
        dict(attn_mask=DenseBias(dense[:, None])),
        dict(attention_bias=DenseBias(dense[:, None])),
        dict(attention_bias=dense.transpose(0, 1)),
        dict(attn_bias=dense),
    ):
        torch.testing.assert_close(module(query, key, key, **kwargs), wanted)


@pytest.mark.parametrize("grad", [False, True])
def test_a_bias_tensor_that_the_forward_reshapes_stays_a_description(grad):
    """As one generation of forks does: (M, B, N) to (B*H, M, N), then the inner attention's
    mask."""
    masks = []

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
        attention_bias=None,
        **kwargs,
    ):
        masks.append(
            attention_bias.transpose(0, 1).unsqueeze(1).expand(B, H, M, N).reshape(B * H, M, N)
        )
        return query + self.attn(query, key, value, attn_mask=masks[-1])[0]

    cls, original = outer(forward)
    module, (query, key) = cls(), sequences()
    weights = torch.randn(B, M, 2, requires_grad=grad)
    bias = ModalityBias(weights, (3, N - 3))
    dense = bias.dense()[:, 0].transpose(0, 1)
    leaves = [query, key] + [weights] * grad
    theirs = original(module, query, key, key, attention_bias=dense)
    their_grads = gradients(module, theirs, leaves)
    ours = module(query, key, key, attention_bias=described(bias).transpose(0, 1))
    assert_equal([ours, *gradients(module, ours, leaves)], [theirs, *their_grads])
    assert internals.dense_of(masks[-1]) is None and telemetry.calls["original"] == 0


# -- the original code, with a bias ----------------------------------------------------------------

ORIGINALS = [
    dict(kdim=8, vdim=8),
    dict(add_bias_kv=True),
    dict(add_zero_attn=True),
    dict(batch_first=True, kdim=8, vdim=8),
]


@pytest.mark.parametrize("options", ORIGINALS)
def test_the_original_code_gets_the_bias_in_the_inner_layout(options):
    """Also where the outer class says `batch_first` and takes (M, B, E), as the flash class
    does."""
    first = options.get("batch_first", False)

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
        q, k, v = (x.transpose(0, 1) if first else x for x in (query, key, value))
        out = self.attn(q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]
        return query + (out.transpose(0, 1) if first else out)

    cls, original = outer(forward)
    module = cls(**options)
    module.batch_first = True
    query, key = sequences()[0], torch.randn(N, B, options.get("kdim", E))
    for masks in ("none", "bool", "float", "padding", "both"):
        kwargs, bias = given_masks()[masks], torch.randn(B, H, M, N, requires_grad=True)
        padding = kwargs.get("key_padding_mask")
        if padding is not None and FLOATING_PADDING:
            padding = torch.zeros(B, N).masked_fill(padding, float("-inf"))
        dense = added(bias, kwargs.get("attn_mask")).flatten(0, 1)
        theirs = original(module, query, key, key, attn_mask=dense, key_padding_mask=padding)
        ours = module(query, key, key, attention_bias=bias, **kwargs)
        assert_equal(
            [ours, *gradients(module, ours, [query, bias])],
            [theirs, *gradients(module, theirs, [query, bias])],
        )
    assert telemetry.calls["original"] == sum(telemetry.calls.values()) == 5


def added(bias, mask):
    if mask is None:
        return bias
    return bias.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


@since(2, 0, "is_causal")
def test_a_hint_that_the_mask_is_causal_does_not_lose_the_bias():
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
            + self.attn(query, key, value, attn_mask=attn_mask, is_causal=True, need_weights=False)[
                0
            ]
        )

    cls, _ = outer(forward)
    module, query = cls(), sequences()[0]
    causal, bias = torch.ones(M, M).triu(1).bool(), torch.randn(M, M)
    dense = bias.masked_fill(causal, float("-inf"))
    wanted = (
        query
        + nn.MultiheadAttention.forward.__wrapped__(
            module.attn, query, query, query, attn_mask=dense
        )[0]
    )
    torch.testing.assert_close(
        module(query, query, query, attn_mask=causal, attention_bias=bias), wanted
    )


@since(1, 11, "attention of unbatched sequences")
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("options", [{}, dict(kdim=8, vdim=8)])
@pytest.mark.parametrize("biased", [False, True])
def test_unbatched_queries(options, biased):
    """(L, E), with a bias and without, in this package and in the original code."""
    cls, original = outer(changing(lambda self, k, v, m, p: (k, v, m, p)))
    module, query = cls(**options), torch.randn(M, E, requires_grad=True)
    key, bias = torch.randn(N, options.get("kdim", E), requires_grad=True), torch.randn(M, N)
    for masks in (
        dict(attn_mask=torch.arange(M * N).view(M, N) % 3 == 1),
        dict(attn_mask=torch.randn(M, N)),
        dict(attn_mask=torch.randn(H, M, N)),
        dict(key_padding_mask=torch.arange(N) > 4),
        {},
    ):
        with_bias = {**masks, "attn_mask": added(bias, masks.get("attn_mask"))} if biased else masks
        theirs = original(module, query, key, key, **with_bias)
        telemetry.reset()
        ours = module(query, key, key, **masks, **({"attention_bias": bias} if biased else {}))
        assert bool(telemetry.calls["original"]) is bool(options) and ours.shape == (M, E)
        assert_equal(
            [ours, *gradients(module, ours, [query, key])],
            [theirs, *gradients(module, theirs, [query, key])],
        )


# -- FlashMHA --------------------------------------------------------------------------------------


def flash_classes():
    return stand_ins.repository("cmt")


@pytest.mark.parametrize("sizes", [(0, N, B), (M, 0, B), (M, N, 0), (0, 0, B)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["PETRMultiheadAttention", "PETRMultiheadFlashAttention"])
def test_nothing_to_attend(name, sizes, biased):
    m, n, b = sizes
    with flash_classes() as load:
        module = getattr(load(f"{stand_ins.UTILS}.petr_transformer"), name)(E, H)
        query, key = (torch.randn(length, b, E, requires_grad=True) for length in (m, n))
        out = module(query, key, key, **({"attention_bias": torch.zeros(m, n)} if biased else {}))
        assert out.shape == query.shape
        out.sum().backward()
        assert query.grad.isfinite().all()


@pytest.mark.parametrize("masks", ["upstream", "honour"])
def test_a_flash_core_that_is_handed_padding_believes_it(monkeypatch, masks):
    """A fork hands on key padding, in flash-attn's convention: True keeps a key."""
    monkeypatch.setenv("FLASHBIAS_MASKS", masks)
    flashbias_patch.settings.reload()
    with flash_classes() as load:
        base = load(f"{stand_ins.UTILS}.petr_transformer").PETRMultiheadFlashAttention

        class Fork(base):
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
                q, k, v = (x.transpose(0, 1) for x in (query, key, value))
                return query + self.attn(q=q, k=k, v=v, key_padding_mask=key_padding_mask)[
                    0
                ].transpose(0, 1)

        assert install.claim(Fork)
        module, (query, key) = Fork(E, H), sequences()
        keep = ~given_masks()["padding"]["key_padding_mask"]
        wanted = flash_truth(
            module, query, key, key, biases=(None, (~keep)[:, None, None].expand(B, H, M, N))
        )
        torch.testing.assert_close(module(query, key, key, key_padding_mask=keep), wanted)


@pytest.mark.parametrize("kind", ["cross", "self", "all"])
def test_kinds_of_a_bare_flash_core(kind):
    """By what it attends to: the same tensor, or another view of the same memory."""
    with stand_ins.repository("isfusion") as load:
        core = load("projects.isfusion.ops.flash").FlashMHA(E, H)
        x, other, bias = torch.randn(M, B, E), torch.randn(B, M, E), torch.randn(M, M) * 3
        q = x.transpose(0, 1)
        for key, own in ((other, "cross"), (q, "self"), (x.transpose(0, 1), "self")):
            wanted = core(
                q, key, key, **({"attention_bias": bias} if kind in (own, "all") else {})
            )[0]
            with flashbias_patch.attention_bias(bias, kind=kind):
                torch.testing.assert_close(core(q, key, key)[0], wanted)
        with pytest.raises(ValueError, match="does not fit"):
            core(q, other, other, attention_bias=torch.zeros(M, M + 1))


@pytest.mark.parametrize("value", [True, 3])
def test_an_option_of_a_forks_flash_core_that_is_unknown_here_runs_its_own_code(value):
    with flash_classes() as load:
        base = load(f"{stand_ins.UTILS}.petr_transformer").FlashMHA

        class FlashMHA(base):
            def forward(self, q, k, v, key_padding_mask=None, causal=False):
                return "its own", causal

        assert install.claim(FlashMHA)
        core, x = FlashMHA(E, H), torch.randn(B, N, E)
        assert core(x, x, x, causal=value) == ("its own", value)
        assert core(x, x, x, None, value) == ("its own", value)
        plain = base(E, H)
        plain.load_state_dict(core.state_dict())
        for usual in ({}, {"causal": False}, {"causal": None}):
            torch.testing.assert_close(core(x, x, x, **usual)[0], plain(x, x, x)[0])


@since(2, 0, "setup_context")
def test_a_flash_core_in_a_function_without_ctx_is_an_error():
    """What the outer forward adds to it, a floating mask that the flash class drops too, cannot be
    found again."""
    from .test_checkpoints import WithSetupContext

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
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        return WithSetupContext.apply(
            lambda *given: self.attn(*given, key_padding_mask=None)[0], q, k, v
        )

    with stand_ins.repository("isfusion") as load:
        core = load("projects.isfusion.ops.flash").FlashMHA(E, H)
        cls = type("PETRMultiheadFlashAttention", (nn.Module,), dict(forward=forward))
        assert install.claim(cls)
        query, key, bias = *sequences(), torch.randn(M, N)
        for given in (dict(attention_bias=bias), dict(attn_mask=bias)):
            module = cls()
            module.attn = core
            out = module(query, key, key, **given)
            with pytest.raises(RuntimeError, match="FlashMHA is recomputed.*without the bias"):
                out.sum().backward()
        with flashbias_patch.attention_bias(bias):  # the block is seen by the core itself
            out = module(query, key, key)
        with pytest.raises(RuntimeError, match="FlashMHA is recomputed.*without the bias"):
            out.sum().backward()


def plain_core(self, query, key=None, value=None, identity=None, query_pos=None, key_pos=None,
               attn_mask=None, key_padding_mask=None, **kwargs):  # fmt: skip
    out, weights = self.attn(query, key, value)
    return out + weights.mean()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch, length", [(1, M), (1, 1), (1, 2), (2, 1), (B, M)])
@pytest.mark.parametrize("shared", ["all", "key and value", "none"])
def test_a_batch_of_one_is_any_batch(batch, length, batch_first, shared):
    """(L, 1, E) is read as (1, L, E), which no operator needs to make of it."""
    cls, original = outer(plain_core)
    torch.manual_seed(0)
    module = cls(batch_first=batch_first)
    drawn = [
        torch.randn((batch, n, E) if batch_first else (n, batch, E)).requires_grad_()
        for n in (length, length if shared == "all" else N, N)
    ]
    query, key, value = drawn
    if shared != "none":
        value = key = query if shared == "all" else key
    leaves = [query, key, value] if shared == "none" else [query, key]
    theirs = original(module, query, key, value)
    their_grads = gradients(module, theirs, leaves)
    telemetry.reset()
    ours = module(query, key, value)
    assert sum(telemetry.calls.values()) - telemetry.calls["original"] > 0
    assert_equal([ours, *gradients(module, ours, leaves)], [theirs, *their_grads])


def layout_core(self, query, key=None, value=None, identity=None, query_pos=None, key_pos=None,
                attn_mask=None, key_padding_mask=None, **kwargs):  # fmt: skip
    out, _ = self.attn(query, key, value)
    self.seen = [step for step, size in zip(out.stride(), out.shape) if size > 1]
    return out


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch, length", [(1, M), (2, 1), (B, M)])
@pytest.mark.parametrize("shared", ["all", "query and key", "none"])
@pytest.mark.parametrize("training, grad", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_output_lies_in_memory_as_torchs(
    batch, length, batch_first, shared, training, grad, device
):
    """So that what can be viewed unpatched can be patched."""
    cls, original = outer(layout_core)
    module = cls(batch_first=batch_first).to(device).train(training)
    query, key = (
        torch.randn((batch, n, E) if batch_first else (n, batch, E), device=device)
        for n in (length, N)
    )
    key = key if shared == "none" else query
    value = key if shared != "query and key" else torch.randn_like(key)
    with torch.set_grad_enabled(grad):
        theirs = original(module, query, key, value)
        seen = module.seen
        telemetry.reset()
        assert_equal([module(query, key, value)], [theirs])
    assert module.seen == seen
    assert sum(telemetry.calls.values()) - telemetry.calls["original"] > 0
