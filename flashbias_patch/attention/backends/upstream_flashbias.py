"""FlashBias' published Triton kernel (github.com/thuml/FlashBias, arXiv 2505.12044), if present.

It is one file, flash_bias_triton.py, not a package: it is loaded by path. Its authors pin triton
3.0.0; on current Triton it is wrong at lengths that are not multiples of its tiles, which the
self-check detects (selfcheck.py).
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor

from ... import settings
from ..inputs import AttentionInputs
from ..values import rows_without_keys
from .base import Backend
from .sdpa import segments_to_factors

FILE = "flash_bias_triton.py"
PARAMETERS = ("q", "k", "v", "q_bias", "k_bias", "mask", "causal", "softmax_scale")


class Upstream(Backend):
    name = "upstream"
    device_types = ("cuda",)
    dtypes = (torch.float16, torch.bfloat16)
    max_head_dim, equal_head_dims = 128, True
    supports_empty = supports_dropout = supports_negative_scale = False
    supports_dense = supports_mask = supports_key_padding = supports_windows = False
    needs_self_check = True

    def __init__(self) -> None:
        self._searched_under: Optional[settings.Settings] = None
        self._function: Optional[Callable[..., Tensor]] = None
        self._missing: Optional[str] = None

    def unavailable(self) -> List[str]:
        if self._searched_under is not settings.current():
            self._load()
        return [] if self._missing is None else [self._missing]

    def other_reasons(self, inputs: AttentionInputs) -> List[str]:
        if inputs.q_factor is None and inputs.segment_weights is None:
            return ["no low-rank bias to add"]
        return []

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        assert self._function is not None
        weights, lengths = inputs.segment_weights, inputs.segment_lengths
        inputs = segments_to_factors(inputs)
        q, k, v = inputs.q, inputs.k, inputs.v
        q_factor, k_factor = inputs.q_factor, inputs.k_factor
        assert q_factor is not None and k_factor is not None
        # Expanded here, so that autograd sums the gradients of shared factors.
        q_factor, k_factor = q_factor.expand(*q.shape[:3], -1), k_factor.expand(*k.shape[:3], -1)
        out = self._function(q, k, v, q_factor, k_factor, None, False, inputs.scale)
        if weights is None or lengths is None:
            return out
        return out.masked_fill(rows_without_keys(weights, lengths, None).transpose(1, 2), 0.0)

    def _load(self) -> None:
        self._searched_under, self._function, self._missing = settings.current(), None, None
        path, looked = find()
        if path is None:
            where = ", ".join(looked)
            self._missing = (
                f"no {FILE}; looked in: {where}. Set FLASHBIAS_HOME to a checkout of FlashBias"
            )
            return
        try:
            self._function = load(path)
        except Exception as error:
            self._missing = f"{path} does not load: {type(error).__name__}: {error}"


backend = Upstream()


def find() -> Tuple[Optional[str], List[str]]:
    """(path or None, the folders searched): FLASHBIAS_HOME, external/FlashBias/ of the working
    directory, sys.path.

    Code of the working directory runs only under FLASHBIAS_BACKEND=upstream.
    """
    read, here = settings.current(), os.getcwd()
    places = [("FLASHBIAS_HOME", read.home)] if read.home else []
    if read.backend == "upstream":
        places.append(("the working directory's", os.path.join(here, "external", "FlashBias")))
    for entry in sys.path:
        folder = os.path.abspath(entry or here)
        if read.backend == "upstream" or os.path.realpath(folder) != os.path.realpath(here):
            places.append(("sys.path", folder))
    for _, folder in places:
        path = os.path.join(os.path.expanduser(folder), FILE)
        if os.path.isfile(path):
            return path, []
    looked = [f"{label} ({folder})" for label, folder in places if label != "sys.path"]
    return None, [*([] if read.home else ["FLASHBIAS_HOME (not set)"]), *looked, "sys.path"]


def load(path: str) -> Callable[..., Tensor]:
    """flash_bias_func of that file; ImportError if it does not have the published parameters."""
    name = FILE[:-3]
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    function: Optional[Callable[..., Tensor]] = getattr(module, "flash_bias_func", None)
    if function is None:
        raise ImportError(f"{path} has no flash_bias_func")
    parameters = _parameters(function)
    if parameters != PARAMETERS:
        expected = ", ".join(PARAMETERS)
        raise ImportError(f"flash_bias_func takes ({', '.join(parameters)}), expected ({expected})")
    return function


def _parameters(function: Any) -> Tuple[str, ...]:
    """Names of the parameters; for an autograd Function's `apply`, those of its forward without
    ctx."""
    owner = getattr(function, "__self__", None)
    if inspect.isclass(owner) and issubclass(owner, torch.autograd.Function):
        return tuple(inspect.signature(owner.forward).parameters)[1:]
    return tuple(inspect.signature(function).parameters)
