"""Unreadable records: offsets of a partition whose data the client library cannot decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kser.consumer.client import Partition

#: How many times a client fetches data again that it cannot decode, each time over a new connection. If the data is
#: still unreadable, the broker has stored it in this form.
FETCH_TRIES = 3


@dataclass(frozen=True, slots=True)
class UnreadableRecord:
    """A range of offsets that no client can decode. The consumer fails this range as one record, and runs no code.

    :param topic: the topic.
    :param partition: the partition.
    :param offset: the first offset of the range.
    :param last_offset: the last offset of the range.
    :param reason: the error of the client library.
    :param tries: how many times the client fetched the data again.
    """

    topic: str
    partition: int
    offset: int
    last_offset: int
    reason: str
    tries: int = FETCH_TRIES

    key: ClassVar[None] = None
    value: ClassVar[None] = None
    headers: ClassVar[Sequence[tuple[str, bytes | None]]] = ()
    #: The timestamp of the record in milliseconds since 1970; -1, because it is unknown.
    timestamp: ClassVar[int] = -1

    def __str__(self) -> str:
        name = Partition(self.topic, self.partition)
        if self.offset == self.last_offset:
            return f"offset {self.offset} of {name}"
        return f"offsets {self.offset} to {self.last_offset} of {name}"


def decoding_notes(record: Any) -> dict[str, object]:
    """Return what the client could not decode in a record; a dead letter has a header for each entry.

    :return: ``last-offset`` for an unreadable record, and ``headers-error`` for a record whose headers are unreadable.
    """
    if isinstance(record, UnreadableRecord):
        return {"last-offset": record.last_offset}
    error = getattr(record, "headers_error", None)
    return {} if error is None else {"headers-error": error}


def decoding_error(record: Any) -> str:
    """Return why the client could not decode a record or its headers; empty if it decoded them."""
    if isinstance(record, UnreadableRecord):
        return record.reason
    return str(getattr(record, "headers_error", None) or "")
