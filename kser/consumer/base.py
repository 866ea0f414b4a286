"""The consumer that users create and run. Each transport subclasses it and connects its own client.

=============== ==================================================================================================
thread          job
=============== ==================================================================================================
main            runs tasks if there is one worker, and otherwise waits; receives the signals, which only set a flag
kser-client     owns the Kafka client (:mod:`kser.consumer.poller`)
kser-worker     runs tasks; one thread per worker if there are several (:mod:`kser.consumer.worker_pool`)
kser-supervisor checks the control files and the client thread, enforces time limits, supervises the shutdown
kser-services   runs the background services of the registries (:mod:`kser.consumer.services`)
=============== ==================================================================================================
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, ClassVar

from kser import lockfiles
from kser.consumer.admission import Admission
from kser.consumer.client import ConsumerClient, Partition, Record
from kser.consumer.client_watch import ClientWatch, stack_of
from kser.consumer.dead_letters import DeadLetterWriter
from kser.consumer.exit_status import end_with, exit_status
from kser.consumer.logs import ConsumerLogger
from kser.consumer.options import BEFORE, NEVER, ConsumerOptions
from kser.consumer.partition_table import PartitionTable
from kser.consumer.poller import CLIENT_TIMEOUT, POLL_TIMEOUT, Poller
from kser.consumer.services import BackgroundServices, SharedProducer
from kser.consumer.shutdown_signals import ShutdownSignals
from kser.consumer.takeover_host import ConsumerTakeovers
from kser.consumer.work_item import WorkItem
from kser.consumer.work_queue import WorkQueue
from kser.consumer.worker_pool import WorkerPool
from kser.controller import BaseProducer, Controller
from kser.errors import ClientStuck, SettingError
from kser.escaping import escape_lines

#: Seconds between two checks of the control files, and the maximum duration of one :meth:`BaseConsumer.step`.
CONTROL_FILE_INTERVAL = 1.0
#: Seconds between two checks of the time limits and of the stop flag.
SUPERVISE_INTERVAL = 0.1
#: Seconds between two warnings about a paused consumer.
PAUSE_REMINDER_INTERVAL = 30.0
#: Seconds to wait for the client thread at shutdown. The consumer adds ``revoke_timeout``, because a rebalance can
#: block this thread for that time.
JOIN_TIMEOUT = 5.0


class BaseConsumer:
    """A consumer that passes the messages of its topics to :attr:`REGISTRY`.

    :param topics: the topics to consume: names, and patterns that begin with ``^``.
    :param options: the options of the consumer.
    :param group: the consumer group, for the log.
    :param interval: seconds between commits; 0 commits after each message.
    :param poll_limit: ``max.poll.interval.ms`` of the client, in seconds.
    :param session: ``session.timeout.ms`` of the client, in seconds.
    :param clock: returns the time in seconds, which must never decrease.
    :raises kser.errors.SettingError: the dead-letter topic is one of ``topics``, or a pattern is invalid.
    """

    #: The controller that handles the messages: a controller class or an instance of one. You may set this attribute on
    #: a consumer instance.
    REGISTRY: Any = Controller

    #: The client's option that names the consumer group.
    GROUP_OPTION: ClassVar[str] = "group_id"
    #: The client's option that determines where a group without committed offsets starts.
    RESET_OPTION: ClassVar[str] = "auto_offset_reset"

    #: The logger of the transport's module.
    LOGGER: ClassVar[logging.Logger] = escape_lines(logging.getLogger(__name__))

    def __init__(
        self,
        topics: Iterable[str],
        options: ConsumerOptions,
        *,
        group: str | None,
        interval: float,
        poll_limit: float,
        session: float,
        clock: Callable[[], float],
    ) -> None:
        #: The options of this consumer.
        self.options = options
        self._kser_log = ConsumerLogger(self.LOGGER, type(self).__name__)
        self._kser_topics = options.subscription(topics)
        self._kser_group = group
        self._kser_commits_at_once = not interval
        self._kser_work_queue = WorkQueue(
            ordering=options.ordering,
            # With commit="before", a crash loses every record that was committed and not finished. So the queue buffers
            # no more records than the workers can run at the same time.
            max_in_flight=options.workers if options.commit == BEFORE else max(options.max_in_flight, options.workers),
            max_bytes=options.max_buffered_bytes,
            retry=options.retry,
            commit_before=options.commit == BEFORE,
            clock=clock,
            max_silence=session / 2,
        )
        self._kser_clock = clock
        self._kser_client_watch = ClientWatch(options.client_limit, clock)
        self._kser_shutdown_signals = ShutdownSignals(self.stop)
        self._kser_stopping = self._kser_closed = False
        #: The deadline of the shutdown, by the clock of the work queue; 0 before the shutdown.
        self._kser_deadline = 0.0
        self._kser_crash: Exception | None = None
        self._kser_client_thread: threading.Thread | None = None
        self._kser_supervisor: threading.Thread | None = None
        self._kser_main_thread: threading.Thread | None = None
        self._kser_shared_producer = SharedProducer(self.make_producer)
        self._kser_services = self._kser_make_services()
        self._kser_last_check = self._kser_last_reminder = self._kser_clock() - PAUSE_REMINDER_INTERVAL
        self._kser_build(interval, min(options.revoke_timeout, poll_limit / 3))
        try:
            lockfiles.running_file.open()
            self.clean_lock()
        except BaseException:
            self.close()
            raise

    def _kser_build(self, interval: float, revoke_timeout: float) -> None:
        options = self.options
        self._kser_partitions = PartitionTable(self._kser_work_queue, revoke_timeout, options.max_starts)
        self._kser_dead_letters = DeadLetterWriter(
            options.dead_letter_topic, self._kser_shared_producer.producer, type(self), self._kser_log
        )
        before_attempt = (
            self._kser_commit_before_run if options.commit == BEFORE and self._kser_commits_at_once else None
        )
        # Create the worker pool before the poller. The poller connects to the broker, and a call of stop() during that
        # time needs the worker pool.
        self._kser_worker_pool = WorkerPool(
            self._kser_work_queue,
            before_attempt,
            Admission(options.limits, lambda: self.REGISTRY, self._kser_handle),
            self._kser_dead_letters,
            options.workers,
            cluster=lambda: self._kser_poller.cluster(),
            log=self._kser_log,
        )
        self._kser_poller = Poller(
            self._kser_connect,
            self._kser_topics,
            self._kser_work_queue,
            self._kser_partitions,
            commit=options.commit,
            interval=interval,
            stall_timeout=options.stall_timeout,
            watch=self._kser_client_watch,
            log=self._kser_log,
        )
        if self._kser_poller.mode == NEVER and options.commit != NEVER:
            self._kser_log.warning(
                "without group_id no offset can be committed: after a restart, the"
                " consumer does not know which messages it has handled; set group_id"
            )

    def _kser_make_services(self) -> BackgroundServices:
        takeovers = ConsumerTakeovers(
            self._kser_work_queue,
            self.options.workers,
            self.options.retry,
            self._kser_topics,
            self._kser_may_take_over,
        )
        return BackgroundServices(self._kser_shared_producer.background_services, takeovers)

    # -- override points -----------------------------------------------------------------------------------------------

    @staticmethod
    def is_active() -> bool:
        """Return whether the consumer may fetch messages: True unless the pause file exists.

        The consumer calls this method every second.
        """
        return not lockfiles.is_paused()

    @staticmethod
    def should_stop() -> bool:
        """Return whether the consumer must stop: True if the terminate file is newer than this process.

        The consumer calls this method every second.
        """
        return lockfiles.terminate_file.is_present()

    @classmethod
    def clean_lock(cls) -> None:
        """Remove the pause file, because a consumer starts unpaused."""
        if path := lockfiles.remove_pause_file():
            cls.LOGGER.debug(f"Cleaning existing pause file: {path}")

    def make_producer(self) -> BaseProducer:
        """Create a producer for the cluster of this consumer.

        The consumer calls this method once, when a dead letter, a task or a takeover first needs the producer. For a
        takeover, the producers of kser do not connect.
        """
        raise NotImplementedError

    def _kser_connect(self) -> ConsumerClient:
        """Create a Kafka client. The poller calls this method again after a fatal error of the client."""
        raise NotImplementedError

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def assignment(self) -> frozenset[Partition]:
        """The partitions currently assigned to this consumer."""
        return self._kser_partitions.assignment

    @property
    def counts(self) -> dict[str, int]:
        """Counters of messages: ``done``, ``failed``, ``retried`` and ``dead_lettered``."""
        return {
            "done": self._kser_work_queue.finished_count,
            **self._kser_worker_pool.counts,
            "dead_lettered": self._kser_dead_letters.written,
        }

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Consume until SIGTERM, SIGINT or the terminate file; then commit, close the client and exit.

        Running messages have ``shutdown_timeout`` seconds to finish. After that time, the consumer abandons the
        attempts that still run, and their messages will run again. At a second signal, the consumer abandons all
        running attempts immediately.

        :raises SystemExit: with status 0 after an orderly shutdown, and with status 143 after a second SIGTERM. In the
            main thread, also with status 70, 76 or 78 (:class:`kser.consumer.exit_status.ExitStatus`), instead of the
            next three errors.
        :raises kser.errors.ClientStuck: the Kafka client has not returned from a call for ``client_timeout`` seconds,
            or its thread has died.
        :raises kser.errors.ClientFenced: another process has taken the group instance id of this consumer.
        :raises kser.errors.SettingError: the consumer cannot work with its settings.
        :raises KeyboardInterrupt: after a second SIGINT, or if a task raised KeyboardInterrupt. The message that ran is
            not committed.
        """
        self.LOGGER.info(f"{type(self).__name__}.Starting...")
        description = self.options.describe(self._kser_poller.mode, self._kser_group, self._kser_topics)
        self._kser_log.info(description)
        try:
            with self._kser_shutdown_signals.installed():
                try:
                    self._kser_start_or_end()
                    self._kser_worker_pool.work()
                    self.LOGGER.info("Closing consumer and exiting")
                    self._kser_worker_pool.wait_until_idle()
                    if self._kser_crash is not None:
                        end_with(self._kser_crash)
                finally:
                    self.close()
                    if self._kser_supervisor is not None:
                        self._kser_supervisor.join(JOIN_TIMEOUT)
        except KeyboardInterrupt:
            if self._kser_shutdown_signals.status == 128 + signal.SIGTERM:
                sys.exit(self._kser_shutdown_signals.status)
            raise
        finally:
            self._kser_shutdown_signals.close()
        sys.exit(0)

    def step(self, timeout: float = POLL_TIMEOUT) -> int:
        """Run one cycle in this thread, for tests: check the control files, poll, look for steps of stored operations
        that are due, handle messages, commit.

        :param timeout: seconds to wait if no message is available.
        :return: the number of handled messages. After about one second, the cycle starts no further message.
        """
        self._kser_check_control_files()
        if self._kser_stopping:
            return 0
        self._kser_shared_producer.attach(self.REGISTRY)
        self._kser_poller.poll_once(timeout)
        if self._kser_poller.final_error is not None:
            raise self._kser_poller.final_error
        self._kser_services.look()
        handled = 0
        started_at = self._kser_clock()
        while not self._kser_stopping and self._kser_worker_pool.step():
            handled += 1
            if self._kser_commits_at_once:
                self._kser_poller.commit()
            if self._kser_clock() - started_at >= CONTROL_FILE_INTERVAL:
                break
        self._kser_poller.commit_when_due()
        return handled

    def _kser_read(
        self, timeout: float, poll_timeout: float, batch: int, is_kept: Callable[[Record], bool] = lambda record: False
    ) -> Iterator[Record]:
        """Iterate over the records of the topics, up to the current end of each topic, without running their messages.

        A record counts as finished when the caller requests the next record, unless ``is_kept`` returns True for it.

        :param timeout: seconds to wait for a record or for the end offsets of the topics.
        :param poll_timeout: the longest time of one poll, in seconds.
        :param batch: the number of records between two commits.
        :param is_kept: returns whether a record stays unfinished; the next consumer of the group reads it again.
        :raises TimeoutError: the broker did not respond in time.
        """
        work_queue, poller = self._kser_work_queue, self._kser_poller
        deadline = time.monotonic() + timeout
        while True:
            queued = poller.poll_once(min(poll_timeout, timeout))
            if poller.final_error is not None:
                raise poller.final_error
            while (item := work_queue.get(0)) is not None:
                yield item.record
                deadline = time.monotonic() + timeout
                if is_kept(item.record):
                    continue
                work_queue.task_done(item)
                if work_queue.finished_count % batch == 0:
                    poller.commit()
            lag = poller.lag()
            waits = queued or self._kser_partitions.is_holding
            if not waits and self.assignment and self.assignment <= lag.keys() and max(lag.values()) <= 0:
                return
            if time.monotonic() > deadline:
                raise TimeoutError

    def stop(self) -> None:
        """Stop the consumer after the running messages. You may call this method from any thread or signal handler."""
        self._kser_worker_pool.stopping = True
        self._kser_stopping = True

    def close(self) -> None:
        """Commit finished messages, leave the group and close the client."""
        with ExitStack() as last_to_first:
            last_to_first.callback(self._kser_release_running_file)
            self._kser_stopping = True
            last_to_first.callback(self._kser_shared_producer.close)
            self._kser_worker_pool.shutdown()
            # Close the background services before the producer, because background services send messages.
            self._kser_services.close(JOIN_TIMEOUT)
            self._kser_shared_producer.detach()
            if self._kser_client_thread is None:
                self._kser_poller.close()
            else:
                if self._kser_shutdown_signals.status is not None or not self._kser_deadline:
                    self._kser_deadline = self._kser_clock()
                self._kser_poller.stop(self._kser_deadline)
                self._kser_join_client()

    def _kser_release_running_file(self) -> None:
        if not self._kser_closed:
            self._kser_closed = True
            lockfiles.running_file.close()

    def _kser_join_client(self) -> None:
        assert self._kser_client_thread is not None
        if self._kser_client_watch.is_overdue():
            # The client thread has already had more time than this method waits.
            timeout = 0.0
        else:
            timeout = max(self._kser_deadline - self._kser_clock(), 0) + self.options.revoke_timeout + JOIN_TIMEOUT
        self._kser_client_thread.join(timeout)
        if self._kser_client_thread.is_alive():
            self._kser_log.warning("the Kafka client did not close in time; the consumer ends without it")

    def _kser_start(self) -> None:
        self._kser_main_thread = threading.current_thread()
        # Check the control files before the threads start. Otherwise, the consumer could start a message although a
        # control file was created after the constructor removed the pause file.
        self._kser_check_control_files()
        self._kser_shared_producer.attach(self.REGISTRY)
        self._kser_client_thread = threading.Thread(target=self._kser_poller.run, name="kser-client", daemon=True)
        self._kser_client_thread.start()
        self._kser_worker_pool.start()
        self._kser_services.start()
        self._kser_supervisor = threading.Thread(target=self._kser_supervise, name="kser-supervisor", daemon=True)
        self._kser_supervisor.start()

    def _kser_start_or_end(self) -> None:
        try:
            self._kser_start()
        except SettingError as error:
            self._kser_log.error(f"{error.message}; the consumer ends")
            end_with(error)

    def _kser_commit_before_run(self, item: WorkItem) -> None:
        """Wait until the offset of the record is committed.

        If the group does not confirm the commit within ``CLIENT_TIMEOUT`` seconds, the attempt starts anyway.
        """
        if self._kser_client_thread is None:
            self._kser_poller.commit()
        else:
            # Only the client thread commits, so this thread waits. The offset counts as committed when the group has
            # confirmed the commit.
            self._kser_work_queue.waiters.wait(lambda: item.tracker.is_committed(item.record.offset), CLIENT_TIMEOUT)

    def _kser_may_take_over(self) -> bool:
        """Return whether the consumer may take over steps: it is neither paused nor ending, and its client works."""
        thread, poller = self._kser_client_thread, self._kser_poller
        is_working = poller.final_error is None and (thread is None or thread.is_alive())
        return is_working and not (self._kser_stopping or poller.paused)

    def _kser_handle(self, value: Any) -> None:
        try:
            data: Any = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            # Pass the undecodable bytes on, because the controller rejects them and calls ``onerror``.
            data = value
        registry = self.REGISTRY
        if self._kser_shared_producer.attach_if_changed(registry) and self._kser_client_thread is not None:
            self._kser_services.start()
        registry.run(data)

    # -- the supervisor thread -----------------------------------------------------------------------------------------

    def _kser_supervise(self) -> None:
        try:
            self._kser_supervise_until_stopped()
        except Exception as exc:
            # An override of is_active or should_stop in a user's class may raise an exception, which ends the
            # supervisor thread. Without this thread, the consumer would not notice a request to stop. So stop the
            # consumer now, and let run() raise the exception.
            self._kser_crash = exc
            self.stop()
        self._kser_deadline = self._kser_clock() + self.options.shutdown_timeout
        # Close the work queue before the poller stops fetching, because a poll that is under way may still return
        # records, and an idle worker would start them.
        self._kser_worker_pool.shutdown()
        self._kser_poller.shutting_down = True
        self._kser_wait_for_running()
        for item in self._kser_work_queue.running():
            if self._kser_work_queue.abandon(item.attempt):
                limit = f"after shutdown_timeout ({self.options.shutdown_timeout:g} s)"
                when = limit if self._kser_shutdown_signals.status is None else "at the second signal"
                self._kser_log.warning(
                    f"the message at {item.place} still runs {when}: its attempt is"
                    " abandoned, and the message will run again"
                )
        self._kser_poller.stop(self._kser_deadline)
        self._kser_force_exit()

    def _kser_wait_for_running(self) -> None:
        while self._kser_work_queue.running() and self._kser_clock() < self._kser_deadline:
            if self._kser_shutdown_signals.status is not None:
                self._kser_deadline = self._kser_clock()
            self._kser_worker_pool.enforce_time_limits()
            self._kser_work_queue.waiters.wait(lambda: not self._kser_work_queue.running(), SUPERVISE_INTERVAL)

    def _kser_force_exit(self) -> None:
        """Force the process to exit if a task still blocks the main thread; everything else has been shut down."""
        if self._kser_main_thread is not threading.main_thread() or self._kser_shutdown_signals.interrupt_main_thread(
            lambda: self._kser_worker_pool.is_working
        ):
            return
        self._kser_join_client()
        self._kser_release_running_file()
        self._kser_log.warning("a message still blocks the main thread; forcing the process to exit")
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(self._kser_shutdown_signals.status or exit_status(self._kser_crash) or 0)

    def _kser_supervise_until_stopped(self) -> None:
        client_thread = self._kser_client_thread
        assert client_thread is not None
        while not self._kser_stopping:
            self._kser_check_control_files()
            self._kser_worker_pool.enforce_time_limits()
            if not self._kser_stopping:
                self._kser_check_client(client_thread)
            self._kser_shutdown_signals.wait(SUPERVISE_INTERVAL)

    def _kser_check_client(self, client_thread: threading.Thread) -> None:
        """Check that the client thread works.

        :raises kser.errors.KserError: the error that ends the consumer.
        """
        # Read this first, because the thread stores its final error before it ends.
        is_alive = client_thread.is_alive()
        if self._kser_poller.final_error is not None:
            raise self._kser_poller.final_error
        if not is_alive:
            raise ClientStuck("the Kafka client thread has ended unexpectedly; see the log for the cause")
        if self._kser_client_watch.is_overdue():
            line, stack = stack_of(client_thread.ident)
            limit = self._kser_client_watch.limit
            text = f"the Kafka client has not returned for {limit:g} s (client_timeout) from {line}"
            self._kser_log.error(f"{text}; the consumer ends")
            self._kser_log.debug(f"the stack of the Kafka client thread:\n{stack}")
            raise ClientStuck(text)

    def _kser_check_control_files(self) -> None:
        """Check the control files, at most once per ``CONTROL_FILE_INTERVAL``."""
        if self._kser_clock() - self._kser_last_check < CONTROL_FILE_INTERVAL:
            return
        self._kser_last_check = self._kser_clock()
        # This method never clears the stop flag; otherwise a signal that arrives during the check would be lost.
        if self.should_stop():
            self.stop()
        paused = not self.is_active()
        self._kser_poller.paused = paused
        self._kser_work_queue.pause(paused)
        if paused and self._kser_clock() - self._kser_last_reminder >= PAUSE_REMINDER_INTERVAL:
            self._kser_last_reminder = self._kser_clock()
            self.LOGGER.warning("Consumer is paused")
        self._kser_shared_producer.attach(self.REGISTRY)
