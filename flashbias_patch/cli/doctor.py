"""`flashbias doctor`: versions, settings, backends, what would be patched in a repository, and
known problems."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import platform
import stat
import sys
import warnings
from typing import Any, Dict, Iterable, Iterator, List, Optional

from . import config_check, self_checks, system

NAME = "doctor"
HELP = (
    "show versions, settings, backends with their reasons and, for a repository, which "
    "classes would be patched"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repo", metavar="DIR", help="a repository: list its classes that would be patched"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="an mmcv config: is a bias on, and which layers receive it"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrides of --config, as training scripts take them",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print Markdown instead of text, to paste in an issue",
    )


def main(args: argparse.Namespace) -> int:
    if args.repo is not None and not os.path.isdir(args.repo):
        print(f"flashbias doctor: --repo: {args.repo!r} is not a directory", file=sys.stderr)
        return 2
    if args.cfg_options and args.config is None:
        print("flashbias doctor: --cfg-options needs --config", file=sys.stderr)
        return 2
    report = examine(args.repo)
    if args.config is not None:
        try:
            report["config"] = config_check.check(args.config, args.cfg_options)
        except config_check.ConfigError as error:
            print(f"flashbias doctor: {error}", file=sys.stderr)
            return 2
    if args.json:
        page = json.dumps(config_check.plain(report), indent=2)
    else:
        page = _markdown(report) if args.markdown else _text(report)
    encoding = sys.stdout.encoding or "utf-8"
    print(page.encode(encoding, "backslashreplace").decode(encoding))  # file names need not be text
    return 0


def examine(repo: Optional[str] = None) -> Dict[str, Any]:
    """Everything doctor knows, as a JSON-able dict."""
    from .. import __version__, compat, settings

    report: Dict[str, Any] = {
        "flashbias_patch": __version__,
        "python": platform.python_version(),
        "system": system.facts(),
        "packages": system.packages(),
        "settings": settings.current().as_dict(),
        "unmendable": [{"what": what, "cure": cure} for what, cure in compat.unmendable()],
        "missing": [],
        "gpu": None,
        "backends": {},
    }
    if importlib.util.find_spec("torch") is not None:
        from .. import _torch_internals

        report["missing"] = _torch_internals.missing()
        report["gpu"], report["backends"] = _backends()
        report["self_checks"] = self_checks.kept()
    if repo is not None:
        report["repository"] = scan(repo)
    return report


def _backends() -> Any:
    """(device name, {backend: reasons against CMT's own call}) for the best device here."""
    import torch

    from ..attention import dispatch
    from ..attention.inputs import AttentionInputs

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.float16 if cuda else torch.float32
    q, k = (torch.zeros(1, length, 8, 32, device=device, dtype=dtype) for length in (113, 203))
    call = AttentionInputs(q, k, k, q[..., :1, :8], k[..., :1, :8], scale=32**-0.5)
    name = None
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return name, dispatch.explain(call)


def scan(root: str) -> List[Dict[str, Any]]:
    """Classes in a repository that bear a target's name: where, and why not if they would be left
    alone.

    Reads source text only; nothing of the repository is imported.
    """
    from ..patching import catalog

    known = catalog.targets()
    found: List[Dict[str, Any]] = []
    for path in _sources(root, found):
        file, reason = os.path.relpath(path, root), None
        try:
            tree = _parse(path, known)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
        except (SyntaxError, ValueError) as error:  # UnicodeDecodeError and NUL bytes too
            reason = f"does not parse: {error}"
        except (RecursionError, MemoryError):
            reason = "does not parse: it is nested too deeply"
        if reason is not None:
            found.append({"class": None, "file": file, "reason": reason})
            continue
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.ClassDef) and node.name in known:
                target, reason = known[node.name], config_check.left_out(node.name)
                misfit = _static_misfit(node, target)
                if (
                    misfit is not None
                    and target.otherwise is not None
                    and not _static_misfit(node, target.otherwise)
                ):
                    target, misfit = target.otherwise, None
                found.append(
                    {
                        "class": node.name,
                        "file": file,
                        "line": node.lineno,
                        "seam": target.seam,
                        "reason": reason or misfit,
                    }
                )
    return found


def _parse(path: str, known: Iterable[str]) -> Optional[ast.Module]:
    """The module at `path`; None where it names no target. Links to nothing, pipes and devices are
    OSErrors."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    with open(path, "rb") as file:
        source = file.read()
    if not any(name.encode() in source for name in known):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes and the like in other people's code
        return ast.parse(importlib.util.decode_source(source))


def _sources(root: str, found: List[Dict[str, Any]]) -> Iterator[str]:
    """Python files below `root`; directories that cannot be read are added to `found`. Links to
    directories are not followed, so that a loop of them ends."""

    def unreadable(error: OSError) -> None:
        found.append(
            {
                "class": None,
                "file": os.path.relpath(error.filename or root, root),
                "reason": f"cannot be read: {error.strerror or error}",
            }
        )

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and f not in ("build", "node_modules")
        )
        yield from (os.path.join(folder, f) for f in sorted(files) if f.endswith(".py"))


def _static_misfit(node: ast.ClassDef, target: Any) -> Optional[str]:
    """catalog.misfit, as far as source text tells."""
    forward = next(
        (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "forward"), None
    )
    if forward is None:
        return None if node.bases else "it has no forward"
    names = [a.arg for a in forward.args.args][1:]
    wanted = (*target.leading, *target.having)
    missing = [name for name in wanted if name not in names]
    if tuple(names[: len(target.leading)]) != target.leading or missing:
        return f"its forward takes ({', '.join(names)}), expected {', '.join(wanted)}"
    return None


SYSTEM = {
    "os": "OS",
    "machine": "machine",
    "libc": "libc",
    "driver": "NVIDIA driver",
    "cuda": "torch's CUDA",
    "cudnn": "cuDNN",
    "numpy_abi": "NumPy, torch",
}
PRIVATE = ("home",)  # settings that hold a path: an issue shows only that they are set


def _markdown(report: Dict[str, Any]) -> str:
    """Made for an issue: what is installed and set, folded; no path of the machine but those of
    --repo and --config."""
    from .. import settings

    def table(rows: Iterable[Any]) -> List[str]:
        return [
            "| | |",
            "|---|---|",
            *("| " + " | ".join(_cell(word) for word in row) + " |" for row in rows),
            "",
        ]

    found = report["settings"]
    changed = [
        (
            variable.name,
            "set" if variable.field in PRIVATE else variable.shown(found[variable.field]),
        )
        for variable in settings.VARIABLES
        if found[variable.field] != variable.default
    ]
    versions = [
        ("flashbias_patch", report["flashbias_patch"]),
        ("Python", report["python"]),
        ("GPU", report["gpu"] or "none"),
    ]
    lines = ["<details><summary>flashbias doctor</summary>", ""]
    lines += table(
        [*versions, *((SYSTEM[name], value or "-") for name, value in report["system"].items())]
    )
    lines += [
        "**Packages**",
        "",
        *table((name, version) for name, version in report["packages"].items() if version),
    ]
    lines += [
        "**Settings that are not the default**",
        "",
        *(table(changed) if changed else ["none", ""]),
    ]
    lines += ["**Backends**", ""]
    lines += table(
        (name, "; ".join(reasons) or "takes it") for name, reasons in report["backends"].items()
    )
    if report["unmendable"]:
        lines += [
            "**In the way**",
            "",
            *table((entry["what"], entry["cure"]) for entry in report["unmendable"]),
        ]
    if "repository" in report:
        lines += [
            "**Repository**",
            "",
            *table(
                (
                    f"{item['file']}:{item.get('line', 1)} {item['class'] or ''}",
                    item["reason"] or f"patched ({item['seam']})",
                )
                for item in report["repository"]
            ),
        ]
    if "config" in report:
        lines += ["**Config**", "", "```", config_check.text(report["config"]), "```", ""]
    return "\n".join([*lines, "</details>"])


def _cell(word: Any) -> str:
    return str(word).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _text(report: Dict[str, Any]) -> str:
    from .. import settings

    found, width = report["settings"], max(map(len, report["packages"]))
    lines = [f"flashbias_patch {report['flashbias_patch']} on Python {report['python']}"]
    lines += ["system:"] + [
        f"  {SYSTEM[name]:<{width}} {value or '-'}" for name, value in report["system"].items()
    ]
    lines += ["packages:"] + [
        f"  {name:<{width}} {version or '-'}" for name, version in report["packages"].items()
    ]
    lines.append("settings:")
    lines += [
        f"  {variable.name:<20} {variable.shown(found[variable.field])}"
        for variable in settings.VARIABLES
    ]
    if not found["patch"]:
        lines.append(
            "  FLASHBIAS_PATCH is off: a run is not patched; below is what a patched one does"
        )
    lines.append(f"GPU: {report['gpu'] or 'none'}")
    lines.append("backends, in the order in which they are tried (for CMT's cross attention):")
    for name, reasons in report["backends"].items():
        lines.append(f"  {name:<10} {'takes it' if not reasons else '; '.join(reasons)}")
    if not report["backends"]:
        lines.append("  torch is not installed: nothing can be computed")
    if report["missing"]:
        lines += ["this torch lacks:"] + [f"  {line}" for line in report["missing"]]
    lines += self_checks.text(report)
    lines += [
        f"in the way: {entry['what']}\n  cure: {entry['cure']}" for entry in report["unmendable"]
    ]
    if "repository" in report:
        lines.append("repository:")
        for item in report["repository"]:
            verdict = (
                f"patched ({item['seam']})"
                if item["reason"] is None
                else f"left alone: {item['reason']}"
            )
            lines.append(f"  {item['file']}:{item.get('line', 1)} {item['class'] or ''} {verdict}")
        if not report["repository"]:
            lines.append("  no class that this package patches; see docs/compatibility.md")
    if "config" in report:
        lines.append(config_check.text(report["config"]))
    return "\n".join(lines)
