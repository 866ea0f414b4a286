"""Conversion of librdkafka's messages and offsets to records and commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from confluent_kafka import TopicPartition

from kser.consumer.client import Commit
from kser.consumer.offsets import strip_checksum


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
        """Milliseconds since 1970."""
        return int(self.message.timestamp()[1])

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """The names and values of the headers."""
        return self.message.headers() or ()


def commit_of(tp: TopicPartition) -> Commit:
    """Return the Commit of an offset that librdkafka has read from the group."""
    try:
        return Commit(tp.offset, strip_checksum(tp.metadata or ""))
    except UnicodeDecodeError:
        # The metadata of another client has no terminating NUL, so librdkafka's Python client reads past its end.
        return Commit(tp.offset)
