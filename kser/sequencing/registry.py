"""OperationRegistry: routes messages to the classes that are subscribed to it.

This module is a drop-in replacement for ``kser.sequencing.registry`` of 0.8.27.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from kser.config import DATABASE_URI, TOPICS, Settings
from kser.controller import BaseProducer, Controller
from kser.durable.context import DurableContext
from kser.durable.manager import OperationManager, build_query
from kser.durable.message_handler import MessageHandler
from kser.durable.recovery import RecoveryService
from kser.entry import Entrypoint, check_entrypoint
from kser.errors import KserError, ProducerMissing, StoreMissing, TopicMissing
from kser.escaping import escape_lines
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.runner import InMemoryRunner, Runner
from kser.sequencing.task import Task
from kser.status import CANCELLED, FAILED, SUCCESS
from kser.store import open_store
from kser.store.base import Store

logger = escape_lines(logging.getLogger(__name__))

EntrypointClass = TypeVar("EntrypointClass", bound=type[Entrypoint])


class ProducerLender(Protocol):
    """A consumer of this process, which lends its producer to registries without a producer."""

    def lend(self) -> BaseProducer | None:
        """Return the producer, or None after the consumer has closed it."""
        ...

    def prepare(self) -> BaseProducer | None:
        """Return the producer, which may have no connection yet; None if the consumer has closed it or makes it now."""
        ...

    @property
    def is_closed(self) -> bool:
        """True after the consumer has closed the producer."""
        ...


class OperationPage(list[Operation]):
    """Page of operations that :meth:`OperationRegistry.find` returns.

    :param cursor: value of ``after`` for the next page; None on the last page.
    """

    def __init__(self, operations: Iterable[Operation], cursor: str | None) -> None:
        super().__init__(operations)
        self.cursor = cursor


class OperationRegistry:
    """Registry of entrypoint classes, with the app, the producer and the store that these classes use.

    :param app: Flask application, if any. The registry reads its ``config``, and tasks and operations run inside its
        context.
    :param controller_class: controller class, or any callable that returns a controller.
    :param producer: producer that sends tasks and operations; by default, the producer of the consumer that runs in
        this process.
    :param store: shared database for operations; by default, the database of ``KSER_DATABASE_URI``.
    """

    def __init__(
        self,
        app: Any = None,
        controller_class: Callable[[], Any] = Controller,
        *,
        producer: BaseProducer | None = None,
        store: Store | None = None,
    ) -> None:
        self.controller = controller_class()
        self.app: Any = None
        #: The runner that executes operations which are not stored.
        self.runner: Runner = InMemoryRunner()
        self._kser_producer = producer
        self._kser_lenders: tuple[ProducerLender, ...] = ()
        self._kser_lenders_lock = threading.Lock()
        self._kser_store = store
        self._kser_opened_context: DurableContext | None = None
        self._kser_context: DurableContext | None = None
        self._kser_manager: OperationManager | None = None
        self._kser_message_handler: MessageHandler | None = None
        self._kser_recovery: RecoveryService | None = None
        self._kser_opening_lock = threading.Lock()
        if app:
            self.init_app(app)

    def init_app(self, app: Any = None) -> None:
        """Set the Flask application, and then call :meth:`load_tasks`."""
        self.app = app
        self.load_tasks()

    def load_tasks(self) -> None:
        """Subscribe entrypoint classes, or import the modules that do so. Subclasses may implement this method."""

    def subscribe(self, callback: EntrypointClass) -> EntrypointClass:
        """Register a task, an operation or any other Entrypoint class under its path. This method works as a decorator.

        If another class is already registered under the path, the registry ignores ``callback`` and logs a WARNING.

        :return: the class.
        :raises cdumay_error.types.ValidationError: ``callback`` is not an Entrypoint class.
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
        callback._kser_registries = tuple(dict.fromkeys((*vars(callback).get("_kser_registries", ()), self)))
        return callback

    @property
    def producer(self) -> BaseProducer:
        """Producer that sends tasks and operations.

        :raises kser.errors.ProducerMissing: the registry was created without a producer, and no consumer runs in this
            process.
        """
        if self._kser_producer is not None:
            return self._kser_producer
        failure: KserError | None = None
        for lender in self._kser_lenders:
            try:
                if (producer := lender.lend()) is not None:
                    return producer
            except KserError as error:
                failure = failure or error
        raise failure or ProducerMissing(
            "the registry has no producer: create the registry with OperationRegistry(producer=Producer()), where"
            " Producer() reads KSER_CONFIG, or send from a task that runs in a consumer"
        )

    def _kser_prepared_producer(self) -> BaseProducer | None:
        """Return the producer, which may have no connection yet; None as long as a consumer makes it.

        The method waits for no broker.

        :raises kser.errors.ProducerMissing: the registry was created without a producer, and no consumer runs in this
            process.
        """
        if self._kser_producer is not None:
            return self._kser_producer
        lenders = [lender for lender in self._kser_lenders if not lender.is_closed]
        if not lenders:
            return self.producer
        return next((producer for lender in lenders if (producer := lender.prepare()) is not None), None)

    def _kser_add_lender(self, lender: ProducerLender) -> None:
        """Add a consumer that lends its producer to this registry. A second call with the same lender has no effect.

        The registry borrows the producer for each send, from the newest lender that is open. The newest lender is the
        first choice, because an older consumer may have been dropped without a call of ``close``.
        """
        with self._kser_lenders_lock:
            if lender not in self._kser_lenders:
                self._kser_lenders = (lender, *self._kser_lenders)

    def _kser_remove_lender(self, lender: ProducerLender) -> None:
        """Remove a lender, which is about to close its producer. The registry then borrows from the other lenders."""
        with self._kser_lenders_lock:
            self._kser_lenders = tuple(other for other in self._kser_lenders if other is not lender)

    def topic_for(self, task: Task, topic: str | None = None) -> str:
        """Return the topic for ``task``: ``topic``, else its class's ``TOPIC``, else the first of ``KSER_TOPICS``.

        :raises kser.errors.TopicMissing: none of the three names a topic.
        """
        resolved = topic or task.TOPIC or self.settings.first_topic("")
        if not resolved:
            raise TopicMissing(
                f"there is no topic to send {type(task).path} to: pass send(topic=...), set TOPIC on the class, or set"
                f" {TOPICS} in the environment or in the Flask app's config"
            )
        return resolved

    # -- stored operations ---------------------------------------------------------------------------------------------

    @property
    def _kser_has_store(self) -> bool:
        """True if there is a shared database for operations."""
        return self._kser_manager is not None or self._kser_store is not None or bool(self.settings.get(DATABASE_URI))

    @property
    def store(self) -> Store:
        """The shared database, opened and checked at the first use.

        :raises kser.errors.StoreMissing: there is no shared database.
        :raises kser.errors.SchemaMismatch: the schema of the database has an incompatible version.
        """
        return self._kser_open().store.direct

    @property
    def _kser_operations(self) -> OperationManager:
        """The object that saves, loads, resumes and cancels stored operations.

        :raises kser.errors.StoreMissing: there is no shared database.
        """
        self._kser_open()
        assert self._kser_manager is not None
        return self._kser_manager

    @property
    def background_service(self) -> RecoveryService | None:
        """The service with the heartbeat and the reaper, which ``Consumer.run()`` runs in a thread; None without a
        database.

        A test that calls ``Consumer.step()`` must also call ``tick()`` or ``reap()`` of this service.
        """
        return self._kser_background_service

    @property
    def _kser_background_service(self) -> RecoveryService | None:
        """Background service for the consumers, or None without a shared database."""
        if not self._kser_has_store:
            return None
        self._kser_open()
        return self._kser_recovery

    def _kser_open(self) -> DurableContext:
        if self._kser_context is None:
            with self._kser_opening_lock:
                opened = self._kser_opened_context = self._kser_opened_context or DurableContext(
                    self, self._kser_make_store()
                )
            # Check the schema without holding the lock, because in a consumer this call waits for the end of an outage.
            opened.store.check()
            with self._kser_opening_lock:
                if self._kser_context is None:
                    self._kser_recovery = RecoveryService(opened)
                    self._kser_manager = OperationManager(opened)
                    self._kser_message_handler = MessageHandler(opened)
                    self._kser_context = opened
        return self._kser_context

    def _kser_make_store(self) -> Store:
        if self._kser_store is None:
            uri = self.settings.get(DATABASE_URI)
            if not uri:
                raise StoreMissing(
                    f"there is no shared database: set {DATABASE_URI} in the environment or in the Flask app's config,"
                    " or pass OperationRegistry(store=...)"
                )
            self._kser_store = open_store(uri)
        return self._kser_store

    def _kser_stores(self, uuid: str) -> bool:
        """Return whether the database contains the operation with this uuid.

        :raises kser.errors.StoreMissing: there is no shared database.
        """
        return self._kser_open().store.get_operation(uuid) is not None

    def _kser_handle_message(self, kmsg: Message, entrypoint: type[Entrypoint] | None) -> Any:
        """Handle a message that requests an operation or a step.

        Controllers call this method if there is a shared database.

        :param entrypoint: the class that the message names; None if the class is not registered in this process.
        :return: a Result, or a :class:`kser.attempt.Deferred` if the message ends without a final result, for example
            because another consumer runs the operation.
        """
        with self._kser_app_context():
            self._kser_open()
            assert self._kser_message_handler is not None
            return self._kser_message_handler.handle_message(kmsg, entrypoint)

    def get(self, uuid: str) -> Operation | None:
        """Return a stored operation with the current state of its tasks, results, ``attempts`` and ``events``.

        :return: an object of the operation's class if this class is subscribed to this registry, otherwise a plain
            :class:`.Operation`; None if no operation has this uuid.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        return self._kser_operations.get(uuid)

    def find(
        self,
        *,
        status: str | Collection[str] | None = None,
        entrypoint: Any = None,
        since: Any = None,
        until: Any = None,
        metadata: Mapping[str, Any] | None = None,
        parent: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> OperationPage:
        """Return stored operations, newest first, without their tasks.

        :param status: one status, or several.
        :param entrypoint: a class or its path.
        :param since: earliest time of creation: a datetime, or seconds since 1970.
        :param until: end of the period of creation: operations that were created at this time or later are left out.
        :param metadata: keys and values that the metadata must contain.
        :param parent: uuid of an operation, to return its nested operations. By default, the method returns only root
            operations.
        :param limit: maximum number of operations.
        :param after: the ``cursor`` of the previous page.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        query = build_query(status, entrypoint, since, until, metadata, parent)
        return OperationPage(*self._kser_operations.find(query, limit, after))

    def purge(
        self, *, older_than: float | timedelta, status: str | Collection[str] = (SUCCESS, FAILED, CANCELLED)
    ) -> int:
        """Delete ended operations with their nested operations, tasks, attempts and events.

        :param older_than: minimum time since the end: seconds, or a timedelta. Choose a longer time than the retention
            time of the topics, because a redelivered message of a deleted operation runs the operation again.
        :param status: one final status, or several.
        :return: number of deleted operations.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
        return self._kser_operations.purge(seconds, {status} if isinstance(status, str) else set(status))

    @property
    def settings(self) -> Settings:
        """Current settings from the app and the environment."""
        return Settings.of(self.app)

    def _kser_app_context(self) -> AbstractContextManager[Any]:
        """Return the app's context manager, or a context manager without effect if there is no app."""
        enter = getattr(self.app, "app_context", None)
        return nullcontext() if enter is None else enter()


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
