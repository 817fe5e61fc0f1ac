"""Generated calls of patched classes: each equals the unpatched class, or raises an error that says
something.

Output and gradients are compared with the class in float64, its attention worked out by
`exact_attention`. They may err by twice what plain PyTorch errs by in the call's precision, and by
a little that zeros would not pass. A row with every key masked, which is NaN unpatched, is zero
there.

FLASHBIAS_FUZZ=20000 sets the number of calls (default 300).
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import flashbias_patch
from flashbias_patch import telemetry
from flashbias_patch.attention.recovery import guard
from flashbias_patch.bias import Grid, LowRankBias, WindowBias, described
from tests import stand_ins

CALLS = int(os.environ.get("FLASHBIAS_FUZZ", "300"))
# How many roundings of the size of what is compared are let pass, whatever plain PyTorch's error
# is: scores are up to 200. What is exact has float64's own error, which is the size of a score at
# -1e9.
DTYPES = {"float32": 200, "float64": 1e10, "bfloat16": 12}
# What torch answers is drawn more often than what it refuses.
MASKS = ("none", "bool", "float", "heads bool", "heads float", "grad") * 4
MASKS += ("byte", "integer", "wrong shape", "number")
PADDINGS = ("none", "none", "bool", "float") * 5 + ("byte", "wrong shape", "text")
NONSENSE = (
    "no query",
    "text",
    "integers",
    "other dtype",
    "other width",
    "two dims",
    "other batch",
    "values longer",
    "meta device",
    "numpy",
)
STRIDES = ("plain", "transposed", "sliced", "expanded", "negative-free view")
VALUES = (float("-inf"),) * 3 + (-1e4, -1e9, "least", 1e9)  # of what a float mask hides
BIASES = (0, 0, 0, 1, 3, "windows", "window tensor")  # a number is the rank of a LowRankBias
seen: Counter = Counter()


@st.composite
def calls(draw):
    return dict(
        cls=draw(st.sampled_from(("PETRMultiheadAttention", "MultiheadAttention"))),
        B=draw(st.integers(1, 3)),
        M=draw(st.one_of(st.integers(1, 9), st.integers(0, 40))),
        N=draw(st.one_of(st.integers(1, 9), st.integers(0, 70))),
        H=draw(st.sampled_from((1, 2, 4))),
        D=draw(st.sampled_from((1, 3, 4, 8))),
        dtype=draw(st.sampled_from(("float32", "float32", *DTYPES))),
        batch_first=draw(st.booleans()),
        training=draw(st.booleans()),
        grad=draw(st.booleans()),
        mask=draw(st.sampled_from(MASKS)),
        padding=draw(st.sampled_from(PADDINGS)),
        key=draw(st.sampled_from(("given", "query", "none", "shared"))),
        positions=draw(st.booleans()),
        strides=draw(st.sampled_from(STRIDES)),
        bias=draw(st.sampled_from(BIASES)),
        nonsense=draw(st.sampled_from((None,) * 40 + NONSENSE)),
        masked=draw(st.sampled_from((0.0, 0.3, 1.0))),
        value=draw(st.sampled_from(VALUES)),
        size=draw(st.sampled_from((1.0, 1.0, 8.0))),
        seed=draw(st.integers(0, 2**20)),
        guarded=draw(st.booleans()),
    )


class Case:
    """The tensors of one call, in its dtype, or what that has of them in float64 (`exact`)."""

    def __init__(self, c, exact=False):
        self.c, self.dtype = c, getattr(torch, c["dtype"])
        self.kept = torch.float64 if exact else self.dtype
        # Half of float64's: what is exact has no room for the sum of two.
        least = torch.finfo(self.dtype).min / (2 if self.dtype == torch.float64 else 1)
        self.value = least if c["value"] == "least" else c["value"]
        self.g = torch.Generator().manual_seed(c["seed"])
        self.leaves = []
        E, N = c["H"] * c["D"], c["N"]
        self.M, self.N = c["M"], c["M"] if c["key"] in ("query", "none") else N
        query = self.sequence(self.M, E)
        key = {
            "given": lambda: self.sequence(N, E),
            "shared": lambda: self.sequence(N, E),
            "query": lambda: query,
            "none": lambda: None,
        }[c["key"]]()
        value = self.sequence(N, E) if c["key"] == "given" else key
        self.call = dict(
            query=query,
            key=key,
            value=value,
            attn_mask=self.mask(),
            key_padding_mask=self.padding(),
        )
        if c["positions"]:
            self.call.update(query_pos=self.sequence(self.M, E), key_pos=self.sequence(self.N, E))
        self.bias = None
        if c["bias"] in ("windows", "window tensor"):
            self.bias = self.windows() if self.M and self.N else None
        elif c["bias"]:
            R = c["bias"]
            self.bias = LowRankBias(
                torch.randn(1, self.M, c["H"], R, generator=self.g),
                torch.randn(c["B"], self.N, 1, R, generator=self.g),
            )
        self.spoil()

    def sequence(self, length, E):
        B = self.c["B"]
        shape = [B, length, E] if self.c["batch_first"] else [length, B, E]
        kind = self.c["strides"]
        if kind == "transposed":
            leaf = torch.randn(shape[2], shape[1], shape[0], generator=self.g)
        elif kind == "sliced":
            leaf = torch.randn(shape[0], shape[1], 2 * E + 1, generator=self.g)
        elif kind == "expanded":
            leaf = torch.randn(shape[0], 1, E, generator=self.g)
        else:
            leaf = torch.randn(shape, generator=self.g)
        leaf = (leaf * self.c["size"]).to(self.dtype).to(self.kept).requires_grad_(self.c["grad"])
        self.leaves.append(leaf)
        if kind == "transposed":
            return leaf.transpose(0, 2)
        if kind == "sliced":
            return leaf[..., 1::2]
        return leaf.expand(shape) if kind == "expanded" else leaf.view(shape)

    def mask(self):
        kind, c = self.c["mask"], self.c
        if kind == "none":
            return None
        if kind == "number":
            return 3.0
        shape = (self.M, self.N)
        if kind.startswith("heads"):
            shape = (c["B"] * c["H"], *shape)
        if kind == "wrong shape":
            shape = (self.M + 1, self.N + 2)
        hidden = torch.rand(shape, generator=self.g) < c["masked"]
        if kind in ("float", "heads float", "grad"):
            mask = (
                torch.randn(shape, generator=self.g)
                .to(self.dtype)
                .masked_fill(hidden, self.value)
                .to(self.kept)
            )
            if kind == "grad":
                self.leaves.append(mask.requires_grad_(c["grad"]))
            return mask
        return hidden.to({"byte": torch.uint8, "integer": torch.int64}.get(kind, torch.bool))

    def windows(self):
        """On one grid or two, some clipped, some outside."""
        c, g = self.c, self.g
        first = self.N // 3 * 2
        sizes = [
            (rows, columns) for rows, columns in ((first // 2, 2), (self.N - first, 1)) if rows
        ]
        frames = [Grid(*size) for size in sizes]
        centres = torch.randint(-1, 6, (c["B"], self.M, len(frames), 3), generator=g)
        centres[..., 0] = 0
        weights = torch.randn(c["B"], self.M, len(frames), generator=g)
        return WindowBias(
            weights, centres, frames, 1 + c["seed"] % 5, None if c["seed"] % 2 else 1.5
        )

    def given_bias(self):
        """The bias, or the same as a tensor (B*H, M, N) that is a description."""
        if self.c["bias"] != "window tensor":
            return self.bias
        return (
            described(self.bias)
            .unsqueeze(1)
            .expand(-1, self.c["H"], -1, -1)
            .reshape(-1, self.M, self.N)
        )

    def padding(self):
        kind, c = self.c["padding"], self.c
        if kind in ("none", "text"):
            return None if kind == "none" else "padding"
        hidden = (
            torch.rand(c["B"], self.N + (kind == "wrong shape"), generator=self.g) < c["masked"]
        )
        if kind == "float":
            return (
                torch.zeros(hidden.shape, dtype=self.dtype)
                .masked_fill(hidden, self.value)
                .to(self.kept)
            )
        return hidden.to(torch.uint8) if kind == "byte" else hidden

    def spoil(self):
        kind, call = self.c["nonsense"], self.call
        spoilt = {
            "no query": ("query", lambda t: None),
            "text": ("key", lambda t: "key"),
            "integers": ("query", lambda t: t.long()),
            "two dims": ("query", lambda t: t[0] if len(t) else t.sum(0)),
            "other dtype": (
                "value",
                lambda t: t.to(torch.float64 if self.dtype != torch.float64 else torch.float32),
            ),
            "other width": ("key", lambda t: t[..., :-1]),
            "meta device": ("key", lambda t: t.to("meta")),
            "other batch": ("key", lambda t: torch.cat([t, t], 0 if self.c["batch_first"] else 1)),
            "values longer": (
                "value",
                lambda t: torch.cat([t, t], 1 if self.c["batch_first"] else 0),
            ),
            "numpy": ("key", lambda t: t.detach().float().numpy()),
        }
        if kind is not None and isinstance(call[spoilt[kind][0]], torch.Tensor):
            name, change = spoilt[kind]
            call[name] = change(call[name])

    def run(self, forward, module, **more):
        """(output, gradients of leaves and parameters), or the exception."""
        wanted = [t for t in (*self.leaves, *module.parameters()) if t.requires_grad]
        try:
            with torch.set_grad_enabled(self.c["grad"]):
                out = forward(module, **{**self.call, **more})
                if not self.c["grad"] or not out.requires_grad:
                    return out, []
                # What is not a number unpatched has no gradient to compare with.
                g = (
                    torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
                    .to(self.dtype)
                    .to(out.dtype)
                )
                return out.detach(), torch.autograd.grad((out * g).sum(), wanted, allow_unused=True)
        except Exception as error:
            return error, []


def exact_attention(
    module, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **_
):
    """nn.MultiheadAttention.forward in the operators of its formula; a row whose keys are all at
    -inf gives zeros."""
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value = query[:, None], key[:, None], value[:, None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    (M, B, E), N, H = query.shape, key.shape[0], module.num_heads
    parts = zip((query, key, value), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3))
    q, k, v = (
        F.linear(x, w, b).view(len(x), B, H, E // H).permute(1, 2, 0, 3) for x, w, b in parts
    )
    s = (q * (E // H) ** -0.5) @ k.transpose(-1, -2)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(B, H, M, N)
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is not None:
            s = s + mask if mask.is_floating_point() else s.masked_fill(mask, float("-inf"))
    dead = (s == float("-inf")).all(-1, keepdim=True) if N else torch.zeros(1, dtype=torch.bool)
    p = torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    out = F.linear(
        (p @ v).permute(2, 0, 1, 3).reshape(M, B, E), module.out_proj.weight, module.out_proj.bias
    )
    return out[:, 0] if unbatched else out.transpose(0, 1) if module.batch_first else out, None


def by_formula(forward, case, module, **more):
    """`case` by the class's own forward around exact_attention."""
    module = copy.deepcopy(module).to(case.kept)
    module.attn.forward = functools.partial(exact_attention, module.attn)
    return case.run(forward, module, **more)


