"""A registry in miniature: classes by name, objects from dicts that carry a `type`."""

from __future__ import annotations

from typing import Any, Callable, Dict


class Registry:
    """Classes of one kind, by name: ``@REGISTRY.register_module()`` then
    ``REGISTRY.build(cfg)``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module_dict: Dict[str, type] = {}

    def register_module(self) -> Callable[[type], type]:
        def register(cls: type) -> type:
            if cls.__name__ in self.module_dict:
                raise KeyError(f"{cls.__name__} is already registered in {self.name}")
            self.module_dict[cls.__name__] = cls
            return cls

        return register

    def build(self, cfg: Dict[str, Any], **default_args: Any) -> Any:
        return build_from_cfg(cfg, self, default_args)


def build_from_cfg(cfg: Dict[str, Any], registry: Registry, default_args: Dict[str, Any]) -> Any:
    """Instantiate ``cfg["type"]`` with the rest of `cfg` as keyword arguments.

    A key that the constructor does not know is the constructor's own TypeError.
    """
    kwargs = {**default_args, **cfg}
    name = kwargs.pop("type", None)
    if name not in registry.module_dict:
        known = ", ".join(sorted(registry.module_dict))
        raise KeyError(f"type={name!r} is not registered in {registry.name}; known: {known}")
    return registry.module_dict[name](**kwargs)


ATTENTION = Registry("attention")
TRANSFORMER_LAYER = Registry("transformer layer")
TRANSFORMER_LAYER_SEQUENCE = Registry("transformer layer sequence")
TRANSFORMER = Registry("transformer")
BACKBONES = Registry("backbone")
HEADS = Registry("head")
DETECTORS = Registry("detector")
