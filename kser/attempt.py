"""Attempt: one run of a record or of a task. The consumer and the running entrypoint share one Attempt object."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import NAMESPACE_URL, uuid4, uuid5

from kser.errors import RetryLater
from kser.retry import DEFAULT_RETRY, Retry
from kser.takeover import Takeover

#: Reasons of a permanent failure, as a dead letter names them.
UNDECODABLE: Final = "undecodable"
OVER_LIMIT: Final = "over-limit"
UNKNOWN_ENTRYPOINT: Final = "unknown-entrypoint"
FAILED: Final = "failed"
UNREADABLE: Final = "unreadable"

#: The two values of the outcome latch (``Attempt.outcome``). They state which event came first: the end of the work, or
#: the end of the time limit. The latch does not store whether an attempt was abandoned.
FINISHED: Final = "ended"
TIMED_OUT: Final = "given up"


class AttemptAbandoned(BaseException):
    """Exception that ends an abandoned attempt, which the consumer no longer waits for and whose result it drops."""


class _UserCodeGuard(AbstractContextManager[object]):
    """Guard that turns SystemExit, asyncio's CancelledError and similar exceptions of user code into a RuntimeError.

    Without the guard, one message could end the consumer, and could end it again after each restart, because Kafka
    redelivers the message. KeyboardInterrupt and the consumer's own :exc:`AttemptAbandoned` pass unchanged, because
    user code did not raise them.
    """

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        if exc is not None and not isinstance(exc, _PASS_THROUGH):
            raise RuntimeError(f"{exc!r} ended the task") from exc


_PASS_THROUGH = (Exception, KeyboardInterrupt, AttemptAbandoned)
user_code_guard = _UserCodeGuard()


class Failure(NamedTuple):
    """Permanent failure of a message: a reason, which is one of the constants of this module, and the error."""

    reason: str
    error_class: str
    message: str


class Deferred(NamedTuple):
    """Placeholder for the result of an attempt that acked its record, but did not finish the work.

    The store is responsible for the rest of the work, so the controller calls no hook.
    """

    #: The result that the store has recorded so far.
    result: Any


@dataclass(frozen=True)
class ConsumerCallbacks:
    """The functions that an attempt calls in the consumer that runs it.

    :param ack: acks the record of an attempt.
    :param abandon: abandons an attempt.
    :param clock: returns the current time in seconds, by the clock with which the consumer enforces time limits.
    :param cluster: returns the id of the Kafka cluster, or "" if the id is unknown.
    :param is_stopping: returns whether the consumer is shutting down.
    """

    ack: Callable[[Attempt], object]
    abandon: Callable[[Attempt], object]
    clock: Callable[[], float]
    cluster: Callable[[], str]
    is_stopping: Callable[[], bool]


class Attempt:
    """One attempt at a message.

    :param retry: the retry policy of the consumer, for classes that declare no policy.
    :param record: the Kafka record that contains the message, or the takeover that stands in its place; None outside of
        a consumer, and in a ``TaskAttempt``.
    """

    #: Callbacks of the consumer that runs the attempt; None before the start of the attempt, and outside of a consumer.
    callbacks: ConsumerCallbacks | None = None
    #: Number of the attempt, from 1.
    number = 1
    #: Number of earlier attempts that the retry policy does not count, such as the attempts before a resume.
    attempts_not_counted = 0
    #: Seconds until the next attempt; None unless this attempt has failed and a retry follows.
    retry_in: float | None = None
    #: Permanent failure of the message; None unless the attempt has failed and no retry follows.
    failure: Failure | None = None
    #: The error of an earlier attempt that exceeded its time limit; None without such an attempt. If the error is set,
    #: this attempt does not run the message, but raises the error, so that the failure is recorded.
    timeout_error: Exception | None = None
    #: Time in seconds at which the attempt started, by the clock of the consumer.
    started_at = 0.0
    #: Time limit of the attempt in seconds; None without a limit.
    time_limit: float | None = None
    #: True after the record was acked before the end of the attempt, which happens when the store becomes responsible
    #: for the message. From then on, the consumer writes no dead letter and does not retry the message.
    acked = False
    #: uuid of the stored operation whose task this attempt runs; None for any other attempt.
    operation_uuid: str | None = None

    #: The entrypoint object that runs the message. Its ``run`` method may execute further entrypoints, which the
    #: attempt ignores.
    entry: Any = None
    #: The class that the message names; None until the controller has looked up the class.
    entrypoint_class: type | None = None

    _abandoned = False

    def __init__(self, retry: Retry | None = None, record: Any = None) -> None:
        #: Retry policy for classes that declare no policy.
        self.retry = retry
        #: The Kafka record that contains the message, or the takeover that stands in its place; None outside of a
        #: consumer, and in a TaskAttempt.
        self.record = record
        #: The outcome latch, a list: its first value is the outcome of the attempt, and all later values are ignored.
        self.outcome: list[str] = []

    @property
    def topic(self) -> str:
        """Topic of the message; empty if the attempt has no record."""
        return "" if self.record is None else str(self.record.topic)

    @property
    def takeover(self) -> Takeover | None:
        """The takeover that the attempt runs; None if the attempt runs a record, and outside of a consumer."""
        return self.record if isinstance(self.record, Takeover) else None

    @property
    def abandoned(self) -> bool:
        """True if the consumer has abandoned the attempt: it does not wait for the attempt, and drops its result."""
        return self._abandoned

    @property
    def cancel_requested(self) -> bool:
        """True after a request to cancel the stored operation whose task this attempt runs."""
        return False

    @property
    def shutting_down(self) -> bool:
        """True if the consumer is shutting down.

        In this case, a stored operation is released at its next checkpoint, so that another consumer continues it.
        """
        return self.callbacks is not None and self.callbacks.is_stopping()

    def on_constructed(self, entry: Any) -> None:
        """Register an entrypoint object that was just constructed.

        The first object of the class that the message names becomes the entrypoint object of the message.
        """
        if self.entry is None and type(entry) is self.entrypoint_class:
            self.entry = entry

    def on_started(self, entry: Any) -> None:
        """Register that the execution of an entrypoint object starts.

        If the message has no entrypoint object yet, ``entry`` becomes the entrypoint object of the message.

        :raises kser.errors.TaskTimeout: an earlier attempt exceeded its time limit. This attempt does not run the
            message; it raises the error, so that the failure is recorded.
        """
        if self.entry is None:
            self.entry = entry
        if self.entry is not entry:
            return
        if self.timeout_error is not None:
            raise self.timeout_error
        self.time_limit = time_limit_of(type(entry))

    def should_retry(self, exc: BaseException | None, error: Failure) -> bool:
        """Return whether a retry follows this failed attempt. If no retry follows, record the failure as permanent.

        If the record is acked, return False and save no failure, because the store is responsible for the message.

        :param exc: the exception of the attempt; None for a failed result.
        :param error: the failure to record.
        """
        if self.acked:
            return False
        declared = getattr(type(self.entry), "RETRY", None)
        policy = declared if isinstance(declared, Retry) else self.retry
        if policy is None and isinstance(exc, RetryLater):
            policy = DEFAULT_RETRY
        self.retry_in = policy.delay_after(self.number - self.attempts_not_counted, exc) if policy else None
        if self.retry_in is None:
            self.failure = error
        return self.retry_in is not None

    def reject(self, reason: str, exc: BaseException) -> None:
        """Record a permanent failure, because no other attempt could handle the message."""
        self.failure = Failure(reason, error_name(exc), safe_text(exc))

    def ack(self) -> None:
        """Ack the record. From now on, the store is responsible for the message, even if this attempt fails."""
        if self.callbacks is not None and not self.acked:
            self.callbacks.ack(self)
        self.acked = True

    def restart_timer(self, time_limit: float | None) -> None:
        """Restart the timer and clear the outcome, so that the next part of the work has a time limit of its own.

        :param time_limit: time limit of the next part in seconds; None without a limit.
        """
        if self.callbacks is not None:
            self.started_at = self.callbacks.clock()
        # Clear the old limit before replacing the outcome latch. The supervisor thread reads the latch first and the
        # limit second, so it never applies the old limit to the new latch.
        self.time_limit = None
        self.outcome = []
        self.time_limit = time_limit

    def abandon(self) -> None:
        """Abandon the attempt because the consumer is shutting down; the message stays unfinished.

        :raises AttemptAbandoned: always.
        """
        if self.callbacks is not None:
            self.callbacks.abandon(self)
        self.mark_abandoned()
        raise AttemptAbandoned

    def mark_abandoned(self) -> None:
        """Mark the attempt as abandoned; the next call of :meth:`raise_if_abandoned` then raises AttemptAbandoned."""
        self._abandoned = True

    def deterministic_uuid(self) -> str:
        """Return a uuid for a message that has no uuid.

        If the attempt has a Kafka record, each redelivery of the record gives the same uuid. Otherwise, the uuid is
        random.
        """
        if self.record is None or self.takeover is not None:
            return str(uuid4())
        cluster = "" if self.callbacks is None else self.callbacks.cluster()
        record = self.record
        return str(uuid5(NAMESPACE_URL, f"kafka:{cluster}/{record.topic}/{record.partition}/{record.offset}"))

    def resolve(self, value: str = FINISHED) -> bool:
        """Set the outcome of the attempt, unless it is already set; return whether the outcome is ``value``.

        :param value: ``FINISHED`` or ``TIMED_OUT``.
        """
        outcome = self.outcome
        # An append is atomic, so of two threads exactly one sets the first value.
        outcome.append(value)
        return outcome[0] == value

    def raise_if_abandoned(self) -> None:
        """Raise AttemptAbandoned if the attempt was abandoned or has timed out.

        :raises AttemptAbandoned: the attempt was abandoned or has timed out.
        """
        if self.abandoned or (self.outcome and self.outcome[0] == TIMED_OUT):
            raise AttemptAbandoned

    def on_finished(self, entry: Any) -> None:
        """Register that the work of an entrypoint object has finished.

        If ``entry`` is the entrypoint object of the message, the attempt can no longer time out.

        :raises AttemptAbandoned: the attempt was abandoned or timed out before ``entry`` finished.
        """
        if entry is self.entry:
            self.resolve()
        self.raise_if_abandoned()


#: The attempt that runs in this context; None outside of a consumer.
current_attempt: ContextVar[Attempt | None] = ContextVar("kser_attempt", default=None)


def raise_if_decided(entry: Any) -> None:
    """Report to the current attempt that an entrypoint has finished, and raise if its result is dropped.

    Outside of an attempt, do nothing.

    :raises AttemptAbandoned: the attempt was abandoned or has timed out, so the consumer drops its result.
    """
    if (attempt := current_attempt.get()) is not None:
        attempt.on_finished(entry)


def time_limit_of(cls: type) -> float | None:
    """Return ``TIME_LIMIT`` of a class: the time limit of each attempt in seconds, or None without a limit."""
    timeout = getattr(cls, "TIME_LIMIT", None)
    # Ignore a value that is not a positive number, because it is an attribute of the user's class with another meaning
    # (C18 in docs/differences.rst). For the same reason, kser ignores a ``RETRY`` that is not a Retry.
    fits = isinstance(timeout, int | float) and timeout > 0 and not isinstance(timeout, bool)
    return timeout if fits else None


def error_name(exc: BaseException) -> str:
    """Return the full name of an exception's class."""
    cls = type(exc)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def safe_text(value: object) -> str:
    """Return ``str(value)``, or a text with the name of the class if ``str`` raises an exception."""
    try:
        return str(value)
    except Exception as exc:
        return f"<{type(value).__qualname__}, whose text raises {type(exc).__qualname__}>"


