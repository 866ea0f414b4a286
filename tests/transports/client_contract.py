"""Contract tests of a transport client for a consumer, run against each transport."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from threading import Event
from typing import Any, ClassVar

import pytest

from kser.consumer.client import Commit, ConsumerClient, Partition, RebalanceListener, Record
from kser.consumer.offsets import METADATA_LIMIT, PREFIX
from kser.errors import ClientError

PATIENCE = 30


class BrokerHarness(ABC):
    """A broker, and clients of one kind for it."""

    #: Whether a client without a group can be had.
    groupless: ClassVar[bool] = True

    @abstractmethod
    def new_topic(self, partitions: int = 1) -> str:
        """A topic that nobody has sent to, with at least so many partitions."""

    @abstractmethod
    def send(self, topic: str, *values: str, partition: int = 0) -> None:
        """Send records; they have arrived when it returns."""

    @abstractmethod
    def client(self, group: str | None, reset: str = "earliest", *, commits: bool = True, **options: Any) -> Any:
        """A client, to be closed."""

    @abstractmethod
    def committed(self, group: str, key: Partition) -> Commit | None:
        """Where a group is, asked from outside."""


def plain(commit: Commit) -> Commit:
    """A commit without what clients note for themselves, and without its seal."""
    words = commit.metadata.partition(";")[0].split()
    return Commit(commit.offset, " ".join(word for word in words if word.startswith(PREFIX)))


class Drain:
    """Partitions on their way out, until an event says that they are drained."""

    def __init__(self, member: Member, keys: Collection[Partition]) -> None:
        self._member = member
        self._keys = keys

    @property
    def drained(self) -> bool:
        return self._member.drained.is_set()

    def wait(self) -> None:
        self._member.drained.wait(PATIENCE)

    def commits(self) -> Mapping[Partition, Commit]:
        self._member.waited = self.drained
        return {key: commit for key, commit in self._member.finished.items() if key in self._keys}


class Member(RebalanceListener):
    """A client, its events and its records."""

    def __init__(self, client: ConsumerClient, topic: str) -> None:
        self.client = client
        #: The partitions that it has, and where they began.
        self.starts: dict[Partition, Commit] = {}
        self.events: list[tuple[str, dict[Partition, Any]]] = []
        self.records: list[Record] = []
        #: What to commit when partitions are given up, once they are drained.
        self.finished: dict[Partition, Commit] = {}
        self.drained = Event()
        self.drained.set()
        #: Whether what was committed last was asked for when everything had ended.
        self.waited = True
        self.closed = False
        #: Whether errors are expected.
        self.patient = False
        client.subscribe([topic], self)

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        self._add("assign", starts)

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        self._add("reset", starts)

    def on_revoke(self, partitions: Collection[Partition]) -> Drain:
        keys = set(partitions)
        self._forget("revoke", keys)
        return Drain(self, keys)

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self._forget("lost", set(partitions))

    def _add(self, event: str, starts: Mapping[Partition, Commit]) -> None:
        if starts:
            commits = {key: plain(start) for key, start in starts.items()}
            self.starts.update(commits)
            self.events.append((event, commits))

    def _forget(self, event: str, keys: set[Partition]) -> None:
        if keys:
            self.events.append((event, dict.fromkeys(keys)))
        for key in keys:
            self.starts.pop(key, None)

    def poll(self, timeout: float = 0.05, limit: int = 100, held: Collection[Partition] = ()) -> list[Record]:
        """Poll once; returns what came."""
        try:
            batches = self.client.poll(timeout, limit, held)
        except ClientError as error:
            if error.fatal or not self.patient:
                raise
            return []
        assert self.waited, "what runs was not waited for"
        came: list[Record] = []
        for key, records in batches.items():
            # A plain tuple will do: so kafka-python names partitions.
            assert records and all((record.topic, record.partition) == tuple(key) for record in records)
            assert Partition(*key) in self.starts, "a record of a partition that it was not told of"
            came += records
        self.records += came
        return came

    def values(self, partition: int | None = None) -> list[str]:
        """The values that came, of one partition or of all."""
        wanted = [record for record in self.records if partition in (None, record.partition)]
        return [(record.value or b"").decode() for record in wanted]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.client.close(5)


def until(
    condition: Callable[[], Any], text: str, *members: Member, seconds: float = PATIENCE, **options: Any
) -> float:
    """Let the members poll in turn until the condition holds; returns how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"{text}: not within {seconds} s; {[m.events for m in members]}"
        for member in members:
            member.poll(**options)
    return time.monotonic() - began


