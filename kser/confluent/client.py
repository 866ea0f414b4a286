"""Consumer client on ``confluent_kafka.Consumer`` (librdkafka)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from kser.confluent.client_errors import ClientErrors
from kser.confluent.committer import Committer, commit_and_check
from kser.confluent.damage import DAMAGE, DamagedPartitions
from kser.confluent.group_errors import LibraryError, library_errors
from kser.confluent.options import connect, is_next_protocol, with_metadata_age
from kser.confluent.patterns import PatternFollower
from kser.confluent.records import ConfluentRecord
from kser.confluent.topic_ids import TopicIds
from kser.consumer.client import (
    Commit,
    ConsumerClient,
    Partition,
    RebalanceListener,
    Record,
    client_error,
    out_of_range_text,
    revoked_before_commit_text,
)
from kser.consumer.commit_metadata import TOPIC_CHECK_INTERVAL, CommitMetadata
from kser.consumer.start_positions import StartPositions
from kser.consumer.subscription import Subscription
from kser.errors import ClientError
from kser.escaping import escape_lines
from kser.forks import keep_in_children

logger = escape_lines(logging.getLogger(__name__))

#: Timeout in seconds of a query for committed offsets, or for the first and last offset of a partition.
QUERY_TIMEOUT = 5.0

#: Seconds between two tries to find the start positions of new partitions, or to move partitions to another position.
START_RETRY_INTERVAL = 1.0

#: Errors of a partition that does not exist.
_UNKNOWN = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION, KafkaError._UNKNOWN_TOPIC)


def _storing_its_error(callback: Callable[[ConfluentClient, Any, list[TopicPartition]], None]) -> Any:
    """Return a rebalance callback that stores its exception, which the next poll raises."""

    @wraps(callback)
    def call(self: ConfluentClient, client: Any, partitions: list[TopicPartition]) -> None:
        try:
            callback(self, client, partitions)
        except Exception as error:
            self._callback_error = error

    return call


class ConfluentClient(ConsumerClient):
    """A member of a consumer group, on librdkafka.

    :param options: the user's options of librdkafka.
    :param reset: where a partition without a committed offset starts: ``"earliest"``, ``"latest"`` or ``"none"``.
    :param max_bytes: the limit of the data that librdkafka prefetches, in bytes. ``queued.max.messages.kbytes`` in the
        options has precedence.
    :param commits: False if the client must not commit offsets.
    """

    def __init__(self, options: Mapping[str, Any], reset: str, max_bytes: int, *, commits: bool = True) -> None:
        options = with_metadata_age(options)
        self._reset = reset
        self._errors = ClientErrors(options)
        #: True if a rebalance moves single partitions, so that the client adds and removes them one by one.
        self._cooperative = is_next_protocol(options) or "cooperative" in str(
            options.get("partition.assignment.strategy", "")
        )
        self.can_commit = commits
        self._listener: RebalanceListener | None = None
        self._patterns: PatternFollower | None = None
        #: Assigned partitions that have no start position yet, because the committed offsets could not be read.
        self._unstarted: set[Partition] = set()
        self._keys: dict[tuple[str, int], Partition] = {}
        self._positions: dict[Partition, int] = {}
        self._metadata = CommitMetadata(reset)
        refresh = float(options.get("topic.metadata.refresh.interval.ms", 300_000)) / 1000
        self._topic_ids = TopicIds(options, min(TOPIC_CHECK_INTERVAL, refresh if refresh > 0 else TOPIC_CHECK_INTERVAL))
        #: Assigned partitions of topics that were created again, which must start at their beginning.
        self._restarting: set[Partition] = set()
        self._paused: set[Partition] = set()
        #: Assigned partitions that librdkafka does not fetch from their position. They are held until it does.
        self._misplaced: set[Partition] = set()
        self._move_error: ClientError | None = None
        self._pending_error: ClientError | None = None
        self._start_at = self._move_at = 0.0
        #: The error that a rebalance callback has raised. The callback itself must raise nothing, because librdkafka's
        #: Python client would raise the error in a form that no ``except`` clause catches, or crash.
        self._callback_error: Exception | None = None
        #: Number of revocations and losses of partitions so far.
        self._assignment_epoch = 0
        keywords: dict[str, Any] = {} if "logger" in options else {"logger": self._errors.log}
        client_options = {
            "queued.max.messages.kbytes": max(max_bytes // 2048, 1),
            # Without this check, librdkafka returns damaged values, and silently stops at some damaged batches.
            "check.crcs": True,
            **options,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            # This class chooses the start positions, so librdkafka must report a missing offset instead of choosing a
            # position.
            "auto.offset.reset": "error",
            "error_cb": self._errors.on_error,
        }
        self.client = self._errors.client = connect(confluent_kafka.Consumer, client_options, **keywords)
        self._committer = Committer(self.client)
        self._damaged = DamagedPartitions(client_options)
        keep_in_children(self, "client")

    @property
    def cluster(self) -> str:
        return str(self.client.list_topics(timeout=QUERY_TIMEOUT).cluster_id or "")

    def subscribe(self, topics: Iterable[str], listener: RebalanceListener) -> None:
        self._listener = listener
        subscribe = partial(
            self.client.subscribe, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        subscription = Subscription.of(topics)
        if subscription.patterns:
            self._patterns = PatternFollower(self.client, subscription, subscribe, self._errors.connection.servers)
        else:
            subscribe(subscription.names)

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        try:
            with library_errors():
                if self._patterns is not None:
                    self._patterns.follow()
                problem = self._start_pending()
                self._learn_topic_ids(self._topic_ids.poll({key.topic for key in self._positions}))
                problem = self._move_pending() or problem
                self._pause(limit, {*paused, *self._damaged.partitions, *self._misplaced})
                # From here on, no call may raise an error after it has taken records, because the positions are moved.
                unreadable = self._take_unreadable(paused) if limit else {}
                batches = unreadable or self._group_by_partition(self._consume(timeout, limit))
                if not batches:
                    self._raise_callback_error()
        except LibraryError as error:
            raise self._errors.as_client_error("fetch messages", error.error) from error
        # Raise an error only if there are no records, because an exception would lose the records.
        if not batches and (problem := problem or self._errors.current(has_partitions=bool(self._keys))):
            raise problem
        self._errors.warn_of_partial_failure()
        return batches

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        try:
            with library_errors():
                self._shrink_metadata(lambda: self._committer.commit(self._offsets(commits), timeout))
        except LibraryError as error:
            raise self._errors.as_client_error("commit offsets", self._errors.fatal or error.error) from error
        except TimeoutError as error:
            raise client_error("commit offsets", self._errors.connection, error) from error

    def positions(self) -> Mapping[Partition, int]:
        return {key: position for key, position in self._positions.items() if key not in self._restarting}

    def lag(self) -> Mapping[Partition, int]:
        # librdkafka has no end offset of a partition from which it has fetched nothing yet. A misplaced partition is
        # blocked, so it counts as lagging even if its end offset is unknown.
        lags = dict.fromkeys(self._misplaced & self._positions.keys(), 1)
        for key, position in self._positions.items():
            with suppress(KafkaException):
                _, end = self.client.get_watermark_offsets(TopicPartition(*key), cached=True)
                if end >= 0:
                    lags[key] = max(end - position, lags.get(key, end - position))
        return lags

    def is_member(self) -> bool:
        return self._errors.is_member()

    def close(self, timeout: float) -> None:
        # During close, librdkafka calls the revocation callback. A new client may already have the partitions then, so
        # the callback must have no effect.
        self._listener = None
        self._damaged.forget(list(self._damaged.partitions))
        # librdkafka's close has no timeout, so run it in a thread. After the timeout, this method returns although that
        # thread still runs.
        self._committer.close()
        self._topic_ids.close()
        closing = threading.Thread(target=self.client.close, name="kser-close", daemon=True)
        closing.start()
        closing.join(timeout)
        if timeout and closing.is_alive():
            logger.warning(
                f"could not leave the group at {self._errors.connection.servers} within {timeout:g} s: its partitions"
                " are reassigned after the session timeout"
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
            self._errors.note(error.args[0])
            more = []
        # If ``consume`` ran a rebalance callback, the first message may belong to a revoked partition, so drop it.
        return [first, *more] if epoch == self._assignment_epoch else more

    def _group_by_partition(self, messages: Iterable[Any]) -> Mapping[Partition, Sequence[Record]]:
        """Return the records of the messages, and collect their errors, which the next poll handles.

        This method calls nothing that may fail, because a failed poll would lose the records.
        """
        batches: dict[Partition, list[Record]] = {}
        held = {*self._damaged.partitions, *self._misplaced}
        damage: dict[Partition, KafkaError] = {}
        for message in messages:
            topic, partition = message.topic(), message.partition()
            # A partition that was revoked after its messages were fetched is no longer in ``_keys``, so drop its
            # messages.
            key = self._keys.get((topic, partition))
            if message.error() is not None:
                self._note_error(message, key, held, damage)
            # After damaged data, librdkafka may continue with the next batch. The client fetches this batch again.
            elif key is not None and key not in held:
                batches.setdefault(key, []).append(ConfluentRecord(message, topic, partition))
        for key, records in batches.items():
            self._positions[key] = max(records[-1].offset + 1, self._positions[key])
        for key, error in damage.items():
            self._damaged.search(key, self._positions[key], error)
        return batches

    def _note_error(
        self, message: Any, key: Partition | None, held: set[Partition], damage: dict[Partition, KafkaError]
    ) -> None:
        error = message.error()
        if error.code() == KafkaError._PARTITION_EOF:
            if key is not None and key not in held:
                # The end of the partition can be above the last record, because transaction markers have offsets too.
                self._positions[key] = max(message.offset(), self._positions.get(key, 0))
        elif error.code() == KafkaError._AUTO_OFFSET_RESET and key is not None:
            self._misplaced.add(key)
        elif error.code() in DAMAGE and key is not None:
            if key not in held:
                damage[key] = error
                held.add(key)
        else:
            # The next poll raises this error, because this poll must return the records that were fetched together with
            # the error.
            self._errors.note(error, message.topic())

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

    def _raise_callback_error(self) -> None:
        error, self._callback_error = self._callback_error, None
        if isinstance(error, KafkaException):
            # The client may lack a partition of its assignment now, so a new client must replace it.
            raise client_error(
                "handle a rebalance", self._errors.connection, error.args[0].str(), fatal=True
            ) from error
        if error is not None:
            raise error

    @_storing_its_error
    def _on_assign(self, client: Any, partitions: list[TopicPartition]) -> None:
        self._errors.on_assigned(())
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
            return self._errors.as_client_error("read the committed offsets of the group", error.args[0])
        starts = StartPositions(self._metadata, self._reset, self._commit_now if self.can_commit else None)
        try:
            self._learn_cluster_and_topics({tp.topic for tp in committed})
        except KafkaException as error:
            committed = []
            problem = self._errors.as_client_error("read the metadata of the topics", error.args[0])
        for tp in committed:
            self.progress()
            try:
                self._find_start(tp, starts)
            except KafkaException as error:
                problem = self._errors.as_client_error(
                    f"find the start position of {tp.topic}[{tp.partition}]", error.args[0]
                )
            except ClientError as error:
                problem = error
        self._assign_started(starts)
        return problem

    def _learn_cluster_and_topics(self, topics: set[str]) -> None:
        if not topics:
            return
        if not self._metadata.cluster:
            self._metadata.cluster = str(self._topic_ids.describe(min(topics), QUERY_TIMEOUT).cluster_id or "")
        self._learn_topic_ids(self._topic_ids.fetch(topics))

    def _learn_topic_ids(self, ids: Mapping[str, bytes]) -> None:
        for topic, topic_id in ids.items():
            if self._metadata.learn_topic_id(topic, topic_id):
                self._restarting |= {key for key in self._positions if key.topic == topic}

    def _move_pending(self) -> ClientError | None:
        """Move, if a try is due, the partitions that must fetch from another position.

        :return: the error if some partitions could not be moved. The other partitions are moved anyway.
        """
        problem: ClientError | None = None
        self._restarting &= self._positions.keys()
        if time.monotonic() < self._move_at:
            return self._move_error if self._misplaced or self._restarting else None
        for pending, move in ((self._misplaced, self._recover), (self._restarting, self._restart)):
            for key in pending - self._damaged.partitions if pending is self._misplaced else set(pending):
                self.progress()
                try:
                    if move(key):
                        pending.discard(key)
                except KafkaException as error:
                    problem = self._errors.as_client_error(f"find a position in {key}", error.args[0])
                except ClientError as error:
                    problem = error
        self._move_error = problem
        if problem is not None:
            self._move_at = time.monotonic() + START_RETRY_INTERVAL
        return problem

    def _restart(self, key: Partition) -> bool:
        """Restart a partition of a topic that was created again, at the beginning of the new topic.

        :return: False if the new topic has no such partition. The next rebalance revokes it.
        """
        try:
            low, _ = self.client.get_watermark_offsets(TopicPartition(*key), timeout=QUERY_TIMEOUT)
        except KafkaException as error:
            if error.args[0].code() not in _UNKNOWN:
                raise
            return False
        self._metadata.mark_started(key)
        self._damaged.forget([key])
        self._move_to(key, low)
        self._misplaced.discard(key)
        return True

    def _find_start(self, tp: TopicPartition, starts: StartPositions) -> None:
        if tp.error is not None:
            raise KafkaException(tp.error)
        key = Partition(tp.topic, tp.partition)
        if self._reset == "latest":
            self._partitions_of(key.topic)
        committed = Commit(tp.offset, written_metadata(tp)) if tp.offset >= 0 else None
        starts.find(key, committed, partial(self._first_position, key))

    def _assign_started(self, found: StartPositions) -> None:
        assert self._listener is not None
        starts = found.all
        self._unstarted -= starts.keys()
        self._errors.on_assigned({key.topic for key in starts})
        self._keys.update({(key.topic, key.partition): key for key in starts})
        self._positions.update({key: start.offset for key, start in starts.items()})
        self._restarting -= starts.keys()
        self._misplaced -= starts.keys()
        found.report(self._listener)
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
                other = Partition(committed.topic, committed.partition)
                self._metadata.restore(other, committed.offset, written_metadata(committed))
        return Commit(low if self._metadata.partition_counts.is_new_partition(key) else high)

    def _partitions_of(self, topic: str) -> list[int]:
        """Return the partitions of a topic, and record their number."""
        partitions = list(self._topic_ids.describe(topic, QUERY_TIMEOUT).topics[topic].partitions)
        self._metadata.partition_counts.observe(topic, len(partitions))
        return partitions

    def _offsets(self, commits: Mapping[Partition, Commit]) -> list[TopicPartition]:
        return [client_offset(key, commit.offset, self._metadata.write(key, commit)) for key, commit in commits.items()]

    @_storing_its_error
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
            self.progress()
            revocation.wait()
            self.progress()
        commits = revocation.commits()
        try:
            self._commit_now(commits)
        except KafkaException as error:
            logger.warning(revoked_before_commit_text(commits, error))

    def _commit_now(self, commits: Mapping[Partition, Commit]) -> None:
        # Not through the committer: while a callback of the client runs, a commit in another thread waits for its end.
        if commits:
            self._shrink_metadata(lambda: commit_and_check(self.client, self._offsets(commits)))

    def _shrink_metadata(self, commit: Callable[[], None]) -> None:
        """Commit, with shorter and shorter metadata while the broker rejects the metadata as too large."""
        while True:
            try:
                commit()
                return
            except KafkaException as error:
                if error.args[0].code() != KafkaError.OFFSET_METADATA_TOO_LARGE or not self._metadata.shrink():
                    raise

    @_storing_its_error
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
            self._misplaced.discard(key)
        self._damaged.forget(keys)
        return keys

    def _recover(self, key: Partition) -> bool:
        """Let a partition fetch from its position again.

        If the position is out of range, log which offsets were lost, and continue at the position that the reset policy
        demands.

        :return: False if the partition must restart instead, because its topic was created again.
        """
        if self._metadata.knows_topic_id(key.topic):
            self._learn_topic_ids(self._topic_ids.fetch([key.topic]))
        if key in self._restarting:
            return False
        low, high = self.client.get_watermark_offsets(TopicPartition(*key), timeout=QUERY_TIMEOUT)
        position = self._positions[key]
        if low <= position <= high:
            # After damaged data, librdkafka may fetch from an offset that it has read from the damaged bytes.
            self._fetch_from(key, position)
            return True
        start = high if self._reset == "latest" else low
        self._move_to(key, start, out_of_range_text(key, position, low, high, start))
        return True

    def _move_to(self, key: Partition, start: int, lost: str = "") -> None:
        """Commit a start position, log the lost offsets if there are any, and fetch from the start position.

        If the commit fails, nothing else has changed, so that the caller can repeat the call.
        """
        assert self._listener is not None
        if self.can_commit:
            self.commit({key: Commit(start)}, QUERY_TIMEOUT)
        if lost:
            logger.error(lost)
        self._listener.on_reset({key: Commit(start)})
        self._fetch_from(key, start)

    def _fetch_from(self, key: Partition, offset: int) -> None:
        self._positions[key] = offset
        # ``seek`` fails for a partition that is not being fetched, so assign the partition again instead.
        if self._cooperative:
            # The partition is not assigned if an earlier call has failed between these two.
            with suppress(KafkaException):
                self.client.incremental_unassign([TopicPartition(*key)])
        self._assign({key: offset})

    def _take_unreadable(self, paused: Collection[Partition]) -> dict[Partition, Sequence[Record]]:
        """Return the unreadable records that were found. The next poll continues to fetch behind them.

        :raises kser.errors.ClientError: this client cannot decode data that other clients can decode.
        """
        batches: dict[Partition, Sequence[Record]] = {}
        for search in self._damaged.take_finished(paused):
            record = search.unreadable
            if record is not None:
                batches[search.partition] = [record]
            elif self._damaged.must_reconnect(search):
                raise ClientError(
                    f"offset {search.offset} of {search.partition} arrives damaged over the connection to"
                    f" {self._errors.connection.servers}, and undamaged over others: the client is replaced",
                    fatal=True,
                )
            self._positions[search.partition] = search.offset if record is None else record.last_offset + 1
            self._misplaced.add(search.partition)
        return batches


def client_offset(key: Partition, offset: int, metadata: str) -> TopicPartition:
    """Return a commit in the form that confluent-kafka accepts."""
    # confluent-kafka adds a NUL to the metadata, also to empty metadata, so pass no empty metadata.
    if not metadata:
        return TopicPartition(key.topic, key.partition, offset)
    return TopicPartition(key.topic, key.partition, offset, metadata=metadata)


def written_metadata(tp: TopicPartition) -> str:
    """Return the metadata of a committed offset, in the form in which Kafka has stored it."""
    try:
        return tp.metadata or ""
    except UnicodeDecodeError:
        # Commit metadata that another client wrote has no terminating NUL. So librdkafka's Python client reads past the
        # end of the metadata, into bytes that may not be UTF-8. kser does not need this metadata.
        return ""
