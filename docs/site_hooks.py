"""Hooks of mkdocs: pages that are made from the code, and the check that every public name is
documented.

`reference/settings.md` comes from the table of settings, `reference/cli.md` from the argument
parsers, `reference/classes.md` from the catalog of targets and `changelog.md` from CHANGELOG.md, so
that none of them can go stale. The build fails if a name in `__all__` of a public module, or a
public method of such a class, has no docstring or is on no page of the reference.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("FLASHBIAS_PATCH", "0")

# Public module -> the page of the reference that its names are on.
PUBLIC = {
    "": "reference/api.md",
    "bias": "reference/bias.md",
    "aqr": "reference/aqr.md",
    "maps": "reference/maps.md",
    "monitor": "reference/monitor.md",
}
PACKAGE = "flashbias_patch"
UNDOCUMENTED = (
    "__version__",
    "aqr",
    "bias",
    "maps",
    "monitor",
    "attention_map",
)  # a string, and what has a page


def cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


# -- generated pages -------------------------------------------------------------------------------


def settings_page() -> str:
    """The environment variables, from settings.VARIABLES."""
    from flashbias_patch.settings import FALSE, TRUE, VARIABLES

    lines = [
        "# Settings",
        "",
        "Environment variables, read once per process. A value that a variable does not accept is "
        "named with those that it does; the package then uses the default, and the command line "
        "refuses to start. A "
        "variable whose name is not known is named with the nearest known one. An empty variable "
        "counts as unset.",
        "",
        f"A switch is on with {', '.join(f'`{word}`' for word in TRUE)}, and off with "
        f"{', '.join(f'`{word}`' for word in FALSE)}.",
        "",
        "| variable | default | meaning |",
        "|---|---|---|",
    ]
    for variable in VARIABLES:
        lines.append(
            f"| `{variable.name}` | {cell(variable.shown(variable.default))} | "
            f"{cell(variable.help)} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "How to use them: [turn it on](../guides/turn-on.md). Misread ones: "
            "[questions](../faq.md).",
            "",
        ]
    )


def help_of(action: argparse.Action) -> str:
    """The help text of an argument, its `%(name)s` replaced."""
    return re.sub(
        r"%\((\w+)\)s", lambda match: str(getattr(action, match.group(1))), action.help or ""
    )


def command_page() -> str:
    """The commands, their arguments and exit statuses, from the parsers of flashbias_patch.cli."""
    from flashbias_patch.cli.main import COMMANDS

    lines = ["# Command line", "", "`flashbias COMMAND --help` prints the same.", ""]
    for name in COMMANDS:
        module = importlib.import_module(f"flashbias_patch.cli.{name}")
        parser = argparse.ArgumentParser(prog=f"flashbias {name}", description=module.HELP)
        module.add_arguments(parser)
        usage = textwrap.fill(
            re.sub(r"\s+", " ", parser.format_usage()).strip().replace("usage: ", ""),
            76,
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        lines += [
            f"## flashbias {name}",
            "",
            f"{module.HELP[:1].upper()}{module.HELP[1:]}.",
            "",
            "```text",
            usage,
            "```",
            "",
            "| argument | meaning |",
            "|---|---|",
        ]
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            names = (
                ", ".join(f"`{option}`" for option in action.option_strings)
                or f"`{action.metavar or action.dest}`"
            )
            taken = action.metavar or (
                "" if action.nargs == 0 else action.dest.upper() if action.option_strings else ""
            )
            choices = (
                f" One of {', '.join(f'`{choice}`' for choice in action.choices)}."
                if action.choices
                else ""
            )
            value = f" {taken}" if action.option_strings and taken and not action.choices else ""
            lines.append(f"| {names}{value} | {cell(help_of(action))}{cell(choices)} |")
        lines.append("")
        status = (module.main.__doc__ or "").strip()
        if status.startswith("Exit status"):
            lines += [status, ""]
    return "\n".join(lines)


def classes_page() -> str:
    """The targets, from catalog.TARGETS and catalog.MODULES."""
    from flashbias_patch.patching.catalog import ENTRY_POINT_GROUP, MODULES, REGISTRIES, TARGETS

    lines = [
        "# Patched classes",
        "",
        "A class is patched if its name is in this table and its forward fits: its first "
        "parameters, and those that it must have. What each "
        "[seam](../guides/own-targets.md#seams) does. Classes of "
        "other packages: [targets of your own](../guides/own-targets.md).",
        "",
        "| class | seam | forward begins with | and has | further methods |",
        "|---|---|---|---|---|",
    ]
    for first in TARGETS:
        target = first
        while target is not None:
            begins, having = (
                ", ".join(f"`{name}`" for name in names)
                for names in (target.leading, target.having)
            )
            others = ", ".join(f"`{method}` ({seam})" for method, seam in target.others)
            lines.append(f"| `{target.name}` | {target.seam} | {begins} | {having} | {others} |")
            target = target.otherwise
    lines += [
        "",
        "## Where they are looked for",
        "",
        "In these modules, when they are imported:",
        "",
        *(f"- `{name}`" for name in MODULES),
        "",
        "in every class that is registered with "
        + " or ".join(f"`{module}.{name}`" for module, name in REGISTRIES.items())
        + ", and in modules that import flash_attn. Entry points of the group "
        f"`{ENTRY_POINT_GROUP}` add targets.",
        "",
        "Which public repositories were tried: [compatibility](../compatibility.md).",
        "",
    ]
    return "\n".join(lines)


def changelog_page() -> str:
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")


PAGES = {
    "reference/settings.md": settings_page,
    "reference/cli.md": command_page,
    "reference/classes.md": classes_page,
    "changelog.md": changelog_page,
}


# -- public names ----------------------------------------------------------------------------------


def exported(module: str) -> Dict[str, str]:
    """Name -> the module, below the package, that defines it: what `__all__` of a public module
    says."""
    path = ROOT / PACKAGE / module / "__init__.py" if module else ROOT / PACKAGE / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: List[str] = []
    homes: Dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            names = ast.literal_eval(node.value)
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                homes[alias.name] = ".".join(filter(None, [module, node.module]))
    return {name: homes.get(name, module) for name in names}


def definition(module: str, name: str) -> Tuple[str, ast.AST]:
    """(module, the definition of `name`), followed through the packages that hand it on."""
    folder = ROOT / PACKAGE / module.replace(".", "/")
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    body += [
        inner for node in body if isinstance(node, ast.If) for inner in node.body
    ]  # if TYPE_CHECKING
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return module, node
        if (
            isinstance(node, ast.ImportFrom)
            and node.level == 1
            and any(alias.name == name for alias in node.names)
        ):
            package = module if folder.is_dir() else module.rpartition(".")[0]
            return definition(".".join(filter(None, [package, node.module])), name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, node
    raise LookupError(f"{PACKAGE}.{module}: {name} is exported and not defined")


def undocumented() -> Iterator[str]:
    """One line per public name without a docstring, or that is on no page of the reference."""
    for module, page in PUBLIC.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name, home in exported(module).items():
            if name in UNDOCUMENTED:
                continue
            place, node = definition(home, name)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node):
                yield f"{PACKAGE}.{place}.{name} has no docstring"
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if (
                        isinstance(method, ast.FunctionDef)
                        and method.name[:1] != "_"
                        and not ast.get_docstring(method)
                        and not inherited(place, node, method.name)
                    ):
                        yield f"{PACKAGE}.{place}.{name}.{method.name} has no docstring"
            if f"::: {PACKAGE}.{place}.{name}\n" not in text:
                yield (
                    f"{PACKAGE}.{place}.{name} is not on docs/{page}: add a line `::: "
                    f"{PACKAGE}.{place}.{name}`"
                )


def inherited(module: str, node: ast.ClassDef, method: str) -> bool:
    """Does a base class in this package document the method?"""
    for base in node.bases:
        if not isinstance(base, ast.Name):
            continue
        try:
            place, parent = definition(module, base.id)
        except LookupError:
            continue
        if isinstance(parent, ast.ClassDef):
            for inner in parent.body:
                if (
                    isinstance(inner, ast.FunctionDef)
                    and inner.name == method
                    and ast.get_docstring(inner)
                ):
                    return True
            if inherited(place, parent, method):
                return True
    return False


# -- mkdocs ----------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    from mkdocs.exceptions import PluginError

    missing = list(undocumented())
    if missing:
        raise PluginError("public names without documentation:\n" + "\n".join(missing))
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files
