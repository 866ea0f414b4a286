"""Tests of the retry policy: the number of attempts, their back-off, and the retried exceptions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from cdumay_error.types import NotImplemented as NotImplementedYet
from cdumay_error.types import ValidationError

from kser.errors import RetryLater, SettingError
from kser.retry import Retry


def delays(policy: Retry, attempts: int, exc: BaseException | None = None) -> list[float | None]:
    """Return the delay after each of the first attempts; None for no further attempt."""
    return [policy.delay_after(attempt, exc) for attempt in range(1, attempts + 1)]


# -- delays ------------------------------------------------------------------------------------------------------------


def test_backoff_grows_up_to_max_delay() -> None:
    policy = Retry(max_attempts=6, delay=1, backoff=3, max_delay=10, jitter=False)
    assert delays(policy, 6) == [1, 3, 9, 10, 10, None]


def test_default_retry_policy_has_three_attempts_with_doubling_backoff() -> None:
    policy = Retry()
    assert (policy.max_attempts, policy.delay, policy.backoff, policy.max_delay) == (3, 1, 2, 60)
    assert policy.jitter
    assert delays(policy, 3)[2] is None


def test_jitter_gives_half_to_all_of_the_backoff() -> None:
    policy = Retry(max_attempts=2, delay=10)
    jittered = [delay for _ in range(500) if (delay := policy.delay_after(1)) is not None]
    assert len(jittered) == 500
    assert all(5 <= delay <= 10 for delay in jittered)
    assert max(jittered) - min(jittered) > 4


def test_jitter_does_not_exceed_max_delay() -> None:
    policy = Retry(max_attempts=100, delay=1, backoff=10, max_delay=30)
    assert all(15 <= (policy.delay_after(50) or 0) <= 30 for _ in range(100))


def test_backoff_beyond_float_range_is_max_delay() -> None:
    policy = Retry(max_attempts=10**9, delay=1.5, backoff=10.0, max_delay=7, jitter=False)
    assert policy.delay_after(100_000) == 7


def test_retry_without_delay_is_immediate() -> None:
    assert delays(Retry(delay=0), 3) == [0, 0, None]


def test_single_attempt_is_not_retried() -> None:
    assert Retry(max_attempts=1).delay_after(1, ConnectionError()) is None


def test_attempt_number_beyond_max_attempts_is_not_retried() -> None:
    """A deployment between two attempts may have lowered ``max_attempts``."""
    assert Retry(max_attempts=2).delay_after(5) is None


# -- exceptions --------------------------------------------------------------------------------------------------------


class ConnectionRefused(ConnectionError):
    """Subclass of an exception that a policy names."""


DEFAULT = Retry()
ON = Retry(on=(ConnectionError, KeyError))
GIVE_UP_ON = Retry(give_up_on=ConnectionError)
ON_AND_GIVE_UP_ON = Retry(on=OSError, give_up_on=(ConnectionError,))
ON_VALIDATION_ERROR = Retry(on=(ValidationError,))


@pytest.mark.parametrize(
    ("policy", "exc", "retried"),
    [
        (DEFAULT, ConnectionError(), True),
        (DEFAULT, ValueError(), True),
        (DEFAULT, None, True),
        (DEFAULT, ValidationError("Missing parameter"), False),
        (DEFAULT, NotImplementedYet("no run"), False),
        (ON, ConnectionError(), True),
        (ON, ConnectionRefused(), True),
        (ON, KeyError("x"), True),
        (ON, ValueError(), False),
        (ON, None, False),
        (GIVE_UP_ON, ConnectionError(), False),
        (GIVE_UP_ON, ConnectionRefused(), False),
        (GIVE_UP_ON, ValueError(), True),
        (GIVE_UP_ON, None, True),
        (ON_AND_GIVE_UP_ON, OSError(), True),
        (ON_AND_GIVE_UP_ON, ConnectionRefused(), False),
        (ON_AND_GIVE_UP_ON, ValueError(), False),
        (ON_VALIDATION_ERROR, ValidationError("not yet"), True),
        (ON_VALIDATION_ERROR, ValueError(), False),
    ],
)
def test_retry_policy_decides_by_exception_type(policy: Retry, exc: Exception | None, retried: bool) -> None:
    """Errors of the message or the class would recur, so they are retried only if the policy names them."""
    assert policy.is_retryable(exc) is retried
    assert (policy.delay_after(1, exc) is not None) is retried


def test_retry_later_overrides_the_backoff_within_max_attempts() -> None:
    policy = Retry(max_attempts=3, on=(KeyError,), give_up_on=(Exception,))
    assert delays(policy, 3, RetryLater(12.5)) == [12.5, 12.5, None]


def test_retry_later_is_raised_by_a_task() -> None:
    with pytest.raises(RetryLater, match=r"another attempt in 3 s"):
        raise Retry.later(3)


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, "soon", None])
def test_retry_later_rejects_invalid_delays(seconds: Any) -> None:
    """An infinite delay would block the partition forever."""
    with pytest.raises((TypeError, SettingError), match="seconds"):
        Retry.later(seconds)


# -- declarations ------------------------------------------------------------------------------------------------------


INVALID_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"max_attempts": 0}, "max_attempts must be a whole number, 1 or more; it is 0"),
    ({"max_attempts": 2.5}, "max_attempts must be a whole number, 1 or more; it is 2.5"),
    ({"max_attempts": "3"}, "max_attempts must be a whole number, 1 or more; it is '3'"),
    ({"max_attempts": True}, "max_attempts must be a whole number, 1 or more; it is True"),
    ({"max_attempts": None}, "max_attempts must be a whole number, 1 or more; it is None"),
    ({"delay": -1}, "delay must be a number, 0 or more; it is -1"),
    ({"delay": math.nan}, "delay must be a number, 0 or more; it is nan"),
    ({"delay": math.inf, "max_delay": math.inf}, "delay must be a number, 0 or more; it is inf"),
    ({"backoff": 0.5}, "backoff must be a number, 1 or more; it is 0.5"),
    ({"max_delay": math.inf}, "max_delay must be a number, 1 or more; it is inf"),
    ({"delay": 90}, "max_delay must be a number, 90 or more; it is 60"),
    ({"jitter": 1}, "jitter must be True or False; it is 1"),
    (
        {"on": "ConnectionError"},
        "'on' must be an exception class or a tuple of exception classes; it is 'ConnectionError'",
    ),
    ({"on": (ConnectionError, 5)}, "'on' must be an exception class or a tuple"),
    ({"on": ConnectionError()}, "'on' must be an exception class or a tuple"),
    ({"on": (int,)}, "'on' must be an exception class or a tuple"),
    ({"give_up_on": None}, "'give_up_on' must be an exception class or a tuple of exception classes; it is None"),
]


@pytest.mark.parametrize(("values", "text"), INVALID_ARGUMENTS)
def test_invalid_retry_arguments_are_rejected(values: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError) as caught:
        Retry(**values)
    assert caught.value.message.startswith(f"Retry: {text}")


def test_exception_filter_accepts_a_class_or_a_list() -> None:
    assert Retry(on=KeyError) == Retry(on=(KeyError,))
    assert Retry(on=[KeyError], give_up_on=[ValueError]) == Retry(on=KeyError, give_up_on=ValueError)  # type: ignore[arg-type]


def test_retry_policy_is_immutable_and_hashable() -> None:
    policy = Retry(max_attempts=2)
    with pytest.raises(AttributeError):
        policy.max_attempts = 5  # type: ignore[misc]
    assert len({policy, Retry(max_attempts=2), Retry(max_attempts=3)}) == 2


# -- from a setting ----------------------------------------------------------------------------------------------------


def test_retry_setting_accepts_a_policy() -> None:
    policy = Retry(on=(KeyError,))
    assert Retry.from_setting("KSER_RETRY", policy) is policy


def test_retry_setting_accepts_a_mapping() -> None:
    values = {"max_attempts": 5, "delay": 0.5, "backoff": 3, "max_delay": 20, "jitter": False}
    assert Retry.from_setting("KSER_RETRY", values) == Retry(5, 0.5, 3, 20, False)
    assert Retry.from_setting("KSER_RETRY", {}) == Retry()


@pytest.mark.parametrize("value", [{"attempts": 5}, {"on": ["ConnectionError"]}, [5], 5, True, {5: 1}])
def test_invalid_retry_setting_is_rejected_with_its_allowed_fields(value: Any) -> None:
    with pytest.raises(SettingError) as caught:
        Retry.from_setting("KSER_RETRY", value)
    text = caught.value.message
    assert text.startswith(
        "KSER_RETRY must be a Retry, or a mapping (in JSON, an object) with no other keys than max_attempts, delay,"
    )
    assert text.endswith(f"it is {value!r}")


def test_values_of_a_retry_setting_are_validated() -> None:
    with pytest.raises(SettingError, match="max_attempts must be a whole number"):
        Retry.from_setting("KSER_RETRY", {"max_attempts": "3"})