Join = Callable[..., Member]


class CoreClientContract:
    """Core tests of one group member; a subclass in a test module has a fixture ``world``."""

    @pytest.fixture
    def group(self) -> str:
        return f"group-{uuid.uuid4()}"

    @pytest.fixture
    def topic(self, harness: BrokerHarness) -> str:
        return harness.new_topic()

    @pytest.fixture
    def join(self, harness: BrokerHarness, group: str) -> Iterator[Join]:
        """``join(topic)`` makes a member that has subscribed; the options are those of the world's client."""
        members: list[Member] = []

        def make(topic: str, *, to: str | None = group, **options: Any) -> Member:
            members.append(Member(harness.client(to, **options), topic))
            return members[-1]

        yield make
        for member in members:
            member.drained.set()
            with suppress(ClientError):
                member.close()

    @pytest.fixture
    def key(self, topic: str) -> Partition:
        return Partition(topic, 0)

    def test_records_arrive_once_and_in_order(self, harness: BrokerHarness, join: Join, key: Partition) -> None:
        before = int(time.time() * 1000) - 1000
        values = [f"value {number}" for number in range(250)]
        harness.send(key.topic, *values)
        member = join(key.topic)
        until(lambda: len(member.records) >= 250, "all come", member)
        for _ in range(3):
            assert member.poll() == []
        assert member.values() == values
        assert [record.offset for record in member.records] == list(range(250))
        record = member.records[7]
        assert (record.topic, record.partition, record.key, record.value) == (key.topic, 0, None, b"value 7")
        assert list(record.headers) == []
        assert record.timestamp == 0 or before <= record.timestamp <= before + 60_000

    def test_poll_returns_no_more_records_than_its_limit(
        self, harness: BrokerHarness, join: Join, key: Partition
    ) -> None:
        harness.send(key.topic, *map(str, range(20)))
        member = join(key.topic)
        until(lambda: key in member.starts, "it has its partition", member, limit=3)
        while len(member.records) < 20:
            assert len(member.poll(limit=3)) <= 3
        assert member.values() == list(map(str, range(20)))

    def test_paused_partition_waits_while_others_continue(self, harness: BrokerHarness, join: Join) -> None:
        topic = harness.new_topic(2)
        member = join(topic)
        until(lambda: len(member.starts) >= 2, "it has its partitions", member)
        held = {Partition(topic, 0)}
        for round_ in range(3):
            for partition in range(2):
                harness.send(topic, f"{round_}", partition=partition)
            until(lambda: len(member.values(1)) > round_, "the other goes on", member, held=held)  # noqa: B023
        assert member.values(0) == []
        until(lambda: len(member.values(0)) == 3, "it goes on", member)
        assert member.values(0) == member.values(1) == ["0", "1", "2"]

    def test_poll_with_limit_zero_keeps_the_position(self, harness: BrokerHarness, join: Join, key: Partition) -> None:
        harness.send(key.topic, *map(str, range(10)))
        member = join(key.topic)
        until(lambda: member.records, "the first come", member, limit=2)
        for _ in range(3):
            for _ in range(5):
                assert member.poll(limit=0) == []
            member.poll(limit=2)
        until(lambda: len(member.records) >= 10, "all come", member)
        assert member.values() == list(map(str, range(10)))

    @pytest.mark.parametrize(("reset", "expected"), [("earliest", 0), ("latest", 3)])
    def test_new_group_commits_its_start_position_first(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition, reset: str, expected: int
    ) -> None:
        harness.send(key.topic, "0", "1", "2")
        member = join(key.topic, reset=reset)
        until(lambda: key in member.starts, "it has its partition", member, limit=0)
        assert member.events[0][0] == "reset"
        assert member.starts[key] == Commit(expected) == harness.committed(group, key)
        harness.send(key.topic, "3")
        until(lambda: "3" in member.values(), "the last one comes", member)
        assert member.values() == ["0", "1", "2", "3"][expected:]

    @pytest.mark.parametrize("reset", ["earliest", "latest"])
    def test_group_resumes_from_its_committed_offset_and_metadata(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition, reset: str
    ) -> None:
        harness.send(key.topic, *map(str, range(5)))
        first = join(key.topic)
        until(lambda: len(first.records) == 5, "all come", first)
        first.client.commit({key: Commit(2, "kser:1,1")}, 5)
        first.close()
        assert harness.committed(group, key) == Commit(2, "kser:1,1"), "closing commits nothing"
        second = join(key.topic, reset=reset)
        until(lambda: len(second.records) >= 3, "they come", second)
        assert second.events[0] == ("assign", {**second.events[0][1], key: Commit(2, "kser:1,1")})
        assert second.values() == ["2", "3", "4"]


