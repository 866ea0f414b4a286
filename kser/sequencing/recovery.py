"""What runs beside each consumer that has a database: the heartbeat of its claims, and the reaper.

The reaper never stops: whatever a consumer left behind, some other one goes on with.
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

#: Operations that the reaper takes up at once.
BATCH = 500
#: Seconds between two times that it is recorded what was sent: well before the reaper would send it again.
MARK_EVERY = UNSENT_AFTER / 3
#: Seconds that the end of a consumer waits for a turn to end.
CLOSE_TIMEOUT = 5.0


class Recovery:
    """Keeps the claims of this process alive, and goes on with what nobody goes on with.

    :param means: what runs share.
    """

    def __init__(self, means: Means, clock: Callable[[], float] = time.monotonic) -> None:
        self._means = means
        self._terms = means.terms
        self._clock = clock
        self._busy = threading.Lock()
        self._last: dict[str, float] = {}
        #: Since when the store has answered each time, and when it did last.
        self._reached_since = self._reached = -float("inf")
        #: Claims that are known to be lost, and still worked on.
        self._lost: set[tuple[int, int]] = set()
        #: How often in a row sending to a topic was in vain.
        self._vain: Counter[str] = Counter()

    def tick(self) -> None:
        """Do what is due. To be called every second or so, by a thread that has nothing else to do."""
        if not self._busy.acquire(blocking=False):
            # Another consumer of this process is about it.
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
            # Nobody else would go on: what went wrong now may go right the next time.
            logger.exception("the reaper met something that it does not know, and goes on")
        finally:
            self._busy.release()

    def beat(self) -> None:
        """Prolong the claims that workers hold now."""
        held = {run.key for run in self._means.held()}
        if not held:
            return
        known = self._means.store.renew(held, self._means.owner, self._terms.lease)
        lost = {key for key in held if key[0] not in known}
        for root_id, epoch in lost - self._lost:
            run = self._means.holder(root_id)
            if run is not None and run.key == (root_id, epoch):
                logger.warning(f"{run.label}: the claim on it was lost: what its task gives will not be recorded")
        self._lost = lost

    def mark(self) -> None:
        """Record which steps were sent."""
        steps = list(self._means.sent)
        if steps:
            self._means.store.sent(steps, self._terms.resend)
        # Others only add to its end.
        for _ in steps:
            self._means.sent.popleft()

    def reap(self) -> int:
        """Send the steps that nobody goes on with; returns how many."""
        total = 0
        until = self._clock() + self._terms.heartbeat / 2
        while True:
            asked = self._clock()
            due = self._means.patience.ask(self._take_due)
            # It was made to wait, as were those who wanted to prolong a claim meanwhile.
            waited = self._clock() - asked > self._terms.lease / 3
            sent = self._hold_back(due) if waited else due
            total += len(sent)
            self._send(sent)
            if len(due) < BATCH or self._clock() >= until:
                return total

    def _take_due(self) -> Sequence[Due]:
        return self._means.store.take_due(BATCH, self._means.owner, expired=self._may_judge())

    def _hold_back(self, due: Sequence[Due]) -> Sequence[Due]:
        """Leave those whose lease is over to their owners for one more lease; returns the others."""
        self._reached = -float("inf")
        held = [(each.id, each.epoch) for each in due if each.reason == EXPIRED]
        if held:
            self._means.store.unsent(held, self._terms.lease)
        return [each for each in due if each.reason != EXPIRED]

    def _may_judge(self) -> bool:
        """Whether leases that are over count: while the database was away nobody could prolong any (rule 21)."""
        now = self._clock()
        # With a short lease its own turns are no interruption.
        if now - self._reached > max(self._terms.lease / 2, self._terms.reaper * 2 + 1):
            self._reached_since = now
        self._reached = now
        return now - self._reached_since >= self._terms.lease

    def _send(self, due: Sequence[Due]) -> None:
        by_topic = defaultdict(list)
        for each in due:
            logger.info(f"{each.target.entrypoint}[{each.target.uuid}] of operation {each.uuid} is sent: {each.reason}")
            by_topic[each.target.topic].append(each)
        # The heartbeat is waiting meanwhile.
        until = self._clock() + self._terms.heartbeat / 2
        # Those that were in vain before must not take the time of the others.
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
            # The time that sending took is no time in which the store could not be reached.
            self._reached = self._clock()

    def _send_to(self, topic: str, steps: Sequence[Due], until: float) -> Sequence[Due]:
        """Send steps to a topic; returns those that were not delivered.

        :param until: when to be done.
        """
        try:
            producer: Any = self._means.producer
            if len(steps) > 1 and hasattr(producer, "bulk_send"):
                messages = [step_message(each.target, each.uuid) for each in steps]
                result = producer.bulk_send(topic, messages, self._time_left(until))
                undelivered = (result.retval or {}).get("failed", {}) if result.retcode else {}
                return [each for each in steps if each.target.uuid in undelivered]
        except Exception as error:
            # Producers may be anybody's, and there are other topics.
            logger.warning(f"{len(steps)} step(s) could not be sent to {topic}: {error}")
            return steps
        return [each for each in steps if not self._send_one(each, until)]

    def _send_one(self, due: Due, until: float) -> bool:
        left = self._time_left(until)
        return left > 0 and not self._means.send(due.target, due.uuid, timeout=left).retcode

    def _time_left(self, until: float) -> float:
        return min(SEND_TIMEOUT, max(until - self._clock(), 0))

    def close(self) -> None:
        """A consumer ends: claims of messages that it has given up are given back, and what was sent is recorded."""
        if not self._busy.acquire(timeout=CLOSE_TIMEOUT):
            # A turn hangs: what is left ends with its lease.
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
            logger.warning(f"a claim could not be given back, and ends with its lease: {error.message}")
