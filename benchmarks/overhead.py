"""What the shim costs: import time over a bare interpreter, and Python time a call, each beside the unpatched.

    python benchmarks/overhead.py [--out benchmarks/results/overhead_cpu.json]

A call is timed at a size where arithmetic vanishes (2 queries, 2 keys, 8 channels), patched and unpatched
alternating in one process, so that the difference is the shim's own Python.
"""
from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time


def import_times(repeats: int) -> dict:
    """Milliseconds of `import flashbias_patch` and of a bare start, alternating, medians."""
    code = "import time; t = time.perf_counter(); {} ; print((time.perf_counter() - t) * 1e3)"

    def run(statement: str) -> float:
        return float(subprocess.run([sys.executable, "-c", code.format(statement)], check=True, text=True,
                                    stdout=subprocess.PIPE).stdout)

    def start() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        return (time.perf_counter() - begin) * 1e3

    bare = [start() for _ in range(repeats)]
    return {
        "bare_interpreter_ms": statistics.median(bare),
        "import_ms": statistics.median(run("import flashbias_patch") for _ in range(repeats)),
        "import_off_ms": statistics.median(
            run("import os; os.environ['FLASHBIAS_PATCH'] = '0'; import flashbias_patch") for _ in range(repeats)
        ),
    }


def call_times(repeats: int, calls: int) -> dict:
    """Microseconds a forward of a PETR-shaped module, patched and not, and the difference."""
    import torch
    from torch import nn

    import flashbias_patch
    from flashbias_patch.patching import hooks

    class PETRMultiheadAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

        def forward(self, query, key=None, value=None, identity=None, query_pos=None, key_pos=None,
                    attn_mask=None, key_padding_mask=None, **kwargs):
            query, key = query + query_pos, key + key_pos
            return identity + self.attn(query, key, value, attn_mask=attn_mask,
                                        key_padding_mask=key_padding_mask)[0]

    torch.set_num_threads(1)
    module = PETRMultiheadAttention()
    x = torch.randn(2, 1, 8)
    padding = torch.zeros(1, 2)

    def timed() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            module(x, x, x, identity=x, query_pos=x, key_pos=x, key_padding_mask=padding)
        return (time.perf_counter() - begin) / calls * 1e6

    unpatched, patched = [], []
    for _ in range(repeats):
        flashbias_patch.uninstall()
        timed()
        unpatched.append(timed())
        flashbias_patch.install()
        hooks.claim(PETRMultiheadAttention)
        timed()
        patched.append(timed())
    return {
        "unpatched_us": statistics.median(unpatched),
        "patched_us": statistics.median(patched),
        "ratio": statistics.median(patched) / statistics.median(unpatched),
        "difference_us": statistics.median(patched) - statistics.median(unpatched),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--out")
    args = parser.parse_args()
    import torch
    import wrapt

    result = {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(), "torch": torch.__version__, "wrapt": wrapt.__version__,
        "import": import_times(args.repeats), "call": call_times(args.repeats, args.calls),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
