import functools

import torch

from .base_module import BaseModule, ModuleList

__all__ = ["BaseModule", "ModuleList", "auto_fp16"]


def _cast(values, source, target):
    if torch.is_tensor(values):
        return values.to(target) if values.dtype == source else values
    if isinstance(values, (tuple, list)):
        return type(values)(_cast(value, source, target) for value in values)
    if isinstance(values, dict):
        return {key: _cast(value, source, target) for key, value in values.items()}
    return values


def auto_fp16(apply_to=None, out_fp32=False):
    """As mmcv's: where `fp16_enabled`, arguments go in half and results may come back in
    float32."""

    def wrap(function):
        @functools.wraps(function)
        def half(self, *args, **kwargs):
            if not getattr(self, "fp16_enabled", False):
                return function(self, *args, **kwargs)
            args, kwargs = _cast((args, kwargs), torch.float32, torch.float16)
            with torch.cuda.amp.autocast(enabled=torch.cuda.is_available()):
                out = function(self, *args, **kwargs)
            return _cast(out, torch.float16, torch.float32) if out_fp32 else out

        return half

    return wrap
