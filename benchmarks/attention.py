"""Attention with and without a bias, every peer side by side, in one process.

    python benchmarks/attention.py [--quick] [--check] [--only SHAPE ...] [--peers REGEX]
    [--flashbias-path DIR] [--out FILE]

Medians of CUDA events, the peers interleaved, each run queued behind a pause so that the host's
work is not timed; and for small shapes the wall time of calls one after another, host included.
--check runs the correctness grid on the GPU instead: error against float64 at most twice plain
PyTorch's in the same precision plus 1e-5. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time

os.environ.setdefault("FLASHBIAS_PATCH", "0")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch
import torch.nn.functional as F
from provenance import about

from flashbias_patch.attention import flash_bias_attention
from flashbias_patch.attention.benchmark import SHAPES as MODELS
from flashbias_patch.attention.kernels.autograd import fused_attention
from flashbias_patch.attention.kernels.recompute import Call, dropout_of
from flashbias_patch.bias import LowRankBias
from tests.support.reference import of_call


def model(name, dtype="float16", **changed):
    return (*dict(MODELS[name], **changed).values(), dtype)


# name -> batch, queries, keys, heads, head dim, rank, dtype
SHAPES = {
    "cmt": model("cmt-800x320"),
    "cmt bf16": model("cmt-800x320", "bfloat16"),
    "cmt fp32": model("cmt-800x320", "float32"),
    "cmt rank 2": model("cmt-800x320", rank=2),
    "cmt rank 24": model("cmt-800x320", rank=24),
    "cmt large": model("cmt-1600x640"),
    "cmt camera": model("cmt-camera"),
    "petr": model("petr-900x6000"),
    "streampetr": model("streampetr-r50"),
    "mome": model("mome-100x56400"),
    "square 1024": model("square-1024"),
    "square 4096": model("square-4096"),
    "square 16384": model("square-16384"),
    "head dim 64": model("head-dim-64"),
    "head dim 128": model("head-dim-128"),
}
SMALL = 140_000_000  # scores, up to which wall times are taken too
PAUSE = 5_000_000  # clock cycles, in which the host queues what comes next
QUICK = (
    "cmt",
    "cmt fp32",
    "petr",
    "mome",
    "square 1024",
    "square 4096",
    "head dim 64",
    "head dim 128",
)


def heads_first(tensor):
    return tensor.transpose(1, 2)


def sdpa(kind):
    backends = torch.nn.attention.SDPBackend
    chosen = dict(
        flash=backends.FLASH_ATTENTION,
        cudnn=backends.CUDNN_ATTENTION,
        efficient=backends.EFFICIENT_ATTENTION,
        math=backends.MATH,
    )[kind]

    def attend(q, k, v, mask=None, scale=None):
        with torch.nn.attention.sdpa_kernel([chosen]):
            out = F.scaled_dot_product_attention(
                *map(heads_first, (q, k, v)), attn_mask=mask, scale=scale
            )
        return heads_first(out)

    return attend


def concatenated(attend, q, k, v, qf, kf, pad_v):
    """Factors as further columns of q and k; the scale is already in q."""
    B, M, H, D = q.shape
    wide_q = torch.cat([q * D**-0.5, qf.expand(B, -1, H, -1)], -1)
    wide_k = torch.cat([k, kf.expand(B, -1, H, -1)], -1)
    columns = -wide_q.shape[-1] % 8
    if columns:
        wide_q, wide_k = F.pad(wide_q, (0, columns)), F.pad(wide_k, (0, columns))
    if pad_v:
        v = F.pad(v, (0, wide_q.shape[-1] - D))
    return attend(wide_q, wide_k, v, scale=1.0)[..., :D]


def peers(t, flashbias_path, math):
    """name -> function of nothing; t holds q, k, v, qf, kf, w (segments), lengths."""
    q, k, v, qf, kf, w, lengths = t
    B, M, H, D = q.shape
    half = q.dtype != torch.float32
    found = {
        "picked": lambda: flash_bias_attention(q, k, v, LowRankBias(qf, kf)),
        "picked, no bias": lambda: flash_bias_attention(q, k, v),
        "triton": lambda: fused_attention(q, k, v),
        "triton factors": lambda: fused_attention(q, k, v, qf, kf),
        "triton segments": lambda: fused_attention(q, k, v, None, None, w, lengths),
    }
    for kind in ("flash", "cudnn", "efficient") if half else ("efficient",):
        found["sdpa " + kind] = lambda attend=sdpa(kind): attend(q, k, v)
        found["sdpa %s concatenated" % kind] = lambda attend=sdpa(kind), kind=kind: concatenated(
            attend, q, k, v, qf, kf, kind == "flash"
        )

    def dense():
        return torch.einsum("bmhr,bnhr->bhmn", qf, kf).expand(B, H, -1, -1)

    if math:
        found["sdpa efficient dense"] = lambda: sdpa("efficient")(q, k, v, mask=dense())
        found["sdpa math dense"] = lambda: sdpa("math")(q, k, v, mask=dense())
        found["sdpa math"] = lambda: sdpa("math")(q, k, v)
    try:
        from flash_attn.cute import flash_attn_func

        def fa4(a, b, c, scale=None):
            return first(flash_attn_func(a, b, c, softmax_scale=scale))

        found["flash-attn 4"] = lambda: fa4(q, k, v)
        for pad_v in (False, True):
            name = "flash-attn 4 concatenated" + (", v padded" if pad_v else "")
            found[name] = lambda pad_v=pad_v: concatenated(fa4, q, k, v, qf, kf, pad_v)
    except Exception as error:
        MISSING["flash-attn 4"] = str(error)[:200]
    if flashbias_path:
        sys.path.insert(0, flashbias_path)
        try:
            from flash_bias_triton import flash_bias_func

            found["FlashBias' kernel"] = lambda: flash_bias_func(
                q, k, v, qf.expand(B, -1, H, -1), kf.expand(B, -1, H, -1), None, False, D**-0.5
            )
        except Exception as error:
            MISSING["FlashBias' kernel"] = str(error)[:200]
    if half and math:
        found.update(flex_peers(q, k, v, qf, kf, dense))
    return found


def flex_peers(q, k, v, qf, kf, dense):
    """flex_attention with the bias in three forms, each of which learns if the version can."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q, k, v, scale=None, score=None):
        compiled = torch.compile(flex_attention, dynamic=False)
        return heads_first(compiled(*map(heads_first, (q, k, v)), score_mod=score, scale=scale))

    def by_dense():
        bias = dense()
        return attend(q, k, v, score=lambda s, b, h, m, n: s + bias[b, h, m, n])

    def by_factors():
        def score(s, b, h, m, n):
            for column in range(qf.shape[-1]):
                s = s + qf[0, m, 0, column] * kf[0, n, 0, column]
            return s

        return attend(q, k, v, score=score)

    return {
        "flex_attention dense": by_dense,
        "flex_attention factors": by_factors,
        "flex_attention concatenated": lambda: concatenated(attend, q, k, v, qf, kf, False),
    }


