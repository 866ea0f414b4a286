"""Tests of the error classes: they share one root, and their code and text survive in results."""

from __future__ import annotations

import pytest
from cdumay_error import Error
from cdumay_error.types import ConfigurationError
from cdumay_result import Result

from kser import errors

TEXT = "the topic is missing: create it"

ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.KserError)]
#: The errors whose constructor takes the text.
ERRORS_WITH_TEXT = [cls for cls in ERRORS if cls is not errors.RetryLater]


def new_error(cls: type[errors.KserError]) -> errors.KserError:
    """Return an error with :data:`TEXT`."""
    return cls(TEXT, Result()) if cls is errors.SendError else cls(TEXT)


@pytest.mark.parametrize("cls", ERRORS_WITH_TEXT)
def test_every_error_is_a_cdumay_error_with_one_root(cls: type[errors.KserError]) -> None:
    error = new_error(cls)
    assert isinstance(error, Error)
    assert error.message == TEXT
    assert str(error) == f"{cls.MSGID}: {TEXT}"


@pytest.mark.parametrize("cls", ERRORS_WITH_TEXT)
def test_result_preserves_code_and_text_of_an_error(cls: type[errors.KserError]) -> None:
    result = Result.from_exception(new_error(cls))
    assert (result.retcode, result.stderr) == (cls.CODE, TEXT)
    assert result.retval["error"]["msgid"] == cls.MSGID
    assert result.retval["error"]["name"] == cls.__name__


def test_error_message_ids_are_unique() -> None:
    assert len({cls.MSGID for cls in ERRORS}) == len(ERRORS)


@pytest.mark.parametrize("cls", [errors.ProducerMissing, errors.TopicMissing, errors.StoreMissing])
def test_missing_setting_is_a_configuration_error_of_cdumay(cls: type[errors.KserError]) -> None:
    assert issubclass(cls, errors.SettingError)
    assert issubclass(cls, ConfigurationError)


def test_usage_error_is_a_type_error() -> None:
    assert issubclass(errors.UsageError, TypeError)


def test_send_error_contains_the_result_of_the_producer() -> None:
    send_result = Result(retcode=500, stderr="no broker")
    error = errors.SendError("not delivered", send_result)
    assert error.result is send_result
    assert Result.from_exception(error).uuid == send_result.uuid


def test_retry_later_contains_its_delay() -> None:
    error = errors.RetryLater(2.5)
    assert isinstance(error, Error)
    assert (error.seconds, error.message) == (2.5, "the task requested another attempt in 2.5 s")
    assert str(error) == f"{errors.RetryLater.MSGID}: {error.message}"
    result = Result.from_exception(error)
    assert (result.retcode, result.stderr) == (errors.RetryLater.CODE, error.message)


def test_client_error_may_be_fatal() -> None:
    assert not errors.ClientError("no").fatal
    assert errors.ClientError("no", fatal=True).fatal


def test_task_timeout_is_a_timeout_error_of_python() -> None:
    assert issubclass(errors.TaskTimeout, TimeoutError)


def test_docstring_tree_lists_every_error() -> None:
    assert errors.__doc__
    assert all(cls.__name__ in errors.__doc__ for cls in ERRORS)
