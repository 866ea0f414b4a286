"""Consumer client on ``kafka.KafkaConsumer``, for kafka-python 2.3 and kafka-python 3."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors
from kafka.consumer import fetcher
from kafka.errors import KafkaError

from kser.connection import FailureLog, explain, partial_failure_text
from kser.consumer.client import (
    Commit,
    ConsumerClient,
    Partition,
    RebalanceListener,
    Record,
    client_error,
    denied_topics,
    no_committed_offset,
    out_of_range_text,
)
from kser.consumer.offsets import PartitionCounts, strip_checksum
from kser.errors import ClientError
from kser.forks import keep_in_children
from kser.python_kafka.logs import lines_of
from kser.python_kafka.options import connection_of
from kser.python_kafka.rebalances import ASYNC, LISTENER, ClientListener, PendingJoin, client_offsets
from kser.python_kafka.topics import TopicAccess

logger = logging.getLogger(__name__)

#: Timeout in milliseconds of a query for committed offsets, or for the first and last offset of a partition.
QUERY_TIMEOUT_MS = 5000
#: Timeout in milliseconds of the query that checks whether the group coordinator responds.
PROBE_TIMEOUT_MS = 1000
#: Seconds between two health checks of the topics and of the group coordinator, while no records arrive.
HEALTH_CHECK_INTERVAL = 5.0
#: Seconds between two tries to find the start positions of new partitions.
START_RETRY_INTERVAL = 1.0

#: Errors that report a fetch position outside of the offset range of the partition.
_OUT_OF_RANGE = tuple(
    getattr(errors, name) for name in ("OffsetOutOfRangeError", "LogTruncationError") if hasattr(errors, name)
)
#: Errors of a partition without a position. kafka-python 2 has two error classes with the name
#: NoOffsetForPartitionError.
_NO_POSITION = (
    errors.NoOffsetForPartitionError,
    getattr(fetcher, "NoOffsetForPartitionError", errors.NoOffsetForPartitionError),
)
#: Transient errors. Commits fail with these errors during a rebalance.
_TRANSIENT = (
    errors.RebalanceInProgressError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
    errors.CommitFailedError,
)
#: Errors after which the client cannot be used any more.
_FATAL = (errors.IllegalStateError,)


class KafkaPythonClient(ConsumerClient):
    """A member of a consumer group, on kafka-python.

    :param client: the KafkaConsumer. If it has a group, its ``auto_offset_reset`` must be ``"none"``, because this
        class chooses the start positions.
    :param reset: where a partition without a committed offset starts: ``"earliest"``, ``"latest"`` or ``"none"``.
    :param commits: False if the client must not commit offsets.
    """

    def __init__(self, client: KafkaConsumer, reset: str, *, commits: bool = True) -> None:
        self._client = client
        self._reset = reset
        self._connection = connection_of(client.config)
        self._lines = lines_of(client)
        self._partial_failures = FailureLog()
        self.can_commit = commits and client.config["group_id"] is not None
        self._listener: RebalanceListener | None = None
        self._client_listener: ClientListener | None = None
        self._topics: list[str] = []
        self._topic_failures = FailureLog()
        self._check_at = self._start_at = self._polled_at = 0.0
        self._session = client.config["session_timeout_ms"] / 1000
        self._pending_error: ClientError | None = None
        self._health_error: ClientError | None = None
        #: Assigned partitions that have no start position yet. The client's own thread may add partitions.
        self._unstarted: set[TopicPartition] = set()
        self._partition_counts = PartitionCounts(reset)
        keep_in_children(self, "_client")

    @property
    def cluster(self) -> str:
        # No request is necessary here, because the cluster id is part of the metadata, which the client has before it
        # returns the first record.
        return getattr(getattr(getattr(self._client, "_client", None), "cluster", None), "cluster_id", None) or ""

    def subscribe(self, topics: Iterable[str], listener: RebalanceListener) -> None:
        self._listener = listener
        self._topics = sorted(topics)
        self._check_at = time.monotonic() + HEALTH_CHECK_INTERVAL
        self._access = TopicAccess(self._client)
        self._client_listener = LISTENER(self._client, listener, self._unstarted, self._partition_counts.annotate)
        self._client.subscribe(self._topics, listener=self._client_listener)

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        try:
            with self._lines.calling():
                return self._fetch(timeout, limit, paused)
        except KafkaError as error:
            raise self._as_client_error("fetch messages", error) from error

    def _fetch(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        self._pause(limit, paused)
        self._resume_join()
        self._requeue_parked_records()
        batches = self._poll(timeout, limit)
        if new := set(self._unstarted):
            # Drop the records of new partitions, because the client may have read them from another position than
            # the committed offset.
            batches = {key: records for key, records in batches.items() if key not in new}
            self._start_new_partitions()
        # Check for errors only if there are no records, because an exception would lose the records.
        if batches:
            self._check_at = time.monotonic() + HEALTH_CHECK_INTERVAL
            self._health_error = None
            self._lines.failure.clear()
        else:
            self._health_check()
        return batches

    def _resume_join(self) -> None:
        """Make kafka-python 3 complete a join that did not finish within one poll.

        If a join starts because the number of partitions of a topic changed, and if this join finishes between two
        polls, the client discards the result of the join and joins again. The second join revokes all partitions of the
        whole group again. This method prevents the second join.
        """
        coordinator = self._client._coordinator
        if not ASYNC or not coordinator.rejoining:
            return
        coordinator.rejoin_needed = True
        task = coordinator._join_task
        if task is not None:
            joining = task if isinstance(task, PendingJoin) else PendingJoin(task, self._polled_at)
            coordinator._join_task = joining if joining.is_usable(self._session / 2) else None

    def _requeue_parked_records(self) -> None:
        """Make kafka-python 3 return the records that it set aside while their partition was paused.

        The client returns these records only if its attribute for the current batch is None, but the client may leave
        an empty batch in this attribute. So this method sets the attribute to None if the batch is empty.
        """
        fetcher = self._client._fetcher
        if ASYNC and fetcher._next_partition_records is not None and not fetcher._next_partition_records:
            fetcher._next_partition_records = None

    def _poll(self, timeout: float, limit: int) -> Mapping[Partition, Sequence[Record]]:
        try:
            batches: Mapping[Any, Sequence[Record]] = self._client.poll(
                timeout_ms=int(timeout * 1000), max_records=max(limit, 1)
            )
            return batches
        except _NO_POSITION:
            # The partitions without a position are new partitions. They get a position after this poll.
            return {}
        except _OUT_OF_RANGE as error:
            self._recover_from(error)
            return {}
        finally:
            self._polled_at = time.monotonic()

    def _health_check(self) -> None:
        """Check for missing topics and unreachable brokers.

        kafka-python does not report a missing topic or an unreachable broker, because it retries without end.

        :raises kser.errors.ClientError: the check found an error, or new partitions could not be started.
        """
        if self._unstarted and self._pending_error is not None:
            raise self._pending_error
        if (unconnected := self._unconnected()) is not None:
            raise unconnected
        if time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + HEALTH_CHECK_INTERVAL
            self._health_error = self._check_topics() or self._check_group()
            reason = "" if self._health_error else self._lines.failure.persistent_reason()
            if reason and self._partial_failures.is_due(explain(reason, self._connection).kind):
                logger.warning(partial_failure_text(reason, self._connection))
        if self._health_error is not None:
            raise self._health_error

    def _unconnected(self) -> ClientError | None:
        """Return the error of a client that has not reached a broker yet."""
        reason = self._lines.failure.reason()
        if not reason or self._client._client.cluster._last_successful_refresh_ms:
            return None
        return client_error("fetch messages", self._connection, reason)

    def _check_topics(self) -> ClientError | None:
        consumed = {tp.topic for tp in self._client.assignment()}
        problem = self._access.problem([topic for topic in self._topics if topic not in consumed], self._connection)
        if problem is None or not consumed:
            self._topic_failures.succeed()
            return problem and (self._unconnected() or problem)
        if self._topic_failures.is_due(problem.kind):
            logger.error(f"{problem.message}; consuming the other topics meanwhile")
        return None

    def _check_group(self) -> ClientError | None:
        """Query a committed offset, to check that the group coordinator responds."""
        tp = next(iter(self._client.assignment()), None)
        if tp is None or not self.can_commit:
            return None
        try:
            self._client.committed(tp, timeout_ms=PROBE_TIMEOUT_MS)
        except KafkaError as error:
            return self._as_client_error("fetch messages", error)
        return None

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        try:
            annotated = {key: self._partition_counts.annotate(key, commit) for key, commit in commits.items()}
            self._client.commit(client_offsets(annotated), timeout_ms=int(timeout * 1000))
        except KafkaError as error:
            raise self._as_client_error("commit offsets", error) from error

    def lag(self) -> Mapping[Partition, int]:
        lags: dict[Partition, int] = {}
        try:
            for tp in self._client.assignment() - self._unstarted:
                end, position = self._client.highwater(tp), self._client.position(tp, timeout_ms=100)
                if end is not None and position is not None:
                    lags[Partition(*tp)] = end - position
            return lags
        except KafkaError as error:
            raise self._as_client_error("read the lag", error) from error

    def close(self, timeout: float) -> None:
        # kafka-python calls the listener during close, to revoke the partitions. A new client of this process may
        # already have these partitions then, so make the listener ignore the call.
        if self._client_listener is not None:
            self._client_listener.active = False
        try:
            self._client.close(autocommit=False, timeout_ms=int(timeout * 1000))
        except KafkaError as error:
            logger.warning(
                f"could not leave the group at {self._connection.servers} ({error}): its partitions are reassigned"
                " after the session timeout"
            )

    def _pause(self, limit: int, held: Collection[Partition]) -> None:
        # A rebalance may resume paused partitions, so pause them again before each poll.
        if limit and not held and not self._unstarted:
            if paused := self._client.paused():
                self._client.resume(*paused)
            return
        assigned = self._client.assignment()
        wanted = {tp for tp in assigned if not limit or tp in held or tp in self._unstarted}
        self._client.pause(*wanted)
        self._client.resume(*(self._client.paused() - wanted))

    # -- start positions -----------------------------------------------------------------------------------------------

    def _start_new_partitions(self) -> None:
        """Start each new partition at its committed offset. Without a committed offset, apply the reset policy.

        Partitions that cannot be started stay paused until a retry succeeds. The client returns records of the other
        partitions meanwhile.
        """
        if time.monotonic() < self._start_at:
            return
        assert self._listener is not None
        self._start_at = time.monotonic() + START_RETRY_INTERVAL
        known: dict[Partition, Commit] = {}
        fresh: dict[Partition, Commit] = {}
        self._pending_error = None
        for tp in self._unstarted & self._client.assignment():
            try:
                self._start_partition(tp, known, fresh)
                continue
            except KafkaError as error:
                self._pending_error = self._as_client_error(
                    f"find the start position of {tp.topic}[{tp.partition}]", error
                )
            except ClientError as error:
                self._pending_error = error
            # Set an arbitrary position, because a partition without a position makes every poll of the client fail. The
            # client reads nothing from this position, because the partition stays paused.
            self._client.seek(tp, 0)
        if not (self._unstarted & self._client.assignment()):
            self._start_at = 0.0
        self._listener.on_assign(known)
        # ``on_reset`` discards the finished offsets that the listener has stored. If the client does not commit, Kafka
        # has no copy of these offsets, so call ``on_assign`` instead.
        self._listener.on_reset(fresh) if self.can_commit else self._listener.on_assign(fresh)

    def _start_partition(
        self, tp: TopicPartition, known: dict[Partition, Commit], fresh: dict[Partition, Commit]
    ) -> None:
        key = Partition(*tp)
        start = self._committed(tp)
        if start is not None:
            self._partition_counts.observe(tp.topic, len(self._client.partitions_for_topic(tp.topic) or ()))
            self._partition_counts.restore(key, start)
            known[key] = start
        elif self._reset == "none":
            raise no_committed_offset([key])
        else:
            start = fresh[key] = self._first_position(tp)
            if self.can_commit:
                self._client.commit(client_offsets({key: start}), timeout_ms=QUERY_TIMEOUT_MS)
        self._client.seek(tp, start.offset)
        self._unstarted.discard(tp)

    def _first_position(self, tp: TopicPartition) -> Commit:
        """Return the start position of a partition without a committed offset."""
        at_end = self._reset == "latest" and not self._was_added(tp)
        offset = (self._end_offsets if at_end else self._beginning_offsets)([tp])[tp]
        return self._partition_counts.annotate(Partition(*tp), Commit(offset))

    def _was_added(self, tp: TopicPartition) -> bool:
        others = self._client.partitions_for_topic(tp.topic) or {tp.partition}
        self._partition_counts.observe(tp.topic, len(others))
        for number in others:
            if (commit := self._committed(TopicPartition(tp.topic, number))) is not None:
                self._partition_counts.restore(Partition(*tp), commit)
        return self._partition_counts.is_new_partition(Partition(*tp))

    def _committed(self, tp: TopicPartition) -> Commit | None:
        committed = self._client.committed(tp, metadata=True, timeout_ms=QUERY_TIMEOUT_MS)
        return None if committed is None else Commit(committed.offset, strip_checksum(committed.metadata or ""))

    def _beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        # In kafka-python 2, ``KafkaConsumer.beginning_offsets`` accepts no timeout and can block for minutes.
        return dict(self._client._fetcher.beginning_offsets(partitions, timeout_ms=QUERY_TIMEOUT_MS))

    def _end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict(self._client._fetcher.end_offsets(partitions, timeout_ms=QUERY_TIMEOUT_MS))

    def _recover_from(self, error: KafkaError) -> None:
        """Move each fetch position that is outside of the offset range of its partition, and log the skipped offsets.

        With the reset policy ``latest``, the new position is the end of the partition, otherwise its beginning.
        """
        assert self._listener is not None
        positions: Mapping[TopicPartition, Any] = getattr(error, "divergent_offsets", None) or error.args[0]
        # Skip new partitions. They start at their committed offset, and cause this error again if that offset is out of
        # range.
        partitions = [tp for tp in positions if tp in self._client.assignment() and tp not in self._unstarted]
        begins, ends = self._beginning_offsets(partitions), self._end_offsets(partitions)
        starts: dict[Partition, Commit] = {}
        for tp in partitions:
            position = self._client.position(tp, timeout_ms=QUERY_TIMEOUT_MS)
            start = ends[tp] if self._reset == "latest" else begins[tp]
            logger.error(out_of_range_text(Partition(*tp), position, begins[tp], ends[tp], start))
            self._client.seek(tp, start)
            starts[Partition(*tp)] = Commit(start)
        if starts and self.can_commit:
            self.commit(starts, QUERY_TIMEOUT_MS / 1000)
        self._listener.on_reset(starts)

    def _as_client_error(self, action: str, error: KafkaError) -> ClientError:
        if isinstance(error, errors.TopicAuthorizationFailedError) and error.args:
            topics = error.args[0]
            return denied_topics([topics] if isinstance(topics, str) else topics, self._connection)
        return client_error(
            action,
            self._connection,
            error if any(error.args) else self._lines.failure.reason() or "no response in time",
            fatal=isinstance(error, _FATAL),
            transient=isinstance(error, _TRANSIENT),
        )
