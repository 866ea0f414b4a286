"""Entrypoint: one unit of work and its life cycle. A drop-in replacement for ``kser.entry`` of 0.8.27."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Final, Protocol, Self
from uuid import uuid4

from cdumay_error.types import NotImplemented as NotImplementedYet
from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import log_lines, signals, status
from kser.attempt import FAILED, Failure, current_attempt, error_name, raise_if_decided
from kser.config import Settings
from kser.escaping import escape_lines
from kser.results import error_dict, failed_result, merge
from kser.schemas import Message

logger = escape_lines(logging.getLogger(__name__))

#: Value of ``_kser_init_failure`` in an object whose ``postinit`` raised no exception. After an exception,
#: ``_kser_init_failure`` is the value that ``execute`` returns.
NO_INIT_FAILURE: Final = object()


_NO_CONTEXT: Final = nullcontext()


class OperationsProtocol(Protocol):
    """Interface to the stored operations of a registry, limited to the methods that class Operation calls."""

    def send(self, operation: Any, result: Result | None, topic: str | None, key: str | bytes | None) -> None:
        """Save an operation and send it."""

    def launch(self, operation: Any) -> Result:
        """Save an operation that runs over the consumers, and send its first task."""
        ...

    def get(self, uuid: str) -> Any:
        """Return a stored operation, or None if no operation has this uuid."""
        ...

    def resume(self, uuid: str) -> None:
        """Resume a FAILED or CANCELLED operation."""

    def cancel(self, uuid: str, reason: str | None) -> str:
        """Cancel an operation and return its status."""
        ...

    def wait(self, uuid: str, timeout: float | None) -> Result:
        """Wait for the end of an operation and return its result."""
        ...


class RegistryProtocol(Protocol):
    """Interface of ``OperationRegistry``, limited to the members that entrypoints and other objects of kser use.

    The module of ``OperationRegistry`` imports this module, so this module cannot import the class and uses this
    protocol as the type of a registry.
    """

    controller: Any
    runner: Any

    @property
    def producer(self) -> Any:
        """The producer of tasks and operations."""
        ...

    def _kser_prepared_producer(self) -> Any:
        """Return the producer, which may have no connection yet; None as long as it is made."""
        ...

    @property
    def settings(self) -> Settings:
        """The settings of the app and the environment."""
        ...

    def topic_for(self, task: Any, topic: str | None = None) -> str:
        """Return the topic that a task is sent to."""
        ...

    def _kser_app_context(self) -> AbstractContextManager[Any]:
        """Return the context manager for one execution: the app context, or a null context if there is no app."""
        ...

    @property
    def _kser_has_store(self) -> bool:
        """True if the registry has a store for operations."""
        ...

    @property
    def _kser_operations(self) -> OperationsProtocol:
        """The object that saves, loads, resumes and cancels stored operations."""
        ...

    def _kser_stores(self, uuid: str) -> bool:
        """Return whether the database of the registry contains the operation with this uuid."""
        ...

    def _kser_handle_message(self, kmsg: Message, entrypoint: type[Entrypoint] | None) -> Any:
        """Handle a message that requests a new stored operation, or a step of a stored operation.

        :param entrypoint: the class that the message names; None if the class is not registered here.
        :return: a Result or a :class:`kser.attempt.Deferred`.
        """
        ...


class EntrypointMeta(type):
    """Metaclass that gives each class an attribute ``path``."""

    @property
    def path(cls) -> str:
        """Name of the class in messages: ``module.ClassName``."""
        return f"{cls.__module__}.{cls.__name__}"


class _InstancePath:
    """Descriptor of the attribute ``path`` of an instance.

    This class is a non-data descriptor, so an attribute ``path`` that the user sets on the instance takes precedence
    (decision C18).
    """

    def __get__(self, instance: Any, owner: EntrypointMeta) -> str:
        return owner.path


class Entrypoint(metaclass=EntrypointMeta):
    """One unit of work. Subclass it and implement :meth:`run`.

    Each phase of the life cycle has two methods. The method without an underscore is a hook, which you can override
    freely. The method with an underscore is the trigger of the phase, which logs the phase and calls the hook.

    :param uuid: identifier; by default, a new uuid.
    :param params: parameters of the work.
    :param result: the forwarded result of the previous task.
    :param metadata: data of the user, which kser stores in the message unchanged.
    """

    #: Names of the parameters that must be present.
    REQUIRED_FIELDS: ClassVar[Any] = []

    path: ClassVar[Any] = _InstancePath()

    _kser_registry: ClassVar[RegistryProtocol | None] = None
    #: All registries that the class is subscribed to. The first one is ``_kser_registry``.
    _kser_registries: ClassVar[tuple[RegistryProtocol, ...]] = ()
    #: True if a message of this class requests a new stored operation, provided that the registry has a store.
    _kser_is_durable: ClassVar[bool] = False
    _kser_init_failure: Any = NO_INIT_FAILURE

    def __init__(
        self,
        uuid: str | None = None,
        params: Mapping[str, Any] | None = None,
        result: Result | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        #: Identifier, which is the same in the message, the log lines and the result.
        self.uuid: str = uuid or str(uuid4())
        #: Parameters of the work.
        self.params: Any = params or {}
        #: Data of the user, which kser stores in the message unchanged.
        self.metadata: Any = metadata or {}
        #: The forwarded result of the previous task, into which kser merges the result of this work.
        self.result: Result = result or Result(uuid=self.uuid)
        self._post_init()

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def postinit(self) -> None:
        """Prepare the new object. The constructor calls this hook at its end.

        If this hook raises an exception, the constructor does not raise it, but calls :meth:`onerror` with a failed
        result. :meth:`execute` then does not call :meth:`run`, and returns the return value of :meth:`onerror`. If a
        retry follows, the constructor does not call :meth:`onerror`, and :meth:`execute` returns the failed result.
        """

    def prerun(self) -> None:
        """Prepare the run. This hook is called before :meth:`run`, after the check of the required parameters."""

    def run(self) -> Result | None:
        """Do the work. Subclasses implement this method.

        :return: a Result, which is merged into :attr:`result`; None counts as a blank Result.
        :raises cdumay_error.types.NotImplemented: the method is not overridden.
        """
        raise NotImplementedYet(f"Task '{type(self).path}' not implemented")

    def postrun(self, result: Any) -> Any:
        """Return the value to use in place of the return value of :meth:`run`.

        This hook is not called if :meth:`run` raised an exception.
        """
        return result

    def onsuccess(self, result: Result) -> Any:
        """Return the value that :meth:`execute` returns after a success.

        :param result: the final result, whose return code is 0.
        """
        return result

    def onerror(self, result: Result) -> Any:
        """Return the value that :meth:`execute` returns after a failure.

        :param result: the final result.

        If this hook raises an exception, kser logs the exception, merges it into the result, and calls no further hook.
        """
        return result

    # -- triggers ------------------------------------------------------------------------------------------------------

    def _post_init(self) -> None:
        if (attempt := current_attempt.get()) is not None:
            attempt.on_constructed(self)
        try:
            self.postinit()
        except Exception as exc:
            failed = failed_result(exc, self.uuid)
            retry_result = schedule_retry(self, failed, exc)
            self._kser_init_failure = self._onerror(failed) if retry_result is None else retry_result

    def _prerun(self) -> None:
        log_lines.log_step(logger, self, "PreRun")
        self.check_required_params()
        self.prerun()

    def _run(self) -> Any:
        log_lines.log_step(logger, self, "Run")
        return self.run()

    def _postrun(self, result: Any) -> Any:
        log_lines.log_step(logger, self, "PostRun")
        return self.postrun(result)

    def _onsuccess(self, result: Any) -> Any:
        self.result = merge(self.result, result)
        log_lines.log_success(logger, self, self.result)
        signals.emit(signals.entry_succeeded, type(self), entry=self, result=self.result)
        return self.onsuccess(self.result)

    def _onerror(self, result: Any) -> Any:
        self.result = merge(self.result, result)
        log_lines.log_failure(logger, self)
        return notify_failure(self)

    # -- execution -----------------------------------------------------------------------------------------------------

    def unsafe_execute(self, result: Result | None = None) -> Any:
        """Execute the entrypoint. Exceptions of the hooks and of :meth:`run` reach the caller.

        :param result: a result to merge into :attr:`result` first.
        :return: the return value of :meth:`onsuccess`; if :meth:`run` returned a failed Result, the return value of
            :meth:`onerror`.
        """
        if self._kser_init_failure is not NO_INIT_FAILURE:
            return self._kser_init_failure
        if result is not None:
            self.result = merge(self.result, result)
        signals.emit(signals.entry_started, type(self), entry=self)
        self._prerun()
        value = self._run()
        raise_if_decided(self)
        value = self._postrun(value)
        if status.final_status(self.result, value) == status.SUCCESS:
            return self._onsuccess(value)
        if (retry_result := schedule_retry(self, value)) is not None:
            return retry_result
        return self._onerror(value)

    def execute(self, result: Result | None = None) -> Any:
        """Execute the entrypoint. An exception becomes a failed result, except SystemExit and KeyboardInterrupt.

        :param result: a result to merge into :attr:`result` first.
        :return: the return value of :meth:`onsuccess` or :meth:`onerror`; by default, the result.
        """
        registry = self._kser_registry
        with _NO_CONTEXT if registry is None else registry._kser_app_context():
            try:
                if (attempt := current_attempt.get()) is not None:
                    attempt.on_started(self)
                return self.unsafe_execute(result=result)
            except Exception as exc:
                failed = failed_result(exc, self.uuid)
                if (retry_result := schedule_retry(self, failed, exc)) is not None:
                    return retry_result
                return self._onerror(failed)

    def check_required_params(self) -> None:
        """Check that every parameter of :attr:`REQUIRED_FIELDS` is present.

        :raises cdumay_error.types.ValidationError: a parameter is missing; the error names the first missing parameter.
        """
        for key in self.REQUIRED_FIELDS:
            if key not in self.params:
                raise ValidationError(f"Missing parameter: {key}")

    # -- messages and logs ---------------------------------------------------------------------------------------------

    def to_Message(self, result: Result | None = None) -> Message:
        """Return the message that requests this work.

        The message shares the params, result and metadata of this object.

        :param result: a result to forward in place of :attr:`result`.
        """
        return Message(
            uuid=self.uuid,
            entrypoint=type(self).path,
            params=self.params,
            result=result or self.result,
            metadata=self.metadata,
        )

    @classmethod
    def from_Message(cls, kmsg: Message) -> Self:
        """Create an object from a message. The object shares the params, result and metadata of the message."""
        return cls(uuid=kmsg.uuid, params=kmsg.params, result=kmsg.result, metadata=kmsg.metadata)

    def label(self, action: str | None = None) -> str:
        """Return ``Name[uuid]``, followed by ``- action`` if an action is given."""
        label = f"{type(self).__name__}[{self.uuid}]"
        return f"{label} - {action}" if action else label

    def log(self, message: str, level: int = logging.INFO, *args: Any, **kwargs: Any) -> None:
        """Log ``message``, formatted with ``args``, after a prefix with the class name, path and uuid of this object.

        :param level: level of the log record.
        :param kwargs: keywords of :meth:`logging.Logger.log`: ``extra``, ``exc_info``, ``stack_info``, ``stacklevel``.
        """
        log_lines.log_message(logger, self, "MESSAGE", message, level, *args, **kwargs)


def execute_message(entrypoint: type[Entrypoint], kmsg: Message) -> Any:
    """Create an object of a class from a message, and return the result of its execution."""
    return entrypoint.from_Message(kmsg).execute()


def schedule_retry(entry: Entrypoint, result: Any, exc: Exception | None = None) -> Any:
    """Schedule a retry of ``entry`` if its retry policy allows another attempt. No hook is called before a retry.

    :param result: the failed result.
    :param exc: the exception of the attempt; None for a returned failure.
    :return: the result to return for this attempt if a retry follows; None if no retry follows.
    :raises kser.attempt.AttemptAbandoned: the consumer has abandoned the attempt, for example because of its time
        limit, and drops the result.
    """
    attempt = current_attempt.get()
    if attempt is None:
        return None
    attempt.on_finished(entry)
    if entry is not attempt.entry:
        return None
    text = (result if result and result.stderr else entry.result).stderr
    name = error_name(exc) if exc is not None else _error_name(result or entry.result)
    if not attempt.should_retry(exc, Failure(FAILED, name, text)):
        return None
    retry_result = entry.result = merge(entry.result, result) if result is not entry.result else entry.result
    log_lines.log_retry(logger, entry, attempt.number, attempt.retry_in or 0)
    signals.emit(signals.entry_retried, type(entry), entry=entry, result=retry_result, attempt=attempt.number)
    return retry_result


def _error_name(result: Result) -> str:
    error = error_dict(result)
    return str(error.get("name", "")) if isinstance(error, Mapping) else ""


def notify_failure(entry: Entrypoint) -> Any:
    """Emit ``entry_failed`` and call ``onerror``.

    If ``onerror`` raises an exception, merge the exception into the result (decision C6).
    """
    signals.emit(signals.entry_failed, type(entry), entry=entry, result=entry.result)
    try:
        return entry.onerror(entry.result)
    except Exception as exc:
        logger.exception(f"{log_lines.log_prefix(entry, 'Failed')}: onerror raised: {exc}")
        return merge(entry.result, failed_result(exc, entry.uuid))


def check_entrypoint(name: Any, candidate: Any) -> None:
    """Check that ``candidate`` is a subclass of Entrypoint.

    :param name: name to register the class under.
    :raises cdumay_error.types.ValidationError: ``candidate`` is not a subclass of Entrypoint.
    """
    if not (isinstance(candidate, type) and issubclass(candidate, Entrypoint)):
        raise ValidationError(
            f"Invalid type for entry '{name}', MUST implement kser.entry.Entrypoint", extra={"entrypoint": name}
        )
