"""A bias under every make of checkpoint, at every place: output and all gradients as without
checkpointing (float64)."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

import flashbias_patch
from flashbias_patch.bias import LowRankBias, described
from tests.support.capabilities import RELEASE, needs_hooks, since
from tests.support.checkpoints import KINDS, OWN_BACKWARD, checkpointed, reentrant

E, H, M, N, B = 8, 2, 5, 7, 2
PLACES = ("layer", "module", "inner", "decoder", "decoder and layer")
WAYS = ("scope", "keyword", "masks")
pytestmark = pytest.mark.filterwarnings("ignore")


class PETRMultiheadAttention(nn.Module):
    def __init__(self, operation_name, dropout):
        super().__init__()
        self.embed_dims, self.num_heads, self.operation_name = E, H, operation_name
        self.attn = nn.MultiheadAttention(E, H, dropout)
        self.checkpoint = lambda function, *args: function(*args)

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
        key = query if key is None else key
        value = key if value is None else value

        def inner(q, k, v):
            return self.attn(q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]

        return query + self.checkpoint(inner, query, key, value)


class PETRTransformerDecoderLayer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.attentions = nn.ModuleList(
            [
                PETRMultiheadAttention("self_attn", dropout),
                PETRMultiheadAttention("cross_attn", dropout),
            ]
        )
        self.norm = nn.LayerNorm(E)

    def forward(
        self, query, key=None, value=None, query_pos=None, key_pos=None, attn_masks=None, **kwargs
    ):
        masks = attn_masks or [None, None]
        query = self.attentions[0](query, attn_mask=masks[0], **kwargs)
        return self.norm(self.attentions[1](query, key, value, attn_mask=masks[1]))


class Decoder(nn.Module):
    def __init__(self, dropout=0.0, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(PETRTransformerDecoderLayer(dropout) for _ in range(layers))

    def forward(self, query, key, value, **kwargs):
        for layer in self.layers:
            query = layer(query, key, value, **kwargs)
        return query


@pytest.fixture
def patched(installed, monkeypatch):
    from flashbias_patch.attention import selfcheck
    from flashbias_patch.patching import install as patching

    monkeypatch.setattr(
        selfcheck, "check", lambda *given: None
    )  # seconds, and nothing that is tested here
    for cls in (PETRMultiheadAttention, PETRTransformerDecoderLayer):
        assert patching.claim(cls)


def decoder_of(place=None, kind=None, dropout=0.0):
    torch.manual_seed(0)
    decoder = Decoder(dropout).double().train()
    if kind is None:
        return decoder
    for layer in decoder.layers:
        for index, attention in enumerate(layer.attentions):
            if place == "module":
                layer.attentions[index] = checkpointed(attention, kind)
            if place == "inner":  # a wrapper class around the inner attention would hide what it is
                attention.checkpoint = reentrant if "wrapper" in kind else KINDS[kind]
    if place in ("layer", "decoder and layer"):
        for index, layer in enumerate(decoder.layers):
            decoder.layers[index] = checkpointed(layer, kind)
    return checkpointed(decoder, kind) if place.startswith("decoder") else decoder


class Inputs:
    """Query, memory, and a bias: fixed, learned as a leaf, or computed from a scale that all layers
    share."""

    def __init__(self, learned=None, seed=3):
        g = torch.Generator().manual_seed(seed)
        self.query = torch.randn(M, B, E, generator=g, dtype=torch.float64).requires_grad_()
        self.memory = torch.randn(N, B, E, generator=g, dtype=torch.float64).requires_grad_()
        self.a = (
            torch.randn(1, M, 1, 2, generator=g, dtype=torch.float64)
            .mul_(2)
            .requires_grad_(learned == "leaf")
        )
        self.b = torch.randn(1, N, 1, 2, generator=g, dtype=torch.float64)
        self.scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=learned == "shared")
        self.learned = learned

    def bias(self, dense=False):
        a = torch.sin(self.scale) * self.a if self.learned == "shared" else self.a
        if dense:
            return a[0, :, 0] @ self.b[0, :, 0].T
        return LowRankBias(a, self.b)

    def leaves(self):
        return {
            name: t
            for name, t in vars(self).items()
            if isinstance(t, torch.Tensor) and t.requires_grad
        }


def run(decoder, inputs, way, one_memory=True):
    """Nested, torch's non-reentrant checkpoint hands `key` and `value` on as two tensors where they
    were one: unpatched attention then saves others than in the forward, and fails."""
    torch.manual_seed(11)
    given = inputs.query, inputs.memory, inputs.memory if one_memory else inputs.memory * 0.5
    if way == "keyword":
        return decoder(*given, attention_bias=inputs.bias())
    if way == "masks":
        return decoder(*given, attn_masks=[None, inputs.bias(dense=True)])
    with flashbias_patch.attention_bias(inputs.bias()):
        return decoder(*given)


def gradients(decoder, inputs, out=None):
    if out is not None:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
        (out * weight).sum().backward()
    names = {
        n.replace("_checkpoint_wrapped_module.", "").replace("module.", ""): p
        for n, p in decoder.named_parameters()
    }
    return {
        **{n: p.grad for n, p in names.items()},
        **{n: t.grad for n, t in inputs.leaves().items()},
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        if exact is None or found[name] is None:
            assert found[name] is exact, name
        else:
            torch.testing.assert_close(
                found[name], exact, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


def may_refuse(kind, place, way, learned):
    """torch's own limit: such a checkpoint differentiates itself, and frees the graph of what it
    finds in a closure."""
    inside = way == "masks" or (
        way == "keyword" and place in ("layer", "decoder", "decoder and layer")
    )
    return learned is not None and kind in OWN_BACKWARD and inside


def cases():
    for kind, place, way, learned in itertools.product(
        KINDS, PLACES, WAYS, (None, "leaf", "shared")
    ):
        for dropout in (0.0, 0.3) if way == "scope" else (0.0,):
            quick = learned == "shared" and (way != "scope" or dropout)
            yield pytest.param(
                kind, place, way, learned, dropout, marks=() if quick else pytest.mark.slow
            )


@pytest.mark.parametrize("kind, place, way, learned, dropout", list(cases()))
def test_as_without_a_checkpoint(patched, kind, place, way, learned, dropout):
    expected_inputs, inputs = Inputs(learned), Inputs(learned)
    plain = decoder_of(dropout=dropout)
    one_memory = place != "decoder and layer" or kind in OWN_BACKWARD
    expected_out = run(plain, expected_inputs, way, one_memory)
    expected = gradients(plain, expected_inputs, expected_out)
    decoder = decoder_of(place, kind, dropout)
    out = run(decoder, inputs, way, one_memory)
    torch.testing.assert_close(out, expected_out, rtol=1e-9, atol=1e-9)
    try:
        found = gradients(decoder, inputs, out)
    except RuntimeError as error:
        assert may_refuse(kind, place, way, learned), error
        assert "use_reentrant=False" in str(error)
        return
    assert_equal(found, expected)


# -- several forwards, several backwards -----------------------------------------------------------

MAKES = [kind for kind in KINDS if "wrapper" not in kind and "bound" not in kind]


def compare(make, kind, place="layer", learned="shared"):
    """make(decoder, inputs) trains somehow; with and without checkpoints."""
    results = []
    for around in (None, kind):
        decoder, inputs = decoder_of(place, around), Inputs(learned)
        make(decoder, inputs)
        results.append(gradients(decoder, inputs))
    assert_equal(results[1], results[0])


def loss_of(out, seed):
    return (
        out * torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    ).sum()


@pytest.mark.parametrize("kind", MAKES)
def test_gradients_accumulate_with_an_evaluation_between(patched, kind):
    def make(decoder, inputs):
        for step in range(3):
            loss = loss_of(run(decoder, inputs, "scope"), step)
            with torch.no_grad():
                other = Inputs(seed=step)
                run(decoder, other, "scope")
                run(decoder.eval(), other, "keyword")
                decoder.train()
            loss.backward()

    compare(make, kind)


@pytest.mark.parametrize("reverse", (False, True), ids=("in order", "reversed"))
@pytest.mark.parametrize("kind", MAKES)
def test_two_forwards_with_different_biases_before_their_backwards(patched, kind, reverse):
    def make(decoder, inputs):
        losses = []
        for step in range(2):
            with flashbias_patch.attention_bias(inputs.bias() * (step + 1.0)):
                losses.append(loss_of(decoder(inputs.query, inputs.memory, inputs.memory), step))
        losses.append(
            loss_of(decoder(inputs.query, inputs.memory, inputs.memory), 2)
        )  # without a bias
        for loss in reversed(losses) if reverse else losses:
            with flashbias_patch.attention_bias(
                torch.ones(M, N, dtype=torch.float64) * torch.arange(N)
            ):
                loss.backward()  # inside another block: no concern of a recomputation

    compare(make, kind)


@pytest.mark.parametrize("kind", MAKES)
def test_one_module_called_several_times_with_different_biases(patched, kind):
    """As MoME's experts: camera, lidar and fused queries through one decoder."""

    def make(decoder, inputs):
        outs = []
        for expert in range(3):
            with flashbias_patch.attention_bias(inputs.bias() * (1.0 - expert)):
                outs.append(decoder(inputs.query, inputs.memory, inputs.memory))
        loss_of(torch.stack(outs), 0).backward()

    compare(make, kind)


