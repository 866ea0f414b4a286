"""Rebalance listeners for kafka-python 2 and 3."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

import kafka
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, OffsetMetadataTooLargeError
from kafka.structs import OffsetAndMetadata

from kser.consumer.client import Commit, Partition, RebalanceListener, Revocation, revoked_before_commit_text
from kser.consumer.commit_metadata import CommitMetadata
from kser.escaping import escape_lines

logger = escape_lines(logging.getLogger(__name__))

#: Timeout in milliseconds of the commit before a rebalance. It is short, because the whole group waits for the commit.
REVOKE_TIMEOUT_MS = 2000
#: Seconds between two checks whether attempts still run. The checks run in the client's thread, which must not block.
REVOKE_WAIT_INTERVAL = 0.01
#: True with kafka-python 3, which does its work in a thread of its own.
ASYNC = hasattr(kafka, "AsyncConsumerRebalanceListener")


def client_offsets(
    metadata: CommitMetadata, commits: Mapping[Partition, Commit]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Return commits in the form that kafka-python accepts."""
    # End the metadata with a NUL, because librdkafka's Python client reads metadata up to the first NUL. A broker that
    # accepts no metadata accepts no NUL either.
    end = "" if metadata.is_disabled else "\0"
    return {
        TopicPartition(*key): OffsetAndMetadata(commit.offset, f"{metadata.write(key, commit)}{end}", -1)
        for key, commit in commits.items()
    }


class PendingJoin:
    """A join that was pending at the end of a poll. The next poll awaits this join, even if the join is done by then.

    :param task: kafka-python's future of the join.
    :param polled: the end of the last poll, when the join was still pending.
    """

    #: Always False, so that kafka-python awaits this join and reads its result. If ``is_done`` were True, kafka-python
    #: would ignore the result and join again.
    is_done = False

    def __init__(self, task: Any, polled: float) -> None:
        self.add_callback, self.add_errback = task.add_callback, task.add_errback
        self._task = task
        self._pending = polled

    def is_usable(self, max_age: float) -> bool:
        """Return whether the client can still use the result of the join.

        A result older than ``max_age`` seconds is void, because this member sends no heartbeats between the end of the
        join and the next poll. An error that is not a KafkaError also makes the result void, because the client does
        not handle such an error.
        """
        now = time.monotonic()
        if not self._task.is_done:
            self._pending = now
        is_handled = self._task.exception is None or isinstance(self._task.exception, KafkaError)
        return is_handled and now - self._pending < max_age


def _partitions(client_partitions: Collection[TopicPartition]) -> set[Partition]:
    return {Partition(*tp) for tp in client_partitions}


class ClientListener:
    """Base of the rebalance listeners for kafka-python 2 and kafka-python 3.

    The Kafka client calls this listener, and this listener calls the rebalance listener of the consumer.

    :param client: the Kafka client.
    :param listener: the rebalance listener of the consumer.
    :param unstarted: the set of the assigned partitions without a start position; this class adds and removes
        partitions.
    :param metadata: the metadata of the client's commits.
    """

    def __init__(
        self,
        client: KafkaConsumer,
        listener: RebalanceListener,
        unstarted: set[TopicPartition],
        metadata: CommitMetadata,
    ) -> None:
        self._client = client
        self._listener = listener
        self._unstarted = unstarted
        self._metadata = metadata
        #: False while the client is closing. The listener then ignores all calls.
        self.active = True

    def _revoke(self, revoked: Collection[TopicPartition]) -> Revocation:
        self._unstarted.difference_update(revoked)
        return self._listener.on_revoke(_partitions(revoked))

    def _offsets(self, commits: Mapping[Partition, Commit]) -> dict[TopicPartition, OffsetAndMetadata]:
        return client_offsets(self._metadata, commits)


class RebalanceListenerV2(ClientListener):
    """The listener for kafka-python 2. The client calls this listener in the thread that polls."""

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Wait for the running attempts of revoked partitions, and then commit."""
        if not self.active:
            return
        revocation = self._revoke(revoked)
        revocation.wait()
        if commits := revocation.commits():
            try:
                try:
                    self._client.commit(self._offsets(commits), timeout_ms=REVOKE_TIMEOUT_MS)
                except OffsetMetadataTooLargeError:
                    self._metadata.disable()
                    self._client.commit(self._offsets(commits), timeout_ms=REVOKE_TIMEOUT_MS)
            except KafkaError as error:
                logger.warning(revoked_before_commit_text(commits, error))

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Record the assigned partitions. KafkaPythonClient sets their start positions after the poll."""
        self._unstarted.update(assigned)


class RebalanceListenerV3(ClientListener):
    """The listener for kafka-python 3. The client calls this listener in its own thread, which must not block."""

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Wait for the running attempts of revoked partitions, and then commit."""
        if not self.active:
            return
        revocation = self._revoke(revoked)
        while not revocation.drained:
            await self._client._coordinator._net.sleep(REVOKE_WAIT_INTERVAL)
        if commits := revocation.commits():
            try:
                try:
                    await self._commit(commits)
                except OffsetMetadataTooLargeError:
                    self._metadata.disable()
                    await self._commit(commits)
            except KafkaError as error:
                logger.warning(revoked_before_commit_text(commits, error))

    async def _commit(self, commits: Mapping[Partition, Commit]) -> None:
        commit = self._client.commit_async(self._offsets(commits))
        await self._client._manager.wait_for(commit, REVOKE_TIMEOUT_MS)

    async def on_partitions_lost(self, lost: Collection[TopicPartition]) -> None:
        """Pass lost partitions to the listener of the consumer. The group accepts no commit for lost partitions."""
        self._unstarted.difference_update(lost)
        if self.active:
            self._listener.on_lost(_partitions(lost))

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Record the assigned partitions.

        KafkaPythonClient sets their start positions after the poll, because this thread cannot query committed offsets.
        """
        self._unstarted.update(assigned)


# Register the listener classes as virtual subclasses of kafka-python's classes. A real subclass is not possible,
# because kafka-python 2 has no ``AsyncConsumerRebalanceListener``.
if ASYNC:
    kafka.AsyncConsumerRebalanceListener.register(RebalanceListenerV3)
else:
    kafka.ConsumerRebalanceListener.register(RebalanceListenerV2)

#: The listener class for the installed kafka-python.
LISTENER: type[ClientListener] = RebalanceListenerV3 if ASYNC else RebalanceListenerV2
