"""Stand-in for mmcv 1.x: only what the attention classes of the CMT / PETR family touch, in its
shape."""

__version__ = "1.7.2"
