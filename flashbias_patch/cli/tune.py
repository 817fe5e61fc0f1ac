"""Implement `flashbias tune`: time tile shapes of the fused kernels on this GPU, keep faster
ones."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any, Dict, List, Sequence, Tuple

from .argument_types import seconds
from .bench import BENCHMARK
from .terminal import aligned, progress, unknown

NAME = "tune"
HELP = (
    "time tile shapes of the fused kernels on this GPU and store those that are faster than the "
    "shipped ones (ratio: tuned time / shipped time)"
)
KERNELS = "flashbias_patch.attention.kernels"
FEATURES = ("factors", "segments", "dropout", "padding", "mask")
DROPOUT = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="named shapes of `flashbias bench`; `list` lists them (default: all). Shapes with the "
        "same head dim and rank share a tile shape and form one class: the search runs on the "
        "largest of them, and none of the others may become slower",
    )
    parser.add_argument(
        "--features", nargs="+", default=["factors"], choices=(*FEATURES, "none"),
        help="inputs of the calls besides q, k and v (default: factors)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16")
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=180.0,
        metavar="S",
        help="time limit per class (default: 180)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="store nothing")
    instead.add_argument(
        "--show",
        action="store_true",
        help="print the stored tile shapes of every GPU and time nothing",
    )
    instead.add_argument(
        "--forget", action="store_true", help="remove the stored tile shapes of every GPU"
    )


def main(args: argparse.Namespace) -> int:
    """Run the search and print a table.

    Exit status: 0; 2 for an unknown name or a missing library; 3 if nothing can be timed; 130 if
    interrupted.
    """
    try:
        cache = importlib.import_module(KERNELS + ".cache")
        if args.forget:
            return _forget(cache)
        if args.show:
            return _show(cache)
        benchmark = importlib.import_module(BENCHMARK)
    except ImportError as error:
        print(f"flashbias tune: cannot tune here: {error}", file=sys.stderr)
        return 2
    if args.shapes == ["list"]:
        print("\n".join(benchmark.SHAPES))
        return 0
    problem = unknown("--shapes", args.shapes, benchmark.SHAPES) or why_not()
    if problem:
        print(f"flashbias tune: {problem}", file=sys.stderr)
        return 2 if problem.startswith("--") else 3
    return _tune(args, benchmark)


def why_not() -> str:
    """Return the reason why the kernels cannot be timed on this machine, or ""."""
    import torch

    from ..attention import benchmark, dispatch

    if not torch.cuda.is_available():
        return (
            "cannot tune here: torch sees no CUDA device (torch.cuda.is_available() is False), "
            "and a tile shape can "
            "be timed only on the GPU that will run it"
        )
    inputs = benchmark.make(benchmark.SHAPES["tiny"], torch.float16, torch.device("cuda"))
    reasons = dispatch.backend("triton").why_not(inputs)
    return "cannot tune here: {}".format("; ".join(reasons)) if reasons else ""


def _tune(args: argparse.Namespace, benchmark: Any) -> int:
    import torch

    tune = importlib.import_module("flashbias_patch.attention.tuning")
    names = args.shapes or list(benchmark.SHAPES)
    groups = classes({name: benchmark.SHAPES[name] for name in names})
    device, dtype = torch.device("cuda"), benchmark.DTYPES[args.dtype]
    cells = [("class", "kernel", "shipped", "tuned", "ratio")]
    interrupted = False
    try:
        with progress() as bar:
            for index, group in enumerate(groups):
                calls = [
                    with_features(benchmark.make(benchmark.SHAPES[n], dtype, device), args.features)
                    for n in group
                ]

                def say(
                    elapsed: float,
                    seconds: float,
                    text: str,
                    index: int = index,
                    name: str = group[0],
                ) -> None:
                    bar(index * seconds + elapsed, len(groups) * seconds, f"{name} {text}")

                result = tune.tune(
                    calls, seconds=args.seconds, progress=say, remember=not args.dry_run
                )
                cells += [_cells(tune, row, result.call) for row in result.rows]
    except KeyboardInterrupt:
        interrupted = True
    print(aligned(cells))
    if not args.dry_run:
        print(f"written: {importlib.import_module(KERNELS + '.cache').path()}")
    if interrupted:
        print("flashbias tune: interrupted; the results above are partial", file=sys.stderr)
        return 130
    return 0


def classes(shapes: Dict[str, Dict[str, int]]) -> List[List[str]]:
    """Group the names of shapes that share a tile shape, the largest call first."""
    groups: Dict[Tuple[int, int], List[str]] = {}
    for name, sizes in shapes.items():
        groups.setdefault((sizes["head_dim"], sizes["rank"]), []).append(name)

    def scores(name: str) -> int:
        sizes = shapes[name]
        return sizes["batch"] * sizes["heads"] * sizes["queries"] * sizes["keys"]

    return [sorted(group, key=scores, reverse=True) for group in groups.values()]


def with_features(inputs: Any, features: Sequence[str]) -> Any:
    """Return the inputs of a benchmark call with `features` instead of its factors."""
    import torch

    q = inputs.q
    B, M, N = q.shape[0], q.shape[1], inputs.k.shape[1]
    generator = torch.Generator(q.device).manual_seed(1)
    if "factors" not in features:
        inputs = inputs._replace(q_factor=None, k_factor=None)
    if "segments" in features:
        weights = torch.randn(B, M, 1, 2, device=q.device, generator=generator).requires_grad_()
        inputs = inputs._replace(
            segment_weights=weights, segment_lengths=(N * 3 // 4, N - N * 3 // 4)
        )
    if "dropout" in features:
        inputs = inputs._replace(dropout_p=DROPOUT)
    if "padding" in features:
        inputs = inputs._replace(key_padding=torch.zeros(B, N, dtype=torch.bool, device=q.device))
    if "mask" in features:
        hidden = torch.rand(1, 1, M, N, device=q.device, generator=generator) < 0.3
        inputs = inputs._replace(mask=hidden)
    return inputs


def _cells(tune: Any, row: Any, call: str) -> Tuple[str, str, str, str, str]:
    shipped = tune.words(row.shipped) if row.shipped else "-"
    tuned = tune.words(row.tuned) if row.tuned else f"- ({row.why}; {row.tried} tried)"
    return call, row.kernel, shipped, tuned, f"{row.ratio:.3f}" if row.tuned else "-"


def _show(cache: Any) -> int:
    try:
        rows = cache.rows()
    except (OSError, ValueError):
        rows = []
    if not rows:
        print(f"no tile shape is stored in {cache.path()}")
        return 0
    cells = [("gpu", "triton", "flashbias_patch", "class", "tile shape")]
    for row in rows:
        config = ", ".join(str(value) for value in row["config"])
        cells.append(
            (
                *(row[name] for name in cache.NAMES),
                " ".join(str(value) for value in row["key"]),
                config,
            )
        )
    print(aligned(cells))
    return 0


def _forget(cache: Any) -> int:
    try:
        print(
            f"removed: {cache.path()}"
            if cache.forget()
            else f"no tile shape is stored in {cache.path()}"
        )
    except OSError as error:
        print(f"flashbias tune: {cache.path()} cannot be removed: {error}", file=sys.stderr)
        return 2
    return 0
