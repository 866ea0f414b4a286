"""Background service of each consumer whose registry has a store; it does the work of the heartbeat and of the reaper.

Every consumer runs a reaper, so that the other consumers continue the operations of a consumer that has died.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from kser import backoff
from kser.durable.context import SEND_TIMEOUT, ActiveClaim, DurableContext, step_message
from kser.errors import KserError, StoreUnavailable
from kser.escaping import escape_lines
from kser.store.model import RESEND_UNSENT_AFTER, DueReason, DueStep

logger = escape_lines(logging.getLogger(__name__))

#: Maximum number of due steps that the reaper fetches per call.
BATCH = 500

#: Seconds between two calls of ``record_sends``. The interval is well below RESEND_UNSENT_AFTER, because after
#: RESEND_UNSENT_AFTER seconds the reaper sends again a step that is not marked as sent.
RECORD_SENDS_INTERVAL = RESEND_UNSENT_AFTER / 3

#: Maximum number of seconds that the shutdown of a consumer waits for the end of the current tick.
CLOSE_TIMEOUT = 5.0


class RecoveryService:
    """Background service that renews the leases of this process and sends due steps.

    :param context: the durable context of this process.
    """

    def __init__(self, context: DurableContext) -> None:
        self._context = context
        self._settings = context.settings
        #: The clock of the intervals, in seconds; tests may replace it.
        self.clock: Callable[[], float] = time.monotonic
        self._tick_lock = threading.Lock()
        self._last: dict[str, float] = {}
        #: ``_contact_since`` is the start of the current uninterrupted contact with the store. ``_last_contact`` is the
        #: time of the last contact.
        self._contact_since = self._last_contact = -float("inf")
        #: Claims that this process has lost, and under which its workers still run steps.
        self._lost_claims: set[tuple[int, int]] = set()
        #: Number of consecutive failed sends for each topic.
        self._failed_sends: Counter[str] = Counter()

    def tick(self) -> None:
        """Renew leases, mark steps as sent and send due steps, each if its interval has passed since the last time.

        Call this method about once per second from a dedicated thread.
        """
        if not self._tick_lock.acquire(blocking=False):
            # Another consumer of this process is running a tick.
            return
        try:
            for routine, interval in (
                (self.renew_leases, self._settings.heartbeat),
                (self.record_sends, RECORD_SENDS_INTERVAL),
                (self.reap, self._settings.reaper),
            ):
                now = self.clock()
                if now - self._last.get(routine.__name__, -float("inf")) >= interval:
                    routine()
                    self._last[routine.__name__] = now
        except StoreUnavailable as error:
            self._last_contact = -float("inf")
            self._context.store.report_outage(error)
        except Exception:
            # No exception may end this thread, because then the leases of all claims would expire. The next tick may
            # succeed.
            logger.exception("unexpected error in the heartbeat or the reaper; trying again at the next tick")
        finally:
            self._tick_lock.release()

    def renew_leases(self) -> None:
        """Renew the leases of the claims that workers hold now."""
        keys = {claim.key for claim in self._context.active_claims()}
        if not keys:
            return
        renewed = self._context.store.direct.renew(keys, self._context.owner, self._settings.lease)
        lost = {key for key in keys if key[0] not in renewed}
        for root_id, epoch in lost - self._lost_claims:
            claim = self._context.claim_for(root_id)
            if claim is not None and claim.key == (root_id, epoch):
                logger.warning(
                    f"{claim.label}: the claim was lost; the result of the running task will not be recorded"
                )
        self._lost_claims = lost

    def record_sends(self) -> None:
        """Mark steps as sent in the store."""
        steps = list(self._context.unrecorded_sends)
        if steps:
            self._context.store.direct.mark_sent(steps, self._settings.resend)
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
                expired=self._leases_are_trustworthy(),
            )
            # If the query was slow, the heartbeats of other consumers were probably late too, so an expired lease does
            # not prove that its owner is gone. Do not send steps with an expired lease now.
            was_slow = self.clock() - started_at > self._settings.lease / 3
            sent = self._defer_expired(due) if was_slow else due
            total += len(sent)
            self._send(sent)
            if len(due) < BATCH or self.clock() >= deadline:
                return total

    def _defer_expired(self, due: Sequence[DueStep]) -> Sequence[DueStep]:
        """Return the due steps, except those that are due only because a lease has expired.

        Call this method while an expired lease does not prove that its owner is gone. The reaper checks the omitted
        steps again after the duration of one lease.
        """
        self._last_contact = -float("inf")
        expired = [(step.id, step.epoch) for step in due if step.reason == DueReason.EXPIRED]
        if expired:
            self._context.store.direct.postpone_send(expired, self._settings.lease)
        return [step for step in due if step.reason != DueReason.EXPIRED]

    def _leases_are_trustworthy(self) -> bool:
        """Return whether an expired lease proves that its owner is gone.

        After an outage, an expired lease proves nothing, because no owner could renew its lease during the outage.
        """
        now = self.clock()
        # A longer time between two contacts with the store counts as an interruption of the contact. The limit is at
        # least two reaper intervals, because with a short lease the normal time between two ticks would otherwise count
        # as an interruption.
        if now - self._last_contact > max(self._settings.lease / 2, self._settings.reaper * 2 + 1):
            self._contact_since = now
        self._last_contact = now
        return now - self._contact_since >= self._settings.lease

    def _send(self, due: Sequence[DueStep]) -> None:
        by_topic = defaultdict(list)
        for step in due:
            logger.info(f"{step.target.entrypoint}[{step.target.uuid}] of operation {step.uuid} is sent: {step.reason}")
            by_topic[step.target.topic].append(step)
        # Limit the duration, because the heartbeat runs in the same thread and waits until the sends are done.
        deadline = self.clock() + self._settings.heartbeat / 2
        # Send to failing topics last, so that their timeouts do not use up the time for the other topics.
        for topic, steps in sorted(by_topic.items(), key=lambda item: self._failed_sends[item[0]]):
            late = self._time_left(deadline) <= 0
            failed = {step.id for step in (steps if late else self._send_to(topic, steps, deadline))}
            keys = [(step.id, step.epoch) for step in steps]
            self._context.unrecorded_sends.extend(key for key in keys if key[0] not in failed)
            if not failed:
                del self._failed_sends[topic]
                continue
            self._failed_sends[topic] += not late
            failures = max(self._failed_sends[topic], 1)
            wait = backoff.delay(failures, first=RESEND_UNSENT_AFTER, ceiling=self._settings.resend)
            self._context.store.direct.postpone_send([key for key in keys if key[0] in failed], wait)
        if self._last_contact > self._contact_since:
            # Set the last contact to now, because a long send would otherwise count as an interruption of the contact
            # with the store.
            self._last_contact = self.clock()

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

    def close(self) -> None:
        """Release the claims of abandoned attempts, and mark steps as sent, at the shutdown of a consumer."""
        if not self._tick_lock.acquire(timeout=CLOSE_TIMEOUT):
            # A tick still runs after CLOSE_TIMEOUT seconds. Do not release the remaining claims; they end when their
            # leases expire.
            return
        try:
            for claim in self._context.active_claims():
                if claim.is_abandoned:
                    self._release(claim)
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
