"""The kernels of a call and of the self-check before it, compiled together before either runs.

They are up to a dozen, and Triton compiles each when it is first launched. So everything that
launches one is run once while the backend collects launches (Backend.compile_ahead); its results
are not looked at.
"""

from __future__ import annotations

import contextlib
from typing import List, Optional

import torch
from torch import Tensor

from .. import _torch_internals as internals
from . import selfcheck
from .backends.base import Backend
from .inputs import AttentionInputs
from .signature import CallSignature

_PLAIN = (Tensor, torch.nn.Parameter)


def compile_kernels(backend: Backend, signature: CallSignature, call: AttentionInputs) -> None:
    """Compile what `call` and its self-check launch, where the backend can without running it.
    To be called inside selfcheck.undisturbed."""
    backend.compile_ahead(lambda: _run_all(backend, signature, call))


def _run_all(backend: Backend, signature: CallSignature, call: AttentionInputs) -> None:
    """Forward and backward of the check's problems and of the call, all in this thread."""
    problems = [
        selfcheck.problem_of(signature, call.rank, *problem)
        for problem in selfcheck.problems_of(signature, backend.compiled)
    ]
    accepted = [inputs for inputs in problems if not backend.why_not(inputs)]
    with torch.autograd.set_multithreading_enabled(False), selfcheck.own_random_numbers(
        signature.device
    ):
        for inputs in accepted:
            _run(backend, inputs, selfcheck.wanted(inputs, signature))
        if signature.dropout and accepted:
            selfcheck.check_dropout(backend, selfcheck.longest(accepted), signature.grad)
        # Subclasses may refuse, or change, what is done to them here; and where memory is too short
        # for the call, the call itself compiles.
        if not all(tensor is None or type(tensor) in _PLAIN for tensor in call.tensors()):
            return
        with contextlib.suppress(internals.OutOfMemoryError):
            _run(backend, _copy(call), _learned(call) if signature.grad else [])


def _run(backend: Backend, inputs: AttentionInputs, wanted: List[str]) -> None:
    grad_out = inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[-1])
    selfcheck.run(backend, inputs, wanted, grad_out)


def _learned(call: AttentionInputs) -> List[str]:
    """Names of the tensors that require a gradient."""
    tensors = call.tensors()
    named = ((name, tensors[index]) for name, index in selfcheck.INDICES.items())
    return [name for name, tensor in named if tensor is not None and tensor.requires_grad]


def _copy(call: AttentionInputs) -> AttentionInputs:
    """The call without its graph. The centres of windows are copied: a backend keeps the tables
    that it derives from them."""
    detached: List[Optional[Tensor]] = [t if t is None else t.detach() for t in call.tensors()]
    copy = call.with_tensors(detached)
    windows, mask = copy.windows, copy.window_mask
    if windows is not None:
        copy = copy._replace(windows=windows._replace(centres=windows.centres.clone()))
    if mask is not None:
        copy = copy._replace(window_mask=mask._replace(centres=mask.centres.clone()))
    return copy
