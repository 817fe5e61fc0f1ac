"""The kernels run in Triton's interpreter, on the CPU. Triton reads the variable when a kernel is decorated."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
