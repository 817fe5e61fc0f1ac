"""Checkpoints of every make, around any module: torch's under several names, and stand-ins for
other libraries'."""

from __future__ import annotations

import functools

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.checkpoint import checkpoint as bound_before_install

from tests.support.capabilities import REENTRANT

try:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        checkpoint_wrapper,
    )
except ImportError:  # before torch 1.12
    CheckpointImpl = ()


def detached(args):
    return [
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in args
    ]


def gradients_of(args):
    return tuple(a.grad if isinstance(a, torch.Tensor) else None for a in args)


class FunctionOnContext(torch.autograd.Function):
    """As fairscale's and DeepSpeed's: function and arguments are kept on ctx."""

    @staticmethod
    def forward(ctx, function, *args):
        ctx.function, ctx.args, ctx.state = function, args, torch.get_rng_state()
        with torch.no_grad():
            return function(*args)

    @staticmethod
    def backward(ctx, *grads):
        args = detached(ctx.args)
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            outs = ctx.function(*args)
        torch.set_rng_state(now)
        torch.autograd.backward(outs, grads)
        return (None, *gradients_of(args))


if hasattr(torch, "amp") and hasattr(torch.amp, "custom_fwd"):  # since torch 2.4
    custom_fwd = functools.partial(torch.amp.custom_fwd, device_type="cuda")
else:
    custom_fwd = torch.cuda.amp.custom_fwd


class FunctionOfSavedTensors(torch.autograd.Function):
    """As Megatron's: arguments through save_for_backward; a decorated forward, whose apply is bound
    once."""

    @staticmethod
    @custom_fwd
    def forward(ctx, function, distribute, *args):
        ctx.function, ctx.state = function, torch.get_rng_state()
        out = function(*args)
        ctx.save_for_backward(*args)
        return out

    @staticmethod
    def backward(ctx, *grads):
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("Checkpointing is not compatible with .grad()")
        with torch.random.fork_rng([]):
            torch.set_rng_state(ctx.state)
            args = detached(ctx.saved_tensors)
            with torch.enable_grad():
                outs = ctx.function(*args)
        torch.autograd.backward(outs, grads)
        return (None, None, *gradients_of(args))


megatron = FunctionOfSavedTensors.apply


def hooks(function, *args):
    """As DeepSpeed's non-reentrant checkpoint: saved-tensor hooks of its own, which recompute when
    first unpacked."""
    state = torch.get_rng_state()
    storage, places = {}, []

    def pack(tensor):
        places.append(object())
        return places[-1]

    def unpack(place):
        if not storage:
            order = iter(places)

            def keep(tensor):
                storage[next(order)] = tensor.detach()

            def refuse(_):
                raise RuntimeError("You are calling backwards on a tensor that is never exposed")

            with torch.random.fork_rng([]), torch.enable_grad():
                torch.set_rng_state(state)
                with torch.autograd.graph.saved_tensors_hooks(keep, refuse):
                    function(*args)
        return storage.pop(place)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(*args)


def reentrant(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, **REENTRANT)


KINDS = {
    "reentrant": reentrant,
    "reentrant, bound": functools.partial(bound_before_install, **REENTRANT),
    "fairscale": FunctionOnContext.apply,
    "megatron": lambda function, *args: megatron(function, False, *args),
}
if REENTRANT:  # torch 1.11, which has the other kind too
    KINDS["non-reentrant"] = functools.partial(bound_before_install, use_reentrant=False)
    KINDS["hooks"] = hooks
if CheckpointImpl:
    KINDS["wrapper, reentrant"] = CheckpointImpl.REENTRANT
    KINDS["wrapper, non-reentrant"] = CheckpointImpl.NO_REENTRANT
OWN_BACKWARD = ("reentrant", "reentrant, bound", "fairscale", "megatron", "wrapper, reentrant")


class Checkpointed(nn.Module):
    """A module whose calls are checkpointed; keyword arguments travel in a closure."""

    def __init__(self, module, checkpoint):
        super().__init__()
        self.module, self.checkpoint = module, checkpoint

    def forward(self, *args, **kwargs):
        return self.checkpoint(functools.partial(self.module, **kwargs), *args)


def checkpointed(module, kind):
    if CheckpointImpl and isinstance(KINDS.get(kind), CheckpointImpl):
        return checkpoint_wrapper(module, checkpoint_impl=KINDS[kind])
    return Checkpointed(module, KINDS[kind])
