import functools

from .registry import Registry, build_from_cfg

__all__ = ["ConfigDict", "Registry", "build_from_cfg", "deprecated_api_warning"]


class ConfigDict(dict):
    __getattr__ = dict.get


def deprecated_api_warning(names, cls_name=None):
    """Old keyword names of a function, mapped to their new ones."""

    def wrap(function):
        @functools.wraps(function)
        def renamed(*args, **kwargs):
            return function(*args, **{names.get(key, key): value for key, value in kwargs.items()})

        return renamed

    return wrap
