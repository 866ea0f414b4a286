"""The worker pool: one worker in the main thread, or several workers in threads of their own."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from kser.consumer.deadletter import DeadLetters
from kser.consumer.dispatch import Dispatch
from kser.consumer.job import Job
from kser.delivery import FAILED, AttemptAbandoned, current_attempt
from kser.errors import TaskTimeout

#: Seconds that a worker waits for a record before it checks the stop flag.
IDLE = 0.5
#: The first and the longest back-off, in seconds, after a failed write of a dead letter.
DEAD_LETTER_DELAYS = (1.0, 30.0)


class Workers:
    """A pool of workers: each takes items from the work queue, runs the registry and applies the outcome.

    :param dispatch: the work queue.
    :param begin: called with each item before its attempt starts; None for no call.
    :param handle: runs the registry with the value of a record.
    :param dead_letters: the writer of dead letters.
    :param count: the number of workers.
    :param say: the consumer's logger and name.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        begin: Callable[[Job], None] | None,
        handle: Callable[[Any], Any],
        dead_letters: DeadLetters,
        count: int,
        say: tuple[logging.Logger, str],
    ) -> None:
        self._dispatch = dispatch
        self._begin = begin
        self._handle = handle
        self._dead_letters = dead_letters
        self._threads = count
        self._logger, self._name = say
        #: Counters of permanently failed records (``failed``) and of retries (``retried``).
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        #: The KeyboardInterrupt that a task raised to stop the consumer.
        self.interrupt: KeyboardInterrupt | None = None
        #: Set, possibly by a signal handler, to start no more attempts; a call of :meth:`shutdown` follows.
        self.stopping = False
        self._ended = threading.Event()

    def start(self) -> None:
        """Start the threads if there is more than one worker."""
        if self._threads > 1:
            for _ in range(self._threads):
                self._spawn()

    def work(self) -> None:
        """Run the only worker in this thread, or wait for the worker threads; return after :meth:`shutdown`."""
        if self._threads == 1:
            self._work()
        while not self._ended.wait(IDLE):
            # The wait has a timeout, because a wait without one would block signal handlers.
            pass
        if self.interrupt is not None:
            raise self.interrupt

    def end(self) -> None:
        """Stop the workers after their running attempts and close the work queue."""
        self.stopping = True
        self._dispatch.close()
        self._ended.set()

    def step(self, timeout: float = 0) -> bool:
        """Run one item in this thread; return False if none is ready within ``timeout`` seconds."""
        job = self._dispatch.take(timeout)
        if job is not None:
            self._attempt(job)
        return job is not None

    def answer(self, job: Job) -> None:
        """Acknowledge a running item, which the store now guarantees."""
        self._dispatch.answer(job)

    def hand_back(self, job: Job) -> None:
        """Abandon a running item, so that its record stays unfinished."""
        self._dispatch.abandon(job)

    def now(self) -> float:
        """Return the time by the clock of the work queue."""
        return self._dispatch.clock()

    def cluster(self) -> str:
        """Return the cluster id."""
        return self._dispatch.cluster()

    def expire(self) -> None:
        """Time out attempts that exceed the TIMEOUT of their class, and start a replacement for each stuck worker."""
        now = self._dispatch.clock()
        for job in self._dispatch.running():
            # Read the outcome latch before the check: the next step of the attempt has a latch and a timer of its own.
            decision = job.outcome
            if job.time_limit is not None and now - job.taken >= job.time_limit:
                verdict = TaskTimeout(f"the attempt took longer than TIMEOUT, {job.time_limit:g} s")
                if self._dispatch.expire(job, verdict, decision):
                    self._spawn()

    def _spawn(self) -> None:
        threading.Thread(target=self._work_in_thread, name="kser-worker", daemon=True).start()

    def _work_in_thread(self) -> None:
        try:
            self._work()
        except KeyboardInterrupt as exc:
            self.interrupt = exc
            self.end()

    def _work(self) -> None:
        """Run items until the shutdown, or until another worker has replaced this one."""
        dispatch = self._dispatch
        while not self.stopping:
            job = dispatch.take(IDLE)
            if job is not None:
                self._attempt(job)
                if job.abandoned:
                    return

    def _attempt(self, job: Job) -> None:
        if job.failure is not None:
            self._bury(job, again=True)
            return
        self._run(job)
        self._conclude(job)

    def _run(self, job: Job) -> None:
        if self._begin is not None:
            self._begin(job)
        job.crew = self
        current_attempt.set(job)
        try:
            self._handle(job.record.value)
        except KeyboardInterrupt:
            self._dispatch.abandon(job)
            raise
        except AttemptAbandoned:
            # _apply_outcome logs the abandoned attempt.
            pass
        except BaseException as exc:
            # No exception may end the worker; otherwise each redelivery of the message would end another worker.
            if job.failure is None:
                job.reject(FAILED, exc)
            self._logger.exception(
                f"{self._name}: the registry raised at offset {job.record.offset} of {job.place}; the message failed"
            )
        finally:
            current_attempt.set(None)
            job.resolve()

    def _conclude(self, job: Job) -> None:
        if job.abandoned:
            self._logger.warning(
                f"{self._name}: the attempt at offset {job.record.offset} of {job.place} was abandoned; its late result"
                " is dropped"
            )
        elif job.retry_in is not None:
            self._count_up("retried")
            self._dispatch.retry(job, job.retry_in)
        elif job.failure is not None:
            self._count_up("failed")
            self._bury(job)
        else:
            self._finish(job)

    def _count_up(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1

    def _bury(self, job: Job, again: bool = False) -> None:
        assert job.failure is not None
        if self._dead_letters.write(job.record, job.failure, job.number, again):
            self._finish(job)
            return
        first, longest = DEAD_LETTER_DELAYS
        self._dispatch.bury_later(job, min(first * 2 ** min(job.burials, 10), longest))

    def _finish(self, job: Job) -> None:
        if not self._dispatch.finish(job):
            self._logger.info(
                f"{self._name}: offset {job.record.offset} of {job.place} was finished after the partition was"
                " revoked: it is not committed, and will be redelivered if another consumer owns the partition"
            )
