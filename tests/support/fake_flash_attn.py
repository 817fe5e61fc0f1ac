"""A flash-attn that is not there: plain PyTorch under the names of the three generations, on the
CPU."""

from __future__ import annotations

import sys
import types

import torch

from flashbias_patch.attention.backends import flash_attention as fa

MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}


class FakeFlash:
    """What was asked of it, and which generations are installed."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.calls = []
        for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
        self.on(9)
        self.forget()

    @staticmethod
    def forget():
        """Look for flash-attn anew."""
        fa._function.cache_clear()

    def on(self, capability):
        """The compute capability (major) that CPU tensors pretend to live on; None: no GPU."""
        self.monkeypatch.setattr(fa, "_capability", lambda device: capability)

    def install(self, *generations):
        names = {
            4: ("flash_attn", "flash_attn.cute"),
            3: ("flash_attn_interface",),
            2: ("flash_attn",),
        }
        for generation in generations:
            for name in names[generation]:
                module = sys.modules.get(name) or types.ModuleType(name)
                self.monkeypatch.setitem(sys.modules, name, module)
            sys.modules[MODULES[generation]].flash_attn_func = self.function(generation)
        self.forget()

    def function(self, generation):
        def flash_attn_func(q, k, v, dropout_p=None, softmax_scale=None, deterministic=False):
            assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
            assert q.shape[-1] == k.shape[-1] and q.shape[-1] % 8 == 0 == v.shape[-1] % 8
            assert generation == 4 or q.shape[-1] == v.shape[-1]
            assert generation == 2 or dropout_p is None
            assert not (q.is_neg() or k.is_neg() or v.is_neg())  # the library reads memory
            self.calls.append(
                (generation, q.shape[-1], v.shape[-1], softmax_scale, dropout_p, deterministic)
            )
            scores = torch.einsum("bmhd,bnhd->bhmn", q.float(), k.float()) * softmax_scale
            out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v.float()).to(q.dtype)
            return out if generation == 2 else (out, None)

        return flash_attn_func
