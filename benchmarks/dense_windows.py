"""Run a script that trains a CMT detector, with AQR's windows painted into a dense bias in plain
PyTorch.

    python benchmarks/dense_windows.py [--windows KEY=VALUE,...] SCRIPT [ARGS ...]

What `FLASHBIAS_AQR=bias=window,KEY=VALUE,...` adds to a patched run, in the way of a repository
without this package: the detector's head gets the router before the script moves the detector to
its device, and every cross attention the bias as its mask (B*H, M, N). The script must not import
flashbias_patch.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Dict

os.environ["FLASHBIAS_PATCH"] = "0"
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from aqr import give_dense_windows

from flashbias_patch.aqr import WindowRouter
from flashbias_patch.aqr import options as aqr_options


def router_of(head: Any, options: Dict[str, Any]) -> WindowRouter:
    """A router for the keys of `head`: 2 weights a query where it has lidar and cameras, else 1."""
    fusion = type(head.transformer).__name__ == "CmtTransformer"
    read = aqr_options.read({"enable": True, "bias": "window", **options})
    names = ("hidden_dims", "init_bias_scale", *aqr_options.ONLY["window"])
    return WindowRouter(
        head.transformer.embed_dims,
        2 if fusion else 1,
        **{name: getattr(read, name) for name in names},
    )


def watch(options: Dict[str, Any]) -> None:
    """A detector that is moved to a device gets its router first."""
    own = torch.nn.Module.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        head = self._modules.get("pts_bbox_head")
        if head is not None and "aqr" not in head.transformer._modules:
            head.transformer.aqr = router_of(head, options)
            give_dense_windows(head)
        return own(self, *args, **kwargs)

    torch.nn.Module.to = to  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--windows", default="", metavar="KEY=VALUE,...", help="options of aqr=dict(bias='window')"
    )
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    watch(aqr_options.pairs(args.windows, "--windows"))
    sys.argv = [args.script, *args.args]
    sys.path.insert(0, os.path.dirname(os.path.abspath(args.script)))
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
