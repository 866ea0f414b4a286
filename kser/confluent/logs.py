"""Logger for librdkafka's own log lines."""

from __future__ import annotations

import logging
import re
import time

#: Seconds in which the same line is logged once: librdkafka emits dozens of each a second while a broker is down.
INTERVAL = 30.0
#: Limit of distinct lines that the filter remembers.
MAX_LINES = 100

_NUMBERS = re.compile(r"\d+(?:ms|s)? in state|, \d+ identical error\(s\) suppressed|\[rdkafka#\S+\]")


class RateLimitFilter(logging.Filter):
    """A rate limit on lines about failed connections; lines that differ only in their numbers count as the same."""

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


#: The logger of librdkafka's lines, unless the option ``logger`` is set.
CLIENT_LOGGER = logging.getLogger("confluent_kafka")
CLIENT_LOGGER.addFilter(RateLimitFilter())
