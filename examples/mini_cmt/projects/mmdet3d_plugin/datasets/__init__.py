from .frame import CAMERAS, Frame, load_frame, make_batch
from .synthetic import synthetic_frame

__all__ = ["CAMERAS", "Frame", "load_frame", "make_batch", "synthetic_frame"]
