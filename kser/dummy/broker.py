"""Broker of the in-memory transport: topics with partitions, consumer groups and their committed offsets.

The broker has no threads. It works only inside calls of its methods, so a test controls each step. As in Kafka, a
member that does not poll delays a rebalance until the group expels the member.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from zlib import crc32

from kser.consumer.client import Commit, ConsumerClient, Partition, RebalanceListener, Record
from kser.consumer.commit_metadata import CommitMetadata
from kser.consumer.start_positions import StartPositions
from kser.consumer.subscription import Subscription
from kser.errors import ClientError


class DummyRecord(NamedTuple):
    """One record of a topic."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    timestamp: int = 0


class InMemoryBroker:
    """The broker of all producers and consumers with the same ``bootstrap_servers``."""

    _brokers: dict[str, InMemoryBroker] = {}  # noqa: RUF012  the brokers of this process

    def __init__(self) -> None:
        #: The partitions of each topic; a partition is a list of records.
        self.topics: dict[str, list[list[DummyRecord]]] = {}
        #: The committed offsets with their metadata, as Kafka would store them, by group and partition.
        self.committed: dict[tuple[str, Partition], Commit] = {}
        self.groups: dict[str, ConsumerGroup] = {}
        #: The number of topics that were created under each name, which is the id of the topic.
        self.topic_ids: Counter[str] = Counter()
        self.message_arrived = threading.Condition(threading.RLock())
        self._round_robin = 0

    @classmethod
    def at(cls, address: str) -> InMemoryBroker:
        """Return the broker at an address; the first call for an address creates its broker."""
        return cls._brokers.setdefault(address, cls())

    @classmethod
    def reset(cls) -> None:
        """Remove all brokers. Call this method between two tests."""
        cls._brokers.clear()

    def create_topic(self, topic: str, partitions: int = 1) -> None:
        """Create a topic, or add partitions to an existing one.

        A topic that is used before it is created has one partition.
        """
        with self.message_arrived:
            logs = self.logs_of(topic)
            logs += [[] for _ in range(partitions - len(logs))]
            for group in self.groups.values():
                group.rebalance()

    def delete_topic(self, topic: str) -> None:
        """Delete a topic with its records and with the committed offsets of all groups."""
        with self.message_arrived:
            self.topics.pop(topic, None)
            for group, partition in list(self.committed):
                if partition.topic == topic:
                    del self.committed[group, partition]

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Iterable[tuple[str, bytes | None]] = (),
        partition: int | None = None,
    ) -> None:
        """Append a record to a partition.

        :param partition: the partition. None selects a partition: with a key, always the same partition for the same
            key; without a key, the next partition in turn.
        """
        with self.message_arrived:
            is_new = topic not in self.topics
            logs = self.logs_of(topic)
            if is_new:
                self._rebalance_followers(topic)
            if partition is None:
                self._round_robin += key is None
                partition = (self._round_robin if key is None else crc32(key)) % len(logs)
            log = logs[partition]
            log.append(DummyRecord(topic, partition, len(log), key, value, tuple(headers)))
            self.message_arrived.notify_all()

    def _rebalance_followers(self, topic: str) -> None:
        """Rebalance the groups with a member whose patterns match a new topic."""
        for group in self.groups.values():
            if any(member.follows(topic) for member in group.members):
                group.rebalance()

    def values(self, topic: str) -> list[bytes | None]:
        """Return the values of all records of a topic, partition by partition."""
        return [record.value for log in self.topics.get(topic, []) for record in log]

    def partitions_of(self, topics: Iterable[str]) -> list[Partition]:
        """Return all partitions of these topics."""
        return [Partition(topic, n) for topic in topics for n in range(len(self.logs_of(topic)))]

    def logs_of(self, topic: str) -> list[list[DummyRecord]]:
        """Return the partitions of a topic, which is created with one partition if it does not exist."""
        if topic not in self.topics:
            self.topic_ids[topic] += 1
            self.topics[topic] = [[]]
        return self.topics[topic]


