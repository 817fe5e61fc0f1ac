"""Against the real mmengine and mmcv 2.x: the registry, mmcv's own attention, Runner, distributed
training."""

from __future__ import annotations

import os

import pytest

pytest.importorskip(
    "mmengine.runner", reason="needs mmengine and mmcv 2.x: tools/openmmlab_env.sh v2"
)

import torch
from mmcv.cnn.bricks.transformer import BaseTransformerLayer
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner

import flashbias_patch
from tests import stand_ins

from .helpers import Detector, E, H, assert_same, batches, both_ways, inputs, two_processes

pytestmark = pytest.mark.openmmlab
HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = "projects.PETR.petr.petr_transformer"


@pytest.fixture(scope="module", autouse=True)
def repository():
    """The stand-in of mmdet3d's projects/PETR on the real mmengine, imported once."""
    with stand_ins.repository("mmdet3d", openmmlab=False) as load:
        flashbias_patch.install()
        module = load(MODULE)
        flashbias_patch.uninstall()
        yield module


def layer():
    return BaseTransformerLayer(
        attn_cfgs=[
            dict(type="MultiheadAttention", embed_dims=E, num_heads=H),
            dict(type="PETRMultiheadAttention", embed_dims=E, num_heads=H),
        ],
        ffn_cfgs=dict(
            type="FFN", embed_dims=E, feedforward_channels=64, num_fcs=2, act_cfg=dict(type="ReLU")
        ),
        operation_order=("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
    )


def test_classes_are_found_in_the_real_registry(installed, repository):
    patched = {(p["module"], p["class"]) for p in flashbias_patch.status()["patched"]}
    assert {
        ("mmcv.cnn.bricks.transformer", "MultiheadAttention"),
        (MODULE, "PETRMultiheadAttention"),
    } <= patched


def test_a_class_registered_after_install_is_patched(installed, monkeypatch):
    def forward(self, query, key=None, value=None, attn_mask=None, key_padding_mask=None, **kw):
        return query

    monkeypatch.setattr(MODELS, "_module_dict", dict(MODELS._module_dict))
    cls = type(
        "PETRMultiheadAttention", (torch.nn.Module,), {"forward": forward, "__module__": __name__}
    )
    MODELS.register_module(module=cls, force=True)
    expected = {"class": "PETRMultiheadAttention", "module": __name__, "seam": "outer"}
    assert expected in flashbias_patch.status()["patched"]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["MultiheadAttention", "PETRMultiheadAttention"])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding"])
def test_attention_parity(kind, batch_first, masks):
    module = MODELS.build(dict(type=kind, embed_dims=E, num_heads=H, batch_first=batch_first))
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


def test_layer_built_from_config():
    given, mask = inputs()

    def call(m):
        return m(
            given["query"],
            key=given["key"],
            value=given["key"],
            query_pos=given["query_pos"],
            key_pos=given["key_pos"],
            attn_masks=[mask, None],
        )

    assert_same(*both_ways(layer(), call, list(given.values())))


class Trainable(BaseModel):
    """mmengine's runner calls forward(mode="loss")."""

    def __init__(self):
        super().__init__()
        self.detector = Detector(layer())

    def forward(self, inputs, mode="loss"):
        return {"loss": self.detector.loss(inputs)}


def train(work_dir, patched, iterations, resume=None, skip=0):
    torch.manual_seed(0)
    model = Trainable()
    (flashbias_patch.install if patched else flashbias_patch.uninstall)()
    dataset = [{"inputs": batch} for batch in batches(4)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, collate_fn=lambda items: items[0])
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader,
        resume=resume is not None,
        load_from=resume,
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        experiment_name=f"{work_dir.name}",
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=1e-2, momentum=0.9), clip_grad=dict(max_norm=35)
        ),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False)),
        log_level="ERROR",
    )
    runner.train()
    return runner.model


@pytest.mark.parametrize(
    "first,second", [(False, True), (True, False)], ids=["unpatched-first", "patched-first"]
)
def test_checkpoint_and_resume_across(tmp_path, monkeypatch, first, second):
    """Two steps one way, saved, two steps the other way: as four steps without the package.

    Patched, mmengine's checkpoint loads on torch >= 2.6 by itself (the compatibility patch
    mmengine_checkpoint).
    """
    if not second:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    reference = train(tmp_path / "reference", False, 4).state_dict()
    begun = train(tmp_path / "begun", first, 2)
    resumed = train(
        tmp_path / "resumed", second, 4, resume=str(tmp_path / "begun" / "iter_2.pth")
    ).state_dict()
    assert list(begun.state_dict()) == list(resumed) == list(reference)
    for name in reference:
        torch.testing.assert_close(resumed[name], reference[name], rtol=1e-4, atol=1e-4)


def test_distributed_two_processes(tmp_path):
    """MMDistributedDataParallel over gloo: gradients of two patched ranks are those of one
    unpatched process."""
    two_processes(os.path.join(HERE, "ddp_mmengine.py"), tmp_path)
    torch.manual_seed(0)
    model = Trainable()
    sum(model(batch)["loss"] for batch in batches(2)).div(2).backward()
    for rank in range(2):
        record = torch.load(tmp_path / f"rank{rank}.pt")
        assert record["answered"] > 0
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(record["grads"][name], parameter.grad, rtol=1e-4, atol=1e-5)