@pytest.mark.parametrize("kind", [kind for kind in MAKES if kind != "hooks"])
def test_backward_twice_through_one_graph(patched, kind):
    def make(decoder, inputs):
        loss = loss_of(run(decoder, inputs, "scope"), 0)
        loss.backward(retain_graph=True)
        loss.backward()

    compare(make, kind)


@pytest.mark.parametrize("kind", MAKES)
def test_a_block_inside_the_checkpointed_function_counts_once(patched, kind):
    def make(decoder, inputs):
        from tests.support.checkpoints import KINDS

        def function(query, memory):
            with flashbias_patch.attention_bias(LowRankBias(inputs.a, inputs.b)):
                return decoder(query, memory, memory)

        with flashbias_patch.attention_bias(LowRankBias(inputs.a * 0.3, inputs.b)):
            out = (
                function(inputs.query, inputs.memory)
                if decoder.plain
                else KINDS[kind](function, inputs.query, inputs.memory)
            )
        loss_of(out, 0).backward()

    results = []
    for plain in (True, False):
        decoder, inputs = decoder_of(), Inputs()
        decoder.plain = plain
        make(decoder, inputs)
        results.append(gradients(decoder, inputs))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("kind", MAKES)
def test_the_bias_as_an_argument_of_the_checkpointed_function(patched, kind):
    results = []
    for around in (None, kind):
        decoder, inputs = decoder_of(), Inputs("shared")

        def function(query, memory, a, decoder=decoder, inputs=inputs):
            with flashbias_patch.attention_bias(LowRankBias(a, inputs.b)):
                return decoder(query, memory, memory)

        given = inputs.query, inputs.memory, inputs.bias().q_factor
        out = function(*given) if around is None else KINDS[around](function, *given)
        loss_of(out, 0).backward()
        results.append(gradients(decoder, inputs))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("listed", (False, True))
