"""Contract tests of the client of a consumer: one member of a group."""

from __future__ import annotations

import logging
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
from tests.support import lines

#: Seconds to wait for records, or for a rebalance on a real broker.
BROKER_SECONDS = 30
#: Seconds within which a call returns whose timeout is much shorter, also on a loaded machine.
PROMPT_SECONDS = 5


class BrokerHarness(ABC):
    """A broker, and clients of one kind for it."""

    #: True if the client supports reading without a group.
    groupless: ClassVar[bool] = True
    #: True if a rebalance revokes all partitions, False if it revokes only those that move.
    eager: ClassVar[bool] = True

    @abstractmethod
    def new_topic(self, partitions: int = 1) -> str:
        """Create a topic with at least ``partitions`` partitions and without records."""

    @abstractmethod
    def send(self, topic: str, *values: str, partition: int = 0) -> None:
        """Send records, and wait until the broker has them."""

    @abstractmethod
    def client(self, group: str | None, reset: str = "earliest", *, commits: bool = True, **options: Any) -> Any:
        """Return a client, which the caller closes."""

    @abstractmethod
    def committed(self, group: str, key: Partition) -> Commit | None:
        """Return the committed offset and metadata of a group, read by another client."""

    @abstractmethod
    def written(self, group: str, key: Partition) -> Commit:
        """Return the committed offset of a group with its metadata as the broker has stored it."""

    @abstractmethod
    def move(self, group: str, key: Partition, commit: Commit) -> None:
        """Commit an offset for a group without members, with this metadata, as MirrorMaker or an administrator does."""

    @abstractmethod
    def create_again(self, topic: str, partitions: int = 1) -> None:
        """Delete a topic, and create a topic with the same name."""


def without_client_notes(commit: Commit) -> Commit:
    """Return a commit without its checksum and without the metadata that clients add for themselves."""
    words = commit.metadata.partition(";")[0].split()
    return Commit(commit.offset, " ".join(word for word in words if word.startswith(PREFIX)))


class Drain:
    """The drain of revoked partitions, which ends when the test sets ``Member.drained``."""

    def __init__(self, member: Member, keys: Collection[Partition]) -> None:
        self._member = member
        self._keys = keys

    @property
    def drained(self) -> bool:
        return self._member.drained.is_set()

    def wait(self) -> None:
        self._member.drained.wait(BROKER_SECONDS)

    def commits(self) -> Mapping[Partition, Commit]:
        self._member.commit_followed_drain = self.drained
        return {key: commit for key, commit in self._member.finished.items() if key in self._keys}


class Member(RebalanceListener):
    """A group member: a client, and the events and records that it received."""

    def __init__(self, client: ConsumerClient, topic: str) -> None:
        self.client = client
        #: The assigned partitions with their start positions.
        self.starts: dict[Partition, Commit] = {}
        self.events: list[tuple[str, dict[Partition, Any]]] = []
        self.records: list[Record] = []
        #: The commits of the assigned partitions, for a revocation.
        self.finished: dict[Partition, Commit] = {}
        self.drained = Event()
        self.drained.set()
        #: False after a client requested the commits of a revocation before the end of the drain.
        self.commit_followed_drain = True
        self.closed = False
        #: True if poll may raise errors that are not fatal.
        self.tolerates_errors = False
        client.subscribe([topic], self)

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        self._add("assign", starts)

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        self._add("reset", starts)

    def on_revoke(self, partitions: Collection[Partition]) -> Drain:
        keys = set(partitions)
        self._remove("revoke", keys)
        return Drain(self, keys)

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self._remove("lost", set(partitions))

    def _add(self, event: str, starts: Mapping[Partition, Commit]) -> None:
        if starts:
            commits = {key: without_client_notes(start) for key, start in starts.items()}
            self.starts.update(commits)
            self.events.append((event, commits))

    def _remove(self, event: str, keys: set[Partition]) -> None:
        if keys:
            self.events.append((event, dict.fromkeys(keys)))
        for key in keys:
            self.starts.pop(key, None)

    def poll(self, timeout: float = 0.05, limit: int = 100, held: Collection[Partition] = ()) -> list[Record]:
        """Poll once; return the records that arrived."""
        try:
            batches = self.client.poll(timeout, limit, held)
        except ClientError as error:
            if error.fatal or not (error.transient or self.tolerates_errors):
                raise
            return []
        assert self.commit_followed_drain, "the client committed a revocation before the end of the drain"
        arrived: list[Record] = []
        for key, records in batches.items():
            # Compare as tuples, because kafka-python has its own class for a partition.
            assert records and all((record.topic, record.partition) == tuple(key) for record in records)
            assert Partition(*key) in self.starts, "a record of a partition that is not assigned"
            arrived += records
        self.records += arrived
        return arrived

    def values(self, partition: int | None = None) -> list[str]:
        """Return the values that arrived, of one partition or of all partitions."""
        return [(record.value or b"").decode() for record in self.records if partition in (None, record.partition)]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.client.close(5)


