"""What all producers share: keys, headers and sizes of records, and what became of many messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cdumay_error import Error
from cdumay_result import Result

from kser import signals
from kser.config import CONFIG
from kser.controller import BaseProducer, Headers
from kser.errors import MessageTooLarge, NotDelivered, UsageError
from kser.results import failure
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


def _function(owner: Any, name: str) -> Any:
    """A method without what it is bound to."""
    found = getattr(owner, name)
    return getattr(found, "__func__", found)


class OutgoingProducer(BaseProducer):
    """What the producers of all transports do alike, around what each does with a record."""

    def _deliver(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderList, deadline: float
    ) -> None:
        """Hand a record to the transport, and wait until it is delivered.

        :param deadline: until when, by the monotonic clock.
        """
        raise NotImplementedError

    def _begin(
        self, topic: str, value: bytes | None, deadline: float, told: Callable[[Exception | None], None]
    ) -> None:
        """Hand a record to the transport, and go on.

        :param deadline: until when the transport has to have taken it, by the monotonic clock.
        :param told: called once it is delivered, or with what was in the way, in any thread.
        """
        raise NotImplementedError

    def _delivered(self, topic: str, kmsg: Message, timeout: float) -> Result:
        """What is said of a message that was delivered."""
        raise NotImplementedError

    def _send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
        deadline = time.monotonic() + timeout
        try:
            self._deliver(topic, self._encode(kmsg), *beside(**options), deadline)
            result = self._delivered(topic, kmsg, timeout)
        except Exception as exc:
            result = failure(exc, kmsg.uuid)
        return self._sent(topic, kmsg, result)

    def post(self, topic: str, kmsg: Message, told: Callable[[Any], Any], timeout: float = 60) -> None:
        """Begin to send one message, and go on meanwhile.

        A producer with hooks of its own, or with receivers of ``message_sent``, waits as
        :meth:`~kser.controller.BaseProducer.send` does: they are called in this thread.

        :param topic: where to.
        :param kmsg: the message.
        :param told: called with what :meth:`~kser.controller.BaseProducer.send` would return, in the thread that
            learns of it: it must be quick.
        :param timeout: seconds until the client has taken the message; how long it tries is a setting of its own.
        """
        if self._is_watched():
            told(self.send(topic, kmsg, timeout))
            return

        def end(error: Exception | None) -> None:
            result = self._delivered(topic, kmsg, timeout) if error is None else failure(error, kmsg.uuid)
            told(self._sent(topic, kmsg, result))

        try:
            self._begin(topic, self._encode(kmsg), time.monotonic() + timeout, end)
        except Exception as exc:
            end(exc)

    def _is_watched(self) -> bool:
        """Whether code of users takes part in sending. It may send something itself, and wait for that: a client's own
        thread would wait for itself."""
        if signals.message_sent.receivers:
            return True
        return any(_function(self, name) is not ours for name, ours in _SENDING.items())

    def produce(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes | None]] = (),
        timeout: float = 60,
    ) -> None:
        try:
            self._deliver(topic, value, *beside(key, headers), time.monotonic() + timeout)
        except MessageTooLarge:
            raise
        except Exception as exc:
            raise NotDelivered(self._undelivered_text(topic, reason_of(exc))) from exc

    def _undelivered_text(self, topic: str, reason: str) -> str:
        return f"the record for topic {topic!r} was not delivered: {reason}"

    def _announce(self, topic: str, kmsg: Message, timeout: float) -> None:
        result = self._delivered(topic, kmsg, timeout)
        signals.emit(signals.message_sent, type(self), topic=topic, kmsg=kmsg, result=result)

    def _encode(self, kmsg: Message) -> bytes:
        return self._onmessage(kmsg).dumps().encode("utf-8")  # type: ignore[no-any-return]


#: What takes part in sending a message, but for the transport, as it is here.
_SENDING = {
    name: _function(OutgoingProducer, name)
    for name in ("send", "_send", "_sent", "_finish", "_onsuccess", "onsuccess", "_onerror", "onerror")
}


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
