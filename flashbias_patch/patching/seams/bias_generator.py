"""The seam of AttentionBiasGenerator: its bias as a description (bias/tensor) instead of a dense
(B, M, N) tensor.

The class paints a lidar and a camera weight of every query into windows around the query's place on
the BEV grid and in one camera, times a clamped, learned scale. Forks may do something else under
that name. So before the first call of a module is replaced, its own forward is run on a few queries
of a synthetic call, and values and gradients are compared; where they differ, or where it leaves
something behind that is not understood, it runs as ever.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import Tensor, nn

from ... import telemetry
from ..._torch_internals import autocast, is_compiling
from ...attention.recovery import errors as faults
from ...attention.selfcheck import undisturbed
from ...bias.tensor.core import traced
from .bias_generator_check import judge
from .comparison import plain_attributes
from .window_description import ATTRIBUTES, NAMES, SCALE, Recipe, Verdict, bounded, describe


class GeneratorSeam:
    """forward(lidar_weights, camera_weights, pts_bev_indices, pts_pers_indices) -> (B, M, N)."""

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__
        self.checking = False
        self.verdicts: Dict[Any, Verdict] = {}

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
        given = dict(zip(NAMES, args), **kwargs)
        if self.checking or set(given) != set(NAMES) or is_compiling() or traced():
            return wrapped(*args, **kwargs)
        tensors = [given[name] for name in NAMES]
        if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
            return wrapped(*args, **kwargs)
        recipe = self._recipe(wrapped, module, tensors)
        if isinstance(recipe, str) or not bounded(module, tensors):
            return wrapped(*args, **kwargs)
        self._print_if_due(wrapped, module, recipe, given)
        return describe(module, recipe, *tensors)

    def _recipe(self, wrapped: Callable[..., Any], module: Any, tensors: List[Tensor]) -> Verdict:
        scale = getattr(module, SCALE, None)
        # Not by module: nn.DataParallel makes new ones in every step.
        settings = (
            type(module),
            *(getattr(module, name, None) for name in ATTRIBUTES),
            *plain_attributes(module),
        )
        dtypes = (*(tensor.dtype for tensor in tensors), getattr(scale, "dtype", None))
        device = tensors[0].device
        key = settings, dtypes, device.type, torch.is_autocast_enabled()
        verdict = self.verdicts.get(key)
        if verdict is not None:
            return verdict
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is captured"
        verdict = self.verdicts[key] = self._judge(wrapped, module, tensors)
        if isinstance(verdict, str):
            telemetry.once(
                (self.name, verdict), "warning", "%s keeps its dense bias: %s", self.name, verdict
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
            return f"its check failed: {faults.first_line(error)}"
        finally:
            self.checking = False

    def _print_if_due(
        self, wrapped: Callable[..., Any], module: Any, recipe: Recipe, given: Dict[str, Tensor]
    ) -> None:
        """The module's own forward where its count of calls says that it prints statistics of its
        dense bias."""
        if recipe.counter is None:
            return
        count = getattr(module, recipe.counter)
        if any(number % period == 0 for number in (count, count + 1) for period in recipe.periods):
            self.checking = True
            try:
                with torch.no_grad():
                    wrapped(**given)
            except Exception as error:
                if not faults.out_of_memory(error):
                    raise
                telemetry.once(
                    (self.name, "print"), "info", "%s: no memory for its debug print", self.name
                )
            finally:
                self.checking = False
        setattr(module, recipe.counter, count + 1)
