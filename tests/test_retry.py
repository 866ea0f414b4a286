"""The retry policy: how often, when and after which failures."""

from __future__ import annotations

import math
from typing import Any

import pytest
from cdumay_error.types import NotImplemented as NotImplementedYet
from cdumay_error.types import ValidationError

from kser.errors import RetryLater, SettingError
from kser.retry import Retry


def waits(policy: Retry, attempts: int, exc: BaseException | None = None) -> list[float | None]:
    """What is waited after each of the first attempts."""
    return [policy.wait_after(attempt, exc) for attempt in range(1, attempts + 1)]


# -- when --------------------------------------------------------------------------------------------------------------


def test_waits_grow_until_they_are_the_longest() -> None:
    policy = Retry(max_attempts=6, delay=1, backoff=3, max_delay=10, jitter=False)
    assert waits(policy, 6) == [1, 3, 9, 10, 10, None]


def test_by_default_there_are_three_attempts_a_second_apart_and_then_two() -> None:
    policy = Retry()
    assert (policy.max_attempts, policy.delay, policy.backoff, policy.max_delay) == (3, 1, 2, 60)
    assert policy.jitter
    assert waits(policy, 3)[2] is None


def test_with_jitter_a_wait_lies_between_its_half_and_its_whole() -> None:
    policy = Retry(max_attempts=2, delay=10)
    found = [wait for _ in range(500) if (wait := policy.wait_after(1)) is not None]
    assert len(found) == 500
    assert all(5 <= wait <= 10 for wait in found)
    assert max(found) - min(found) > 4


def test_jitter_does_not_exceed_the_longest_wait() -> None:
    policy = Retry(max_attempts=100, delay=1, backoff=10, max_delay=30)
    assert all(15 <= (policy.wait_after(50) or 0) <= 30 for _ in range(100))


def test_a_power_that_no_float_holds_is_the_longest_wait() -> None:
    policy = Retry(max_attempts=10**9, delay=1.5, backoff=10.0, max_delay=7, jitter=False)
    assert policy.wait_after(100_000) == 7


def test_without_delay_the_next_attempt_follows_at_once() -> None:
    assert waits(Retry(delay=0), 3) == [0, 0, None]


def test_one_attempt_is_no_retry() -> None:
    assert Retry(max_attempts=1).wait_after(1, ConnectionError()) is None


def test_an_attempt_beyond_the_last_is_not_followed() -> None:
    """The class may have fewer attempts than it had when the message was tried first."""
    assert Retry(max_attempts=2).wait_after(5) is None


# -- after what --------------------------------------------------------------------------------------------------------


class Refused(ConnectionError):
    """An exception below another one."""


ANY = Retry()
SOME = Retry(on=(ConnectionError, KeyError))
BUT = Retry(give_up_on=ConnectionError)
BOTH = Retry(on=OSError, give_up_on=(ConnectionError,))
MENDED = Retry(on=(ValidationError,))


@pytest.mark.parametrize(
    ("policy", "exc", "admitted"),
    [
        (ANY, ConnectionError(), True),
        (ANY, ValueError(), True),
        (ANY, None, True),
        (ANY, ValidationError("Missing parameter"), False),
        (ANY, NotImplementedYet("no run"), False),
        (SOME, ConnectionError(), True),
        (SOME, Refused(), True),
        (SOME, KeyError("x"), True),
        (SOME, ValueError(), False),
        (SOME, None, False),
        (BUT, ConnectionError(), False),
        (BUT, Refused(), False),
        (BUT, ValueError(), True),
        (BUT, None, True),
        (BOTH, OSError(), True),
        (BOTH, Refused(), False),
        (BOTH, ValueError(), False),
        (MENDED, ValidationError("not yet"), True),
        (MENDED, ValueError(), False),
    ],
)
def test_which_failures_are_tried_again(policy: Retry, exc: Exception | None, admitted: bool) -> None:
    """What is wrong with the message or the class, no other attempt mends: unless the class says so."""
    assert policy.admits(exc) is admitted
    assert (policy.wait_after(1, exc) is not None) is admitted


def test_who_asks_for_another_attempt_gets_it_then() -> None:
    policy = Retry(max_attempts=3, on=(KeyError,), give_up_on=(Exception,))
    assert waits(policy, 3, RetryLater(12.5)) == [12.5, 12.5, None]


def test_later_is_what_a_task_raises() -> None:
    with pytest.raises(RetryLater, match=r"tried again in 3 s"):
        raise Retry.later(3)


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, "soon", None])
def test_later_is_some_time_to_come(seconds: Any) -> None:
    """A time that never comes would hold its partition for ever."""
    with pytest.raises((TypeError, SettingError), match="seconds"):
        Retry.later(seconds)


# -- declaring one -----------------------------------------------------------------------------------------------------


NONSENSE: list[tuple[dict[str, Any], str]] = [
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
    ({"on": "ConnectionError"}, "on must be exception classes; it is 'ConnectionError'"),
    ({"on": (ConnectionError, 5)}, "on must be exception classes"),
    ({"on": ConnectionError()}, "on must be exception classes"),
    ({"on": (int,)}, "on must be exception classes"),
    ({"give_up_on": None}, "give_up_on must be exception classes; it is None"),
]


@pytest.mark.parametrize(("values", "text"), NONSENSE)
def test_nonsense_is_refused_where_it_is_declared(values: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError) as caught:
        Retry(**values)
    assert caught.value.message.startswith(f"Retry: {text}")


def test_a_class_stands_for_a_tuple_of_it_and_so_does_a_list() -> None:
    assert Retry(on=KeyError) == Retry(on=(KeyError,))
    assert Retry(on=[KeyError], give_up_on=[ValueError]) == Retry(on=KeyError, give_up_on=ValueError)  # type: ignore[arg-type]


def test_a_policy_is_a_value_that_nobody_changes() -> None:
    policy = Retry(max_attempts=2)
    with pytest.raises(AttributeError):
        policy.max_attempts = 5  # type: ignore[misc]
    assert len({policy, Retry(max_attempts=2), Retry(max_attempts=3)}) == 2


# -- from a setting ----------------------------------------------------------------------------------------------------


def test_a_policy_as_a_setting_is_taken_as_it_is() -> None:
    policy = Retry(on=(KeyError,))
    assert Retry.from_setting("KSER_RETRY", policy) is policy


def test_a_mapping_says_all_but_exceptions() -> None:
    values = {"max_attempts": 5, "delay": 0.5, "backoff": 3, "max_delay": 20, "jitter": False}
    assert Retry.from_setting("KSER_RETRY", values) == Retry(5, 0.5, 3, 20, False)
    assert Retry.from_setting("KSER_RETRY", {}) == Retry()


@pytest.mark.parametrize("value", [{"attempts": 5}, {"on": ["ConnectionError"]}, [5], 5, True, {5: 1}])
def test_what_is_no_policy_is_refused_with_what_it_may_say(value: Any) -> None:
    with pytest.raises(SettingError) as caught:
        Retry.from_setting("KSER_RETRY", value)
    text = caught.value.message
    assert text.startswith("KSER_RETRY must be a Retry, or an object with some of max_attempts, delay, backoff,")
    assert text.endswith(f"it is {value!r}")


def test_a_value_of_a_setting_is_checked_like_an_argument() -> None:
    with pytest.raises(SettingError, match="max_attempts must be a whole number"):
        Retry.from_setting("KSER_RETRY", {"max_attempts": "3"})
