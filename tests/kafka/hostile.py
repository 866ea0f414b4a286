"""A producer of hostile records, a proxy that damages responses of a broker, and damage to the files of a broker.

The tests send hostile records between good messages, and then account for each of them. ``hostile_records`` is the
list; each entry states whether a consumer can run the record.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import confluent_kafka
import crc32c

from tests.kafka.broker import Kafka, KafkaBroker
from tests.kafka.proxy import KafkaProxy

#: The codecs of Kafka, by the names that librdkafka has for them.
CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
#: The size limit of a batch in a broker with default settings (``message.max.bytes``).
BROKER_LIMIT = 1048588

#: Error codes of a broker that has not finished to create a topic.
_NOT_READY = (3, 6)

HeaderPair = tuple[bytes, bytes | None]


class HostileRecord(NamedTuple):
    """A record that is unusual or wrong.

    :param name: describes what is hostile about it.
    :param value: the value.
    :param headers: the headers, whose names need not be UTF-8.
    :param key: the key.
    :param uuid: the uuid of its message if a consumer can run it; empty if the record must fail.
    :param is_large: whether a copy of the record may exceed the size limits of a producer.
    """

    name: str
    value: bytes | None
    headers: Sequence[HeaderPair] = ()
    key: bytes | None = None
    uuid: str = ""
    is_large: bool = False


def hostile_records(entrypoint: str) -> list[HostileRecord]:
    """Return one record of each kind.

    :param entrypoint: the path of the class that the good messages name.
    """
    return [*_bad_values(), *_bad_headers(entrypoint), *_sizes(entrypoint)]


def good_message(entrypoint: str, **params: Any) -> tuple[str, bytes]:
    """Return the uuid and the value of a message that a consumer can run."""
    name = str(uuid.uuid4())
    return name, json.dumps({"uuid": name, "entrypoint": entrypoint, "params": params}).encode()


def _bad_values() -> Iterator[HostileRecord]:
    values: dict[str, bytes | None] = {
        "tombstone": None,
        "empty": b"",
        "not UTF-8": b"\xff\xfe\x00",
        "no JSON": b"{",
        "no message": b"[]",
        "NUL": b"\x00" * 100,
        "deep": b"[" * 50_000,
        "unknown class": good_message("no.such.Class")[1],
        "control characters": b'{"uuid": "\\u001b[2J\\r\\n", "entrypoint": "\\u001b]0;x\\u0007"}',
    }
    for name, value in values.items():
        yield HostileRecord(name, value, key=b"key")
        yield HostileRecord(f"{name}, without a key", value)


def _bad_headers(entrypoint: str) -> Iterator[HostileRecord]:
    kinds: dict[str, list[HeaderPair]] = {
        "name not UTF-8": [(b"\xff\xfe", b"value"), (b"trace", b"1")],
        "name cut in a character": [(b"trace", b"1"), ("é".encode()[:1], b"value")],
        "empty name": [(b"", b"value")],
        "null value": [(b"trace", None)],
        "empty value": [(b"trace", b"")],
        "value not UTF-8": [(b"trace", b"\xff")],
        "repeated name": [(b"trace", b"1"), (b"trace", b"2"), (b"trace", None)],
        "NUL in the name": [(b"tr\x00ace", b"1")],
        "hundreds": [(b"name-%d" % number, b"value") for number in range(500)],
        "name of a dead letter's header": [(b"kser-dlq-topic", b"__consumer_offsets"), (b"kser-dlq-offset", b"x")],
        "long name": [(b"n" * 20_000, b"value")],
    }
    for name, headers in kinds.items():
        message_uuid, value = good_message(entrypoint)
        yield HostileRecord(f"{name}, good", value, headers, uuid=message_uuid)
        yield HostileRecord(f"{name}, bad", b"{", headers, key=b"key")
        yield HostileRecord(f"{name}, tombstone", None, headers, key=b"key")


def _sizes(entrypoint: str) -> Iterator[HostileRecord]:
    # The dead letter of the last size is larger than the limit of a broker.
    for size in (999_000, 1_000_000, 1_000_001, BROKER_LIMIT - 500, BROKER_LIMIT - 100):
        message_uuid, value = good_message(entrypoint)
        filled = value[:-1] + b" " * (size - len(value)) + b"}"
        yield HostileRecord(f"{size} bytes, good", filled, uuid=message_uuid)
        yield HostileRecord(f"{size} bytes, bad", b"\x00" * size, is_large=True)
    message_uuid, value = good_message(entrypoint)
    yield HostileRecord("large header, good", value, [(b"trace", b"x" * 60_000)], uuid=message_uuid)
    yield HostileRecord("header over the limit", value, [(b"trace", b"x" * 70_000)])
    yield HostileRecord("huge header", b"{", [(b"trace", b"x" * 900_000)], is_large=True)


# -- batches by hand ---------------------------------------------------------------------------------------------------


def encode_batch(records: Iterable[HostileRecord], *, is_gzipped: bool = False) -> bytes:
    """Return a batch of records in version 2 of Kafka's format."""
    encoded = [_encode_record(number, record) for number, record in enumerate(records)]
    body = b"".join(encoded)
    if is_gzipped:
        body = gzip.compress(body)
    now = int(time.time() * 1000)
    no_producer = (-1, -1, -1)
    checked = struct.pack(">hiqqqhii", int(is_gzipped), len(encoded) - 1, now, now, *no_producer, len(encoded)) + body
    magic, no_epoch = 2, -1
    return struct.pack(">qiibI", 0, 9 + len(checked), no_epoch, magic, crc32c.crc32c(checked)) + checked


