"""docs/troubleshooting.md names every message that the package can log, raise or print."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SPEAKING = {
    "once",
    "fallback",
    "debug",
    "info",
    "warning",
    "error",
    "exception",
    "critical",
    "warn",
    "print",
    "print_line",
    "_fail",
}
LEVELS = {"debug", "info", "warning", "error"}
HOLE = "\0"
# characters of a message that must be on the page, where it has as many between its variable parts
ENOUGH = 30

# Messages that ask for nothing: results, progress, and what Python itself says in such a case.
NO_TROUBLE = {
    "module \0 has no attribute \0": "Python's own words, from a lazy module",
    "unreachable": "after os.exec",
    "report: \0": "where the result is",
    "written: \0": "where the result is",
    "TensorBoard: tensorboard --logdir \0": "how to look at the result",
    "\0: \0 (A unpatched, B patched\0)\0": "progress",
    "  run \0 \0: \0 in \0 s: \0": "progress",
    "the end of \0's output:\n\0": "quotes the failed command, after a message of its own",
    "flashbias ab: \0": "quotes a message that is on the page",
    "flashbias bench: \0": "quotes a message that is on the page",
    "flashbias tune: \0": "quotes a message that is on the page",
    "no tile shape is stored in \0": "the answer to --show",
    "removed: \0": "what was asked for",
    "flashbias doctor: \0": "quotes a message that is on the page",
    "flashbias report: \0": "quotes a message that is on the page",
    "flashbias:": "quotes a message that is on the page",
    "FlashAttention-\0: \0": "quotes reasons that are on the page",
    "one of \0": "the end of `is not understood: expected ...`",
    "flash masks": "the key under which a line is said once",
}


def template(node, constants):
    """The literal text of an expression, HOLE for what is filled in; None if it has none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    if isinstance(node, ast.Attribute):
        return constants.get(node.attr)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        left = template(node.left, constants)
        right = template(node.right, constants) if isinstance(node.op, ast.Add) else ""
        return (
            None
            if left is None and not right
            else (left or HOLE) + (HOLE if right is None else right)
        )
    if isinstance(node, ast.IfExp):
        return template(node.body, constants)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "format"
    ):
        return template(node.func.value, constants)
    return None


def spoken(tree, constants):
    """(line, template) of every log call, print, raise, and reason for passing a backend or class
    over."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            said = node.exc.args
        elif isinstance(node, ast.Call):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            reasons = name in ("append", "extend") and "reason" in ast.unparse(node.func)
            said = node.args if name in SPEAKING or reasons else []
        elif isinstance(node, ast.FunctionDef) and re.search("why|reason|missing", node.name):
            said = [
                inner.value
                for inner in ast.walk(node)
                if isinstance(inner, ast.Return) and inner.value
            ]
            said = [
                e
                for value in said
                for e in (value.elts if isinstance(value, ast.List) else [value])
            ]
        else:
            continue
        for argument in said:
            text = template(argument, constants)
            if text and text.strip(HOLE + " :.") and text not in LEVELS:
                yield node.lineno, text


def messages():
    trees = {
        path: ast.parse(path.read_text())
        for path in sorted((ROOT / "flashbias_patch").rglob("*.py"))
    }
    constants = {}
    for tree in trees.values():
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id.isupper()
            ):
                text = template(node.value, {})
                if text and " " in text:
                    constants[node.targets[0].id] = text
    for path, tree in trees.items():
        for line, text in spoken(tree, constants):
            yield f"{path.relative_to(ROOT)}:{line}", text


def plain(text):
    return re.sub(r"\s+", " ", text.replace("`", "").replace("\\|", "|"))


def fixed_part(text):
    parts = re.split(r"\0|%[sdrg]|%\.\d+[fg]|\{[^{}]*\}", text)
    return max((re.sub(",? got$", "", plain(part).strip(" .:;,(=")) for part in parts), key=len)


def test_every_message_is_on_the_page():
    page, found = plain(PAGE.read_text()), list(messages())
    missing = [
        f"{place}: {text.replace(HOLE, '...')}"
        for place, text in found
        if text not in NO_TROUBLE and fixed_part(text)[:ENOUGH].strip() not in page
    ]
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)
    assert len(found) > 180


def test_the_exceptions_are_still_printed():
    said = {text for _, text in messages()}
    assert set(NO_TROUBLE) <= said, set(NO_TROUBLE) - said
