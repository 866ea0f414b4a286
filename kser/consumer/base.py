"""The consumer: what users make and run. Every transport's consumer is one of these around its client.

============== ===================================================================================================
thread         what it does
============== ===================================================================================================
main           runs tasks when there is one worker; otherwise waits. Gets the signals, which only set a flag
kser-client    owns the Kafka client (:mod:`kser.consumer.poller`)
kser-worker    run tasks, when there are several workers (:mod:`kser.consumer.workers`)
kser-watch     looks at the control files, at the time that attempts take, and after the end
kser-beside    runs what registries want done beside (:mod:`kser.consumer.beside`)
============== ===================================================================================================
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

#: Seconds between two looks at the control files, and that a step may take.
TICK = 1.0
#: Seconds between two looks at attempts that run, and at whether to end.
WATCH = 0.1
#: Seconds between two warnings that the consumer is paused.
PAUSE_REMINDER = 30.0
#: Seconds that the thread which owns the client is given to end, beyond what a rebalance may hold it up.
JOIN_TIMEOUT = 5.0


class BaseConsumer:
    """Takes messages from topics and has :attr:`REGISTRY` handle them.

    :param topics: what to consume.
    :param options: how to work.
    :param group: the consumer group, for the log.
    :param interval: seconds between commits; 0 commits at once.
    :param poll_limit: seconds that the client may go without a poll.
    :param session: seconds after which the group gives up a member that it does not hear of.
    :raises kser.errors.SettingError: the topic of dead letters is consumed.
    """

    #: What handles messages: a controller class or an instance of one. May be set on the instance.
    REGISTRY: Any = Controller

    #: The client's option that names the consumer group.
    GROUP_OPTION: ClassVar[str] = "group_id"
    #: The client's option that says where a group begins that has committed nothing.
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
        #: How it works.
        self.options = options
        self._topics = list(topics)
        self._group = group
        self._commits_at_once = not interval
        self._check_dead_letters()
        self._dispatch = Dispatch(
            ordering=options.ordering,
            # In that mode a crash loses what is here: no more than what can run.
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
        #: When to be done, once the consumer ends.
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
                f"{type(self).__name__}: without group_id no offset can be committed: messages are handled, and what"
                " was handled before a restart is not remembered; set group_id"
            )

    def _check_dead_letters(self) -> None:
        if self.options.dead_letter in self._topics:
            raise SettingError(
                f"dead_letter is {self.options.dead_letter!r}, a topic that is consumed here: what fails would come"
                " back for ever; name another one"
            )

    # -- override points -----------------------------------------------------------------------------------------------

    @staticmethod
    def is_active() -> bool:
        """Whether messages are to be taken: there is no pause file. Looked at every second."""
        return not lockfiles.is_paused()

    @staticmethod
    def should_stop() -> bool:
        """Whether to end: the terminate file was written since this process started. Looked at every second."""
        return lockfiles.terminate_file.is_present()

    @classmethod
    def clean_lock(cls) -> None:
        """Remove the pause file: a consumer that starts is not paused."""
        if path := lockfiles.remove_pause_file():
            cls.LOGGER.debug(f"Cleaning existing pause file: {path}")

    def make_producer(self) -> BaseProducer:
        """A producer to the same place, for dead letters and for tasks that send; made when it is first needed."""
        raise NotImplementedError

    def _connect(self) -> ConsumerClient:
        """A client; called again when one has come to its end."""
        raise NotImplementedError

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def assignment(self) -> frozenset[Partition]:
        """The partitions that this consumer has now."""
        return self._dispatch.assignment

    @property
    def counts(self) -> dict[str, int]:
        """How many messages are ``done``, and how often one ``failed``, was ``retried`` or ``dead_lettered``."""
        return {"done": self._dispatch.settled, **self._workers.counts, "dead_lettered": self._letters.written}

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Consume until SIGTERM, SIGINT or the terminate file; then commit, close the client and exit.

        What runs then is given ``shutdown_timeout`` seconds; the rest is handed back. A second signal ends at once.

        :raises SystemExit: always, with status 0, when it ends as it should; 143 after a second SIGTERM.
        :raises KeyboardInterrupt: at a second SIGINT, or one that a task raised; its message is not committed.
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
        """One turn in this thread, for tests: look at the control files, poll, handle what there is, commit.

        :param timeout: seconds to wait for messages when there are none.
        :return: how many messages were handled, within about a second.
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
        """End after what is being handled. May be called from any thread or signal handler."""
        self._workers.stopping = True
        self._stopping = True

    def close(self) -> None:
        """Commit what is done, leave the group and let go of the client."""
        with ExitStack() as last_to_first:
            last_to_first.callback(self._let_go)
            self._stopping = True
            last_to_first.callback(self._lending.close)
            self._workers.end()
            # As long as there is a producer.
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
            self.LOGGER.warning(f"{type(self).__name__}: the Kafka client does not end; ending without it")

    def _start(self) -> None:
        self._main = threading.current_thread()
        # Before anything is begun: it may be paused, or to end, from the start.
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
        """Have a record committed before it is handled; when that takes too long, it is handled all the same."""
        if self._client_thread is None:
            self._poller.commit()
        else:
            # Until the group knows that it is finished.
            self._dispatch.wait_for_change(CLIENT_TIMEOUT, lambda: job.progress.is_committed(job.record.offset))

    def _handle(self, value: Any) -> None:
        try:
            data: Any = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            # The registry refuses it, and tells its hooks.
            data = value
        registry = self.REGISTRY
        if self._lending.lend_to_new(registry) and self._client_thread is not None:
            self._beside.start()
        registry.run(data)

    # -- the thread that watches ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._watch_until_stopped()
        except Exception as exc:
            # What looks at the control files may be the user's own; nobody would see the end coming without it.
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
                    f"{type(self).__name__}: offset {job.record.offset} of {job.place} still runs {when}: it is handed"
                    " back, and will be run again"
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
        """End the process when the main thread does not come out of a message: all the rest is in order by then."""
        if self._main is not threading.main_thread() or self._interrupts.get_out(lambda: self._working):
            return
        self._join_client()
        self._let_go()
        self.LOGGER.warning(
            f"{type(self).__name__}: the main thread does not come out of its message: ending without it"
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
                raise RuntimeError("the thread that owns the Kafka client has ended; the log says why")
            self._interrupts.wait(WATCH)

    def _look(self) -> None:
        """Look at the control files, when it is time."""
        if self._clock() - self._last_look < TICK:
            return
        self._last_look = self._clock()
        # Only ever set: a signal may arrive while the file is looked at.
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
        """Wait for what runs; the thread that watches gives up what takes too long."""
        while self._dispatch.running():
            self._dispatch.wait_for_change(WATCH, lambda: not self._dispatch.running())
