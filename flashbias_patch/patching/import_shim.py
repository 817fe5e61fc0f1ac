"""Import modules of the user's repository that import flash_attn or need a compatibility patch.

flash-attn 0.2.2 cannot be built any more, and the family imports it at module scope. The import
statements of such a module are compiled as calls of `import_name`, which uses a stand-in for a name
that is missing. The rest of the module is compiled as it is written. Nothing is put in sys.modules:
`importlib.util.find_spec("flash_attn")` and every other module see the environment unchanged.
"""

from __future__ import annotations

import ast
import builtins
import importlib.machinery
import os
import sys
from typing import Any, Callable, Iterable, List, Optional, Sequence, Tuple

from .. import compat

FLASH_ATTN = "flash_attn"
IMPORT = "__flashbias_import__"  # the name under which a rewritten module finds `import_name`
_OWN = __name__.partition(".")[0]  # in a checkout, this package's own source names everything
_STANDARD_LIBRARY = os.path.dirname(os.__file__)


class Finder:
    """A meta path finder for repository modules whose source shows a need, and for watched modules.

    `on_module` is called with each of them after it was executed, in every import and reload.
    """

    _instance: Optional[Finder] = None

    def __init__(self, on_module: Callable[[Any], None], watched: Iterable[str] = ()) -> None:
        self.on_module = on_module
        self.watched = frozenset(watched)

    @classmethod
    def enable(cls, on_module: Callable[[Any], None], watched: Iterable[str] = ()) -> None:
        cls.disable()
        cls._instance = cls(on_module, watched)
        # Before the path is searched and after the import hooks of others, which thus see every
        # module.
        index = sys.meta_path.index(importlib.machinery.PathFinder) if _searches_path() else 0
        sys.meta_path.insert(index, cls._instance)

    @classmethod
    def disable(cls) -> None:
        if cls._instance in sys.meta_path:
            sys.meta_path.remove(cls._instance)
        cls._instance = None

    def find_spec(
        self, name: str, path: Optional[Sequence[str]] = None, target: Any = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if name.partition(".")[0] == _OWN:
            return None
        watched = name in self.watched
        where = list(path or ())
        if path is not None and (not where or _is_installed(where[0])) and not watched:
            return None
        if path is None and "." not in name and name in sys.builtin_module_names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader = getattr(spec, "loader", None)
        if spec is None or type(loader) is not importlib.machinery.SourceFileLoader:
            return None
        patches: Tuple[compat.Patch, ...] = ()
        imports: Tuple[str, ...] = ()
        if not _is_installed(loader.path):
            try:
                source = loader.get_data(loader.path)
            except OSError:
                return None
            patches = compat.needed_by(source)
            imports = tuple(top for patch in patches for top in patch.imports)
            if b"flash_attn" in source:
                imports += (FLASH_ATTN,)
        if not (patches or imports or watched):
            return None
        spec.loader = _Loader(loader.name, loader.path, self.on_module, patches, imports)
        return spec


def _searches_path() -> bool:
    return importlib.machinery.PathFinder in sys.meta_path


def _is_installed(path: str) -> bool:
    return path.startswith(_STANDARD_LIBRARY) or "site-packages" in path or "dist-packages" in path


class _Loader(importlib.machinery.SourceFileLoader):
    """Executes the module with its imports of `imports` rewritten, then calls `on_module`."""

    def __init__(
        self,
        name: str,
        path: str,
        on_module: Callable[[Any], None],
        patches: Tuple[compat.Patch, ...] = (),
        imports: Tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, path)
        self._on_module = on_module
        self._patches = patches
        self._imports = imports

    def get_code(self, fullname: str) -> Any:
        rewritten = self._rewritten() if self._imports else None
        # A cached .pyc is neither read nor written: an unpatched process shares that file.
        return (
            super().get_code(fullname)
            if rewritten is None
            else compile(rewritten, self.path, "exec", dont_inherit=True)
        )

    def _rewritten(self) -> Optional[ast.Module]:
        try:
            tree = ast.parse(self.get_data(self.path), self.path)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None  # the usual loader raises the error
        rewriter = _Rewriter(self._imports)
        tree = rewriter.visit(tree)
        return ast.fix_missing_locations(tree) if rewriter.changed else None

    def exec_module(self, module: Any) -> None:
        def import_name(name: str, item: Optional[str] = None) -> Any:
            return self._import(module.__dict__, name, item)

        if self._imports:
            module.__dict__[IMPORT] = import_name
        super().exec_module(module)
        for patch in self._patches:
            if patch.after:
                compat.after(patch, module)
        self._on_module(module)

    def _import(self, namespace: Any, name: str, item: Optional[str] = None) -> Any:
        """The value that `import name` (item None), `import name as ...` ("") or `from name import
        item` binds.

        `from name import *` (item "*") binds its names itself. The `builtins.__import__` of the
        moment is used, which the user may have replaced.
        """
        fromlist: Tuple[str, ...] = () if item is None else (item or "__name__",)

        def usual() -> Any:
            return builtins.__import__(name, namespace, namespace, fromlist, 0)

        top = name.partition(".")[0]
        patch = next((patch for patch in self._patches if top in patch.imports), None)
        if top == FLASH_ATTN:
            from . import flash_attn_shim

            module = flash_attn_shim.import_flash_attn(name, fromlist, usual)
        else:
            assert patch is not None
            module = compat.import_through(patch, self.name, name, fromlist, usual)
        if not item:
            return module
        if item == "*":
            public = getattr(module, "__all__", None) or [
                n for n in vars(module) if not n.startswith("_")
            ]
            namespace.update((public_name, getattr(module, public_name)) for public_name in public)
            return None
        try:
            return getattr(module, item)
        except AttributeError:
            if (
                f"{name}.{item}" in sys.modules
            ):  # a submodule in the middle of its import, as in CPython's own
                return sys.modules[f"{name}.{item}"]
            where = getattr(module, "__file__", None) or "unknown location"
            raise ImportError(
                f"cannot import name {item!r} from {name!r} ({where})", name=name
            ) from None


class _Rewriter(ast.NodeTransformer):
    """Turns the import statements of some top-level modules into calls of `import_name`.

    An import that the code itself expects to fail keeps its meaning: in the body of a `try` whose
    handler catches ImportError and goes on, or under `contextlib.suppress`. So does an import of
    flash_attn inside a function, whose caller may be prepared for its failure. NumPy is there in
    any case, and is only seen with its removed aliases.
    """

    def __init__(self, imports: Tuple[str, ...]) -> None:
        self.imports = frozenset(imports)
        self.changed = False
        self._optional = 0  # how many enclosing blocks expect an ImportError
        self._functions = 0

    def _stands_in(self, name: Optional[str], level: Any = 0) -> bool:
        top = (name or "").partition(".")[0]
        if level or top not in self.imports:
            return False
        return top == "numpy" or not self._optional and not (top == FLASH_ATTN and self._functions)

    def visit_Import(self, node: ast.Import) -> Any:
        if not any(self._stands_in(alias.name) for alias in node.names):
            return node
        statements: List[ast.stmt] = []
        for alias in node.names:
            if self._stands_in(alias.name):
                bound = alias.asname or alias.name.partition(".")[0]
                statements.append(
                    self._assign(node, bound, alias.name, "" if alias.asname else None)
                )
            else:
                statements.append(ast.copy_location(ast.Import(names=[alias]), node))
        return statements

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if not self._stands_in(node.module, node.level):
            return node
        assert node.module is not None
        if node.names[0].name == "*":
            if node.module.partition(".")[0] != FLASH_ATTN:
                return node
            return ast.copy_location(ast.Expr(self._call(node, node.module, "*")), node)
        return [
            self._assign(node, alias.asname or alias.name, node.module, alias.name)
            for alias in node.names
        ]

    def _assign(self, node: ast.stmt, bound: str, name: str, item: Optional[str]) -> ast.stmt:
        target = ast.Name(id=bound, ctx=ast.Store())
        return ast.copy_location(
            ast.Assign(targets=[target], value=self._call(node, name, item)), node
        )

    def _call(self, node: ast.stmt, name: str, item: Optional[str]) -> ast.expr:
        self.changed = True
        function = ast.Name(id=IMPORT, ctx=ast.Load())
        return ast.Call(
            func=function, args=[ast.Constant(value=name), ast.Constant(value=item)], keywords=[]
        )

    def _function(self, node: Any) -> Any:
        outer, self._optional = self._optional, 0
        self._functions += 1
        self.generic_visit(node)
        self._optional = outer
        self._functions -= 1
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def _expecting(self, node: Any, expects: bool) -> Any:
        """Visit `node`, whose `body` alone is what the block protects."""
        self._optional += expects
        node.body = self._statements(node.body)
        self._optional -= expects
        for field in ("handlers", "orelse", "finalbody"):
            if getattr(node, field, None):
                setattr(node, field, self._statements(getattr(node, field)))
        return node

    def _statements(self, statements: List[Any]) -> List[Any]:
        done: List[Any] = []
        for statement in statements:
            new = self.visit(statement)
            done += new if isinstance(new, list) else [new]
        return done

    def visit_Try(self, node: Any) -> Any:
        catching = next(
            (handler for handler in node.handlers if _catches_import_error(handler.type)), None
        )
        return self._expecting(node, catching is not None and not _ends_in_raise(catching.body))

    visit_TryStar = visit_Try

    def visit_With(self, node: Any) -> Any:
        return self._expecting(node, any(_suppresses(item.context_expr) for item in node.items))


# Exceptions of `except` clauses that are not ImportError. Any other name may be an ImportError.
_OTHER_ERRORS = frozenset(
    {
        "ArithmeticError",
        "AssertionError",
        "AttributeError",
        "KeyError",
        "IndexError",
        "LookupError",
        "NameError",
        "NotImplementedError",
        "OSError",
        "IOError",
        "RuntimeError",
        "SyntaxError",
        "TypeError",
        "ValueError",
        "KeyboardInterrupt",
        "SystemExit",
    }
)
_EXITS = ("exit", "quit", "_exit", "abort")


def _catches_import_error(kind: Optional[ast.expr]) -> bool:
    if kind is None:
        return True
    if isinstance(kind, ast.Tuple):
        return any(_catches_import_error(entry) for entry in kind.elts)
    return _last_name(kind) not in _OTHER_ERRORS


def _ends_in_raise(body: List[ast.stmt]) -> bool:
    """Return True if a handler ends the program or raises: the import is required."""
    last = body[-1]
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        return _last_name(last.value.func) in _EXITS
    return isinstance(last, ast.Raise)


def _suppresses(expression: ast.expr) -> bool:
    if not (isinstance(expression, ast.Call) and _last_name(expression.func) == "suppress"):
        return False
    return any(_catches_import_error(argument) for argument in expression.args)


def _last_name(node: ast.expr) -> str:
    """`ImportError` of `ImportError` and of `builtins.ImportError`; empty for anything else."""
    return (
        node.id
        if isinstance(node, ast.Name)
        else node.attr
        if isinstance(node, ast.Attribute)
        else ""
    )
