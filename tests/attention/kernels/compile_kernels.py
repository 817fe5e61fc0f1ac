"""Compile every class of kernel variant without a GPU, or those that are named:
`python compile_kernels.py [PART/PARTS] [arch ...] [name ...]`, needs only Triton; 2/4 is the second
quarter of the variants.

Tiles are those that tiles.py ships for the architecture; where shared memory has no room the next
is compiled, as a launch would do. Prints one line a variant; the last is "compiled N". Works from
Triton 3.0 on.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import re
import sys
import time
import types
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, os.pardir, os.pardir, os.pardir)
KERNELS = os.path.join(ROOT, "flashbias_patch", "attention", "kernels")


def load():
    """The kernels' modules, their package stood in for, and PyTorch too: concatenate.py's launchers
    name it."""
    package = types.ModuleType("flashbias_kernels")
    package.__path__ = [KERNELS]
    sys.modules["flashbias_kernels"] = package
    torch = mock.MagicMock()
    torch.autograd.Function = object
    names = (
        "torch",
        "torch.nn",
        "torch.nn.functional",
        "torch.autograd",
        "torch.autograd.function",
    )
    real = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names, torch))
    try:
        files = (
            "forward",
            "backward",
            "casts",
            "sums",
            "concatenate",
            "tiles",
            "window_common",
            "window_forward",
            "window_backward",
        )
        return [importlib.import_module("flashbias_kernels." + name) for name in files]
    finally:
        for name, module in real.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


(
    forward,
    backward,
    casts,
    sums,
    concatenate,
    tiles,
    window_common,
    window_forward,
    window_backward,
) = load()
# private name: only Triton is needed here, so that tests/support is not there
tiles._loaded = True  # no tiles that this machine has tuned
# private name: as above
JOIN_KERNEL, SUM_KERNEL = concatenate._join_kernel, concatenate._sum_kernel
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # bytes a program can have

POINTERS = dict(
    LSE="fp32",
    PART_LSE="fp32",
    PARTS="fp32",
    ROWS="fp32",
    MASK="u8",
    BLOCKS="i32",
    ORDER="i32",
    COUNTS="i32",
    FRAMES="i32",
    WIDTHS="fp32",
    LIST="i64",
    NUMBERS="i32",
    CENTRES="fp32",
    SHOWN="fp32",
    WINDOWS="fp32",
    PATCHES="i64",
    OWNERS="i32",
    FLAGS="u8",
    WS="fp32",
    DWINDOWS="fp32",
    CODES="i64",
    ENDS="i32",
    POWER="fp32",
    PEAKS="i32",
    SEED="i64",
    DQF="fp32",
    DW="fp32",
    DKF="fp32",
    DDENSE="fp32",
    DENSE="fp32",
)
SIZES = ("B", "H", "M", "N", "L", "R", "P")
FLOATS = (
    "scale",
    "unit",
    "fold_unit",
    "score_scale",
    "dropout_p",
    "keep_scale",
    "dq_scale",
    "dk_scale",
)
OLD = "constants" in inspect.signature(ASTSource.__init__).parameters
BY_PLACE = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2)


def build(kernel, constants, dtype, arch, pointers, config):
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        key = place if BY_PLACE else name
        if name in constants:
            if not OLD:
                signature[name] = "constexpr"
        elif (
            name in pointers
            or name.isupper()
            and name[-2:] not in ("_H", "_L")
            and name not in SIZES
        ):
            signature[key] = "*" + pointers.get(name, POINTERS.get(name, dtype))
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[key] = "fp32" if name in FLOATS or "mult" in name else "i32"
            if name[-2:] in ("_b", "_m", "_n", "_h", "_s") or name in ("split_keys", "split_rows"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    if OLD:
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constants={
                kernel.arg_names.index(k) if BY_PLACE else k: v for k, v in constants.items()
            },
        )
    else:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)
    if config.registers:
        options["maxnreg"] = config.registers
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


PLAIN = dict(
    D=32,
    BLOCK_D=32,
    BLOCK_R=16,
    SEGMENTS=0,
    HAS_DENSE=False,
    HAS_MASK=False,
    PAD_KIND=0,
    DROPOUT=False,
)
# name -> (dtype, what differs from PLAIN, pointer types that differ)
VARIANTS = {
    "no bias": ("fp16", dict(BLOCK_R=0), {}),
    "factors": ("fp16", {}, {}),
    "segments, split": ("bf16", dict(BLOCK_R=0, SEGMENTS=7), {}),
    "dense": ("fp16", dict(BLOCK_R=0, HAS_DENSE=True), {}),
    "everything": (
        "fp16",
        dict(D=40, BLOCK_D=64, SEGMENTS=2, HAS_DENSE=True, HAS_MASK=True, PAD_KIND=1, DROPOUT=True),
        dict(PAD="u8"),
    ),
    "added padding": ("bf16", dict(PAD_KIND=2, D=128, BLOCK_D=128, BLOCK_R=64), dict(PAD="fp32")),
    "mask": ("fp16", dict(HAS_MASK=True), {}),
    # What is 1 is compiled in: ptxas of Triton 3.6 crashed on such a kernel that read the bias
    # element by element.
    "one key": (
        "fp16",
        dict(BLOCK_R=0, HAS_DENSE=True, N=1, splits=1, num_blocks=1),
        dict(DENSE="fp16"),
    ),
    "float32": ("fp32", dict(HAS_DENSE=True, DROPOUT=True), {}),
}
WINDOW = dict(F=2, MODE=1, MASKED=False, BLOCK_R=0)
# Likewise, of calls with windows.
WINDOW_VARIANTS = {
    "box": ("fp16", {}, {}),
    "gauss": ("bf16", dict(MODE=2), {}),
    "box, dropout": ("fp16", dict(DROPOUT=True), {}),
    "mask": ("fp16", dict(MODE=0, MASKED=True), {}),
    "gauss and mask": (
        "fp16",
        dict(MODE=2, MASKED=True, SEGMENTS=2, DROPOUT=True, HAS_MASK=True),
        {},
    ),
    "box, segments, split": ("bf16", dict(SEGMENTS=2), {}),
    "box, padding": ("fp16", dict(PAD_KIND=1, BLOCK_R=16), dict(PAD="u8")),
    "box and everything": (
        "fp16",
        dict(
            D=40,
            BLOCK_D=64,
            SEGMENTS=2,
            HAS_DENSE=True,
            HAS_MASK=True,
            PAD_KIND=2,
            DROPOUT=True,
            BLOCK_R=16,
        ),
        dict(PAD="fp32"),
    ),
    "wide heads": ("bf16", dict(D=128, BLOCK_D=128, BLOCK_R=64), {}),
    "float32": ("fp32", dict(MODE=2), {}),
    "float32, dropout": ("fp32", dict(DROPOUT=True, D=128, BLOCK_D=128), {}),
    "float32 mask": ("fp32", dict(MODE=0, MASKED=True), {}),
}
DENSE_GRAD = {"dense": 1, "everything": 2, "float32": 3}
KEYS = dict(R=8, NEED_KV=True, NEED_KF=True)
QUERIES = dict(R=8, NEED_Q=True, NEED_QF=True)
# All variants on 80 and 90; 86 and 89 take 80's tiles and instructions, so that the widest few do.
COVERING = {86: ("factors", "everything", "added padding", "float32", "low columns, padding")}
COVERING[89] = COVERING[86]
# All windows on 90 under the oldest Triton and current ones; elsewhere one of each kind of kernel.
WINDOW_COVERING = ("windows: box, dropout", "windows: gauss and mask", "windows: float32")
ALL_WINDOWS = tuple(int(part) for part in triton.__version__.split(".")[:2]) not in (
    (3, 1),
    (3, 2),
    (3, 4),
)
ONE = tiles.Config(0, 0, 4, 2)  # of kernels without a choice
JOIN = dict(
    HEADS=8,
    D=32,
    R=8,
    LOW=0,
    PADDING=0,
    MASKED=concatenate.MASKED,
    WIDTH=40,
    BLOCK_D=32,
    BLOCK_R=8,
    REST=0,
    BLOCK_REST=1,
    ROWS=concatenate.ROWS,
    WIDE=False,
)
JOIN_POINTERS = ("q", "q_factor", "q_out", "k", "k_factor", "k_out")
SUM = dict(HEADS=1, COLUMNS=8, BLOCK=8, SUM_B=2, SUM_H=8, B=1)


def choices_of(kind, arch, dtype, constants):
    pairs = constants["HAS_DENSE"] or constants["HAS_MASK"]
    plain = not (pairs or constants["PAD_KIND"] or constants["DROPOUT"])
    columns = constants["BLOCK_D"], constants["BLOCK_R"]
    if "MODE" in constants:
        kind = ("mask " if constants["MASKED"] else "window ") + kind
    key = tiles.Key(kind, arch, dtype != "fp32", *columns, plain, constants["SEGMENTS"] > 0, pairs)
    return tiles.candidates(key)


def apart(constants):
    """As problem.apart has it, of the constants that a variant is compiled for."""
    masked = constants["HAS_MASK"] or constants["PAD_KIND"] == 1 or constants.get("MASKED", False)
    return (
        constants["HAS_DENSE"] or constants["PAD_KIND"] == 2 or constants["SEGMENTS"] > 0 and masked
    )


def folded(dtype, constants):
    """As problem.folded has it, likewise (KEYS' rank)."""
    return (
        not apart(constants)
        and dtype != "fp32"
        and not constants["DROPOUT"]
        and constants["BLOCK_R"] in (0, 16)
    )


def variants(arch):
    """(name, kernel, constants, dtype, pointer types, tiles to try)"""
    for name, (dtype, changes, pointers) in VARIANTS.items():
        base = dict(PLAIN, **changes)
        fold = dict(FOLDED=folded(dtype, base))
        base.update(VECTOR=8, APART=apart(base))
        rows = dict(pointers, ROWS=dtype if fold["FOLDED"] else "fp32")
        grads = dict(KEYS, **fold, DENSE_GRAD=DENSE_GRAD.get(name, 0), SHARED_KF=name != "float32")
        for kind, kernel, more in (
            (
                "forward",
                forward.forward_kernel,
                dict(PARTIAL="split" in name, HAS_LOW=name in ("no bias", "everything")),
            ),
            ("keys", backward.keys_kernel, grads),
            (
                "queries",
                backward.queries_kernel,
                dict(QUERIES, **fold, NEED_W=base["SEGMENTS"] > 0),
            ),
        ):
            yield name, kernel, dict(base, **more), dtype, rows, choices_of(kind, arch, dtype, base)
    made = dict(PLAIN, VECTOR=8, APART=False, PARTIAL=False, HAS_LOW=False)
    tiles_of = choices_of("forward", arch, "fp16", PLAIN)
    yield "float32 output", forward.forward_kernel, made, "fp16", dict(OUT="fp32"), tiles_of
    yield from window_variants(arch)
    tile = dict(D=40, BLOCK_D=64, BLOCK_M=16)
    for pair in (False, True):
        yield (
            "combine" + " apart" * pair,
            forward.combine_kernel,
            dict(tile, HAS_LOW=True, APART=pair),
            "fp16",
            {},
            [ONE],
        )
    for dtype in ("fp16", "bf16", "fp32"):
        made = dict(tile, SEGMENTS=2, HAS_LOW=True, FOLDED=dtype != "fp32", APART=False, R=8)
        yield "rows", backward.rows_kernel, made, dtype, dict(ROWS=dtype), [ONE]
    yield (
        "rows apart",
        backward.rows_kernel,
        dict(made, FOLDED=False, APART=True),
        "fp16",
        {},
        [ONE],
    )
    for kind, pad in ((1, "u8"), (2, "fp16")):
        seen = dict(PAD_KIND=kind, BLOCK_N=64, MANY=32)
        yield "visible", forward.visible_kernel, seen, "fp16", dict(PAD=pad), [ONE]
    made = dict(D=40, BLOCK_D=64, R=8, BLOCK_R=16, ROWS=64, WEIGHTS=True)
    yield "prepare", forward.prepare_kernel, made, "fp16", {}, [ONE]
    halves = dict.fromkeys(JOIN_POINTERS, "fp16")
    low = dict(JOIN, LOW=1, PADDING=1, WIDTH=56, REST=8, BLOCK_REST=8, WIDE=True)
    yield ("low columns, padding", JOIN_KERNEL, low, "fp16", dict(halves, padding="u8"), [ONE])
    halves = dict.fromkeys(JOIN_POINTERS, "bf16")
    added = dict(JOIN, R=0, BLOCK_R=1, PADDING=2, REST=8, BLOCK_REST=8)
    yield ("added padding", JOIN_KERNEL, added, "bf16", dict(halves, padding="fp32"), [ONE])
    columns = {f"{name}{i}": size for i in range(3) for name, size in SUM.items()}
    grads = {f"{name}{i}": "fp16" for i in range(3) for name in ("grad", "out")}
    yield (
        "sums",
        SUM_KERNEL,
        dict(columns, ROWS=concatenate.ROWS, WIDE=False),
        "fp16",
        grads,
        [ONE],
    )
    columns = {
        f"{name}{i}": size
        for i in range(3)
        for name, size in SUM.items()
        if name not in ("SUM_B", "B")
    }
    parts = {f"PARTS{i}": "fp32" for i in range(3)}
    yield "sums of parts", sums.sum_kernel, dict(columns, ROWS=32), "fp16", parts, [ONE]

    yield from cast_variants()


def cast_variants():
    tensors = {f"D{i}": 40 for i in range(3)}
    tensors.update({f"BLOCK{i}": 64 for i in range(3)}, ROWS=64)
    for half in ("fp16", "bf16"):
        for scaled in (False, True):
            source, target = (half, "fp32") if scaled else ("fp32", half)
            types = {
                f"{name}{i}": source if name == "X" else target for name in "XY" for i in "012"
            }
            yield "casts", casts.cast_kernel, dict(tensors, SCALED=scaled), half, types, [ONE]
    rows = dict(D=40, BLOCK_D=64, ROWS=64)
    types = dict(X="fp32", Y="fp16")
    yield "peaks", casts.peaks_kernel, rows, "fp16", types, [ONE]
    yield "division", casts.divide_kernel, dict(rows, BLOCK_PEAKS=256), "fp16", types, [ONE]


def window_variants(arch):
    for name, (dtype, changes, pointers) in WINDOW_VARIANTS.items():
        base = dict(PLAIN, **{**WINDOW, **changes})
        fold, apiece = folded(dtype, base), apart(base)
        base.update(VECTOR=8, APART=apiece)
        types = dict(pointers, ROWS=dtype if fold else "fp32")
        keys = {key: value for key, value in base.items() if key != "F"}
        grads = dict(R=8 if base["BLOCK_R"] else 0, FOLDED=fold)
        rows = {
            key: base[key] for key in ("F", "MODE", "D", "BLOCK_D", "BLOCK_R", "SEGMENTS", "APART")
        }
        for kind, kernel, constants, more in (
            (
                "forward",
                window_forward.window_forward_kernel,
                base,
                dict(PARTIAL="split" in name, HAS_LOW=True),
            ),
            (
                "keys",
                window_backward.window_keys_kernel,
                keys,
                dict(grads, NEED_KV=True, NEED_KF=True, SHARED_KF=False),
            ),
            (
                "queries",
                window_backward.window_queries_kernel,
                base,
                dict(
                    grads,
                    NEED_Q=True,
                    NEED_QF=True,
                    NEED_W=base["SEGMENTS"] > 0,
                    NEED_WINDOWS=base["MODE"] > 0,
                ),
            ),
        ):
            yield (
                f"windows: {name}",
                kernel,
                dict(constants, **more),
                dtype,
                types,
                choices_of(kind, arch, dtype, base),
            )
        more = dict(grads, HAS_LOW=dtype != "fp32", BLOCK_M=64)
        yield (
            f"windows: {name}",
            window_backward.window_rows_kernel,
            dict(rows, **more),
            dtype,
            types,
            [ONE],
        )
    centres = dict(CENTRES="i32")
    yield "window places", window_common.places_kernel, dict(F=2, BLOCK=128), "fp32", centres, [ONE]
    yield (
        "window centres",
        window_common.centres_kernel,
        dict(F=2, BLOCK=128),
        "fp32",
        centres,
        [ONE],
    )
    for compact in (False, True):
        made = dict(F=2, COMPACT=compact, BLOCK_M=64, CHUNK=64)
        yield "window lists", window_common.lists_kernel, made, "fp32", {}, [ONE]
    yield (
        "window blocks",
        window_common.blocks_kernel,
        dict(BLOCK=64),
        "fp32",
        dict(BLOCKS="i32"),
        [ONE],
    )


def fitting(kernel, constants, dtype, arch, pointers, choices):
    """(what was compiled, its tile), the first that shared memory has room for"""
    for config in choices:
        if config.block_m:
            tile = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n)
            constants = dict(constants, **tile)
        built = build(kernel, constants, dtype, arch, pointers, config)
        if built.metadata.shared <= SHARED_MEMORY.get(arch, 101376):
            return built, config
    raise RuntimeError("no tile fits into shared memory")


