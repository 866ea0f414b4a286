"""Attempt: one run of a message, shared by the consumer that makes it and the entrypoint that runs."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final, NamedTuple
from uuid import uuid4

from kser.errors import RetryLater
from kser.retry import DEFAULT, Retry

#: Reasons of a permanent failure.
UNDECODABLE: Final = "undecodable"
UNKNOWN: Final = "unknown-entrypoint"
FAILED: Final = "failed"


#: Outcomes of an attempt.
ENDED: Final = "ended"
GIVEN_UP: Final = "given up"


class Abandoned(BaseException):
    """Stop request to an attempt that the consumer has abandoned; its result would be dropped."""


class Failure(NamedTuple):
    """Permanent failure of a message: ``undecodable``, ``unknown-entrypoint`` or ``failed``, and its error."""

    reason: str
    error_class: str
    message: str


class Unfinished(NamedTuple):
    """Placeholder for a result: the message is acked, and its work continues elsewhere or later or was done before.

    The store is responsible for the work. No hook is called, and no counter is increased.
    """

    #: The stored result, as far as it is known.
    result: Any


class Delivery:
    """One attempt at a message.

    :param retry: the retry policy of the consumer, for classes that declare none.
    """

    #: Number of the attempt, from 1.
    attempt = 1
    #: Number of earlier attempts that do not count for the retry policy.
    forgiven = 0
    #: Seconds until the next attempt, if this one has failed and another one follows.
    retry_in: float | None = None
    #: Permanent failure of the message.
    failure: Failure | None = None
    #: Timeout error to raise instead of running: this attempt records the failure of an abandoned one.
    verdict: Exception | None = None
    #: True if the attempt was abandoned.
    abandoned = False
    #: Time limit of the attempt in seconds; None without a limit.
    timeout: float | None = None
    #: True if the record is acked because the store has the message: no dead letter, and no retry by this consumer.
    answered = False
    #: True if the consumer is shutting down: release work that another consumer can continue.
    ending = False

    #: Topic of the message; empty if it has none.
    topic = ""
    #: uuid of the stored operation whose task is run; None for any other attempt.
    operation_uuid: str | None = None
    #: True if a cancel of that operation was requested.
    cancel_requested = False

    #: Entrypoint of the message. The attempt ignores other entrypoints that run inside this one.
    entry: Any = None
    #: Class of the message's entrypoint, once it is known.
    expected: type | None = None

    def __init__(self, retry: Retry | None = None) -> None:
        #: Retry policy for classes that declare none.
        self.retry = retry
        #: Outcome latch: the first value wins, later ones are ignored.
        self.decision: list[str] = []

    def construct(self, entry: Any) -> None:
        """Register a constructed entrypoint; the first one of the message's class is the entrypoint of the message."""
        if self.entry is None and type(entry) is self.expected:
            self.entry = entry

    def start(self, entry: Any) -> None:
        """Register an entrypoint that starts; it is the entrypoint of the message if none is known yet.

        :raises kser.errors.TaskTimeout: this attempt records the failure of an abandoned one.
        """
        if self.entry is None:
            self.entry = entry
        if self.entry is not entry:
            return
        if self.verdict is not None:
            raise self.verdict
        self.timeout = timeout_of(type(entry))

    def postpones(self, exc: BaseException | None, error: Failure) -> bool:
        """Return whether another attempt follows a failure; if none follows, record the failure as permanent.

        :param exc: the exception of the attempt; None for a failed result.
        :param error: the failure to record.
        """
        if self.answered:
            return False
        declared = getattr(type(self.entry), "RETRY", None)
        policy = declared if isinstance(declared, Retry) else self.retry
        if policy is None and isinstance(exc, RetryLater):
            policy = DEFAULT
        self.retry_in = policy.wait_after(self.attempt - self.forgiven, exc) if policy else None
        if self.retry_in is None:
            self.failure = error
        return self.retry_in is not None

    def refuse(self, reason: str, exc: BaseException) -> None:
        """Reject the message, because no attempt can handle it."""
        self.failure = Failure(reason, error_name(exc), str(exc))

    def answer(self) -> None:
        """Ack the record: the store is now responsible for the message, whatever the outcome of the attempt."""
        self.answered = True

    def begin(self, timeout: float | None) -> None:
        """Restart the timer for a part of the work, which can be abandoned alone.

        :param timeout: time limit of the part in seconds; None without a limit.
        """
        self.timeout = None
        self.decision = []
        self.timeout = timeout

    def hand_back(self) -> None:
        """Abandon the attempt because the consumer is shutting down; the message stays unfinished.

        :raises AttemptAbandoned: always.
        """
        self.abandoned = True
        raise Abandoned

    def identity(self) -> str:
        """Return a uuid for a message without one; an attempt at a record returns the same uuid at each redelivery."""
        return str(uuid4())

    def decide(self, what: str = ENDED) -> bool:
        """Set the outcome of the attempt unless it is set already; return whether this call has set it.

        :param what: :data:`FINISHED` or :data:`TIMED_OUT`.
        """
        return decide(self.decision, what)

    def check(self) -> None:
        """Raise if the attempt was abandoned.

        :raises AttemptAbandoned: the attempt was abandoned.
        """
        if self.abandoned or self.decision[:1] == [GIVEN_UP]:
            raise Abandoned

    def settle(self, entry: Any) -> None:
        """Register an entrypoint that has finished; the entrypoint of the message can no longer time out.

        :raises AttemptAbandoned: the attempt was abandoned before.
        """
        if entry is self.entry:
            self.decide()
        self.check()


def decide(decision: list[str], what: str) -> bool:
    """Append ``what`` and return whether it is the first value: of two threads, exactly one appends first."""
    decision.append(what)
    return decision[0] == what


#: The attempt that runs in this context; None outside of a consumer.
CURRENT: ContextVar[Delivery | None] = ContextVar("kser_delivery", default=None)


def settle(entry: Any) -> None:
    """Register an entrypoint that has finished with the current attempt, if there is one.

    :raises AttemptAbandoned: the attempt was abandoned, so its result would be dropped.
    """
    if (delivery := CURRENT.get()) is not None:
        delivery.settle(entry)


def timeout_of(cls: type) -> float | None:
    """Return the time limit of an attempt at a class, in seconds; None without a limit."""
    timeout = getattr(cls, "TIMEOUT", None)
    # Ignore a value of another type, as with RETRY, because the attribute is then the user's own (decision C18).
    fits = isinstance(timeout, int | float) and timeout > 0 and not isinstance(timeout, bool)
    return timeout if fits else None


def error_name(exc: BaseException) -> str:
    """Return the full name of an exception's class."""
    cls = type(exc)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
