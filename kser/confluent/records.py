"""What librdkafka gives, as the engine takes it: records and commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from confluent_kafka import TopicPartition

from kser.consumer.client import Commit
from kser.consumer.offsets import unseal


class ConfluentRecord:
    """A message of librdkafka as a record."""

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
        """Milliseconds since 1970."""
        return int(self.message.timestamp()[1])

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """Names and values."""
        return self.message.headers() or ()


def commit_of(tp: TopicPartition) -> Commit:
    """What a group has committed, as librdkafka gives it."""
    try:
        return Commit(tp.offset, unseal(tp.metadata or ""))
    except UnicodeDecodeError:
        # Another client wrote it without the NUL up to which this one reads.
        return Commit(tp.offset)
