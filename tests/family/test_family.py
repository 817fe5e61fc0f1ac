"""Every variant of seam and registration, patched against unpatched: one table of classes, one of
calls."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import flashbias_patch
from flashbias_patch.patching import install
from tests import stand_ins
from tests.support import capabilities, internals
from tests.support.reference import attention

E, H, B, M, N = 16, 2, 2, 5, 9
PETR = stand_ins.UTILS + ".petr_transformer"
VARIANTS = stand_ins.UTILS + ".variants"

# repository, module, class (or the name it has there), constructor's keywords
OUTER = {
    "mmcv": ("petr", "mmcv.cnn.bricks.transformer", "MultiheadAttention", {}),
    "cmt": ("cmt", PETR, "PETRMultiheadAttention", {}),
    "cmt-batch-first": ("cmt", PETR, "PETRMultiheadAttention", {"batch_first": True}),
    "streampetr": ("streampetr", PETR, "PETRMultiheadAttention", {}),
    "streampetr-batch-first": ("streampetr", PETR, "PETRMultiheadAttention", {"batch_first": True}),
    "petr": ("petr", PETR, "PETRMultiheadAttention", {}),
    "mome": ("mome", PETR, "PETRMultiheadAttention", {}),
    "mmengine": ("mmdet3d", "projects.PETR.petr.petr_transformer", "PETRMultiheadAttention", {}),
    "returns-weights": ("variants", VARIANTS, "ReturnsWeights", {}),
    "returns-feature": ("variants", VARIANTS, "ReturnsFeature", {"batch_first": True}),
    "subclass": ("variants", VARIANTS, "Subclass", {}),
    "nested-super": ("variants", VARIANTS, "NestedSubclass", {}),
    "group": ("variants", VARIANTS, "GroupMultiheadAttention", {"group": 1}),
}
FLASH = {
    name: (name, PETR, "PETRMultiheadFlashAttention", {"attn_drop": drop})
    for name, drop in (("cmt", 0.0), ("streampetr", 0.1), ("mome", 0.1))
}


def keep_one(mask):
    """A mask with no row that masks every key: what torch makes of such a row is NaN."""
    mask[..., 0] = False
    return mask


def masks(seed=5):
    torch.manual_seed(seed)
    boolean = keep_one(torch.rand(M, N) < 0.4)
    return {
        "none": {},
        "bool (M,N)": {"attn_mask": boolean},
        "float (M,N)": {"attn_mask": torch.randn(M, N).masked_fill(boolean, float("-inf"))},
        "bool (B*H,M,N)": {"attn_mask": keep_one(torch.rand(B * H, M, N) < 0.4)},
        "float (B*H,M,N)": {"attn_mask": torch.randn(B * H, M, N, requires_grad=True)},
        "padding bool": {"key_padding_mask": keep_one(torch.rand(B, N) < 0.4)},
        "padding float": {"key_padding_mask": torch.zeros(B, N)},
        "both": {"attn_mask": boolean, "key_padding_mask": keep_one(torch.rand(B, N) < 0.4)},
    }


def load_patched(load, module):
    """Import a stand-in's module with the patches on, whatever other stand-ins this process has
    seen.

    Post-import hooks act once a process, and the stand-ins share their names: installing again
    finds what is loaded.
    """
    flashbias_patch.install()  # flash_attn's names, where the module imports them
    loaded = load(module)
    flashbias_patch.uninstall()
    flashbias_patch.install()
    return loaded


@contextlib.contextmanager
def stand_in(entry):
    """An instance of a table's class; patches are off afterwards."""
    repository, module, name, keywords = entry
    with stand_ins.repository(repository) as load:
        cls = getattr(load_patched(load, module), name)
        torch.manual_seed(0)
        yield cls(E, H, **keywords)
        flashbias_patch.uninstall()


def leaves_of(module, positions=True):
    torch.manual_seed(1)
    first = getattr(module, "batch_first", False) and "Flash" not in type(module).__name__
    names = {"query": M, "key": N, "value": N}
    if positions:
        names.update(query_pos=M, key_pos=N)
    return {
        k: torch.randn(*((B, n, E) if first else (n, B, E)), requires_grad=True)
        for k, n in names.items()
    }


def results(module, args, kwargs, leaves):
    """The output and the gradient of every leaf and parameter."""
    everything = [*leaves, *module.parameters()]
    for tensor in everything:
        tensor.grad = None
    out = module(*args, **kwargs)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return [out.detach()] + [None if t.grad is None else t.grad.clone() for t in everything]


