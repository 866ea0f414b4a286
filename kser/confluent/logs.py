"""librdkafka's own log lines, in Python's logging."""

from __future__ import annotations

import logging
import re
import time

#: Seconds in which the same line is logged once: while a broker is away, there are dozens of each in a second.
REPEAT = 30.0
#: Different lines that are remembered.
MAX_LINES = 100

_NUMBERS = re.compile(r"\d+(?:ms|s)? in state|, \d+ identical error\(s\) suppressed|\[rdkafka#\S+\]")


class OnceInAWhile(logging.Filter):
    """Lets a line about a connection that failed through when it was not logged lately, whatever numbers it holds."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record."""
        text = _NUMBERS.sub("", record.getMessage())
        if not text.startswith("FAIL"):
            return True
        now = time.monotonic()
        if now - self._last.get(text, -REPEAT) < REPEAT:
            return False
        if len(self._last) >= MAX_LINES:
            self._last.clear()
        self._last[text] = now
        return True


#: Where the lines go, unless ``logger`` is configured.
CLIENT_LOGGER = logging.getLogger("confluent_kafka")
CLIENT_LOGGER.addFilter(OnceInAWhile())
