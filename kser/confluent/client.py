"""Consumer client on ``confluent_kafka.Consumer`` (librdkafka)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from kser.confluent.committer import Committer
from kser.confluent.logs import ClientLog
from kser.confluent.options import connect, connection_of, with_metadata_age
from kser.connection import FailureLog, explain, partial_failure_text
from kser.consumer.client import (
    Commit,
    ConsumerClient,
    Partition,
    RebalanceListener,
    Record,
    client_error,
    denied_topics,
    joined_errors,
    missing_topics,
    no_committed_offset,
    out_of_range_text,
    revoked_before_commit_text,
)
from kser.consumer.offsets import PartitionCounts, add_checksum, strip_checksum
from kser.errors import ClientError
from kser.forks import keep_in_children

logger = logging.getLogger(__name__)

#: Timeout in seconds of a query for committed offsets, or for the first and last offset of a partition.
QUERY_TIMEOUT = 5.0

#: Timeout in seconds of the metadata request that probes the brokers after an outage.
PROBE_TIMEOUT = 0.5

#: Seconds between two probes.
PROBE_INTERVAL = 2.0

#: Seconds between two tries to find the start positions of new partitions.
START_RETRY_INTERVAL = 1.0

#: Transient errors. Commits fail with these errors during a rebalance.
_TRANSIENT = (KafkaError.REBALANCE_IN_PROGRESS, KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID)
#: Errors that do not name their cause.
_WITHOUT_CAUSE = (KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._TRANSPORT)


class ConfluentClient(ConsumerClient):
    """A member of a consumer group, on librdkafka.

    :param options: the user's options of librdkafka.
    :param reset: where a partition without a committed offset starts: ``"earliest"``, ``"latest"`` or ``"none"``.
    :param max_bytes: the limit of the data that librdkafka prefetches, in bytes. ``queued.max.messages.kbytes`` in the
        options has precedence.
    :param commits: False if the client must not commit offsets.
    """

    def __init__(self, options: Mapping[str, Any], reset: str, max_bytes: int, *, commits: bool = True) -> None:
        self._reset = reset
        self._connection = connection_of(options)
        self._log = ClientLog()
        self._cooperative = "cooperative" in str(options.get("partition.assignment.strategy", ""))
        self.can_commit = commits
        self._listener: RebalanceListener | None = None
        self._user_error_cb: Callable[[KafkaError], Any] | None = options.get("error_cb")
        #: Assigned partitions that have no start position yet, because the committed offsets could not be read.
        self._unstarted: set[Partition] = set()
        self._keys: dict[tuple[str, int], Partition] = {}
        self._positions: dict[Partition, int] = {}
        self._partition_counts = PartitionCounts(reset)
        self._paused: set[Partition] = set()
        self._out_of_range: set[Partition] = set()
        #: The topics that do not exist or must not be read, and the error of each.
        self._unavailable: dict[str, ClientError] = {}
        #: The error of a group that this client must not use.
        self._group_denied: ClientError | None = None
        self._failures = FailureLog()
        self._pending_error: ClientError | None = None
        self._start_at = 0.0
        #: Number of revocations and losses of partitions so far.
        self._assignment_epoch = 0
        self._last_error: KafkaError | None = None
        self._down = False
        self._probe_at = 0.0
        keywords = {} if "logger" in options else {"logger": self._log}
        client_options = {
            "queued.max.messages.kbytes": max(max_bytes // 2048, 1),
            **with_metadata_age(options),
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            # This class chooses the start positions, so librdkafka must report a missing offset instead of choosing a
            # position.
            "auto.offset.reset": "error",
            "error_cb": self._on_error,
        }
        self.client = connect(confluent_kafka.Consumer, client_options, **keywords)
        self._committer = Committer(self.client)
        keep_in_children(self, "client")

    @property
    def cluster(self) -> str:
        return str(self.client.list_topics(timeout=QUERY_TIMEOUT).cluster_id or "")

    def subscribe(self, topics: Iterable[str], listener: RebalanceListener) -> None:
        self._listener = listener
        self.client.subscribe(list(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        try:
            problem = self._start_pending()
            self._pause(limit, paused)
            batches = self._group_by_partition(self._consume(timeout, limit))
        except KafkaException as error:
            raise self._as_client_error("fetch messages", error.args[0]) from error
        # Raise an error only if there are no records, because an exception would lose the records.
        if not batches and (problem := problem or self._current_error()):
            raise problem
        reason = self._log.failure.persistent_reason()
        if reason and self._failures.is_due(explain(reason, self._connection).kind):
            logger.warning(partial_failure_text(reason, self._connection))
        return batches

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        try:
            self._committer.commit(self._offsets(commits), timeout)
        except KafkaException as error:
            raise self._as_client_error("commit offsets", error.args[0]) from error
        except TimeoutError as error:
            raise client_error("commit offsets", self._connection, error) from error

    def lag(self) -> Mapping[Partition, int]:
        lags: dict[Partition, int] = {}
        for key, position in self._positions.items():
            with suppress(KafkaException):
                _, end = self.client.get_watermark_offsets(TopicPartition(*key), cached=True)
                if end >= 0:
                    lags[key] = end - position
        return lags

    def close(self, timeout: float) -> None:
        # During close, librdkafka calls the revocation callback. A new client may already have the partitions then, so
        # the callback must have no effect.
        self._listener = None
        # librdkafka's close has no timeout, so run it in a thread. After the timeout, this method returns although that
        # thread still runs.
        self._committer.close()
        closing = threading.Thread(target=self.client.close, name="kser-close", daemon=True)
        closing.start()
        closing.join(timeout)
        if timeout and closing.is_alive():
            logger.warning(
                f"could not leave the group at {self._connection.servers} within {timeout:g} s: its partitions are"
                " reassigned after the session timeout"
            )

    # -- records -------------------------------------------------------------------------------------------------------

    def _consume(self, timeout: float, limit: int) -> list[Any]:
        # ``consume`` waits until it has all requested messages. So wait for one message with ``poll``, and then fetch
        # the messages that are already buffered.
        first = self.client.poll(timeout)
        if first is None:
            return []
        epoch = self._assignment_epoch
        try:
            more = self.client.consume(limit - 1, 0) if limit > 1 else []
        except KafkaException as error:
            # The next poll raises this error. If this poll raised the error, the first message would be lost.
            self._last_error = error.args[0]
            more = []
        # If ``consume`` ran a rebalance callback, the first message may belong to a revoked partition, so drop it.
        return [first, *more] if epoch == self._assignment_epoch else more

    def _group_by_partition(self, messages: Iterable[Any]) -> dict[Partition, Sequence[Record]]:
        fetched: dict[tuple[str, int], list[Record]] = {}
        self._out_of_range.clear()
        for message in messages:
            topic, partition = message.topic(), message.partition()
            if message.error() is not None:
                self._note_error(message)
                continue
            record = ConfluentRecord(message, topic, partition)
            batch = fetched.get((topic, partition))
            if batch is None:
                fetched[topic, partition] = [record]
            else:
                batch.append(record)
        batches: dict[Partition, Sequence[Record]] = {}
        for topic_partition, records in fetched.items():
            key = self._keys.get(topic_partition)
            # A partition that was revoked after its messages were fetched is no longer in ``_keys``, so drop its
            # messages.
            if key is not None:
                self._positions[key] = records[-1].offset + 1
                batches[key] = records
        for key in self._out_of_range & self._positions.keys():
            self._recover(key)
        return batches

    def _note_error(self, message: Any) -> None:
        error = message.error()
        key = self._keys.get((message.topic(), message.partition()))
        if error.code() == KafkaError._PARTITION_EOF:
            if key is not None:
                # The end of the partition can be above the last record, because transaction markers have offsets too.
                self._positions[key] = max(message.offset(), self._positions.get(key, 0))
        elif error.code() == KafkaError._AUTO_OFFSET_RESET and key is not None:
            self._out_of_range.add(key)
        elif error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED):
            self._note_unavailable_topic(message.topic(), error)
        elif error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            self._group_denied = self._as_client_error("join the group", error)
        else:
            # The next poll raises this error, because this poll must return the records that were fetched together with
            # the error.
            self._last_error = error

    def _note_unavailable_topic(self, topic: str | None, error: KafkaError) -> None:
        if topic is None:
            self._last_error = error
            return
        build = missing_topics if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART else denied_topics
        self._unavailable[topic] = build([topic], self._connection)

    def _pause(self, limit: int, held: Collection[Partition]) -> None:
        wanted = (set(held) & self._positions.keys()) if limit else set(self._positions)
        if wanted == self._paused:
            return
        if more := wanted - self._paused:
            self.client.pause([TopicPartition(*key) for key in more])
        if less := (self._paused - wanted) & self._positions.keys():
            self.client.resume([TopicPartition(*key) for key in less])
        self._paused = wanted

    # -- assignment and revocation -------------------------------------------------------------------------------------

    def _on_assign(self, client: Any, partitions: list[TopicPartition]) -> None:
        self._group_denied = None
        self._unstarted |= {Partition(tp.topic, tp.partition) for tp in partitions}
        self._pending_error = self._start_partitions()

    def _start_pending(self) -> ClientError | None:
        """Try again, if a retry is due, to start the partitions that have no start position yet.

        :return: the error if some partitions still have no start position, otherwise None.
        """
        if self._unstarted and time.monotonic() >= self._start_at:
            self._pending_error = self._start_partitions()
        return self._pending_error if self._unstarted else None

    def _start_partitions(self) -> ClientError | None:
        """Start each new partition at its committed offset or, without a committed offset, as the reset policy demands.

        :return: the error if some partitions could not be started. The other partitions are started anyway.
        """
        self._start_at = time.monotonic() + START_RETRY_INTERVAL
        problem: ClientError | None = None
        new = [TopicPartition(*key) for key in self._unstarted]
        try:
            committed = self.client.committed(new, timeout=QUERY_TIMEOUT) if new else []
        except KafkaException as error:
            # Call ``assign`` even without a partition. If the callback does not call ``assign``, librdkafka assigns the
            # partitions by itself.
            self._assign({})
            return self._as_client_error("read the committed offsets of the group", error.args[0])
        known: dict[Partition, Commit] = {}
        fresh: dict[Partition, Commit] = {}
        for tp in committed:
            try:
                self._find_start(tp, known, fresh)
            except KafkaException as error:
                problem = self._as_client_error(f"find the start position of {tp.topic}[{tp.partition}]", error.args[0])
            except ClientError as error:
                problem = error
        self._assign_started(known, fresh)
        return problem

    def _find_start(self, tp: TopicPartition, known: dict[Partition, Commit], fresh: dict[Partition, Commit]) -> None:
        if tp.error is not None:
            raise KafkaException(tp.error)
        key = Partition(tp.topic, tp.partition)
        if tp.offset >= 0:
            known[key] = commit_of(tp)
            if self._reset == "latest":
                self._partitions_of(key.topic)
                self._partition_counts.restore(key, known[key])
        elif self._reset == "none":
            raise no_committed_offset([key])
        else:
            start = self._first_position(key)
            if self.can_commit:
                self._commit_now({key: start})
            fresh[key] = start

    def _assign_started(self, known: Mapping[Partition, Commit], fresh: Mapping[Partition, Commit]) -> None:
        assert self._listener is not None
        starts = {**known, **fresh}
        self._unstarted -= starts.keys()
        for key in starts:
            self._unavailable.pop(key.topic, None)
        self._keys.update({(key.topic, key.partition): key for key in starts})
        self._positions.update({key: start.offset for key, start in starts.items()})
        self._listener.on_assign(known)
        # A client that never commits finds no committed offset when a partition is assigned to it again. So call
        # ``on_assign`` in this case: the listener still knows the finished offsets, and ``on_reset`` would discard
        # them.
        self._listener.on_reset(fresh) if self.can_commit else self._listener.on_assign(fresh)
        self._assign({key: start.offset for key, start in starts.items()})

    def _assign(self, starts: Mapping[Partition, int]) -> None:
        """Add partitions to librdkafka's assignment, and resume them if an earlier assignment left them paused."""
        if not self._cooperative:
            starts = self._positions
        partitions = [TopicPartition(*key, offset) for key, offset in starts.items()]
        (self.client.incremental_assign if self._cooperative else self.client.assign)(partitions)
        self.client.resume(partitions)
        self._paused -= starts.keys()

    def _first_position(self, key: Partition) -> Commit:
        """Return the start position of a partition without a committed offset."""
        low, high = self.client.get_watermark_offsets(TopicPartition(*key), timeout=QUERY_TIMEOUT)
        if self._reset == "earliest":
            return Commit(low)
        partitions = self._partitions_of(key.topic)
        for committed in self.client.committed(
            [TopicPartition(key.topic, n) for n in partitions], timeout=QUERY_TIMEOUT
        ):
            if committed.offset >= 0:
                self._partition_counts.restore(key, commit_of(committed))
        return self._partition_counts.annotate(
            key, Commit(low if self._partition_counts.is_new_partition(key) else high)
        )

    def _partitions_of(self, topic: str) -> list[int]:
        """Return the partitions of a topic, and record their number."""
        partitions = list(self.client.list_topics(topic, timeout=QUERY_TIMEOUT).topics[topic].partitions)
        self._partition_counts.observe(topic, len(partitions))
        return partitions

    def _offsets(self, commits: Mapping[Partition, Commit]) -> list[TopicPartition]:
        annotated = [(key, self._partition_counts.annotate(key, commit)) for key, commit in commits.items()]
        return [
            TopicPartition(key.topic, key.partition, c.offset, metadata=add_checksum(c.metadata))
            for key, c in annotated
        ]

    def _on_revoke(self, client: Any, partitions: list[TopicPartition]) -> None:
        keys = self._forget(partitions)
        if self._listener is None:
            return
        revocation = self._listener.on_revoke(keys)
        if not revocation.drained:
            # Commit before the wait. If the topic gets new partitions while this callback waits, librdkafka continues
            # the rebalance before the callback has ended. Records that are finished and not committed by then would run
            # again.
            with suppress(KafkaException):
                self._commit_now(revocation.commits())
            revocation.wait()
        commits = revocation.commits()
        try:
            self._commit_now(commits)
        except KafkaException as error:
            logger.warning(revoked_before_commit_text(commits, error))

    def _commit_now(self, commits: Mapping[Partition, Commit]) -> None:
        if commits:
            self.client.commit(offsets=self._offsets(commits), asynchronous=False)

    def _on_lost(self, client: Any, partitions: list[TopicPartition]) -> None:
        keys = self._forget(partitions)
        if self._listener is not None:
            self._listener.on_lost(keys)

    def _forget(self, partitions: list[TopicPartition]) -> list[Partition]:
        keys = [Partition(tp.topic, tp.partition) for tp in partitions]
        self._assignment_epoch += 1
        for key in keys:
            self._keys.pop((key.topic, key.partition), None)
            self._positions.pop(key, None)
            self._paused.discard(key)
            self._unstarted.discard(key)
        return keys

    def _recover(self, key: Partition) -> None:
        """Handle a fetch position that is out of range.

        Log which offsets were lost, and continue at the position that the reset policy demands.
        """
        assert self._listener is not None
        low, high = self.client.get_watermark_offsets(TopicPartition(*key), timeout=QUERY_TIMEOUT)
        start = high if self._reset == "latest" else low
        logger.error(out_of_range_text(key, self._positions.get(key), low, high, start))
        self._positions[key] = start
        self._listener.on_reset({key: Commit(start)})
        # ``seek`` fails for a partition that is not being fetched, so assign the partition again instead.
        if self._cooperative:
            self.client.incremental_unassign([TopicPartition(*key)])
        self._assign({key: start})
        if self.can_commit:
            self.commit({key: Commit(start)}, QUERY_TIMEOUT)

    # -- errors --------------------------------------------------------------------------------------------------------

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() in (KafkaError._AUTHENTICATION, KafkaError._ALL_BROKERS_DOWN):
            self._last_error = error
            self._down = True
        if self._user_error_cb is not None:
            self._user_error_cb(error)

    def _current_error(self) -> ClientError | None:
        """Return the current error. After an outage, the error is cleared only when a broker responds."""
        error = self._last_error
        if error is None:
            return self._group_denied or self._unavailable_topics()
        if not self._down or error.fatal():
            self._last_error = None
        elif self._broker_responds():
            self._last_error = None
            self._down = False
            self._log.failure.clear()
            return None
        return self._as_client_error("fetch messages", error)

    def _unavailable_topics(self) -> ClientError | None:
        """Return the error of a client without partitions whose topics do not exist or must not be read.

        A client with partitions only logs such topics, because it can consume the others.
        """
        if not self._unavailable:
            return None
        if self._keys:
            for topic, problem in list(self._unavailable.items()):
                if self._failures.is_due(problem.kind) and not self._probe_topic(topic):
                    logger.error(f"{problem.message}; consuming the other topics meanwhile")
            return None
        if time.monotonic() >= self._probe_at:
            self._probe_at = time.monotonic() + PROBE_INTERVAL
            for topic in list(self._unavailable):
                self._probe_topic(topic)
        return joined_errors(list(self._unavailable.values()))

    def _probe_topic(self, topic: str) -> bool:
        """Return whether the topic can be read by now."""
        with suppress(KafkaException):
            if self.client.list_topics(topic, timeout=PROBE_TIMEOUT).topics[topic].error is None:
                self._unavailable.pop(topic, None)
                return True
        return False

    def _broker_responds(self) -> bool:
        """Return whether a broker responds.

        After a failed probe, the next probe follows at least ``PROBE_INTERVAL`` seconds later.
        """
        if time.monotonic() < self._probe_at:
            return False
        try:
            self.client.list_topics(timeout=PROBE_TIMEOUT)
        except KafkaException:
            self._probe_at = time.monotonic() + PROBE_INTERVAL
            return False
        return True

    def _as_client_error(self, action: str, error: KafkaError) -> ClientError:
        transient = error.code() in _TRANSIENT
        # These errors hide the cause, which librdkafka only logs.
        reason = self._log.failure.reason() if error.code() in _WITHOUT_CAUSE else ""
        return client_error(action, self._connection, reason or error.str(), fatal=error.fatal(), transient=transient)


class ConfluentRecord:
    """A record that wraps a message of librdkafka."""

    __slots__ = ("key", "message", "offset", "partition", "topic", "value")

    def __init__(self, message: Any, topic: str, partition: int) -> None:
        self.message = message
        self.topic = topic
        self.partition = partition
        self.offset: int = message.offset()
        self.key: bytes | None = message.key()
        self.value: bytes | None = message.value()

    @property
    def timestamp(self) -> int:
        """The timestamp of the record, in milliseconds since 1970."""
        return int(self.message.timestamp()[1])

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """The names and values of the headers."""
        return self.message.headers() or ()


def commit_of(tp: TopicPartition) -> Commit:
    """Convert a committed offset of the group, in the form in which librdkafka returns it, to a Commit."""
    try:
        return Commit(tp.offset, strip_checksum(tp.metadata or ""))
    except UnicodeDecodeError:
        # Commit metadata that another client wrote has no terminating NUL. So librdkafka's Python client reads past the
        # end of the metadata, into bytes that may not be UTF-8. kser does not need this metadata, so return only the
        # offset.
        return Commit(tp.offset)