def compare(module, args, kwargs, leaves, answered=True):
    flashbias_patch.uninstall()
    theirs = results(module, args, kwargs, leaves)
    flashbias_patch.install()
    before = dict(flashbias_patch.status()["calls"])
    ours = results(module, args, kwargs, leaves)
    counts = {k: v - before.get(k, 0) for k, v in flashbias_patch.status()["calls"].items()}
    assert bool(sum(v for k, v in counts.items() if k != "original")) is answered, counts
    assert len(ours) == len(theirs)
    for mine, base in zip(ours, theirs):
        assert (mine is None) == (base is None)
        if base is not None:
            torch.testing.assert_close(mine, base, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("name", list(OUTER))
def test_outer_class_with_every_mask(name, mask):
    with stand_in(OUTER[name]) as module:
        tensors, extra = leaves_of(module), masks()[mask]
        learned = [t for t in extra.values() if t.requires_grad]
        compare(module.eval(), (), {**tensors, **extra}, [*tensors.values(), *learned])


FORMS = {
    "query only": lambda t: ((t["query"],), {}),
    "query and key": lambda t: ((t["query"], t["key"]), {}),
    "positional": lambda t: (
        (
            t["query"],
            t["key"],
            t["value"],
            t["query_pos"],
            t["query_pos"],
            t["key_pos"],
            None,
            None,
        ),
        {},
    ),
    "keywords": lambda t: ((), dict(t)),
    "identity": lambda t: ((t["query"], t["key"], t["value"]), {"identity": t["query_pos"]}),
    "one tensor thrice": lambda t: (
        (t["query"], t["query"], t["query"]),
        {"query_pos": t["query_pos"]},
    ),
    "unknown keywords": lambda t: (
        (t["query"], t["key"]),
        {"reference_points": None, "spatial_shapes": 3},
    ),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", list(OUTER))
def test_outer_class_called_every_way(name, form):
    with stand_in(OUTER[name]) as module:
        tensors = leaves_of(module)
        args, kwargs = FORMS[form](tensors)
        compare(module.train(name != "group"), args, kwargs, list(tensors.values()))


@pytest.mark.parametrize("name", ["mmcv", "cmt", "streampetr", "returns-weights"])
def test_the_old_name_of_identity(name):
    """mmcv renames `residual`; the shim sits outside that decorator."""
    with stand_in(OUTER[name]) as module:
        t = leaves_of(module)
        compare(
            module,
            (t["query"], t["key"]),
            {"residual": t["query_pos"]},
            [t["query"], t["key"], t["query_pos"]],
        )


@pytest.mark.parametrize("name", list(OUTER) + ["flash-" + name for name in FLASH])
def test_instances_do_not_notice(name):
    """Copies, pickles and state dicts of patched and unpatched instances are interchangeable."""
    entry = FLASH[name[6:]] if name.startswith("flash-") else OUTER[name]
    with stand_in(entry) as module:
        t = leaves_of(module)
        out = module(t["query"], t["key"])
        copies = [copy.deepcopy(module)]
        if (
            entry[0] != "variants"
        ):  # one module that defines several classes of one name: pickle refuses, as ever
            copies.append(pickle.loads(pickle.dumps(module)))
        for copied in copies:
            assert list(copied.state_dict()) == list(module.state_dict())
            torch.testing.assert_close(copied(t["query"], t["key"]), out)
        flashbias_patch.uninstall()
        untouched = copy.deepcopy(module)
        assert list(untouched.state_dict()) == list(module.state_dict())
        untouched.load_state_dict(module.state_dict())


def plain_flash(module, query, key, value, query_pos=None, key_pos=None):
    """What the flash classes mean: their prelude, and attention over the core's packed weights."""
    core = module.attn
    offsets = (None,) * 3 if core.in_proj_bias is None else core.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).transpose(0, 1).unflatten(-1, (H, -1))
        for x, w, b in zip(
            (query + query_pos, key + key_pos, value), core.in_proj_weight.chunk(3), offsets
        )
    )
    out = attention(q, k, v, dtype=None).flatten(2)
    return query + core.out_proj(out).transpose(0, 1)


@pytest.mark.parametrize("mask", ["none", "bool (M,N)", "padding bool"])
@pytest.mark.parametrize("name", list(FLASH))
def test_flash_class_against_its_formula(name, mask):
    """It runs on CUDA only as it is. It drops boolean masks and padding, patched too."""
    with stand_in(FLASH[name]) as module:
        tensors = leaves_of(module)
        everything = [*tensors.values(), *module.parameters()]
        expected = plain_flash(module, **tensors)
        weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        expected_grads = torch.autograd.grad((expected * weights).sum(), everything)
        ours = results(module, (), {**tensors, **masks()[mask]}, list(tensors.values()))
        for mine, base in zip(ours, [expected, *expected_grads]):
            torch.testing.assert_close(mine, base, rtol=2e-4, atol=2e-5)


