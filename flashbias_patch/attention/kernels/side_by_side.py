"""The two kernels of a backward pass on two streams, where the call is long enough."""

from __future__ import annotations

import functools
from typing import Any, Callable, Tuple

import torch

Streams = Tuple[Any, Any]  # the current stream, and another of higher priority


def streams_of(device: torch.device) -> Streams:
    return torch.cuda.current_stream(device), _other_stream(device)


@functools.lru_cache(maxsize=64)
def _other_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device, priority=-1)


def side_by_side(streams: Streams, queries: Callable[[int], Any], keys: Callable[[], Any]) -> None:
    """Launch both: `queries` on the other stream, whose handle it is called with, `keys` on the
    current one.

    The queries kernel is a few long programs, the keys kernel many short ones, which fill the
    processors that the long ones leave free. The long ones must begin first: their stream has a
    higher priority.
    """
    current, other = streams
    other.wait_stream(current)
    try:
        queries(other.cuda_stream)
        keys()
    finally:
        # Until here memory allocated on the current stream is used on the other.
        current.wait_stream(other)
