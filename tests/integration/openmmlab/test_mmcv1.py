"""Against the real mmcv 1.x: registries, BaseTransformerLayer, half precision hooks, Runner,
distributed training."""

from __future__ import annotations

import copy
import logging
import os
import pickle

import pytest

pytest.importorskip("mmcv.runner", reason="needs mmcv 1.x: tools/openmmlab_env.sh v1")

import torch
from mmcv.cnn.bricks.registry import ATTENTION, TRANSFORMER_LAYER
from mmcv.runner import (
    CheckpointHook,
    Fp16OptimizerHook,
    IterBasedRunner,
    OptimizerHook,
    auto_fp16,
    wrap_fp16_model,
)
from mmcv.utils import build_from_cfg

import flashbias_patch
from tests import stand_ins

from .helpers import Detector, E, H, assert_same, batches, both_ways, inputs, run, two_processes

pytestmark = pytest.mark.openmmlab
HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope="module", autouse=True)
def repository():
    """CMT's stand-in on the real mmcv. Imported once: the real registries refuse a second
    registration."""
    with stand_ins.repository("cmt", openmmlab=False) as load:
        flashbias_patch.install()
        module = load(stand_ins.UTILS + ".petr_transformer")
        flashbias_patch.uninstall()
        yield module


def attention(kind, **more):
    return build_from_cfg(dict(type=kind, embed_dims=E, num_heads=H, **more), ATTENTION)


def layer_config(with_cp=False, cross="PETRMultiheadAttention", dropout=0.0):
    return dict(
        type="PETRTransformerDecoderLayer",
        with_cp=with_cp,
        attn_cfgs=[
            dict(type="MultiheadAttention", embed_dims=E, num_heads=H, attn_drop=dropout),
            dict(type=cross, embed_dims=E, num_heads=H),
        ],
        ffn_cfgs=dict(
            type="FFN", embed_dims=E, feedforward_channels=64, num_fcs=2, act_cfg=dict(type="ReLU")
        ),
        operation_order=("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
    )


def test_classes_are_found_in_the_real_registries(installed, repository):
    patched = {(p["module"], p["class"]) for p in flashbias_patch.status()["patched"]}
    assert ("mmcv.cnn.bricks.transformer", "MultiheadAttention") in patched
    assert {
        (repository.__name__, name)
        for name in (
            "PETRMultiheadAttention",
            "PETRMultiheadFlashAttention",
            "PETRTransformerDecoderLayer",
        )
    } <= patched


def test_a_class_registered_after_install_is_patched(installed, monkeypatch):
    def forward(self, query, key=None, value=None, attn_mask=None, key_padding_mask=None, **kw):
        return query

    monkeypatch.setattr(ATTENTION, "_module_dict", dict(ATTENTION._module_dict))
    cls = type(
        "PETRMultiheadAttention",
        (ATTENTION.get("PETRMultiheadAttention").__mro__[1],),
        {"forward": forward, "__module__": __name__},
    )
    ATTENTION.register_module(module=cls, force=True)
    expected = {"class": "PETRMultiheadAttention", "module": __name__, "seam": "outer"}
    assert expected in flashbias_patch.status()["patched"]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["MultiheadAttention", "PETRMultiheadAttention"])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding"])
def test_attention_parity(kind, batch_first, masks):
    module = attention(kind, batch_first=batch_first)
    given, _ = inputs(batch_first=batch_first)
    mask, padding = torch.rand(13, 29) < 0.3, torch.rand(2, 29) < 0.3
    mask[:, 0] = padding[:, 0] = False
    extra = {
        "none": {},
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(2 * H, 13, 29)},
        "padding": {"attn_mask": mask, "key_padding_mask": padding},
    }[masks]

    def call(m):
        return m(
            given["query"],
            given["key"],
            query_pos=given["query_pos"],
            key_pos=given["key_pos"],
            **extra,
        )

    assert_same(*both_ways(module, call, list(given.values())))


def test_renamed_argument(repository):
    """mmcv's deprecated_api_warning stays inside: `residual` is `identity`."""
    module, (given, _) = attention("PETRMultiheadAttention"), inputs()
    theirs, ours = both_ways(
        module,
        lambda m: m(given["query"], given["key"], residual=given["query_pos"]),
        [given["query"], given["key"], given["query_pos"]],
    )
    assert_same(theirs, ours)


@pytest.mark.parametrize("with_cp", [False, True])
def test_layer_built_from_config(with_cp):
    layer = build_from_cfg(layer_config(with_cp), TRANSFORMER_LAYER)
    given, mask = inputs()

    def call(m):
        return m(
            given["query"],
            key=given["key"],
            value=given["key"],
            query_pos=given["query_pos"],
            key_pos=given["key_pos"],
            attn_masks=[mask, None],
            key_padding_mask=torch.zeros(2, 29),
        )

    assert_same(*both_ways(layer, call, list(given.values())))


def test_the_flash_class_runs_in_a_real_layer(installed):
    """CUDA only as it is; patched it runs here too, and equals the plain class with the same
    weights."""
    flash = build_from_cfg(layer_config(cross="PETRMultiheadFlashAttention"), TRANSFORMER_LAYER)
    plain = build_from_cfg(layer_config(), TRANSFORMER_LAYER)
    weights = flash.state_dict()
    own = plain.state_dict()
    for name in own:  # flash_attn's class has no projection bias unless its dropout is given
        own[name] = weights.get(name, torch.zeros_like(own[name]))
    plain.load_state_dict(own)
    given, mask = inputs()
    results = [
        run(
            m,
            lambda m: m(
                given["query"], key=given["key"], value=given["key"], attn_masks=[mask, None]
            ),
            [given["query"], given["key"]],
        )[:3]
        for m in (flash, plain)
    ]
    assert_same(*results)


