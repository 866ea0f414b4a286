"""Logger for librdkafka's own log lines."""

from __future__ import annotations

import logging
import re
import time

#: Seconds in which equal lines are logged only once, because librdkafka emits dozens of equal lines a second while a
#: broker is down.
INTERVAL = 30.0
#: Maximum number of distinct lines that the filter remembers.
MAX_LINES = 100

_NUMBERS = re.compile(r"\d+(?:ms|s)? in state|, \d+ identical error\(s\) suppressed|\[rdkafka#\S+\]")


class RateLimitFilter(logging.Filter):
    """A rate limit on lines about failed connections. Lines that differ only in their numbers count as equal."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the record."""
        text = _NUMBERS.sub("", record.getMessage())
        if not text.startswith("FAIL"):
            return True
        now = time.monotonic()
        if now - self._last.get(text, -INTERVAL) < INTERVAL:
            return False
        if len(self._last) >= MAX_LINES:
            self._last.clear()
        self._last[text] = now
        return True


#: The logger for librdkafka's lines, if the option ``logger`` is not set.
CLIENT_LOGGER = logging.getLogger("confluent_kafka")
CLIENT_LOGGER.addFilter(RateLimitFilter())