class ConsumerGroup:
    """A consumer group. A rebalance first revokes all partitions of all members, as Kafka's default assignors do."""

    def __init__(self, broker: InMemoryBroker) -> None:
        self._broker = broker
        self.members: list[DummyClient] = []
        self._rejoined: set[DummyClient] = set()
        self.in_rebalance = False

    def rebalance(self) -> None:
        """Start a rebalance, which ends when each member has polled."""
        self.in_rebalance = bool(self.members)
        self._rejoined = set()
        with self._broker.message_arrived:
            self._broker.message_arrived.notify_all()

    def join(self, member: DummyClient) -> None:
        """Add a member to the rebalance after its partitions were revoked.

        The rebalance ends when all members of the group have joined it.
        """
        self._rejoined.add(member)
        if self._rejoined >= set(self.members):
            self._assign()

    def leave(self, member: DummyClient) -> None:
        """Remove a member that closes or that the group expels, and start a rebalance."""
        if member in self.members:
            self.members.remove(member)
            self.rebalance()

    def _assign(self) -> None:
        self.in_rebalance = False
        for member in self.members:
            member.pending_assignment = []
        topics_of = {member: member.topics for member in self.members}
        topics = sorted(frozenset().union(*topics_of.values()))
        for number, partition in enumerate(self._broker.partitions_of(topics)):
            takers = [member for member in self.members if partition.topic in topics_of[member]]
            takers[number % len(takers)].pending_assignment.append(partition)


