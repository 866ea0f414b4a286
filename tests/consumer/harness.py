"""Shared harness of the consumer tests: a scripted task on the in-memory transport."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from cdumay_result import Result

from kser.consumer.client import Commit, Partition, RebalanceListener, Record
from kser.consumer.offsets import PREFIX
from kser.consumer.options import NEVER
from kser.consumer.starts import STARTS_PREFIX
from kser.consumer.work_item import WorkItem
from kser.dummy.broker import DummyClient, InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.errors import ClientError
from kser.retry import Retry
from kser.sequencing.task import Task
from tests.support import WAIT_SECONDS, Clock, message

#: Client options for a commit after each message.
MANUAL_COMMIT = {"enable_auto_commit": False}

#: Client options for a commit interval that is longer than any test.
NO_INTERVAL_COMMIT = {"auto_commit_interval_ms": 600_000}

#: A retry policy with three attempts, ten seconds apart.
THREE_ATTEMPTS = Retry(max_attempts=3, delay=10, backoff=1, jitter=False)

DICE = Partition("dice", 0)


class ScriptedTask(Task):
    """A task with a scripted action per uuid: an exception or a function; a list has an action per attempt."""

    script: ClassVar[dict[str, Any]] = {}
    #: The uuid of each attempt, in the order of the attempts.
    ran: ClassVar[list[str]] = []

    def run(self) -> Any:
        self.ran.append(self.uuid)
        action = self.script.get(self.uuid)
        if isinstance(action, list):
            action = action.pop(0) if action else None
        if isinstance(action, BaseException):
            raise action
        value = action() if callable(action) else action
        return value if isinstance(value, Result) else None


def send_messages(*uuids: str, cls: Any = ScriptedTask, key: bytes | None = None, partition: int | None = None) -> None:
    """Send a message with each uuid to the topic ``dice``."""
    for uuid in uuids:
        InMemoryBroker.at("").send("dice", message(cls, uuid=uuid).dumps().encode(), key=key, partition=partition)


def new_consumer(config: Mapping[str, Any] | None = None, **options: Any) -> Consumer:
    """Return a consumer of the topic ``dice``."""
    return Consumer(config or {}, ["dice"], **options)


def committed(partition: int = 0) -> int | None:
    """Return the committed offset of a partition of the topic ``dice``, None if there is none."""
    commit = InMemoryBroker.at("").committed.get(("dummy", Partition("dice", partition)))
    return None if commit is None else commit.offset


class SteppedConsumer:
    """A consumer that commits after each message, and the clock that it reads."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.consumer: Consumer = new_consumer(MANUAL_COMMIT, clock=self.clock, **options)

    def attempts(self, *delays: float) -> list[int]:
        """Return the number of attempts of a step now, and of one more step after each delay in seconds."""
        counts = [self.consumer.step(timeout=0)]
        for seconds in delays:
            self.clock.advance(seconds)
            counts.append(self.consumer.step(timeout=0))
        return counts


class Poll(NamedTuple):
    """The arguments of one poll of a client."""

    timeout: float
    limit: int
    paused: Collection[Partition]


def without_starts(commit: Commit) -> Commit:
    """Return a commit without the count of starts."""
    return Commit(commit.offset, " ".join(w for w in commit.metadata.split() if not w.startswith(STARTS_PREFIX)))


class FaultyClient(DummyClient):
    """A group member whose methods raise the faults that a test sets."""

    def __init__(self, broker: InMemoryBroker, group: str | None, *, commits: bool = True) -> None:
        super().__init__(broker, group, commits=commits)
        #: The fault of each method by its name: an exception, or the text of a :class:`ClientError`.
        self.faults: dict[str, Any] = {}
        self.polls: list[Poll] = []
        #: The commits of finished records, without the counts of starts.
        self.commits: list[Mapping[Partition, Commit]] = []
        #: The metadata of each commit, with the counts of starts.
        self.committed_metadata: list[str] = []
        self.closed = 0

    def subscribe(self, topics: Iterable[str], listener: RebalanceListener) -> None:
        self._raise_fault("subscribe")
        super().subscribe(topics, listener)

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        self.polls.append(Poll(timeout, limit, set(paused)))
        self._raise_fault("poll")
        return super().poll(timeout, limit, paused)

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        self._raise_fault("commit")
        self.committed_metadata += [commit.metadata for commit in commits.values()]
        if not all(commit.word(STARTS_PREFIX) and not commit.word(PREFIX) for commit in commits.values()):
            self.commits.append({key: without_starts(commit) for key, commit in commits.items()})
        super().commit(commits, timeout)

    def lag(self) -> Mapping[Partition, int]:
        self._raise_fault("lag")
        return super().lag()

    def close(self, timeout: float) -> None:
        self.closed += 1
        if self._listener is not None:
            super().close(timeout)

    def _raise_fault(self, method: str) -> None:
        fault = self.faults.get(method)
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            raise ClientError(fault)


class FaultyConsumer(Consumer):
    """A consumer whose clients have faults, and whose cycle a test can run in parts: fetch, start, run and commit.

    :param initial_faults: the faults of each new client.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        initial_faults: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        #: All clients; the last one is in use.
        self.clients: list[FaultyClient] = []
        self._initial_faults = dict(initial_faults or {})
        super().__init__(config or {}, ["dice"], **options)

    def _kser_connect(self) -> FaultyClient:
        self.clients.append(FaultyClient(self.client, self._kser_group, commits=self.options.commit != NEVER))
        self.clients[-1].faults = dict(self._initial_faults)
        return self.clients[-1]

    @property
    def current_client(self) -> FaultyClient:
        """The client in use."""
        return self.clients[-1]

    @property
    def in_flight(self) -> int:
        """The number of records in flight."""
        return self._kser_work_queue.in_flight

    @property
    def is_shutting_down(self) -> bool:
        """True if the graceful shutdown has started."""
        return self._kser_poller.shutting_down

    def poll(self, timeout: float = 0) -> int:
        """Poll and commit once, as the client thread does; return the number of fetched records."""
        return self._kser_poller.poll_once(timeout)

    def commit(self) -> None:
        """Commit the finished records."""
        self._kser_poller.commit()

    def start_record(self) -> WorkItem:
        """Start the next record without running it."""
        item = self._kser_work_queue.get(0)
        assert item is not None, "no record is ready"
        return item

    def run_started(self, item: WorkItem) -> None:
        """Run a record that :meth:`start_record` has started."""
        self._kser_worker_pool._attempt(item)

    def run_record(self) -> bool:
        """Start and run the next record, as a worker does; return False if no record is ready."""
        return self._kser_worker_pool.step()


def worker_threads() -> list[threading.Thread]:
    """Return the running worker threads of this process."""
    return [thread for thread in threading.enumerate() if thread.name == "kser-worker"]


class ConsumerThread:
    """A consumer that runs in its own thread inside the ``with`` block, and stops at the end of the block."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        #: The exception that ended ``run()``, None after a normal return.
        self.ending: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.consumer.run()
        except BaseException as exc:
            self.ending = exc

    @property
    def is_running(self) -> bool:
        """True until ``run()`` has ended."""
        return self._thread.is_alive()

    def __enter__(self) -> ConsumerThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.consumer.stop()
        self.join()

    def join(self) -> BaseException | None:
        """Wait for the end of ``run()``, and return its exception."""
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive(), "the consumer did not end"
        return self.ending
