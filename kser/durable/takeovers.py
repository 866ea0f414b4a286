"""Takeovers: a consumer with a free worker reserves due steps in the store, and runs them without a message."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from kser.durable.context import DurableContext, step_value
from kser.errors import ProducerMissing
from kser.escaping import escape_lines
from kser.store.model import DueReason, DueStep, TakeoverQuery
from kser.takeover import Takeover, TakeoverHost

logger = escape_lines(logging.getLogger(__name__))

#: A consumer without a free worker holds a step that has been due for ``HOLD_AFTER`` seconds, which is time for two
#: looks of a consumer with a free worker, for ``HOLD`` seconds.
HOLD_AFTER: Final = 0.5
HOLD: Final = 1.0


class StoreContact:
    """The uninterrupted contact of this process with the store.

    An expired lease proves that its owner is gone only if the owner could have renewed the lease. So this process
    trusts expired leases only after it has itself reached the store without interruption for one whole lease.

    :param lease: length of a lease in seconds.
    :param longest_gap: number of seconds between two contacts that counts as an interruption.
    """

    def __init__(self, lease: float, longest_gap: float) -> None:
        self._lease = lease
        self._longest_gap = longest_gap
        self._lock = threading.Lock()
        self._since = self._last = -float("inf")

    def extend(self, now: float) -> bool:
        """Extend the contact by a call that begins now; return whether an expired lease proves that its owner is gone.

        :param now: the time, by the clock of the service.
        """
        with self._lock:
            if now - self._last > self._longest_gap:
                self._since = now
            self._last = now
            return now - self._since >= self._lease

    def keep(self, now: float) -> None:
        """Extend the contact to the end of a long call that was no interruption, such as the send of many messages."""
        with self._lock:
            if self._last > self._since:
                self._last = now

    def divide(
        self, due: Sequence[DueStep], started_at: float, now: float
    ) -> tuple[Sequence[DueStep], Sequence[DueStep]]:
        """Return the due steps that a query found as those to continue, and those whose owner may live.

        If the query was slow, the heartbeats of other consumers were probably late too, so an expired lease does not
        prove that its owner is gone, and the contact is interrupted.

        :param started_at: the time at which the query started.
        :param now: the time at which the query ended.
        """
        if now - started_at <= self._lease / 3:
            return due, []
        self.interrupt()
        expired = [step for step in due if step.reason == DueReason.EXPIRED]
        return [step for step in due if step.reason != DueReason.EXPIRED], expired

    def interrupt(self) -> None:
        """Interrupt the contact, because a call failed or took so long that owners could not renew their leases."""
        with self._lock:
            self._last = -float("inf")


class TakeoverSearch:
    """Search for due steps that the consumers of this process can run.

    :param context: the durable context of this process.
    :param contact: the contact with the store.
    """

    def __init__(self, context: DurableContext, contact: StoreContact) -> None:
        self._context = context
        self._contact = contact
        #: The steps whose takeovers were dropped, and those whose takeovers ended before a claim, until :meth:`settle`.
        self._dropped: deque[DueStep] = deque()
        self._unclaimed: deque[DueStep] = deque()
        #: The consumers whose last look found as many steps as they had free workers.
        self._with_more: set[TakeoverHost] = set()
        # True if the last takeover had no value, because the producer was being made.
        self._lacks_producer = False

    def may_find_more(self, host: TakeoverHost) -> bool:
        """Return whether the last look of a consumer found as many steps as it had free workers."""
        return host in self._with_more

    def forget(self, host: TakeoverHost) -> None:
        """Forget a consumer that is shutting down."""
        self._with_more.discard(host)

    def look(self, host: TakeoverHost) -> int:
        """Reserve the due steps for which the consumer has free workers, and queue them; return their number.

        A consumer without a free worker holds one step whose lease has expired, or whose retry is due. It holds only
        a step that no consumer with a free worker has reserved in time, and only for a short time.

        :raises kser.errors.StoreUnavailable: the database is unavailable. No step was queued.
        """
        self.settle()
        free = host.free_workers()
        if (not free and not host.may_hold_urgent()) or not self._has_producer():
            return 0
        context, settings = self._context, self._context.settings
        reservation = settings.reservation if free else min(settings.grace + HOLD, settings.reservation)
        started_at = context.clock()
        query = TakeoverQuery(
            limit=free or 1,
            topics=host.topics(lambda: context.store.direct.get_topics()),
            known=context.known_classes(),
            expired=self._contact.extend(started_at),
            only_urgent=not free,
            overdue=0 if free else HOLD_AFTER,
        )
        due = context.store.once(context.store.direct.reserve_due_steps, query, reservation)
        (self._with_more.add if 0 < free <= len(due) else self._with_more.discard)(host)
        expires_at = started_at + reservation
        trusted, untrusted = self._contact.divide(due, started_at, context.clock())
        # Keep the reservation of a step that runs here: the next heartbeat ends it.
        wanted = [step for step in trusted if not self._is_running_here(step)]
        rejected = [step for step in wanted if not self._put(host, step, expires_at)]
        if untrusted or rejected:
            context.store.once(context.store.direct.return_reservations, [*untrusted, *rejected])
        return len(wanted) - len(rejected)

    def _has_producer(self) -> bool:
        """Return False as long as a producer is made that a takeover needs: other consumers may reserve the steps."""
        if self._lacks_producer:
            try:
                self._lacks_producer = self._context.registry._kser_prepared_producer() is None
            except ProducerMissing:
                self._lacks_producer = False
        return not self._lacks_producer

    def settle(self) -> None:
        """Return the reservations of takeovers that were dropped, and postpone those that ended before a claim.

        :raises kser.errors.StoreUnavailable: the database is unavailable. The reservations expire by themselves.
        """
        store = self._context.store
        dropped, unclaimed = list(_pop_all(self._dropped)), list(_pop_all(self._unclaimed))
        if dropped:
            store.once(store.direct.return_reservations, dropped)
        if unclaimed:
            store.once(store.direct.postpone_takeover, unclaimed, self._context.settings.resend)

    def _is_running_here(self, step: DueStep) -> bool:
        """Return whether a worker of this process still runs a step whose lease has expired.

        The next heartbeat renews the lease, unless another process has claimed the operation.
        """
        claim = self._context.claim_for(step.id)
        return claim is not None and claim.key == (step.id, step.epoch) and not claim.is_abandoned

    def _put(self, host: TakeoverHost, step: DueStep, expires_at: float) -> bool:
        """Queue a takeover; return False if the consumer does not accept it."""
        target = step.target
        try:
            value = step_value(self._context, target, step.uuid)
        except Exception as error:
            # The hook onmessage of the producer is user code, which may raise any exception.
            logger.warning(f"{target.entrypoint}[{target.uuid}] of operation {step.uuid} cannot be taken over: {error}")
            self._unclaimed.append(step)
            return True
        if value is None:
            self._lacks_producer = True
            return False
        label = f"step {target.entrypoint}[{target.uuid}] of operation {step.uuid}"
        now = self._context.clock()
        takeover = Takeover(
            target.topic,
            value,
            step.epoch,
            label,
            partial(self._on_end, host, step),
            self._context.registry,
            reason=step.reason,
            claim_after=now + self._context.settings.grace if step.reason == DueReason.EXPIRED else now,
            expires_at=expires_at,
        )
        if not host.put(takeover, expires_at - now):
            return False
        logger.info(f"{target.entrypoint}[{target.uuid}] of operation {step.uuid} is taken over: {step.reason}")
        return True

    def _on_end(self, host: TakeoverHost, step: DueStep, takeover: Takeover) -> None:
        if not takeover.is_started:
            self._dropped.append(step)
        elif not takeover.is_answered:
            self._unclaimed.append(step)
        if host in self._with_more:
            host.wake_up.set()


def _pop_all(steps: deque[DueStep]) -> Iterator[DueStep]:
    # Consumers of one process share the queue, so another thread may remove the last entry.
    with suppress(IndexError):
        while True:
            yield steps.popleft()
