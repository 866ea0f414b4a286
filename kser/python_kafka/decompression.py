"""Decompression of batches for kafka-python, with a limit of their size.

A few kilobytes of compressed data can stand for gigabytes. kafka-python decompresses a batch as a whole, so such a
batch would use up the memory of the process before any limit of a message applies. This module decompresses in pieces,
and stops at the limit.
"""

from __future__ import annotations

import gzip
import io
import struct
from typing import Any

from kafka import codec
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.legacy_records import LegacyRecordBatch

from kser.limits import MAX_VALUE_BYTES, Limits

#: The smallest limit of a batch, in bytes after decompression.
MIN_LIMIT = 64 << 20
#: The size of a piece, in bytes.
PIECE = 1 << 18

#: The first bytes of snappy data in the format of the library xerial: blocks, each with its length in front.
_XERIAL_HEADER = 16
_XERIAL_LENGTH = struct.Struct(">i")


class BatchTooLarge(Exception):
    """A batch that is larger after decompression than the limit allows."""


def batch_limit(limits: Limits) -> int:
    """Return the limit of a batch in bytes after decompression: two values of the largest size, at least 64 MB."""
    return max(MIN_LIMIT, 2 * limits.max_value_bytes)


def decompress(number: int, data: memoryview, limit: int) -> bytearray:
    """Decompress the records of a batch.

    :param number: the number of the codec, whose package is installed.
    :param limit: the largest size of the result in bytes.
    :raises BatchTooLarge: the result is larger than ``limit``.
    """
    if number == DefaultRecordBatch.CODEC_GZIP:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            return _read(stream, limit)
    if number == DefaultRecordBatch.CODEC_SNAPPY:
        return _decompress_snappy(data, limit)
    if number == DefaultRecordBatch.CODEC_LZ4:
        return _decompress_lz4(data, limit)
    with codec.zstd.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as stream:
        return _read(stream, limit)


def _read(stream: Any, limit: int) -> bytearray:
    result = bytearray()
    while piece := stream.read(PIECE):
        _check(len(result) + len(piece), limit)
        result += piece
    return result


def _check(size: int, limit: int) -> None:
    if size > limit:
        raise BatchTooLarge(
            f"the batch has more than {limit:,} bytes after decompression: send smaller batches, or raise"
            f" {MAX_VALUE_BYTES}, because a batch may have twice its bytes, and at least {MIN_LIMIT:,}"
        )


def _decompress_lz4(data: memoryview, limit: int) -> bytearray:
    if codec.lz4 is None:
        # The packages lz4f and lz4framed decompress only as a whole.
        result = bytearray(codec.lz4_decode(bytes(data)))
        _check(len(result), limit)
        return result
    result = bytearray()
    stream = codec.lz4.LZ4FrameDecompressor()
    piece = stream.decompress(data, max_length=PIECE)
    while True:
        _check(len(result) + len(piece), limit)
        result += piece
        if stream.eof:
            return result
        if not piece and stream.needs_input:
            raise EOFError("the lz4 data ends inside of a frame")
        piece = stream.decompress(b"", max_length=PIECE)


def _decompress_snappy(data: memoryview, limit: int) -> bytearray:
    if not codec._detect_xerial_stream(data):
        return _decompress_block(data, 0, limit)
    result = bytearray()
    start = _XERIAL_HEADER
    while start < len(data):
        (length,) = _XERIAL_LENGTH.unpack_from(data, start)
        start += _XERIAL_LENGTH.size
        if not 0 < length <= len(data) - start:
            raise ValueError(f"a block of snappy data has the length {length}, and {len(data) - start} bytes follow")
        result += _decompress_block(data[start : start + length], len(result), limit)
        start += length
    return result


def _decompress_block(block: memoryview, size: int, limit: int) -> bytearray:
    """Decompress a block of snappy data.

    :param size: the size of the blocks before it, after decompression.
    """
    # A block begins with its size after decompression, in groups of 7 bits, the lowest group first.
    length = 0
    for index, byte in enumerate(block[:5]):
        length |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            break
    _check(size + length, limit)
    return bytearray(codec.snappy.decompress(bytes(block)))


class BoundedBatch(DefaultRecordBatch):  # type: ignore[misc]
    """A batch that is decompressed up to the limit ``LIMIT``."""

    # Without slots of its own, this class has the layout of its base class, so that an object can change its class.
    __slots__ = ()

    LIMIT = MIN_LIMIT

    def _maybe_uncompress(self: Any) -> None:
        number = self.compression_type
        if number != self.CODEC_NONE and not self._decompressed:
            self._assert_has_codec(number)
            self._buffer = decompress(number, memoryview(self._buffer)[self._pos :], self.LIMIT)
            self._pos = 0
        self._decompressed = True


class BoundedLegacyBatch(LegacyRecordBatch):  # type: ignore[misc]
    """A batch in one of the formats before version 2 that is decompressed up to the limit ``LIMIT``."""

    __slots__ = ()

    LIMIT = MIN_LIMIT

    def _decompress(self: Any, key_offset: int) -> Any:
        number = self.compression_type
        if number == self.CODEC_LZ4 and self._magic == 0:
            # Producers for Kafka 0.8 and 0.9 write a wrong checksum, which kafka-python corrects.
            return super()._decompress(key_offset)
        self._assert_has_codec(number)
        start = key_offset
        for _ in ("key", "value"):
            (length,) = struct.unpack_from(">i", self._buffer, start)
            start, data = start + 4 + max(length, 0), self._buffer[start + 4 : start + 4 + max(length, 0)]
        return decompress(number, data, self.LIMIT)
