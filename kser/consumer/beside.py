"""Background services of a consumer: one thread that runs the periodic work of its registries."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from kser.errors import StoreUnavailable

logger = logging.getLogger(__name__)

#: Seconds between two ticks of each background service.
TICK_INTERVAL = 0.5


class BackgroundService(Protocol):
    """Periodic work that a registry needs while a consumer runs."""

    def tick(self) -> None:
        """Run the work that is due."""

    def close(self) -> None:
        """Release resources; the consumer is shutting down."""


class BackgroundServices:
    """The thread that runs the background services of a consumer.

    :param companions: returns the background services; called repeatedly, because services are added later.
    """

    def __init__(self, find_services: Callable[[], Sequence[BackgroundService]]) -> None:
        self._find_services = find_services
        self._services: Sequence[BackgroundService] = ()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread if it is not running and there are services; services without a database start later.

        :raises kser.errors.KserError: a service cannot run in this consumer.
        """
        if self._thread is not None:
            return
        waits = False
        try:
            self._services = self._find_services()
        except StoreUnavailable:
            # The store has logged the outage. The thread starts anyway and loads the services after the outage.
            waits = True
        if self._services or waits:
            self._thread = threading.Thread(target=self._run, name="kser-services", daemon=True)
            self._thread.start()

    def close(self, timeout: float) -> None:
        """Stop the thread and close the services.

        :param timeout: seconds to wait for the running tick.
        """
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout)
        for companion in self._services:
            companion.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            for companion in self._services:
                companion.tick()
            self._stopped.wait(TICK_INTERVAL)
            self._refresh()

    def _refresh(self) -> None:
        """Reload the services, because classes of further registries may have been registered."""
        try:
            self._services = self._find_services()
        except StoreUnavailable:
            # The store has logged the outage; the next cycle reloads the services.
            pass
        except Exception:
            # Never let this thread die: leases would expire. Services call user and driver code that may raise
            # anything.
            logger.exception("background services could not be loaded; trying again")
