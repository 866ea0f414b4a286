"""OperationRegistry: routes messages to the classes that are subscribed to it.

Drop-in for ``kser.sequencing.registry`` of 0.8.27.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

from kser.config import DATABASE_URI, TOPICS, Settings
from kser.controller import BaseProducer, Controller
from kser.entry import Entrypoint, check_entrypoint
from kser.errors import ProducerMissing, StoreMissing, TopicMissing
from kser.schemas import Message
from kser.sequencing.keeper import Keeper, what_to_find
from kser.sequencing.means import Means
from kser.sequencing.operation import Operation
from kser.sequencing.recovery import Recovery
from kser.sequencing.runner import InProcessRunner, Runner
from kser.sequencing.task import Task
from kser.status import CANCELLED, FAILED, SUCCESS
from kser.store import open_store
from kser.store.base import Store

logger = logging.getLogger(__name__)

EntrypointClass = TypeVar("EntrypointClass", bound=type[Entrypoint])


class OperationPage(list[Operation]):
    """Some of the operations that were looked for.

    :param cursor: what to pass as ``after`` for the next ones; None when there are no more.
    """

    def __init__(self, operations: Iterable[Operation], cursor: str | None) -> None:
        super().__init__(operations)
        self.cursor = cursor


class OperationRegistry:
    """Registers classes with a controller, and holds what they need to run and to send.

    :param app: Flask application if any: its ``config`` is read, and everything runs inside its context.
    :param controller_class: the controller to use: anything that makes one when called.
    :param producer: what tasks and operations are sent with. A consumer lends its own when there is none.
    :param store: the shared database, where operations are kept; ``KSER_DATABASE_URI`` when None.
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
        #: What executes operations.
        self.runner: Runner = InProcessRunner()
        self._producer = producer
        self._lend: Callable[[], BaseProducer] | None = None
        self._store = store
        self._opened: Means | None = None
        self._means: Means | None = None
        self._keeper: Keeper | None = None
        self._recovery: Recovery | None = None
        self._opening = threading.Lock()
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

    # -- stored operations ---------------------------------------------------------------------------------------------

    @property
    def keeps(self) -> bool:
        """Whether there is a shared database, where operations are kept."""
        return self._keeper is not None or self._store is not None or bool(self.settings.get(DATABASE_URI))

    @property
    def store(self) -> Store:
        """The shared database, opened and checked when it is first needed.

        :raises kser.errors.StoreMissing: there is none.
        :raises kser.errors.SchemaMismatch: its tables are of another version.
        """
        return self._open().store

    @property
    def keeper(self) -> Keeper:
        """What keeps operations in the shared database.

        :raises kser.errors.StoreMissing: there is none.
        """
        self._open()
        assert self._keeper is not None
        return self._keeper

    @property
    def companion(self) -> Recovery | None:
        """What is to run beside each consumer; None without a shared database."""
        if not self.keeps:
            return None
        self._open()
        return self._recovery

    def _open(self) -> Means:
        if self._means is None:
            with self._opening:
                opened = self._opened = self._opened or Means(self, self._make_store())
            # Not under the lock: in a consumer it takes as long as the database is away.
            opened.patience.call(opened.store.check)
            with self._opening:
                if self._means is None:
                    self._recovery = Recovery(opened)
                    self._keeper = self.runner = Keeper(opened, self.runner)
                    self._means = opened
        return self._means

    def _make_store(self) -> Store:
        if self._store is None:
            uri = self.settings.get(DATABASE_URI)
            if not uri:
                raise StoreMissing(
                    f"there is no shared database: set {DATABASE_URI} in the environment or in the Flask app's config,"
                    " or pass OperationRegistry(store=...)"
                )
            self._store = open_store(uri)
        return self._store

    def receive(self, kmsg: Message, entrypoint: type[Entrypoint] | None) -> Any:
        """Handle the message of an operation that is kept, or is to be, or of a step of it; controllers call it.

        :param entrypoint: the class that it names; None for one that is not known here.
        :return: a Result; or :class:`kser.delivery.Unfinished`.
        """
        with self.context():
            return self.keeper.receive(kmsg, entrypoint)

    def get(self, uuid: str) -> Operation | None:
        """A stored operation with its tasks, results, ``attempts`` and ``events``, as they are now.

        It is of its class where that is subscribed here, else a plain :class:`.Operation`.

        :return: None when there is none with that uuid.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        return self.keeper.get(uuid)

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
        """Stored operations, newest first, without their tasks.

        :param status: one, or several of them.
        :param entrypoint: a class or its path.
        :param since: created then or later: a datetime, or seconds since 1970.
        :param until: created before.
        :param metadata: each of these keys has this value.
        :param parent: those that are tasks of the operation with this uuid, which are left out otherwise.
        :param limit: no more than that.
        :param after: ``cursor`` of the page before.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        found = what_to_find(status, entrypoint, since, until, metadata, parent)
        return OperationPage(*self.keeper.find(found, limit, after))

    def purge(
        self, *, older_than: float | timedelta, status: str | Collection[str] = (SUCCESS, FAILED, CANCELLED)
    ) -> int:
        """Delete stored operations that have ended, with everything that belongs to them.

        :param older_than: how long ago they ended, at least: seconds, or a timedelta. It must be longer than the topics
            keep messages: an operation that comes again is only known as long as it is stored.
        :param status: how they ended.
        :return: how many were deleted.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
        return self.keeper.purge(seconds, {status} if isinstance(status, str) else set(status))

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
