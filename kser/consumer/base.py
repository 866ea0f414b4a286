"""The consumer that users create and run. Each transport subclasses it and connects its own client.

=============== ==================================================================================================
thread          job
=============== ==================================================================================================
main            runs tasks if there is one worker, and otherwise waits; receives the signals, which only set a flag
kser-client     owns the Kafka client (:mod:`kser.consumer.poller`)
kser-worker     runs tasks; one thread per worker if there are several (:mod:`kser.consumer.worker_pool`)
kser-supervisor checks the control files, enforces time limits and supervises the shutdown
kser-services   runs the background services of the registries (:mod:`kser.consumer.services`)
=============== ==================================================================================================
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, ClassVar

from kser import lockfiles
from kser.consumer.beside import Beside
from kser.consumer.client import ConsumerClient, Partition
from kser.consumer.deadletter import DeadLetters
from kser.consumer.dispatch import Dispatch
from kser.consumer.interrupts import Interrupts
from kser.consumer.job import Job
from kser.consumer.lending import Lending
from kser.consumer.options import BEFORE, NEVER, ConsumerOptions
from kser.consumer.poller import CLIENT_TIMEOUT, POLL_TIMEOUT, Poller
from kser.consumer.workers import Workers
from kser.controller import BaseProducer, Controller
from kser.errors import SettingError

#: Seconds between two checks of the control files, and the time limit of one :meth:`BaseConsumer.step`.
TICK = 1.0
#: Seconds between two checks of the time limits and of the stop flag.
WATCH = 0.1
#: Seconds between two warnings about a paused consumer.
PAUSE_REMINDER = 30.0
#: Seconds to wait for the client thread at shutdown, in addition to the time that a rebalance can block it.
JOIN_TIMEOUT = 5.0


class BaseConsumer:
    """A consumer that passes the messages of its topics to :attr:`REGISTRY`.

    :param topics: the topics to consume.
    :param options: the options of the consumer.
    :param group: the consumer group, for the log.
    :param interval: seconds between commits; 0 commits after each message.
    :param poll_limit: the longest time in seconds that the client may spend between two polls.
    :param session: seconds without a heartbeat after which the group removes a member.
    :raises kser.errors.SettingError: the dead letter topic is one of ``topics``.
    """

    #: The handler of messages: a controller class or an instance of one. You may set it on the instance.
    REGISTRY: Any = Controller

    #: The client's option that names the consumer group.
    GROUP_OPTION: ClassVar[str] = "group_id"
    #: The client's option for the position of a group without committed offsets.
    RESET_OPTION: ClassVar[str] = "auto_offset_reset"

    #: The logger of the transport's module.
    LOGGER: ClassVar[logging.Logger] = logging.getLogger(__name__)

    def __init__(
        self,
        topics: Iterable[str],
        options: ConsumerOptions,
        *,
        group: str | None,
        interval: float,
        poll_limit: float,
        session: float,
    ) -> None:
        #: The options of this consumer.
        self.options = options
        self._topics = list(topics)
        self._group = group
        self._commits_at_once = not interval
        self._check_dead_letters()
        self._dispatch = Dispatch(
            ordering=options.ordering,
            # With commit="before" a crash loses every buffered record, so buffer no more than the workers can run.
            max_in_flight=options.workers if options.commit == BEFORE else max(options.max_in_flight, options.workers),
            max_bytes=options.max_buffered_bytes,
            revoke_timeout=min(options.revoke_timeout, poll_limit / 3),
            retry=options.retry,
            commit_before=options.commit == BEFORE,
            fence=session / 2,
        )
        self._clock = self._dispatch.clock
        self._interrupts = Interrupts(self.stop)
        self._stopping = self._working = self._closed = False
        #: The deadline of the shutdown, by the clock of the work queue; 0 before the shutdown.
        self._end_by = 0.0
        self._crash: Exception | None = None
        self._client_thread: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._main: threading.Thread | None = None
        self._lending = Lending(self.make_producer)
        self._beside = Beside(self._lending.companions)
        self._last_look = self._last_reminder = self._clock() - PAUSE_REMINDER
        self._make_parts(interval)
        try:
            lockfiles.running_file.open()
            self.clean_lock()
        except BaseException:
            self.close()
            raise

    def _make_parts(self, interval: float) -> None:
        options = self.options
        say = self.LOGGER, type(self).__name__
        self._letters = DeadLetters(options.dead_letter_topic, self._lending.producer, type(self), self.LOGGER)
        begin = self._commit_first if options.commit == BEFORE and self._commits_at_once else None
        self._workers = Workers(self._dispatch, begin, self._handle, self._letters, options.workers, say)
        self._poller = Poller(
            self._connect,
            self._topics,
            self._dispatch,
            commit=options.commit,
            interval=interval,
            stall_timeout=options.stall_timeout,
            say=say,
        )
        if self._poller.mode == NEVER and options.commit != NEVER:
            self.LOGGER.warning(
                f"{type(self).__name__}: without group_id no offset can be committed: after a restart, the"
                " consumer does not know which messages it has handled; set group_id"
            )

    def _check_dead_letters(self) -> None:
        if self.options.dead_letter in self._topics:
            raise SettingError(
                f"dead_letter is {self.options.dead_letter!r}, a topic that this consumer reads: failed messages"
                " would loop endlessly; choose another topic"
            )

    # -- override points -----------------------------------------------------------------------------------------------

    @staticmethod
    def is_active() -> bool:
        """Return whether to fetch messages: True unless the pause file exists. Called every second."""
        return not lockfiles.is_paused()

    @staticmethod
    def should_stop() -> bool:
        """Return whether to stop: True if the terminate file is newer than this process. Called every second."""
        return lockfiles.terminate_file.is_present()

    @classmethod
    def clean_lock(cls) -> None:
        """Remove the pause file, because a consumer starts unpaused."""
        if path := lockfiles.remove_pause_file():
            cls.LOGGER.debug(f"Cleaning existing pause file: {path}")

    def make_producer(self) -> BaseProducer:
        """Create a producer for the same cluster. Called once, when a dead letter or a task first needs it."""
        raise NotImplementedError

    def _connect(self) -> ConsumerClient:
        """Create a client. Called again when a client failed fatally."""
        raise NotImplementedError

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def assignment(self) -> frozenset[Partition]:
        """The partitions currently assigned to this consumer."""
        return self._dispatch.assignment

    @property
    def counts(self) -> dict[str, int]:
        """Counters of messages: ``done``, ``failed``, ``retried`` and ``dead_lettered``."""
        return {"done": self._dispatch.settled, **self._workers.counts, "dead_lettered": self._letters.written}

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Consume until SIGTERM, SIGINT or the terminate file; then commit, close the client and exit.

        Running messages have ``shutdown_timeout`` seconds to finish. Attempts that still run after that are abandoned,
        and their messages will run again. A second signal abandons them immediately.

        :raises SystemExit: after every orderly shutdown, with status 0; with status 143 after a second SIGTERM.
        :raises KeyboardInterrupt: after a second SIGINT, or if a task raised it; its message is not committed.
        """
        self.LOGGER.info(f"{type(self).__name__}.Starting...")
        self.LOGGER.info(
            f"{type(self).__name__}: {self.options.describe(self._poller.mode, self._group, self._topics)}"
        )
        try:
            with self._interrupts.handled():
                try:
                    self._start()
                    self._work()
                    self.LOGGER.info("Closing consumer and exiting")
                    self._drain()
                    if self._crash is not None:
                        raise self._crash
                finally:
                    self.close()
                    if self._watcher is not None:
                        self._watcher.join(JOIN_TIMEOUT)
        except KeyboardInterrupt:
            if self._interrupts.status == 128 + signal.SIGTERM:
                sys.exit(self._interrupts.status)
            raise
        finally:
            self._interrupts.close()
        sys.exit(0)

    def step(self, timeout: float = POLL_TIMEOUT) -> int:
        """Run one cycle in this thread, for tests: check the control files, poll, handle messages, commit.

        :param timeout: seconds to wait if no message is available.
        :return: the number of messages handled, within about a second.
        """
        self._look()
        if self._stopping:
            return 0
        self._lending.lend(self.REGISTRY)
        self._poller.turn(timeout)
        handled = 0
        began = self._clock()
        while not self._stopping and self._workers.step():
            handled += 1
            if self._commits_at_once:
                self._poller.commit()
            if self._clock() - began >= TICK:
                break
        self._poller.commit_when_due()
        return handled

    def stop(self) -> None:
        """Stop after the running messages. You may call it from any thread or signal handler."""
        self._workers.stopping = True
        self._stopping = True

    def close(self) -> None:
        """Commit finished messages, leave the group and close the client."""
        with ExitStack() as last_to_first:
            last_to_first.callback(self._let_go)
            self._stopping = True
            last_to_first.callback(self._lending.close)
            self._workers.end()
            # Background services send messages, so they close before the producer does.
            self._beside.close(JOIN_TIMEOUT)
            self._lending.take_back(self.REGISTRY)
            if self._client_thread is None:
                self._poller.close()
            else:
                if self._interrupts.status is not None or not self._end_by:
                    self._end_by = self._clock()
                self._poller.stop(self._end_by)
                self._join_client()

    def _let_go(self) -> None:
        if not self._closed:
            self._closed = True
            lockfiles.running_file.close()

    def _join_client(self) -> None:
        assert self._client_thread is not None
        patience = max(self._end_by - self._clock(), 0) + self.options.revoke_timeout + JOIN_TIMEOUT
        self._client_thread.join(patience)
        if self._client_thread.is_alive():
            self.LOGGER.warning(f"{type(self).__name__}: the Kafka client did not close in time; exiting without it")

    def _start(self) -> None:
        self._main = threading.current_thread()
        # The check precedes the start of the threads, because the consumer may be paused or stopped from the beginning.
        self._look()
        self._lending.lend(self.REGISTRY)
        self._client_thread = threading.Thread(target=self._poller.run, name="kser-client", daemon=True)
        self._client_thread.start()
        self._workers.start()
        self._beside.start()
        self._watcher = threading.Thread(target=self._watch, name="kser-watch", daemon=True)
        self._watcher.start()

    def _work(self) -> None:
        self._working = True
        try:
            self._workers.work()
        finally:
            self._working = False

    def _commit_first(self, job: Job) -> None:
        """Wait until the record is committed, with a time limit; after the limit, its attempt starts anyway."""
        if self._client_thread is None:
            self._poller.commit()
        else:
            # The client thread commits; the offset counts as committed when the group has confirmed it.
            self._dispatch.wait_for_change(CLIENT_TIMEOUT, lambda: job.progress.is_committed(job.record.offset))

    def _handle(self, value: Any) -> None:
        try:
            data: Any = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            # The registry rejects the undecodable value and calls its error hook.
            data = value
        registry = self.REGISTRY
        if self._lending.lend_to_new(registry) and self._client_thread is not None:
            self._beside.start()
        registry.run(data)

    # -- the supervisor thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._watch_until_stopped()
        except Exception as exc:
            # is_active and should_stop may be user code that raises. Without a supervisor no stop request would be
            # noticed, so the consumer stops and run() raises the error.
            self._crash = exc
            self.stop()
        self._poller.ending = True
        self._end_by = self._clock() + self.options.shutdown_timeout
        self._workers.end()
        self._wait_for_running()
        for job in self._dispatch.running():
            if self._dispatch.abandon(job):
                limit = f"after shutdown_timeout ({self.options.shutdown_timeout:g} s)"
                when = limit if self._interrupts.status is None else "at the second signal"
                self.LOGGER.warning(
                    f"{type(self).__name__}: offset {job.record.offset} of {job.place} still runs {when}: it is"
                    " abandoned, and will run again"
                )
        self._poller.stop(self._end_by)
        self._see_main_out()

    def _wait_for_running(self) -> None:
        while self._dispatch.running() and self._clock() < self._end_by:
            if self._interrupts.status is not None:
                self._end_by = self._clock()
            self._workers.expire()
            self._dispatch.wait_for_change(WATCH, lambda: not self._dispatch.running())

    def _see_main_out(self) -> None:
        """Force the process to exit if a task still blocks the main thread; everything else has been shut down."""
        if self._main is not threading.main_thread() or self._interrupts.get_out(lambda: self._working):
            return
        self._join_client()
        self._let_go()
        self.LOGGER.warning(
            f"{type(self).__name__}: a message still blocks the main thread; forcing the process to exit"
        )
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(self._interrupts.status or 0)

    def _watch_until_stopped(self) -> None:
        while not self._stopping:
            self._look()
            self._workers.expire()
            if not self._stopping and not self._client_thread.is_alive():  # type: ignore[union-attr]
                raise RuntimeError("the Kafka client thread has ended unexpectedly; see the log for the cause")
            self._interrupts.wait(WATCH)

    def _look(self) -> None:
        """Check the control files, at most once per ``CONTROL_FILE_INTERVAL``."""
        if self._clock() - self._last_look < TICK:
            return
        self._last_look = self._clock()
        # The flag is never cleared here; otherwise a signal that arrives during the check would be lost.
        if self.should_stop():
            self.stop()
        paused = not self.is_active()
        self._poller.paused = paused
        self._dispatch.pause(paused)
        if paused and self._clock() - self._last_reminder >= PAUSE_REMINDER:
            self._last_reminder = self._clock()
            self.LOGGER.warning("Consumer is paused")
        self._lending.lend(self.REGISTRY)

    def _drain(self) -> None:
        """Wait until no attempt runs; the supervisor abandons attempts that exceed the time limit."""
        while self._dispatch.running():
            self._dispatch.wait_for_change(WATCH, lambda: not self._dispatch.running())
