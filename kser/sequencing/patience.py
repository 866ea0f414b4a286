"""Waiting for a database that is away: what is in hand waits, and nothing is done twice."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, wait_random_exponential

from kser.delivery import CURRENT
from kser.errors import StoreUnavailable

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Seconds between two attempts at most: an operation is to go on soon after the database does.
_BACKOFF = wait_random_exponential(multiplier=0.1, max=2, min=0.05)
#: Seconds between two looks at whether the consumer is about to end.
_TICK = 0.1
#: How often somebody asks who is no consumer, and gets the error then.
ATTEMPTS = 3


class Patience:
    """Asks a database again and again. It is told once that it is away, and once that it is back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trouble = ""

    def call(self, what: Callable[[], Answer]) -> Answer:
        """What ``what`` returns, as soon as the database answers.

        In a consumer that is as long as it takes. One that is about to end hands its message back.

        :raises kser.errors.StoreUnavailable: outside of a consumer, after some attempts.
        :raises kser.delivery.Abandoned: the consumer waits no longer.
        """
        state: RetryCallState | None = None
        while True:
            try:
                return self.ask(what)
            except StoreUnavailable as trouble:
                state = state or RetryCallState(Retrying(), None, (), {})
                if CURRENT.get() is None and state.attempt_number >= ATTEMPTS:
                    raise
                self.report(trouble)
                self._wait(_BACKOFF(state))
                state.attempt_number += 1

    def ask(self, what: Callable[[], Answer]) -> Answer:
        """What ``what`` returns, asked once; if the database was away before, it is told to be back.

        :raises kser.errors.StoreUnavailable: it is away.
        """
        # What was asked before the trouble began, and is answered now, does not tell that it is over.
        was_away = bool(self._trouble)
        answer = what()
        if was_away:
            self.report(None)
        return answer

    def report(self, trouble: StoreUnavailable | None) -> None:
        """Log once that the database goes away, and that it is back; another reason meanwhile is no other trouble."""
        text = "" if trouble is None else trouble.message
        if text == self._trouble:
            return
        with self._lock:
            before, self._trouble = self._trouble, text
        if text and not before:
            logger.error(f"Store: {text}; what is in hand waits, and is tried again")
        elif text and text != before:
            logger.warning(f"Store: {text}; it is still away")
        elif before and not text:
            logger.info("Store: the database works again")

    @staticmethod
    def _wait(seconds: float) -> None:
        delivery = CURRENT.get()
        never = threading.Event()
        while seconds > 0:
            if delivery is not None and (delivery.abandoned or (delivery.ending and not delivery.answered)):
                delivery.hand_back()
            never.wait(min(_TICK, seconds))
            seconds -= _TICK
