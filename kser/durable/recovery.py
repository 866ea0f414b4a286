"""Background service of each consumer whose registry has a store: heartbeat, takeovers and sends of due steps.

Every consumer runs this service, so that the other consumers continue the operations of a consumer that has died.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from kser import backoff
from kser.durable.context import SEND_TIMEOUT, ActiveClaim, DurableContext, step_message
from kser.durable.execution import fail_unknown_class
from kser.durable.heartbeat import Heartbeat
from kser.durable.periodic import PeriodicThread
from kser.durable.takeovers import StoreContact, TakeoverSearch
from kser.errors import KserError, StoreUnavailable
from kser.escaping import escape_lines
from kser.store.model import RESEND_UNSENT_AFTER, DueReason, DueStep
from kser.takeover import TakeoverHost

logger = escape_lines(logging.getLogger(__name__))

#: Maximum number of due steps that the reaper fetches per call.
BATCH = 500

#: Seconds between two calls of ``record_sends``. The interval is well below RESEND_UNSENT_AFTER, because after
#: RESEND_UNSENT_AFTER seconds the reaper sends again a step that is not marked as sent.
RECORD_SENDS_INTERVAL = RESEND_UNSENT_AFTER / 3

#: Minimum number of seconds between two looks for due steps.
SHORTEST_LOOK = 0.02

#: Maximum number of seconds that the shutdown of a consumer waits for the end of the current tick.
CLOSE_TIMEOUT = 5.0


class RecoveryService:
    """Background service that renews the leases of this process, takes over due steps and sends the other due steps.

    :param context: the durable context of this process.
    """

    def __init__(self, context: DurableContext) -> None:
        self._context = context
        self._settings = context.settings
        self._tick_lock = threading.Lock()
        self._last: dict[str, float] = {}
        #: The time of the last look of each consumer.
        self._last_looks: dict[TakeoverHost, float] = {}
        # A longer time between two contacts with the store counts as an interruption of the contact. The limit is at
        # least two reaper intervals, because with a short lease the normal time between two ticks would otherwise count
        # as an interruption.
        self._contact = StoreContact(self._settings.lease, max(self._settings.lease / 2, self._settings.reaper * 2 + 1))
        self._heartbeat = Heartbeat(context)
        self._takeovers = TakeoverSearch(context, self._contact)
        self._sender = PeriodicThread("kser-reaper", self._send_when_due)
        #: Number of consecutive failed sends for each topic.
        self._failed_sends: Counter[str] = Counter()

    @property
    def clock(self) -> Callable[[], float]:
        """The clock of the intervals, in seconds; tests may replace it."""
        return self._context.clock

    @clock.setter
    def clock(self, clock: Callable[[], float]) -> None:
        self._context.clock = clock

    def start(self, host: TakeoverHost) -> None:
        """Start the thread of the heartbeat and the thread that sends due steps, unless they run.

        :param host: the consumer that needs the threads.
        """
        self._heartbeat.thread.start(host)
        self._sender.start(host)

    def tick(self, host: TakeoverHost | None = None) -> float:
        """Take over due steps if a look is due. Without the threads of :meth:`start`, also do their work if it is due.

        :param host: the consumer that runs the steps; None to take over nothing.
        :return: the number of seconds until the next look.
        """
        if not self._sender.is_running:
            self._send_when_due()
        if host is None:
            return self._settings.reaper
        self._guard(self._takeovers.settle)
        look, now = self._settings.look, self.clock()
        last = self._last_looks.get(host, -float("inf"))
        is_free = host.free_workers() > 0
        interval = look if is_free else self._settings.reaper
        has_more = is_free and self._takeovers.may_find_more(host)
        if has_more or now >= min(last + interval, self._next_due(last)):
            self._last_looks[host] = last = now
            self.look(host)
        # Even if all workers are busy, one may be free soon.
        return max(min(now + look, self._next_due(last)) - self.clock(), 0)

    def _next_due(self, last: float) -> float:
        """Return the time of the next look for a step that this process knows to become due.

        :param last: the time of the last look.
        """
        return max(self._context.next_due(last), last + SHORTEST_LOOK)

    def look(self, host: TakeoverHost) -> None:
        """Look for due steps once, and take over those that the consumer can run.

        :param host: the consumer that runs the steps.
        """
        self._guard(lambda: self._takeovers.look(host))

    def _guard(self, call: Callable[[], object]) -> None:
        """Make a call for takeovers. After an outage, expired leases are not trusted for the duration of one lease."""
        try:
            call()
        except StoreUnavailable as error:
            self._contact.interrupt()
            self._context.store.report_outage(error)
        except Exception:
            # No exception may end the thread of the services. The next look may succeed.
            logger.exception("unexpected error in the search for due steps; trying again at the next search")

    def _send_when_due(self) -> float:
        """Mark steps as sent and send due steps, each if its interval has passed since the last time.

        Without a thread of its own, also renew the leases.

        :return: the number of seconds until the next call.
        """
        interval = RECORD_SENDS_INTERVAL / 2
        if not self._tick_lock.acquire(blocking=False):
            # Another consumer of this process is running a tick.
            return interval
        try:
            routines = [(self.record_sends, RECORD_SENDS_INTERVAL), (self.reap, self._settings.reaper)]
            if not self._heartbeat.thread.is_running:
                routines.insert(0, (self.renew_leases, self._settings.heartbeat))
            for routine, seconds in routines:
                now = self.clock()
                if now - self._last.get(routine.__name__, -float("inf")) >= seconds:
                    routine()
                    self._last[routine.__name__] = now
        except StoreUnavailable as error:
            self._contact.interrupt()
            self._context.store.report_outage(error)
        except Exception:
            # No exception may end this thread, because then no due step would be sent. The next tick may succeed.
            logger.exception("unexpected error in the heartbeat or the reaper; trying again at the next tick")
        finally:
            self._tick_lock.release()
        return interval

    def renew_leases(self) -> None:
        """Renew the leases of the claims that workers hold now."""
        self._heartbeat.renew_leases()

    def record_sends(self) -> None:
        """Mark steps as sent in the store."""
        steps = list(self._context.unrecorded_sends)
        if steps:
            store = self._context.store
            store.once(store.direct.mark_sent, steps, self._settings.resend, self._settings.lease)
        # Other threads only append to the queue, so its first entries are the steps that were just marked as sent.
        for _ in steps:
            self._context.unrecorded_sends.popleft()

    def reap(self) -> int:
        """Send the messages of due steps, and return the number of these steps."""
        total = 0
        deadline = self.clock() + self._settings.heartbeat / 2
        while True:
            started_at = self.clock()
            due = self._context.store.once(
                self._context.store.direct.take_due_steps,
                BATCH,
                self._context.owner,
                expired=self._contact.extend(started_at),
                max_sends=self._settings.max_sends,
                unknown_after=self._settings.unknown_after,
            )
            trusted, untrusted = self._contact.divide(due, started_at, self.clock())
            self._postpone(untrusted, self._settings.lease)
            total += len(trusted)
            self._send(trusted)
            if len(due) < BATCH or self.clock() >= deadline:
                return total

    def _postpone(self, steps: Sequence[DueStep], wait: float) -> None:
        if steps:
            store = self._context.store
            store.once(store.direct.postpone_send, [(step.id, step.epoch) for step in steps], wait)

    def _send(self, due: Sequence[DueStep]) -> None:
        by_topic = defaultdict(list)
        for step in due:
            if step.reason == DueReason.UNKNOWN_CLASS:
                fail_unknown_class(self._context, step)
                continue
            logger.info(f"{step.target.entrypoint}[{step.target.uuid}] of operation {step.uuid} is sent: {step.reason}")
            by_topic[step.target.topic].append(step)
        # Limit the duration, because a test or a program that calls tick() renews the leases in the same thread.
        deadline = self.clock() + self._settings.heartbeat / 2
        # Send to failing topics last, so that their timeouts do not use up the time for the other topics.
        for topic, steps in sorted(by_topic.items(), key=lambda item: self._failed_sends[item[0]]):
            late = self._time_left(deadline) <= 0
            failed = steps if late else self._send_to(topic, steps, deadline)
            failed_ids = {step.id for step in failed}
            self._context.unrecorded_sends.extend((step.id, step.epoch) for step in steps if step.id not in failed_ids)
            if not failed:
                del self._failed_sends[topic]
                continue
            self._failed_sends[topic] += not late
            failures = max(self._failed_sends[topic], 1)
            wait = backoff.delay(failures, first=RESEND_UNSENT_AFTER, ceiling=self._settings.resend)
            self._postpone(failed, wait)
        self._contact.keep(self.clock())

    def _send_to(self, topic: str, steps: Sequence[DueStep], deadline: float) -> Sequence[DueStep]:
        """Send the messages of steps to a topic, and return the steps whose messages were not delivered.

        :param deadline: the deadline by the clock of this service.
        """
        try:
            producer: Any = self._context.producer
            if len(steps) > 1 and hasattr(producer, "bulk_send"):
                messages = [step_message(step.target, step.uuid) for step in steps]
                result = producer.bulk_send(topic, messages, self._time_left(deadline))
                undelivered = (result.retval or {}).get("failed", {}) if result.retcode else {}
                return [step for step in steps if step.target.uuid in undelivered]
        except Exception as error:
            # A third-party producer may raise any exception, but the steps of other topics must still be sent.
            logger.warning(f"{len(steps)} step(s) could not be sent to {topic}: {error}")
            return steps
        return [step for step in steps if not self._send_one(step, deadline)]

    def _send_one(self, due: DueStep, deadline: float) -> bool:
        left = self._time_left(deadline)
        return left > 0 and not self._context.send(due.target, due.uuid, timeout=left).retcode

    def _time_left(self, deadline: float) -> float:
        return min(SEND_TIMEOUT, max(deadline - self.clock(), 0))

    def close(self, host: TakeoverHost | None = None) -> None:
        """Release the claims of abandoned attempts, return reservations, and mark steps as sent.

        :param host: the consumer that is shutting down.
        """
        if host is not None:
            self._last_looks.pop(host, None)
            self._takeovers.forget(host)
        self._sender.stop(host)
        self._heartbeat.thread.stop(host)
        if not self._tick_lock.acquire(timeout=CLOSE_TIMEOUT):
            # A tick still runs after CLOSE_TIMEOUT seconds. Do not release the remaining claims; they end when their
            # leases expire.
            return
        try:
            for claim in self._context.active_claims():
                if claim.is_abandoned:
                    self._release(claim)
            self._takeovers.settle()
            self.record_sends()
        except StoreUnavailable as error:
            self._context.store.report_outage(error)
        finally:
            self._tick_lock.release()

    def _release(self, claim: ActiveClaim) -> None:
        try:
            claim.release()
        except StoreUnavailable:
            raise
        except KserError as error:
            logger.warning(f"a claim could not be released, and expires with its lease: {error.message}")
