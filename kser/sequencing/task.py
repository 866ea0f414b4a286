"""Task: an entrypoint with a status. This module is a drop-in replacement for ``kser.sequencing.task`` of 0.8.27."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from cdumay_result import Result

from kser import log_lines
from kser import status as states
from kser.attempt import current_attempt
from kser.entry import NO_INIT_FAILURE, Entrypoint, RegistryProtocol
from kser.errors import ProducerMissing, UsageError
from kser.escaping import escape_lines
from kser.retry import Retry

logger = escape_lines(logging.getLogger(__name__))


class _AttemptNumber:
    """Descriptor of the attribute ``Task.attempt``.

    This is a non-data descriptor, so an attribute of the same name in user code takes precedence (decision C18).
    """

    def __get__(self, instance: Any, owner: type) -> int:
        attempt = current_attempt.get()
        return 1 if attempt is None else attempt.number


class _CancelRequested:
    """Descriptor of the attribute ``Task.cancel_requested``.

    This is a non-data descriptor, so an attribute of the same name in user code takes precedence (decision C18).
    """

    def __get__(self, instance: Any, owner: type) -> bool:
        attempt = current_attempt.get()
        return attempt is not None and attempt.cancel_requested


class _OperationUuid:
    """Descriptor of the attribute ``Task.operation_uuid``.

    This is a non-data descriptor, so an attribute of the same name in user code takes precedence (decision C18).
    """

    def __get__(self, instance: Any, owner: type) -> str | None:
        return getattr(instance, "_kser_operation_uuid", None)


class Task(Entrypoint):
    """Entrypoint with a status: PENDING, RUNNING, then SUCCESS or FAILED.

    :param uuid: identifier; by default, a new uuid.
    :param params: parameters of the task.
    :param status: status of the task; any value is allowed.
    :param result: the forwarded result of a previous task.
    :param metadata: data of the user, which kser stores in the message unchanged.
    :raises kser.errors.UsageError: the arguments are positional and in the order of Operation in kser 0.8 (decision
        B2).
    """

    #: Topic of :meth:`send`; None stands for the first of ``KSER_TOPICS``.
    TOPIC: ClassVar[str | None] = None
    #: Retry policy for failed messages of this class; None stands for the policy of the consumer.
    RETRY: ClassVar[Retry | None] = None
    #: Time limit of an attempt in a consumer, in seconds; None stands for no limit.
    TIME_LIMIT: ClassVar[float | None] = None

    #: Number of the current attempt, from 1. In a stored operation, this is the number of the attempt at the task,
    #: otherwise the number of the attempt at the record.
    attempt: ClassVar[Any] = _AttemptNumber()
    #: UUID of the operation that runs this task; None for a task outside of an operation.
    operation_uuid: ClassVar[Any] = _OperationUuid()
    #: True after a request to cancel the stored operation that runs this task. A long task can check this attribute and
    #: return early.
    cancel_requested: ClassVar[Any] = _CancelRequested()

    _kser_executed = False
    _kser_operation_uuid: str | None = None
    #: The error that prevents this object from running; None if there is no such error. An object that was built from a
    #: row has this error if its class is not registered in this process, or if its construction failed.
    _kser_load_error: Exception | None = None
    #: Path of the class in the store, if this object is a plain task because its class could not be built.
    _kser_stored_path: str | None = None

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
                f"{type(self).__name__}: params must be a mapping, not the text {params!r}; the order of the arguments"
                " is (uuid, params, status, result, metadata); pass the arguments by keyword:"
                f" {type(self).__name__}(uuid=..., params=..., status=...)"
            )
        #: ``PENDING``, ``RUNNING``, ``SUCCESS``, ``FAILED``, ``CANCELLED``, or a word of your own.
        self.status = status
        super().__init__(uuid=uuid, params=params, result=result, metadata=metadata)

    @classmethod
    def init_by_id(cls, _id: Any) -> Self | None:
        """Load a task from your own database. Subclasses may implement this method; by default, it returns None."""
        return None

    def get_attr(self, item: str) -> tuple[str, Any]:
        """Return the name and the value of an id, for user code that stores tasks in its own database.

        For the item ``customer``, the name is ``customerId``. If this object has an attribute ``customer``, the value
        is ``self.customer.customerId``, otherwise ``self.customerId``. If this attribute is missing, the value is None.

        :param item: name of the thing that the id identifies, without the suffix ``Id``.
        """
        name = f"{item}Id"
        return name, getattr(getattr(self, item, self), name, None)

    def send(self, result: Result | None = None, topic: str | None = None, *, key: str | bytes | None = None) -> Any:
        """Send this task to Kafka with the producer of its registry, and wait for the delivery.

        :param result: a result to forward to the task.
        :param topic: the topic; by default :attr:`TOPIC`, else the first of ``KSER_TOPICS``.
        :param key: key of the message. Consumers handle messages with the same key one after the other.
        :return: the Result of the producer; a failed Result if the broker did not confirm the delivery.
        :raises kser.errors.ProducerMissing: the class has no registry, or the registry has no producer.
        :raises kser.errors.TopicMissing: neither the argument nor ``TOPIC`` nor ``KSER_TOPICS`` names a topic.
        """
        registry = registry_of(self)
        # Pass a key only if there is one, because ``send`` of a third-party producer may not support keys.
        options: dict[str, Any] = {} if key is None else {"key": key}
        return registry.producer.send(registry.topic_for(self, topic), self.to_Message(result=result), **options)

    def unsafe_execute(self, result: Result | None = None) -> Any:
        if self._kser_init_failure is not NO_INIT_FAILURE:
            return self._kser_init_failure
        self.status = states.RUNNING
        self._kser_executed = True
        try:
            return super().unsafe_execute(result=result)
        except BaseException:
            # If the caller is not ``execute``, no later code calls ``_onerror``, which sets the status. So set the
            # status here; otherwise the status would remain RUNNING.
            self.status = states.FAILED
            raise

    def log(self, message: str, level: int = logging.INFO, *args: Any, **kwargs: Any) -> None:
        """Log ``message``, formatted with ``args``, as ``Name.STATUS: path[uuid]: message``.

        :param level: level of the log record.
        :param kwargs: keyword arguments of :meth:`logging.Logger.log`; ``kmsg``, the dumped task, is added to
            ``extra``.
        """
        if logger.isEnabledFor(level):
            kwargs["extra"] = {**(kwargs.get("extra") or {}), "kmsg": log_lines.dump_entry(self)}
            log_lines.log_message(logger, self, self.status, message, level, *args, **kwargs)

    def _onsuccess(self, result: Any) -> Any:
        self.status = states.SUCCESS
        return super()._onsuccess(result)

    def _onerror(self, result: Any) -> Any:
        self.status = states.FAILED
        return super()._onerror(result)

    def __repr__(self) -> str:
        return f"Task [{type(self).path}](uuid={self.uuid},status={self.status}, params={self.params})"

    __str__ = __repr__


def registry_of(task: Task) -> RegistryProtocol:
    """Return the registry that a task's class is subscribed to.

    :raises kser.errors.ProducerMissing: the class is not subscribed to a registry.
    """
    if task._kser_registry is None:
        raise ProducerMissing(
            f"{type(task).path} has no registry to send with: decorate the class with @oregistry.subscribe, and give"
            " that registry a producer: OperationRegistry(producer=Producer())"
        )
    return task._kser_registry
