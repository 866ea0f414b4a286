"""Differential tests: each scenario behaves as in the published package, except for the listed differences."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from . import harness
from .differences import ANY_CASE, listed
from .oracle import ROOT

ROWS = Path(__file__).with_name("rows.txt")
PAGE = ROOT / "docs" / "differences.rst"

# Rows of the page that are about other sections of the behaviour page, or about what only shows in a group, with many
# threads or over time: other tests cover them.
ELSEWHERE = {"A3", "D1", "D11", "D13", "D20", "D21", "D22", "D23", "D24"}


@pytest.mark.parametrize("scenario", harness.scenario_names())
def test_scenario_differs_exactly_where_listed(scenario: str, oracle: Path, tmp_path: Path) -> None:
    theirs, ours = harness.traces(scenario, oracle, tmp_path)
    comparison = harness.compare(theirs, ours, [entry for entry in listed() if entry.scenario == scenario])
    if problems := comparison.problems(scenario):
        pytest.fail(problems, pytrace=False)


@pytest.mark.parametrize("scenario", ["entry_life_cycle", "operation_nested"])
def test_scenario_trace_is_reproducible(scenario: str, oracle: Path, tmp_path: Path) -> None:
    first, second = (harness.traces(scenario, oracle, tmp_path / number) for number in ("first", "second"))
    assert first == second


def rows() -> list[str]:
    """The committed list of rows."""
    lines = (line.split() for line in ROWS.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return [words[0] for words in lines if words]


def test_every_row_of_the_behaviour_page_is_covered_by_a_case() -> None:
    named = {row for name in harness.scenario_names() for covered in harness.rows_of(name).values() for row in covered}
    assert named == set(rows())


def test_every_case_names_the_rows_that_it_covers() -> None:
    idle = [
        f"{name}.{case}"
        for name in harness.scenario_names()
        for case, rows in harness.rows_of(name).items()
        if not rows
    ]
    assert not idle


def test_list_of_rows_is_sorted_and_describes_each_row() -> None:
    lines = [line for line in ROWS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert rows() == sorted(set(rows()))
    assert all(len(line.split()) > 1 for line in lines)


def test_listed_differences_name_existing_cases() -> None:
    places = {(name, case) for name in harness.scenario_names() for case in (*harness.rows_of(name), ANY_CASE)}
    assert not [str(entry) for entry in listed() if (entry.scenario, entry.hunk.case) not in places]


def test_no_difference_is_listed_twice() -> None:
    counts = Counter((entry.scenario, entry.hunk) for entry in listed())
    assert not [place for place, count in counts.items() if count > 1]


def test_listed_differences_match_the_differences_page() -> None:
    page = PAGE.read_text(encoding="utf-8").partition("Kept on purpose")[0]
    on_page = set(re.findall(r"^   \* - ([A-Z]\d+[a-z]?)$", page, re.MULTILINE))
    assert {identifier for entry in listed() for identifier in entry.ids} == on_page - ELSEWHERE
