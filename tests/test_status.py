"""Tests of statuses and their transitions."""

from __future__ import annotations

import pytest
from cdumay_result import Result

from kser import status

STATES = ("PENDING", "RUNNING", "SUCCESS", "FAILED", "CANCELLED")

ALLOWED = {
    ("PENDING", "RUNNING"),
    ("PENDING", "CANCELLED"),
    ("RUNNING", "SUCCESS"),
    ("RUNNING", "FAILED"),
    ("RUNNING", "CANCELLED"),
    ("FAILED", "RUNNING"),
    ("CANCELLED", "RUNNING"),
}


def test_statuses_are_the_strings_of_the_wire() -> None:
    assert set(status.TRANSITIONS) == set(STATES)
    assert (status.PENDING, status.RUNNING, status.SUCCESS, status.FAILED, status.CANCELLED) == STATES


@pytest.mark.parametrize("old", STATES)
@pytest.mark.parametrize("new", STATES)
def test_status_transitions_are_those_of_the_table(old: str, new: str) -> None:
    assert status.can_transition(old, new) is ((old, new) in ALLOWED)


def test_unknown_status_has_no_transitions() -> None:
    assert not status.can_transition("HALTED", "RUNNING")
    assert not status.can_transition("RUNNING", "HALTED")


@pytest.mark.parametrize("retcode", [1, 299, 300, 500, 0.5])
def test_every_return_code_above_zero_is_a_failure(retcode: float) -> None:
    """C3"""
    assert status.final_status(Result(retcode=retcode)) == "FAILED"
    assert status.final_status(Result(), Result(retcode=retcode)) == "FAILED"
    assert status.final_status(Result(retcode=retcode), Result()) == "FAILED"


@pytest.mark.parametrize("results", [(), (None,), (Result(),), (None, Result()), (Result(retcode=-1),)])
def test_results_without_a_failure_are_a_success(results: tuple[Result | None, ...]) -> None:
    """C3: merged into a blank result, a negative return code gives zero."""
    assert status.final_status(*results) == "SUCCESS"


@pytest.mark.parametrize(
    ("value", "error"), [("text", AttributeError), (5, AttributeError), (Result(retcode="1"), TypeError)]
)
def test_value_that_is_no_result_is_rejected(value: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        status.final_status(value)  # type: ignore[arg-type]
