from .registry import Registry

__all__ = ["MODELS", "Registry"]

MODELS = Registry("model")
