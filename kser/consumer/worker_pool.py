"""The worker pool: one worker in the main thread, or several workers in threads of their own."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from kser.attempt import FAILED, UNREADABLE, Attempt, AttemptAbandoned, ConsumerCallbacks, Failure, current_attempt
from kser.backoff import delay
from kser.consumer.dead_letters import DeadLetterWriter
from kser.consumer.logs import ConsumerLogger
from kser.consumer.takeovers import TakeoverItem
from kser.consumer.unreadable import UnreadableRecord
from kser.consumer.work_item import WorkItem
from kser.consumer.work_queue import WorkQueue
from kser.errors import TaskTimeout

#: Seconds that a worker waits for a record before it checks the stop flag.
IDLE_WAIT = 0.5

#: Seconds between two checks whether attempts still run. A longer wait would delay signal handlers.
IDLE_CHECK_INTERVAL = 0.1

#: Back-off in seconds after a failed write of a dead letter.
_DEAD_LETTER_BACKOFF = partial(delay, first=1.0, ceiling=30.0)


class WorkerPool:
    """A pool of workers. Each worker takes an item from the work queue, runs its message and applies the outcome.

    :param work_queue: the work queue.
    :param before_attempt: a function to call with each item before its attempt starts, or None.
    :param handle: passes the value of a record to the controller.
    :param dead_letters: the writer of dead letters.
    :param size: the number of workers.
    :param cluster: returns the id of the Kafka cluster.
    :param log: the logger of the consumer.
    """

    def __init__(
        self,
        work_queue: WorkQueue,
        before_attempt: Callable[[WorkItem], None] | None,
        handle: Callable[[Any], Any],
        dead_letters: DeadLetterWriter,
        size: int,
        *,
        cluster: Callable[[], str],
        log: ConsumerLogger,
    ) -> None:
        self._work_queue = work_queue
        self._before_attempt = before_attempt
        self._handle = handle
        self._dead_letters = dead_letters
        self._size = size
        self._log = log
        #: Counters of permanently failed records (``failed``) and of retries (``retried``).
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        #: The KeyboardInterrupt that a task raised to stop the consumer.
        self.interrupt: KeyboardInterrupt | None = None
        #: True if the workers must start no more attempts. A signal handler may set it; a call of :meth:`shutdown`
        #: follows.
        self.stopping = False
        #: True while a thread is inside of :meth:`work`.
        self.is_working = False
        self._shut_down = threading.Event()
        self._callbacks = ConsumerCallbacks(
            ack=work_queue.ack,
            abandon=work_queue.abandon,
            clock=lambda: work_queue.clock(),
            cluster=cluster,
            is_stopping=lambda: self.stopping,
        )

    def start(self) -> None:
        """Start the threads if there is more than one worker."""
        if self._size > 1:
            for _ in range(self._size):
                self._spawn()

    def work(self) -> None:
        """Run the only worker in this thread, or wait for the worker threads; return after :meth:`shutdown`."""
        self.is_working = True
        try:
            if self._size == 1:
                self._work()
            while not self._shut_down.wait(IDLE_WAIT):
                # The wait has a timeout, because a wait without a timeout would block signal handlers.
                pass
            if self.interrupt is not None:
                raise self.interrupt
        finally:
            self.is_working = False

    def wait_until_idle(self) -> None:
        """Wait until no attempt runs. The supervisor thread abandons attempts that exceed ``shutdown_timeout``."""
        while self._work_queue.running():
            self._work_queue.waiters.wait(lambda: not self._work_queue.running(), IDLE_CHECK_INTERVAL)

    def shutdown(self) -> None:
        """Stop the workers after their running attempts and close the work queue."""
        self.stopping = True
        self._work_queue.close()
        self._shut_down.set()

    def step(self, timeout: float = 0) -> bool:
        """Run one item in this thread; return False if no item is ready within ``timeout`` seconds."""
        item = self._work_queue.get(timeout)
        if item is not None:
            self._attempt(item)
        return item is not None

    def enforce_time_limits(self) -> None:
        """Time out attempts that exceed the time limit of their class, and start a new worker for each of them."""
        now = self._work_queue.clock()
        for item in self._work_queue.running():
            attempt = item.attempt
            # Read the outcome latch before the time limit. During a stored operation, each step has a latch and a timer
            # of its own. In the opposite order, a step that begins between the two reads would time out by the limit of
            # the step before.
            outcome = attempt.outcome
            if attempt.time_limit is not None and now - attempt.started_at >= attempt.time_limit:
                timeout_error = TaskTimeout(f"the attempt took longer than TIME_LIMIT, {attempt.time_limit:g} s")
                if self._work_queue.time_out(item, timeout_error, outcome):
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
        """Run items until the shutdown, or until another worker has replaced this worker."""
        work_queue = self._work_queue
        while not self.stopping:
            item = work_queue.get(IDLE_WAIT)
            if item is not None:
                self._attempt(item)
                if item.attempt.abandoned:
                    return

    def _attempt(self, item: WorkItem) -> None:
        if item.attempt.failure is not None:
            if not item.dead_letter_tries:
                self._report_unrun(item, item.attempt.failure)
            self._dead_letter(item, again=item.dead_letter_tries > 0)
            return
        if isinstance(item.record, UnreadableRecord):
            self._fail_unreadable(item.record, item.attempt)
        else:
            self._run(item, item.attempt)
        self._apply_outcome(item, item.attempt)

    def _fail_unreadable(self, record: UnreadableRecord, attempt: Attempt) -> None:
        attempt.failure = Failure(UNREADABLE, "", record.reason)
        attempt.resolve()
        tries = f" after {record.tries} more fetches, each over a new connection" if record.tries else ""
        self._log.error(
            f"{record} cannot be read, and the consumer skips this data{tries}: {record.reason}; check"
            " the disks of the brokers, and the producers of the topic"
        )

    def _run(self, item: WorkItem, attempt: Attempt) -> None:
        if self._before_attempt is not None:
            self._before_attempt(item)
        attempt.callbacks = self._callbacks
        current_attempt.set(attempt)
        try:
            self._handle(item.record.value)
        except KeyboardInterrupt:
            self._work_queue.abandon(attempt)
            raise
        except AttemptAbandoned:
            # _apply_outcome logs the abandoned attempt.
            pass
        except BaseException as exc:
            # No exception may end the worker. Otherwise, a message whose handling raises an exception would end one
            # more worker at each redelivery.
            if attempt.failure is None:
                attempt.reject(FAILED, exc)
            self._log.exception(f"the message at {item.place} failed, because the registry raised an exception")
        finally:
            current_attempt.set(None)
            attempt.resolve()

    def _apply_outcome(self, item: WorkItem, attempt: Attempt) -> None:
        if attempt.abandoned:
            self._log.warning(f"the attempt at {item.place} was abandoned; its late result is dropped")
        elif attempt.retry_in is not None:
            self._increment("retried")
            self._work_queue.requeue(item, attempt.retry_in)
        elif attempt.failure is not None:
            self._increment("failed")
            self._dead_letter(item)
        elif not self._work_queue.task_done(item):
            self._log_revoked(item)

    def _report_unrun(self, item: WorkItem, failure: Failure) -> None:
        self._increment("failed")
        self._log.error(
            f"the message at offset {item.record.offset} of {item.partition} is given up and does not run again:"
            f" {failure.message}; find out why it ends the process, and send it again"
        )

    def _increment(self, counter: str) -> None:
        with self._counting:
            self.counts[counter] += 1

    def _dead_letter(self, item: WorkItem, again: bool = False) -> None:
        failure = item.attempt.failure
        assert failure is not None
        if isinstance(item, TakeoverItem):
            # There is no record to copy. The store still contains the step, so it is taken over or sent again later.
            self._work_queue.task_done(item)
            return
        if self._dead_letters.write(item.record, failure, item.attempt.number, again):
            if not self._work_queue.task_done(item):
                self._log_revoked(item)
            return
        self._work_queue.retry_dead_letter(item, _DEAD_LETTER_BACKOFF(item.dead_letter_tries + 1))

    def _log_revoked(self, item: WorkItem) -> None:
        self._log.info(
            f"the message at {item.place} was finished after the partition was"
            " revoked, so it is not committed: it will run again, unless this consumer gets the partition back"
        )
