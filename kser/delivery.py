"""Delivery: one attempt at a message, as the consumer that makes it and the entrypoint that runs see it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final, NamedTuple
from uuid import uuid4

from kser.errors import RetryLater
from kser.retry import DEFAULT, Retry

#: Why a message failed for good.
UNDECODABLE: Final = "undecodable"
UNKNOWN: Final = "unknown-entrypoint"
FAILED: Final = "failed"


#: What becomes of an attempt.
ENDED: Final = "ended"
GIVEN_UP: Final = "given up"


class Abandoned(BaseException):
    """The consumer has given up the attempt that runs in this thread: nobody waits for its result any more."""


class Failure(NamedTuple):
    """Why a message failed for good: ``undecodable``, ``unknown-entrypoint`` or ``failed``, and with what."""

    reason: str
    error_class: str
    message: str


class Unfinished(NamedTuple):
    """In place of a result: the work goes on elsewhere or later, or was done before, and a database answers for it.

    No hook is called, and nothing is counted.
    """

    #: What is known of it.
    result: Any


class Delivery:
    """One attempt at a message.

    :param retry: the policy of the consumer, for classes that declare none.
    """

    #: The number of the attempt, from 1.
    attempt = 1
    #: How many attempts before it do not count for the policy.
    forgiven = 0
    #: Seconds until the next attempt, when it has ended and another is to follow.
    retry_in: float | None = None
    #: What the message failed with for good.
    failure: Failure | None = None
    #: What it fails with in place of running: it stands for an attempt that was given up.
    verdict: Exception | None = None
    #: Whether it was given up.
    abandoned = False
    #: Seconds that the attempt may take.
    timeout: float | None = None
    #: Whether a database answers for the message: it is no dead letter, and no other attempt is made here.
    answered = False
    #: Whether the consumer is about to end: what can go on elsewhere is to be given back.
    ending = False

    #: Where the message came from; empty when it came from nowhere.
    topic = ""
    #: The stored operation that a task of is run; None for everything else.
    operation_uuid: str | None = None
    #: Whether that is to be cancelled.
    cancel_requested = False

    #: What the message asked for; entrypoints that run inside it are none of the delivery's business.
    entry: Any = None
    #: The class of it, once that is known.
    expected: type | None = None

    def __init__(self, retry: Retry | None = None) -> None:
        #: The policy for classes that declare none.
        self.retry = retry
        #: What became of it, and what others made of it too late.
        self.decision: list[str] = []

    def construct(self, entry: Any) -> None:
        """An entrypoint is being constructed; the first one of the class that the message asked for is its own."""
        if self.entry is None and type(entry) is self.expected:
            self.entry = entry

    def start(self, entry: Any) -> None:
        """An entrypoint begins to execute; the first one is the message's own, unless that is known already.

        :raises Exception: the verdict, when there is one.
        """
        if self.entry is None:
            self.entry = entry
        if self.entry is not entry:
            return
        if self.verdict is not None:
            raise self.verdict
        self.timeout = timeout_of(type(entry))

    def postpones(self, exc: BaseException | None, error: Failure) -> bool:
        """Whether the failure of the message is to be followed by another attempt; if not, it is noted as final.

        :param exc: what it failed with, None for a failed result.
        :param error: what is noted.
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
        """The message cannot be handled, now or later."""
        self.failure = Failure(reason, error_name(exc), str(exc))

    def answer(self) -> None:
        """A database answers for the message from now on: it is done for Kafka, whatever becomes of the attempt."""
        self.answered = True

    def begin(self, timeout: float | None) -> None:
        """A part of the work begins that may be given up alone, once it takes longer than ``timeout`` seconds."""
        self.timeout = None
        self.decision = []
        self.timeout = timeout

    def hand_back(self) -> None:
        """Give up the attempt, because the consumer is about to end: the message stays unfinished.

        :raises Abandoned: always.
        """
        self.abandoned = True
        raise Abandoned

    def identity(self) -> str:
        """A uuid for a message that has none: the same one each time that it is delivered."""
        return str(uuid4())

    def decide(self, what: str = ENDED) -> bool:
        """Whether this is what becomes of the attempt: whoever decides first, decides.

        :param what: ``"ended"`` or ``"given up"``.
        """
        return decide(self.decision, what)

    def check(self) -> None:
        """Stop here if the attempt was given up.

        :raises Abandoned: it was.
        """
        if self.abandoned or self.decision[:1] == [GIVEN_UP]:
            raise Abandoned

    def settle(self, entry: Any) -> None:
        """The work of an entrypoint has ended. If it was the message's own, it cannot take too long any more.

        :raises Abandoned: the attempt was given up before.
        """
        if entry is self.entry:
            self.decide()
        self.check()


def decide(decision: list[str], what: str) -> bool:
    """See :meth:`Delivery.decide`; of two threads exactly one is the first to append."""
    decision.append(what)
    return decision[0] == what


#: The delivery that is handled in this context; None outside of a consumer.
CURRENT: ContextVar[Delivery | None] = ContextVar("kser_delivery", default=None)


def settle(entry: Any) -> None:
    """The work of an entrypoint has ended.

    :raises Abandoned: nobody waits for its result any more.
    """
    if (delivery := CURRENT.get()) is not None:
        delivery.settle(entry)


def timeout_of(cls: type) -> float | None:
    """Seconds that an attempt at a class may take; None without a limit."""
    timeout = getattr(cls, "TIMEOUT", None)
    # Like RETRY, an attribute that means something else is the user's own (decision C18).
    fits = isinstance(timeout, int | float) and timeout > 0 and not isinstance(timeout, bool)
    return timeout if fits else None


def error_name(exc: BaseException) -> str:
    """The full name of an exception's class."""
    cls = type(exc)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
