"""Calls with windows on grids, each feature in some: for benchmarks/windows.py --check, the
sanitizer and the tests."""

from __future__ import annotations

import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch

from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.attention.kernels import recompute
from flashbias_patch.attention.kernels.autograd import fused_attention
from flashbias_patch.attention.reference_attention import attend as attend_dense
from flashbias_patch.bias.grids import OUTSIDE, Grid, WindowMaskParts, WindowParts

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
FLOOR = {HALF: 5e-4, BRAIN: 4e-3, FULL: 1e-5}  # of the size of what is compared
WIDE = (Grid(9, 10), Grid(8, 9, 2))  # patches overlap by rows and columns, and end with a view
SMALL = (Grid(3, 9), Grid(9, 5, 2), Grid(1, 1))  # fewer than 8 rows, columns, or both


def fail(call, grad_out, error):
    raise error


class Case:
    """A call: bias "box", "gauss" or "", mask False, True or "same" (centres), and what else is in
    it; `dense` and `masked` are batch and heads, and 1 where queries share a row."""

    def __init__(
        self,
        M=20,
        frames=WIDE,
        sides=None,
        bias="box",
        mask=False,
        D=16,
        R=0,
        segments=False,
        dense=None,
        masked=None,
        padding=None,
        p=0.0,
        dtype=FULL,
        B=2,
        H=1,
        shared=False,
        centre_batch=None,
        scale=None,
        seed=0,
        device="cpu",
    ):
        self.generator = torch.Generator().manual_seed(seed + M + D + R)
        draw, S, N = self.draw, len(frames), sum(frame.size for frame in frames)
        sides = sides or tuple(5 - place % 2 for place in range(S))
        Bw, Hw = (1, 1) if shared else (B, H)
        self.dtype, self.grad = dtype, draw(B, M, H, D).to(dtype)
        leaves = {
            name: draw(B, length, H, D).to(dtype) for name, length in (("q", M), ("k", N), ("v", N))
        }
        rest = dict(dropout_p=p, scale=D**-0.5 if scale is None else scale)
        if R:
            leaves.update(
                q_factor=draw(Bw, M, Hw, R).to(dtype), k_factor=draw(Bw, N, Hw, R).to(dtype)
            )
        if segments:
            first = frames[0].size
            rest["segment_lengths"] = (first, N - first)
            leaves["segment_weights"] = 3 * draw(Bw, M, Hw, 2)
        if dense:
            rest["dense"] = draw(*dense[:2], M if len(dense) == 2 else 1, N)
        if masked:
            rest["mask"] = torch.rand(*masked[:2], M, N, generator=self.generator) < 0.3
        if padding == "bool":
            rest["key_padding"] = torch.rand(B, N, generator=self.generator) < 0.2
            rest["key_padding"][:, : N // 3] = True
        elif padding:
            seen = torch.rand(B, N, generator=self.generator) < 0.8
            rest["key_padding"] = draw(B, N).masked_fill(~seen, -math.inf)
        self.windows = self.window_mask = None
        if bias:
            sigmas = tuple(1.5 + place for place in range(S)) if bias == "gauss" else None
            leaves["windows"] = 2 * draw(Bw, M, Hw, S)
            centres = self.centres(1 if shared else centre_batch or B, M, frames)
            self.windows = WindowParts(leaves["windows"], centres, frames, sides, sigmas)
        if mask:
            centres = (
                self.windows.centres
                if bias and mask == "same"
                else self.centres(centre_batch or B, M, frames)
            )
            self.window_mask = WindowMaskParts(centres, frames, tuple(side + 1 for side in sides))
        self.leaves = {name: tensor.to(device) for name, tensor in leaves.items()}
        self.rest = {
            name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in rest.items()
        }
        self.grad = self.grad.to(device)
        for name in ("windows", "window_mask"):
            parts = getattr(self, name)
            if parts is not None:
                setattr(self, name, parts._replace(centres=parts.centres.to(device)))

    def draw(self, *size):
        return torch.randn(*size, generator=self.generator)

    def centres(self, batch, M, frames):
        """Some just outside, some not there; the last query has no window."""
        sizes = torch.tensor([[frame.views, frame.rows + 4, frame.columns + 4] for frame in frames])
        drawn = (torch.rand(batch, M, len(frames), 3, generator=self.generator) * sizes).int()
        drawn[..., 1:] -= 2
        there = torch.rand(batch, M, len(frames), 1, generator=self.generator) < 0.8
        there[:, -1] = M == 1
        return torch.where(there, drawn, torch.tensor(OUTSIDE, dtype=torch.int32))

    def inputs(self, leaves, dtype=None):
        rest = dict(self.rest)
        for name in ("dense", "key_padding"):
            if dtype is not None and name in rest and rest[name].is_floating_point():
                rest[name] = rest[name].to(dtype)
        local = None if self.windows is None else self.windows._replace(weights=leaves["windows"])
        named = {name: tensor for name, tensor in leaves.items() if name != "windows"}
        return AttentionInputs(**named, **rest, windows=local, window_mask=self.window_mask)

    def run(self, attend, dtype=None):
        leaves = {
            name: (t if dtype is None else t.to(dtype)).detach().clone().requires_grad_()
            for name, t in self.leaves.items()
        }
        out = attend(self.inputs(leaves, dtype))
        return [
            out.detach(),
            *torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype)),
        ]

    def fused(self):
        torch.manual_seed(3)
        return self.run(lambda inputs: fused_attention(*inputs, on_failure=fail))

    def plain(self, dtype):
        if not self.rest["dropout_p"]:
            return self.run(attend_dense, dtype)
        torch.manual_seed(3)
        seed = torch.randint(1 << 62, (1,), dtype=torch.int64, device=self.grad.device)

        def attend(inputs):
            call = call_of(inputs, seed)
            return attend_dense(call, recompute.dropout_of(call))

        return self.run(attend, dtype)

    def errors(self):
        """name -> error over what is allowed: twice plain PyTorch's in the same precision, plus
        FLOOR."""
        want, low, got = self.plain(torch.float64), self.plain(self.dtype), self.fused()
        found = {}
        for name, exact, plain, ours in zip(["out", *self.leaves], want, low, got):
            assert ours.shape == exact.shape, name
            floor = FLOOR[self.dtype] * max(exact.norm(), exact.numel() ** 0.5)
            allowed = 2 * (plain - exact).norm() + floor
            error = float((ours - exact).norm() / allowed)
            found[name] = error if error == error else math.inf
        return found


