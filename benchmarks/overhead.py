"""The cost of the shim: import time over a bare interpreter, Python time a call beside the
unpatched, and guarding.

    python benchmarks/overhead.py [--out benchmarks/results/overhead_cpu.json]

The guarding of a call by the dispatcher is benchmarks/guarding.py. A call is timed at a size where
arithmetic vanishes (2 queries, 2 keys, 8 channels), patched and unpatched alternating in one
process, the best of all. `shim_us` is the shim's own Python: both once more with the attention's
tensor work answered by constants (F.multi_head_attention_forward; our projections and backend), and
the difference taken.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock


def import_times(repeats: int) -> dict:
    """Milliseconds of `import flashbias_patch` and of a bare start, alternating, medians."""
    code = "import time; t = time.process_time(); {} ; print((time.process_time() - t) * 1e3)"

    def run(statement: str) -> float:
        return float(
            subprocess.run(
                [sys.executable, "-c", code.format(statement)],
                check=True,
                text=True,
                stdout=subprocess.PIPE,
            ).stdout
        )

    def start() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        return (time.perf_counter() - begin) * 1e3

    bare = [start() for _ in range(repeats)]
    return {
        "bare_interpreter_ms": statistics.median(bare),
        "import_ms": statistics.median(run("import flashbias_patch") for _ in range(repeats)),
        "import_off_ms": statistics.median(
            run("import os; os.environ['FLASHBIAS_PATCH'] = '0'; import flashbias_patch")
            for _ in range(repeats)
        ),
    }


def call_times(repeats: int, calls: int) -> dict:
    """Microseconds of processor time a forward of a PETR-shaped module: unpatched, patched, and the
    shim's share."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    import flashbias_patch
    from flashbias_patch.attention import dispatch
    from flashbias_patch.attention.backends.base import Backend
    from flashbias_patch.patching import call_adapter, install
    from flashbias_patch.patching.seams import inner_attention

    class PETRMultiheadAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

        def forward(
            self,
            query,
            key=None,
            value=None,
            identity=None,
            query_pos=None,
            key_pos=None,
            attn_mask=None,
            key_padding_mask=None,
            **kwargs,
        ):
            query, key = query + query_pos, key + key_pos
            return (
                identity
                + self.attn(
                    query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask
                )[0]
            )

    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads, out = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4)

    class Constant(Backend):
        name = "triton"

        def why_not(self, inputs):
            return []

        def __call__(self, inputs):
            return out

    def trusted(candidate, name, inputs, key, verdicts) -> bool:
        verdicts[name] = dispatch.TRUSTED
        return True

    def without_tensor_work(patched: bool) -> float:
        with mock.patch.object(
            inner_attention, "F", SimpleNamespace(linear=lambda *a: x)
        ), mock.patch.object(
            call_adapter, "project", lambda *a: (heads, heads, heads)
        ), mock.patch.dict(dispatch.loaded, {"triton": Constant()}), mock.patch.object(
            dispatch.breakers, "by_signature", {}
        ), mock.patch.object(dispatch, "_passes_self_check", trusted):
            if patched:
                return timed()
            with mock.patch.object(F, "multi_head_attention_forward", lambda *a, **k: (x, None)):
                return timed()

    module = PETRMultiheadAttention()
    x = torch.randn(2, 1, 8)
    padding = torch.zeros(1, 2)

    def call() -> torch.Tensor:
        return module(x, x, x, identity=x, query_pos=x, key_pos=x, key_padding_mask=padding)

    def timed() -> float:
        begin = (
            time.process_time()
        )  # not the wall clock: other work on the machine is none of the shim's
        for _ in range(calls):
            call()
        return (time.process_time() - begin) / calls * 1e6

    unpatched, patched, ours, theirs = [], [], [], []
    for _ in range(repeats):
        flashbias_patch.uninstall()
        timed()
        unpatched.append(timed())
        flashbias_patch.install()
        install.claim(PETRMultiheadAttention)
        timed()
        patched.append(timed())
        ours.append(without_tensor_work(patched=True))
        flashbias_patch.uninstall()
        theirs.append(without_tensor_work(patched=False))
    return {
        "unpatched_us": min(unpatched),
        "patched_us": min(patched),
        "ratio": min(patched) / min(unpatched),
        "shim_us": min(ours) - min(theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--out")
    args = parser.parse_args()
    import guarding
    import torch
    import wrapt

    result = {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "wrapt": wrapt.__version__,
        "import": import_times(args.repeats),
        "call": call_times(args.repeats, args.calls),
        "guarding_us": guarding.measure(),
        "guarded_backward_us": guarding.measure_guarded_backward(),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
