"""The producer of a consumer, lent to the registries of the classes that it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from kser.consumer.beside import Companion
from kser.controller import BaseProducer


class Lending:
    """Makes the producer when it is first needed, and closes it.

    :param make: makes it.
    """

    def __init__(self, make: Callable[[], BaseProducer]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._producer: BaseProducer | None = None
        self._known: Any = None

    def producer(self) -> BaseProducer:
        """The producer."""
        with self._lock:
            if self._producer is None:
                self._producer = self._make()
            return self._producer

    def lend(self, controller: Any) -> None:
        """Let the classes of a controller send with it.

        Again and again: classes are added, and other consumers of this process lend theirs and take them back.
        """
        self._known = controller, len(getattr(controller, "ENTRYPOINTS", ()))
        for registry in _registries(controller):
            registry.borrow_producer(self.producer)

    def lend_to_new(self, controller: Any) -> bool:
        """The same, if there are other classes than the last time; returns whether there are."""
        if self._known == (controller, len(getattr(controller, "ENTRYPOINTS", ()))):
            return False
        self.lend(controller)
        return True

    def companions(self) -> list[Companion]:
        """What is to run beside the consumer, for the registries that were lent to."""
        controller, _ = self._known or (None, 0)
        found = (getattr(registry, "companion", None) for registry in _registries(controller))
        return list({id(companion): companion for companion in found if companion is not None}.values())

    def take_back(self, controller: Any) -> None:
        """Nobody is to send with it any more."""
        for registry in _registries(controller):
            registry.return_producer(self.producer)

    def close(self) -> None:
        """Close it, if it was ever made."""
        if self._producer is not None:
            self._producer.close()


def _registries(controller: Any) -> Iterator[Any]:
    for entrypoint in list(getattr(controller, "ENTRYPOINTS", {}).values()):
        registry = getattr(entrypoint, "_kser_registry", None)
        if registry is not None:
            yield registry