def test_layers_copy_and_pickle(installed):
    layer = build_from_cfg(layer_config(), TRANSFORMER_LAYER)
    given, _ = inputs()
    out = layer(given["query"], key=given["key"], value=given["key"])
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert list(copied.state_dict()) == list(layer.state_dict())
        torch.testing.assert_close(
            copied(given["query"], key=given["key"], value=given["key"]), out
        )


class HalfModel(torch.nn.Module):
    """As a detector does it: `fp16_enabled`, and auto_fp16 on its forward."""

    def __init__(self):
        super().__init__()
        self.fp16_enabled = False
        self.attention = attention("PETRMultiheadAttention")

    @auto_fp16(apply_to=("query", "key"), out_fp32=True)
    def forward(self, query, key):
        return self.attention(query, key)


def test_auto_fp16_and_wrap_fp16_model():
    """The same numbers and dtypes patched, or, where this torch has no half arithmetic on the CPU,
    the same error."""
    model = HalfModel()
    wrap_fp16_model(model)
    assert model.fp16_enabled
    model.half()  # what autocast does on a GPU
    given, _ = inputs()
    leaves = [given["query"], given["key"]]

    def attempt():
        try:
            return run(model, lambda m: m(*leaves), leaves)
        except RuntimeError as error:
            return str(error)

    flashbias_patch.uninstall()
    theirs = attempt()
    flashbias_patch.install()
    ours = attempt()
    if isinstance(theirs, str):
        assert isinstance(ours, str) and "Half" in theirs and "Half" in ours, (theirs, ours)
        return
    assert theirs[0].dtype == ours[0].dtype == torch.float32
    assert_same(theirs, ours, rtol=2e-2, atol=2e-2)


class Trainable(Detector):
    """mmcv's runner calls train_step."""

    def train_step(self, data, optimizer, **kwargs):
        loss = self.loss(data)
        return {"loss": loss, "log_vars": {"loss": float(loss)}, "num_samples": 1}


def trainer(work_dir, patched, hook=None, iterations=4):
    torch.manual_seed(0)
    model = Trainable(build_from_cfg(layer_config(with_cp=True), TRANSFORMER_LAYER))
    (flashbias_patch.install if patched else flashbias_patch.uninstall)()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    runner = IterBasedRunner(
        model,
        optimizer=optimizer,
        work_dir=str(work_dir),
        meta={},
        max_iters=iterations,
        logger=logging.getLogger("openmmlab"),
    )
    runner.register_hook(hook or OptimizerHook(grad_clip=dict(max_norm=35, norm_type=2)))
    runner.register_hook(CheckpointHook(interval=2, by_epoch=False))
    return runner


def assert_same_weights(one, other, tolerance=1e-4):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "first,second", [(False, True), (True, False)], ids=["unpatched-first", "patched-first"]
)
def test_checkpoint_and_resume_across(tmp_path, first, second):
    """Two steps one way, saved, two steps the other way: as four steps without the package."""
    reference = trainer(tmp_path / "reference", patched=False)
    reference.run([batches(4)], [("train", 1)])

    begun = trainer(tmp_path / "begun", patched=first, iterations=2)
    begun.run([batches(4)], [("train", 1)])
    saved = tmp_path / "begun" / "iter_2.pth"
    keys = torch.load(saved, map_location="cpu")["state_dict"].keys()
    assert list(keys) == list(reference.model.state_dict())

    resumed = trainer(tmp_path / "resumed", patched=second, iterations=3)
    resumed.resume(str(saved), map_location="cpu")
    assert (
        resumed.iter == 1
    )  # mmcv counts on after it has saved: iter_2.pth says 1, and two steps are to come
    resumed.run([batches(4)[2:]], [("train", 1)])
    assert_same_weights(resumed.model, reference.model)


def test_fp16_optimizer_hook(tmp_path):
    """The hook wraps the model and scales the loss; without a GPU its scaler is off, and the steps
    are the same."""
    models = []
    for patched in (False, True):
        hook = Fp16OptimizerHook(loss_scale=512.0, grad_clip=dict(max_norm=35, norm_type=2))
        runner = trainer(tmp_path / str(patched), patched, hook)
        runner.run([batches(4)], [("train", 1)])
        models.append(runner.model)
    assert_same_weights(*models)


def test_distributed_two_processes(tmp_path):
    """MMDistributedDataParallel over gloo: gradients of two patched ranks are those of one
    unpatched process."""
    two_processes(os.path.join(HERE, "ddp_mmcv1.py"), tmp_path)
    torch.manual_seed(0)
    model = Trainable(build_from_cfg(layer_config(with_cp=False), TRANSFORMER_LAYER))
    sum(model.loss(batch) for batch in batches(2)).div(2).backward()
    for rank in range(2):
        record = torch.load(tmp_path / f"rank{rank}.pt")
        assert record["answered"] > 0
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(record["grads"][name], parameter.grad, rtol=1e-4, atol=1e-5)
