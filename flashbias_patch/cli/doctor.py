"""Implement `flashbias doctor`: report versions, settings, backends, targets and known problems."""

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
    "show versions, settings, backends (or why they are unsupported) and, for a repository, the "
    "classes that would be patched"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repo", metavar="DIR", help="a repository: list the classes in it that would be patched"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="an mmcv config: show whether a bias is on and which layers receive it",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrides of --config, as in training scripts",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of text")
    form.add_argument(
        "--markdown", action="store_true", help="print Markdown instead of text, for an issue"
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
        page = as_markdown(report) if args.markdown else as_text(report)
    encoding = sys.stdout.encoding or "utf-8"
    print(
        page.encode(encoding, "backslashreplace").decode(encoding)
    )  # file names may be undecodable
    return 0


def examine(repo: Optional[str] = None) -> Dict[str, Any]:
    """Collect the report as a JSON-able dict."""
    from .. import __version__, compat, settings

    report: Dict[str, Any] = {
        "flashbias_patch": __version__,
        "python": platform.python_version(),
        "system": system.facts(),
        "packages": system.packages(),
        "settings": settings.current().as_dict(),
        "unmendable": [
            {"what": issue.problem, "cure": issue.fix} for issue in compat.known_issues()
        ],
        "missing": [],
        "gpu": None,
        "backends": {},
    }
    if importlib.util.find_spec("torch") is not None:
        from .. import _torch_internals

        report["missing"] = _torch_internals.missing()
        report["gpu"], report["backends"] = _backends()
        report["self_checks"] = self_checks.stored()
    if repo is not None:
        report["repository"] = scan(repo)
    return report


def _backends() -> Any:
    """Return (device name, {backend: reasons why it does not support CMT's cross attention})."""
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
    """List the classes of a repository that have the name of a target.

    Each entry has class, file, line, seam and reason: None if the class would be patched, else why
    it would be left alone. Only source text is read; nothing of the repository is imported.
    """
    from ..patching import catalog

    known = catalog.targets()
    entries: List[Dict[str, Any]] = []
    for path in _sources(root, entries):
        file, reason = os.path.relpath(path, root), None
        try:
            tree = _parse(path, known)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
        except (SyntaxError, ValueError) as error:  # also UnicodeDecodeError, and for NUL bytes
            reason = f"does not parse: {error}"
        except (RecursionError, MemoryError):
            reason = "does not parse: it is nested too deeply"
        if reason is not None:
            entries.append({"class": None, "file": file, "reason": reason})
            continue
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.ClassDef) and node.name in known:
                target, reason = known[node.name], config_check.left_out(node.name)
                mismatch = _static_mismatch(node, target)
                if (
                    mismatch is not None
                    and target.otherwise is not None
                    and not _static_mismatch(node, target.otherwise)
                ):
                    target, mismatch = target.otherwise, None
                entries.append(
                    {
                        "class": node.name,
                        "file": file,
                        "line": node.lineno,
                        "seam": target.seam,
                        "reason": reason or mismatch,
                    }
                )
    return entries


def _parse(path: str, known: Iterable[str]) -> Optional[ast.Module]:
    """Parse the module at `path`; return None if it contains the name of no target.

    Raises OSError also for broken links, pipes and devices.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    with open(path, "rb") as file:
        source = file.read()
    if not any(name.encode() in source for name in known):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes and the like in the repository
        return ast.parse(importlib.util.decode_source(source))


def _sources(root: str, entries: List[Dict[str, Any]]) -> Iterator[str]:
    """Yield the Python files below `root`; add directories that cannot be read to `entries`.

    Links to directories are not followed, because they may form a loop.
    """

    def unreadable(error: OSError) -> None:
        entries.append(
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


def _static_mismatch(node: ast.ClassDef, target: Any) -> Optional[str]:
    """Check a class as catalog.misfit does, from its source text alone."""
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
PRIVATE = ("home",)  # settings with a path; the Markdown report shows only that they are set


def as_markdown(report: Dict[str, Any]) -> str:
    """Format the report as folded Markdown for an issue.

    It shows no path of the machine except those given by --repo and --config.
    """
    from .. import settings

    def table(rows: Iterable[Any]) -> List[str]:
        return [
            "| | |",
            "|---|---|",
            *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows),
            "",
        ]

    values = report["settings"]
    changed = [
        (
            variable.name,
            "set" if variable.field in PRIVATE else variable.shown(values[variable.field]),
        )
        for variable in settings.VARIABLES
        if values[variable.field] != variable.default
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
        (name, "; ".join(reasons) or "supported") for name, reasons in report["backends"].items()
    )
    if report["unmendable"]:
        lines += [
            "**Known problems**",
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


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def as_text(report: Dict[str, Any]) -> str:
    """The report of examine() as plain text, for a terminal."""
    from .. import settings

    values, width = report["settings"], max(map(len, report["packages"]))
    lines = [f"flashbias_patch {report['flashbias_patch']} on Python {report['python']}"]
    lines += ["system:"] + [
        f"  {SYSTEM[name]:<{width}} {value or '-'}" for name, value in report["system"].items()
    ]
    lines += ["packages:"] + [
        f"  {name:<{width}} {version or '-'}" for name, version in report["packages"].items()
    ]
    lines.append("settings:")
    lines += [
        f"  {variable.name:<20} {variable.shown(values[variable.field])}"
        for variable in settings.VARIABLES
    ]
    if not values["patch"]:
        lines.append(
            "  FLASHBIAS_PATCH is off: a run is not patched; the report below is for a patched run"
        )
    lines.append(f"GPU: {report['gpu'] or 'none'}")
    lines.append("backends, in the order in which they are tried (for CMT's cross attention):")
    for name, reasons in report["backends"].items():
        lines.append(f"  {name:<10} {'supported' if not reasons else '; '.join(reasons)}")
    if not report["backends"]:
        lines.append("  none: torch is not installed")
    if report["missing"]:
        lines += ["this torch lacks:"] + [f"  {line}" for line in report["missing"]]
    lines += self_checks.text(report)
    lines += [f"problem: {entry['what']}\n  fix: {entry['cure']}" for entry in report["unmendable"]]
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
            lines.append("  no class with the name of a target; see docs/compatibility.md")
    if "config" in report:
        lines.append(config_check.text(report["config"]))
    return "\n".join(lines)
