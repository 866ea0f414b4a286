"""Records of the consumer client on librdkafka."""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller
from typing import Any

#: Calls ``message.headers()``. For a name that is not UTF-8, this method both returns a damaged list and sets an
#: exception. A direct call would not always raise the exception, because CPython omits the check in optimized code.
_read_headers = methodcaller("headers")


class ConfluentRecord:
    """A record that wraps a message of librdkafka."""

    __slots__ = ("_headers", "headers_error", "key", "message", "offset", "partition", "topic", "value")

    def __init__(self, message: Any, topic: str, partition: int) -> None:
        self.message = message
        self.topic = topic
        self.partition = partition
        self.offset: int = message.offset()
        self.key: bytes | None = message.key()
        self.value: bytes | None = message.value()
        self._headers: Sequence[tuple[str, bytes | None]] | None = None
        #: The error if the headers cannot be decoded, because a name is not UTF-8; otherwise None.
        self.headers_error: str | None = None

    @property
    def timestamp(self) -> int:
        """The timestamp of the record, in milliseconds since 1970."""
        return int(self.message.timestamp()[1])

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """The names and values of the headers; empty if they cannot be decoded."""
        # Call ``headers`` once. After a failed call, the next call would return a damaged list and end the process.
        if self._headers is None:
            try:
                self._headers = _read_headers(self.message) or ()
            except Exception as error:
                self._headers = ()
                self.headers_error = str(error.__cause__ or error)
        return self._headers
