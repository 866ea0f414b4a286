"""The request for topic ids, which kafka-python 2 does not have: version 10 of Kafka's metadata request.

Only kafka-python 2 has the modules that this module imports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kafka.protocol.api import Request, Response
from kafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

_API_KEY = 3
_VERSION = 10
_NO_ID = bytes(16)


class _Uuid:
    """The 16 bytes of a UUID."""

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: Any) -> bytes:
        return bytes(data.read(16))

    @classmethod
    def repr(cls, value: bytes) -> str:
        return value.hex()


class _Response(Response):  # type: ignore[misc]
    API_KEY = _API_KEY
    API_VERSION = _VERSION
    FLEXIBLE_VERSION = True
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("authorized_operations", Int32),
        ("tags", TaggedFields),
    )


class _Request(Request):  # type: ignore[misc]
    API_KEY = _API_KEY
    API_VERSION = _VERSION
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _Response
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", _Uuid), ("name", CompactString("utf-8")), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


def topic_id_request(versions: Mapping[int, tuple[int, int]] | None, topics: Iterable[str]) -> Any:
    """Return a request for the ids of topics, or None if the brokers have no topic ids (before Kafka 2.8).

    :param versions: the lowest and the highest version of each request that the brokers accept.
    """
    if versions is None or versions.get(_API_KEY, (0, 0))[1] < _VERSION:
        return None
    return _Request([(_NO_ID, topic, {}) for topic in sorted(topics)], False, False, False, {})


def topic_ids_of(response: Any) -> dict[str, bytes]:
    """Return the ids of the topics in a response."""
    return {topic[1]: topic[2] for topic in response.topics if not topic[0] and topic[2] != _NO_ID}
