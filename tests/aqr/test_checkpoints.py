"""A transformer with a router under checkpoints: losses and every gradient as without, drop and
supervision too."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from flashbias_patch import aqr
from tests.support.checkpoints import KINDS, checkpointed

from . import family

PLACES = ("transformer", "decoder", "layers")
QUICK = [(place, "drop, locality") for place in PLACES] + [("layers", "drop, windows")]
OPTIONS = {
    "per layer": dict(per="layer"),
    "locality": dict(locality=True),
    "drop": dict(drop=0.7, supervision=0.5),
    "drop, locality": dict(drop=0.7, supervision=0.5, locality=True, cameras=family.V),
    "drop, windows": dict(
        drop=0.7, supervision=0.5, bias="window", window=3, camera_windows="all", per="layer"
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    from flashbias_patch.attention import selfcheck

    monkeypatch.setattr(
        selfcheck, "check", lambda *given: None
    )  # seconds, and nothing that is tested here


class Positional(torch.nn.Module):
    """Keyword tensors as positional ones: what checkpoints of other libraries look at for
    gradients."""

    def __init__(self, module, kind, names):
        super().__init__()
        self.module, self.kind, self.names = module, kind, names

    def forward(self, *args, **kwargs):
        names = [name for name in self.names if name in kwargs]
        rest = {name: value for name, value in kwargs.items() if name not in names}

        def function(*given):
            return self.module(*given[: len(args)], **dict(zip(names, given[len(args) :])), **rest)

        return KINDS[self.kind](function, *args, *(kwargs[name] for name in names))


def head_of(options, place=None, kind=None):
    torch.manual_seed(0)
    transformer = family.CmtTransformer(aqr=dict(enable=True, **options))
    with torch.no_grad():
        transformer.aqr.segment_proj.mul_(30)
    head = family.CmtHead(transformer).double().train()
    if place is None:
        return head
    names = ("query", "key", "value", "query_pos", "key_pos")
    wrap = (
        functools.partial(checkpointed, kind=kind)
        if kind.startswith("wrapper")
        else (lambda module: Positional(module, kind, names))
    )
    if place == "transformer":
        head.transformer = wrap(transformer)
    elif place == "decoder":
        transformer.decoder = wrap(transformer.decoder)
        transformer.decoder.__dict__["layers"] = ()
    else:
        transformer.decoder.layers = torch.nn.ModuleList(map(wrap, transformer.decoder.layers))
    return head


def train(head, steps=2):
    """Losses and gradients of some steps, each of two forwards before their backward."""
    given, _, _ = family.inputs("CmtTransformer")
    reference, metas = family.geometry()
    x, x_img = given["x"].double().requires_grad_(), given["x_img"].double().requires_grad_()
    losses = []
    for _ in range(steps):
        parts = []
        for _ in range(2):
            outs = head(x, x_img, metas, reference.double())
            parts.append(head.loss(outs))
        for part in reversed(parts):
            losses.append({name: loss.item() for name, loss in part.items()})
            sum(part.values()).backward()
    names = {
        n.replace("_checkpoint_wrapped_module.", "").replace("module.", ""): p
        for n, p in head.named_parameters()
    }
    return losses, {"x": x.grad, "x_img": x_img.grad, **{n: p.grad for n, p in names.items()}}


@pytest.mark.parametrize(
    "kind, place, options",
    [
        pytest.param(*case, marks=() if case[1:] in QUICK else pytest.mark.slow)
        for case in itertools.product(KINDS, PLACES, OPTIONS)
    ],
)
def test_as_without_a_checkpoint(claimed, kind, place, options):
    expected_losses, expected = train(head_of(OPTIONS[options]))
    losses, found = train(head_of(OPTIONS[options], place, kind))
    for ours, theirs in zip(losses, expected_losses):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        if exact is None:
            assert found[name] is None or not found[name].any(), name
        else:
            assert found[name] is not None, name
            torch.testing.assert_close(
                found[name], exact, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_recomputation_is_not_recorded_and_draws_nothing(claimed):
    head = head_of(OPTIONS["drop"], "transformer", "non-reentrant")
    with aqr.record_routing() as seen:
        train(head, 1)
    assert len(seen) == 2
