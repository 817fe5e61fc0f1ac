"""The runs that benchmarks/real_models.py makes: names, fields, order.

Names begin with A (unpatched) or B (patched). `cp` is with_cp, `amp` mmcv's fp16, `dtype` is
FLASHBIAS_DTYPE, `bias` a learned bias on every cross attention (unpatched: dense, as attn_mask),
`windows` FLASHBIAS_AQR with windows, `drop0` no dropout, `b6` a batch of six.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

FLASH = "PETRMultiheadFlashAttention"


class Run(NamedTuple):
    """One kind of run. `dtype`, `aqr` and `backend` are FLASHBIAS_DTYPE, FLASHBIAS_AQR and
    FLASHBIAS_BACKEND of a patched run; `steps` are training steps, or calls of an inference run."""

    name: str
    patch: bool
    dtype: str = "auto"
    attn: str = "PETRMultiheadAttention"
    size: str = "1600x640"
    bs: int = 2
    with_cp: bool = False
    fp16: bool = False
    dropout: float = 0.1
    bias: bool = False
    aqr: str = ""
    backend: str = ""
    steps: int = 8
    layers: int = 6
    repeat: int = 0

    def twin(self) -> Tuple[Any, ...]:
        """Runs that start from the same weights and should compute the same."""
        return (self.attn, self.size, self.bs, self.dropout, self.bias, self.layers, self.aqr)

    def model(self) -> Tuple[Any, ...]:
        """Runs that can share one detector in one process."""
        return (*self.twin()[:-1], self.with_cp, self.fp16, self.aqr)


def run(name: str, **fields: Any) -> Dict[str, Any]:
    return Run(name, name.startswith("B"), **fields)._asdict()


def counterpart(name: str) -> str:
    """The unpatched run that a patched one is measured against."""
    name = name.replace("B flash amp", "A amp").replace("B flash", "A fp32").replace("B ", "A ")
    return re.sub(r" (?:dtype|aqr|backend)=\S+", "", name)


def by_counterpart(runs: Sequence[Dict[str, Any]]) -> List[List[Dict[str, Any]]]:
    """The runs in groups: an unpatched run and all those measured against it."""
    groups: Dict[str, List[Dict[str, Any]]] = {}
    for fields in runs:
        groups.setdefault(counterpart(fields["name"]), []).append(fields)
    return list(groups.values())


def in_order(runs: Sequence[Dict[str, Any]], repeats: int) -> List[Dict[str, Any]]:
    """Each run `repeats` times: per unpatched run, it and those measured against it, forwards and
    backwards in turn."""
    return [
        {**fields, "repeat": repeat}
        for group in by_counterpart(sorted(runs, key=lambda fields: bool(fields["patch"])))
        for repeat in range(repeats)
        for fields in (group if repeat % 2 == 0 else group[::-1])
    ]


def in_processes(runs: Sequence[Dict[str, Any]], together: bool) -> List[List[Dict[str, Any]]]:
    """The runs of each process: one, or an unpatched run with all those measured against it."""
    if not together:
        return [[fields] for fields in runs]
    return by_counterpart(runs)


def cmt_runs() -> List[Dict[str, Any]]:
    fp16: Dict[str, Any] = {"dtype": "fp16"}
    full = [
        run("A fp32"),
        run("A fp32 cp", with_cp=True),
        run("A amp", fp16=True, steps=6),
        run("A amp cp", fp16=True, with_cp=True, steps=6),
        run("A fp32 bias", bias=True, steps=6),
        run("A fp32 bias cp", bias=True, with_cp=True, steps=6),
        run("A fp32 drop0", dropout=0.0),
        run("A fp32 drop0 bias", dropout=0.0, bias=True, steps=6),
        run("B fp32"),
        run("B fp32 dtype=fp16", **fp16),
        run("B flash", attn=FLASH),
        run("B fp32 cp", with_cp=True, steps=6),
        run("B fp32 dtype=fp16 cp", with_cp=True, **fp16),
        run("B flash cp", attn=FLASH, with_cp=True, steps=6),
        run("B amp", fp16=True, steps=6),
        run("B amp dtype=fp16", fp16=True, steps=6, **fp16),
        run("B flash amp", attn=FLASH, fp16=True, steps=6),
        run("B amp dtype=fp16 cp", fp16=True, with_cp=True, steps=6, **fp16),
        run("B fp32 bias", bias=True, steps=6),
        run("B fp32 dtype=fp16 bias", bias=True, steps=6, **fp16),
        run("B fp32 dtype=fp16 bias cp", bias=True, with_cp=True, steps=6, **fp16),
        run("B flash bias", bias=True, attn=FLASH, steps=6),
        run("B fp32 drop0", dropout=0.0),
        run("B fp32 dtype=fp16 drop0", dropout=0.0, **fp16),
        run("B flash drop0", dropout=0.0, attn=FLASH, steps=6),
        run("B fp32 drop0 bias", dropout=0.0, bias=True, steps=6),
    ]
    small = [
        {**fields, "name": fields["name"] + " 800x320", "size": "800x320"}
        for fields in full
        if fields["name"]
        in (
            "A fp32",
            "A fp32 cp",
            "A fp32 drop0",
            "B fp32",
            "B fp32 dtype=fp16",
            "B flash",
            "B fp32 dtype=fp16 cp",
            "B fp32 drop0",
            "B fp32 dtype=fp16 drop0",
        )
    ]
    return sorted(full + small, key=lambda fields: fields["patch"])


def family_runs(size: str, flash: bool) -> List[Dict[str, Any]]:
    rest: Dict[str, Any] = {"size": size, "dropout": 0.0}
    runs = [
        run("A fp32 drop0", **rest),
        run("A fp32 drop0 cp", with_cp=True, **rest),
        run("B fp32 drop0", **rest),
        run("B fp32 dtype=fp16 drop0", dtype="fp16", **rest),
        run("B fp32 dtype=fp16 drop0 cp", dtype="fp16", with_cp=True, **rest),
    ]
    return runs + ([run("B flash drop0", attn=FLASH, **rest)] if flash else [])


def fusion_runs(size: str, bs: int) -> List[Dict[str, Any]]:
    """The detector with its lidar branch (dropout 0.1, as its configuration has it)."""
    rest: Dict[str, Any] = {"size": size, "bs": bs}
    windows = "bias=window,window=15"
    return [
        run("A fp32", **rest),
        run("A fp32 cp", with_cp=True, **rest),
        run("A amp", fp16=True, **rest),
        run("A fp32 drop0", dropout=0.0, **rest),
        run("B fp32", **rest),
        run("B fp32 dtype=fp16", dtype="fp16", **rest),
        run("B fp32 dtype=bf16", dtype="bf16", **rest),
        run("B fp32 dtype=fp16 aqr=modality", dtype="fp16", aqr="bias=modality", **rest),
        run("B fp32 dtype=fp16 aqr=windows", dtype="fp16", aqr=windows, **rest),
        run("B fp32 backend=reference", backend="reference", **rest),
        run("B flash", attn=FLASH, **rest),
        run("B fp32 dtype=fp16 cp", dtype="fp16", with_cp=True, **rest),
        run("B amp dtype=fp16", dtype="fp16", fp16=True, **rest),
        run("B flash amp", attn=FLASH, fp16=True, **rest),  # as the configuration has it
        run("B fp32 drop0", dropout=0.0, **rest),
        run("B fp32 dtype=fp16 drop0", dropout=0.0, dtype="fp16", **rest),
    ]


def inference_runs(*sizes: str) -> List[Dict[str, Any]]:
    """Calls without gradients in evaluation mode, one frame and six at once, of each size."""
    runs = []
    for size in sizes:
        suffix = " " + size if size != sizes[0] else ""
        for bs in (1, 6):
            rest: Dict[str, Any] = {"size": size, "bs": bs, "steps": 30}
            named = f" b{bs}{suffix}"
            runs += [
                run("A fp32" + named, **rest),
                run("A amp" + named, fp16=True, **rest),
                run("B fp32" + named, **rest),
                run("B fp32 dtype=fp16" + named, dtype="fp16", **rest),
                run("B amp dtype=fp16" + named, fp16=True, dtype="fp16", **rest),
            ]
    return runs


RUNS = {
    "cmt": cmt_runs(),
    "fusion0100": fusion_runs("800x320", 2),
    "fusion0075": fusion_runs("1600x640", 1),
    "petr": family_runs("1408x512", False),
    "streampetr": family_runs("704x256", True),
}
INFERENCE = {
    "cmt": inference_runs("1600x640", "800x320"),
    "fusion0100": inference_runs("800x320"),
    "fusion0075": inference_runs("1600x640"),
    "petr": inference_runs("1408x512"),
    "streampetr": inference_runs("704x256"),
}
CHECKOUTS = {"fusion0100": "cmt", "fusion0075": "cmt"}  # of other families: their own name
BATCH = {
    "cmt": [
        run("A fp32"),
        run("A fp32 800x320", size="800x320"),
        run("B fp32 dtype=fp16", dtype="fp16"),
        run("B fp32 dtype=fp16 800x320", dtype="fp16", size="800x320"),
    ],
    "fusion0100": [
        run("A fp32", size="800x320"),
        run("B fp32 dtype=fp16", dtype="fp16", size="800x320"),
    ],
}
PROFILE = {
    family: [
        run("A fp32", size=size),
        run("B fp32 dtype=fp16", dtype="fp16", size=size),
        run("B flash", attn=FLASH, size=size),
    ]
    for family, size in (("cmt", "1600x640"), ("fusion0100", "800x320"))
}
TINY = {"bs": 1, "layers": 2, "steps": 2, "size": "160x64"}


def chosen(
    runs: Sequence[Dict[str, Any]], only: str, quick: bool, tiny: bool
) -> List[Dict[str, Any]]:
    found = [dict(fields) for fields in runs if re.search(only, fields["name"])]
    for fields in found:
        if quick:
            fields["steps"] = 4
        if tiny:
            fields.update(TINY)
    return found
