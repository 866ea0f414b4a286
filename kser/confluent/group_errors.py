"""Errors of the consumer group in librdkafka, and how a consumer recovers from each of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

from confluent_kafka import KafkaError, KafkaException

from kser.consumer.recoveries import Recovery


class Recoveries(NamedTuple):
    """The recoveries from one error.

    :param alive: the recovery while the client still works.
    :param dead: the recovery after librdkafka has declared the error fatal; the client then never works again.
    """

    alive: Recovery
    dead: Recovery


_REJOIN = Recoveries(Recovery.REJOIN, Recovery.REPLACE)
_WAIT = Recoveries(Recovery.WAIT, Recovery.REPLACE)
_FENCED = Recoveries(Recovery.FENCED, Recovery.FENCED)
_SETTING = Recoveries(Recovery.SETTING, Recovery.SETTING)
#: A broker that restarts may answer a single request with such an error, so only a fatal error counts.
_SETTING_IF_FATAL = Recoveries(Recovery.WAIT, Recovery.SETTING)

#: The recoveries from each error, by its name in ``confluent_kafka.KafkaError``; older versions lack some names.
_BY_NAME: Mapping[str, Recoveries] = {
    "REBALANCE_IN_PROGRESS": _REJOIN,
    "ILLEGAL_GENERATION": _REJOIN,
    "UNKNOWN_MEMBER_ID": _REJOIN,
    "MEMBER_ID_REQUIRED": _REJOIN,
    "FENCED_MEMBER_EPOCH": _REJOIN,
    "STALE_MEMBER_EPOCH": _REJOIN,
    "_MAX_POLL_EXCEEDED": _REJOIN,
    "LEADER_NOT_AVAILABLE": _REJOIN,
    "NOT_LEADER_FOR_PARTITION": _REJOIN,
    "FENCED_LEADER_EPOCH": _REJOIN,
    "UNKNOWN_LEADER_EPOCH": _REJOIN,
    "GROUP_AUTHORIZATION_FAILED": _WAIT,
    "GROUP_MAX_SIZE_REACHED": _WAIT,
    # The other members may be of an earlier release, and end soon.
    "INCONSISTENT_GROUP_PROTOCOL": _WAIT,
    # The member that holds the instance id may be a killed process whose session has not expired yet.
    "UNRELEASED_INSTANCE_ID": _WAIT,
    "INVALID_REQUEST": _WAIT,
    "FENCED_INSTANCE_ID": _FENCED,
    "_FENCED": _FENCED,
    "INVALID_GROUP_ID": _SETTING,
    "INVALID_SESSION_TIMEOUT": _SETTING,
    "UNSUPPORTED_ASSIGNOR": _SETTING_IF_FATAL,
    "UNSUPPORTED_VERSION": _SETTING_IF_FATAL,
    "_UNSUPPORTED_FEATURE": _SETTING_IF_FATAL,
}

#: The recoveries from each error of the consumer group, by its code.
RECOVERIES: Mapping[int, Recoveries] = {
    getattr(KafkaError, name): recoveries for name, recoveries in _BY_NAME.items() if hasattr(KafkaError, name)
}


def is_fatal(error: KafkaError) -> bool:
    """Return whether the client never works again after this error."""
    # ``fatal()`` is False for the errors that a poll or a commit of a dead consumer returns.
    return bool(error.fatal()) or error.code() == KafkaError._FATAL


def recovery_from(error: KafkaError) -> Recovery:
    """Return how a consumer recovers from an error of librdkafka."""
    recoveries = RECOVERIES.get(cause(error), _WAIT)
    return recoveries.dead if is_fatal(error) else recoveries.alive


def cause(error: KafkaError) -> int:
    """Return the code of an error; for a fatal error of a consumer, the code of its cause.

    librdkafka reports the cause of a fatal error only as text, and in the same words as the text of its code.
    """
    code: int = error.code()
    if code != KafkaError._FATAL:
        return code
    text = error.str()
    return next((code for code in RECOVERIES if KafkaError(code).str() in text), code)


#: The beginning of the group metadata of a client of librdkafka, before the generation.
_METADATA_START = b"CGMDv2:"


def has_joined(client: Any) -> bool:
    """Return whether a client of librdkafka has joined its group. A member without partitions has joined too.

    The id of the member proves nothing: with the protocol "consumer", librdkafka chooses the id before it joins, and
    with the protocol "classic", the broker sends an id before it accepts the member.
    """
    metadata = client.consumer_group_metadata() or b""
    if not client.memberid() or not metadata.startswith(_METADATA_START):
        # Without a generation, the id is all that is known.
        return bool(client.memberid()) and bool(metadata)
    begin = len(_METADATA_START)
    # The generation, or the epoch of the member, is -1 or 0 until the broker has accepted the member.
    return int.from_bytes(metadata[begin : begin + 4], sys.byteorder, signed=True) > 0


class LibraryError(Exception):
    """An error that librdkafka's Python client raised.

    :param error: the error of librdkafka.
    """

    def __init__(self, error: KafkaError) -> None:
        super().__init__(error)
        self.error = error


class library_errors:  # noqa: N801  used like a function
    """A context that raises each error of librdkafka's Python client as a :class:`LibraryError`.

    A failed call inside a callback of the client makes the client raise a bare ``KafkaError``, which is no
    ``BaseException``, so that no ``except`` clause catches it.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, stack: TracebackType | None) -> None:
        if isinstance(error, KafkaException):
            error = error.args[0]
        if isinstance(error, KafkaError):
            raise LibraryError(error) from None