@pytest.mark.parametrize("kind", ("reentrant", "reentrant, bound"))
def test_a_described_bias_as_an_argument(patched, kind, listed):
    results = []
    for around in (None, kind):
        decoder, inputs = decoder_of(), Inputs("shared")

        def function(query, memory, bias, decoder=decoder):
            with flashbias_patch.attention_bias(bias[0] if listed else bias):
                return decoder(query, memory, memory)

        bias = described(inputs.bias(), "mn")
        given = inputs.query, inputs.memory, [bias] if listed else bias
        out = function(*given) if around is None else KINDS[around](function, *given)
        loss_of(out, 0).backward()
        results.append(gradients(decoder, inputs))
    assert_equal(results[1], results[0])


# -- what cannot be restored, and what must not be left behind -------------------------------------


class WithSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(function, *args):
        return function(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        args = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.function(*args)
        torch.autograd.backward(out, grad)
        return (None, *(arg.grad for arg in args))


@since(2, 0, "setup_context")
def test_a_function_without_ctx_is_an_error_at_the_recomputation(patched):
    decoder, inputs = decoder_of(), Inputs()
    with flashbias_patch.attention_bias(inputs.bias()):
        out = WithSetupContext.apply(
            lambda query: decoder(query, inputs.memory, inputs.memory), inputs.query
        )
    with pytest.raises(
        RuntimeError, match="recomputed in a backward pass without the bias.*use_reentrant=False"
    ):
        out.sum().backward()
    other = Inputs()  # no bias, no error
    WithSetupContext.apply(
        lambda query: decoder_of()(query, other.memory, other.memory), other.query
    ).sum().backward()
    run(decoder, Inputs(), "scope").sum().backward()


@pytest.mark.parametrize("kind", ("fairscale",))
def test_autograd_grad_of_a_learned_bias_is_an_error(patched, kind):
    decoder, inputs = decoder_of("layer", kind), Inputs("shared")
    out = run(decoder, inputs, "scope")
    with pytest.raises(RuntimeError, match="only known to loss.backward.*use_reentrant=False"):
        torch.autograd.grad(out.sum(), inputs.query)


@pytest.mark.parametrize("kind", MAKES)
def test_nothing_outlives_the_graph(patched, kind):
    decoder = decoder_of("layer", kind)
    gc.collect()
    gc.disable()
    try:
        inputs = Inputs("shared")
        bias = inputs.bias()
        held = weakref.ref(bias.q_factor)
        with flashbias_patch.attention_bias(bias):
            out = decoder(inputs.query, inputs.memory, inputs.memory)
        del bias
        out.sum().backward()
        del out, inputs
        if kind == "hooks":
            gc.collect()  # the stand-in's closures refer to each other
        assert held() is None
    finally:
        gc.enable()


def test_an_error_in_a_recomputation_leaves_no_bias_behind(patched):
    decoder, inputs = decoder_of(), Inputs()
    calls = []

    def function(query):
        calls.append(query)
        out = decoder(query, inputs.memory, inputs.memory)
        if len(calls) == 2:
            raise KeyError("the user's own")
        return out

    expected = run(decoder_of(), inputs, "keyword")
    plain = decoder(inputs.query, inputs.memory, inputs.memory)
    with flashbias_patch.attention_bias(inputs.bias()):
        out = KINDS["fairscale"](function, inputs.query)
    torch.testing.assert_close(out, expected)
    with pytest.raises(KeyError, match="the user's own"):
        out.sum().backward()
    torch.testing.assert_close(decoder(inputs.query, inputs.memory, inputs.memory), plain)


def test_a_recomputation_takes_the_backend_of_its_forward(patched):
    """Breakers that open between forward and backward do not change what dropout drops."""
    from flashbias_patch.attention.breaker import breakers

    def make(kind, after):
        from flashbias_patch.attention import dispatch

        dispatch.reset()
        decoder, inputs = decoder_of("layer", kind, dropout=0.4), Inputs("shared")
        out = run(decoder, inputs, "scope")
        if after:
            for key in list(breakers.by_signature):
                breakers.open(key, "sdpa", "seen to fail")
        return gradients(decoder, inputs, out)

    expected = make(None, False)
    for kind in MAKES:
        assert_equal(make(kind, True), expected)


@needs_hooks
def test_hooks_that_stay_open_over_several_steps_replay_nothing():
    """save_on_cpu around a whole training loop: a forward after a backward is no recomputation."""
    from flashbias_patch.attention.recovery import checkpoint_hooks, replay

    checkpoint_hooks.watch()
    try:
        with torch.autograd.graph.save_on_cpu():
            chosen = []
            for step in range(3):
                x = torch.randn(3, requires_grad=True)
                assert not replay.recomputing()
                chosen.append(replay.once(lambda step=step: step))
                (x * x).sum().backward()
            assert chosen == [0, 1, 2]
    finally:
        checkpoint_hooks.unwatch()


# -- Functions without ctx, several checkpoints that share a learned bias, uninstall ---------------


def within(kind, function):
    return lambda *args: KINDS[kind](function, *args)


@since(2, 0, "setup_context")
@pytest.mark.parametrize("way", ("scope", "keyword"))
def test_a_function_without_ctx_around_an_inner_attention_is_an_error(patched, way):
    decoder, inputs = decoder_of(), Inputs()
    for layer in decoder.layers:
        layer.attentions[1].checkpoint = WithSetupContext.apply
    out = run(decoder, inputs, way)
    with pytest.raises(
        RuntimeError,
        match="MultiheadAttention is recomputed.*without the bias.*use_reentrant=False",
    ):
        out.sum().backward()
    other = decoder_of()  # no bias, no error
    other.layers[0].attentions[1].checkpoint = WithSetupContext.apply
    other(inputs.query, inputs.memory, inputs.memory).sum().backward()


@since(2, 0, "setup_context")
@pytest.mark.parametrize(
    "outer, inner", [("fairscale", None), ("non-reentrant", None), (None, "fairscale")]
)
def test_a_function_without_ctx_among_others_is_right_or_an_error(patched, outer, inner):
    expected_inputs, inputs = Inputs(), Inputs()
    plain = decoder_of()
    expected = gradients(plain, expected_inputs, run(plain, expected_inputs, "scope"))
    decoder = decoder_of()

    def function(query, key, value):
        called = decoder if inner is None else within(inner, decoder)
        return called(query, key, value)

    def without_ctx(*args):
        return WithSetupContext.apply(function, *args)

    with flashbias_patch.attention_bias(inputs.bias()):
        called = without_ctx if outer is None else within(outer, without_ctx)
        out = called(inputs.query, inputs.memory, inputs.memory)
    try:
        found = gradients(decoder, inputs, out)
    except RuntimeError as error:
        assert outer != "fairscale", error
        assert "recomputed in a backward pass without the bias" in str(error)
        return
    assert_equal(found, expected)


counts_gradients = since(2, 1, "register_post_accumulate_grad_hook")


def shared_bias(checkpointed_layers, kind, learned, observe=None):
    """Gradients, and how often the leaf behind the bias received one."""
    decoder, inputs = decoder_of(), Inputs(learned)
    for index in checkpointed_layers:
        decoder.layers[index] = checkpointed(decoder.layers[index], kind)
    counted = []
    leaf = inputs.scale if learned == "shared" else inputs.a
    leaf.register_post_accumulate_grad_hook(counted.append)
    bias = inputs.bias()
    if observe == "hook":
        bias.q_factor.register_hook(lambda grad: grad.abs())  # not linear: the sum, and once
    if observe == "retain_grad" and learned == "shared":
        bias.q_factor.retain_grad()
    with flashbias_patch.attention_bias(bias):
        out = decoder(inputs.query, inputs.memory, inputs.memory)
    loss = loss_of(out, 0)
    if observe == "loss":
        loss = loss + bias.q_factor.pow(2).sum()
    found = gradients(decoder, inputs, loss)
    if observe == "retain_grad" and learned == "shared":
        found["q_factor"] = bias.q_factor.grad
    return found, len(counted)


@counts_gradients
@pytest.mark.parametrize("observe", (None, "loss", "hook", "retain_grad"))
@pytest.mark.parametrize("layers", ((0,), (1,), (0, 1)))
@pytest.mark.parametrize("kind", ("fairscale", "megatron"))
def test_a_learned_bias_of_several_layers_receives_its_gradient_once(
    patched, kind, layers, observe
):
    """DistributedDataParallel reduces what arrives first."""
    expected, once = shared_bias((), None, "shared", observe)
    found, times = shared_bias(layers, kind, "shared", observe)
    assert_equal(found, expected)
    assert times == once == 1


@counts_gradients
@pytest.mark.parametrize("layers", ((0,), (1,), (0, 1)))
def test_a_leaf_as_bias_of_several_layers(patched, layers):
    expected, _ = shared_bias((), None, "leaf")
    found, times = shared_bias(layers, "fairscale", "leaf")
    assert_equal(found, expected)
    if 0 not in layers or 1 in layers:
        assert times == 1


def test_a_pass_that_fails_leaves_no_gradient_for_the_next(patched):
    decoder, inputs = decoder_of("layer", "fairscale"), Inputs("shared")

    def fail(grad):
        raise KeyError("the user's own")

    hook = inputs.query.register_hook(fail)
    with pytest.raises(KeyError, match="the user's own"):
        run(decoder, inputs, "scope").sum().backward()
    hook.remove()
    if RELEASE >= (2, 1):  # before, each checkpoint delivers what it has found at once
        assert inputs.scale.grad is None
    inputs.scale.grad = None
    decoder.zero_grad()
    inputs.memory.grad = None
    plain, expected_inputs = decoder_of(), Inputs("shared")
    expected = gradients(plain, expected_inputs, run(plain, expected_inputs, "scope"))
    assert_equal(gradients(decoder, inputs, run(decoder, inputs, "scope")), expected)


@pytest.mark.parametrize("way", ("scope", "keyword"))
@pytest.mark.parametrize(
    "kind", [kind for kind in ("fairscale", "megatron", "non-reentrant") if kind in KINDS]
)
def test_uninstall_before_a_recomputation_is_an_error(patched, kind, way):
    decoder, inputs = decoder_of("module", kind), Inputs()
    out = run(decoder, inputs, way)
    without_bias = decoder_of("module", kind)(inputs.query, inputs.memory, inputs.memory)
    flashbias_patch.uninstall()
    with pytest.raises(
        RuntimeError, match=r"uninstalled after a checkpoint's forward.*uninstall\(\) after"
    ):
        out.sum().backward()
    if kind != "non-reentrant":  # torch's own compares what both passes save
        without_bias.sum().backward()


@pytest.mark.parametrize("dense", (False, True), ids=("factors", "dense"))
@pytest.mark.parametrize("place", ("layer", "inner"))
@pytest.mark.parametrize("kind", MAKES)
def test_a_bias_changed_in_place_before_a_recomputation_is_an_error(patched, kind, place, dense):
    decoder, inputs = decoder_of(place, kind), Inputs()
    bias = inputs.bias(dense)
    with flashbias_patch.attention_bias(bias):
        outs = [decoder(inputs.query, inputs.memory, inputs.memory) for _ in range(2)]
    outs[0].sum().backward()
    with torch.no_grad():
        (bias if dense else bias.q_factor).mul_(-1.0)
    with pytest.raises(
        RuntimeError, match="changed in place after a checkpoint's forward.*change a copy"
    ):
        outs[1].sum().backward()
    with flashbias_patch.attention_bias(bias):  # as it is now
        decoder(inputs.query, inputs.memory, inputs.memory).sum().backward()


@pytest.mark.parametrize("layers", ((0,), (1,), (0, 1)))
@pytest.mark.parametrize("kind", ("fairscale", "megatron"))
def test_a_pass_that_also_differentiates_what_the_bias_is_made_of(patched, kind, layers):
    """As the supervision of a router: the pass frees the graph behind the bias."""
    results = []
    for around in (None, kind):
        decoder, inputs = decoder_of(), Inputs("shared")
        for index in layers if around else ():
            decoder.layers[index] = checkpointed(decoder.layers[index], around)
        weights = torch.sin(inputs.scale)
        with flashbias_patch.attention_bias(LowRankBias(weights * inputs.a, inputs.b)):
            out = decoder(inputs.query, inputs.memory, inputs.memory)
        results.append(gradients(decoder, inputs, loss_of(out, 0) + weights.exp()))
    assert_equal(results[1], results[0])
