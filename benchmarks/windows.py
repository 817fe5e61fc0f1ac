"""Attention with local windows on grids, every way side by side, in one process.

    python benchmarks/windows.py [--groups NAME ...] [--repeats N] [--out FILE [--merge]]
    python benchmarks/windows.py --check [--jobs N]

Groups, each of them less than three minutes on one GPU and with its own rows without bias: float16,
bfloat16, float32 (this package's ways), generators (dense biases and masks, and SDPA), flex
(flex_attention), layers (a bias and six layers) and errors (against float64, each precision).
--merge keeps the other groups that FILE has, if they were measured on the same device and versions.

Batch 2, 1490 queries, 8 heads of 32, 180 x 180 + 6 x 40 x 100 keys, windows of 15 x 15 in both
frames, cameras placed as a rig has them. Medians of CUDA events, the ways interleaved. --check runs
window_cases.py on the GPU instead: error against float64 at most twice plain PyTorch's in the same
precision plus window_cases.FLOOR. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time

os.environ.setdefault("FLASHBIAS_PATCH", "0")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch
import torch.nn.functional as F
from provenance import about

from flashbias_patch.attention import flash_bias_attention
from flashbias_patch.attention.inputs import build
from flashbias_patch.attention.reference_attention import attend as attend_dense
from flashbias_patch.bias import Grid, ModalityBias, WindowBias, WindowMask

B, M, H, D = 2, 1490, 8, 32
FRAMES = (Grid(180, 180), Grid(40, 100, 6))
N = sum(frame.size for frame in FRAMES)
SIDE, MASK_SIDES, MASK_HEADS = 15, (5, 15), 4
LAYERS = 6
PAUSE = 3_000_000  # clock cycles, in which the host queues what comes next
SOME = 24  # queries whose results are compared with float64
PRECISIONS = ("float16", "bfloat16", "float32")
GROUPS = (*PRECISIONS, "generators", "flex", "layers", "errors")
YAWS = (55, 0, -55, 110, 180, -110)


def scene(generator):
    """(B, M, 2, 3): the BEV cell of each query, and its place in the first camera that sees it,
    else (0, 0, 0)."""
    place = torch.rand(B, M, 3, device="cuda", generator=generator)
    cell = (place[..., :2] * 180).int().clamp(0, 179)
    x, y = place[..., 0] * 108 - 54, place[..., 1] * 108 - 54
    z = place[..., 2] * 6 - 3.5
    camera = torch.zeros(B, M, 3, device="cuda", dtype=torch.int32)
    for view in reversed(range(6)):
        angle = math.radians(YAWS[view])
        depth = x * math.cos(angle) + y * math.sin(angle)
        left = -x * math.sin(angle) + y * math.cos(angle)
        column, row = 50 - 79 * left / depth.clamp_min(0.1), 16 - 79 * z / depth.clamp_min(0.1)
        seen = (depth > 1) & (column >= 0) & (column < 100) & (row >= 0) & (row < 40)
        found = torch.stack([torch.full_like(row, view), row, column], -1).int()
        camera = torch.where(seen[..., None], found, camera)
    bev = torch.stack([torch.zeros_like(cell[..., 0]), cell[..., 1], cell[..., 0]], -1)
    return torch.stack([bev, camera], 2)


class Generator(torch.nn.Module):
    """Paints two weights a query into a dense (B, M, N) tensor, as AQR's users do."""

    def __init__(self, centres):
        super().__init__()
        self.centres = centres
        self.bias_scale = torch.nn.Parameter(torch.tensor([2.5], device="cuda"))
        offsets = torch.arange(-(SIDE // 2), SIDE // 2 + 1, device="cuda")
        self.dy, self.dx = (t.flatten() for t in torch.meshgrid(offsets, offsets, indexing="ij"))

    def forward(self, weights):
        bias = weights.new_zeros(B, M, N)
        first = 0
        for place, frame in enumerate(FRAMES):
            view, row, column = self.centres[:, :, place].long().unbind(-1)
            y, x = row[..., None] + self.dy, column[..., None] + self.dx
            inside = (y >= 0) & (y < frame.rows) & (x >= 0) & (x < frame.columns)
            y, x = y.clamp(0, frame.rows - 1), x.clamp(0, frame.columns - 1)
            keys = first + (view[..., None] * frame.rows + y) * frame.columns + x
            bias = bias.scatter_add(
                2, keys, torch.where(inside, weights[..., place, None], weights.new_zeros(()))
            )
            first += frame.size
        return (bias * self.bias_scale.clamp(0.5, 5.0)).clamp(-5, 5).half()


def attention(bias_of, leaves, heads=H, **options):
    """A way: heads_last operands, the bias made of the leaves in every call."""

    def run():
        q, k, v = leaves[:3]
        return flash_bias_attention(q, k, v, bias_of(), backend="triton", **options)

    return run


def ways(dtype, group="own"):
    """name -> (function, leaves): forward as called, backward to the leaves. group: own, generators
    or flex."""
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*size):
        return torch.randn(*size, device="cuda", generator=generator)

    centres = scene(generator)
    q, k, v = (draw(B, length, H, D).to(dtype).requires_grad_() for length in (M, N, N))
    weights = draw(B, M, 2).tanh().requires_grad_()
    per_head = draw(B, M, H, 2).tanh().requires_grad_()
    scale = torch.full((1,), 2.5, device="cuda", requires_grad=True)
    leaves = [q, k, v, weights, scale]
    short = [t.detach()[:, :, :MASK_HEADS].contiguous().requires_grad_() for t in (q, k, v)]
    box = WindowBias(weights, centres, FRAMES, SIDE)
    gauss = WindowBias(weights, centres, FRAMES, SIDE, sigma=4.0)
    heads = WindowBias(per_head, centres, FRAMES, SIDE)
    mask = WindowMask(centres, FRAMES, MASK_SIDES)

    def anew():
        return WindowBias(weights * scale, centres.clone(), FRAMES, SIDE)

    found = {
        "own, no bias": (attention(lambda: None, leaves), leaves[:3]),
        "own, ModalityBias": (
            attention(
                lambda: ModalityBias(weights * scale, [FRAMES[0].size, FRAMES[1].size]), leaves
            ),
            leaves,
        ),
        "own, windows": (attention(lambda: box * scale, leaves), leaves),
        "own, windows, tables made anew": (attention(anew, leaves), leaves),
        "own, windows, Gaussian": (attention(lambda: gauss * scale, leaves), leaves),
        "own, windows per head": (
            attention(lambda: heads * scale, [q, k, v]),
            [q, k, v, per_head, scale],
        ),
        "own, no bias, dropout": (attention(lambda: None, leaves, dropout_p=0.1), leaves[:3]),
        "own, windows, dropout": (attention(lambda: box * scale, leaves, dropout_p=0.1), leaves),
        "own, no mask, 4 heads": (attention(lambda: None, short), short),
        "own, window mask, 4 heads": (attention(lambda: mask, short), short),
        "own, window mask, 4 heads, tables made anew": (
            attention(lambda: WindowMask(centres.clone(), FRAMES, MASK_SIDES), short),
            short,
        ),
    }
    if group == "own":
        return found
    found = {name: found[name] for name in ("own, no bias", "own, windows", "own, no mask, 4 heads",
                                            "own, window mask, 4 heads")}  # fmt: skip
    if group == "flex":
        return {**found, **flex(q, k, v, weights, scale, centres, short)}
    make = Generator(centres)
    dense_leaves = [q, k, v, weights, make.bias_scale]
    hidden = mask.dense() < 0
    found.update(
        {
            "own, dense bias of a generator": (
                attention(lambda: make(weights)[:, None], leaves),
                dense_leaves,
            ),
            "the generator alone": (lambda: make(weights), [weights, make.bias_scale]),
            "own, dense mask, 4 heads": (attention(lambda: hidden, short), short),
        }
    )
    return {**found, **peers(q, k, v, weights, make, short, hidden)}


def first(t):
    return t.transpose(1, 2)


def peers(q, k, v, weights, make, short, hidden):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaves = [q, k, v, weights, make.bias_scale]

    def efficient():
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            bias = make(weights).to(q.dtype)[:, None].expand(B, H, M, N)
            return first(F.scaled_dot_product_attention(first(q), first(k), first(v), bias))

    def expanded():
        with sdpa_kernel(SDPBackend.MATH):
            bias = make(weights).to(q.dtype)[:, None].repeat(1, H, 1, 1)
            return first(F.scaled_dot_product_attention(first(q), first(k), first(v), bias))

    def masked():
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            seen = ~hidden.expand(B, MASK_HEADS, M, N)
            return first(F.scaled_dot_product_attention(*map(first, short), seen))

    return {
        "SDPA efficient, dense bias of a generator": (efficient, leaves),
        "SDPA math, dense bias over heads": (expanded, leaves),
        "SDPA efficient, dense mask, 4 heads": (masked, short),
    }


def flex(q, k, v, weights, scale, centres, short):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    inside = torch.zeros(N, dtype=torch.int32, device="cuda")
    cells = torch.cat(
        [
            torch.stack(
                torch.meshgrid(
                    torch.arange(f.views, device="cuda"),
                    torch.arange(f.rows, device="cuda"),
                    torch.arange(f.columns, device="cuda"),
                    indexing="ij",
                ),
                -1,
            ).reshape(-1, 3)
            for f in FRAMES
        ]
    ).int()
    inside[FRAMES[0].size :] = 1
    view, row, column = (cells[:, place].contiguous() for place in range(3))

    def near(b, m, n, sides):
        frame = inside[n]
        half = torch.where(frame == 0, sides[0] // 2, sides[1] // 2)
        by_row = (row[n] - centres[b, m, frame, 1]).abs() <= half
        return (
            by_row
            & ((column[n] - centres[b, m, frame, 2]).abs() <= half)
            & (view[n] == centres[b, m, frame, 0])
        )

    def flexed():
        held = (weights * scale).detach()

        def score(s, b, h, m, n):
            return s + torch.where(near(b, m, n, (SIDE, SIDE)), held[b, m, inside[n]], 0.0)

        return first(compiled(*map(first, (q, k, v)), score_mod=score))

    blocks = create_block_mask(
        lambda b, h, m, n: near(b, m, n, MASK_SIDES), B, None, M, N, device="cuda", _compile=True
    )
    return {
        "flex_attention, windows in score_mod": (flexed, [q, k, v]),
        "flex_attention, block mask, 4 heads": (
            lambda: first(compiled(*map(first, short), block_mask=blocks)),
            short,
        ),
    }


def measure(found, repeats, seconds):
    """name -> median milliseconds forward and forward+backward, extra MiB; ways that fail say
    why."""
    results = {name: {} for name in found}
    alive = {}

    def both(function, leaves):
        out = function()
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    def forward(function, leaves):
        function()

    ends = time.time() + seconds
    for name, (function, leaves) in found.items():
        if time.time() > ends:
            results[name]["failed"] = "the time was up"
            continue
        modes = []
        for mode, run in (("forward", forward), ("forward+backward", both)):
            try:
                for _ in range(3):
                    run(function, leaves)
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                run(function, leaves)
                torch.cuda.synchronize()
                results[name]["MiB " + mode] = round(
                    (torch.cuda.max_memory_allocated() - before) / 2**20, 1
                )
                modes.append((mode, run))
            except Exception as error:
                results[name][mode + " failed"] = f"{type(error).__name__}: {str(error)[:160]}"
                torch.cuda.empty_cache()
        alive[name] = modes
    times = {(name, mode): [] for name, modes in alive.items() for mode, _ in modes}
    for turn in range(repeats):
        for name, modes in alive.items():
            for mode, run in modes:
                if turn > 2 and time.time() > ends and not name.startswith("own"):
                    continue
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(PAUSE)
                begin.record()
                run(*found[name])
                end.record()
                times[name, mode].append((begin, end))
    torch.cuda.synchronize()
    for (name, mode), pairs in times.items():
        taken = sorted(a.elapsed_time(b) for a, b in pairs)
        results[name][mode] = round(taken[len(taken) // 2], 4)
    return results


def step_of_layers(repeats):
    """A bias made once and LAYERS layers, forward and backward together: milliseconds, and MiB at
    the peak."""
    results = {}
    generator = torch.Generator("cuda").manual_seed(2)
    centres = scene(generator)
    q, k, v = (t.detach() for t in ways(torch.float16)["own, windows"][1][:3])
    layers = [
        [(t * (1 + layer / 8)).requires_grad_() for t in (q, k, v)] for layer in range(LAYERS)
    ]
    weights = torch.randn(B, M, 2, device="cuda", generator=generator).tanh().requires_grad_()
    make = Generator(centres)

    def windows():
        return WindowBias(weights * make.bias_scale.clamp(0.5, 5.0), centres.clone(), FRAMES, SIDE)

    for name, bias_of in (
        ("windows", windows),
        ("dense", lambda: make(weights)[:, None]),
        ("no bias", lambda: None),
    ):

        def step(bias_of=bias_of):
            bias = bias_of()
            outs = [
                flash_bias_attention(*layer, bias, backend="triton").float().sum()
                for layer in layers
            ]
            leaves = [t for layer in layers for t in layer] + (
                [] if bias is None else [weights, make.bias_scale]
            )
            torch.autograd.grad(sum(outs), leaves)

        taken = []
        for turn in range(3 + repeats // 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda._sleep(PAUSE)
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            if turn > 1:
                taken.append(begin.elapsed_time(end))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        results[name] = dict(
            milliseconds=round(sorted(taken)[len(taken) // 2], 3), MiB=round(peak, 1)
        )
    return results


def errors(dtype):
    """Relative L2 errors at the full size, of the output and the gradients of SOME queries, against
    float64; the same of plain PyTorch in `dtype`; and whether a repeat is bit-equal."""
    results = {}
    found = ways(dtype)
    for name in (
        "own, windows",
        "own, windows, Gaussian",
        "own, windows per head",
        "own, window mask, 4 heads",
    ):
        function, leaves = found[name]
        grad = torch.randn(
            function().shape, device="cuda", generator=torch.Generator("cuda").manual_seed(5)
        ).to(dtype)
        runs = [(out, *torch.autograd.grad(out, leaves, grad)) for out in (function(), function())]
        some = (
            torch.randperm(M, generator=torch.Generator().manual_seed(3))[:SOME]
            .sort()
            .values.cuda()
        )
        grad[:, [m for m in range(M) if m not in set(some.tolist())]] = 0
        out = function()
        got = [out[:, some], *torch.autograd.grad(out, leaves, grad)]

        def part(low, name=name, leaves=leaves, some=some, grad=grad):
            cast = [
                t.detach().to(
                    low
                    if t.dim() == 4 and t.shape[3] == D
                    else torch.promote_types(low, torch.float32)
                )
                for t in leaves
            ]
            cast = [t.requires_grad_() for t in cast]
            inputs = build(cast[0][:, some], *cast[1:3], bias_at(name, cast, some))
            out = attend_dense(inputs)
            return [out.detach(), *torch.autograd.grad(out, cast, grad[:, some].to(low))]

        exact, plain = part(torch.float64), part(dtype)
        results[name] = dict(
            own=[relative(a, e) for a, e in zip(got, exact)],
            plain=[relative(a, e) for a, e in zip(plain, exact)],
            repeat_equal=all(torch.equal(a, b) for a, b in zip(*runs)),
        )
    return results


def bias_at(name, leaves, some):
    centres = scene(warmed())[:, some]
    if "mask" in name:
        return WindowMask(centres, FRAMES, MASK_SIDES)
    sigma = 4.0 if "Gaussian" in name else None
    return WindowBias(leaves[3][:, some], centres, FRAMES, SIDE, sigma=sigma) * leaves[4]


def warmed():
    return torch.Generator("cuda").manual_seed(1)


def relative(a, e):
    return float(
        f"{float((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)):.3g}"
    )


def check_part(part, parts):
    import window_cases

    from flashbias_patch.attention.kernels import problem

    problem.empty = lambda *size, **options: torch.empty(*size, **options).fill_(float("nan"))
    found = []
    for place, (name, options) in list(enumerate(grid(window_cases)))[part::parts]:
        try:
            found.append((name, window_cases.Case(**options, seed=place, device="cuda").errors()))
        except Exception as error:
            found.append((name, f"{type(error).__name__}: {str(error)[:300]}"))
            if "CUDA error" in str(error):
                break
    return found


def grid(cases):
    """Each case as it is and larger, in the precision it names and another."""
    bigger = (Grid(33, 50), Grid(17, 40, 3))
    other = {cases.HALF: cases.BRAIN, cases.BRAIN: cases.FULL, cases.FULL: cases.HALF}
    for name, options in cases.CASES.items():
        yield name, options
        options = dict(options, dtype=other[options.get("dtype", cases.FULL)])
        if "frames" not in options:
            options.update(frames=bigger, sides=options.get("sides", (9, 6)))
        if options.get("M", 0) != 1:
            options["M"] = 150
        yield name + ", larger", dict(options, B=2, H=3)


def check(args):
    began = time.time()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        parts = pool.starmap(
            check_part, [(part, args.jobs) for part in range(args.jobs)], chunksize=1
        )
    cases = sum(parts, [])
    bad = [
        (name, found) for name, found in cases if isinstance(found, str) or max(found.values()) > 1
    ]
    worst = sorted(
        ((max(found.values()), name) for name, found in cases if not isinstance(found, str)),
        reverse=True,
    )
    print(
        f"checked {len(cases)}, {len(bad)} wrong, {time.time() - began:.0f} s; error over what "
        "is allowed, the worst:"
    )
    for name, found in bad:
        print("  WRONG", name, found)
    for ratio, name in worst[:6]:
        print(f"  {ratio:.2f}  {name}")
    return 1 if bad else 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="default: all")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--jobs", type=int, default=14, help="processes for --check, which mostly compiles"
    )
    parser.add_argument("--out", help="where the JSON goes, after each group")
    parser.add_argument(
        "--merge", action="store_true", help="keep the groups that --out has already"
    )
    args = parser.parse_args()
    if args.check:
        return check(args)
    report = about(args.out)
    earlier = load(args.out, report) if args.merge and args.out and os.path.exists(args.out) else {}
    for group in args.groups:
        began = time.time()
        found = run_group(group, args.repeats)
        torch.cuda.empty_cache()
        seconds = round(time.time() - began)
        report.update(found)
        report.setdefault("seconds", {})[group] = seconds
        print(group, json.dumps(found, indent=1), f"{seconds} s", file=sys.stderr, flush=True)
        if args.out:
            with open(args.out, "w") as file:
                json.dump(merged(earlier, report), file, indent=1)
    print(json.dumps(report, indent=1))
    return 0


def run_group(group, repeats):
    """Entries of the report."""
    if group == "layers":
        return {group: step_of_layers(repeats)}
    if group == "errors":
        return {name + ", errors": errors(getattr(torch, name)) for name in PRECISIONS}
    if group in PRECISIONS:
        return {group: measure(ways(getattr(torch, group)), repeats, 120)}
    return {group: measure(ways(torch.float16, group), repeats, 120)}


def load(path, report):
    """An earlier report of the same device and versions."""
    with open(path) as file:
        earlier = json.load(file)
    other = [
        name
        for name in ("device", "torch", "triton", "python")
        if earlier.get(name) != report[name]
    ]
    if other:
        raise SystemExit(f"--merge: {path} has another {', '.join(other)}; choose another --out")
    return earlier


def merged(earlier, report):
    seconds = {
        **(earlier["seconds"] if isinstance(earlier.get("seconds"), dict) else {}),
        **report["seconds"],
    }
    return {**earlier, **report, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
