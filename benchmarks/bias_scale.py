"""Does bias_scale learn? Its gradient through patched decoders against a dense float64 reference.

    python benchmarks/bias_scale.py [--frame DIR] [--out F.json]               mini_cmt's decoder on
    a frame's features python benchmarks/bias_scale.py --repo CHECKOUT_OF_CMT [--out F.json]
    CMT's own decoder, through mmcv

Three ways a bias reaches the layers, each with checkpointing off and on, as a LowRankBias and as a
dense tensor: the relative error of bias_scale's gradient, and the largest difference of its path
over 20 SGD steps. The reference is the same decoder unpatched, in float64, without checkpointing,
with bias_scale * map as the cross attention's dense mask.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any, Dict

import torch
from torch import Tensor, nn

import flashbias_patch
from flashbias_patch.bias import LowRankBias

ROOT = Path(__file__).resolve().parents[1]
MODULE = "projects.mmdet3d_plugin.models.utils.petr_transformer"
WAYS = ("attention_bias=", "attn_masks=[None, bias]", "with attention_bias(...)")
HEADS, RANK, STEPS = 8, 3, 20


def mini_cmt(frame: str) -> Any:
    """(decoder, its keyword arguments) as mini_cmt's training step on the frame calls it; sequences
    first."""
    spec = importlib.util.spec_from_file_location(
        "train", ROOT / "examples" / "mini_cmt" / "tools" / "train.py"
    )
    train = importlib.util.module_from_spec(spec)
    sys.modules["train"] = train
    spec.loader.exec_module(train)
    module = importlib.import_module(MODULE)
    caught: Dict[str, Any] = {}
    forward = module.PETRTransformerDecoder.forward

    def catch(self, *args, **kwargs):
        caught.setdefault(
            "call",
            (
                copy.deepcopy(self),
                {k: v.detach() if torch.is_tensor(v) else v for k, v in kwargs.items()},
            ),
        )
        return forward(self, *args, **kwargs)

    module.PETRTransformerDecoder.forward = catch
    train.main(
        [
            "--device",
            "cpu",
            "--steps",
            "1",
            "--dropout",
            "0",
            "--layers",
            "3",
            "--queries",
            "40",
            "--bev",
            "12",
            "--image-size",
            "128x64",
            *(["--frame", frame] if frame else []),
        ]
    )
    module.PETRTransformerDecoder.forward = forward
    return caught["call"]


def real_cmt(repo: str) -> Any:
    """CMT's own decoder of three layers, through mmcv's builder, on random features."""

    class Anything(types.ModuleType):
        """mmcv's compiled operators, none of which a decoder calls."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args: None

    sys.modules.setdefault("mmcv._ext", Anything("mmcv._ext"))
    sys.path.insert(0, repo)
    # Not the whole plugin: its package would import every detector.
    for name in (
        "projects",
        "projects.mmdet3d_plugin",
        "projects.mmdet3d_plugin.models",
        "projects.mmdet3d_plugin.models.utils",
    ):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(repo, *name.split("."))]
        sys.modules[name] = package
    importlib.import_module(MODULE)
    from mmcv.cnn.bricks.transformer import build_transformer_layer_sequence

    torch.manual_seed(0)
    decoder = build_transformer_layer_sequence(
        dict(
            type="PETRTransformerDecoder",
            return_intermediate=True,
            num_layers=3,
            transformerlayers=dict(
                type="PETRTransformerDecoderLayer",
                with_cp=False,
                feedforward_channels=256,
                ffn_dropout=0.0,
                operation_order=("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
                attn_cfgs=[
                    dict(type="MultiheadAttention", embed_dims=256, num_heads=HEADS, dropout=0.0),
                    dict(
                        type="PETRMultiheadAttention", embed_dims=256, num_heads=HEADS, dropout=0.0
                    ),
                ],
            ),
        )
    )
    g = torch.Generator().manual_seed(1)
    call = {
        name: torch.randn(length, 2, 256, generator=g)
        for name, length in dict(query=120, key=700, query_pos=120, key_pos=700).items()
    }
    call.update(
        value=call["key"],
        key_padding_mask=torch.zeros(2, 700),
        attn_masks=[None, None],
        reg_branch=None,
    )
    return decoder, call


class Maker(nn.Module):
    """bias_scale times a fixed map of rank RANK."""

    def __init__(self, call: Dict[str, Any]) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(7)
        (M, B, _), N = call["query"].shape, call["key"].shape[0]
        self.bias_scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("a", torch.randn(B, M, HEADS, RANK, generator=g))
        self.register_buffer("b", torch.randn(B, N, HEADS, RANK, generator=g))

    def forward(self, dense: bool) -> Any:
        if dense:
            return torch.einsum("bmhr,bnhr->bhmn", self.a * self.bias_scale, self.b).flatten(0, 1)
        return LowRankBias(self.a * self.bias_scale, self.b)


def run(decoder: nn.Module, call: Dict[str, Any], bias: Any, way: str) -> Tensor:
    if way == WAYS[0]:
        return decoder(**call, attention_bias=bias)
    if way == WAYS[1]:
        return decoder(**{**call, "attn_masks": [call["attn_masks"][0], bias]})
    with flashbias_patch.attention_bias(bias, kind="cross"):
        return decoder(**call)


def learn(
    decoder: nn.Module,
    call: Dict[str, Any],
    way: str,
    with_cp: bool,
    dense: bool,
    dtype: torch.dtype,
) -> Any:
    """(gradient of the first step or None, values over STEPS steps); every parameter of the decoder
    learns along."""
    decoder = copy.deepcopy(decoder).to(dtype).train()
    for layer in decoder.layers:
        layer.use_checkpoint = with_cp
    call = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in call.items()
    }
    maker = Maker(call).to(dtype)
    optimizer = torch.optim.SGD(
        [{"params": decoder.parameters(), "lr": 1e-3}, {"params": maker.parameters(), "lr": 2.0}]
    )
    target = torch.randn(call["query"].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    first, path = None, []
    for step in range(STEPS):
        optimizer.zero_grad()
        (run(decoder, call, maker(dense), way) - target).pow(2).mean().backward()
        if step == 0:
            first = maker.bias_scale.grad
            if first is None:
                return None, []
            first = first.item()
        optimizer.step()
        path.append(maker.bias_scale.item())
    return first, path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--frame", default="", help="a nuScenes frame's folder; default: mini_cmt's synthetic scene"
    )
    parser.add_argument("--repo", help="a checkout of CMT; needs mmcv 1.x")
    parser.add_argument("--out")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    decoder, call = real_cmt(args.repo) if args.repo else mini_cmt(args.frame)
    flashbias_patch.uninstall()
    truth, path = learn(decoder, call, WAYS[1], False, True, torch.float64)
    lost = None
    try:
        lost = learn(decoder, call, WAYS[1], True, True, torch.float32)[0]
    except RuntimeError as error:
        lost = str(error).splitlines()[0]
    flashbias_patch.install()
    rows = []
    for way in WAYS:
        for with_cp in (False, True):
            for dense in (False, True):
                first, ours = learn(decoder, call, way, with_cp, dense, torch.float32)
                rows.append(
                    {
                        "way": way,
                        "checkpoint": with_cp,
                        "bias": "dense" if dense else "low rank",
                        "gradient_error": None
                        if first is None
                        else abs(first - truth) / abs(truth),
                        "path_error": max((abs(a - b) for a, b in zip(ours, path)), default=None),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    (M, B, E), N = call["query"].shape, call["key"].shape[0]
    result = {
        "command": "python benchmarks/bias_scale.py"
        + (" --repo CMT" if args.repo else " --frame FRAME"),
        "torch": torch.__version__,
        "decoder": "CMT" if args.repo else "mini_cmt",
        "B": B,
        "M": M,
        "N": N,
        "E": E,
        "reference_gradient": truth,
        "reference_path": [path[0], path[-1]],
        "unpatched_checkpointed_gradient": lost,
        "rows": rows,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
