"""Background service of each consumer that has a database: the heartbeat of its claims, and the reaper.

Every consumer runs a reaper, so that another consumer continues the operations that a dead one has left behind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from kser.errors import KserError, StoreUnavailable
from kser.sequencing.means import SEND_TIMEOUT, Held, Means, step_message
from kser.store.rows import EXPIRED, UNSENT_AFTER, Due

logger = logging.getLogger(__name__)

#: Maximum number of due steps that the reaper fetches per call.
BATCH = 500
#: Seconds between two records of sent steps: well below UNSENT_AFTER, after which the reaper sends a step again.
MARK_EVERY = UNSENT_AFTER / 3
#: Seconds that the shutdown of a consumer waits for the current tick.
CLOSE_TIMEOUT = 5.0


class Recovery:
    """Background service that renews the leases of this process and sends due steps.

    :param means: the durable context of this process.
    """

    def __init__(self, means: Means, clock: Callable[[], float] = time.monotonic) -> None:
        self._means = means
        self._terms = means.terms
        self._clock = clock
        self._busy = threading.Lock()
        self._last: dict[str, float] = {}
        #: Begin of the current uninterrupted contact with the store, and the time of the last contact.
        self._reached_since = self._reached = -float("inf")
        #: Lost claims that workers of this process still work under.
        self._lost: set[tuple[int, int]] = set()
        #: Consecutive failed sends per topic.
        self._vain: Counter[str] = Counter()

    def tick(self) -> None:
        """Run the jobs whose interval has passed. Call this about every second, from a dedicated thread."""
        if not self._busy.acquire(blocking=False):
            # Another consumer of this process is running a tick.
            return
        try:
            for what, interval in (
                (self.beat, self._terms.heartbeat),
                (self.mark, MARK_EVERY),
                (self.reap, self._terms.reaper),
            ):
                now = self._clock()
                if now - self._last.get(what.__name__, -float("inf")) >= interval:
                    what()
                    self._last[what.__name__] = now
        except StoreUnavailable as trouble:
            self._reached = -float("inf")
            self._means.patience.report(trouble)
        except Exception:
            # Never let this thread die: leases would expire. The next tick may succeed.
            logger.exception("unexpected error in the heartbeat or the reaper; trying again at the next tick")
        finally:
            self._busy.release()

    def beat(self) -> None:
        """Renew the leases of the claims that workers hold now."""
        held = {run.key for run in self._means.held()}
        if not held:
            return
        known = self._means.store.renew(held, self._means.owner, self._terms.lease)
        lost = {key for key in held if key[0] not in known}
        for root_id, epoch in lost - self._lost:
            run = self._means.holder(root_id)
            if run is not None and run.key == (root_id, epoch):
                logger.warning(f"{run.label}: the claim was lost; the result of the running task will not be recorded")
        self._lost = lost

    def mark(self) -> None:
        """Record the sent steps in the store."""
        steps = list(self._means.sent)
        if steps:
            self._means.store.sent(steps, self._terms.resend)
        # Other threads only append, so the first entries are the recorded ones.
        for _ in steps:
            self._means.sent.popleft()

    def reap(self) -> int:
        """Send the due steps that no consumer works on, and return their number."""
        total = 0
        until = self._clock() + self._terms.heartbeat / 2
        while True:
            asked = self._clock()
            due = self._means.patience.ask(self._take_due)
            # If the query was slow, heartbeats were probably late too, so leave expired leases to their owners for now.
            waited = self._clock() - asked > self._terms.lease / 3
            sent = self._hold_back(due) if waited else due
            total += len(sent)
            self._send(sent)
            if len(due) < BATCH or self._clock() >= until:
                return total

    def _take_due(self) -> Sequence[Due]:
        return self._means.store.take_due(BATCH, self._means.owner, expired=self._may_judge())

    def _hold_back(self, due: Sequence[Due]) -> Sequence[Due]:
        """Postpone steps with an expired lease by one more lease, and return the other steps."""
        self._reached = -float("inf")
        held = [(each.id, each.epoch) for each in due if each.reason == EXPIRED]
        if held:
            self._means.store.unsent(held, self._terms.lease)
        return [each for each in due if each.reason != EXPIRED]

    def _may_judge(self) -> bool:
        """Return whether expired leases count; after an outage they do not, as no owner could renew (rule 21)."""
        now = self._clock()
        # Allow at least two reaper intervals, because with a short lease the time between two ticks would otherwise
        # count as an interruption.
        if now - self._reached > max(self._terms.lease / 2, self._terms.reaper * 2 + 1):
            self._reached_since = now
        self._reached = now
        return now - self._reached_since >= self._terms.lease

    def _send(self, due: Sequence[Due]) -> None:
        by_topic = defaultdict(list)
        for each in due:
            logger.info(f"{each.target.entrypoint}[{each.target.uuid}] of operation {each.uuid} is sent: {each.reason}")
            by_topic[each.target.topic].append(each)
        # Limit the time, because the heartbeat runs in the same thread and waits for the sends.
        until = self._clock() + self._terms.heartbeat / 2
        # Send to failing topics last, so that their timeouts do not use up the time of the other topics.
        for topic, steps in sorted(by_topic.items(), key=lambda item: self._vain[item[0]]):
            late = self._time_left(until) <= 0
            failed = {each.id for each in (steps if late else self._send_to(topic, steps, until))}
            keys = [(each.id, each.epoch) for each in steps]
            self._means.sent.extend(key for key in keys if key[0] not in failed)
            if not failed:
                del self._vain[topic]
                continue
            self._vain[topic] += not late
            wait = min(UNSENT_AFTER * 2.0 ** min(max(self._vain[topic] - 1, 0), 10), self._terms.resend)
            self._means.store.unsent([key for key in keys if key[0] in failed], wait)
        if self._reached > self._reached_since:
            # Set the last contact to now, because a long send would otherwise count as an interruption of the contact
            # with the store.
            self._reached = self._clock()

    def _send_to(self, topic: str, steps: Sequence[Due], until: float) -> Sequence[Due]:
        """Send steps to a topic, and return the steps that were not delivered.

        :param until: deadline on this service's clock.
        """
        try:
            producer: Any = self._means.producer
            if len(steps) > 1 and hasattr(producer, "bulk_send"):
                messages = [step_message(each.target, each.uuid) for each in steps]
                result = producer.bulk_send(topic, messages, self._time_left(until))
                undelivered = (result.retval or {}).get("failed", {}) if result.retcode else {}
                return [each for each in steps if each.target.uuid in undelivered]
        except Exception as error:
            # A third-party producer may raise anything; the steps of other topics must still be sent.
            logger.warning(f"{len(steps)} step(s) could not be sent to {topic}: {error}")
            return steps
        return [each for each in steps if not self._send_one(each, until)]

    def _send_one(self, due: Due, until: float) -> bool:
        left = self._time_left(until)
        return left > 0 and not self._means.send(due.target, due.uuid, timeout=left).retcode

    def _time_left(self, until: float) -> float:
        return min(SEND_TIMEOUT, max(until - self._clock(), 0))

    def close(self) -> None:
        """Release the claims of abandoned attempts and record the sent steps, at the shutdown of a consumer."""
        if not self._busy.acquire(timeout=CLOSE_TIMEOUT):
            # A tick hangs. The remaining claims expire with their leases.
            return
        try:
            for run in self._means.held():
                if run.is_abandoned:
                    self._release(run)
            self.mark()
        except StoreUnavailable as trouble:
            self._means.patience.report(trouble)
        finally:
            self._busy.release()

    def _release(self, run: Held) -> None:
        try:
            run.release()
        except StoreUnavailable:
            raise
        except KserError as error:
            logger.warning(f"a claim could not be released, and expires with its lease: {error.message}")