def main(archs, names, part, parts):
    count = 0
    for arch in archs:
        turn = itertools.cycle(range(1, parts + 1))
        for name, kernel, constants, dtype, pointers, choices in variants(arch):
            if names:
                if name not in names:
                    continue
            elif name.startswith("windows: "):
                if not (arch == 90 and ALL_WINDOWS) and (
                    arch in COVERING or name not in WINDOW_COVERING
                ):
                    continue
            elif name not in COVERING.get(arch, [name]):
                continue
            if next(turn) != part:
                continue
            began = time.time()
            built, config = fitting(kernel, constants, dtype, arch, pointers, choices)
            assert built.asm["cubin"], name
            count += 1
            tile = f"{config.block_m} x {config.block_n}, " if config.block_m else ""
            took = f"{time.time() - began:.1f} s"
            lone = len(re.findall(r"ld\.global[.\w]*\.[bu]8 ", built.asm["ptx"]))
            found = f"shared {built.metadata.shared}, byte loads {lone}, {took}"
            print(arch, kernel.__name__, name + ":", tile + found, flush=True)
    print("compiled", count)


if __name__ == "__main__":
    given = sys.argv[1:]
    part = next((word for word in given if "/" in word), "1/1")
    main(
        [int(word) for word in given if word.isdigit()] or [80, 86, 89, 90],
        [word for word in given if not (word.isdigit() or word == part)],
        *map(int, part.split("/")),
    )