def _encode_record(number: int, record: HostileRecord) -> bytes:
    attributes, timestamp = 0, 0
    data = bytes([attributes]) + _varint(timestamp) + _varint(number) + _bytes(record.key) + _bytes(record.value)
    data += _varint(len(record.headers))
    for name, value in record.headers:
        data += _bytes(name) + _bytes(value)
    return _varint(len(data)) + data


def _bytes(data: bytes | None) -> bytes:
    return _varint(-1) if data is None else _varint(len(data)) + data


def _varint(number: int) -> bytes:
    number = (number << 1) ^ (number >> 63)
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


class HostileProducer:
    """A producer that sends batches as they are, without the checks of a client library.

    :param kafka: a broker without encryption.
    """

    def __init__(self, kafka: Kafka) -> None:
        host, port = kafka.bootstrap_servers.split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=15)
        self._file = self._socket.makefile("rb")
        self._numbers = itertools.count()

    def send(self, topic: str, *records: HostileRecord, partition: int = 0, is_gzipped: bool = False) -> None:
        """Send records in one batch, and wait until the broker has them."""
        deadline = time.monotonic() + 15
        names = ", ".join(record.name for record in records)
        batch = encode_batch(records, is_gzipped=is_gzipped)
        while code := self._produce(topic, partition, batch):
            assert code in _NOT_READY and time.monotonic() < deadline, f"the broker refused {names} with code {code}"
            time.sleep(0.1)

    def _produce(self, topic: str, partition: int, batch: bytes) -> int:
        """Send a batch; return the error code."""
        produce, version, no_client, no_transaction, all_replicas, timeout = 0, 3, -1, -1, -1, 10_000
        request = struct.pack(">hhih", produce, version, next(self._numbers), no_client)
        request += struct.pack(">hhi", no_transaction, all_replicas, timeout)
        request += struct.pack(">ih", 1, len(topic)) + topic.encode()
        request += struct.pack(">iii", 1, partition, len(batch)) + batch
        self._socket.sendall(struct.pack(">i", len(request)) + request)
        (size,) = struct.unpack(">i", self._file.read(4))
        response = self._file.read(size)
        # The error code follows the correlation id, the topic and the number of the partition.
        (code,) = struct.unpack_from(">h", response, 4 + 4 + 2 + len(topic) + 4 + 4)
        return int(code)

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()


def send_compressed(kafka: Kafka, topic: str, codec: str, values: Iterable[bytes], partition: int) -> None:
    """Send values with librdkafka, compressed with one codec."""
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": kafka.bootstrap_servers, "compression.type": codec, "linger.ms": 50}
    )
    for value in values:
        producer.produce(topic, value, partition=partition)
    assert not producer.flush(15)


# -- damage on the wire ------------------------------------------------------------------------------------------------


class DamagingProxy(KafkaProxy):
    """A proxy in front of a broker, which flips a byte of responses that contain a text."""

    def __init__(self, kafka: Kafka) -> None:
        self._lock = threading.Lock()
        self._text = b""
        self._left = 0
        #: The number of damaged responses.
        self.damaged = 0
        super().__init__(kafka)

    def damage(self, text: bytes, times: int) -> None:
        """Flip a byte of the text in the next ``times`` responses that contain it."""
        with self._lock:
            self._text, self._left = text, times

    def change(self, response: bytes) -> bytes:
        with self._lock:
            if self._left and self._text in response:
                self._left -= 1
                self.damaged += 1
                at = response.index(self._text)
                response = response[:at] + bytes([response[at] ^ 0xFF]) + response[at + 1 :]
        return response


# -- damage on disk ----------------------------------------------------------------------------------------------------

#: Damage to a batch: a function that changes the bytes of the batch in place.
Damage = Callable[[bytearray], None]


def _flip_in_value(batch: bytearray) -> None:
    batch[-5] ^= 0xFF


def _flip_in_header(batch: bytearray) -> None:
    # The last offset delta, so that the header names a wrong last offset.
    batch[24] ^= 0x7F


def _unknown_codec(batch: bytearray) -> None:
    batch[22] |= 7
    _sign(batch)


def _no_gzip(batch: bytearray) -> None:
    batch[22] |= 1
    _sign(batch)


def _sign(batch: bytearray) -> None:
    """Correct the checksum, so that only the content is wrong."""
    struct.pack_into(">I", batch, 17, crc32c.crc32c(bytes(batch[21:])))


#: Kinds of damage. The broker starts with each of them, and both clients report each of them.
DAMAGES: dict[str, Damage] = {
    "value": _flip_in_value,
    "header": _flip_in_header,
    "codec": _unknown_codec,
    "compressed data": _no_gzip,
}


def damage_batch(broker: KafkaBroker, topic: str, number: int, damage: Damage) -> None:
    """Damage a batch in the first segment of partition 0 of a topic. The broker must be stopped.

    :param number: the number of the batch, from 0.
    """
    path: Path = next((broker.folder / "data" / f"{topic}-0").glob("*.log"))
    data = bytearray(path.read_bytes())
    start = 0
    for _ in range(number):
        start += 12 + int(struct.unpack_from(">i", data, start + 8)[0])
    end = start + 12 + int(struct.unpack_from(">i", data, start + 8)[0])
    batch = data[start:end]
    damage(batch)
    data[start:end] = batch
    path.write_bytes(data)


def shuffled(records: Sequence[HostileRecord], seed: int) -> list[HostileRecord]:
    """Return the records in another order, which the seed determines."""
    return random.Random(seed).sample(records, len(records))
