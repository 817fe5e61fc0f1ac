"""The package files that one steady-state patched call visits, forward and backward, in the order
of the first visit: how much one has to read to follow a call.

    python tools/count_files.py                  # a training step of CMT's attention on the CPU
    python tools/count_files.py --bias           # with a learned low-rank bias
    python tools/count_files.py --path fused     # through the fused operator, without launches

Counted by tracing (sys.setprofile) a call that has run a few times before, with the stand-ins of
tests/stand_ins (see benchmarks/host_calls.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flashbias_patch"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import host_calls  # noqa: E402

from tests import stand_ins  # noqa: E402


def visited(call: Callable[[], Any]) -> List[str]:
    """Package files whose functions run inside `call()`, in the order of the first visit."""
    names: Dict[str, None] = {}

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            names[frame.f_code.co_filename] = None

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    files = dict.fromkeys(Path(os.path.realpath(name)) for name in names)
    return [file.relative_to(PACKAGE).as_posix() for file in files if PACKAGE in file.parents]


def files_of_a_step(path: str = "auto", bias: bool = False) -> List[str]:
    """Files that a patched cross attention of CMT visits, forward and backward. path: "auto" for
    the CPU's backend, "fused" for the fused operator."""
    target = host_calls.TARGETS["CMT"]
    launches = host_calls.fused_without_launches() if path == "fused" else contextlib.nullcontext()
    with stand_ins.repository(target.repository) as load_module, launches:
        module = host_calls.attention(host_calls.load(target, load_module), target, "cpu")
        operands = host_calls.operands("cpu", False)
        with host_calls.patched():
            cases = {case.name: case for case in host_calls.cases(module, operands, bias)}
            forward = cases["training"].prepare()

            def step() -> None:
                forward().sum().backward()

            for _ in range(host_calls.WARM_UP):
                step()
            return visited(step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", choices=("auto", "fused"), default="auto")
    parser.add_argument("--bias", action="store_true", help="with a learned low-rank bias")
    args = parser.parse_args()
    files = files_of_a_step(args.path, args.bias)
    for number, name in enumerate(files, 1):
        print(f"{number:3d}  {name}")


if __name__ == "__main__":
    main()
