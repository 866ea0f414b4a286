"""Consumer client on ``kafka.KafkaConsumer``, for kafka-python 2.3 and kafka-python 3."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors
from kafka.consumer import fetcher
from kafka.errors import KafkaError

from kser.consumer.client import (
    Commit,
    ConsumerClient,
    Partition,
    RebalanceListener,
    Record,
    out_of_range_text,
)
from kser.consumer.commit_metadata import TOPIC_CHECK_INTERVAL, CommitMetadata
from kser.consumer.start_positions import StartPositions
from kser.consumer.subscription import Subscription
from kser.errors import ClientError
from kser.escaping import escape_lines
from kser.forks import keep_in_children
from kser.python_kafka.batches import UnreadableBatches
from kser.python_kafka.decompression import MIN_LIMIT
from kser.python_kafka.health import HealthCheck, as_client_error
from kser.python_kafka.heartbeats import HeartbeatAnswers
from kser.python_kafka.logs import lines_of
from kser.python_kafka.metadata import partitions_of
from kser.python_kafka.offset_queries import QUERY_TIMEOUT_MS, OffsetQueries
from kser.python_kafka.options import servers
from kser.python_kafka.rebalances import ASYNC, LISTENER, ClientListener, PendingJoin, client_offsets
from kser.python_kafka.topic_ids import TopicIds

logger = escape_lines(logging.getLogger(__name__))

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


class KafkaPythonClient(ConsumerClient):
    """A member of a consumer group, on kafka-python.

    :param client: the KafkaConsumer. If it has a group, its ``auto_offset_reset`` must be ``"none"``, because this
        class chooses the start positions.
    :param reset: where a partition without a committed offset starts: ``"earliest"``, ``"latest"`` or ``"none"``.
    :param commits: False if the client must not commit offsets.
    :param batch_limit: the limit of a batch, in bytes after decompression.
    """

    def __init__(
        self, client: KafkaConsumer, reset: str, *, commits: bool = True, batch_limit: int = MIN_LIMIT
    ) -> None:
        self._client = client
        self._reset = reset
        self._lines = lines_of(client)
        self.can_commit = commits and client.config["group_id"] is not None
        self._listener: RebalanceListener | None = None
        self._client_listener: ClientListener | None = None
        self._start_at = self._polled_at = 0.0
        self._session = client.config["session_timeout_ms"] / 1000
        self._pending_error: ClientError | None = None
        #: Assigned partitions that have no start position yet. The client's own thread may add partitions.
        self._unstarted: set[TopicPartition] = set()
        self._unreadable = UnreadableBatches(client, batch_limit)
        self._metadata = CommitMetadata(reset)
        self._offsets = OffsetQueries(client, reset, self._metadata)
        self._topic_ids = TopicIds(client, min(TOPIC_CHECK_INTERVAL, client.config["metadata_max_age_ms"] / 1000))
        #: Assigned partitions of topics that were created again, which must start at their beginning.
        self._restarting: set[TopicPartition] = set()
        self._heartbeats = HeartbeatAnswers(client)
        keep_in_children(self, "_client")

    @property
    def cluster(self) -> str:
        # No request is necessary here, because the cluster id is part of the metadata, which the client has before it
        # returns the first record.
        return getattr(getattr(getattr(self._client, "_client", None), "cluster", None), "cluster_id", None) or ""

    def subscribe(self, topics: Iterable[str], listener: RebalanceListener) -> None:
        self._listener = listener
        subscription = Subscription.of(topics)
        self._health = HealthCheck(self._client, subscription, has_group=self.can_commit)
        self._client_listener = LISTENER(self._client, listener, self._unstarted, self._metadata)
        if (regex := subscription.regex) is None:
            self._client.subscribe(sorted(subscription.names), listener=self._client_listener)
        else:
            # One pattern for all entries, because kafka-python accepts either names or one pattern.
            self._client.subscribe(pattern=regex, listener=self._client_listener)

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        try:
            with self._lines.calling():
                return self._fetch(timeout, limit, paused)
        except KafkaError as error:
            raise as_client_error(self._client, "fetch messages", error) from error

    def _fetch(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        self._heartbeats.check()
        self._pause(limit, self._unreadable.hold(paused))
        self._resume_join()
        self._requeue_parked_records()
        self._check_topic_ids()
        batches = self._poll(timeout, limit)
        self._unreadable.reconnect()
        if new := set(self._unstarted):
            # Drop the records of new partitions, because the client may have read them from another position than
            # the committed offset.
            batches = {key: records for key, records in batches.items() if key not in new}
            self._start_new_partitions()
        # Check for errors only if there are no records, because an exception would lose the records.
        if batches:
            self._health.succeed()
        elif self._unstarted and self._pending_error is not None:
            raise self._pending_error
        else:
            self._health.run()
        return batches

    def _resume_join(self) -> None:
        """Make kafka-python complete a join that did not finish within one poll.

        If a join starts because the number of partitions of a topic changed, and if this join finishes between two
        polls, kafka-python 2 never completes it, so that the member gets no partitions. kafka-python 3 discards the
        result of the join and joins again, which revokes all partitions of the whole group again.
        """
        coordinator = self._client._coordinator
        if not coordinator.rejoining:
            return
        coordinator.rejoin_needed = True
        task = coordinator._join_task if ASYNC else None
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

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        try:
            self._commit(commits, int(timeout * 1000))
        except KafkaError as error:
            raise as_client_error(self._client, "commit offsets", error) from error

    def _commit(self, commits: Mapping[Partition, Commit], timeout_ms: int) -> None:
        while True:
            try:
                self._client.commit(client_offsets(self._metadata, commits), timeout_ms=timeout_ms)
                return
            except errors.OffsetMetadataTooLargeError:
                if not self._metadata.shrink():
                    raise

    def positions(self) -> Mapping[Partition, int]:
        states = self._client._subscription.assignment
        started = self._client.assignment() - self._unstarted - self._restarting
        positions = {tp: state.position for tp in started if (state := states.get(tp)) is not None}
        return {Partition(*tp): position.offset for tp, position in positions.items() if position is not None}

    def lag(self) -> Mapping[Partition, int]:
        lags: dict[Partition, int] = {}
        try:
            for tp in self._client.assignment() - self._unstarted:
                end, position = self._client.highwater(tp), self._client.position(tp, timeout_ms=100)
                if end is not None and position is not None:
                    lags[Partition(*tp)] = end - position
            return lags
        except KafkaError as error:
            raise as_client_error(self._client, "read the lag", error) from error

    def waiting(self) -> Mapping[Partition, str]:
        return self._unreadable.waiting()

    def is_member(self) -> bool:
        return self._heartbeats.is_member

    def close(self, timeout: float) -> None:
        # kafka-python calls the listener during close, to revoke the partitions. A new client of this process may
        # already have these partitions then, so make the listener ignore the call.
        if self._client_listener is not None:
            self._client_listener.active = False
        try:
            self._client.close(autocommit=False, timeout_ms=int(timeout * 1000))
        except KafkaError as error:
            logger.warning(
                f"could not leave the group at {servers(self._client.config)} ({error}): its partitions are reassigned"
                " after the session timeout"
            )
        self._heartbeats.close()

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
        commit = partial(self._commit, timeout_ms=QUERY_TIMEOUT_MS)
        starts = StartPositions(self._metadata, self._reset, commit if self.can_commit else None)
        self._metadata.cluster = self.cluster
        new = self._unstarted & self._client.assignment()
        self._learn_topic_ids(self._topic_ids.at_start({tp.topic for tp in new}))
        self._pending_error = None
        for tp in new:
            self.progress()
            try:
                self._start_partition(tp, starts)
                continue
            except KafkaError as error:
                self._pending_error = as_client_error(
                    self._client, f"find the start position of {tp.topic}[{tp.partition}]", error
                )
            except ClientError as error:
                self._pending_error = error
            # Set an arbitrary position, because a partition without a position makes every poll of the client fail. The
            # client reads nothing from this position, because the partition stays paused.
            self._client.seek(tp, 0)
        if not (self._unstarted & self._client.assignment()):
            self._start_at = 0.0
        starts.report(self._listener)

    def _start_partition(self, tp: TopicPartition, starts: StartPositions) -> None:
        key = Partition(*tp)
        self._metadata.partition_counts.observe(tp.topic, len(partitions_of(self._client, tp.topic) or {tp.partition}))
        start = starts.find(key, self._offsets.committed(tp), partial(self._offsets.first_position, tp))
        self._seek(tp, start.offset)
        self._unstarted.discard(tp)
        self._restarting.discard(tp)

    def _seek(self, tp: TopicPartition, offset: int) -> None:
        self._unreadable.forget(tp)
        self._client.seek(tp, offset)

    def _check_topic_ids(self) -> None:
        """Notice topics that were created again, and restart their partitions."""
        self._learn_topic_ids(self._topic_ids.poll({tp.topic for tp in self._client.assignment()}))
        self._restarting &= self._client.assignment()
        # A new topic with fewer partitions lacks some of them; the next rebalance revokes these.
        existing = {tp for tp in self._restarting if tp.partition in partitions_of(self._client, tp.topic)}
        if new := existing - self._unstarted:
            self._restart(list(new))

    def _restart(self, partitions: list[TopicPartition]) -> None:
        assert self._listener is not None
        starts = {Partition(*tp): Commit(begin) for tp, begin in self._offsets.beginnings(partitions).items()}
        for tp in partitions:
            self._metadata.mark_started(Partition(*tp))
            self._seek(tp, starts[Partition(*tp)].offset)
            self._restarting.discard(tp)
        self._listener.on_reset(starts)
        if self.can_commit:
            self._commit(starts, QUERY_TIMEOUT_MS)

    def _recover_from(self, error: KafkaError) -> None:
        """Move each fetch position that is outside of the offset range of its partition, and log the skipped offsets.

        With the reset policy ``latest``, the new position is the end of the partition, otherwise its beginning.
        """
        assert self._listener is not None
        positions: Mapping[TopicPartition, Any] = getattr(error, "divergent_offsets", None) or error.args[0]
        # Skip new partitions. They start at their committed offset, and cause this error again if that offset is out of
        # range.
        partitions = [tp for tp in positions if tp in self._client.assignment() and tp not in self._unstarted]
        if self._was_created_again(partitions):
            # The next poll restarts the partitions.
            return
        begins, ends = self._offsets.beginnings(partitions), self._offsets.ends(partitions)
        starts: dict[Partition, Commit] = {}
        for tp in partitions:
            position = self._client.position(tp, timeout_ms=QUERY_TIMEOUT_MS)
            start = ends[tp] if self._reset == "latest" else begins[tp]
            logger.error(out_of_range_text(Partition(*tp), position, begins[tp], ends[tp], start))
            self._seek(tp, start)
            starts[Partition(*tp)] = Commit(start)
        if starts and self.can_commit:
            self.commit(starts, QUERY_TIMEOUT_MS / 1000)
        self._listener.on_reset(starts)

    def _was_created_again(self, partitions: list[TopicPartition]) -> bool:
        """Return whether topics were created again; wait for the ids of the topics, if the brokers have topic ids."""
        known = {tp.topic for tp in partitions if self._metadata.knows_topic_id(tp.topic)}
        self._learn_topic_ids(self._topic_ids.fetch(known))
        return bool(self._restarting & set(partitions))

    def _learn_topic_ids(self, ids: Mapping[str, bytes]) -> None:
        for topic, topic_id in ids.items():
            if self._metadata.learn_topic_id(topic, topic_id):
                self._restarting |= {tp for tp in self._client.assignment() if tp.topic == topic}
