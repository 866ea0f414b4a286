"""Test that each durability rule is cited by a test."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.support import ROOT

#: How many rules there are.
RULES = 34

#: ``durability rule 7``, ``durability rules 8 and 25``; where everything is about them, ``Rules 1 and 16`` will do.
CITATION = re.compile(r"durability rules? ((?:\d+(?:, | and |(?=\D)|$))+)")
SHORT = re.compile(r"\b[Rr]ules? ((?:\d+(?:, | and |(?=\D)|$))+)")


def cited_in(path: Path) -> set[int]:
    """The rules that the tests of a module cite."""
    about_rules = bool({"contract", "crash"} & set(path.parts))
    pattern = SHORT if about_rules else CITATION
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for numbers in pattern.findall(ast.get_docstring(node) or ""):
                found.update(int(number) for number in re.findall(r"\d+", numbers))
    return found


def test_each_rule_of_durability_has_a_test() -> None:
    citing: dict[int, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for number in cited_in(path):
            citing[number].append(path.name)
    assert set(range(1, RULES + 1)) - citing.keys() == set()
    assert citing.keys() - set(range(1, RULES + 1)) == set()
