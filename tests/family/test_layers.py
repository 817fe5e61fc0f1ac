"""Decoder layers of the family: checkpointed, with temporal memory, with a learned mask."""

from __future__ import annotations

import pytest
import torch

import flashbias_patch
from tests import stand_ins

from .test_family import PETR, B, E, H, M, N, keep_one, load_patched, results

ORDER = ("self_attn", "norm", "cross_attn", "norm", "ffn", "norm")


def attentions(cross="PETRMultiheadAttention"):
    return [
        dict(type="MultiheadAttention", embed_dims=E, num_heads=H),
        dict(type=cross, embed_dims=E, num_heads=H),
    ]


def tensors(**lengths):
    torch.manual_seed(4)
    return {name: torch.randn(n, B, E, requires_grad=True) for name, n in lengths.items()}


def compare(module, kwargs, leaves):
    flashbias_patch.uninstall()
    theirs = results(module, (), kwargs, leaves)
    flashbias_patch.install()
    ours = results(module, (), kwargs, leaves)
    assert sum(v for k, v in flashbias_patch.status()["calls"].items() if k != "original") >= 1
    for mine, base in zip(ours, theirs):
        assert (mine is None) == (base is None)
        if base is not None:
            torch.testing.assert_close(mine, base, rtol=2e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("name", ["cmt", "petr", "mome"])
def test_decoder_layer(name, with_cp):
    with stand_ins.repository(name) as load:
        module = load_patched(load, PETR)
        layer = module.PETRTransformerDecoderLayer(attentions(), ORDER, with_cp=with_cp)
        t = tensors(query=M, key=N, value=N, query_pos=M, key_pos=N)
        own = torch.rand(M, M) < 0.3
        own.fill_diagonal_(False)
        compare(
            layer,
            {**t, "attn_masks": [own, None], "key_padding_mask": torch.zeros(B, N)},
            list(t.values()),
        )


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("with_cp", [False, True])
def test_temporal_decoder_layer(with_cp):
    """StreamPETR and Far3D: the self attention's keys are longer than its queries."""
    with stand_ins.repository("streampetr") as load:
        layer = load_patched(load, PETR).PETRTemporalDecoderLayer(attentions(), with_cp=with_cp)
        t = tensors(query=M, key=N, value=N, query_pos=M, key_pos=N, temp_memory=3, temp_pos=3)
        own = keep_one(torch.rand(M, M + 3) < 0.3)
        compare(layer, {**t, "attn_masks": [own, None]}, list(t.values()))


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("with_cp", [False, True])
def test_pme_decoder_learns_its_mask(with_cp):
    """MEFormer: distance * scale + bias as a floating mask with -inf; checkpointed, only patched
    does it learn."""
    with stand_ins.repository("mome") as load:
        module = load_patched(load, stand_ins.UTILS + ".pme_transformer")
        layer = dict(
            type="PETRTransformerDecoderLayer",
            operation_order=("cross_attn", "norm", "ffn", "norm"),
            attn_cfgs=attentions()[1:],
            with_cp=with_cp,
        )
        pme = module.PMETransformer(layer, H)
        t = tensors(query=M, memory=N)
        centers = torch.randn(B, M, 2), torch.randn(B, N, 2)
        denoising = keep_one(torch.rand(M, N) < 0.3)
        call = {**t, "center": centers[0], "center_memory": centers[1], "denoising_mask": denoising}
        flashbias_patch.uninstall()
        pme.layer.use_checkpoint = False
        truth = results(pme, (), call, list(t.values()))
        flashbias_patch.install()
        pme.layer.use_checkpoint = with_cp
        ours = results(pme, (), call, list(t.values()))
        for mine, base in zip(ours, truth):
            torch.testing.assert_close(mine, base, rtol=2e-4, atol=2e-5)
        assert pme.dist_scaler.grad.abs() > 0