def test_flash_core_outside_the_family():
    """FlashMHA in a package of another name, called by no outer class; True keeps a key, as
    flash-attn has it."""
    with stand_ins.repository("isfusion") as load:
        block = load_patched(load, "projects.isfusion.ops.fusion").InstanceFusion(E, H)
        torch.manual_seed(2)
        instances, scene = torch.randn(B, M, E), torch.randn(B, N, E)
        assert block(instances, scene).shape == (B, M, E)
        assert "projects.isfusion.ops.flash" in {
            p["module"] for p in flashbias_patch.status()["patched"]
        }
        keep = torch.rand(B, N) < 0.6
        keep[:, 0] = True
        masked = block.attn(instances, scene, scene, key_padding_mask=keep)[0]
        alone = torch.cat(
            [
                block.attn(instances[b : b + 1], *(scene[b : b + 1, keep[b]],) * 2)[0]
                for b in range(B)
            ]
        )
        torch.testing.assert_close(masked, alone)
        flashbias_patch.uninstall()


@pytest.mark.parametrize(
    "name, asked", [("ReturnsWeights", {"return_attn_weights": True}), ("AlwaysWeights", {})]
)
def test_who_asks_for_weights_gets_them(name, asked):
    with stand_in(("variants", VARIANTS, name, {})) as module:
        t = leaves_of(module)
        flashbias_patch.uninstall()
        expected = module(t["query"], t["key"], **asked)
        flashbias_patch.install()
        out, weights = module(t["query"], t["key"], **asked)
        assert flashbias_patch.status()["calls"].get("original", 0) == 0
        torch.testing.assert_close((out, weights.detach()), (expected[0], expected[1].detach()))


def test_return_feat_gives_the_same_feature():
    with stand_in(OUTER["returns-feature"]) as module:
        t = leaves_of(module)
        compare(module, (t["query"], t["key"]), {"return_feat": True}, [t["query"], t["key"]])


@pytest.mark.parametrize("mask", ["none", "bool (M,N)"])
def test_own_arithmetic_runs_as_it_is(mask):
    """Claimed by name and shape, but there is no core below: the original answers, masks and
    all."""
    with stand_in(("variants", VARIANTS, "OwnArithmetic", {})) as module:
        t = leaves_of(module, positions=False)
        compare(
            module, (t["query"], t["key"]), masks()[mask], [t["query"], t["key"]], answered=False
        )


@pytest.mark.parametrize(
    "name,reason",
    [("NotAModule", None), ("PETRMultiheadFlashAttention", "expected (query, key, value)")],
)
def test_a_name_alone_claims_nothing(name, reason):
    with stand_ins.repository("variants") as load:
        cls = getattr(load_patched(load, VARIANTS), name)
        x = torch.zeros(1)
        assert (cls()(x) if name == "NotAModule" else cls()(x, x)) is x
        install.claim(cls)
        assert all(
            p["module"] != VARIANTS or p["class"] != name
            for p in flashbias_patch.status()["patched"]
        )
        if reason:
            assert any(reason in r["reason"] for r in flashbias_patch.status()["refused"])
        flashbias_patch.uninstall()


def test_internvl_is_left_alone():
    with stand_ins.repository("internvl") as load:
        module = load_patched(load, "internvl.model.flash_attention")
        torch.manual_seed(3)
        core, x = module.FlashMHA(E, H), torch.randn(B, M, E)
        ours = core(x)[0]
        assert not any(
            p["module"].startswith("internvl") for p in flashbias_patch.status()["patched"]
        )
        flashbias_patch.uninstall()
        assert torch.equal(core(x)[0], ours)


def test_two_classes_of_one_name_are_each_patched():
    with stand_ins.repository("variants") as load:
        module = load_patched(load, VARIANTS)
        owners = internals.patched_owners()
        assert {module.ReturnsWeights, module.AlwaysWeights, module.ReturnsFeature} <= owners
        flashbias_patch.uninstall()
        assert "__wrapped__" not in vars(module.ReturnsFeature.forward)


@pytest.mark.parametrize("training", [True, False])
def test_the_half_wrapper(training):
    """StreamPETR's inner attention: in half through auto_fp16 when training, in float32 when
    not."""
    if training and not capabilities.half_runs_here():
        pytest.skip("this torch has no half arithmetic on the CPU")
    with stand_in(("streampetr", PETR, "PETRMultiheadAttention", {"fp16": True})) as module:
        if training:
            module.attn.half()  # what autocast does with weights on a GPU
        module.train(training)
        t = leaves_of(module)
        flashbias_patch.uninstall()
        theirs = results(module, (t["query"], t["key"]), {}, [t["query"], t["key"]])
        flashbias_patch.install()
        ours = results(module, (t["query"], t["key"]), {}, [t["query"], t["key"]])
        assert sum(v for k, v in flashbias_patch.status()["calls"].items() if k != "original") == 1
        tolerance = dict(rtol=1e-2, atol=1e-2) if training else dict(rtol=2e-4, atol=2e-5)
        for mine, base in zip(ours, theirs):
            assert mine.dtype == base.dtype
            torch.testing.assert_close(mine, base, **tolerance)