def call_of(inputs, seed=None, needs=(True,) * 8):
    seed = torch.zeros(0, dtype=torch.int64, device=inputs.q.device) if seed is None else seed
    return recompute.Call(
        *inputs[:6],
        inputs.segment_lengths or (),
        inputs.dense,
        inputs.mask,
        inputs.key_padding,
        inputs.dropout_p,
        inputs.scale,
        seed,
        needs,
        inputs.windows,
        inputs.window_mask,
    )


CASES = {
    "box": {},
    "gauss": dict(bias="gauss"),
    "mask": dict(bias="", mask=True),
    "box and mask": dict(mask=True),
    "gauss and the same mask": dict(bias="gauss", mask="same"),
    "half": dict(dtype=HALF, D=32, B=1, H=2),
    "half, dropout": dict(dtype=HALF, p=0.1),
    "half mask": dict(bias="", mask=True, dtype=HALF),
    "shared weights and centres": dict(shared=True, H=2),
    "shared centres": dict(centre_batch=1),
    "shared centres of the mask": dict(bias="gauss", mask=True, shared=True),
    "grids below a patch": dict(frames=SMALL, bias="gauss"),
    "mask on grids below a patch": dict(frames=SMALL, bias="", mask=True),
    "a frame for each camera": dict(
        frames=(Grid(9, 10), *[Grid(3, 7)] * 6), bias="gauss", dtype=HALF
    ),
    "one query": dict(M=1, frames=(Grid(20, 9),)),
    "one query, mask": dict(M=1, bias="", mask=True),
    "many queries": dict(M=131, B=1, H=1),
    "even sides": dict(sides=(4, 2), bias="gauss"),
    "one cell": dict(sides=(1, 1)),
    "windows beyond the grid": dict(sides=(40, 33)),
    "segments": dict(segments=True),
    "segments, half": dict(segments=True, dtype=HALF),
    "segments and mask": dict(segments=True, mask=True, dtype=HALF),
    "segments and dropout": dict(segments=True, p=0.2, shared=True),
    "factors": dict(R=5, dtype=HALF),
    "factors, dropout, shared": dict(R=3, p=0.1, shared=True),
    "many factors": dict(R=13, bias="gauss"),
    "boolean mask": dict(masked=(2, 1)),
    "boolean mask and window mask": dict(masked=(1, 1), mask=True, bias=""),
    "padding": dict(padding="bool", dtype=HALF),
    "added padding": dict(padding="float"),
    "padding and mask": dict(padding="bool", mask=True, p=0.1),
    "dense": dict(dense=(1, 1)),
    "dense row": dict(dense=(2, 1, 1), dtype=HALF, bias="gauss"),
    "dropout": dict(p=0.3, bias="gauss"),
    "dropout, mask": dict(p=0.3, bias="", mask=True),
    "dropout, shared order": dict(p=0.3, centre_batch=1),
    "everything": dict(
        mask=True,
        R=5,
        segments=True,
        dense=(1, 1),
        masked=(2, 1),
        padding="float",
        p=0.1,
        bias="gauss",
    ),
    "head dim": dict(D=40, dtype=HALF),
    "large head dim": dict(D=80, mask=True),
    "negative scale": dict(scale=-0.3),
    "small scale": dict(scale=0.01, dtype=HALF),
}
