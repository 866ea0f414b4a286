"""Background services of a consumer: one thread that runs the periodic work of its registries."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from kser.errors import StoreUnavailable

logger = logging.getLogger(__name__)

#: Seconds between two ticks of each background service.
TICK = 0.5


class Companion(Protocol):
    """Periodic work that a registry needs while a consumer runs."""

    def tick(self) -> None:
        """Run the work that is due."""

    def close(self) -> None:
        """Release resources; the consumer is shutting down."""


class Beside:
    """The thread that runs the background services of a consumer.

    :param companions: returns the background services; called repeatedly, because services are added later.
    """

    def __init__(self, companions: Callable[[], Sequence[Companion]]) -> None:
        self._find = companions
        self._companions: Sequence[Companion] = ()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread if it is not running and there are services; services without a database start later.

        :raises kser.errors.KserError: a service cannot run in this consumer.
        """
        if self._thread is not None:
            return
        waits = False
        try:
            self._companions = self._find()
        except StoreUnavailable:
            # The store has logged the outage. The thread starts anyway and loads the services after the outage.
            waits = True
        if self._companions or waits:
            self._thread = threading.Thread(target=self._run, name="kser-beside", daemon=True)
            self._thread.start()

    def close(self, timeout: float) -> None:
        """Stop the thread and close the services.

        :param timeout: seconds to wait for the running tick.
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
        """Reload the services, because classes of further registries may have been registered."""
        try:
            self._companions = self._find()
        except StoreUnavailable:
            # The store has logged the outage; the next cycle reloads the services.
            pass
        except Exception:
            # Never let this thread die: leases would expire. Services call user and driver code that may raise
            # anything.
            logger.exception("background services could not be loaded; trying again")
