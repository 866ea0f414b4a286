"""kafka-python's own log lines about connections and metadata.

kafka-python logs each failed try of a connection or of a metadata request, several times a second, and raises an error
that does not name the cause. So kser logs one line for each cause itself, takes the cause from these lines, and passes
them on at the level DEBUG. Lines of clients that the program created by itself are not changed.
"""

from __future__ import annotations

import logging
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kser.connection import LastFailure

#: The beginnings of the lines that kser replaces, by logger. An empty text stands for each WARNING and ERROR.
_REPLACED = {
    "kafka.conn": ("",),
    "kafka.client": ("",),
    "kafka.net.connection": ("",),
    "kafka.net.manager": ("",),
    "kafka.net.transport": ("",),
    "kafka.net.inet": ("",),
    "kafka.future": ("Error processing callback",),
    "kafka.cluster": ("Topic %s not found", "Topic %s is not a", "Metadata refresh", "No node avail", "Error fetching"),
    "kafka.coordinator": ("Group Coordinator", "Error sending", "Marking the coordinator dead"),
}  # fmt: skip
#: Loggers of lines about passwords that are sent without TLS; kafka-python repeats them at each connection.
_ONCE = ("kafka.sasl.plain", "kafka.sasl.scram", "kafka.net.sasl.plain", "kafka.net.sasl.scram")

_REASON = re.compile(
    r"(?:Closing connection\. |Connection (?:failed|lost): |Bootstrap (?:connection|attempt) to \S+ failed: "
    r"|(?=DNS lookup failed))(?P<reason>.+?)(?: \(backoff [^)]*\))?$",
    re.DOTALL,
)
_lines: weakref.WeakSet[ClientLines] = weakref.WeakSet()
_by_client: weakref.WeakKeyDictionary[Any, ClientLines] = weakref.WeakKeyDictionary()


class ClientLines:
    """The log lines of one Kafka client, and the last failed connection that they tell."""

    def __init__(self) -> None:
        self.failure = LastFailure()
        self._client: weakref.ref[Any] | None = None
        self._networks: list[Any] = []
        self._calling = threading.local()
        self._seen: set[str] = set()
        _lines.add(self)

    def set_network(self, network: Any) -> None:
        """Set the network of the client, which exists before the client, and whose thread logs lines."""
        self._networks = [network]

    def set_client(self, client: Any) -> None:
        """Set the client, which now exists. This object lives as long as the client."""
        self._client = weakref.ref(client)
        self._networks = []
        _by_client[client] = self

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Count the lines that this thread logs during the block as lines of the client."""
        outer, self._calling.active = getattr(self._calling, "active", False), True
        try:
            yield
        finally:
            self._calling.active = outer

    def is_from_client(self, thread: threading.Thread) -> bool:
        """Return whether the client works in this thread, which is the current one."""
        if getattr(self._calling, "active", False):
            return True
        client = None if self._client is None else self._client()
        networks = [*self._networks, getattr(client, "_client", None), getattr(client, "_manager", None)]
        threads = [getattr(getattr(network, "_net", None), "_io_thread", None) for network in networks]
        threads += [
            getattr(client, "_sender", None),
            getattr(getattr(client, "_coordinator", None), "_heartbeat_thread", None),
        ]
        return thread in threads

    def note(self, record: logging.LogRecord) -> bool:
        """Take the reason from a line; return whether to log the line at DEBUG."""
        text = record.getMessage()
        if record.name in _ONCE:
            new = text not in self._seen
            self._seen.add(text)
            return not new
        if (found := _REASON.search(text)) is not None and "KafkaConnectionError: closed" not in text:
            self.failure.note(found["reason"].strip())
        return record.levelno >= logging.WARNING and str(record.msg).startswith(_REPLACED[record.name])


def lines_of(client: Any) -> ClientLines:
    """Return the log lines of a client."""
    lines = _by_client.get(client)
    if lines is None:
        lines = ClientLines()
        lines.set_client(client)
    return lines


class ReplacedLines(logging.Filter):
    """A filter that changes the level of the lines which kser replaces to DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the record."""
        thread = threading.current_thread()
        owner = next((lines for lines in list(_lines) if lines.is_from_client(thread)), None)
        if owner is None or not owner.note(record):
            return True
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_FILTER = ReplacedLines()
for _name in (*_REPLACED, *_ONCE):
    logging.getLogger(_name).addFilter(_FILTER)
