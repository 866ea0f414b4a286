"""Tests that each scenario behaves as with the published package, except for the accepted differences."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from . import harness
from .accepted_differences import ANY_CASE, accepted_differences
from .published_package import ROOT

ROWS = Path(__file__).with_name("rows.txt")
PAGE = ROOT / "docs" / "differences.rst"

#: Decisions of the page that other tests cover, because their effect shows only in a group, with threads or over time.
COVERED_ELSEWHERE = {"A3", "D1", "D11", "D13", "D20", "D21", "D22", "D23", "D24", "D30", "D31"}


@pytest.mark.parametrize("scenario", harness.scenario_names())
def test_scenario_differs_exactly_where_listed(scenario: str, published: Path, tmp_path: Path) -> None:
    theirs, ours = harness.traces(scenario, published, tmp_path)
    comparison = harness.compare(
        theirs, ours, [entry for entry in accepted_differences() if entry.scenario == scenario]
    )
    if problems := comparison.problems(scenario):
        pytest.fail(problems, pytrace=False)


@pytest.mark.parametrize("scenario", ["entry_life_cycle", "operation_nested"])
def test_scenario_trace_is_reproducible(scenario: str, published: Path, tmp_path: Path) -> None:
    first, second = (harness.traces(scenario, published, tmp_path / number) for number in ("first", "second"))
    assert first == second


def rows() -> list[str]:
    """Return the rows of ``rows.txt``."""
    lines = (line.split() for line in ROWS.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return [words[0] for words in lines if words]


def test_every_row_of_the_behaviour_page_is_covered_by_a_case() -> None:
    named = {row for name in harness.scenario_names() for covered in harness.rows_of(name).values() for row in covered}
    assert named == set(rows())


def test_every_case_names_the_rows_that_it_covers() -> None:
    cases_without_rows = [
        f"{name}.{case}"
        for name in harness.scenario_names()
        for case, rows in harness.rows_of(name).items()
        if not rows
    ]
    assert not cases_without_rows


def test_list_of_rows_is_sorted_and_describes_each_row() -> None:
    lines = [line for line in ROWS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert rows() == sorted(set(rows()))
    assert all(len(line.split()) > 1 for line in lines)


def test_listed_differences_name_existing_cases() -> None:
    cases = {(name, case) for name in harness.scenario_names() for case in (*harness.rows_of(name), ANY_CASE)}
    assert not [str(entry) for entry in accepted_differences() if (entry.scenario, entry.hunk.case) not in cases]


def test_no_difference_is_listed_twice() -> None:
    counts = Counter((entry.scenario, entry.hunk) for entry in accepted_differences())
    assert not [difference for difference, count in counts.items() if count > 1]


def test_listed_differences_match_the_differences_page() -> None:
    page = PAGE.read_text(encoding="utf-8").partition("Kept on purpose")[0]
    on_page = set(re.findall(r"^   \* - ([A-Z]\d+[a-z]?)$", page, re.MULTILINE))
    assert {identifier for entry in accepted_differences() for identifier in entry.ids} == on_page - COVERED_ELSEWHERE
