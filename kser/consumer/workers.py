"""Those that run tasks: one in the main thread, or several in threads of their own."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from kser.consumer.deadletter import DeadLetters
from kser.consumer.dispatch import Dispatch
from kser.consumer.job import Job
from kser.delivery import CURRENT, FAILED, Abandoned
from kser.errors import TaskTimeout

#: Seconds that a worker waits for a record before it looks around.
IDLE = 0.5
#: Seconds before a dead letter that could not be written is tried again, and what they grow to.
DEAD_LETTER_DELAYS = (1.0, 30.0)


class Workers:
    """Takes records from a dispatch, has a registry handle them, and says what became of them.

    :param begin: called with each record before it is handled.
    :param handle: runs the registry on a record's value.
    :param count: how many records at once.
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
        #: How many records failed for good, and how often one was tried again.
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        #: What a task raised to end the consumer: KeyboardInterrupt.
        self.interrupt: KeyboardInterrupt | None = None
        #: Set to begin nothing more, also from a signal handler; :meth:`end` follows.
        self.stopping = False
        self._ended = threading.Event()

    def start(self) -> None:
        """Start the threads, when there is more than one worker."""
        if self._threads > 1:
            for _ in range(self._threads):
                self._spawn()

    def work(self) -> None:
        """Be one of the workers, or wait for them: return once :meth:`end` was called."""
        if self._threads == 1:
            self._work()
        while not self._ended.wait(IDLE):
            # A wait without end would not let signals through.
            pass
        if self.interrupt is not None:
            raise self.interrupt

    def end(self) -> None:
        """Begin nothing more."""
        self.stopping = True
        self._dispatch.close()
        self._ended.set()

    def step(self, timeout: float = 0) -> bool:
        """Work on one record, in this thread; returns False when there is none within ``timeout`` seconds."""
        job = self._dispatch.take(timeout)
        if job is not None:
            self._attempt(job)
        return job is not None

    def answer(self, job: Job) -> None:
        """A database answers for a job that is worked on."""
        self._dispatch.answer(job)

    def hand_back(self, job: Job) -> None:
        """A job that is worked on stays unfinished."""
        self._dispatch.abandon(job)

    def now(self) -> float:
        """The time that jobs are taken by."""
        return self._dispatch.clock()

    def cluster(self) -> str:
        """What tells this Kafka cluster from others."""
        return self._dispatch.cluster()

    def expire(self) -> None:
        """Give up attempts that take longer than their class allows; other workers take the place of stuck ones."""
        now = self._dispatch.clock()
        for job in self._dispatch.running():
            # Of what runs now; the next part of the work has one of its own.
            decision = job.decision
            if job.timeout is not None and now - job.taken >= job.timeout:
                verdict = TaskTimeout(f"the attempt took longer than TIMEOUT, {job.timeout:g} s")
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
        """Work until the end, or until another worker has taken this one's place."""
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
        CURRENT.set(job)
        try:
            self._handle(job.record.value)
        except KeyboardInterrupt:
            self._dispatch.abandon(job)
            raise
        except Abandoned:
            # It is said with the conclusion.
            pass
        except BaseException as exc:
            # Whatever it is, it must not end the worker, and then again each one that gets the message.
            if job.failure is None:
                job.refuse(FAILED, exc)
            self._logger.exception(
                f"{self._name}: the registry raised at offset {job.record.offset} of {job.place}; the message failed"
            )
        finally:
            CURRENT.set(None)
            job.decide()

    def _conclude(self, job: Job) -> None:
        if job.abandoned:
            self._logger.warning(
                f"{self._name}: offset {job.record.offset} of {job.place} was given up; its late result is dropped"
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
        if self._dead_letters.write(job.record, job.failure, job.attempt, again):
            self._finish(job)
            return
        first, longest = DEAD_LETTER_DELAYS
        self._dispatch.bury_later(job, min(first * 2 ** min(job.burials, 10), longest))

    def _finish(self, job: Job) -> None:
        if not self._dispatch.finish(job):
            self._logger.info(
                f"{self._name}: offset {job.record.offset} of {job.place} was finished after the partition was taken"
                " away: it is not committed, and is run again if the partition went to another consumer"
            )
