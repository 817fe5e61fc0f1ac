"""The seam of AttentionBiasGenerator: it returns its bias as a description (bias/tensor) instead of
a dense (B, M, N) tensor.

The class paints a lidar and a camera weight per query into windows: around the query's cell of the
BEV grid, and around its pixel in one camera, times a clamped, learned scale. Forks may compute
something else under that name. So before the first call of a module is replaced, its own forward
runs on a few queries of a synthetic call, and values and gradients are compared
(bias_generator_check.py). Where they differ, or where the forward changes the module in a way that
is not understood, the module keeps its forward.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, Callable, Dict, List

import torch
from torch import Tensor, nn

from ... import telemetry
from ..._torch_internals import autocast, is_compiling
from ...attention.recovery import errors as faults
from ...attention.selfcheck import undisturbed
from ...bias.tensor.core import traced
from .base import Args, Kwargs, Seam
from .bias_generator_check import judge
from .comparison import Buffers, plain_attributes
from .window_description import ATTRIBUTES, NAMES, SCALE, Recipe, Verdict, bounded, describe


class GeneratorSeam(Seam):
    """forward(lidar_weights, camera_weights, pts_bev_indices, pts_pers_indices) -> (B, M, N)."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.checking = False
        self.verdicts: Dict[Any, Verdict] = {}
        self.buffers = Buffers()

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        arguments = dict(zip(NAMES, args), **kwargs)
        if self.checking or set(arguments) != set(NAMES) or is_compiling() or traced():
            return wrapped(*args, **kwargs)
        tensors = [arguments[name] for name in NAMES]
        if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
            return wrapped(*args, **kwargs)
        recipe = self._verdict(wrapped, module, tensors).recipe
        if recipe is None or not bounded(module, tensors):
            return wrapped(*args, **kwargs)
        self._print_if_due(wrapped, module, recipe, arguments)
        return describe(module, recipe, *tensors)

    def _verdict(self, wrapped: Callable[..., Any], module: Any, tensors: List[Tensor]) -> Verdict:
        scale = getattr(module, SCALE, None)
        # Not kept by module: nn.DataParallel makes new modules in every step.
        settings = (
            type(module),
            *(getattr(module, name, None) for name in ATTRIBUTES),
            *plain_attributes(module),
        )
        buffers = self.buffers.number(module, settings, without=SCALE)
        dtypes = (*(tensor.dtype for tensor in tensors), getattr(scale, "dtype", None))
        device = tensors[0].device
        key = settings, buffers, dtypes, device.type, torch.is_autocast_enabled()
        verdict = self.verdicts.get(key)
        if verdict is not None and buffers is not None:
            return verdict
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return Verdict(reason="a CUDA graph is captured")
        verdict = self.verdicts[key] = self._judge(wrapped, module, tensors)
        if verdict.recipe is None:
            telemetry.once(
                (self.name, verdict.reason),
                "warning",
                "%s keeps its dense bias: %s",
                self.name,
                verdict.reason,
            )
        else:
            telemetry.once(
                (self.name, "described"),
                "info",
                "%s returns its bias as windows, not as a dense tensor",
                self.name,
            )
        return verdict

    def _judge(self, wrapped: Callable[..., Any], module: Any, tensors: List[Tensor]) -> Verdict:
        self.checking = True
        try:
            casting = torch.is_autocast_enabled()
            with undisturbed(tensors[0].device), contextlib.redirect_stdout(io.StringIO()):
                with autocast(tensors[0].device.type, enabled=casting):
                    return judge(wrapped, module, tensors)
        except Exception as error:
            if not faults.survivable(error):
                raise
            return Verdict(reason=f"its check failed: {faults.first_line(error)}")
        finally:
            self.checking = False

    def _print_if_due(
        self, wrapped: Callable[..., Any], module: Any, recipe: Recipe, arguments: Dict[str, Tensor]
    ) -> None:
        """Run the module's own forward if its count of calls says that it prints statistics of its
        dense bias."""
        if recipe.counter is None:
            return
        count = getattr(module, recipe.counter)
        if any(number % period == 0 for number in (count, count + 1) for period in recipe.periods):
            self.checking = True
            try:
                with torch.no_grad():
                    wrapped(**arguments)
            except Exception as error:
                if not faults.out_of_memory(error):
                    raise
                telemetry.once(
                    (self.name, "print"), "info", "%s: no memory for its debug print", self.name
                )
            finally:
                self.checking = False
        setattr(module, recipe.counter, count + 1)
