"""The host of takeovers: what a consumer offers to its background services."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from kser.consumer.subscription import Subscription
from kser.consumer.takeovers import TakeoverItem, TakeoverTracker
from kser.consumer.work_queue import WorkQueue
from kser.retry import Retry
from kser.takeover import Takeover, TakeoverHost


class ConsumerTakeovers(TakeoverHost):
    """The takeovers of one consumer: how many it accepts now, and for which topics.

    :param work_queue: the work queue of the consumer.
    :param workers: the number of workers.
    :param retry: the retry policy of the consumer, for classes that declare no policy.
    :param subscription: the topics that the consumer reads.
    :param is_available: returns False if the consumer may take over nothing, for example because it is paused.
    """

    def __init__(
        self,
        work_queue: WorkQueue,
        workers: int,
        retry: Retry | None,
        subscription: Subscription,
        is_available: Callable[[], bool],
    ) -> None:
        self._work_queue = work_queue
        self._workers = workers
        self._retry = retry
        self._subscription = subscription
        self._is_available = is_available
        self.wake_up = threading.Event()

    def free_workers(self) -> int:
        return max(self._unused_workers(), 0) if self._accepts() else 0

    def may_hold_urgent(self) -> bool:
        return self._accepts() and not self._work_queue.takeovers

    def topics(self, stored: Callable[[], Collection[str]]) -> Collection[str]:
        return self._subscription.matching(stored() if self._subscription.patterns else ())

    def put(self, takeover: Takeover, expires_in: float) -> bool:
        work_queue = self._work_queue
        deadline = work_queue.clock() + expires_in
        item = TakeoverItem(takeover, TakeoverTracker(takeover), self._retry, deadline)
        with work_queue.lock:
            # One takeover more than there are free workers: the urgent takeover of a busy consumer.
            if not self._accepts() or (work_queue.takeovers and self._unused_workers() <= 0):
                return False
            return work_queue.takeovers.put(item)

    def _accepts(self) -> bool:
        """Return whether a takeover could start: the consumer is available, and no record must run alone."""
        return self._is_available() and self._work_queue.lanes.exclusive is None

    def _unused_workers(self) -> int:
        """Return the number of workers minus the number of items that run or could start now."""
        work_queue = self._work_queue
        with work_queue.lock:
            ready = 0 if work_queue.group_lease.is_expired else len(work_queue.lanes.ready)
            return self._workers - len(work_queue.running()) - ready - len(work_queue.takeovers)
