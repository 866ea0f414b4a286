"""Tests of results: merging, copying and failed results."""

from __future__ import annotations

import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser.results import copy_result, failed_result, merge
from tests.support import UUID


def test_merge_modifies_the_first_result_and_returns_it() -> None:
    one, two = Result(stdout="one"), Result(retcode=2, stderr="two", retval={"a": 1})
    assert merge(one, None) is one
    assert merge(one, two) is one
    assert (one.stdout, one.retcode, one.stderr, one.retval) == ("one", 2, "two", {"a": 1})


def test_copied_result_is_independent_of_the_original() -> None:
    original = Result(uuid="1", retcode=2, stdout="out", stderr="err", retval={"a": []})
    copy = copy_result(original)
    assert vars(copy) == vars(original)
    copy.retval["b"] = 1
    assert original.retval == {"a": []}
    assert copy_result(original, uuid="2").uuid == "2"


@pytest.mark.parametrize(
    "error", [ValueError("x"), ValidationError("x"), ValidationError("x", extra={"uuid": ["a", "b"]})]
)
def test_failed_result_has_the_uuid_of_its_entry(error: Exception) -> None:
    """C12: even if the error contains another uuid."""
    result = failed_result(error, UUID)
    assert (result.uuid, result.stderr) == (UUID, "x")
    assert result.retval["error"]["message"] == "x"
