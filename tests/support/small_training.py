"""A small training run through patched classes: mini_cmt's decoder, two layers of a self and a
cross attention."""

from __future__ import annotations

import torch
from torch import nn

B, M, N, E, H, LAYERS, STEPS = 1, 5, 9, 16, 2, 2, 4


def decoder_of(module, with_cp=True, attn_drop=0.0, attention="PETRMultiheadAttention"):
    torch.manual_seed(0)
    layer = dict(
        type="PETRTransformerDecoderLayer",
        with_cp=with_cp,
        feedforward_channels=32,
        ffn_dropout=0.0,
        attn_cfgs=[
            dict(type="MultiheadAttention", embed_dims=E, num_heads=H, attn_drop=attn_drop),
            dict(type=attention, embed_dims=E, num_heads=H, attn_drop=attn_drop),
        ],
    )
    return module.PETRTransformerDecoder(transformerlayers=layer, num_layers=LAYERS).train()


def train(module, steps=STEPS, on_step=None, wrap=None, seed=3, device="cpu", **kwargs):
    """The loss of each step, and the parameters' gradients of the last one."""
    decoder = decoder_of(module, **kwargs).to(device)
    model = decoder if wrap is None else wrap(decoder)
    embed = nn.Parameter(
        torch.randn(M, B, E, generator=torch.Generator().manual_seed(1)).to(device)
    )
    optimizer = torch.optim.SGD([*decoder.parameters(), embed], lr=0.05)
    g = torch.Generator().manual_seed(seed)
    memory, target = (
        torch.randn(N, B, E, generator=g).to(device),
        torch.randn(M, B, E, generator=g).to(device),
    )
    torch.manual_seed(11)
    losses = []
    for step in range(steps):
        if on_step is not None:
            on_step(step)
        optimizer.zero_grad()
        out = model(
            query=torch.zeros_like(embed),
            key=memory,
            value=memory,
            query_pos=embed,
            attn_masks=[None, None],
        )
        loss = (
            (out[-1] - target).square().mean() if out.dim() == 4 else (out - target).square().mean()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {
        name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None
    }
