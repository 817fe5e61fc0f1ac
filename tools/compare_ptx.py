"""Compare the PTX of two source trees: which variants of the compile tier changed.

    python tools/compare_ptx.py OLD_TREE NEW_TREE [--arch 90 ...] [--only TEXT] [--diff]
    python tools/compare_ptx.py OLD_TREE --save old.json   # then compare_ptx.py old.json NEW_TREE

Each tree compiles its own compile_kernels.py, in a process of its own, down to PTX
(ptxas does not run), without a GPU and without PyTorch. Line numbers, comments, names of files and
of kernels are left out of the comparison. A variant is known by architecture, kernel and name.
Exit status 1 if any variant differs or exists in NEW_TREE only; those that exist in OLD_TREE only
are listed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

ARCHS = (80, 86, 89, 90)
DEBUG = re.compile(r"^\s*\.section\s+\.debug_\w+\s*\{.*?^\s*\}", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^\s*(\.loc|\.file|\.target)\b.*$", re.MULTILINE)


def normalised(ptx: str, kernel: str) -> str:
    """The instructions alone."""
    text = re.sub(r"//.*$", "", DEBUG.sub("", ptx), flags=re.MULTILINE)
    text = LINE.sub("", text).replace(kernel, "KERNEL")
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def dump(tree: Path, archs: List[int], only: str, out: Path) -> None:
    """Compile the variants of one tree and write {variant: PTX} to `out`."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    (script,) = tree.glob("tests/**/compile_kernels.py")
    sys.path.insert(0, str(script.parent))
    import compile_kernels as tier
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda self, *args, **options: b""
    texts: Dict[str, str] = {}
    for arch in archs:
        seen: Dict[str, int] = {}
        for name, kernel, constants, dtype, pointers, choices in tier.variants(arch):
            label = f"{arch} {kernel.__name__} {name} ({dtype})"
            seen[label] = seen.get(label, 0) + 1
            if seen[label] > 1:
                label += f" {seen[label]}"
            if only not in label:
                continue
            try:
                built, _ = tier.fitting(kernel, constants, dtype, arch, pointers, choices)
                texts[label] = normalised(built.asm["ptx"], kernel.__name__)
            except RuntimeError as error:  # the compile tier leaves some out on 86 and 89
                texts[label] = str(error)
    out.write_text(json.dumps(texts))


def ptx_of(source: Path, archs: List[int], only: str, cache: str) -> Dict[str, str]:
    """{variant: PTX} of a tree, or of a file that --save wrote."""
    if source.is_file():
        saved: Dict[str, str] = json.loads(source.read_text())
        return {
            name: text
            for name, text in saved.items()
            if only in name and int(name.split()[0]) in archs
        }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ptx.json"
        environment = dict(os.environ, TRITON_CACHE_DIR=cache or str(Path(folder) / "cache"))
        command = [sys.executable, __file__, str(source.resolve()), "--dump", str(out)]
        command += ["--only", only, "--arch", *map(str, archs)]
        subprocess.run(command, check=True, env=environment)
        compiled: Dict[str, str] = json.loads(out.read_text())
        return compiled


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=Path, help="a source tree, or a file written by --save")
    parser.add_argument("new", type=Path, nargs="?", help="a source tree")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--only", default="", help="variants whose name contains this text")
    parser.add_argument("--save", type=Path, help="write the PTX of OLD to this file and end")
    parser.add_argument("--cache", default="", help="Triton's cache, to be used again next time")
    parser.add_argument("--diff", action="store_true", help="print the differing lines")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dump:
        dump(options.old, options.arch, options.only, options.dump)
        return 0
    old = ptx_of(options.old, options.arch, options.only, options.cache)
    if options.save:
        options.save.write_text(json.dumps(old))
        print(f"{len(old)} variants written to {options.save}")
        return 0
    if options.new is None:
        parser.error("NEW_TREE is missing: name a tree to compare with, or --save a file")
    new = ptx_of(options.new, options.arch, options.only, options.cache)
    changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    added, gone = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    for name in changed:
        print("differs:", name)
        if options.diff:
            before, after = old[name].splitlines(), new[name].splitlines()
            lines = difflib.unified_diff(before, after, "old", "new", n=1, lineterm="")
            print("\n".join(lines))
    for word, names in (("new:", added), ("gone:", gone)):
        print("".join(f"{word} {name}\n" for name in names), end="")
    same = len(old.keys() & new.keys()) - len(changed)
    print(f"{same} the same, {len(changed)} differ, {len(added)} new, {len(gone)} gone")
    return 1 if changed or added else 0


if __name__ == "__main__":
    sys.exit(main())