MISSING = {}


def first(result):
    return result[0] if isinstance(result, tuple) else result


def make(shape, requires_grad=True):
    B, M, N, H, D, R, dtype = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size):
        data = torch.randn(*size, device="cuda", generator=generator).to(getattr(torch, dtype))
        return data.requires_grad_(requires_grad)

    lengths = [N * 3 // 4, N - N * 3 // 4]
    tensors = [
        random(B, M, H, D),
        random(B, N, H, D),
        random(B, N, H, D),
        random(1, M, 1, R),
        random(1, N, 1, R),
    ]
    return tensors + [random(1, M, 1, 2), lengths], random(B, M, H, D).detach()


def measure(functions, leaves, grad, repeats):
    """name -> dict of median milliseconds forward and forward+backward, extra MiB; peers that fail
    say why."""
    results, alive = {name: {} for name in functions}, {}

    def forward(function):
        return function()

    def both(function):
        out = function()
        torch.autograd.grad(out, leaves, grad, allow_unused=True)

    for name, function in functions.items():
        modes = [("forward", forward)]
        try:
            for _ in range(2):
                out = function()
            if out.requires_grad:
                try:
                    both(function)
                    modes.append(("forward+backward", both))
                except Exception as error:
                    results[name]["no backward"] = f"{type(error).__name__}: {str(error)[:160]}"
            torch.cuda.synchronize()
            for mode, run in modes:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                del out
                out = run(function)
                torch.cuda.synchronize()
                results[name]["MiB " + mode] = round(
                    (torch.cuda.max_memory_allocated() - before) / 2**20, 1
                )
            alive[name] = modes
        except Exception as error:
            results[name]["failed"] = f"{type(error).__name__}: {str(error)[:160]}"
    times = {(name, mode): [] for name, modes in alive.items() for mode, _ in modes}
    for _ in range(repeats):
        for name, modes in alive.items():
            for mode, run in modes:
                begin, end = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                )
                torch.cuda._sleep(PAUSE)
                begin.record()
                run(functions[name])
                end.record()
                times[name, mode].append((begin, end))
    torch.cuda.synchronize()
    for (name, mode), pairs in times.items():
        taken = sorted(a.elapsed_time(b) for a, b in pairs)
        results[name][mode] = round(taken[len(taken) // 2], 4)
    return results


def add_wall_times(results, functions, leaves, grad, calls=10, repeats=5):
    """Milliseconds a call, the host's time included: the least of `repeats` rounds, the peers
    interleaved."""

    def both(function):
        torch.autograd.grad(function(), leaves, grad, allow_unused=True)

    modes = {"forward": lambda function: function(), "forward+backward": both}
    cells = [
        (name, mode, run)
        for name, row in results.items()
        for mode, run in modes.items()
        if mode in row
    ]
    for _ in range(repeats):
        for name, mode, run in cells:
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                run(functions[name])
            torch.cuda.synchronize()
            taken = round((time.perf_counter() - began) / calls * 1e3, 4)
            results[name]["wall " + mode] = min(taken, results[name].get("wall " + mode, taken))


def errors(functions, t, grad):
    """name -> relative error (L2) against float64: of the output, and of the gradient that is worst
    (and which)."""
    wanted = {}
    found = {}
    for name, function in functions.items():
        kind = "segments" if "segments" in name else "none" if not is_biased(name) else "factors"
        if kind not in wanted:
            leaves, out = exact(t, torch.float64, kind == "factors", kind == "segments")
            grads = torch.autograd.grad(out, leaves, grad.double(), allow_unused=True)
            wanted[kind] = [out.detach()] + list(grads)
            del leaves, out, grads
        try:
            out = function()
            got = [out.detach()]
            if out.requires_grad:
                got += list(torch.autograd.grad(out, t[:6], grad, allow_unused=True))
        except Exception:
            continue
        ratios = {}
        for label, a, b in zip(
            ("out", "q", "k", "v", "q_factor", "k_factor", "weights"), got, wanted[kind]
        ):
            if a is not None and b is not None:
                ratios[label] = float(((a.double() - b).norm() / b.norm()).nan_to_num(9e9))
        worst = max(ratios, key=lambda label: (label != "out", ratios[label]))
        found[name] = {"error": ratios["out"], "worst gradient error": [worst, ratios[worst]]}
    return found


def is_biased(name):
    return (
        any(word in name for word in ("factors", "concatenated", "dense", "FlashBias", "flex"))
        or name == "picked"
    )


def exact(t, dtype, factors=True, segments=False):
    """The same attention by plain PyTorch in `dtype`, with its gradients left to autograd."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in t[:6]]
    q, k, v, qf, kf, w = leaves
    call = Call(
        q,
        k,
        v,
        qf if factors else None,
        kf if factors else None,
        w if segments else None,
        tuple(t[6]),
        None,
        None,
        None,
        0.0,
        q.shape[-1] ** -0.5,
        torch.zeros(1),
        (True,) * 7,
    )
    return leaves, of_call(call, dtype=None)


def benchmark(args):
    report = dict(about(args.out, args.flashbias_path), shapes={})
    for name in args.only or (QUICK if args.quick else SHAPES):
        shape = SHAPES[name]
        t, grad = make(shape)
        B, M, N, H, D, R, dtype = shape
        functions = {
            peer: call
            for peer, call in peers(
                t, args.flashbias_path, math=name in ("cmt", "square 4096")
            ).items()
            if re.search(args.peers, peer)
        }
        results = measure(functions, t[:6], grad, args.repeats)
        if B * H * M * N <= SMALL:
            add_wall_times(results, functions, t[:6], grad)
        flops = 4 * B * M * N * H * D
        if B * H * M * N <= 6e8:
            for peer, row in errors(functions, t, grad).items():
                results[peer].update(row)
        print(f"{name} {shape}")
        for peer, row in results.items():
            if "forward" in row:
                row["TFLOP/s forward"] = round(flops / row["forward"] / 1e9, 1)
            print(
                "  {:32} {}".format(peer, {k: v for k, v in row.items() if "TFLOP" not in k}),
                flush=True,
            )
        report["shapes"][name] = dict(shape=shape, results=results)
        report["missing"] = MISSING
        if args.out:
            with open(args.out, "w") as file:
                json.dump(report, file, indent=1)
        del t, grad, functions
        torch.cuda.empty_cache()


def grads_of(out, leaves, grad):
    return [out] + [
        x for x in torch.autograd.grad(out, leaves, grad, allow_unused=True) if x is not None
    ]


# lengths, heads, head dim, rank, dtype, features
def grid():
    lengths = [(1, 1), (1, 257), (113, 203), (128, 128), (257, 1), (1023, 1024), (100, 5640)]
    dims, ranks = [16, 32, 40, 64, 80, 128], [1, 2, 3, 8, 13, 16, 33, 64]
    dtypes = ["float16", "bfloat16", "float32"]
    features = [
        "factors",
        "segments",
        "dense",
        "dense rows",
        "mask",
        "padding",
        "added padding",
        "everything",
        "dropout",
    ]
    for place in range(54):
        yield (
            lengths[place % 7],
            2,
            dims[place % 6],
            ranks[(place + place // 8) % 8],
            dtypes[(place // 2) % 3],
            features[(place + place // 9) % 9],
        )
    yield (1490, 22384), 1, 32, 8, "float16", "factors"
    yield (1490, 22384), 1, 32, 24, "bfloat16", "factors"
    yield (1490, 22384), 1, 32, 8, "float32", "segments"


def one_check(lengths, H, D, R, dtype, feature, generator):
    (M, N), B = lengths, 2
    low = getattr(torch, dtype)

    def random(*size):
        return torch.randn(*size, device="cuda", generator=generator).to(low)

    has = lambda *names: feature in names + ("everything",)  # noqa: E731
    tensors = [random(B, M, H, D), random(B, N, H, D), random(B, N, H, D), None, None, None, None]
    if has("factors", "dropout"):
        tensors[3], tensors[4] = random(1, M, H, R), random(B, N, 1, R)
    split = [N // 3, N - N // 3] if N > 2 else [N]
    if has("segments"):
        tensors[5] = random(B, M, 1, len(split))
    if has("dense"):
        tensors[6] = random(1, H, M, N)
    elif feature == "dense rows":
        tensors[6] = random(B, 1, 1, N)
    mask = torch.rand(B, 1, M, N, device="cuda", generator=generator) < 0.3 if has("mask") else None
    padding = None
    if has("padding"):
        padding = torch.rand(B, N, device="cuda", generator=generator) < 0.2
        padding[:, : N // 2] = True
    elif feature == "added padding":
        padding = random(B, N)
    p = 0.2 if has("dropout") else 0.0
    grad = random(B, M, H, D)

    def run(cast, plain):
        leaves = [None if x is None else x.detach().to(cast).requires_grad_() for x in tensors]
        if plain:
            torch.manual_seed(1)
            seed = torch.randint(1 << 62, (1,), dtype=torch.int64, device="cuda")
            call = Call(
                *leaves[:6], tuple(split), leaves[6], mask, padding, p, D**-0.5, seed, (True,) * 7
            )
            dropout = dropout_of(call)
            keep = None if dropout is None else dropout.kept(0, M, 0, N) * dropout.scale
            out = of_call(call, keep, None)
        else:
            torch.manual_seed(1)
            out = fused_attention(*leaves[:6], split, leaves[6], mask, padding, p, on_failure=fail)
        return [
            x.detach().double()
            for x in grads_of(out, [x for x in leaves if x is not None], grad.to(cast))
        ]

    want, plain, got = run(torch.float64, True), run(low, True), run(low, False)
    worst = 0.0
    for a, b, c in zip(want, plain, got):
        size = a.norm().clamp_min(1e-12)
        limit = 2 * ((b - a).norm() / size) + 1e-5 * max(1.0, float(a.numel() ** 0.5 / size))
        worst = max(worst, float(((c - a).norm() / size).nan_to_num(1e9) / limit))
    return worst


def fail(call, grad_out, error):
    raise error


def check_part(part, parts):
    """Every parts-th case of the grid, each from draws of its own: (case, worst error over what is
    allowed, or what was wrong)."""
    generator = torch.Generator("cuda")
    from flashbias_patch.attention.kernels import launcher_backward, problem

    problem.empty = lambda *size, **options: torch.empty(*size, **options).fill_(
        float("nan")
    )  # every element written?
    separate, found = launcher_backward.SEPARATE, []
    for place, case in list(enumerate(grid()))[part::parts]:
        launcher_backward.SEPARATE = separate * (place % 2)  # gradients of shared factors both ways
        try:
            found.append((case, one_check(*case, generator.manual_seed(place))))
        except Exception as error:
            found.append((case, f"{type(error).__name__}: {str(error)[:200]}"))
            if "CUDA error" in str(error):
                break
        torch.cuda.empty_cache()
    return found


def check(args):
    began = time.time()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        parts = pool.starmap(check_part, [(part, args.jobs) for part in range(args.jobs)])
    cases = sorted(
        sum(parts, []), key=lambda found: (isinstance(found[1], str), found[1]), reverse=True
    )
    bad = [found for found in cases if isinstance(found[1], str) or found[1] > 1]
    torch.use_deterministic_algorithms(True)
    t, grad = make((2, 1490, 22384, 8, 32, 8, "float16"))
    repeats = [grads_of(fused_attention(*t[:5]), t[:5], grad) for _ in range(10)]
    equal = all(torch.equal(a, b) for other in repeats[1:] for a, b in zip(repeats[0], other))
    print(
        f"checked {len(cases)}, {time.time() - began:.0f} s; error over what is allowed, the worst:"
    )
    for case, ratio in [*bad, *cases[len(bad) :][:5]]:
        print(f"  {ratio if isinstance(ratio, str) else format(ratio, '.2f')}  {case}")
    print(f"ten deterministic repeats bit-equal: {equal}")
    if args.out:
        report = about(args.out, args.flashbias_path)
        report.update(
            repeats_equal=equal, cases=[dict(case=case, ratio=ratio) for case, ratio in cases]
        )
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)
    return 1 if bad or not equal else 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--peers", default="", metavar="REGEX", help="those whose name matches")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--jobs", type=int, default=4, help="processes for --check, which mostly compiles"
    )
    parser.add_argument(
        "--flashbias-path", help="folder that holds FlashBias' flash_bias_triton.py"
    )
    parser.add_argument("--out", help="where the JSON goes")
    args = parser.parse_args()
    return check(args) if args.check else benchmark(args)


if __name__ == "__main__":
    sys.exit(main())