#: Minimum seconds between two database reads by ``cancel_requested``, because a task may check this property in a loop.
CANCEL_CHECK_INTERVAL = 0.5


class TaskAttempt(Attempt):
    """An attempt at a task of a stored operation.

    :param parent: the attempt at the record whose message made the consumer run the task; None outside of a consumer.
    :param task: the task.
    :param number: number of the attempt, which is the number of recorded attempts plus 1.
    :param retry: the retry policy if the class of the task declares no policy.
    :param operation_uuid: uuid of the operation that the task belongs to.
    :param is_cancelled: reads from the database whether a cancel of the operation was requested.
    """

    def __init__(
        self,
        parent: Attempt | None,
        task: Any,
        number: int,
        retry: Retry | None,
        operation_uuid: str,
        is_cancelled: Callable[[], bool],
    ) -> None:
        super().__init__(retry)
        self.parent = parent
        self.entry = task
        self.number = number
        self.operation_uuid = operation_uuid
        self._is_cancelled = is_cancelled
        self._checked_at = -CANCEL_CHECK_INTERVAL
        self._cancelled = False

    def on_finished(self, entry: Any) -> None:
        if self.parent is None:
            return
        if entry is self.entry:
            self.parent.resolve()
        self.parent.raise_if_abandoned()

    @property
    def abandoned(self) -> bool:
        return self.parent is not None and self.parent.abandoned

    def abandon(self) -> None:
        """End this attempt without a checkpoint. The step runs again later.

        Call this method if the consumer is shutting down, or if the consumer has abandoned the attempt at the record.
        The attempt at the task runs inside the attempt at the record.

        :raises kser.attempt.AttemptAbandoned: always.
        """
        raise AttemptAbandoned

    @property
    def cancel_requested(self) -> bool:
        now = time.monotonic()
        if not self._cancelled and now - self._checked_at >= CANCEL_CHECK_INTERVAL:
            self._checked_at = now
            self._cancelled = self._is_cancelled()
        return self._cancelled
