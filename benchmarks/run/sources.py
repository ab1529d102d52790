"""Digests of source code: the modules that some modules import, as syntax trees."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Packages of this project whose modules count.
PACKAGES = ("adfq", "baselines", "benchmarks")


@cache
def digest_sources(roots: tuple[str, ...]) -> str:
    """Return SHA-256 of the code of some modules and of all that they import.

    Counted are modules of `PACKAGES` and of the packages that the roots belong to. The digest is made of names of
    modules and their syntax trees without docstrings, so that comments, layout, the order of files, their place on
    disk and the version of Python are without effect.

    Args:
        roots: names of modules.
    """
    packages = {*PACKAGES, *(root.partition(".")[0] for root in roots)}
    digest = hashlib.sha256()
    for name in sorted(import_closure(roots, packages)):
        file = find_source(name)
        assert file is not None
        digest.update(f"{name}\n{_read(file).digest}\n".encode())
    return digest.hexdigest()


def import_closure(roots: Iterable[str], packages: Iterable[str]) -> set[str]:
    """Return the names of modules within packages that some modules import, directly or not, themselves included.

    Imports inside functions count, imports for type checkers do not. A package's ``__init__.py`` counts where something
    is imported from it, and not where a submodule is.

    Args:
        roots: names of modules.
        packages: names of top-level packages.
    """
    found: set[str] = set()
    open_ = [root for root in roots if find_source(root)]
    while open_:
        name = open_.pop()
        if name in found:
            continue
        found.add(name)
        file = find_source(name)
        assert file is not None
        for module, attribute in _read(file).imports:
            base = _resolve(module, name, file)
            imported = f"{base}.{attribute}" if attribute and find_source(f"{base}.{attribute}") else base
            if imported.partition(".")[0] in packages and find_source(imported):
                open_.append(imported)
    return found


@cache
def find_source(name: str) -> Path | None:
    """Return the file of a module; None for a module without a Python file. Nothing is imported."""
    first, *rest = name.split(".")
    try:
        spec = find_spec(first)
    except ValueError:  # a module that was put together at run time
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") and not rest else None
    for location in spec.submodule_search_locations:
        path = Path(location, *rest)
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file() and (rest or file.name == "__init__.py"):
                return file
    return None


class _Source:
    """A module's file.

    Attributes:
        digest: SHA-256 of its syntax tree without docstrings.
        imports: module as it is written, with leading dots, and the name imported from it, or an empty one.
    """

    def __init__(self, code: str) -> None:
        tree = ast.parse(code)
        self.digest = hashlib.sha256("\n".join(_flatten(tree)).encode()).hexdigest()
        self.imports = list(_imports(tree))


@cache
def _read(file: Path) -> _Source:
    return _Source(file.read_text(encoding="utf-8"))


def _flatten(tree: ast.AST) -> Iterator[str]:
    """Yield a syntax tree in words on which all versions of Python agree: without empty fields and positions."""
    stack: list[Any] = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, ast.AST):
            kind: Any = type(item)
            yield kind.__name__
            stack.append(_END)
            for name in reversed(_fields(kind)):
                value = getattr(item, name, None)
                if isinstance(value, list):
                    idle = _is_empty if kind is ast.JoinedStr else _is_docstring
                    value = [part for part in value if not idle(part)] or None
                if value is not None:
                    stack += [value, (name,)]
        elif type(item) is list:
            stack.append(_END)
            stack += reversed(item)
        else:
            yield item[0] if type(item) is tuple else ascii(item)


_END = (")",)  # tuples hold words of `_flatten`, no values


@cache
def _fields(kind: Any) -> list[str]:
    return [name for name in kind._fields if name not in ("ctx", "kind", "type_comment")]


def _is_docstring(node: Any) -> bool:
    return type(node) is ast.Expr and type(node.value) is ast.Constant and isinstance(node.value.value, str)


def _is_empty(node: Any) -> bool:
    """Return whether a part of an f-string is empty text, which only some versions of Python have in the tree."""
    return type(node) is ast.Constant and node.value == ""


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    stack: list[Any] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack += node.orelse
        elif not isinstance(node, ast.expr):
            stack += ast.iter_child_nodes(node)


def _resolve(module: str, importer: str, file: Path) -> str:
    """Return the absolute name of a module as its importer writes it."""
    name = module.lstrip(".")
    level = len(module) - len(name)
    if not level:
        return name
    parts = importer.split(".")
    package = parts if file.name == "__init__.py" else parts[:-1]
    return ".".join([*package[: len(package) - level + 1], *([name] if name else [])])
