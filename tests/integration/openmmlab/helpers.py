"""What both generations' tests share: inputs, and one call unpatched and patched."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch

import flashbias_patch
from tests.support import scripts

E, H = 32, 4
ROOT = str(scripts.ROOT)


def inputs(seed=0, M=13, N=29, B=2, batch_first=False):
    """query, key, query_pos, key_pos as leaves; and a boolean self mask without an empty row."""
    torch.manual_seed(seed)
    lengths = {"query": M, "key": N, "query_pos": M, "key_pos": N}
    tensors = {
        name: torch.randn(*((B, n, E) if batch_first else (n, B, E)), requires_grad=True)
        for name, n in lengths.items()
    }
    mask = torch.rand(M, M) < 0.3
    mask.fill_diagonal_(False)
    return tensors, mask


def run(module, call, leaves):
    """The output and the gradient of every leaf and parameter."""
    for leaf in (*leaves, *module.parameters()):
        leaf.grad = None
    torch.manual_seed(7)
    out = call(module)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach()] + [
        leaf.grad.clone() if leaf.grad is not None else None
        for leaf in (*leaves, *module.parameters())
    ]


def both_ways(module, call, leaves):
    """(unpatched, patched) results of `run`; the patched one was answered by a backend, not by the
    original code."""
    flashbias_patch.uninstall()
    theirs = run(module, call, leaves)
    flashbias_patch.install()
    before = answered()
    ours = run(module, call, leaves)
    assert answered() > before, flashbias_patch.status()
    return theirs, ours


def answered():
    """Calls that a backend answered so far in this process."""
    return sum(
        count for name, count in flashbias_patch.status()["calls"].items() if name != "original"
    )


def assert_same(theirs, ours, rtol=2e-4, atol=2e-5):
    assert len(theirs) == len(ours)
    for base, mine in zip(theirs, ours):
        assert (base is None) == (mine is None)
        if base is not None:
            torch.testing.assert_close(mine, base, rtol=rtol, atol=atol)


class Detector(torch.nn.Module):
    """A decoder layer and a linear head on fixed data: enough of a model for a runner."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, torch.nn.Linear(E, 1)

    def loss(self, features):
        query, key = features[:9], features[9:]
        return (
            self.head(self.layer(query, key=key, value=key, attn_masks=[None, None]))
            .square()
            .mean()
        )


def batches(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24, 2, E, generator=generator) for _ in range(count)]


def two_processes(script, tmp_path, **env):
    """Run `script RANK` in two gloo processes; their outputs. Fails with what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {
        **os.environ,
        "PYTHONPATH": ROOT,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "OUT": str(tmp_path),
        **env,
    }
    started = [
        subprocess.Popen(
            [sys.executable, script],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs):
        assert process.returncode == 0, output
    return outputs
