"""Takeover: a step of a stored operation that a consumer runs without a record, and the interface of its consumer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from math import inf
from typing import Any, Final, Protocol


class Takeover:
    """A takeover: a due step that a consumer has reserved in the store, in order to run it without a record.

    In the work queue, a takeover stands in place of a record. It has no partition and no offset, so nothing is
    committed for it.

    :param topic: topic of the step's message.
    :param value: value of the step's message, as the producer would have sent it.
    :param epoch: epoch of the root at the time of the reservation. The claim requires this epoch.
    :param label: label of the step, for log lines.
    :param reason: why the step is due: a value of :class:`kser.store.model.DueReason`.
    :param claim_after: the time, by the clock of the durable context, before which the step is not claimed.
    :param expires_at: the time, by the same clock, at which the reservation expires.
    :param registry: the registry whose database contains the operation; None for the registry of the step's class.
    :param on_end: called once with the takeover, when it has run or was dropped. The caller may hold the lock of the
        work queue, so the function must neither block nor raise.
    """

    #: The values of a record without a partition, for code that reads these attributes of every record.
    partition: Final = -1
    offset: Final = -1
    timestamp: Final = -1
    key: Final = None
    headers: Final = ()

    #: True once a worker has begun the takeover; False again if the worker leaves the step to other consumers.
    is_started = False
    #: True once the store has granted or refused the claim.
    is_answered = False

    def __init__(
        self,
        topic: str,
        value: bytes,
        epoch: int,
        label: str,
        on_end: Callable[[Takeover], object],
        registry: Any = None,
        *,
        reason: str = "",
        claim_after: float = -inf,
        expires_at: float = inf,
    ) -> None:
        self.topic = topic
        self.value = value
        self.epoch = epoch
        self.label = label
        self.reason = reason
        self.claim_after = claim_after
        self.expires_at = expires_at
        self.registry = registry
        self._on_end = on_end

    def end(self) -> None:
        """Report that the takeover has run or was dropped."""
        self._on_end(self)


class TakeoverHost(Protocol):
    """Interface that a consumer offers to its background services, so that they can take over due steps."""

    #: Set when a look for due steps would find more, before the next look is due.
    wake_up: threading.Event

    def free_workers(self) -> int:
        """Return the number of takeovers that could begin now.

        The number is 0 if the consumer is paused or is shutting down, or as long as a record must run alone.
        """
        ...

    def may_hold_urgent(self) -> bool:
        """Return whether the consumer, whose workers are all busy, accepts one urgent takeover."""
        ...

    def topics(self, stored: Callable[[], Collection[str]]) -> Collection[str]:
        """Return the names of the topics that the consumer subscribes to, with or without partitions.

        :param stored: returns the topics of all stored steps. The method calls it if the consumer subscribes to a
            pattern, and returns those of the topics that match the pattern.
        """
        ...

    def put(self, takeover: Takeover, expires_in: float) -> bool:
        """Queue a takeover.

        :param expires_in: seconds until the reservation expires. A takeover that has not begun by then is dropped.
        :return: False if the consumer does not accept the takeover. Then the caller must return the reservation to the
            store.
        """
        ...
