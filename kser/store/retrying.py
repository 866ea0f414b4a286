"""Retries of store calls during an outage of the database: calls in flight wait for its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from kser.attempt import current_attempt
from kser.backoff import random_delay
from kser.errors import StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Back-off in seconds between two attempts, at most 2 s, so that operations continue soon after the end of an outage.
_BACKOFF = partial(random_delay, first=0.1, ceiling=2, lowest=0.05)

#: Seconds between two checks for a shutdown of the consumer during the back-off.
_CHECK_INTERVAL = 0.1

#: Number of attempts outside of a consumer; after the last one the caller gets the error.
ATTEMPTS = 3


class StoreRetry:
    """Wrapper that retries store calls during an outage, and logs the begin and the end of the outage once each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outage = ""

    def retry(self, call: Callable[[], T]) -> T:
        """Run a store call, retry it until the database works, and return its result.

        In a consumer the retries have no limit, except that a shutdown abandons the attempt at the record.

        :raises kser.errors.StoreUnavailable: outside of a consumer, after :data:`ATTEMPTS` attempts.
        :raises kser.attempt.AttemptAbandoned: the consumer shuts down, or has abandoned the attempt.
        """
        failures = 0
        while True:
            try:
                return self.once(call)
            except StoreUnavailable as trouble:
                failures += 1
                if current_attempt.get() is None and failures >= ATTEMPTS:
                    raise
                self.report_outage(trouble)
                self._wait_before_retry(_BACKOFF(failures))

    def once(self, call: Callable[[], T]) -> T:
        """Run a store call once, report the end of an outage, and return the result.

        :raises kser.errors.StoreUnavailable: the database is unavailable.
        """
        # A call that started before the outage does not prove that the database is back.
        was_away = bool(self._outage)
        answer = call()
        if was_away:
            self.report_outage(None)
        return answer

    def report_outage(self, error: StoreUnavailable | None) -> None:
        """Log the begin or the end of an outage once; another error during an outage does not begin a second one."""
        text = "" if error is None else error.message
        if text == self._outage:
            return
        with self._lock:
            before, self._outage = self._outage, text
        if text and not before:
            logger.error(f"Store: {text}; work in flight waits, and the call is retried")
        elif text and text != before:
            logger.warning(f"Store: {text}; the database is still unavailable")
        elif before and not text:
            logger.info("Store: the database works again")

    @staticmethod
    def _wait_before_retry(seconds: float) -> None:
        delivery = current_attempt.get()
        never = threading.Event()
        while seconds > 0:
            if delivery is not None and (delivery.abandoned or (delivery.shutting_down and not delivery.acked)):
                delivery.abandon()
            never.wait(min(_CHECK_INTERVAL, seconds))
            seconds -= _CHECK_INTERVAL
