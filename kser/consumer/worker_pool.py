"""The worker pool: one worker in the main thread, or several workers in threads of their own."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from kser.attempt import FAILED, AttemptAbandoned, current_attempt
from kser.backoff import delay
from kser.consumer.dead_letters import DeadLetterWriter
from kser.consumer.work_item import WorkItem
from kser.consumer.work_queue import WorkQueue
from kser.errors import TaskTimeout

#: Seconds that a worker waits for a record before it checks the stop flag.
IDLE_WAIT = 0.5

#: Back-off in seconds after a failed write of a dead letter.
_DEAD_LETTER_BACKOFF = partial(delay, first=1.0, ceiling=30.0)


class WorkerPool:
    """A pool of workers: each takes items from the work queue, runs the registry and applies the outcome.

    :param work_queue: the work queue.
    :param before_attempt: called with each item before its attempt starts; None for no call.
    :param handle: runs the registry with the value of a record.
    :param dead_letters: the writer of dead letters.
    :param size: the number of workers.
    :param say: the consumer's logger and name.
    """

    def __init__(
        self,
        work_queue: WorkQueue,
        before_attempt: Callable[[WorkItem], None] | None,
        handle: Callable[[Any], Any],
        dead_letters: DeadLetterWriter,
        size: int,
        say: tuple[logging.Logger, str],
    ) -> None:
        self._work_queue = work_queue
        self._before_attempt = before_attempt
        self._handle = handle
        self._dead_letters = dead_letters
        self._size = size
        self._logger, self._name = say
        #: Counters of permanently failed records (``failed``) and of retries (``retried``).
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        #: The KeyboardInterrupt that a task raised to stop the consumer.
        self.interrupt: KeyboardInterrupt | None = None
        #: Set, possibly by a signal handler, to start no more attempts; a call of :meth:`shutdown` follows.
        self.stopping = False
        self._shut_down = threading.Event()

    def start(self) -> None:
        """Start the threads if there is more than one worker."""
        if self._size > 1:
            for _ in range(self._size):
                self._spawn()

    def work(self) -> None:
        """Run the only worker in this thread, or wait for the worker threads; return after :meth:`shutdown`."""
        if self._size == 1:
            self._work()
        while not self._shut_down.wait(IDLE_WAIT):
            # The wait has a timeout, because a wait without one would block signal handlers.
            pass
        if self.interrupt is not None:
            raise self.interrupt

    def shutdown(self) -> None:
        """Stop the workers after their running attempts and close the work queue."""
        self.stopping = True
        self._work_queue.close()
        self._shut_down.set()

    def step(self, timeout: float = 0) -> bool:
        """Run one item in this thread; return False if none is ready within ``timeout`` seconds."""
        job = self._work_queue.get(timeout)
        if job is not None:
            self._attempt(job)
        return job is not None

    def ack(self, job: WorkItem) -> None:
        """Acknowledge a running item, which the store now guarantees."""
        self._work_queue.ack(job)

    def abandon(self, job: WorkItem) -> None:
        """Abandon a running item, so that its record stays unfinished."""
        self._work_queue.abandon(job)

    def now(self) -> float:
        """Return the time by the clock of the work queue."""
        return self._work_queue.clock()

    def cluster(self) -> str:
        """Return the cluster id."""
        return self._work_queue.cluster()

    def enforce_time_limits(self) -> None:
        """Time out attempts that exceed the time limit of their class, and start a worker for each stuck one."""
        now = self._work_queue.clock()
        for job in self._work_queue.running():
            # Read the outcome latch before the check: the next step of the attempt has a latch and a timer of its own.
            decision = job.outcome
            if job.time_limit is not None and now - job.started_at >= job.time_limit:
                verdict = TaskTimeout(f"the attempt took longer than TIME_LIMIT, {job.time_limit:g} s")
                if self._work_queue.time_out(job, verdict, decision):
                    self._spawn()

    def _spawn(self) -> None:
        threading.Thread(target=self._work_in_thread, name="kser-worker", daemon=True).start()

    def _work_in_thread(self) -> None:
        try:
            self._work()
        except KeyboardInterrupt as exc:
            self.interrupt = exc
            self.shutdown()

    def _work(self) -> None:
        """Run items until the shutdown, or until another worker has replaced this one."""
        dispatch = self._work_queue
        while not self.stopping:
            job = dispatch.get(IDLE_WAIT)
            if job is not None:
                self._attempt(job)
                if job.abandoned:
                    return

    def _attempt(self, job: WorkItem) -> None:
        if job.failure is not None:
            self._dead_letter(job, again=True)
            return
        self._run(job)
        self._apply_outcome(job)

    def _run(self, job: WorkItem) -> None:
        if self._before_attempt is not None:
            self._before_attempt(job)
        job.worker_pool = self
        current_attempt.set(job)
        try:
            self._handle(job.record.value)
        except KeyboardInterrupt:
            self._work_queue.abandon(job)
            raise
        except AttemptAbandoned:
            # _apply_outcome logs the abandoned attempt.
            pass
        except BaseException as exc:
            # No exception may end the worker; otherwise each redelivery of the message would end another worker.
            if job.failure is None:
                job.reject(FAILED, exc)
            self._logger.exception(
                f"{self._name}: the registry raised at offset {job.record.offset} of {job.partition};"
                " the message failed"
            )
        finally:
            current_attempt.set(None)
            job.resolve()

    def _apply_outcome(self, job: WorkItem) -> None:
        if job.abandoned:
            self._logger.warning(
                f"{self._name}: the attempt at offset {job.record.offset} of {job.partition} was abandoned;"
                " its late result is dropped"
            )
        elif job.retry_in is not None:
            self._increment("retried")
            self._work_queue.requeue(job, job.retry_in)
        elif job.failure is not None:
            self._increment("failed")
            self._dead_letter(job)
        else:
            self._task_done(job)

    def _increment(self, counter: str) -> None:
        with self._counting:
            self.counts[counter] += 1

    def _dead_letter(self, job: WorkItem, again: bool = False) -> None:
        assert job.failure is not None
        if self._dead_letters.write(job.record, job.failure, job.number, again):
            self._task_done(job)
            return
        self._work_queue.retry_dead_letter(job, _DEAD_LETTER_BACKOFF(job.dead_letter_tries + 1))

    def _task_done(self, job: WorkItem) -> None:
        if not self._work_queue.task_done(job):
            self._logger.info(
                f"{self._name}: offset {job.record.offset} of {job.partition} was finished after the partition was"
                " revoked: it is not committed, and will be redelivered if another consumer owns the partition"
            )
