"""Checkpoints: the recomputation of a call takes the backend that its forward took."""
from __future__ import annotations

import contextvars
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch
from torch import Tensor

from .. import random_state
from ..inputs import AttentionInputs
from ..selection import LAST_RESORT, Candidates

# take(candidates, replayed) -> (output, name of the backend that computed it); `replayed` names a backend that is used
# whatever its verdict says.
Take = Callable[[Candidates, str], Tuple[Tensor, str]]


class StartOver(BaseException):
    """A backend failed inside a checkpointed forward, where what it saved before failing cannot be taken back.

    Whoever opened the Script runs the function again. No Exception, so that no layer's own handler sees it.
    """


class Script:
    """Which backend computed each attention of a checkpointed function, so that the recomputation takes the same.

    `with script:` records the first time and replays every later time, whatever breakers have opened since. The
    first time it may raise StartOver: `rewind()`, and do it again.
    """

    def __init__(self) -> None:
        self.recording = True
        # Whether what is saved for backward goes through the checkpoint's hooks: then forward and recomputation must
        # save alike. A reentrant checkpoint runs its forward without grad.
        self.hooked = False
        self.place = -1  # of the call that is being answered
        self.graphs: Dict[int, Any] = {}  # of guarded calls, from the recomputation to their backward
        self._names: List[str] = []
        self._short_of_memory: Set[int] = set()  # calls to be answered in small chunks
        self._token: Any = None
        self._random_state = random_state.now()

    def __enter__(self) -> Script:
        self.place = -1
        if self.recording:
            self.hooked = torch.is_grad_enabled()
        self._token = current.set(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        current.reset(self._token)
        self.recording = False

    def rewind(self) -> None:
        """As before the first time, random state included."""
        self.recording = True
        self._names.clear()
        random_state.restore(self._random_state)

    def next_time_in_small_chunks(self) -> None:
        """Have the call that is being answered answered by the last resort from now on."""
        self._short_of_memory.add(self.place)

    def replays(self, name: str) -> bool:
        """Whether the call being answered was answered by that backend in the forward."""
        return not self.recording and self.place < len(self._names) and self._names[self.place] == name

    def answer(
        self, inputs: AttentionInputs, candidates: Candidates, take: Take,
        in_small_chunks: Callable[[AttentionInputs], Tensor],
    ) -> Tensor:  # fmt: skip
        """The output of the next call: recorded, or replayed."""
        place = self.place = self.place + 1
        if place in self._short_of_memory:
            self._names.append(LAST_RESORT)
            return in_small_chunks(inputs)
        if not self.recording and place < len(self._names):
            name = self._names[place]
            if name:
                names = (name, *(other for other in candidates.names if other != name))
                candidates = candidates._replace(names=names)
            return take(candidates, name)[0]
        self._names.append("")  # stays, where no backend answers and the original code runs
        out, self._names[-1] = take(candidates, "")
        return out


current: contextvars.ContextVar[Optional[Script]] = contextvars.ContextVar("flashbias_script", default=None)