def compare(ours, plain, exact, dtype):
    """Each tensor errs by no more than twice `plain`'s error and some roundings; counted is where
    zeros would not."""
    sizes = [0.0 if t is None or not t.numel() else t.abs().max().item() for t in exact]
    whole = max(sizes, default=0.0)
    for mine, low, true, size in zip(ours, plain, exact, sizes):
        if true is None or not true.numel():
            assert mine is None or not mine.any()
            continue
        error = 0.0 if low is None else (low.double() - true).abs().max().item()
        rounding = DTYPES[str(dtype)[6:]] * torch.finfo(dtype).eps * (size + 0.05 * whole)
        found = size if mine is None else (mine.double() - true).abs().max().item()
        assert found <= 2 * error + rounding, (found, error, rounding, size)
        if size > 0.05 * whole:
            seen["compared tensors"] += 1
            seen["zeros would not pass"] += size > 2 * error + rounding


@pytest.fixture(scope="module")
def classes():
    """{name: (class, its forward before it was patched)}."""
    with stand_ins.repository("petr") as load:
        found = [
            load(f"{stand_ins.UTILS}.petr_transformer").PETRMultiheadAttention,
            load("mmcv.cnn.bricks.transformer").MultiheadAttention,
        ]
        yield {cls.__name__: (cls, cls.forward) for cls in found}


