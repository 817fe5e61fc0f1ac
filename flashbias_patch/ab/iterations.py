"""Counts training iterations, however many optimisers step in one.

An iteration is one or more backward passes and the optimiser steps that follow. One optimiser's
steps are counted, the first that steps; further ones belong to the same iteration, or to a part of
it (a discriminator's). Another optimiser is counted once that one has not stepped for SWITCH_AFTER
iterations. A closure's backward passes run inside the step. An optimiser inside backward (one per
parameter, as a rule) steps before the pass is over: the end of the pass is then the end of the
iteration.
"""

from __future__ import annotations

import weakref
from typing import Any, List, NamedTuple, Optional

SWITCH_AFTER = 16


class Ended(NamedTuple):
    """An iteration that just ended, by the step of `optimizer`; `new`: another one than before."""

    optimizer: Any
    optimizers: List[Any]
    new: bool
    skipped: bool = False
    norms: Any = None  # of the gradients of optimisers inside backward, which are gone by now

    def norm(self, torch: Any) -> Optional[Any]:
        """L2 norm of the gradients that were used, 0-d; None if there are none."""
        from . import capture

        if self.norms is None:
            return capture.norm_of(torch, capture.gradients_of(self.optimizer))
        return capture.norm_of(torch, [norm.reshape(1) for norm in self.norms])


class Counter:
    """Each method is called with the inbox and an optimiser, and returns Ended at the end of an
    iteration."""

    def __init__(self) -> None:
        self.primary: Any = None
        self.foreign = 0  # iterations, as far as can be told, since the counted optimiser stepped
        self.after_step = False  # the last thing that happened was a step
        self.fresh = False  # a backward pass since the counted optimiser stepped
        self.heard = False  # any backward pass at all: some code calls the engine itself
        self.inside: List[Any] = []  # optimisers that stepped inside the present backward pass
        self.norms: List[Any] = []

    def ended_backward(self, inbox: Any, _: Any) -> Optional[Ended]:
        self.heard = self.fresh = True
        self.foreign += self.after_step
        self.after_step = False
        if not self.inside:
            return None
        optimizers, norms = self.inside, self.norms
        self.inside, self.norms = [], []
        return self._count(optimizers[0], optimizers, always=True, norms=norms)

    def stepped(self, inbox: Any, optimizer: Any, skipped: bool = False) -> Optional[Ended]:
        self.after_step = True
        if inbox.depth:  # inside a backward pass
            from . import capture

            self.inside.append(optimizer)
            norm = capture.norm_of(inbox.torch, capture.gradients_of(optimizer))
            self.norms += [] if norm is None else [norm]
            return None
        return self._count(optimizer, [optimizer], skipped=skipped)

    def skipped(self, inbox: Any, optimizer: Any) -> Optional[Ended]:
        return self.stepped(inbox, optimizer, skipped=True)

    def _count(
        self,
        optimizer: Any,
        optimizers: List[Any],
        always: bool = False,
        skipped: bool = False,
        norms: Any = None,
    ) -> Optional[Ended]:
        current = self.primary() if self.primary is not None else None
        new = current is not optimizer
        self.foreign += new and not self.heard
        if new and not always and current is not None and self.foreign <= SWITCH_AFTER:
            return None
        if self.heard and not self.fresh and not new:
            return None  # steps twice after one backward pass
        if new:
            self.primary = weakref.ref(optimizer)
        self.foreign, self.fresh = 0, False
        return Ended(optimizer, optimizers, new, skipped, norms)
