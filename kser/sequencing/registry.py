"""OperationRegistry: routes messages to the classes that are subscribed to it.

Drop-in for ``kser.sequencing.registry`` of 0.8.27.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from kser.config import TOPICS, Settings
from kser.controller import BaseProducer, Controller
from kser.entry import Entrypoint, check_entrypoint
from kser.errors import ProducerMissing, TopicMissing
from kser.sequencing.runner import InProcessRunner, Runner
from kser.sequencing.task import Task

logger = logging.getLogger(__name__)

EntrypointClass = TypeVar("EntrypointClass", bound=type[Entrypoint])


class OperationRegistry:
    """Registers classes with a controller, and holds what they need to run and to send.

    :param app: Flask application if any: its ``config`` is read, and everything runs inside its context.
    :param controller_class: the controller to use: anything that makes one when called.
    :param producer: what tasks and operations are sent with. A consumer lends its own when there is none.
    """

    def __init__(
        self,
        app: Any = None,
        controller_class: Callable[[], Any] = Controller,
        *,
        producer: BaseProducer | None = None,
    ) -> None:
        self.controller = controller_class()
        self.app: Any = None
        #: What executes operations.
        self.runner: Runner = InProcessRunner()
        self._producer = producer
        self._lend: Callable[[], BaseProducer] | None = None
        if app:
            self.init_app(app)

    def init_app(self, app: Any = None) -> None:
        """Use a Flask application, then call :meth:`load_tasks`."""
        self.app = app
        self.load_tasks()

    def load_tasks(self) -> None:
        """To implement: import or subscribe the classes."""

    def subscribe(self, callback: EntrypointClass) -> EntrypointClass:
        """Register a task, an operation or any other Entrypoint class under its path. Works as a decorator.

        The first class under a path stays; a second one is reported.

        :return: the class.
        :raises cdumay_error.types.ValidationError: it is no Entrypoint class.
        """
        check_entrypoint(getattr(callback, "path", repr(callback)), callback)
        path = callback.path
        known = self.controller.ENTRYPOINTS.get(path)
        if known is None:
            self.controller.register(path, callback)
            logger.info(f"Operation registry: loaded {path}")
        elif known is not callback:
            logger.warning(
                f"Operation registry: {path} is taken by {_full_name(known)}, so {_full_name(callback)} is ignored;"
                " rename one of the two classes"
            )
        if "_kser_registry" not in vars(callback):
            callback._kser_registry = self
        return callback

    @property
    def producer(self) -> BaseProducer:
        """What tasks and operations are sent with.

        :raises kser.errors.ProducerMissing: nobody gave one.
        """
        if self._producer is not None:
            return self._producer
        if self._lend is None:
            raise ProducerMissing(
                "the registry has no producer to send with: give it one, OperationRegistry(producer=Producer()), or"
                " send from a task that a consumer runs (Producer() reads KSER_CONFIG)"
            )
        return self._lend()

    def borrow_producer(self, lend: Callable[[], BaseProducer]) -> None:
        """Send with what ``lend`` returns, as long as nobody gave a producer; it is called each time."""
        self._lend = lend

    def return_producer(self, lend: Callable[[], BaseProducer]) -> None:
        """Send with what ``lend`` returns no longer: whoever lent it closes it."""
        if self._lend == lend:
            self._lend = None

    def topic_for(self, task: Task, topic: str | None = None) -> str:
        """Where to send ``task``: ``topic``, else its class's ``TOPIC``, else the first of ``KSER_TOPICS``.

        :raises kser.errors.TopicMissing: none of the three names one.
        """
        found = topic or task.TOPIC or next(iter(self.settings.topics), None)
        if not found:
            raise TopicMissing(
                f"there is no topic to send {type(task).path} to: pass send(topic=...), set TOPIC on the class, or set"
                f" {TOPICS} in the environment or in the Flask app's config"
            )
        return found

    @property
    def settings(self) -> Settings:
        """The settings, as the app and the environment have them now."""
        return Settings.of(self.app)

    def context(self) -> AbstractContextManager[Any]:
        """The app's context, to run something in; nothing without an app."""
        enter = getattr(self.app, "app_context", None)
        return nullcontext() if enter is None else enter()


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
