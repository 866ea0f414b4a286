"""The consumer loop: poll, dispatch, commit. Every transport's consumer is one of these around its client.

In this version the thread that polls also runs the tasks, one at a time. Between two tasks it still polls at least once
a second, so only a single task that takes longer than ``max_poll_interval_ms`` costs the consumer its partitions.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, ClassVar

from kser import lockfiles
from kser.consumer.client import ConsumerClient, Partition, Record
from kser.consumer.offsets import OffsetTracker
from kser.controller import BaseProducer, Controller
from kser.errors import ClientTrouble, SettingError

#: Seconds that a poll waits for records: how long a signal or a terminate file may go unnoticed while idle.
POLL_TIMEOUT = 0.5
#: Seconds between two polls, and between two looks at the control files, while there is work.
TICK = 1.0
#: Seconds between two warnings that the consumer is paused.
PAUSE_REMINDER = 30.0
#: Seconds before something that the client could not do is tried again.
BACKOFF = 0.2
#: Seconds that a commit, and that closing the client, may take: a broker that is gone must not hold the end up.
CLIENT_TIMEOUT = 1.2

COMMIT_MODES = ("after", "before")


class BaseConsumer:
    """Takes messages from topics and has :attr:`REGISTRY` handle them, one after the other.

    :param client: the transport.
    :param topics: what to consume.
    :param commit: ``"after"``: an offset is committed once its message is done, so a message is handled at least once.
        ``"before"``: in the order of kser 0.8, before its message is handled, so a crash may lose it.
    :param commit_interval: seconds between commits; 0 commits at every message.
    """

    #: What handles messages: a controller class or an instance of one. May be set on the instance.
    REGISTRY: Any = Controller

    #: The logger of the transport's module.
    LOGGER: ClassVar[logging.Logger] = logging.getLogger(__name__)

    def __init__(self, client: ConsumerClient, topics: Iterable[str], *, commit: str, commit_interval: float) -> None:
        self._client = client
        self._commit_before = commit == "before"
        self._commit_interval = commit_interval
        self._clock = time.monotonic
        self._offsets = OffsetTracker()
        self._buffer: deque[Record] = deque()
        self._revoked: deque[tuple[Partition, bool]] = deque()
        self._stopping = False
        self._closing = False
        self._paused = False
        self._trouble: dict[str, str] = {}
        self._producer: BaseProducer | None = None
        self._last_poll = self._last_commit = self._clock()
        self._last_reminder = self._last_poll - PAUSE_REMINDER
        try:
            client.subscribe(topics, self._on_revoke)
        except BaseException:
            client.close(0)
            raise
        if not client.can_commit:
            self.LOGGER.warning(
                f"{type(self).__name__}: without group_id no offset can be committed: messages are handled, and what"
                " was handled before a restart is not remembered; set group_id"
            )
        self.clean_lock()

    # -- override points -----------------------------------------------------------------------------------------------

    @staticmethod
    def is_active() -> bool:
        """Whether messages are to be taken: there is no pause file. Looked at every second."""
        return not lockfiles.is_paused()

    @staticmethod
    def should_stop() -> bool:
        """Whether to end: the terminate file was written since this process started. Looked at every second."""
        return lockfiles.terminate_file.is_present()

    @staticmethod
    def clean_lock() -> None:
        """Called once when the consumer is made."""

    def make_producer(self) -> BaseProducer:
        """A producer to the same place, for tasks that send; made when the first one does."""
        raise NotImplementedError

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Consume until SIGTERM, SIGINT or the terminate file; then commit, close the client and exit.

        :raises SystemExit: always, with status 0, when it ends as it should.
        :raises KeyboardInterrupt: at a second SIGINT, or one that a task raised; its message is not committed.
        """
        self.LOGGER.info(f"{type(self).__name__}.Starting...")
        with self._signals():
            try:
                while not self._stopping:
                    self.step()
                self.LOGGER.info("Closing consumer and exiting")
            finally:
                self.close()
        sys.exit(0)

    def step(self, timeout: float = POLL_TIMEOUT) -> int:
        """One turn: look at the control files, poll, handle what there is for up to a second, commit.

        :param timeout: seconds to wait for messages when there are none.
        :return: how many messages were handled.
        """
        # Only ever set: a signal may arrive while the file is looked at.
        if self.should_stop():
            self._stopping = True
        if self._stopping:
            return 0
        self._look_at_pause()
        self._poll(timeout)
        handled = 0
        while self._buffer and not self._paused and not self._stopping:
            self._handle(self._buffer.popleft())
            handled += 1
            if self._clock() - self._last_poll >= TICK:
                break
        self._commit_when_due()
        return handled

    def stop(self) -> None:
        """End after the message that is being handled. May be called from any thread or signal handler."""
        self._stopping = True

    def close(self) -> None:
        """Commit what is done, leave the group and let go of the client."""
        with ExitStack() as last_to_first:
            last_to_first.callback(lockfiles.running_file.clear_own)
            for registry in self._registries():
                registry.return_producer(self._own_producer)
            if self._producer is not None:
                last_to_first.callback(self._producer.close)
            last_to_first.callback(self._client.close, CLIENT_TIMEOUT)
            self._commit()
            # Leaving the group gives partitions up once more: nothing is left to commit, or nobody to take it.
            self._closing = True

    def _look_at_pause(self) -> None:
        self._paused = not self.is_active()
        if self._paused and self._clock() - self._last_reminder >= PAUSE_REMINDER:
            self._last_reminder = self._clock()
            self.LOGGER.warning("Consumer is paused")

    def _poll(self, timeout: float) -> None:
        """Ask for records when there are none; otherwise only keep our place in the group."""
        hold = self._paused or bool(self._buffer)
        try:
            records = self._client.poll(0 if self._buffer and not self._paused else timeout, hold)
        except ClientTrouble as trouble:
            self._report("poll", trouble)
            time.sleep(min(BACKOFF, timeout))
            records = ()
        else:
            self._report("poll", None)
        self._last_poll = self._clock()
        rewound = self._drop_revoked()
        if rewound:
            records = [record for record in records if Partition(record.topic, record.partition) not in rewound]
        for record in records:
            self._offsets.received(record)
        self._buffer.extend(records)
        self._lend_producer()

    def _handle(self, record: Record) -> None:
        if self._commit_before:
            self._done(record)
        value = record.value
        try:
            data: Any = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            # The registry refuses it, and tells its hooks.
            data = value
        try:
            self.REGISTRY.run(data)
        except Exception:
            self.LOGGER.exception(
                f"{type(self).__name__}: the registry raised at offset {record.offset} of {record.topic}"
                f"[{record.partition}]; the message counts as handled"
            )
        if not self._commit_before:
            self._done(record)

    def _done(self, record: Record) -> None:
        self._offsets.done(record)
        if not self._commit_interval:
            self._commit()

    # -- commits -------------------------------------------------------------------------------------------------------

    def _commit_when_due(self) -> None:
        if self._clock() - self._last_commit >= self._commit_interval:
            self._commit()

    def _commit(self) -> None:
        self._drop_revoked()
        offsets = self._offsets.committable() if self._client.can_commit else {}
        self._last_commit = self._clock()
        if not offsets:
            return
        try:
            self._client.commit(offsets, CLIENT_TIMEOUT)
        except ClientTrouble as trouble:
            # Not done with: they stay committable, and what is never committed is handed out again.
            self._report("commit", trouble)
            return
        self._report("commit", None)
        self._offsets.committed(offsets)
        if not self._commit_interval:
            self.LOGGER.debug(f"{type(self).__name__}: Manual commit done.")

    def _on_revoke(self, partitions: Collection[Partition], *, lost: bool) -> Mapping[Partition, int]:
        """May run in the client's thread: the rest waits in ``_revoked`` for the loop's own."""
        self._revoked.extend((partition, lost) for partition in partitions)
        if lost or self._closing or not self._client.can_commit:
            return {}
        return self._offsets.committable(among=partitions)

    def _drop_revoked(self) -> Collection[Partition]:
        """Forget records that somebody else will get, or that we shall get again; returns the partitions rewound."""
        if not self._revoked:
            return ()
        # One by one, because the client's thread may add to them meanwhile.
        revoked = dict(self._revoked.popleft() for _ in range(len(self._revoked)))
        resume_at = self._offsets.resume_at([partition for partition, lost in revoked.items() if not lost])
        self._offsets.forget(revoked)
        kept = (record for record in self._buffer if Partition(record.topic, record.partition) not in revoked)
        self._buffer = deque(kept)
        return self._client.rewind(resume_at)

    # -- surroundings --------------------------------------------------------------------------------------------------

    def _report(self, activity: str, trouble: ClientTrouble | None) -> None:
        """Log once when the client gets into trouble, when that changes, and when it is out of it."""
        text = trouble.message if trouble else ""
        if text != self._trouble.get(activity, ""):
            self._trouble[activity] = text
            if text:
                self.LOGGER.error(f"{type(self).__name__}: {text}; trying again")
            else:
                self.LOGGER.info(f"{type(self).__name__}: the Kafka client can {activity} again")

    def _registries(self) -> Iterator[Any]:
        """The registries of the classes that this consumer runs now."""
        for entrypoint in list(getattr(self.REGISTRY, "ENTRYPOINTS", {}).values()):
            registry = getattr(entrypoint, "_kser_registry", None)
            if registry is not None:
                yield registry

    def _lend_producer(self) -> None:
        """Let the classes that this consumer runs send with its own connection.

        At each poll: classes are added, and other consumers of this process lend theirs and take them back.
        """
        for registry in self._registries():
            registry.borrow_producer(self._own_producer)

    def _own_producer(self) -> BaseProducer:
        if self._producer is None:
            self._producer = self.make_producer()
        return self._producer

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the loop while inside, a second SIGINT interrupts; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        interrupted = False

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted
            if number == signal.SIGINT and interrupted:
                raise KeyboardInterrupt
            interrupted = number == signal.SIGINT or interrupted
            self.stop()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def check_commit_mode(commit: str) -> None:
    """Refuse what is no commit mode.

    :raises kser.errors.SettingError: it is none.
    """
    if commit not in COMMIT_MODES:
        raise SettingError(f"commit must be one of {', '.join(map(repr, COMMIT_MODES))}; it is {commit!r}")
