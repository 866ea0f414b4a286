"""Test of the citations of the durability rules: a test cites each rule."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.support import ROOT

#: The number of durability rules.
RULES = 34

#: ``durability rule 7``, ``durability rules 8 and 25``.
CITATION = re.compile(r"durability rules? ((?:\d+(?:, | and |(?=\D)|$))+)")
#: ``Rules 1 and 16``: in the store contract and in the crash tests, which are all about the rules.
SHORT_CITATION = re.compile(r"\b[Rr]ules? ((?:\d+(?:, | and |(?=\D)|$))+)")


def cited_in(path: Path) -> set[int]:
    """Return the numbers of the rules that the tests of a module cite in their docstrings."""
    about_rules = bool({"contract", "crash"} & set(path.parts))
    pattern = SHORT_CITATION if about_rules else CITATION
    rules: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for numbers in pattern.findall(ast.get_docstring(node) or ""):
                rules.update(int(number) for number in re.findall(r"\d+", numbers))
    return rules


def test_each_rule_of_durability_has_a_test() -> None:
    citing: dict[int, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for number in cited_in(path):
            citing[number].append(path.name)
    assert set(range(1, RULES + 1)) - citing.keys() == set()
    assert citing.keys() - set(range(1, RULES + 1)) == set()
