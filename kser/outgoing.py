"""What all producers share: keys, headers and sizes of records, and what became of many messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from cdumay_error import Error
from cdumay_result import Result

from kser.config import CONFIG
from kser.controller import Headers
from kser.errors import MessageTooLarge, UsageError
from kser.schemas import Message

Key = str | bytes | None
#: Gives each message of many its key.
KeyOf = Callable[[Message], Key]
#: Headers in the form that clients take.
HeaderList = list[tuple[str, bytes | None]]


def key_bytes(key: Key) -> bytes | None:
    """A key as it travels: text is encoded as UTF-8.

    :raises kser.errors.UsageError: it is neither text nor bytes.
    """
    if isinstance(key, str):
        return key.encode("utf-8")
    if key is None or isinstance(key, bytes):
        return key
    raise UsageError(f"a key is a str or bytes, and this one is {key!r}: convert it")


def header_list(headers: Headers | None) -> HeaderList:
    """Headers in the form that clients take.

    :raises kser.errors.UsageError: something else than names and bytes is among them.
    """
    if not headers:
        return []
    pairs: Any = headers.items() if isinstance(headers, Mapping) else headers
    found: HeaderList = []
    for pair in pairs:
        match pair:
            case (str() as name, (bytes() | None) as value):
                found.append((name, value))
            case _:
                raise UsageError(f"a header is a name and bytes, and this one is {pair!r}: encode its value")
    return found


def beside(key: Key = None, headers: Headers | None = None) -> tuple[bytes | None, HeaderList]:
    """What travels beside a value, in the form that clients take.

    :raises kser.errors.UsageError: it cannot travel.
    """
    return key_bytes(key), header_list(headers)


def size_of(value: bytes | None, key: bytes | None, headers: HeaderList) -> int:
    """Bytes of a record, without what the protocol adds to them."""
    size = len(value or b"") + len(key or b"")
    return size + sum(len(name.encode("utf-8")) + len(data or b"") for name, data in headers) if headers else size


def too_large(size: int, limit: int, setting: str) -> MessageTooLarge:
    """The error of a record that the client may not send.

    :param setting: the client's name for its limit.
    """
    return MessageTooLarge(
        f"the record has {size:,} bytes, and {setting!r} allows {limit:,} with what the protocol adds: send a reference"
        f" instead of the data, or raise {setting!r} in {CONFIG} and 'max.message.bytes' of the topic"
    )


def refused_as_too_large(size: int, topic: str, servers: str) -> MessageTooLarge:
    """The error of a record that the client sent and the broker did not take."""
    return MessageTooLarge(
        f"the record has {size:,} bytes, more than topic {topic!r} at {servers} takes ('max.message.bytes' of the"
        " topic, else 'message.max.bytes' of the brokers): send a reference instead of the data, or raise that limit"
    )


def reason_of(error: BaseException) -> str:
    """Why a message was not sent, as its own Result would say it."""
    text = error.message if isinstance(error, Error) else str(error)
    return text or repr(error)


def remaining(deadline: float) -> float:
    """Seconds until then, by the monotonic clock."""
    return max(deadline - time.monotonic(), 0.0)


class Tally:
    """What became of many messages."""

    def __init__(self) -> None:
        self._count = 0
        self._reasons: dict[str, str] = {}
        self._failed = 0

    def take(self) -> None:
        """Count a message."""
        self._count += 1

    def fail(self, kmsg: Message, error: BaseException) -> None:
        """Note why a message was not sent."""
        self._reasons[kmsg.uuid] = reason_of(error)
        self._failed += 1

    def result(self, ending: str = "") -> Result:
        """One Result for all: how many were sent and, if some were not, the reason by uuid in ``retval["failed"]``.

        :param ending: what follows the text about those that were sent.
        """
        sent = f"{self._count - self._failed} message(s) sent{ending}"
        if not self._failed:
            return Result(stdout=sent)
        reason = next(iter(self._reasons.values()))
        return Result(
            retcode=500,
            stdout=sent,
            stderr=f"{self._failed} of {self._count} message(s) not sent; the first one: {reason}",
            retval={"failed": self._reasons},
        )
