"""Compile every class of kernel variant without a GPU: `python compile_kernels.py [arch ...]`, needs only Triton.

Prints one line a variant; the last is "compiled N". Works from Triton 3.0 on.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = os.path.join(HERE, os.pardir, os.pardir, "flashbias_patch", "attention", "kernels")
# The kernels' own files need no PyTorch; their package does, so it is stood in for.
package = types.ModuleType("flashbias_kernels")
package.__path__ = [KERNELS]
sys.modules["flashbias_kernels"] = package
forward = importlib.import_module("flashbias_kernels.forward")
backward = importlib.import_module("flashbias_kernels.backward")

POINTERS = dict(
    LSE="fp32", PART_LSE="fp32", PARTS="fp32", ROWS="fp32", MASK="u8", BLOCKS="i32", ORDER="i32", COUNTS="i32",
    ENDS="i32", SEED="i64", DQF="fp32", DW="fp32", DKF="fp32", DDENSE="fp32", DENSE="fp32",
)  # fmt: skip
FLOATS = ("score_scale", "dropout_p", "keep_scale", "dq_scale", "dk_scale")
OLD = "constants" in inspect.signature(ASTSource.__init__).parameters
BY_PLACE = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2)


def build(kernel, constants, dtype, arch, warps=4, stages=2, **pointers):
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            if not OLD:
                signature[name] = "constexpr"
        elif name.isupper() and name not in ("B", "H", "M", "N", "L", "R"):
            signature[place if BY_PLACE else name] = "*" + pointers.get(name, POINTERS.get(name, dtype))
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[place if BY_PLACE else name] = "fp32" if name in FLOATS else "i32"
            if name[-2:] in ("_b", "_m", "_n", "_h", "_s"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    if OLD:
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constants={kernel.arg_names.index(k) if BY_PLACE else k: v for k, v in constants.items()},
        )
    else:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile(
        source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps, num_stages=stages)
    )


PLAIN = dict(
    D=32, BLOCK_D=32, BLOCK_R=16, SEGMENTS=0, HAS_DENSE=False, HAS_MASK=False, PAD_KIND=0, DROPOUT=False,
    PRECISION="tf32x3", EXP=0, BLOCK_M=64, BLOCK_N=64,
)  # fmt: skip
# name -> (dtype, what differs from PLAIN, pointer types that differ)
VARIANTS = {
    "factors": ("fp16", {}, {}),
    "polynomial": ("fp16", dict(EXP=2), {}),
    "segments": ("bf16", dict(BLOCK_R=0, SEGMENTS=7), {}),
    "everything": (
        "fp16",
        dict(
            D=40, BLOCK_D=64, SEGMENTS=2, HAS_DENSE=True, HAS_MASK=True, PAD_KIND=1, DROPOUT=True, BLOCK_N=32
        ),
        dict(PAD="u8"),
    ),
    "added padding": ("bf16", dict(PAD_KIND=2, D=128, BLOCK_D=128, BLOCK_R=64, BLOCK_N=32), dict(PAD="fp32")),
    "float32": ("fp32", dict(BLOCK_N=32, HAS_DENSE=True, DROPOUT=True), {}),
}
KEYS = dict(R=8, NEED_KV=True, NEED_KF=True, DENSE_GRAD=0, SHARED_KF=True)
QUERIES = dict(R=8, NEED_Q=True, NEED_QF=True, NEED_W=False)


def variants():
    """(name, kernel, constants, dtype, pointer types)"""
    for name, (dtype, changes, pointers) in VARIANTS.items():
        constants = dict(PLAIN, **changes)
        yield name, forward.forward_kernel, dict(constants, PARTIAL=name == "segments"), dtype, pointers
        grads = dict(
            DENSE_GRAD=2 if name == "everything" else 3 if name == "float32" else 0,
            SHARED_KF=name != "float32",
        )
        yield name, backward.keys_kernel, dict(constants, **dict(KEYS, **grads)), dtype, pointers
        needs = dict(QUERIES, NEED_W=constants["SEGMENTS"] > 0)
        yield name, backward.queries_kernel, dict(constants, **needs), dtype, pointers
    tile = dict(D=40, BLOCK_D=64, BLOCK_M=16)
    yield "combine", forward.combine_kernel, tile, "fp16", {}
    yield "rows", backward.rows_kernel, dict(tile, SEGMENTS=2), "fp16", {}
    yield "pad", forward.pad_kernel, dict(R=13, BLOCK_R=16, ROWS=128), "fp16", {}


def main(archs):
    count = 0
    for arch in archs:
        for name, kernel, constants, dtype, pointers in variants():
            built = build(kernel, constants, dtype, arch, **pointers)
            assert built.asm["cubin"], name
            count += 1
            print(arch, kernel.__name__, name, "shared", built.metadata.shared, flush=True)
    print("compiled", count)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or [80, 86, 89, 90])
