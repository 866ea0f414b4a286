"""Tests of batches that kafka-python cannot decode, without a broker: damaged bytes, and what the client does."""

from __future__ import annotations

import gzip
import logging
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import crc32c
import pytest
from kafka import TopicPartition, codec, errors
from kafka.consumer.fetcher import Fetcher
from kafka.record import MemoryRecords
from kafka.record.memory_records import MemoryRecordsBuilder

from kser.consumer.client import Commit, Partition
from kser.consumer.commit_metadata import CommitMetadata
from kser.consumer.start_positions import StartPositions
from kser.consumer.unreadable import FETCH_TRIES, UnreadableRecord
from kser.limits import Limits
from kser.python_kafka import batches
from kser.python_kafka import client as client_module
from kser.python_kafka.batches import UnreadableBatches
from kser.python_kafka.client import KafkaPythonClient
from kser.python_kafka.decompression import MIN_LIMIT, PIECE, batch_limit, decompress
from tests.conftest import needs
from tests.support import Clock, lines

TP = TopicPartition("dice", 0)
#: The end of the partition in these tests.
END = 9
#: Three records in each batch.
RECORDS = 3


def batch_at(offset: int, value: bytes = b"value", headers: Any = ()) -> bytearray:
    """Return a batch with ``RECORDS`` records."""
    builder = MemoryRecordsBuilder(magic=2, compression_type=0, batch_size=1 << 24)
    for _ in range(RECORDS):
        builder.append(timestamp=0, key=None, value=value, headers=list(headers))
    builder.close()
    data = bytearray(builder.buffer())
    struct.pack_into(">q", data, 0, offset)
    return data


def sign(batch: bytearray) -> bytearray:
    """Correct the checksum of a batch, so that only its content is wrong."""
    struct.pack_into(">I", batch, 17, crc32c.crc32c(bytes(batch[21:])))
    return batch


def changed(position: int, layout: str, value: int, *, signed: bool = True) -> Callable[[bytearray], bytearray]:
    """Return a function that changes a number in a batch."""

    def change(batch: bytearray) -> bytearray:
        struct.pack_into(layout, batch, position, value)
        return sign(batch) if signed else batch

    return change


def with_body(body: bytes, attributes: int = 0) -> Callable[[bytearray], bytearray]:
    """Return a function that replaces the records of a batch."""

    def change(batch: bytearray) -> bytearray:
        batch = batch[:61] + body
        struct.pack_into(">i", batch, 8, len(batch) - 12)
        batch[22] |= attributes
        return sign(batch)

    return change


#: Damage to a batch. Everything that follows the batch stays as it is.
DAMAGES: dict[str, Callable[[bytearray], bytearray]] = {
    "value": lambda batch: batch[:-5] + b"\xff" + batch[-4:],
    "last offset": changed(23, ">i", 5_000_000, signed=False),
    "negative last offset": changed(23, ">i", -7, signed=False),
    "unknown codec": changed(21, ">h", 7),
    "no gzip data": changed(21, ">h", 1),
    "format 0": changed(16, ">b", 0, signed=False),
    "format 1": changed(16, ">b", 1, signed=False),
    "too many records": changed(57, ">i", 500),
    "too few records": changed(57, ">i", 1),
    "negative number of records": changed(57, ">i", -1),
    "length of a record": changed(61, ">B", 0x7E),
    "endless number": with_body(b"\xff" * 50),
    "no records": with_body(b""),
    "record cut off": with_body(b"\x40\x00\x00\x00"),
    "negative number of headers": with_body(b"\x0e\x00\x00\x00\x01\x01\x01" * 3),
    "negative length of a header name": with_body(b"\x10\x00\x00\x00\x01\x01\x02\x01" * 3),
    "gzip cut off": with_body(gzip.compress(b"x" * 1000)[:-9], attributes=1),
    "gzip without records": with_body(gzip.compress(b""), attributes=1),
    "gzip with garbage": with_body(gzip.compress(b"\xff" * 1000), attributes=1),
}


