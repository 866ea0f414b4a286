"""Batches of records that kafka-python cannot decode: corrupt batches, and batches with a codec that is not installed.

After such a batch, kafka-python itself raises an exception that names no partition, and its next poll never returns.
So this module replaces the part of kafka-python that decodes the batches of a partition.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from kafka import KafkaConsumer, TopicPartition, codec, errors
from kafka.consumer.fetcher import Fetcher
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.legacy_records import LegacyRecordBatch

from kser.consumer.client import Partition
from kser.consumer.unreadable import FETCH_TRIES, UnreadableRecord
from kser.escaping import escape_lines
from kser.python_kafka.decompression import MIN_LIMIT, BatchTooLarge, BoundedBatch, BoundedLegacyBatch
from kser.python_kafka.rebalances import ASYNC

logger = escape_lines(logging.getLogger(__name__))

#: Seconds between two fetches of data that cannot be decoded.
RETRY_INTERVAL = 0.2
#: Seconds between two fetches of a partition for which the broker reports an error.
ERROR_INTERVAL = 10.0
#: Seconds between two fetches of a batch whose codec is not installed, and between two log lines about a partition.
REPORT_INTERVAL = 600.0

#: The codecs that kafka-python decodes with another package: the name of the codec, the package, and a function that
#: returns whether the package is installed.
CODECS = {
    2: ("snappy", "python-snappy", codec.has_snappy),
    3: ("lz4", "lz4", codec.has_lz4),
    4: ("zstd", "zstandard", codec.has_zstd),
}

#: The first fields of a batch: base offset, length, leader epoch, magic, checksum, attributes, last offset delta.
_HEADER = struct.Struct(">qiibIhi")
#: The first fields of a batch in the formats before version 2: offset, length, checksum, magic, attributes.
_OLD_HEADER = struct.Struct(">qiIbb")
_CODEC_MASK = 0x07

#: Errors of a fetch that the client or kafka-python handles for the whole consumer.
_PASSED_ON = tuple(
    getattr(errors, name)
    for name in ("OffsetOutOfRangeError", "LogTruncationError", "TopicAuthorizationFailedError")
    if hasattr(errors, name)
)


class _LenientBuffer(bytearray):
    """A buffer whose slices decode invalid UTF-8 as escapes, such as ``\\xff``."""

    def __getitem__(self, index: Any) -> Any:
        value = super().__getitem__(index)
        return _LenientBuffer(value) if isinstance(value, bytearray) else value

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return bytes(self).decode(encoding, errors)


class _Batch(BoundedBatch):
    """A batch that accepts header names that are not UTF-8."""

    __slots__ = ()

    def _read_msg(self: Any) -> Any:
        # A call without super() is faster, and this method runs for each record.
        try:
            return DefaultRecordBatch._read_msg(self)
        except UnicodeDecodeError:
            self._buffer = _LenientBuffer(self._buffer)
            return DefaultRecordBatch._read_msg(self)


def _classes(limit: int) -> dict[type, type]:
    """Return the class that replaces each class of batches of kafka-python.

    :param limit: the limit of a batch, in bytes after decompression.
    """
    body = {"__slots__": (), "LIMIT": limit}
    return {
        DefaultRecordBatch: type("LimitedBatch", (_Batch,), body),
        LegacyRecordBatch: type("LimitedLegacyBatch", (BoundedLegacyBatch,), body),
    }


class _Batches:
    """The batches of a response, with the raw data of the current batch and of the batch behind it.

    The response ends early when its batches have the size of the limit after decompression: the client fetches the
    rest again, after it has handed out these records.

    :param records: the ``MemoryRecords`` of kafka-python.
    :param classes: the class that replaces each class of batches of kafka-python.
    :param limit: the limit of a batch, in bytes after decompression.
    """

    def __init__(self, records: Any, classes: Mapping[type, type], limit: int) -> None:
        self._records = records
        self._classes = classes
        self._limit = limit
        self._size = 0
        self._batch: Any = None
        self.current: Any = None

    @property
    def following_offset(self) -> int | None:
        """The first offset of the batch behind the current one; None if the response contains no such batch."""
        following = self._records._next_slice
        if following is None or following is self.current or len(following) < _HEADER.size:
            return None
        return int(_HEADER.unpack_from(following)[0])

    def next_batch(self) -> Any:
        """Return the next batch; None at the end."""
        if self._batch is not None:
            self._size += len(self._batch._buffer)
            if self._size >= self._limit:
                return None
        self.current = self._records._next_slice
        self._batch = batch = self._records.next_batch()
        if batch is not None:
            batch.__class__ = self._classes.get(type(batch), type(batch))
        return batch


class _PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]
    """The records of a partition in a response. It raises no exception for data that cannot be decoded.

    :param unreadable: decides what follows data that cannot be decoded.
    """

    #: The offset behind the last decoded record.
    next_fetch_offset: int

    def __init__(self, fetch_offset: int, tp: TopicPartition, records: Any, *, unreadable: Any, **options: Any) -> None:
        self._unreadable = unreadable
        if not records.has_next() and records.size_in_bytes():
            # A broker never ends a response inside of its first batch, so the length of this batch is wrong.
            # kafka-python would raise an exception here for each fetch. With this assignment, it decodes the batch.
            records._next_slice = memoryview(records._buffer)
        super().__init__(fetch_offset, tp, records, **options)

    def _unpack_records(self, tp: TopicPartition, records: Any, *deserializers: Any) -> Iterator[Any]:
        batches = _Batches(records, self._unreadable.classes, self._unreadable.limit)
        while True:
            try:
                yield from super()._unpack_records(tp, batches, *deserializers)
                return
            except Exception as error:
                # Decoding data from outside can raise any exception: KafkaError, struct.error, zlib.error, MemoryError.
                # The records before the position were skipped, because the fetch started in the middle of a batch.
                position = max(self.next_fetch_offset, self.fetch_offset)
                following = batches.following_offset
                if following is not None and following <= position:
                    # Some brokers return the damaged batch again, because its header contains a wrong last offset.
                    continue
                unreadable = self._unreadable.handle(tp, position, batches, error)
                break
        self.next_fetch_offset = position
        if unreadable is not None:
            self.next_fetch_offset = unreadable.last_offset + 1
            yield unreadable
        self.drain()


class _Failures(NamedTuple):
    """The failed fetches of the data at an offset.

    :param batch: the header of the batch if an earlier part of the batch was skipped, otherwise None.
    """

    offset: int
    tries: int
    batch: bytes | None


class UnreadableBatches:
    """The handling of data that a client cannot decode.

    The client fetches corrupt data again over a new connection, ``FETCH_TRIES`` times, and then returns an
    :class:`kser.consumer.unreadable.UnreadableRecord`. A partition waits while a codec is not installed, and while the
    broker reports an error for it. The client fetches from the other partitions meanwhile.

    :param client: the Kafka client, which must not have fetched yet.
    :param limit: the limit of a batch, in bytes after decompression.
    """

    def __init__(self, client: KafkaConsumer, limit: int = MIN_LIMIT) -> None:
        self._client = client
        #: The limit of a batch, in bytes after decompression.
        self.limit = limit
        #: The class that replaces each class of batches of kafka-python.
        self.classes = _classes(limit)
        self._failures: dict[TopicPartition, _Failures] = {}
        self._held_until: dict[TopicPartition, float] = {}
        self._reported: dict[TopicPartition, tuple[str, float]] = {}
        self._suspects: set[TopicPartition] = set()
        fetcher = client._fetcher
        fetcher.PartitionRecords = partial(_PartitionRecords, unreadable=self)
        fetcher._parse_fetched_data = partial(self._parse, fetcher._parse_fetched_data)

    def hold(self, paused: Collection[Partition]) -> Collection[Partition]:
        """Return ``paused``, and the partitions from which the client must not fetch now."""
        if not self._held_until:
            return paused
        now, assigned = time.monotonic(), self._client.assignment()
        self._held_until = {tp: at for tp, at in self._held_until.items() if at > now and tp in assigned}
        return {*paused, *(Partition(*tp) for tp in self._held_until)}

    def waiting(self) -> dict[Partition, str]:
        """Return the partitions that wait, and the logged reasons. A fetch of damaged data again is no wait."""
        return {Partition(*tp): reason for tp, (reason, _) in self._reported.items() if tp in self._held_until}

    def forget(self, tp: TopicPartition) -> None:
        """Forget what is known about the data of a partition, because the partition gets another fetch position."""
        for known in (self._held_until, self._failures, self._reported):
            known.pop(tp, None)
        self._suspects.discard(tp)

    def reconnect(self) -> None:
        """Close the connections over which data came that could not be decoded. The client connects again itself."""
        suspects, self._suspects = self._suspects, set()
        network = self._client._client
        for node in {network.cluster.leader_for_partition(tp) for tp in suspects} - {None, -1}:
            if ASYNC:
                self._client._manager.call_soon(network.close, node)
            else:
                network.close(node)

    def handle(self, tp: TopicPartition, position: int, batches: _Batches, error: Exception) -> UnreadableRecord | None:
        """Decide about data that cannot be decoded.

        :param position: the first offset without a decoded record.
        :param batches: the batches of the response, at the batch that cannot be decoded.
        :return: the record for the unreadable offsets, or None if the client must fetch the data again.
        """
        if isinstance(error, errors.UnsupportedCodecError) and (missing := _missing_codec(batches.current)):
            name, package = missing
            self._wait(
                tp,
                REPORT_INTERVAL,
                f"the data at offset {position} is compressed with {name}, and the Python package {package!r} is not"
                " installed: install kser[codecs], and restart the consumer; the other partitions are consumed"
                " meanwhile",
            )
            return None
        header = bytes(batches.current[: DefaultRecordBatch.HEADER_STRUCT.size])
        failures = self._failures.get(tp)
        again = failures is not None and failures.offset == position and failures.batch in (None, header)
        count = failures.tries + 1 if failures is not None and again else 1
        # A batch that is too large is not damaged, because its checksum is correct.
        tries = 0 if isinstance(error, BatchTooLarge) else FETCH_TRIES
        if count <= tries:
            self._failures[tp] = _Failures(position, count, None)
            self._suspects.add(tp)
            self._held_until[tp] = time.monotonic() + RETRY_INTERVAL
            logger.debug("%s[%s]: the data at offset %s cannot be decoded: %r", *tp, position, error)
            return None
        last = _last_offset(batches, position, self._client.highwater(tp))
        # If the batch has further offsets, the next fetch returns the same batch, which was fetched often enough.
        self._failures[tp] = _Failures(last + 1, FETCH_TRIES, header)
        return UnreadableRecord(tp.topic, tp.partition, position, last, f"{type(error).__name__}: {error}", tries)

    def _parse(self, parse: Any, completed: Any) -> Any:
        """Call kafka-python's ``_parse_fetched_data``. An error that concerns one partition makes this one wait."""
        try:
            return parse(completed)
        except _PASSED_ON:
            raise
        except Exception as error:
            self._wait(
                completed.topic_partition,
                ERROR_INTERVAL,
                f"the data at offset {completed.fetched_offset} cannot be fetched: {error!r}; the consumer tries again,"
                " and consumes the other partitions meanwhile",
            )
            return None

    def _wait(self, tp: TopicPartition, seconds: float, reason: str) -> None:
        now = time.monotonic()
        self._held_until[tp] = now + seconds
        text, at = self._reported.get(tp, ("", 0.0))
        if text != reason or now - at >= REPORT_INTERVAL:
            self._reported[tp] = (reason, now)
            logger.error("%s waits: %s", Partition(*tp), reason)


def _missing_codec(data: Any) -> tuple[str, str] | None:
    """Return the codec of a batch and its package if the package is not installed."""
    header, attributes = (_HEADER, 5) if data[16] == 2 else (_OLD_HEADER, 4)
    name, package, is_installed = CODECS.get(header.unpack_from(data)[attributes] & _CODEC_MASK, ("", "", None))
    return None if is_installed is None or is_installed() else (name, package)


def _last_offset(batches: _Batches, position: int, end: int | None) -> int:
    """Return the last offset of a batch that cannot be decoded.

    The header of the batch may be damaged. So use the lowest offset that is possible, and at least ``position``.

    :param end: the end of the partition.
    """
    candidates = []
    if len(batches.current) >= _HEADER.size:
        base, *_, delta = _HEADER.unpack_from(batches.current)
        candidates.append(base + delta if batches.current[16] == 2 else base)
    if batches.following_offset is not None:
        candidates.append(batches.following_offset - 1)
    return min((last for last in candidates if position <= last < (end or 0)), default=position)
