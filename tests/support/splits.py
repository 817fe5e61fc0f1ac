"""Loops of the kernels in parts, as a GPU with room for them would have them."""

from __future__ import annotations


def in_parts(monkeypatch, count):
    """Cut every loop over keys or queries into `count` parts, or into its blocks if these are
    fewer."""
    from flashbias_patch.attention.kernels import problem

    def split_count(programs, blocks, *rest):
        return max(1, min(count, blocks))

    monkeypatch.setattr(problem, "split_count", split_count)
