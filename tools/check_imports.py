"""The import contract: which parts of flashbias_patch may import which, checked from the source
alone.

    python tools/check_imports.py          # exit status 1 and one line per violation

Data flows one way: patching -> attention -> bias, kernels. Imports inside functions count too;
those under `if TYPE_CHECKING` do not. Modules of attention/ do not import each other in a circle.
Private names of torch are read in _torch_internals.py only.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "flashbias_patch"

# part -> parts of the package, and libraries, that it must not import. A part is a module or
# package by its prefix; it may always import itself.
FORBIDDEN: Dict[str, Tuple[str, ...]] = {
    "attention.reference_attention": ("attention.kernels",),
    "attention.chunked_attention": ("attention.kernels",),
    "bias": (
        "attention",
        "patching",
        "aqr",
        "monitor",
        "compat",
        "cli",
        "ab",
        "triton",
        "mmcv",
        "mmengine",
    ),
    "attention": ("patching", "aqr", "monitor", "compat", "cli", "ab", "mmcv", "mmengine"),
    "attention.kernels": (
        "attention",  # but for itself
        "patching",
        "aqr",
        "monitor",
        "compat",
        "cli",
        "ab",
        "mmcv",
        "mmengine",
    ),
    "attention.backends": (
        "attention.dispatch",
        "attention.selection",
        "attention.plans",
        "attention.breaker",
        "attention.recovery",
    ),
    "patching": ("attention.kernels", "cli", "ab", "triton"),
    "aqr": ("cli", "ab", "triton", "attention.kernels"),
    "monitor": ("attention", "bias", "aqr", "cli", "ab", "triton"),
    "compat": ("attention", "bias", "aqr", "monitor", "cli", "ab", "triton"),
    "settings": (
        "attention",
        "bias",
        "patching",
        "aqr",
        "monitor",
        "compat",
        "cli",
        "ab",
        "torch",
        "numpy",
    ),
    "telemetry": (
        "attention",
        "bias",
        "patching",
        "aqr",
        "monitor",
        "compat",
        "cli",
        "ab",
        "torch",
        "numpy",
    ),
    "ab": (
        "attention",
        "bias",
        "patching.install",
        "patching.seams",
        "patching.catalog",
        "aqr",
        "monitor",
        "compat",
        "cli",
        "triton",
    ),
}


# part -> what it may import although FORBIDDEN has it: the lowest modules of `attention`.
ALLOWED: Dict[str, Tuple[str, ...]] = {
    "attention.kernels": ("attention.reference_attention", "attention.chunked_attention")
}


def module_name(path: Path) -> str:
    """The module's name below the package: "attention.dispatch"; "" for the package itself."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[Tuple[int, str]]:
    """(line, name) of everything that a module imports; names of this package without its own name
    in front."""
    here = module_name(path).split(".") if module_name(path) else []
    package = here if path.name == "__init__.py" else here[:-1]
    tree = ast.parse(path.read_text())
    typing = [
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {id(node) for body in typing for statement in body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif node.level:
            base = package[: len(package) - node.level + 1]
            names = [
                ".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names
            ]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield node.lineno, name[len(PACKAGE) + 1 :] if name.startswith(PACKAGE + ".") else name


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def violations() -> List[str]:
    """One line per import that FORBIDDEN does not allow."""
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = module_name(path)
        for part, forbidden in FORBIDDEN.items():
            if inside(name, part):
                found += [
                    f"{path.relative_to(ROOT)}:{line}: {part} must not import {target} ({other})"
                    for line, target in imported(path)
                    for other in forbidden
                    if inside(target, other)
                    and not any(inside(target, own) for own in (part, *ALLOWED.get(part, ())))
                ]
    return found


# Modules that import others by a computed name: the names are those of a folder's modules.
LOADERS = {"attention.selection": "attention.backends"}
# Circles that are still there, by one of their modules.
KNOWN_CIRCLES = ("attention.kernels.problem",)


def import_graph() -> Dict[str, Set[str]]:
    """module -> modules of the package that it imports, anywhere in its code."""
    paths = {module_name(path): path for path in (ROOT / PACKAGE).rglob("*.py")}
    graph: Dict[str, Set[str]] = {}
    for name, path in paths.items():
        targets = {target for _, target in imported(path)}
        if name in LOADERS:
            targets |= {other for other in paths if inside(other, LOADERS[name])}
        modules = set()
        for target in targets:
            while target and target not in paths:  # a name inside a module
                target = target.rpartition(".")[0]
            modules.add(target)
        graph[name] = modules - {name, ""}
    return graph


def circles(graph: Dict[str, Set[str]]) -> List[List[str]]:
    """Groups of modules that import each other in a circle."""

    def reachable(start: str) -> Set[str]:
        seen: Set[str] = set()
        left = [start]
        while left:
            new = graph.get(left.pop(), set()) - seen
            seen |= new
            left += new
        return seen

    reached = {name: reachable(name) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached.get(other, ())))
        for name in graph
    }
    return [list(group) for group in sorted(groups) if group]


def circular_imports(part: str = "attention") -> List[str]:
    """One line per circle inside a part that is not in KNOWN_CIRCLES."""
    graph = {name: targets for name, targets in import_graph().items() if inside(name, part)}
    return [
        f"{part}: circular import: {', '.join(group)}"
        for group in circles(graph)
        if not set(group) & set(KNOWN_CIRCLES)
    ]


READERS = ("getattr", "hasattr", "setattr")


def private_torch_names(tree: ast.Module) -> Iterator[Tuple[int, str]]:
    """(line, dotted name) of each private name of torch in a module: imported, an attribute of one
    of torch's modules or classes, or the string in getattr, hasattr or setattr of one."""
    bound = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.asname, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(a.asname or a.name, f"{node.module}.{a.name}") for a in node.names]
        else:
            continue
        for name, full in names:
            if inside(full, "torch"):
                if name is not None:
                    bound[name] = full
                if any(is_private(part) for part in full.split(".")):
                    yield node.lineno, full

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return bound.get(node.id, "")
        if isinstance(node, ast.Attribute):
            base = "" if node.attr == "torch" else dotted(node.value)
            return "torch" if node.attr == "torch" else base and f"{base}.{node.attr}"
        return ""

    for node in ast.walk(tree):
        owner, name = None, ""
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in READERS and node.args[1:]:
            owner, name = node.args[0], str(getattr(node.args[1], "value", ""))
        if owner is not None and is_private(name) and dotted(owner):
            yield owner.lineno, f"{dotted(owner)}.{name}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses() -> List[str]:
    """One line per private name of torch outside _torch_internals.py."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name} is private: read it in _torch_internals.py"
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        if path.name != "_torch_internals.py"
        for line, name in private_torch_names(ast.parse(path.read_text()))
    ]


def main() -> int:
    found = violations() + circular_imports() + private_uses()
    print("\n".join(found) if found else "import contract: kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
