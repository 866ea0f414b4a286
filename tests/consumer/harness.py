"""Shared harness of the consumer tests: a scripted task on the in-memory transport."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from cdumay_result import Result

from kser.consumer.client import Commit, Partition, RebalanceListener, Record
from kser.consumer.options import NEVER
from kser.dummy.broker import DummyClient, InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.errors import ClientError
from kser.sequencing.task import Task
from tests.support import Clock, message

AT_ONCE = {"enable_auto_commit": False}

DICE = Partition("dice", 0)

#: Seconds that something may take which happens in another thread.
PATIENCE = 20


class Act(Task):
    """Does what the test put into ``acts`` under its uuid: raises or calls it. Of a list, each attempt does one."""

    acts: ClassVar[dict[str, Any]] = {}
    seen: ClassVar[list[str]] = []

    def run(self) -> Any:
        self.seen.append(self.uuid)
        act = self.acts.get(self.uuid)
        if isinstance(act, list):
            act = act.pop(0) if act else None
        if isinstance(act, BaseException):
            raise act
        found = act() if callable(act) else act
        return found if isinstance(found, Result) else None


def put(*uuids: str, cls: Any = Act, key: bytes | None = None, partition: int | None = None) -> None:
    """Send a message for each uuid."""
    for uuid in uuids:
        InMemoryBroker.at("").send("dice", message(cls, uuid=uuid).dumps().encode(), key=key, partition=partition)


def consumer_of(config: Mapping[str, Any] | None = None, **options: Any) -> Consumer:
    """A consumer of the topic ``dice``."""
    return Consumer(config or {}, ["dice"], **options)


def committed(partition: int = 0) -> int | None:
    """Where the group is in the topic ``dice``; None when it has not begun there."""
    commit = InMemoryBroker.at("").committed.get(("dummy", Partition("dice", partition)))
    return None if commit is None else commit.offset


def until(done: Callable[[], Any]) -> None:
    """Wait for what happens in another thread."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Running:
    """A consumer, its time, and what it handled."""

    def __init__(self, **options: Any) -> None:
        self.consumer: Consumer = consumer_of(AT_ONCE, **options)
        self.clock = Clock(self.consumer)

    def attempts(self, *seconds: float) -> list[int]:
        """How many attempts are made now, and each time that so many seconds have passed."""
        found = [self.consumer.step(timeout=0)]
        for wait in seconds:
            self.clock.pass_by(wait)
            found.append(self.consumer.step(timeout=0))
        return found


class Client(DummyClient):
    """A member of the group that gets into the trouble that a test names, by what it is doing then."""

    def __init__(self, broker: InMemoryBroker, group: str | None, *, commits: bool = True) -> None:
        super().__init__(broker, group, commits=commits)
        self.trouble: dict[str, Any] = {}
        #: The timeout, the limit and the held partitions of each poll.
        self.polls: list[tuple[float, int, Collection[Partition]]] = []
        self.commits: list[Mapping[Partition, Commit]] = []
        self.closed = 0

    def subscribe(self, topics: Iterable[str], listener: RebalanceListener) -> None:
        self._raise("subscribe")
        super().subscribe(topics, listener)

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        self.polls.append((timeout, limit, set(paused)))
        self._raise("poll")
        return super().poll(timeout, limit, paused)

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        self._raise("commit")
        self.commits.append(commits)
        super().commit(commits, timeout)

    def lag(self) -> Mapping[Partition, int]:
        self._raise("lag")
        return super().lag()

    def close(self, timeout: float) -> None:
        self.closed += 1
        if self._listener is not None:
            super().close(timeout)

    def _raise(self, activity: str) -> None:
        trouble = self.trouble.get(activity)
        if isinstance(trouble, Exception):
            raise trouble
        if trouble is not None:
            raise ClientError(trouble)


class Troubled(Consumer):
    """A consumer whose clients are at hand, the one in use being the last of them."""

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        self.clients: list[Client] = []
        #: The trouble that a client has from its beginning.
        self.first_trouble: dict[str, Any] = options.pop("first_trouble", {})
        super().__init__(config or {}, ["dice"], **options)

    def _kser_connect(self) -> Client:
        self.clients.append(Client(self.client, self._kser_group, commits=self.options.commit != NEVER))
        self.clients[-1].trouble = dict(self.first_trouble)
        return self.clients[-1]

    @property
    def used(self) -> Client:
        """The client in use."""
        return self.clients[-1]


class InThread:
    """A consumer that runs in a thread of its own while inside; ended at the latest with the block."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        #: What it ended with.
        self.ending: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.consumer.run()
        except BaseException as exc:
            self.ending = exc

    def __enter__(self) -> InThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.consumer.stop()
        self.join()

    def join(self) -> BaseException | None:
        """Wait for its end; returns what it ended with."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "it did not end"
        return self.ending