class DummyClient(ConsumerClient):
    """A member of a consumer group of the in-memory broker.

    :param group: the name of the group; None for a reader without a group, which gets all partitions and never commits.
    :param reset: where a partition without a committed offset starts: ``"earliest"``, ``"latest"`` or ``"none"``.
    :param commits: False if the client must not commit offsets.
    """

    def __init__(
        self, broker: InMemoryBroker, group: str | None, reset: str = "earliest", *, commits: bool = True
    ) -> None:
        self._broker = broker
        self.can_commit = commits and group is not None
        self._name = group or ""
        self._group = (
            broker.groups.setdefault(group, ConsumerGroup(broker)) if group is not None else ConsumerGroup(broker)
        )
        self._reset = reset
        self._metadata = CommitMetadata(reset)
        self._listener: RebalanceListener | None = None
        self._subscription = Subscription(())
        self.pending_assignment: list[Partition] = []
        self._positions: dict[Partition, int] = {}
        #: Injected errors. Each poll or commit removes the first error from the list and raises it.
        self.injected_errors: list[ClientError] = []

    def subscribe(self, topics: Iterable[str], listener: RebalanceListener) -> None:
        self._subscription = Subscription.of(topics)
        self._listener = listener
        self._broker.partitions_of(self.topics)
        self._group.members.append(self)
        self._group.rebalance()

    @property
    def topics(self) -> frozenset[str]:
        """The names of the subscription, and the topics of the broker that match its patterns."""
        return frozenset(self._subscription.matching(self._broker.topics))

    def follows(self, topic: str) -> bool:
        """Return whether a pattern of the subscription matches a topic."""
        return bool(self._subscription.patterns) and topic in self._subscription.matching([topic])

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        self._raise_injected()
        with self._broker.message_arrived:
            if not self._rejoin_if_needed():
                return {}
            self._restart_new_topics()
            self._broker.message_arrived.wait_for(
                lambda: self._group.in_rebalance or self._has_records(limit, paused), timeout
            )
            batches: dict[Partition, Sequence[Record]] = {}
            for key, position in self._positions.items():
                log = self._records_of(key)
                if limit > 0 and key not in paused and position < len(log):
                    batches[key] = log[position : position + limit]
                    self._positions[key] += len(batches[key])
                    limit -= len(batches[key])
            return batches

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        self._raise_injected()
        with self._broker.message_arrived:
            if self not in self._group.members or not commits.keys() <= self._positions.keys():
                raise ClientError(f"the group {self._name!r} has assigned these partitions to another member")
            self._record_commits(commits)

    def positions(self) -> Mapping[Partition, int]:
        return dict(self._positions)

    def lag(self) -> Mapping[Partition, int]:
        return {key: len(self._records_of(key)) - position for key, position in self._positions.items()}

    def close(self, timeout: float) -> None:
        with self._broker.message_arrived:
            self._revoke()
            self._group.leave(self)

    def expel(self) -> None:
        """Expel this member from the group, as Kafka does after a session timeout."""
        with self._broker.message_arrived:
            self._group.leave(self)

    def _rejoin_if_needed(self) -> bool:
        """Take part in a rebalance if the group is in one, and return whether records can be fetched."""
        assert self._listener is not None
        if self not in self._group.members:
            lost, self._positions = list(self._positions), {}
            self._listener.on_lost(lost)
            self._group.members.append(self)
            self._group.rebalance()
        if self._group.in_rebalance:
            self._revoke()
            self._group.join(self)
        if not self._group.in_rebalance and self.pending_assignment:
            self._start_partitions(self.pending_assignment)
            self.pending_assignment = []
        return not self._group.in_rebalance

    def _start_partitions(self, partitions: list[Partition]) -> None:
        assert self._listener is not None
        starts = StartPositions(self._metadata, self._reset, self._record_commits if self.can_commit else None)
        for key in partitions:
            self._learn_topic(key.topic)
            starts.find(key, self._broker.committed.get((self._name, key)), partial(self._first_position, key))
        self._positions = {key: commit.offset for key, commit in starts.all.items()}
        starts.report(self._listener)

    def _learn_topic(self, topic: str) -> bool:
        """Record the state of a topic; return whether the topic was created again."""
        self._metadata.partition_counts.observe(topic, len(self._broker.logs_of(topic)))
        return self._metadata.learn_topic_id(topic, str(self._broker.topic_ids[topic]).encode())

    def _restart_new_topics(self) -> None:
        """Start the partitions of topics that were created again at the beginning of the new topics."""
        assert self._listener is not None
        new = {topic for topic in {key.topic for key in self._positions} if self._learn_topic(topic)}
        starts = {key: Commit(0) for key in self._positions if key.topic in new}
        for key in starts:
            self._metadata.mark_started(key)
            self._positions[key] = 0
        self._listener.on_reset(starts)
        if self.can_commit:
            self._record_commits(starts)

    def _first_position(self, key: Partition) -> Commit:
        if self._reset != "latest":
            return Commit(0)
        for (group, partition), commit in self._broker.committed.items():
            if (group, partition.topic) == (self._name, key.topic):
                self._metadata.restore(partition, *commit)
        is_new = self._metadata.partition_counts.is_new_partition(key)
        return Commit(0 if is_new else len(self._records_of(key)))

    def _record_commits(self, commits: Mapping[Partition, Commit]) -> None:
        self._broker.committed.update(
            {
                (self._name, key): Commit(commit.offset, self._metadata.write(key, commit))
                for key, commit in commits.items()
            }
        )

    def _revoke(self) -> None:
        assert self._listener is not None
        if not self._positions:
            return
        revocation = self._listener.on_revoke(list(self._positions))
        # Release the lock during the wait, because running attempts may need the broker to finish.
        self._broker.message_arrived.release()
        try:
            revocation.wait()
        finally:
            self._broker.message_arrived.acquire()
        if self.can_commit and self in self._group.members:
            self._record_commits(revocation.commits())
        self._positions = {}

    def _has_records(self, limit: int, held: Collection[Partition]) -> bool:
        return limit > 0 and any(
            position < len(self._records_of(key)) for key, position in self._positions.items() if key not in held
        )

    def _records_of(self, key: Partition) -> list[DummyRecord]:
        logs = self._broker.logs_of(key.topic)
        # A topic that was created again may have fewer partitions.
        return logs[key.partition] if key.partition < len(logs) else []

    def _raise_injected(self) -> None:
        if self.injected_errors:
            raise self.injected_errors.pop(0)