def until(
    condition: Callable[[], Any], text: str, *members: Member, seconds: float = BROKER_SECONDS, **options: Any
) -> float:
    """Let the members poll in turn until the condition holds; return the duration in seconds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, (
            f"{text}: not within {seconds} s; {[member.events for member in members]}"
        )
        for member in members:
            member.poll(**options)
    return time.monotonic() - start


Join = Callable[..., Member]


class CoreClientContract:
    """The core contract of one group member; a subclass in a test module has a fixture ``harness``."""

    @pytest.fixture
    def group(self) -> str:
        return f"group-{uuid.uuid4()}"

    @pytest.fixture
    def topic(self, harness: BrokerHarness) -> str:
        return harness.new_topic()

    @pytest.fixture
    def join(self, harness: BrokerHarness, group: str) -> Iterator[Join]:
        """Return a function that creates a member subscribed to a topic, with options of the harness's client."""
        members: list[Member] = []

        def join_group(topic: str, *, to: str | None = group, **options: Any) -> Member:
            members.append(Member(harness.client(to, **options), topic))
            return members[-1]

        yield join_group
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
        until(lambda: len(member.records) >= 250, "all records arrive", member)
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
        until(lambda: key in member.starts, "the partition is assigned", member, limit=3)
        while len(member.records) < 20:
            assert len(member.poll(limit=3)) <= 3
        assert member.values() == list(map(str, range(20)))

    def test_paused_partition_waits_while_others_continue(self, harness: BrokerHarness, join: Join) -> None:
        topic = harness.new_topic(2)
        member = join(topic)
        until(lambda: len(member.starts) >= 2, "the partitions are assigned", member)
        paused = {Partition(topic, 0)}
        for round_ in range(3):
            for partition in range(2):
                harness.send(topic, f"{round_}", partition=partition)
            until(lambda: len(member.values(1)) > round_, "the other partition continues", member, held=paused)  # noqa: B023
        assert member.values(0) == []
        until(lambda: len(member.values(0)) == 3, "the paused partition continues", member)
        assert member.values(0) == member.values(1) == ["0", "1", "2"]

    def test_poll_with_limit_zero_keeps_the_position(self, harness: BrokerHarness, join: Join, key: Partition) -> None:
        harness.send(key.topic, *map(str, range(10)))
        member = join(key.topic)
        until(lambda: member.records, "the first records arrive", member, limit=2)
        for _ in range(3):
            for _ in range(5):
                assert member.poll(limit=0) == []
            member.poll(limit=2)
        until(lambda: len(member.records) >= 10, "all records arrive", member)
        assert member.values() == list(map(str, range(10)))

    @pytest.mark.parametrize(("reset", "expected"), [("earliest", 0), ("latest", 3)])
    def test_new_group_commits_its_start_position_first(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition, reset: str, expected: int
    ) -> None:
        harness.send(key.topic, "0", "1", "2")
        member = join(key.topic, reset=reset)
        until(lambda: key in member.starts, "the partition is assigned", member, limit=0)
        assert member.events[0][0] == "reset"
        assert member.starts[key] == Commit(expected) == harness.committed(group, key)
        harness.send(key.topic, "3")
        until(lambda: "3" in member.values(), "the last record arrives", member)
        assert member.values() == ["0", "1", "2", "3"][expected:]

    @pytest.mark.parametrize("reset", ["earliest", "latest"])
    def test_group_resumes_from_its_committed_offset_and_metadata(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition, reset: str
    ) -> None:
        harness.send(key.topic, *map(str, range(5)))
        first = join(key.topic)
        until(lambda: len(first.records) == 5, "all records arrive", first)
        first.client.commit({key: Commit(2, "kser:1,1")}, 5)
        first.close()
        assert harness.committed(group, key) == Commit(2, "kser:1,1"), "close must not commit"
        second = join(key.topic, reset=reset)
        until(lambda: len(second.records) >= 3, "the other records arrive", second)
        assert second.events[0] == ("assign", {**second.events[0][1], key: Commit(2, "kser:1,1")})
        assert second.values() == ["2", "3", "4"]


