"""Private names of flashbias_patch in the tests, found from the source alone.

    python tools/check_private_names.py    # exit status 1 and one line per use

A test of a public behaviour uses public names. What has no public way in is reached through
tests/support/internals.py, which says why. A use is the import of a private module or name of the
package, `thing._name`, or the string "_name" given to getattr, setattr, monkeypatch or
mock.patch.object, where the package defines `_name`.

Not counted: what is read of another library's modules (torch._C) or of other tests' modules,
`self._name`, `super()._name`, and names that the same file or tests/stand_ins define, unless they
are read of something imported from the package. An exception has `# private name: why` in the line
or in the line above.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "flashbias_patch"
SUPPORT = ROOT / "tests" / "support"
STAND_INS = ROOT / "tests" / "stand_ins"
EXCEPTION = "# private name:"
READERS = ("getattr", "hasattr", "setattr", "delattr", "object")
# Of named tuples and of torch.nn.Module, although the package sets some.
FOREIGN = ("_asdict", "_buffers", "_fields", "_make", "_modules", "_parameters", "_replace")


def is_private(name: str) -> bool:
    return name.strip("_") != "" and name.startswith("_") and not name.startswith("__")


def definitions(tree: ast.Module, anywhere: bool = False) -> Set[str]:
    """Private functions, classes, variables and attributes that a module defines; `anywhere`:
    attributes that it sets on other objects too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and (anywhere or ast.unparse(node.value) in ("self", "cls"))
        ):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def defined_under(folder: Path, anywhere: bool = False) -> Set[str]:
    """Private names that the modules under a folder define."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py"))
    return {name for tree in trees for name in definitions(tree, anywhere)}


def imports(tree: ast.Module) -> Dict[str, str]:
    """Name in the module -> what it was imported as: "torch.nn", "flashbias_patch.bias"."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full = alias.name if alias.asname else alias.name.partition(".")[0]
                bound[alias.asname or full] = full
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{base}.{alias.name}"
    return bound


def of_package(full: str) -> bool:
    return full.partition(".")[0] == PACKAGE


def root(node: ast.expr) -> Tuple[str, bool]:
    """(name that an expression begins with or "", whether only attributes follow it)."""
    plain = True
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            node = node.value
        elif isinstance(node, ast.Call):
            node, plain = node.func, False
        elif isinstance(node, ast.Subscript):
            node, plain = node.value, False
        else:
            return "", False
    return node.id, plain


def reads(tree: ast.Module) -> Iterator[Tuple[int, ast.expr, str]]:
    """(line, of what, private name) of each attribute that a module reads or sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.end_lineno or node.lineno, node.value, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in READERS:
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield name.lineno, node.args[0], str(name.value)


def uses(tree: ast.Module, private: Set[str], others: Set[str]) -> Iterator[Tuple[int, str]]:
    """(line, name) of each use in a module of the package's private names. `others`: names that
    the stand-ins define too."""
    bound, others = imports(tree), others | definitions(tree)
    for node in ast.walk(tree):
        full = []
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in full:
            if of_package(name) and any(map(is_private, name.split("."))):
                yield getattr(node, "lineno", 0), name
    for line, owner, name in reads(tree):
        first, plain = root(owner)
        whole = bound.get(first, "")
        if name not in private or name in FOREIGN or first in ("self", "cls", "super"):
            continue
        if of_package(whole) or not (name in others or (whole and plain)):
            yield line, name
    for line, text in dotted_strings(tree):
        if any(is_private(part) and part in private for part in text.split(".")):
            yield line, text


def dotted_strings(tree: ast.Module) -> Iterator[Tuple[int, str]]:
    """(line, "flashbias_patch.module.name") of the strings given to monkeypatch or mock.patch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            first, function = node.args[0], ast.unparse(node.func).split(".")[-1]
            text = str(first.value) if isinstance(first, ast.Constant) else ""
            if function in (*READERS, "patch") and of_package(text):
                yield first.lineno, text


def excepted(lines: List[str], line: int) -> bool:
    return any(EXCEPTION in text for text in lines[max(0, line - 2) : line])


def found() -> List[str]:
    """One line per use in tests/, but for tests/support/."""
    private, others = defined_under(ROOT / PACKAGE, anywhere=True), defined_under(STAND_INS)
    rows = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if SUPPORT in path.parents or STAND_INS in path.parents:
            continue
        text = path.read_text(encoding="utf-8")
        rows += [
            f"{path.relative_to(ROOT)}:{line}: {name} is private: use a public name, or "
            "tests/support/internals.py"
            for line, name in sorted(set(uses(ast.parse(text), private, others)))
            if not excepted(text.splitlines(), line)
        ]
    return rows


def main() -> int:
    rows = found()
    print("\n".join(rows) if rows else "private names in tests: none")
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main())
