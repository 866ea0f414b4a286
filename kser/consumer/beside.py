"""What runs beside a consumer in a thread of its own, for the registries of the classes that it runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from kser.errors import StoreUnavailable

logger = logging.getLogger(__name__)

#: Seconds between two turns.
TICK = 0.5


class Companion(Protocol):
    """What is to run beside a consumer, for a registry."""

    def tick(self) -> None:
        """Do what is due."""

    def close(self) -> None:
        """The consumer ends."""


class Beside:
    """Gives companions their turns.

    :param companions: finds them; there may be more of them later.
    """

    def __init__(self, companions: Callable[[], Sequence[Companion]]) -> None:
        self._find = companions
        self._companions: Sequence[Companion] = ()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, when there is anything to run and it has not begun; what has to wait for its database begins later.

        :raises kser.errors.KserError: one of them cannot work here.
        """
        if self._thread is not None:
            return
        waits = False
        try:
            self._companions = self._find()
        except StoreUnavailable:
            # It was logged.
            waits = True
        if self._companions or waits:
            self._thread = threading.Thread(target=self._run, name="kser-beside", daemon=True)
            self._thread.start()

    def close(self, timeout: float) -> None:
        """End.

        :param timeout: seconds that a turn may take to end.
        """
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout)
        for companion in self._companions:
            companion.close()

    def _run(self) -> None:
        while not self._over.is_set():
            for companion in self._companions:
                companion.tick()
            self._over.wait(TICK)
            self._look_for_more()

    def _look_for_more(self) -> None:
        """Classes may have been added, of registries that nobody knew."""
        try:
            self._companions = self._find()
        except StoreUnavailable:
            # It was logged.
            pass
        except Exception:
            # Without this thread claims end; and what it asks is the code of apps and drivers.
            logger.exception("what is to run beside the consumer cannot work; it is tried again")
