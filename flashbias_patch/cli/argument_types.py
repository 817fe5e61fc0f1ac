"""Types of command line arguments that several commands take."""

from __future__ import annotations

import argparse


def seconds(text: str) -> float:
    """A duration in seconds, finite and above 0; ArgumentTypeError otherwise."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value
