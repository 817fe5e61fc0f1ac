"""How processes end that stop right after a backward pass, with the wait of
attention/autograd_exit.py and without it.

    python benchmarks/exits.py --out benchmarks/results/exits_h200.json

As many at once as there are processors, since two threads race. Status -6 is abort().
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
from typing import Dict, List, Optional

from provenance import about

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))


def child(wait: bool) -> None:
    """A short script that ends with a backward pass, but for the dispatcher, whose self-check takes
    time."""
    import torch

    from flashbias_patch.attention import autograd_exit
    from flashbias_patch.attention.kernels.autograd import fused_attention

    if wait:
        autograd_exit.wait_for_autograd()
    tensors = [
        torch.randn(2, length, 8, 32, device="cuda").half().requires_grad_()
        for length in (1490, 6000, 6000)
    ]
    mask = torch.rand(1, 1, 1490, 6000, device="cuda") < 0.3
    for _ in range(3):
        out = fused_attention(*tensors, mask=mask)
        grads = torch.autograd.grad(out, tensors, torch.randn_like(out))  # noqa: F841  lives until the end
    torch.cuda.synchronize()


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    parser.add_argument("--out")
    parser.add_argument("--child", choices=("wait", "no wait"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child == "wait")
    statuses: Dict[str, Dict[int, int]] = {
        "wait": collections.Counter(),
        "no wait": collections.Counter(),
    }
    environment = dict(os.environ, FLASHBIAS_PATCH="0")
    for turn in range(args.rounds):
        for kind, found in statuses.items():
            command = [sys.executable, os.path.abspath(__file__), "--child", kind]
            running = [
                subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
                for _ in range(args.at_once)
            ]
            for process in running:
                found[process.wait()] += 1
            print(f"{turn + 1}/{args.rounds} {kind}: {dict(found)}", flush=True)
    if args.out:
        report = dict(about(args.out), at_once=args.at_once, statuses=statuses)
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
