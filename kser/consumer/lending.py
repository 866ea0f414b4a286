"""The producer of a consumer, shared with the registries of the classes that the consumer runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from kser.consumer.beside import BackgroundService
from kser.controller import BaseProducer


class SharedProducer:
    """The producer of a consumer, created at its first use.

    :param make: creates the producer.
    """

    def __init__(self, make: Callable[[], BaseProducer]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._producer: BaseProducer | None = None
        self._attached_to: Any = None

    def producer(self) -> BaseProducer:
        """Return the producer; create it at the first call."""
        with self._lock:
            if self._producer is None:
                self._producer = self._make()
            return self._producer

    def attach(self, controller: Any) -> None:
        """Attach the producer to the registries of a controller's classes, so that their tasks can send.

        Call it regularly: classes are registered later, and other consumers of the process attach and detach theirs.
        """
        self._attached_to = controller, len(getattr(controller, "ENTRYPOINTS", ()))
        for registry in _registries(controller):
            registry._kser_set_fallback_producer(self.producer)

    def attach_if_changed(self, controller: Any) -> bool:
        """Attach the producer if the controller or its number of classes has changed; return whether it has."""
        if self._attached_to == (controller, len(getattr(controller, "ENTRYPOINTS", ()))):
            return False
        self.attach(controller)
        return True

    def background_services(self) -> list[BackgroundService]:
        """Return the background services of the registries that the producer is attached to, without duplicates."""
        controller, _ = self._attached_to or (None, 0)
        found = (getattr(registry, "_kser_background_service", None) for registry in _registries(controller))
        return list({id(companion): companion for companion in found if companion is not None}.values())

    def detach(self, controller: Any) -> None:
        """Detach the producer from the registries of a controller's classes."""
        for registry in _registries(controller):
            registry._kser_clear_fallback_producer(self.producer)

    def close(self) -> None:
        """Close the producer if it was created."""
        if self._producer is not None:
            self._producer.close()


def _registries(controller: Any) -> Iterator[Any]:
    for entrypoint in list(getattr(controller, "ENTRYPOINTS", {}).values()):
        registry = getattr(entrypoint, "_kser_registry", None)
        if registry is not None:
            yield registry
