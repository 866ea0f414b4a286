"""Tests of the differential harness: it reports every unlisted, stale or malformed difference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from . import harness, published_package, recorder
from .accepted_differences import Hunk, parse

UUIDS = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")

LISTED = """
# a comment
[B8 C3] some / first
- old
+ new
"""


def compare(theirs: list[str], ours: list[str], text: str = "") -> harness.Comparison:
    """Compare two traces of one case with the entries in a text."""
    return harness.compare(["# first", *theirs], ["# first", *ours], parse(text))


def test_equal_traces_have_no_problem() -> None:
    assert compare(["a", "b"], ["a", "b"]).problems("some") == ""


def test_unlisted_difference_is_a_problem() -> None:
    comparison = compare(["a", "old"], ["a", "new"])
    assert comparison.unlisted == [Hunk("first", ("old",), ("new",))]
    assert "[??] some / first\n- old\n+ new" in comparison.problems("some")


def test_listed_difference_is_no_problem() -> None:
    assert compare(["a", "old"], ["a", "new"], LISTED).problems("some") == ""


def test_listed_difference_must_match_both_sides() -> None:
    comparison = compare(["a", "old"], ["a", "newer"], LISTED)
    assert len(comparison.unlisted) == len(comparison.stale) == 1


def test_stale_listed_difference_is_a_problem() -> None:
    comparison = compare(["a", "new"], ["a", "new"], LISTED)
    assert [entry.ids for entry in comparison.stale] == [("B8", "C3")]
    assert "[B8 C3] some / first" in comparison.problems("some")


def test_listed_difference_counts_once_by_default() -> None:
    theirs, ours = ["old", "a", "b", "old"], ["new", "a", "b", "new"]
    assert len(compare(theirs, ours, LISTED).unlisted) == 1
    assert compare(theirs, ours, LISTED.replace("first", "first x2")).problems("some") == ""
    assert len(compare(theirs, ours, LISTED.replace("first", "first x3")).stale) == 1


def test_a_listed_difference_belongs_to_its_case_or_to_any() -> None:
    assert len(compare(["old"], ["new"], LISTED.replace("first", "second")).unlisted) == 1
    assert compare(["old"], ["new"], LISTED.replace("first", "*")).problems("some") == ""


def test_differences_around_a_single_equal_line_are_merged() -> None:
    assert [len(harness.hunks("c", ["1", "2", "3"], ["x", *middle, "y"])) for middle in (["2"], [])] == [1, 1]
    assert len(harness.hunks("c", ["1", "2", "2", "3"], ["x", "2", "2", "y"])) == 2


def test_added_line_is_a_difference() -> None:
    assert harness.hunks("c", ["a"], ["a", "b"]) == [Hunk("c", (), ("b",))]


def test_traces_of_different_cases_are_rejected() -> None:
    with pytest.raises(harness.ScenarioBroken, match="the cases are not the same"):
        harness.compare(["# first", "# second"], ["# first"], [])


@pytest.mark.parametrize("text", ["nonsense", "- a line before any heading", "[b8] some / case"])
def test_unreadable_list_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        list(parse(text))


def test_entry_without_a_difference_is_rejected() -> None:
    with pytest.raises(ValueError, match="has no difference"):
        list(parse("[B8] some / first\n- a\n+ a"))


@pytest.mark.parametrize("code", ["raise ValueError('in the scenario')", "pass"])
def test_scenario_that_raises_or_prints_nothing_is_an_error(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.setattr(harness, "SCENARIOS", tmp_path)
    with pytest.raises(harness.ScenarioBroken, match="broken broke under run"):
        harness.trace("broken", Path(sys.executable), tmp_path / "run", {})


def test_a_scenario_that_does_not_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless.py").write_text("while True: pass")
    monkeypatch.setattr(harness, "SCENARIOS", tmp_path)
    monkeypatch.setattr(harness, "_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(harness.ScenarioBroken, match="endless did not end under run"):
        harness.trace("endless", Path(sys.executable), tmp_path / "run", {})


def test_missing_published_package_error_names_no_package_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_package, "ROOT", tmp_path)
    monkeypatch.setattr(published_package, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(published_package, "_TIMEOUT_SECONDS", 0)
    with pytest.raises(
        published_package.PublishedPackageMissing,
        match=r"^kser==0\.8\.27 could not be installed \(TimeoutExpired\); cache",
    ):
        published_package.published_python()


@pytest.fixture
def fresh_uuids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with no known uuids, as at the beginning of a case."""
    monkeypatch.setattr(recorder, "_uuids", {})


@pytest.mark.usefixtures("fresh_uuids")
def test_uuids_are_numbered_and_equal_ones_stay_equal() -> None:
    assert recorder.normalise(f"{UUIDS[1]} {UUIDS[0]} {UUIDS[1]}") == "<uuid-1> <uuid-2> <uuid-1>"


@pytest.mark.usefixtures("fresh_uuids")
@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("at 2020-01-02T03:04:05.678 sharp", "at <time> sharp"),
        ("broker 127.0.0.1:40851 died", "broker 127.0.0.1:<port> died"),
        ("gave up after 0.31 secs.", "gave up after <duration> secs."),
        (
            "Traceback (most recent call last):\n  File x\n    call()\nValueError: x",
            "Traceback (most recent call last):\n<body>\nValueError: x",
        ),
        (str(Path.cwd() / "run.lock"), "<tmp>/run.lock"),
    ],
)
def test_values_that_vary_between_runs_are_normalised(
    text: str, normalised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFERENTIAL_TMP", raising=False)
    assert recorder.normalise(text) == normalised


@pytest.mark.parametrize(
    "text", ["retcode 500", "12:30", "u-1", "11111111-1111", "10 task(s) found", "Traceback", "0.8.27", "5 s", "\ud800"]
)
def test_other_text_is_not_normalised(text: str) -> None:
    assert recorder.normalise(text) == text
