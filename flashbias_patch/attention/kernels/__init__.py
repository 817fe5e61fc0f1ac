"""Triton kernels for attention with a low-rank, piecewise constant or dense bias. Needs triton;
import on demand."""
