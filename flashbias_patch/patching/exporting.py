"""Tracing and exporting: the original attention runs, so that the file is that of an unpatched
model.

torch.jit.trace and the TorchScript exporter of ONNX set a tracing state; torch.export, and the
exporter of ONNX on top of it, set torch.compiler.is_exporting(). A bias becomes the original's
dense attn_mask, made by plain operators. Flash classes, whose own code no exporter takes, are
computed by plain operators too.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

import torch

from .._torch_internals import constant_while_traced, is_compiling, tracing_state
from ..bias import AttentionBias
from . import context

# Since torch 2.7. Before, the code that runs while torch.export traces sees is_compiling() alone.
_compiler = getattr(torch, "compiler", None)  # since torch 2.1
is_exporting: Callable[[], bool] = getattr(_compiler, "is_exporting", is_compiling)
CAN_TELL = hasattr(
    _compiler, "is_exporting"
)  # torch.export from torch.compile, while dynamo reads code

REFUSED = (
    "a bias or a router of flashbias_patch cannot be exported with "
    "torch.export.export(strict=True): export with strict=False"
)


def exporting() -> bool:
    """Return True if torch.jit.trace, torch.export or an exporter of ONNX runs this code."""
    return tracing_state() is not None or is_exporting()


def original_alone(
    original: Callable[..., Any], module: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]
) -> Any:
    """Call the original method, for torch.export.export(strict=True); NotImplementedError if a bias
    would be lost."""
    if (
        _biased()
        or "attention_bias" in kwargs
        or "aqr" in module._modules
        or any(isinstance(a, AttentionBias) for a in args)
    ):
        raise NotImplementedError(REFUSED)
    return original(module, *args, **kwargs)


@constant_while_traced  # torch.compile cannot read context variables
def _biased() -> bool:
    return context.history.opened and bool(context.current_scopes())
