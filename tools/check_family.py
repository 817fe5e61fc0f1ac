#!/usr/bin/env python3
"""Patch the attention classes of checkouts and compare them with their own code, forward and
backward.

    python tools/check_family.py DIR[@BRANCH] ... [--markdown FILE] [--json FILE]

DIR is a working tree or a bare git directory of a repository that holds PETR- or CMT-style
attention; with @BRANCH, that branch or commit of it. Run it in that repository's environment, or in
any that has mmcv 1.x (and mmengine for newer ones): what else its modules import and is not there
is replaced by empty names, and package `__init__` files are not executed, so that nothing but the
modules that define attention classes runs. Each repository has a process of its own.

Every class is built with random sizes in float64 and called twice with the same weights, inputs and
masks: as it is, and patched. The error printed is the largest difference of the output and of all
gradients (inputs and parameters), relative to the largest value of each. Flash classes run on CUDA
only; on a CPU their core is compared with plain attention over the same weights. Exit status: 0 if
every class that is patched agrees.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import inspect
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import types
from typing import Any, Dict, FrozenSet, Iterator, List, Optional, Set, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOLERANCE = 1e-9  # float64 on both sides: what is left is the order of summation
MARK = "check_family result: "


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="*", metavar="DIR")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        help="write the table as Markdown, between its marks in a page",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--with",
        dest="earlier",
        metavar="FILE",
        help="include the results of an earlier --json run "
        "(in another environment, say); a repository of this run replaces it there",
    )
    parser.add_argument(
        "--time-limit", type=int, default=300, metavar="SECONDS", help="for one repository"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sys.path.insert(0, ROOT)
    if args.worker:
        print(MARK + json.dumps(work(args.directories[0], json.loads(args.worker), args.seed)))
        return 0
    results = []
    for directory in args.directories:
        results.append(check(directory, args))
        print(text(results[-1]), flush=True)
    if args.earlier:
        with open(args.earlier) as file:
            mine = {result["repository"] for result in results}
            results += [result for result in json.load(file) if result["repository"] not in mine]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    if args.markdown:
        write_between_marks(args.markdown, markdown(results))
    print(summary(results))
    return 1 if any(bad(row) for result in results for row in result["classes"]) else 0


# -- one repository, from outside ------------------------------------------------------------------


def check(directory: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Scan a repository's source, then import and compare in a process of its own."""
    from flashbias_patch.cli import doctor

    directory, _, ref = directory.partition("@")
    name, commit = identity(directory, ref or "HEAD")
    result: Dict[str, Any] = {
        "repository": name,
        "commit": commit,
        "classes": [],
        "error": None,
        "with": versions(),
    }
    with working_tree(directory, ref) as root:
        found = [
            item
            for item in doctor.scan(root)
            if item["class"] is not None and item["seam"] in CASES
        ]
        by_file: Dict[str, List[str]] = {}
        for item in found:
            by_file.setdefault(item["file"], []).append(item["class"])
        command = [
            sys.executable,
            os.path.abspath(__file__),
            root,
            "--worker",
            json.dumps(by_file),
            "--seed",
            str(args.seed),
        ]
        env = {
            **os.environ,
            "FLASHBIAS_PATCH": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=args.time_limit, env=env, cwd=root
            )
            line = next((ln for ln in done.stdout.splitlines() if ln.startswith(MARK)), None)
            if line is None:
                result["error"] = (done.stderr.strip().splitlines() or ["no output"])[-1]
            else:
                result["classes"] = json.loads(line[len(MARK) :])
        except subprocess.TimeoutExpired:
            result["error"] = f"took longer than {args.time_limit} s"
    return result