class ClientContract(CoreClientContract):
    """All tests of one group member."""

    def test_records_sent_after_the_join_arrive_in_order(
        self, harness: BrokerHarness, join: Join, key: Partition
    ) -> None:
        member = join(key.topic)
        until(lambda: key in member.starts, "it has its partition", member)
        for number in range(3):
            harness.send(key.topic, str(number))
            until(lambda: len(member.records) > number, "it comes", member)  # noqa: B023
        assert member.values() == ["0", "1", "2"]

    def test_poll_waits_no_longer_than_its_timeout(self, join: Join, key: Partition) -> None:
        member = join(key.topic)
        until(lambda: key in member.starts, "it has its partition", member)
        member.poll()
        for limit in (0, 10):
            began = time.monotonic()
            member.poll(timeout=0.3, limit=limit)
            assert 0.2 < time.monotonic() - began < 1

    def test_metadata_of_maximum_length_is_committed(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition
    ) -> None:
        member = join(key.topic)
        until(lambda: key in member.starts, "it has its partition", member)
        commit = Commit(0, "kser:" + "1," * ((METADATA_LIMIT - 5) // 2))
        member.client.commit({key: commit}, 5)
        assert harness.committed(group, key) == commit

    def test_client_without_commits_records_no_start_position(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition
    ) -> None:
        harness.send(key.topic, "0")
        member = join(key.topic, commits=False)
        assert not member.client.can_commit
        until(lambda: member.records, "it comes", member)
        assert harness.committed(group, key) is None

    def test_client_without_a_group_reads_everything_and_commits_nothing(
        self, harness: BrokerHarness, join: Join, key: Partition
    ) -> None:
        if not harness.groupless:
            pytest.skip("the client requires a group")
        harness.send(key.topic, "0", "1")
        member = join(key.topic, to=None)
        assert not member.client.can_commit
        batches: dict[Any, Any] = {}
        deadline = time.monotonic() + PATIENCE
        while not batches and time.monotonic() < deadline:
            batches = dict(member.client.poll(0.05, 10, ()))
        assert [[record.value for record in records] for records in batches.values()] == [[b"0", b"1"]]

    def test_lag_counts_the_records_not_yet_returned(self, harness: BrokerHarness, join: Join, key: Partition) -> None:
        harness.send(key.topic, *map(str, range(10)))
        member = join(key.topic)
        until(lambda: len(member.records) >= 4, "some come", member, limit=1)
        until(lambda: member.client.lag()[key] == 6, "the rest is ahead", member, limit=0)
        until(lambda: len(member.records) == 10, "all come", member)
        until(lambda: member.client.lag()[key] == 0, "none is ahead", member)