class Partitioned:
    """A partition with three batches, read by a fetcher of kafka-python without a network."""

    def __init__(self, data: bytes, monkeypatch: pytest.MonkeyPatch, limit: int = MIN_LIMIT) -> None:
        self.clock = Clock()
        monkeypatch.setattr(batches.time, "monotonic", self.clock)
        self.data = data
        self.closed: list[int] = []
        cluster = SimpleNamespace(leader_for_partition=lambda tp: 1)
        self.client: Any = SimpleNamespace(
            _fetcher=SimpleNamespace(_parse_fetched_data=self._fail),
            _client=SimpleNamespace(cluster=cluster, close=self.closed.append),
            _manager=SimpleNamespace(call_soon=lambda call, *arguments: call(*arguments)),
            assignment=lambda: {TP},
            highwater=lambda tp: END,
        )
        self.unreadable = UnreadableBatches(self.client, limit)
        self.error: Exception = RuntimeError("no error is set")

    def _fail(self, completed: Any) -> None:
        raise self.error

    def fetch(self, offset: int) -> tuple[list[Any], int]:
        """Fetch at an offset; return the records and the next offset."""
        start, data = 0, self.data
        while start < len(data) and struct.unpack_from(">q", data, start)[0] + RECORDS <= offset:
            start += 12 + struct.unpack_from(">i", data, start + 8)[0]
        fetched = self.client._fetcher.PartitionRecords(offset, TP, MemoryRecords(bytes(data[start:])))
        records = fetched.take(100)
        records += fetched.take(100) if fetched else []
        assert not fetched, "kafka-python would poll this data for ever"
        return records, fetched.next_fetch_offset

    def read(self) -> list[Any]:
        """Fetch to the end; return all records. Each wait of the partition takes no time."""
        records: list[Any] = []
        offset = 0
        for _ in range(40):
            fetched, offset = self.fetch(offset)
            records += fetched
            self.unreadable.reconnect()
            self.clock.advance(60)
            if offset >= END:
                return records
        raise AssertionError(f"stopped at offset {offset}: {records}")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_damaged_batch_is_skipped_and_all_others_are_read(
    kind: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [batch_at(offset) for offset in (0, 3, 6)]
    data[number] = DAMAGES[kind](data[number])
    partition = Partitioned(b"".join(data), monkeypatch)
    records = partition.read()
    skipped = [record for record in records if isinstance(record, UnreadableRecord)]
    seen = {record.offset for record in records if not isinstance(record, UnreadableRecord)}
    # A part of the damaged batch may be readable; each of its other offsets belongs to an unreadable record.
    unreadable = {offset for record in skipped for offset in range(record.offset, record.last_offset + 1)}
    damaged = set(range(number * 3, number * 3 + 3))
    assert seen | unreadable == set(range(END))
    assert not seen & unreadable
    assert unreadable <= damaged


def test_damaged_data_is_fetched_again_over_a_new_connection_before_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = [batch_at(0), DAMAGES["value"](batch_at(3)), batch_at(6)]
    partition = Partitioned(b"".join(data), monkeypatch)
    assert partition.fetch(0)[1] == 3
    for tries in range(1, FETCH_TRIES + 1):
        partition.unreadable.reconnect()
        assert partition.closed == [1] * tries
        assert partition.unreadable.hold(()) == {Partition("dice", 0)}
        partition.clock.advance(batches.RETRY_INTERVAL)
        assert not partition.unreadable.hold(())
        records, offset = partition.fetch(3)
    assert offset == 6
    (record,) = records
    assert (record.offset, record.last_offset) == (3, 5)
    assert "CorruptRecordError" in record.reason


def test_data_that_was_damaged_on_the_wire_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    good = b"".join(batch_at(offset) for offset in (0, 3, 6))
    partition = Partitioned(good, monkeypatch)
    for _ in range(FETCH_TRIES):
        partition.data = b"".join((batch_at(0), DAMAGES["value"](batch_at(3)), batch_at(6)))
        assert partition.fetch(3) == ([], 3)
    partition.data = good
    assert [record.offset for record in partition.read()] == list(range(END))


def test_fetch_inside_a_damaged_batch_does_not_move_back(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partitioned(b"".join((batch_at(0), DAMAGES["value"](batch_at(3)), batch_at(6))), monkeypatch)
    for _ in range(FETCH_TRIES):
        assert partition.fetch(4) == ([], 4)
    (record,), offset = partition.fetch(4)
    assert (record.offset, record.last_offset, offset) == (4, 5, 6)


def test_batch_with_a_wrong_length_is_skipped_offset_by_offset_up_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that returns nothing complete has a damaged length; the client cannot know where the batch ends."""
    damaged = changed(23, ">i", 5_000_000, signed=False)(batch_at(6))
    struct.pack_into(">i", damaged, 8, 1_000_000)
    partition = Partitioned(b"".join((batch_at(0), batch_at(3), damaged)), monkeypatch)
    skipped = [record for record in partition.read() if isinstance(record, UnreadableRecord)]
    assert [(record.offset, record.last_offset) for record in skipped] == [(6, 6), (7, 7), (8, 8)]
    # Only the first of these offsets was fetched several times, because all of them belong to one batch.
    assert len(partition.closed) == FETCH_TRIES


# -- codecs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "name", "package"), [(2, "snappy", "python-snappy"), (3, "lz4", "lz4"), (4, "zstd", "zstandard")]
)
def test_partition_waits_for_a_codec_that_is_not_installed(
    number: int,
    name: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in ("snappy", "lz4", "lz4f", "lz4framed", "zstd"):
        monkeypatch.setattr(codec, module, None)
    partition = Partitioned(b"".join((batch_at(0), changed(21, ">h", number)(batch_at(3)))), monkeypatch)
    assert [record.offset for record in partition.fetch(0)[0]] == [0, 1, 2]
    for _ in range(3):
        assert partition.unreadable.hold(()) == {Partition("dice", 0)}
        assert len(lines(caplog, logging.ERROR)) == 1
        assert name in partition.unreadable.waiting()[Partition("dice", 0)]
        partition.clock.advance(batches.REPORT_INTERVAL)
        assert not partition.unreadable.hold(())
        assert not partition.unreadable.waiting()
        (line,) = lines(caplog, logging.ERROR)
        assert f"dice[0] waits: the data at offset 3 is compressed with {name}" in line
        assert f"'{package}' is not installed: install kser[codecs]" in line
        caplog.clear()
        assert partition.fetch(3) == ([], 3)
    assert not partition.closed


def test_zstd_data_of_any_size_is_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not codec.has_zstd():
        needs("kser[codecs]")
    value = b"v" * 2_000_000
    batch = batch_at(0, value)
    # A stream does not contain the size of its data.
    writer = codec.zstd.ZstdCompressor().compressobj()
    body = writer.compress(bytes(batch[61:])) + writer.flush()
    partition = Partitioned(bytes(with_body(body, attributes=4)(batch)), monkeypatch)
    assert [record.value for record in partition.fetch(0)[0]] == [value] * RECORDS


# -- sizes -------------------------------------------------------------------------------------------------------------

#: The codecs of kafka-python: the name of the codec in :mod:`kafka.codec`, and its number.
COMPRESSIONS = {"gzip": 1, "snappy": 2, "snappy without blocks": 2, "lz4": 3, "zstd": 4}


def compressed(name: str, body: bytes) -> bytes:
    """Compress records, as a producer does."""
    number = COMPRESSIONS[name]
    if number in batches.CODECS and not batches.CODECS[number][2]():
        needs("kser[codecs]")
    if name == "snappy without blocks":
        return bytes(codec.snappy_encode(body, xerial_compatible=False))
    return bytes(getattr(codec, f"{name}_encode")(body))


def old_batch(number: int, body: bytes) -> bytes:
    """Return a batch in the format 1, at offset 0, with compressed records."""
    content = struct.pack(">bbqii", 1, number, 0, -1, len(body)) + body
    return struct.pack(">qiI", 2, len(content) + 4, zlib.crc32(content)) + content


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_batch_above_the_limit_is_unreadable_at_once_and_its_neighbours_are_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = batch_at(3, b"v" * (1 << 22))
    large = with_body(compressed(name, bytes(large[61:])), attributes=COMPRESSIONS[name])(large)
    partition = Partitioned(b"".join((batch_at(0), large, batch_at(6))), monkeypatch, limit=1 << 20)
    tracemalloc.start()
    try:
        records, offset = partition.fetch(3)
        # Without the limit, the three values and their batch need 36 MB. The compressed data may exist several times.
        assert tracemalloc.get_traced_memory()[1] < 8 * (1 << 20) + 8 * len(large)
    finally:
        tracemalloc.stop()
    (record,) = records
    assert (record.offset, record.last_offset, offset, record.tries) == (3, 5, 6, 0)
    assert "BatchTooLarge: the batch has more than 1,048,576 bytes after decompression" in record.reason
    assert not partition.closed
    assert len(partition.read()) == 7


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_batch_of_several_pieces_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = random.Random(1).randbytes(2 * PIECE)
    batch = batch_at(0, value)
    batch = with_body(compressed(name, bytes(batch[61:])), attributes=COMPRESSIONS[name])(batch)
    assert [record.value for record in Partitioned(bytes(batch), monkeypatch).fetch(0)[0]] == [value] * RECORDS


@pytest.mark.parametrize("name", [name for name in COMPRESSIONS if name != "zstd"])
def test_batch_of_an_old_format_is_limited_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = MemoryRecordsBuilder(magic=1, compression_type=0, batch_size=1 << 24)
    for _ in range(RECORDS):
        builder.append(timestamp=0, key=None, value=b"v" * 100_000)
    builder.close()
    data = old_batch(COMPRESSIONS[name], compressed(name, bytes(builder.buffer())))
    assert [record.offset for record in Partitioned(data, monkeypatch).fetch(0)[0]] == [0, 1, 2]
    (record,), _ = Partitioned(data, monkeypatch, limit=200_000).fetch(0)
    assert "BatchTooLarge" in record.reason


def test_cut_off_lz4_data_and_a_wrong_length_of_a_snappy_block_are_errors() -> None:
    data = compressed("lz4", bytes(1000))
    with pytest.raises(EOFError):
        decompress(3, memoryview(data)[:-6], 1 << 20)
    data = compressed("snappy", bytes(1000))
    for length in (-4, 0, 1 << 30):
        with pytest.raises(ValueError, match="block of snappy data"):
            decompress(2, memoryview(data[:16] + struct.pack(">i", length) + data[20:]), 1 << 20)


def test_response_ends_early_when_its_batches_have_the_size_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for offset in (0, 3, 6):
        batch = batch_at(offset, b"v" * 100_000)
        parts.append(with_body(gzip.compress(bytes(batch[61:])), attributes=1)(batch))
    partition = Partitioned(b"".join(parts), monkeypatch, limit=500_000)
    records, offset = partition.fetch(0)
    assert ([record.offset for record in records], offset) == ([0, 1, 2, 3, 4, 5], 6)
    assert [record.offset for record in partition.read()] == list(range(END))


def test_limit_of_a_batch_follows_the_limit_of_a_value() -> None:
    assert batch_limit(Limits()) == 64 << 20
    assert batch_limit(Limits(max_value_bytes=1)) == 64 << 20
    assert batch_limit(Limits(max_value_bytes=100 << 20)) == 200 << 20


# -- headers -----------------------------------------------------------------------------------------------------------


class RawName(str):
    """A header name that kafka-python encodes to the given bytes."""

    raw: bytes

    def encode(self, *arguments: Any) -> bytes:
        return self.raw


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"\xff\xfe", "\\xff\\xfe"),
        ("é".encode("latin-1"), "\\xe9"),
        (b"trace\xc3", "trace\\xc3"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
    ],
)
def test_header_name_that_is_not_utf8_is_escaped(raw: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = RawName("x" * len(raw))
    header.raw = raw
    batch = batch_at(0, headers=[(header, b"\xff"), ("ok", None)])
    partition = Partitioned(bytes(batch), monkeypatch)
    records, offset = partition.fetch(0)
    assert offset == RECORDS
    assert [list(record.headers) for record in records] == [[(name, b"\xff"), ("ok", None)]] * RECORDS
    assert {type(text) for record in records for text, _ in record.headers} == {str}


# -- errors of the broker ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errors.CorruptRecordError("x"), errors.UnknownError("x"), struct.error("x")])
def test_partition_waits_while_the_broker_cannot_read_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    partition = Partitioned(b"", monkeypatch)
    partition.error = error
    completed = SimpleNamespace(topic_partition=TP, fetched_offset=3)
    for _ in range(2):
        assert partition.client._fetcher._parse_fetched_data(completed) is None
        assert partition.unreadable.hold({Partition("other", 1)}) == {Partition("dice", 0), Partition("other", 1)}
        partition.clock.advance(batches.ERROR_INTERVAL)
        assert not partition.unreadable.hold(())
    (line,) = lines(caplog, logging.ERROR)
    assert line.startswith("dice[0] waits: the data at offset 3 cannot be fetched: ")


@pytest.mark.parametrize(
    "error", [errors.OffsetOutOfRangeError({TP: 3}), errors.TopicAuthorizationFailedError({"dice"})]
)
def test_errors_that_the_client_handles_are_passed_on(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partitioned(b"", monkeypatch)
    partition.error = error
    with pytest.raises(type(error)):
        partition.client._fetcher._parse_fetched_data(SimpleNamespace(topic_partition=TP, fetched_offset=3))


def test_revoked_partition_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partitioned(bytes(DAMAGES["value"](batch_at(0))), monkeypatch)
    partition.fetch(0)
    partition.client.assignment = lambda: set()
    assert not partition.unreadable.hold(())


@pytest.mark.parametrize("way", ["restart", "start", "recover"])
def test_partition_with_a_new_fetch_position_does_not_wait(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The topic was created again without the data for which the partition waits."""
    for module in ("lz4", "lz4f", "lz4framed"):
        monkeypatch.setattr(codec, module, None)
    waiting = bytes(changed(21, ">h", 3)(batch_at(3)))
    partition = Partitioned(waiting, monkeypatch)
    partition.fetch(3)
    assert partition.unreadable.hold(()) == {Partition("dice", 0)}
    positions: dict[TopicPartition, int] = {}
    partition.client.seek = positions.__setitem__
    partition.client.position = lambda tp, timeout_ms: 9
    client = object.__new__(KafkaPythonClient)
    offsets: Any = SimpleNamespace(
        beginnings=lambda tps: dict.fromkeys(tps, 3), ends=lambda tps: dict.fromkeys(tps, 6), committed=lambda tp: None
    )
    offsets.first_position = lambda tp: Commit(3)
    vars(client).update(
        _client=partition.client,
        _unreadable=partition.unreadable,
        _offsets=offsets,
        _metadata=CommitMetadata("earliest"),
        _reset="earliest",
        _restarting=set(),
        _unstarted={TP} if way == "start" else set(),
        _listener=SimpleNamespace(on_reset=lambda starts: None),
        can_commit=False,
    )
    monkeypatch.setattr(client_module, "partitions_of", lambda *_: {0})
    monkeypatch.setattr(client, "_was_created_again", lambda partitions: False)
    if way == "restart":
        client._restart([TP])
    elif way == "start":
        client._start_partition(TP, StartPositions(client._metadata, "earliest", None))
    else:
        client._recover_from(errors.OffsetOutOfRangeError({TP: 9}))
    assert positions == {TP: 3}
    assert not partition.unreadable.hold(())
    # The new data is a new problem, with a line of its own.
    caplog.clear()
    partition.fetch(3)
    assert len(lines(caplog, logging.ERROR)) == 1


def test_fetcher_has_the_parts_that_are_replaced() -> None:
    """Without these names in a new version of kafka-python, a damaged batch would stop the consumer."""
    assert issubclass(Fetcher.PartitionRecords, object)
    assert callable(Fetcher.PartitionRecords._unpack_records)
    assert callable(Fetcher._parse_fetched_data)