def identity(directory: str, ref: str) -> Tuple[str, str]:
    """owner/name where the remote or the path (owner+name/...) tells, and the commit."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", directory, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    parts = os.path.abspath(directory).split(os.sep)
    paired = next((part.replace("+", "/", 1) for part in reversed(parts) if "+" in part), "")
    remote = git("config", "remote.origin.url").rstrip("/")
    remote = "/".join(
        remote[: -4 if remote.endswith(".git") else None].replace(":", "/").split("/")[-2:]
    )
    return paired or remote or parts[-1], git("rev-parse", ref) or "unknown"


@contextlib.contextmanager
def working_tree(directory: str, ref: str = "") -> Iterator[str]:
    """The directory itself, or the Python files of a commit in a temporary one: of `ref`, or of
    HEAD where the directory is bare."""
    bare = subprocess.run(
        ["git", "-C", directory, "rev-parse", "--is-bare-repository"],
        capture_output=True,
        text=True,
    )
    if not ref and bare.stdout.strip() != "true":
        yield os.path.abspath(directory)
        return
    with tempfile.TemporaryDirectory() as root:
        env = {
            **os.environ,
            "GIT_INDEX_FILE": os.path.join(root, ".index"),
        }  # the git directory stays as it is
        where = directory if bare.stdout.strip() == "true" else os.path.join(directory, ".git")
        git, ref = ["git", f"--git-dir={where}", f"--work-tree={root}"], ref or "HEAD"
        listed = subprocess.run(
            [*git, "ls-tree", "-r", "--name-only", ref], capture_output=True, text=True
        )
        if any(name.endswith(".py") for name in listed.stdout.splitlines()):
            subprocess.run([*git, "checkout", "--quiet", ref, "--", "*.py"], env=env, check=True)
        yield root


# -- inside its process: importing in isolation ----------------------------------------------------


class EmptyMeta(type):
    """A class for any missing name: a base class, a decorator (`X.register_module()`), an enum,
    whatever is asked."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: lambda thing: thing


def empty(name: str) -> Any:
    from torch import nn

    def register(*args: Any, **kwargs: Any) -> Any:  # `@missing` and `@missing(...)`
        return args[0] if args and callable(args[0]) and not kwargs else (lambda thing: thing)

    bases = (
        () if name.isupper() else (nn.Module,)
    )  # a registry, whose `register_module` is not nn.Module's
    return register if name[:1].islower() else EmptyMeta(name, bases, {})


