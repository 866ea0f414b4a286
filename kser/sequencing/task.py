"""Task: an entrypoint that knows its status. Drop-in for ``kser.sequencing.task`` of 0.8.27."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cdumay_result import Result

from kser import records
from kser import status as states
from kser.delivery import CURRENT
from kser.entry import NOT_REFUSED, Entrypoint
from kser.errors import ProducerMissing, UsageError
from kser.retry import Retry

if TYPE_CHECKING:
    from kser.sequencing.registry import OperationRegistry

logger = logging.getLogger(__name__)


class _Attempt:
    """``attempt`` on instances; no data descriptor, so that a user's attribute of that name wins (decision C18)."""

    def __get__(self, instance: Any, owner: type) -> int:
        delivery = CURRENT.get()
        return 1 if delivery is None else delivery.attempt


class _CancelRequested:
    """``cancel_requested`` on instances, likewise."""

    def __get__(self, instance: Any, owner: type) -> bool:
        delivery = CURRENT.get()
        return delivery is not None and delivery.cancel_requested


class _OperationUuid:
    """``operation_uuid`` on instances, likewise."""

    def __get__(self, instance: Any, owner: type) -> str | None:
        return getattr(instance, "_kser_operation_uuid", None)


class Task(Entrypoint):
    """An entrypoint with a status: PENDING, RUNNING, then SUCCESS or FAILED.

    :param uuid: identifier, a new one by default.
    :param params: parameters of the task.
    :param status: its state, stored as it is.
    :param result: the forwarded result of a previous task.
    :param metadata: context that is carried through.
    :raises kser.errors.UsageError: a positional call in the order of Operation in kser 0.8 (decision B2).
    """

    #: Where :meth:`send` sends to; the first of ``KSER_TOPICS`` when None.
    TOPIC: ClassVar[str | None] = None
    #: When a message for this class that fails is tried again; the consumer's policy when None.
    RETRY: ClassVar[Retry | None] = None
    #: Seconds that an attempt may take in a consumer; no limit when None.
    TIMEOUT: ClassVar[float | None] = None

    #: The number of the attempt from 1: at the message that is being handled, or, in a stored operation, at the task.
    attempt: ClassVar[Any] = _Attempt()
    #: The uuid of the operation that runs this task; None for a task that is run by itself.
    operation_uuid: ClassVar[Any] = _OperationUuid()
    #: Whether somebody asked to cancel the stored operation that this task is run for: a long task may look at it, and
    #: return early.
    cancel_requested: ClassVar[Any] = _CancelRequested()

    _kser_registry: ClassVar[OperationRegistry | None] = None
    _kser_executed = False
    _kser_operation_uuid: str | None = None
    #: Why an object made from a row cannot run: its class is not known here, or could not be made.
    _kser_unfit: Exception | None = None

    def __init__(
        self,
        uuid: str | None = None,
        params: Mapping[str, Any] | None = None,
        status: str = states.PENDING,
        result: Result | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        given: Any = params
        if isinstance(given, str) and given:
            raise UsageError(
                f"{type(self).__name__}: params is the text {params!r} where a mapping must be; the order is"
                " (uuid, params, status, result, metadata), so pass them by keyword:"
                f" {type(self).__name__}(uuid=..., params=..., status=...)"
            )
        #: ``PENDING``, ``RUNNING``, ``SUCCESS``, ``FAILED``, ``CANCELLED``, or a word of your own.
        self.status = status
        super().__init__(uuid=uuid, params=params, result=result, metadata=metadata)

    @classmethod
    def init_by_id(cls, _id: Any) -> Self | None:
        """To implement: load a task from your own database. Returns None here."""
        return None

    def get_attr(self, item: str) -> tuple[str, Any]:
        """The pair ``("<item>Id", value)``, for mapping to a database.

        The value is the attribute ``<item>Id`` of ``self.<item>`` when there is such an attribute, of this object
        otherwise; None when neither has it.
        """
        name = f"{item}Id"
        return name, getattr(getattr(self, item, self), name, None)

    def send(self, result: Result | None = None, topic: str | None = None, *, key: str | bytes | None = None) -> Any:
        """Send this task to Kafka with the producer of its registry, and wait until it is delivered.

        :param result: forwarded to the task.
        :param topic: where to: this argument, else :attr:`TOPIC`, else the first of ``KSER_TOPICS``.
        :param key: what has the same key is handled one after the other.
        :return: the producer's Result, failed when delivery was not confirmed.
        :raises kser.errors.ProducerMissing: the class has no registry, or that has no producer.
        :raises kser.errors.TopicMissing: none of the three names a topic.
        """
        registry = registry_of(self)
        # Third parties' producers may know no key.
        options: dict[str, Any] = {} if key is None else {"key": key}
        return registry.producer.send(registry.topic_for(self, topic), self.to_Message(result=result), **options)

    def unsafe_execute(self, result: Result | None = None) -> Any:
        if self._kser_refusal is not NOT_REFUSED:
            return self._kser_refusal
        self.status = states.RUNNING
        self._kser_executed = True
        try:
            return super().unsafe_execute(result=result)
        except BaseException:
            # Whoever calls this gets the exception; the status must not say that it still runs.
            self.status = states.FAILED
            raise

    def log(self, message: str, level: int = logging.INFO, *args: Any, **kwargs: Any) -> None:
        """Log ``message``, formatted with ``args``, as ``Name.STATUS: path[uuid]: message``.

        :param level: level of the record.
        :param kwargs: what :meth:`logging.Logger.log` takes; ``extra`` gets ``kmsg``, the dumped task, added.
        """
        if logger.isEnabledFor(level):
            kwargs["extra"] = {**(kwargs.get("extra") or {}), "kmsg": records.dump_entry(self)}
            records.message(logger, self, self.status, message, level, *args, **kwargs)

    def _onsuccess(self, result: Any) -> Any:
        self.status = states.SUCCESS
        return super()._onsuccess(result)

    def _onerror(self, result: Any) -> Any:
        self.status = states.FAILED
        return super()._onerror(result)

    def __repr__(self) -> str:
        return f"Task [{type(self).path}](uuid={self.uuid},status={self.status}, params={self.params})"

    __str__ = __repr__


def registry_of(task: Task) -> OperationRegistry:
    """The registry that a task's class is subscribed to.

    :raises kser.errors.ProducerMissing: there is none.
    """
    if task._kser_registry is None:
        raise ProducerMissing(
            f"{type(task).path} has no registry to send with: decorate the class with @oregistry.subscribe, and give"
            " that registry a producer: OperationRegistry(producer=Producer())"
        )
    return task._kser_registry
