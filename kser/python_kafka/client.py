"""``kafka.KafkaConsumer`` behind the contract of all transports, for kafka-python 2.3 and 3."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors
from kafka.consumer import fetcher
from kafka.errors import KafkaError

from kser.consumer.client import (
    Commit,
    ConsumerClient,
    Listener,
    Partition,
    Record,
    nowhere_to_begin,
    out_of_range,
    trouble,
)
from kser.consumer.offsets import Sizes, unseal
from kser.errors import ClientTrouble
from kser.python_kafka.options import servers
from kser.python_kafka.rebalances import ASYNC, Joining, Rebalances, client_offsets

logger = logging.getLogger(__name__)

#: Milliseconds that asking where the group is, and where a log begins, may take.
QUERY_TIMEOUT_MS = 5000
#: Milliseconds that such a question may take which is only to tell whether somebody answers.
PROBE_TIMEOUT_MS = 1000
#: Seconds without a record after which topics and group are looked for.
LOOK_TICK = 5.0
#: Seconds between two attempts to begin partitions.
BEGIN_TICK = 1.0

#: The position is not in the log (any more).
_OUT_OF_RANGE = tuple(
    getattr(errors, name) for name in ("OffsetOutOfRangeError", "LogTruncationError") if hasattr(errors, name)
)
#: A partition has no position (yet). kafka-python 2 has two errors of that name.
_NO_POSITION = (
    errors.NoOffsetForPartitionError,
    getattr(fetcher, "NoOffsetForPartitionError", errors.NoOffsetForPartitionError),
)
#: Why a commit fails while a rebalance runs.
_PASSING = (
    errors.RebalanceInProgressError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
    errors.CommitFailedError,
)
#: What this client will not get over.
_FATAL = (errors.IllegalStateError,)


class KafkaPythonClient(ConsumerClient):
    """A member of a group.

    :param client: made with ``auto_offset_reset="none"`` when there is a group: where to begin is decided here.
    :param reset: where a partition begins of which the group has committed nothing: ``"earliest"``, ``"latest"`` or
        ``"none"``.
    :param commits: whether anything is to be committed.
    """

    def __init__(self, client: KafkaConsumer, reset: str, *, commits: bool = True) -> None:
        self._client = client
        self._reset = reset
        self._servers = servers(client.config)
        self.can_commit = commits and client.config["group_id"] is not None
        self._listener: Listener | None = None
        self._rebalances: Rebalances | None = None
        self._topics: list[str] = []
        self._missing: list[str] = []
        self._look_at = self._begin_at = self._polled_at = 0.0
        self._session = client.config["session_timeout_ms"] / 1000
        self._problem: ClientTrouble | None = None
        self._missed: ClientTrouble | None = None
        #: Assigned, and not begun yet. Added to by the client's thread.
        self._new: set[TopicPartition] = set()
        self._sizes = Sizes(reset)

    @property
    def cluster(self) -> str:
        # It comes with the metadata, which is there as soon as there is a record.
        return getattr(getattr(getattr(self._client, "_client", None), "cluster", None), "cluster_id", None) or ""

    def subscribe(self, topics: Iterable[str], listener: Listener) -> None:
        self._listener = listener
        self._topics = sorted(topics)
        self._look_at = time.monotonic() + LOOK_TICK
        self._rebalances = Rebalances(self._client, listener, self._new, self._sizes.note)
        self._client.subscribe(self._topics, listener=self._rebalances)

    def poll(self, timeout: float, limit: int, held: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        try:
            self._pause(limit, held)
            self._keep_joining()
            self._unpark()
            batches = self._poll(timeout, limit)
            if new := set(self._new):
                # What has come of the new ones may be from another position than the group's.
                batches = {key: records for key, records in batches.items() if key not in new}
                self._begin_new()
            # What is wrong can wait while there is something to do.
            if batches:
                self._answered()
            else:
                self._look_around()
            return batches
        except KafkaError as error:
            raise self._trouble("take messages", error) from error

    def _keep_joining(self) -> None:
        """Have kafka-python 3 see a join through that outlasted a poll.

        When it began because the partitions of a topic changed, the client would not ask what became of it. When it is
        over before the next poll, the client would not look at it, and join once more, which takes all partitions from
        the whole group again.
        """
        coordinator = self._client._coordinator
        if not ASYNC or not coordinator.rejoining:
            return
        coordinator.rejoin_needed = True
        task = coordinator._join_task
        if task is not None:
            joining = task if isinstance(task, Joining) else Joining(task, self._polled_at)
            coordinator._join_task = joining if joining.is_of_use(self._session / 2) else None

    def _unpark(self) -> None:
        """Have kafka-python 3 look at records again that it has put aside while their partition was paused.

        It does so only when it has nothing in hand, and takes what it has emptied for something.
        """
        fetcher = self._client._fetcher
        if ASYNC and fetcher._next_partition_records is not None and not fetcher._next_partition_records:
            fetcher._next_partition_records = None

    def _poll(self, timeout: float, limit: int) -> Mapping[Partition, Sequence[Record]]:
        try:
            found: Mapping[Any, Sequence[Record]] = self._client.poll(
                timeout_ms=int(timeout * 1000), max_records=max(limit, 1)
            )
            return found
        except _NO_POSITION:
            # They are new, and begun next.
            return {}
        except _OUT_OF_RANGE as error:
            self._recover_from(error)
            return {}
        finally:
            self._polled_at = time.monotonic()

    def _look_around(self) -> None:
        """Look now and then for what the client itself waits for without a word.

        :raises kser.errors.ClientTrouble: there is something.
        """
        if self._new and self._problem is not None:
            raise self._problem
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_TICK
            self._missed = self._look_for_topics() or self._look_for_group()
        if self._missed is not None:
            raise self._missed

    def _answered(self) -> None:
        self._look_at = time.monotonic() + LOOK_TICK
        self._missed = None

    def _look_for_topics(self) -> ClientTrouble | None:
        known = {tp.topic for tp in self._client.assignment()}
        missing = [t for t in self._topics if t not in known and not self._client.partitions_for_topic(t)]
        if not missing or not known:
            return ClientTrouble(self._unknown(missing)) if missing else None
        if missing != self._missing:
            logger.error(f"{self._unknown(missing)}; waiting for it, and consuming the others")
        self._missing = missing
        return None

    def _look_for_group(self) -> ClientTrouble | None:
        """Ask for any commit: whoever answers is there."""
        tp = next(iter(self._client.assignment()), None)
        if tp is None or not self.can_commit:
            return None
        try:
            self._client.committed(tp, timeout_ms=PROBE_TIMEOUT_MS)
        except KafkaError as error:
            return self._trouble("take messages", error)
        return None

    def _unknown(self, topics: list[str]) -> str:
        names = ", ".join(map(repr, topics))
        return f"the brokers at {self._servers} know no topic {names}: create it, or correct its name"

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        try:
            noted = {key: self._sizes.note(key, commit) for key, commit in commits.items()}
            self._client.commit(client_offsets(noted), timeout_ms=int(timeout * 1000))
        except KafkaError as error:
            raise self._trouble("commit offsets", error) from error

    def lag(self) -> Mapping[Partition, int]:
        found: dict[Partition, int] = {}
        try:
            for tp in self._client.assignment() - self._new:
                end, position = self._client.highwater(tp), self._client.position(tp, timeout_ms=100)
                if end is not None and position is not None:
                    found[Partition(*tp)] = end - position
            return found
        except KafkaError as error:
            raise self._trouble("tell how far it is", error) from error

    def close(self, timeout: float) -> None:
        # Its partitions may be another client's by the time that it gives them up.
        if self._rebalances is not None:
            self._rebalances.active = False
        try:
            self._client.close(autocommit=False, timeout_ms=int(timeout * 1000))
        except KafkaError as error:
            logger.warning(f"the group at {self._servers} was not left in order: {error}")

    def _pause(self, limit: int, held: Collection[Partition]) -> None:
        # A rebalance forgets what was paused, so it is said again before each poll.
        if limit and not held and not self._new:
            if paused := self._client.paused():
                self._client.resume(*paused)
            return
        assigned = self._client.assignment()
        wanted = {tp for tp in assigned if not limit or tp in held or tp in self._new}
        self._client.pause(*wanted)
        self._client.resume(*(self._client.paused() - wanted))

    # -- where partitions begin ----------------------------------------------------------------------------------------

    def _begin_new(self) -> None:
        """Begin the new partitions where the group is, or, if it is nowhere, where it is to start.

        Those that cannot be begun are paused, and tried again; the others go on meanwhile.
        """
        if time.monotonic() < self._begin_at:
            return
        assert self._listener is not None
        self._begin_at = time.monotonic() + BEGIN_TICK
        known: dict[Partition, Commit] = {}
        fresh: dict[Partition, Commit] = {}
        self._problem = None
        for tp in self._new & self._client.assignment():
            try:
                self._begin(tp, known, fresh)
                continue
            except KafkaError as error:
                self._problem = self._trouble(f"begin {tp.topic}[{tp.partition}]", error)
            except ClientTrouble as error:
                self._problem = error
            # Without a position of its own it would keep the client from all others.
            self._client.seek(tp, 0)
        if not (self._new & self._client.assignment()):
            self._begin_at = 0.0
        self._listener.on_assign(known)
        # Where nothing is committed, nothing else knows what was finished of them.
        self._listener.on_reset(fresh) if self.can_commit else self._listener.on_assign(fresh)

    def _begin(self, tp: TopicPartition, known: dict[Partition, Commit], fresh: dict[Partition, Commit]) -> None:
        key = Partition(*tp)
        start = self._committed(tp)
        if start is not None:
            self._sizes.see(tp.topic, len(self._client.partitions_for_topic(tp.topic) or ()))
            self._sizes.learn(key, start)
            known[key] = start
        elif self._reset == "none":
            raise nowhere_to_begin([key])
        else:
            start = fresh[key] = self._first_position(tp)
            if self.can_commit:
                self._client.commit(client_offsets({key: start}), timeout_ms=QUERY_TIMEOUT_MS)
        self._client.seek(tp, start.offset)
        self._new.discard(tp)

    def _first_position(self, tp: TopicPartition) -> Commit:
        """Where a partition begins of which the group has committed nothing."""
        at_end = self._reset == "latest" and not self._was_added(tp)
        offset = (self._ends if at_end else self._begins)([tp])[tp]
        return self._sizes.note(Partition(*tp), Commit(offset))

    def _was_added(self, tp: TopicPartition) -> bool:
        others = self._client.partitions_for_topic(tp.topic) or {tp.partition}
        self._sizes.see(tp.topic, len(others))
        for number in others:
            if (commit := self._committed(TopicPartition(tp.topic, number))) is not None:
                self._sizes.learn(Partition(*tp), commit)
        return self._sizes.was_added(Partition(*tp))

    def _committed(self, tp: TopicPartition) -> Commit | None:
        found = self._client.committed(tp, metadata=True, timeout_ms=QUERY_TIMEOUT_MS)
        return None if found is None else Commit(found.offset, unseal(found.metadata or ""))

    def _begins(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        # The client's own method of kafka-python 2 takes no time, and waits for minutes.
        return dict(self._client._fetcher.beginning_offsets(partitions, timeout_ms=QUERY_TIMEOUT_MS))

    def _ends(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict(self._client._fetcher.end_offsets(partitions, timeout_ms=QUERY_TIMEOUT_MS))

    def _recover_from(self, error: KafkaError) -> None:
        """A position is not in the log: say what is lost, and begin anew where ``auto_offset_reset`` says."""
        assert self._listener is not None
        positions: Mapping[TopicPartition, Any] = getattr(error, "divergent_offsets", None) or error.args[0]
        # The new ones are begun where the group is, and fail there once more.
        partitions = [tp for tp in positions if tp in self._client.assignment() and tp not in self._new]
        begins, ends = self._begins(partitions), self._ends(partitions)
        starts: dict[Partition, Commit] = {}
        for tp in partitions:
            was = self._client.position(tp, timeout_ms=QUERY_TIMEOUT_MS)
            start = ends[tp] if self._reset == "latest" else begins[tp]
            logger.error(out_of_range(Partition(*tp), was, begins[tp], ends[tp], start))
            self._client.seek(tp, start)
            starts[Partition(*tp)] = Commit(start)
        if starts and self.can_commit:
            self.commit(starts, QUERY_TIMEOUT_MS / 1000)
        self._listener.on_reset(starts)

    def _trouble(self, what: str, error: KafkaError) -> ClientTrouble:
        return trouble(
            what,
            f"{self._servers} (bootstrap_servers)",
            error if any(error.args) else "no answer in time",
            fatal=isinstance(error, _FATAL),
            passing=isinstance(error, _PASSING),
        )