class EmptyModule(types.ModuleType):
    """A module or package that has every name; submodules that exist are imported."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"{self.__name__}.{name}")
        value = empty(name)
        setattr(self, name, value)
        return value


class Isolation(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """First on the path: the repository's packages without their `__init__`. Last: empty modules
    for what is not there."""

    def __init__(self, root: str, missing: FrozenSet[str] = frozenset()) -> None:
        self.root, self.missing = root, missing

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        folder = os.path.join(self.root, *name.split("."))
        if self.missing:
            if name not in self.missing:
                return None  # something optional of somebody else's
            spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = []
            return spec
        if not os.path.isdir(folder):
            return None
        if "." not in name and importlib.machinery.PathFinder.find_spec(
            name, [p for p in sys.path if p != self.root]
        ):
            return None  # an installed package of that name (a vendored mmdet3d, say)
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [folder]
        return spec

    def create_module(self, spec: Any) -> Any:
        return EmptyModule(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


_IMPORTED = re.compile(
    r"^\s*(?:from\s+([\w.]+)\s+import|import\s+([\w.]+(?:\s*,\s*[\w.]+)*))", re.MULTILINE
)


def imported_names(root: str) -> FrozenSet[str]:
    """Every module the repository's source imports by its full name, and their packages; not what
    the shim answers."""
    names: Set[str] = set()
    for folder, _, files in os.walk(root):
        for file in files:
            if file.endswith(".py"):
                with open(os.path.join(folder, file), encoding="utf-8", errors="replace") as source:
                    for origin, plain in _IMPORTED.findall(source.read()):
                        names.update(name.strip() for name in (origin or plain).split(","))
    parts_of = [name.split(".") for name in names if name[:1] != "."]
    whole = {".".join(parts[:i]) for parts in parts_of for i in range(1, len(parts) + 1)}
    return frozenset(
        n
        for n in whole
        if n and n.partition(".")[0] not in ("flash_attn", "turtle", "torch", "numpy")
    )


def isolate(root: str) -> None:
    for needed in ("torch", "torch.utils.checkpoint", "numpy", "mmcv", "mmengine"):
        with contextlib.suppress(ImportError):
            importlib.import_module(needed)
    sys.path.insert(0, root)
    sys.meta_path.insert(0, Isolation(root))
    sys.meta_path.append(Isolation(root, imported_names(root)))
    sys.modules.setdefault("mmcv._ext", EmptyModule("mmcv._ext"))
    for module, cls in (
        ("mmcv.utils.registry", "Registry"),
        ("mmengine.registry.registry", "Registry"),
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
        registry: Any = getattr(sys.modules.get(module), cls, None)
        original = getattr(registry, "_register_module", None)
        if original is None or isinstance(registry, EmptyMeta):
            continue

        def register(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            bound = inspect.signature(_original).bind(self, *args, **kwargs)
            bound.arguments["force"] = True  # copies of one file register one name
            return _original(*bound.args, **bound.kwargs)

        registry._register_module = register


def work(root: str, by_file: Dict[str, List[str]], seed: int) -> List[Dict[str, Any]]:
    import warnings

    warnings.simplefilter("ignore")
    isolate(root)
    import torch

    import flashbias_patch
    from flashbias_patch.patching import install

    torch.set_num_threads(1)
    flashbias_patch.install()
    rows = []
    for number, (file, names) in enumerate(sorted(by_file.items())):
        module, error = None, None
        try:
            module = importlib.import_module(file[:-3].replace(os.sep, "."))
        except BaseException as caught:  # a repository's module may do anything, sys.exit included
            error = f"{type(caught).__name__}: {caught}".splitlines()[0]
        for name in dict.fromkeys(names):
            row: Dict[str, Any] = {
                "class": name,
                "file": file,
                "seam": None,
                "why": error,
                "error": None,
                "cases": 0,
            }
            rows.append(row)
            cls = getattr(module, name, None) if error is None else None
            if error is None and not inspect.isclass(cls):
                row["why"] = "the module does not define it once imported"
            if not inspect.isclass(cls):
                continue
            claim = next(
                (c for c in install._claims if c.owner is cls and c.attribute == "forward"), None
            )
            if claim is None:
                reasons = [
                    r["reason"]
                    for r in install.refused()
                    if (r["module"], r["class"]) == (cls.__module__, name)
                ]
                row["why"] = "; ".join(reasons) or "not found by the hooks"
                continue
            row["seam"] = claim.seam
            try:
                row.update(compare(cls, claim.seam, random.Random(f"{seed} {number} {name}")))
            except Exception as caught:
                row["why"] = f"not run: {type(caught).__name__}: {first_line(caught)}"
            finally:
                flashbias_patch.install()
    return rows


# -- inside its process: parity --------------------------------------------------------------------


def compare(cls: type, seam: str, rng: random.Random) -> Dict[str, Any]:
    """The largest relative difference over a few cases, and whether the patched code answered at
    all."""
    import flashbias_patch
    from flashbias_patch import telemetry

    worst, cases, original, refused = 0.0, 0, set(), None
    for case in CASES[seam](cls, rng):
        flashbias_patch.uninstall()
        try:
            with plain_cores(case.module):
                expected = case.run()
        except (
            Exception
        ) as error:  # a form of call that this fork does not take: nothing to compare
            refused = error
            continue
        flashbias_patch.install()
        telemetry.reset()
        got = case.run()
        original |= {entry["reason"] for entry in telemetry.fallbacks()}
        if not sum(count for name, count in telemetry.calls.items() if name != "original"):
            original.add("the original code ran")
        worst = max(worst, difference(got, expected))
        cases += 1
    if not cases and refused is not None:
        why = f"{type(refused).__name__}: {first_line(refused)}"
        return {"why": f"not compared: its own code takes other inputs ({why})"}
    return {"error": worst, "cases": cases, "why": "; ".join(sorted(original)) or None}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


class Case:
    """A module in float64, in training mode without dropout, and one call of it."""

    def __init__(self, module: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        import torch

        self.module = module.double().train()
        for child in module.modules():
            if isinstance(child, torch.nn.Dropout):
                child.p = 0.0
            if isinstance(child, torch.nn.MultiheadAttention):
                child.dropout = 0.0
        self.args, self.kwargs = args, kwargs

    def run(self) -> List[Any]:
        """The output, then the gradient of every input and parameter."""
        import torch

        leaves: List[Any] = []

        def fresh(value: Any) -> Any:
            if not (torch.is_tensor(value) and value.is_floating_point() and value.requires_grad):
                return value
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[-1]

        args = tuple(fresh(value) for value in self.args)
        kwargs = {key: fresh(value) for key, value in self.kwargs.items()}
        out = self.module(*args, **kwargs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        leaves += [p for p in self.module.parameters() if p.requires_grad]
        weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)
        self.module.zero_grad(set_to_none=True)
        (out * weights).sum().backward()  # reentrant checkpoints refuse torch.autograd.grad
        return [out.detach(), *(leaf.grad for leaf in leaves)]


def difference(got: List[Any], expected: List[Any]) -> float:
    """The largest |got - expected| of each pair over the pair's largest value; infinite if one has
    no gradient.

    A gradient that is noise beside the largest of all (a key bias has none by theory) is measured
    against that one.
    """
    worst = 0.0
    floor = 1e-6 * max(float(e.abs().max()) for e in expected if e is not None and e.numel())
    for one, other in zip(got, expected):
        if (one is None) != (other is None):
            return float("inf")
        if one is not None and one.numel():
            error = float((one - other).abs().max()) / max(float(other.abs().max()), floor)
            worst = max(worst, error if error == error else float("inf"))
    return worst


@contextlib.contextmanager
def plain_cores(module: Any) -> Iterator[None]:
    """FlashMHA-shaped children answer with plain attention over their own weights, for they run on
    CUDA only."""
    import torch
    import torch.nn.functional as F

    def forward(self: Any, q: Any, k: Any, v: Any, key_padding_mask: Any = None, **_: Any) -> Any:
        b = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, y).unflatten(-1, (self.num_heads, -1))
            for x, w, y in zip((q, k, v), self.in_proj_weight.chunk(3), b)
        )
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / q.shape[-1] ** 0.5
        if key_padding_mask is not None:  # flash-attn's convention: True keeps a key
            scores = scores.masked_fill(~key_padding_mask[:, None, None], float("-inf"))
        return self.out_proj(
            torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v).flatten(-2)
        ), None

    cores = {
        type(child) for child in module.modules() if type(child).__name__.startswith("FlashMHA")
    }
    kept = {cls: vars(cls)["forward"] for cls in cores if "forward" in vars(cls)}
    for cls in kept:
        cls.forward = forward
    try:
        yield
    finally:
        for cls, own in kept.items():
            cls.forward = own


def build(cls: type, **wanted: Any) -> Any:
    """An instance, with those of `wanted` that its constructor, or one that it hands **kwargs to,
    names."""
    given = {}
    for parent in cls.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(vars(parent)["__init__"]).parameters
            given.update({key: value for key, value in wanted.items() if key in parameters})
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return cls(**given)


def sizes(rng: random.Random) -> Tuple[int, int, int, int, int]:
    """B, M, N, H, E; odd lengths."""
    heads = rng.choice((2, 4))
    lengths = 2 * rng.randint(4, 12) + 1, 2 * rng.randint(13, 30) + 1
    return (rng.randint(1, 3), *lengths, heads, heads * rng.choice((8, 16)))


def tensor(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def outer_cases(cls: type, rng: random.Random) -> Iterator[Case]:
    """Self and cross attention, with boolean and floating masks."""
    import torch

    flash = "Flash" in cls.__name__
    for kind in ("cross", "self", "mask", "float mask", "padding"):
        torch.manual_seed(rng.randint(0, 10**6))
        B, M, N, H, E = sizes(rng)
        module = build(
            cls,
            embed_dims=E,
            embed_dim=E,
            num_heads=H,
            group=1,
            batch_first=flash or kind in ("self", "mask"),
        )
        first = bool(getattr(module, "batch_first", False)) and not flash_takes_length_first(cls)
        N = M if kind == "self" else N
        of_queries, of_keys = ((B, M, E), (B, N, E)) if first else ((M, B, E), (N, B, E))
        query, query_pos = tensor(*of_queries), tensor(*of_queries)
        kwargs: Dict[str, Any] = {"query_pos": query_pos}
        args: Tuple[Any, ...] = (query,)
        if kind != "self":
            args = (query, tensor(*of_keys), tensor(*of_keys))
            kwargs["key_pos"] = tensor(*of_keys)
        if kind == "mask":
            mask = torch.rand(M, N) < 0.4
            mask[:, 0] = False
            kwargs["attn_mask"] = mask
        if kind == "float mask":
            if flash:
                continue  # the shim applies it where upstream drops it: not a question of parity
            kwargs["attn_mask"] = tensor(B * H, M, N)
        if kind == "padding":
            padding = torch.rand(B, N) < 0.3
            padding[:, 0] = False
            kwargs["key_padding_mask"] = padding
        yield Case(module, args, kwargs)


def flash_takes_length_first(cls: type) -> bool:
    """The family's flash classes set batch_first and transpose all the same: any layout works, if
    it is one."""
    return "Flash" in cls.__name__


def core_cases(cls: type, rng: random.Random) -> Iterator[Case]:
    """FlashMHA with and without projection biases and padding (flash-attn's: True keeps a key)."""
    import torch

    for bias in (True, False):
        torch.manual_seed(rng.randint(0, 10**6))
        B, M, N, H, E = sizes(rng)
        keep = torch.rand(B, N) < 0.7
        keep[:, 0] = True
        module = build(cls, embed_dim=E, num_heads=H, bias=bias)
        for kwargs in ({}, {"key_padding_mask": keep}):
            yield Case(module, (tensor(B, M, E), tensor(B, N, E), tensor(B, N, E)), kwargs)


def layer_cases(cls: type, rng: random.Random) -> Iterator[Case]:
    """A decoder layer with the repository's own cross attention, checkpointed or not, a boolean
    self mask."""
    import torch

    module_globals = vars(sys.modules[cls.__module__])
    own = module_globals.get("PETRMultiheadAttention", "MultiheadAttention")
    for with_cp in (False, True):
        torch.manual_seed(rng.randint(0, 10**6))
        B, M, N, H, E = sizes(rng)
        attentions = [
            dict(type=kind, embed_dims=E, num_heads=H) for kind in ("MultiheadAttention", own)
        ]
        module = build(
            cls,
            attn_cfgs=attentions,
            feedforward_channels=2 * E,
            with_cp=with_cp,
            operation_order=("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
            ffn_cfgs=dict(
                type="FFN",
                embed_dims=E,
                feedforward_channels=2 * E,
                num_fcs=2,
                ffn_drop=0.0,
                act_cfg=dict(type="ReLU"),
            ),
        )
        mask = torch.rand(M, M) < 0.3
        mask.fill_diagonal_(False)
        kwargs = {
            "key": tensor(N, B, E),
            "value": tensor(N, B, E),
            "query_pos": tensor(M, B, E),
            "key_pos": tensor(N, B, E),
            "attn_masks": [mask, None],
        }
        yield Case(module, (tensor(M, B, E),), kwargs)


CASES = {"outer": outer_cases, "core": core_cases, "layer": layer_cases}


# -- reports ---------------------------------------------------------------------------------------


def bad(row: Dict[str, Any]) -> bool:
    return row["error"] is not None and not row["error"] <= TOLERANCE


def verdict(row: Dict[str, Any]) -> str:
    if row["seam"] is None:
        return f"left alone: {row['why']}"
    if row["error"] is None:
        return f"patched ({row['seam']}), {row['why']}"
    word = "DIFFERS" if bad(row) else "agrees"
    why = f" ({row['why']})" if row["why"] else ""
    return f"patched ({row['seam']}), {word}: {row['error']:.1e} in {row['cases']} cases{why}"


def text(result: Dict[str, Any]) -> str:
    lines = [
        f"{result['repository']} {result['commit'][:12]}"
        + (f": {result['error']}" if result["error"] else "")
    ]
    lines += [f"  {row['file']}: {row['class']}: {verdict(row)}" for row in result["classes"]]
    return "\n".join(
        lines if result["classes"] or result["error"] else lines + ["  no target class"]
    )


def counts(result: Dict[str, Any]) -> Tuple[int, int, int]:
    rows = result["classes"]
    return (
        len(rows),
        sum(r["seam"] is not None for r in rows),
        sum(r["error"] is not None and not bad(r) for r in rows),
    )


def summary(results: List[Dict[str, Any]]) -> str:
    total = [sum(column) for column in zip(*map(counts, results))]
    holding = sum(bool(result["classes"]) for result in results)
    return (
        f"{holding} of {len(results)} repositories hold target classes: {total[0]} classes, "
        f"{total[1]} patched, "
        f"{total[2]} agree, {sum(bad(r) for result in results for r in result['classes'])} differ"
    )


BEGIN, END = (
    "<!-- made by tools/check_family.py: begin -->",
    "<!-- made by tools/check_family.py: end -->",
)


def write_between_marks(path: str, table: str) -> None:
    """Replace what stands between the marks of an existing page; else write a page of the table
    alone."""
    page = f"{BEGIN}\n{END}\n"
    if os.path.exists(path):
        with open(path) as file:
            page = file.read()
    before, _, rest = page.partition(BEGIN)
    with open(path, "w") as file:
        file.write(f"{before}{BEGIN}\n{table}{END}{rest.partition(END)[2]}")


def versions() -> str:
    found = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "mmcv", "mmcv-full", "mmcv-lite", "mmengine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def markdown(results: List[Dict[str, Any]]) -> str:
    environments = "; ".join(sorted({result["with"] for result in results}))
    lines = [
        "| Repository | Commit | Class | File | Patched | Parity (float64, output and all "
        "gradients) |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: r["repository"].lower()):
        first = f"| {result['repository']} | `{result['commit'][:10]}` "
        if not result["classes"]:
            lines.append(first + f"| - | - | no | {result['error'] or 'no class of the catalog'} |")
        for row in result["classes"]:
            if row["seam"] is None:
                cells = f"no | {row['why']}"
            elif row["error"] is None:
                cells = f"{row['seam']} | {row['why']}"
            else:
                cells = (
                    f"{row['seam']} | {'**differs** ' if bad(row) else ''}{row['error']:.0e}"
                    + (f" ({row['why']})" if row["why"] else "")
                )
            lines.append(first + f"| `{row['class']}` | {row['file']} | {cells} |")
            first = "| | "
    return "\n".join([f"Made with {environments}.", "", summary(results) + ".", "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
