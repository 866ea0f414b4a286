"""Services that a consumer offers to the registries of its entrypoint classes: background services and a producer."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from kser.controller import BaseProducer, connecting_later
from kser.errors import ProducerMissing, StoreUnavailable
from kser.escaping import escape_lines
from kser.forks import renew_after_fork
from kser.takeover import TakeoverHost

logger = escape_lines(logging.getLogger(__name__))

#: Maximum number of seconds between two ticks of each background service.
TICK_INTERVAL = 0.5

#: Maximum number of seconds that :meth:`SharedProducer.prepare` waits.
PREPARE_TIMEOUT = 0.25
#: Seconds between two tries to make the producer of a takeover.
PREPARE_INTERVAL = 1.0


class BackgroundService(Protocol):
    """Periodic work that a registry needs while a consumer runs."""

    def start(self, host: TakeoverHost) -> None:
        """Start the threads of the service, if they do not run yet. Further calls for the same consumer do nothing."""

    def tick(self, host: TakeoverHost) -> float:
        """Run the work that is due; return the number of seconds until more work is due."""
        ...

    def look(self, host: TakeoverHost) -> None:
        """Look for due steps once and take over those that the consumer can run, whether a look is due or not."""

    def close(self, host: TakeoverHost) -> None:
        """Release what the service holds for the consumer, which is shutting down."""


class BackgroundServices:
    """The thread that runs the background services of a consumer.

    :param find_services: returns the background services. The thread calls this function repeatedly, because a registry
        may add a service while the consumer runs.
    :param host: what the consumer offers to the services.
    """

    def __init__(self, find_services: Callable[[], Sequence[BackgroundService]], host: TakeoverHost) -> None:
        self._find_services = find_services
        self._host = host
        self._services: Sequence[BackgroundService] = ()
        self._turn = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it is already running or no service exists.

        If the database is unavailable, the thread starts anyway and loads the services later.

        :raises kser.errors.KserError: a service cannot run in this consumer.
        """
        if self._thread is not None:
            return
        is_unavailable = False
        try:
            self._services = self._find_services()
        except StoreUnavailable:
            # The store has logged the outage. The thread starts anyway and loads the services after the outage.
            is_unavailable = True
        if self._services or is_unavailable:
            self._thread = threading.Thread(target=self._run, name="kser-services", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Let each service look for due steps once, for a consumer that runs step by step and has no thread."""
        self._refresh()
        for service in self._in_turn():
            service.look(self._host)

    def close(self, timeout: float) -> None:
        """Stop the thread and close the services.

        :param timeout: seconds to wait for the running tick.
        """
        self._stopped.set()
        self._host.wake_up.set()
        if self._thread is not None:
            self._thread.join(timeout)
        for service in self._services:
            service.close(self._host)

    def _run(self) -> None:
        while not self._stopped.is_set():
            wait = TICK_INTERVAL
            for service in self._in_turn():
                if self._stopped.is_set():
                    return
                service.start(self._host)
                wait = min(wait, service.tick(self._host))
            self._host.wake_up.wait(wait)
            self._host.wake_up.clear()
            self._refresh()

    def _in_turn(self) -> Sequence[BackgroundService]:
        """Return the services, each time with another one first, because the first one gets the free workers."""
        services, self._turn = self._services, self._turn + 1
        first = self._turn % len(services) if services else 0
        return [*services[first:], *services[:first]]

    def _refresh(self) -> None:
        """Reload the services, because classes of another registry may have been registered since the last call."""
        try:
            self._services = self._find_services()
        except StoreUnavailable:
            # The store has logged the outage; the next cycle reloads the services.
            pass
        except Exception:
            # The services call user code and database drivers, which may raise any exception. No exception may end this
            # thread, because this thread continues the operations of dead consumers.
            logger.exception("background services could not be loaded; trying again")


class SharedProducer:
    """The producer of a consumer, created at its first use, which the consumer lends to its registries.

    :param make: creates the producer.
    """

    def __init__(self, make: Callable[[], BaseProducer]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._producer: BaseProducer | None = None
        self._is_connected = False
        self._preparation: threading.Thread | None = None
        self._prepare_at = -math.inf
        self._has_failed = False
        self._closed = self._detached = False
        self._attached_to: Any = None
        self._borrowers: list[Any] = []
        renew_after_fork(self)

    def _kser_renew_after_fork(self) -> None:
        self._lock = threading.Lock()

    def producer(self) -> BaseProducer:
        """Return the producer; create it at the first call.

        :raises kser.errors.ProducerMissing: the consumer has closed the producer.
        """
        producer = self.lend()
        if producer is None:
            raise ProducerMissing("the consumer has closed its producer: send with a producer of your own")
        return producer

    def lend(self) -> BaseProducer | None:
        """Return the producer, which the first call creates; None after :meth:`close`."""
        with self._lock:
            if self._closed:
                return None
            if self._producer is None:
                self._producer = self._make()
            elif not self._is_connected and isinstance(self._producer, BaseProducer):
                self._producer._kser_ensure_connected()
            self._is_connected = True
            return self._producer

    def prepare(self) -> BaseProducer | None:
        """Return the producer, which may have no connection yet; None after :meth:`close`, or as long as it is made.

        The method waits only briefly, because an override of ``make_producer`` may wait for a broker. Another thread
        then makes the producer.
        """
        if self._producer is None and not self._closed and not self._is_preparing():
            self._prepare_at = time.monotonic() + PREPARE_INTERVAL
            self._preparation = threading.Thread(target=self._prepare, name="kser-make-producer", daemon=True)
            self._preparation.start()
            self._preparation.join(PREPARE_TIMEOUT)
        return None if self._closed else self._producer

    @property
    def is_closed(self) -> bool:
        """True after :meth:`close`."""
        return self._closed

    def _is_preparing(self) -> bool:
        is_running = self._preparation is not None and self._preparation.is_alive()
        return is_running or time.monotonic() < self._prepare_at

    def _prepare(self) -> None:
        try:
            with self._lock, connecting_later():
                if self._producer is None and not self._closed:
                    self._producer = self._make()
        except Exception as error:
            # An override of make_producer is user code, which may raise any exception.
            if not self._has_failed:
                logger.warning(f"no step can be taken over, because the producer cannot be made: {error}; trying again")
            self._has_failed = True

    def attach(self, controller: Any) -> None:
        """Lend the producer to the registry of each class of a controller, so that tasks can send messages.

        Call this method regularly, because a class that is registered later may belong to a registry without a
        producer.
        """
        self._attached_to = controller, len(getattr(controller, "ENTRYPOINTS", ()))
        if self._detached:
            return
        for registry in _registries(controller):
            registry._kser_add_lender(self)
            if not any(registry is borrower for borrower in self._borrowers):
                self._borrowers.append(registry)

    def attach_if_changed(self, controller: Any) -> bool:
        """Attach the producer if the controller or the number of its classes is not the same as at the last call.

        :return: True if the controller or the number of its classes is not the same as at the last call.
        """
        if self._attached_to == (controller, len(getattr(controller, "ENTRYPOINTS", ()))):
            return False
        self.attach(controller)
        return True

    def background_services(self) -> list[BackgroundService]:
        """Return the background services of the registries that the producer is attached to, without duplicates."""
        controller, _ = self._attached_to or (None, 0)
        services = (getattr(registry, "_kser_background_service", None) for registry in _registries(controller))
        return list({id(service): service for service in services if service is not None}.values())

    def detach(self) -> None:
        """Stop lending the producer. Each registry then borrows from another consumer of this process, if there is one.

        The registries of a controller that the consumer no longer uses are included.
        """
        # The supervisor thread may still call ``attach`` during the shutdown, and that call must have no effect.
        self._detached = True
        borrowers, self._borrowers = self._borrowers, []
        for registry in borrowers:
            registry._kser_remove_lender(self)

    def close(self) -> None:
        """Close the producer if it was created. After this call, no producer is created."""
        with self._lock:
            self._closed = True
        if self._producer is not None:
            self._producer.close()


def _registries(controller: Any) -> Iterator[Any]:
    for entrypoint in list(getattr(controller, "ENTRYPOINTS", {}).values()):
        registry = getattr(entrypoint, "_kser_registry", None)
        if registry is not None:
            yield registry
        yield from getattr(entrypoint, "_kser_registries", ())
