"""Logger for librdkafka's own log lines.

librdkafka logs each failed connection, dozens of times a second while a broker is down, and each fatal error of a
client, once for each new client. kser logs one line for each cause itself, so it passes these lines on at the level
DEBUG, and each of them only once within ``INTERVAL`` seconds.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from kser.connection import LastFailure

#: Seconds in which equal lines are logged only once.
INTERVAL = 30.0
#: Maximum number of distinct lines that the filter remembers.
MAX_LINES = 100

_THREAD = re.compile(r"^\[thrd:[^\]]*\]: ")
_NUMBERS = re.compile(r"\d+(?:ms|s)? in state|, \d+ identical error\(s\) suppressed|\[rdkafka#\S+\]")


class ConnectionLines(logging.Filter):
    """A filter for lines about failed connections and fatal errors.

    Lines that differ only in their numbers count as equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the record."""
        text = _NUMBERS.sub("", record.getMessage())
        if not text.startswith(("FAIL", "FATAL", "ERROR", "REQTMOUT")):
            return True
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        if not logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            return False
        now = time.monotonic()
        if now - self._last.get(text, -INTERVAL) < INTERVAL:
            return False
        if len(self._last) >= MAX_LINES:
            self._last.clear()
        self._last[text] = now
        return True


#: The logger for librdkafka's lines, if the option ``logger`` is not set.
CLIENT_LOGGER = logging.getLogger("confluent_kafka")
CLIENT_LOGGER.addFilter(ConnectionLines())


class ClientLog(logging.LoggerAdapter[logging.Logger]):
    """The logger of one client, which remembers the last failed connection."""

    def __init__(self) -> None:
        super().__init__(CLIENT_LOGGER)
        self.failure = LastFailure()

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log a line, and take the reason of a failed connection from it. librdkafka calls this method."""
        # librdkafka passes the kind of the line, the name of the client, and the text.
        if len(args) == 3 and args[0] == "FAIL":
            self.failure.note(_THREAD.sub("", str(args[2])))
        super().log(level, msg, *args, **kwargs)
