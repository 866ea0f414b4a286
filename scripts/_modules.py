"""Modules of the package and their imports, for the drawing of the architecture and for the tests of the structure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules() -> dict[str, Path]:
    """Return the modules of the package with their files; a package has the name of its ``__init__``."""
    files = sorted((ROOT / "kser").rglob("*.py"))
    names = (
        ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__") for path in files
    )
    return dict(zip(names, files, strict=True))


MODULES = modules()


def tree(module: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(node: ast.AST, *, in_functions: bool = True, for_annotations: bool = False) -> Iterator[str]:
    """Yield the module of each name that is imported below ``node``.

    :param in_functions: include the imports inside functions.
    :param for_annotations: include the imports under ``if TYPE_CHECKING``.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from _targets(child)
        elif (in_functions or not isinstance(child, FUNCTION)) and (for_annotations or not _is_type_checking(child)):
            yield from imports(child, in_functions=in_functions, for_annotations=for_annotations)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _targets(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    assert statement.level == 0, f"line {statement.lineno}: a relative import"
    for alias in statement.names:
        name = f"{statement.module}.{alias.name}"
        yield name if name in MODULES else str(statement.module)