def test_generated_calls(classes, caplog, monkeypatch):
    flashbias_patch.install()
    assert all(cls.forward is not before for cls, before in classes.values())
    warnings.simplefilter("ignore")

    @settings(
        max_examples=CALLS,
        deadline=None,
        database=None,
        derandomize=CALLS == 300,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def one(c):
        cls, before = classes[c["cls"]]
        torch.manual_seed(0)
        module = cls(
            c["H"] * c["D"],
            c["H"],
            attn_drop=0.0 if c["training"] else 0.3,
            batch_first=c["batch_first"],
        )
        module.to(getattr(torch, c["dtype"])).train(c["training"])
        case = Case(c)
        more, dense = {}, {}
        if case.bias is not None:
            assume(c["mask"] in ("none", "float", "bool", "heads float", "heads bool"))
            more["attention_bias"] = case.given_bias()
            dense["attn_mask"] = _dense(case)
        monkeypatch.setattr(guard, "LARGE", 0 if c["guarded"] else 1 << 40)
        ours, our_grads = case.run(cls.forward, module, **more)
        theirs, their_grads = case.run(before, module, **dense)
        if isinstance(theirs, Exception):
            if isinstance(ours, Exception):
                seen["both refuse"] += 1
                assert str(ours).strip(), f"a refusal without a word: {type(ours)}"
            else:
                seen["only unpatched refuses"] += 1
                assert _more_lenient(c), f"answered what unpatched refuses: {theirs}"
            return
        if c["nonsense"] == "meta device" and isinstance(ours, ValueError):
            assert "on one device" in str(
                ours
            )  # unpatched, torch's meta kernels happen not to look
            return
        assert not isinstance(ours, Exception), (
            f"refused what unpatched answers: {type(ours).__name__}: {ours}"
        )
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        if theirs.device.type == "meta":
            return
        seen["compared"] += 1
        twin = Case(c, exact=True)
        wide = {name: _dense(twin) for name in dense}
        exact, exact_grads = by_formula(before, twin, module, **wide)
        plain, plain_grads = by_formula(before, case, module, **dense)
        finite = (
            theirs.isfinite()
        )  # unpatched, a row with every key masked is not a number; ours is its identity
        seen["rows without keys"] += not finite.all()
        compare(
            [theirs[finite]], [plain[finite]], [exact[finite]], case.dtype
        )  # the formula is the class's
        compare([ours, *our_grads], [plain, *plain_grads], [exact, *exact_grads], case.dtype)

    one()
    print(
        dict(seen),
        dict(telemetry.calls),
        [f for f in telemetry.fallbacks() if "original" not in f["reason"]],
    )
    assert (
        seen["zeros would not pass"] > 0.9 * seen["compared tensors"]
        and seen["rows without keys"] > CALLS / 30
    )
    assert seen["compared"] > CALLS / 3 and seen["both refuse"] > CALLS / 20
    assert telemetry.calls["sdpa"] > CALLS / 10 and telemetry.calls["reference"] > 0
    assert not [f for f in telemetry.fallbacks() if "self-check" in f["reason"]]


def _dense(case):
    bias = (
        case.bias.to(dtype=torch.promote_types(case.kept, torch.float32))
        .dense()
        .expand(case.c["B"], case.c["H"], -1, -1)
    )
    mask = case.call["attn_mask"]
    if mask is not None:
        mask = mask.view(case.c["B"], case.c["H"], *mask.shape[1:]) if mask.dim() == 3 else mask
        bias = bias.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
    return bias.flatten(0, 1).to(case.kept)


def _more_lenient(c):
    """What is answered here though nn.MultiheadAttention refuses it: byte masks (as bool), mixed
    mask kinds."""
    return "byte" in (c["mask"], c["padding"]) or c["M"] == 0 or c["N"] == 0