class ClientContract(CoreClientContract):
    """The whole contract of one group member."""

    def test_records_sent_after_the_join_arrive_in_order(
        self, harness: BrokerHarness, join: Join, key: Partition
    ) -> None:
        member = join(key.topic)
        until(lambda: key in member.starts, "the partition is assigned", member)
        for number in range(3):
            harness.send(key.topic, str(number))
            until(lambda: len(member.records) > number, "the record arrives", member)  # noqa: B023
        assert member.values() == ["0", "1", "2"]

    def test_poll_waits_no_longer_than_its_timeout(self, join: Join, key: Partition) -> None:
        member = join(key.topic)
        until(lambda: key in member.starts, "the partition is assigned", member)
        member.poll()
        for limit in (0, 10):
            start = time.monotonic()
            member.poll(timeout=0.3, limit=limit)
            assert 0.2 < time.monotonic() - start < PROMPT_SECONDS

    def test_metadata_of_maximum_length_is_committed(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition
    ) -> None:
        member = join(key.topic)
        until(lambda: key in member.starts, "the partition is assigned", member)
        commit = Commit(0, "kser:" + "1," * ((METADATA_LIMIT - 5) // 2))
        member.client.commit({key: commit}, 5)
        assert harness.committed(group, key) == commit

    # -- committed offsets that were moved -----------------------------------------------------------------------------

    @pytest.mark.parametrize("moved", [(1, "kept"), (5, "kept"), (5, "kser:1,9"), (1, "of another program")])
    def test_moved_offset_applies_without_the_metadata_beside_it(
        self,
        harness: BrokerHarness,
        join: Join,
        group: str,
        key: Partition,
        moved: tuple[int, str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        offset, metadata = moved
        harness.send(key.topic, *map(str, range(9)))
        first = join(key.topic)
        until(lambda: len(first.records) == 9, "all records arrive", first)
        first.client.commit({key: Commit(3, "kser:1,4")}, 5)
        first.close()
        kept = harness.written(group, key).metadata
        assert "kser:1,4" in kept
        harness.move(group, key, Commit(offset, kept if metadata == "kept" else metadata))
        second = join(key.topic)
        until(lambda: len(second.records) >= 9 - offset, "the records from the moved offset on arrive", second)
        assert list(second.starts.values()) == [Commit(offset)]
        assert second.values() == list(map(str, range(offset, 9)))
        warnings = [line for line in lines(caplog, logging.WARNING) if f"committed offset {offset} was not" in line]
        assert len(warnings) == (metadata == "kept") and all(str(key) in line for line in warnings)
        second.close()
        third = join(key.topic)
        until(lambda: third.starts, "the partition is assigned again", third)
        assert [line for line in lines(caplog, logging.WARNING) if "was not written" in line] == warnings

    def test_metadata_of_another_partition_is_ignored(
        self, harness: BrokerHarness, join: Join, group: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        topic = harness.new_topic(2)
        for partition in range(2):
            harness.send(topic, "0", "1", "2", partition=partition)
        keys = [Partition(topic, number) for number in range(2)]
        first = join(topic)
        until(lambda: len(first.records) == 6, "all records arrive", first)
        first.client.commit({keys[0]: Commit(0, "kser:1,2"), keys[1]: Commit(0)}, 5)
        first.close()
        harness.move(group, keys[1], harness.written(group, keys[0]))
        second = join(topic)
        until(lambda: len(second.starts) == 2, "the partitions are assigned", second)
        assert second.starts == {keys[0]: Commit(0, "kser:1,2"), keys[1]: Commit(0)}
        assert f"{keys[1]}: the metadata beside the committed offset 0" in caplog.text

    def test_start_at_a_moved_offset_voids_what_the_listener_knows(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition
    ) -> None:
        harness.send(key.topic, "0", "1", "2")
        first = join(key.topic)
        until(lambda: len(first.records) == 3, "all records arrive", first)
        first.client.commit({key: Commit(0, "kser:1,2")}, 5)
        first.close()
        harness.move(group, key, Commit(1, harness.written(group, key).metadata))
        second = join(key.topic)
        until(lambda: second.starts, "the partition is assigned", second)
        assert second.events == [("reset", {key: Commit(1)})]

    # -- topics that are created again ---------------------------------------------------------------------------------

    @pytest.mark.parametrize(("before", "after", "reset"), [(1, 1, "earliest"), (1, 3, "latest"), (3, 1, "latest")])
    def test_topic_created_again_is_consumed_from_its_beginning(
        self, harness: BrokerHarness, join: Join, before: int, after: int, reset: str
    ) -> None:
        """A client asks for the ids of its topics at least every 30 s."""
        topic = harness.new_topic(before)
        member = join(topic, reset=reset)
        until(lambda: len(member.starts) == before, "the partitions are assigned", member)
        harness.send(topic, *(f"old {number}" for number in range(5)))
        until(lambda: len(member.records) == 5, "the records of the old topic arrive", member)
        member.client.commit({Partition(topic, 0): Commit(1, "kser:1,3")}, 5)
        member.tolerates_errors = True
        harness.create_again(topic, after)
        new = {f"new {number}" for number in range(8)}
        harness.send(topic, *sorted(new), partition=0)
        harness.send(topic, "last", partition=after - 1)
        until(lambda: {*new, "last"} <= set(member.values()), "all records of the new topic arrive", member, seconds=90)
        until(lambda: member.starts.get(Partition(topic, 0)) == Commit(0), "partition 0 starts again", member)

    def test_position_of_the_old_topic_does_not_hide_records_of_the_new_topic(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The new topic has more records than the old one before the client notices the change."""
        member = join(key.topic)
        until(lambda: key in member.starts, "the partition is assigned", member)
        harness.send(key.topic, "old")
        until(lambda: member.records, "the record of the old topic arrives", member)
        until(lambda: member.poll() == [], "the client knows the topic", member)
        member.tolerates_errors = True
        harness.create_again(key.topic)
        harness.send(key.topic, *map(str, range(50)))
        until(lambda: {str(number) for number in range(50)} <= set(member.values()), "all records arrive", member)
        until(lambda: member.events[-1][0] in ("reset", "assign"), "the partition starts again", member)
        until(lambda: (harness.committed(group, key) or Commit(-1)).offset == 0, "the start is committed", member)

    @pytest.mark.parametrize("reset", ["earliest", "latest"])
    def test_offset_committed_for_the_old_topic_does_not_apply_to_the_new_topic(
        self,
        harness: BrokerHarness,
        join: Join,
        group: str,
        key: Partition,
        reset: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A consumer can commit for the old topic after the new topic was created."""
        harness.send(key.topic, *map(str, range(5)))
        before = join(key.topic)
        until(lambda: len(before.records) == 5, "all records arrive", before)
        before.client.commit({key: Commit(3, "kser:1,1")}, 5)
        before.close()
        late = harness.written(group, key)
        harness.create_again(key.topic)
        harness.send(key.topic, *(f"new {number}" for number in range(9)))
        harness.move(group, key, late)
        member = join(key.topic, reset=reset)
        until(lambda: len(member.records) >= 9, "all records of the new topic arrive", member)
        assert member.values() == [f"new {number}" for number in range(9)]
        assert member.events == [("reset", {key: Commit(0)})]
        errors = [line for line in lines(caplog, logging.ERROR) if "deleted and created again" in line]
        assert len(errors) == 1 and repr(key.topic) in errors[0]

    def test_new_topic_without_committed_offset_starts_as_the_reset_policy_demands(
        self, harness: BrokerHarness, join: Join, key: Partition
    ) -> None:
        harness.send(key.topic, *map(str, range(5)))
        before = join(key.topic)
        until(lambda: len(before.records) == 5, "all records arrive", before)
        before.client.commit({key: Commit(5)}, 5)
        before.close()
        harness.create_again(key.topic)
        harness.send(key.topic, "0", "1")
        member = join(key.topic)
        until(lambda: len(member.records) >= 2, "the records of the new topic arrive", member)
        assert member.values() == ["0", "1"]

    # -- positions -----------------------------------------------------------------------------------------------------

    def test_positions_follow_the_returned_records(self, harness: BrokerHarness, join: Join, key: Partition) -> None:
        harness.send(key.topic, *map(str, range(10)))
        member = join(key.topic)
        until(lambda: len(member.records) >= 4, "some records arrive", member, limit=1)
        assert member.client.positions() == {key: len(member.records)}
        member.poll(limit=0)
        assert member.client.positions() == {key: len(member.records)}

    def test_client_without_commits_records_no_start_position(
        self, harness: BrokerHarness, join: Join, group: str, key: Partition
    ) -> None:
        harness.send(key.topic, "0")
        member = join(key.topic, commits=False)
        assert not member.client.can_commit
        until(lambda: member.records, "the record arrives", member)
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
        deadline = time.monotonic() + BROKER_SECONDS
        while not batches and time.monotonic() < deadline:
            batches = dict(member.client.poll(0.05, 10, ()))
        assert [[record.value for record in records] for records in batches.values()] == [[b"0", b"1"]]

    def test_lag_counts_the_records_not_yet_returned(self, harness: BrokerHarness, join: Join, key: Partition) -> None:
        harness.send(key.topic, *map(str, range(10)))
        member = join(key.topic)
        until(lambda: len(member.records) >= 4, "some records arrive", member, limit=1)
        until(lambda: member.client.lag()[key] == 6, "the lag counts the other records", member, limit=0)
        until(lambda: len(member.records) == 10, "all records arrive", member)
        until(lambda: member.client.lag()[key] == 0, "the lag is zero", member)
