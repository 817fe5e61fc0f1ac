"""Stand-in for mmengine: only what attention classes of its generation touch, in its shape."""

__version__ = "0.10.7"
