"""Retry policy: how often, when and after which failures a message is retried."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Self

from cdumay_error.types import NotImplemented as NotImplementedYet
from cdumay_error.types import ValidationError

from kser import backoff
from kser.config import check_number
from kser.errors import RetryLater, SettingError

Exceptions = tuple[type[BaseException], ...]

_NUMBER = int | float

#: Errors that another attempt cannot prevent, because the message or the class is wrong.
NOT_RETRYABLE: Final[Exceptions] = (ValidationError, NotImplementedYet)


@dataclass(frozen=True)
class Retry:
    """Retry policy.

    The delay after attempt ``n`` is ``delay * backoff ** (n - 1)`` seconds, at most ``max_delay``. A
    ``ValidationError`` means that the message itself is wrong, for example that a parameter is missing. So a
    ``ValidationError`` causes a retry only if ``on`` includes it.

    :param max_attempts: maximum number of attempts, including the first.
    :param delay: seconds between the first attempt and the second.
    :param backoff: factor by which the delay grows from one attempt to the next.
    :param max_delay: the longest delay, in seconds.
    :param jitter: whether to use a random delay between half of the delay and the whole delay, so that messages that
        failed at the same time are not retried at the same time.
    :param on: the exceptions after which to retry; other failures cause no retry. None means: retry after each
        exception except ``ValidationError`` and cdumay's ``NotImplemented``, and after a failed result without an
        exception.
    :param give_up_on: the exceptions after which not to retry, even if ``on`` includes them.
    :raises kser.errors.SettingError: a value is invalid.
    """

    max_attempts: int = 3
    delay: float = 1
    backoff: float = 2
    max_delay: float = 60
    jitter: bool = True
    on: Exceptions | type[BaseException] | None = None
    give_up_on: Exceptions | type[BaseException] = ()

    #: ``raise Retry.later(seconds)`` in a task requests another attempt after this number of seconds. The attempt that
    #: raises it counts towards ``max_attempts``.
    later: ClassVar[type[RetryLater]] = RetryLater

    def __post_init__(self) -> None:
        check_number("Retry: max_attempts", self.max_attempts, lowest=1, whole=True, types=int)
        check_number("Retry: delay", self.delay, lowest=0, types=_NUMBER)
        check_number("Retry: backoff", self.backoff, lowest=1, types=_NUMBER)
        check_number("Retry: max_delay", self.max_delay, lowest=self.delay, types=_NUMBER)
        if not isinstance(self.jitter, bool):
            raise SettingError(f"Retry: jitter must be True or False; it is {self.jitter!r}")
        for name in ("on", "give_up_on"):
            object.__setattr__(self, name, _exceptions(name, getattr(self, name)))

    @classmethod
    def from_setting(cls, name: str, value: Any) -> Self:
        """Create a policy from a setting.

        :param value: a Retry, or a mapping of constructor arguments other than ``on`` and ``give_up_on``.

        :raises kser.errors.SettingError: ``value`` is neither a Retry nor a mapping of these arguments.
        """
        if isinstance(value, cls):
            return value
        known = [field.name for field in fields(cls) if field.name not in ("on", "give_up_on")]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            raise SettingError(
                f"{name} must be a Retry, or a mapping (in JSON, an object) with no other keys than {', '.join(known)};"
                f" it is {value!r}"
            )
        return cls(**value)

    def is_retryable(self, exc: BaseException | None) -> bool:
        """Return whether the policy retries after ``exc``; None stands for a failed result without an exception."""
        if exc is None:
            return self.on is None
        if isinstance(exc, RetryLater):
            return True
        if isinstance(exc, self.give_up_on):
            return False
        return not isinstance(exc, NOT_RETRYABLE) if self.on is None else isinstance(exc, self.on)

    def delay_after(self, attempt: int, exc: BaseException | None = None) -> float | None:
        """Return the seconds until the next attempt, or None if no attempt follows.

        :param attempt: number of the failed attempt, from 1.
        :param exc: exception of the failed attempt; None for a failed result.
        """
        if attempt >= self.max_attempts or not self.is_retryable(exc):
            return None
        if isinstance(exc, RetryLater):
            return exc.seconds
        wait = backoff.delay(attempt, first=self.delay, ceiling=self.max_delay, factor=self.backoff)
        return wait * random.uniform(0.5, 1) if self.jitter else wait


def _exceptions(name: str, value: Any) -> Exceptions | None:
    if value is None and name == "on":
        return None
    classes = value if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in classes):
        raise SettingError(
            f"Retry: {name!r} must be an exception class or a tuple of exception classes; it is {value!r}"
        )
    return tuple(classes)


#: The policy for ``Retry.later`` if neither the class nor the consumer has a policy.
DEFAULT_RETRY: Final = Retry()
