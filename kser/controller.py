"""Controller and BaseProducer: the class that decodes and runs messages, and the interface of all producers.

This module has the same interface as ``kser.controller`` in kser 0.8.27.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar
from uuid import uuid4

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import signals, status
from kser.attempt import (
    FAILED,
    OVER_LIMIT,
    UNDECODABLE,
    UNKNOWN_ENTRYPOINT,
    Deferred,
    Failure,
    current_attempt,
    error_name,
    safe_text,
    user_code_guard,
)
from kser.entry import Entrypoint, RegistryProtocol, check_entrypoint, execute_message, schedule_retry
from kser.errors import LimitExceeded, StoreMissing, UuidTooLong
from kser.escaping import escape_lines
from kser.lockfiles import running_file
from kser.results import failed_result, merge
from kser.schemas import OPERATION_KEY, Message, dump_result

logger = escape_lines(logging.getLogger(__name__))

#: Headers of a Kafka record: a mapping from names to bytes, or a sequence of pairs of a name and bytes.
Headers = Mapping[str, bytes] | Sequence[tuple[str, bytes | None]]

#: Maximum number of unknown entrypoint names that a controller remembers, so that it logs each name only once. Without
#: a limit, messages with random names could fill the memory.
MAX_UNKNOWN_NAMES = 1000


class BaseController:
    """Hooks for the messages that a controller runs or that a producer sends.

    The hooks are classmethods; override them as classmethods.
    """

    @classmethod
    def _onmessage(cls, kmsg: Message) -> Any:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                f"{cls.__name__}.ReceivedMessage {kmsg.entrypoint}[{kmsg.uuid}]",
                extra={"kmsg": kmsg.dump()},
            )
        return cls.onmessage(kmsg)

    @classmethod
    def onmessage(cls, kmsg: Message) -> Any:
        """Return the message to use in place of ``kmsg``; by default, ``kmsg``.

        A controller calls this hook before it runs a message. A producer calls this hook before it sends a message.
        """
        return kmsg

    @classmethod
    def _onsuccess(cls, kmsg: Message, result: Any) -> Any:
        if logger.isEnabledFor(logging.INFO):
            logger.info(_line(cls, "Success", kmsg, result), extra=_extra(kmsg, result))
        return cls.onsuccess(kmsg, result)

    @classmethod
    def onsuccess(cls, kmsg: Message, result: Any) -> Any:
        """Return the final result of a successful message; by default, ``result``."""
        return result

    @classmethod
    def _onerror(cls, kmsg: Message, result: Any) -> Any:
        if logger.isEnabledFor(logging.ERROR):
            logger.error(_line(cls, "Failed", kmsg, result), extra=_extra(kmsg, result))
        return cls.onerror(kmsg, result)

    @classmethod
    def onerror(cls, kmsg: Message, result: Any) -> Any:
        """Return the final result of a failed message; by default, ``result``."""
        return result

    @classmethod
    def _kser_call_hook(cls, kmsg: Message, result: Any) -> Any:
        """Log the outcome of a message and call ``onsuccess`` or ``onerror``.

        An exception of the hook makes the message fail (C13 in docs/differences.rst). If a hook of the entrypoint
        returned nothing, ``result`` is None, which counts as a failure, as in kser 0.8.
        """
        try:
            with user_code_guard:
                if result and status.final_status(result) == status.SUCCESS:
                    cls._kser_clear_failure()
                    return cls._onsuccess(kmsg=kmsg, result=result)
                return cls._onerror(kmsg=kmsg, result=result)
        except Exception as exc:
            return cls._kser_hook_failed(kmsg, result, exc)

    @classmethod
    def _kser_clear_failure(cls) -> None:
        """Do nothing by default. :class:`Controller` overrides this method.

        The override clears the failure of the current attempt. The default is for producers, which call this method
        after they have sent a message. The success of a send must not change the outcome of the message that the
        consumer runs.
        """

    @classmethod
    def _kser_hook_failed(cls, kmsg: Message, result: Any, exc: Exception) -> Result:
        logger.exception(f"{cls.__name__}.Failed: {kmsg.entrypoint}[{kmsg.uuid}]: a hook raised: {exc}")
        failed = failed_result(exc, kmsg.uuid)
        try:
            return merge(result, failed)
        except Exception:
            # The merge fails if ``result`` is not a Result, or if it contains invalid values.
            return failed


_connects_later: ContextVar[bool] = ContextVar("kser_connects_later", default=False)


@contextmanager
def connecting_later() -> Iterator[None]:
    """Return a context manager inside which a new producer does not connect, but at its first send.

    The producer can encode messages before it has a connection.
    """
    token = _connects_later.set(True)
    try:
        yield
    finally:
        _connects_later.reset(token)


def connect_if_due(producer: BaseProducer) -> None:
    """Connect a new producer, unless it was made inside :func:`connecting_later`."""
    if not _connects_later.get():
        producer._kser_ensure_connected()


class BaseProducer(BaseController):
    """Interface of all producers."""

    def _send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
        """Send one message. Transports, and third parties that wrap a transport, implement this method."""

    def send(
        self,
        topic: str,
        kmsg: Message,
        timeout: float = 60,
        *,
        key: str | bytes | None = None,
        headers: Headers | None = None,
    ) -> Any:
        """Send one message and wait until it is delivered.

        :param topic: the topic to send to.
        :param kmsg: the message.
        :param timeout: seconds for the whole call.
        :param key: messages with the same key go to the same partition and are handled one after the other; messages
            without a key are spread over the partitions.
        :param headers: headers of the record: pairs of a name and bytes, or a mapping.
        :return: a Result, which is a failed Result if the message was not sent or its delivery was not confirmed. A
            message without confirmation may still be delivered later.
        """
        # Pass only the options that were given, because third parties implement ``_send`` with the signature of kser
        # 0.8, which has neither ``key`` nor ``headers``.
        options = {"key": key, "headers": headers}
        return self._send(topic, kmsg, timeout, **{name: value for name, value in options.items() if value is not None})

    def produce(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes | None]] = (),
        timeout: float = 60,
    ) -> None:
        """Write a raw record, without hooks and log lines, and wait until it is delivered.

        :param value: the value of the record.
        :param timeout: seconds for the whole call.
        :raises kser.errors.MessageTooLarge: the record exceeds the size limit of the client or of the broker.
        :raises kser.errors.RecordRejected: the client or the broker rejects the record, for example because the name of
            the topic is illegal, and would reject it again.
        :raises kser.errors.DeliveryError: delivery was not confirmed; the record may still be delivered later.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot write raw records: it does not implement produce()")

    def close(self) -> None:
        """Close the connection, after a short wait for the delivery of messages that are not confirmed yet."""

    def _kser_ensure_connected(self) -> None:
        """Create the Kafka client if there is none, so that its errors are raised here."""

    def _kser_after_send(self, topic: str, kmsg: Message, result: Result) -> Any:
        """Log the outcome of a send, call ``onsuccess`` or ``onerror``, and emit ``message_sent`` after a success.

        :return: the return value of the hook.
        """
        # Read the status before the hook runs, because a hook that raises makes the result a failure although the
        # message was sent.
        delivered = status.final_status(result) == status.SUCCESS
        returned = self._kser_call_hook(kmsg, result)
        if delivered:
            signals.emit(signals.message_sent, type(self), topic=topic, kmsg=kmsg, result=result)
        return returned


class Controller(BaseController):
    """Dispatcher that looks up the entrypoint of each message by name and executes it.

    All methods are classmethods. You can also call them on an instance.
    """

    #: Entrypoint classes, keyed by path. All controllers share this dict, unless a subclass defines its own dict.
    ENTRYPOINTS: ClassVar[dict[Any, type[Entrypoint]]] = {}
    #: Class that decodes messages: any class with a method ``loads``. The name is from kser 0.8, and does not refer to
    #: a broker.
    TRANSPORT: ClassVar[Any] = Message

    #: The hashes of the unknown entrypoint names. A name may be long, so the controller does not keep it.
    _kser_unknown_names: ClassVar[set[int]] = set()

    @classmethod
    def register(cls, name: Any, entrypoint: type[Entrypoint]) -> None:
        """Register ``entrypoint`` under ``name``; replace the class that was registered under this name before.

        :raises cdumay_error.types.ValidationError: ``entrypoint`` is not a subclass of Entrypoint.
        """
        check_entrypoint(name, entrypoint)
        cls.ENTRYPOINTS[name] = entrypoint
        logger.debug(f"{cls.__name__}.Registered: {name}")

    @classmethod
    def run(cls, raw_data: Any) -> Any:
        """Handle one raw message and return its result.

        SystemExit in a task counts as a failure of that task (C8 in docs/differences.rst). This method raises only
        KeyboardInterrupt and, in a consumer, :exc:`kser.attempt.AttemptAbandoned`.

        :param raw_data: the message: JSON, as text or bytes, which :attr:`TRANSPORT` decodes.
        :return: the return value of ``onsuccess`` or ``onerror``; by default, the Result.
        """
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(f"{cls.__name__}.ReceivedFromKafka: {raw_data}")
        try:
            received = cls.TRANSPORT.loads(raw_data)
            if not _is_message(received):
                raise TypeError(f"{cls.TRANSPORT!r} decoded {received!r}, which is not a message")
        except Exception as exc:
            return cls._kser_handle_undecodable(raw_data, exc)
        try:
            with user_code_guard:
                kmsg = cls._onmessage(received)
        except Exception as exc:
            return cls._kser_fail_before_run(received, ValidationError(f"onmessage failed: {exc}"))
        if kmsg is not received and not _is_message(kmsg):
            return cls._kser_fail_before_run(received, ValidationError(f"onmessage returned {kmsg!r}"))
        result = cls._kser_process(kmsg)
        if type(result) is Deferred:
            return result.result
        attempt = current_attempt.get()
        if attempt is None:
            return cls._kser_call_hook(kmsg, result)
        attempt.on_finished(attempt.entry)
        # Call no hook before a retry, because the outcome of the message is known only after the last attempt.
        return result if attempt.retry_in is not None else cls._kser_call_hook(kmsg, result)

    @classmethod
    def _kser_clear_failure(cls) -> None:
        if (attempt := current_attempt.get()) is not None:
            # A hook of the entrypoint has turned a failure into a success. If the failure stayed recorded, the consumer
            # would still treat the message as failed.
            attempt.failure = None

    @classmethod
    def start_processing(cls, kmsg: Message) -> None:
        """Show the message in the running file."""
        running_file.show(f"{kmsg.entrypoint}[{kmsg.uuid}]")

    @classmethod
    def stop_processing(cls) -> None:
        """Remove the message from the running file."""
        running_file.clear()

    @classmethod
    def _kser_fail_before_run(cls, kmsg: Message, exc: ValidationError) -> Any:
        _reject_attempt(FAILED, exc)
        return cls._kser_call_hook(kmsg, failed_result(exc, kmsg.uuid))

    @classmethod
    def _kser_process(cls, kmsg: Message) -> Any:
        """Execute a message, report its failure to the current attempt, and return its result."""
        try:
            with user_code_guard:
                try:
                    cls.start_processing(kmsg)
                    result = cls._kser_execute(kmsg)
                finally:
                    cls.stop_processing()
            # ``final_status`` needs a Result. For a value of another type, it raises an error whose text contains the
            # type.
            if not result or type(result) is Deferred or status.final_status(result) == status.SUCCESS:
                return result
        except Exception as exc:
            return cls._kser_report_failure(kmsg, failed_result(exc, kmsg.uuid), exc)
        return cls._kser_report_failure(kmsg, result)

    @classmethod
    def _kser_report_failure(cls, kmsg: Message, result: Any, exc: Exception | None = None) -> Any:
        """Report a failure to the current attempt, if there is one.

        Do nothing if the entrypoint has already reported the failure, or if the record is acked.
        """
        attempt = current_attempt.get()
        if attempt is None or attempt.failure is not None or attempt.retry_in is not None or attempt.acked:
            return result
        if attempt.entry is not None:
            schedule_retry(attempt.entry, result, exc)
        elif attempt.should_retry(exc, Failure(FAILED, error_name(exc) if exc else "", safe_text(exc or result))):
            logger.warning(_line(cls, "Retry", kmsg, result), extra=_extra(kmsg, result))
        return result

    @classmethod
    def _kser_execute(cls, kmsg: Message) -> Any:
        entrypoint = cls.ENTRYPOINTS.get(kmsg.entrypoint)
        metadata = getattr(kmsg, "metadata", None)
        if metadata and OPERATION_KEY in metadata and isinstance(metadata, Mapping):
            _check_operation_key(metadata[OPERATION_KEY])
            return cls._kser_registry_of_step(kmsg, entrypoint)._kser_handle_message(kmsg, entrypoint)
        if entrypoint is None:
            cls._kser_report_unknown(kmsg.entrypoint)
            unknown = ValidationError(
                f"Entrypoint '{kmsg.entrypoint}' not registred",
                extra={"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint, "allowed": list(cls.ENTRYPOINTS)},
            )
            _reject_attempt(UNKNOWN_ENTRYPOINT, unknown)
            raise unknown
        if (attempt := current_attempt.get()) is not None:
            attempt.entrypoint_class = entrypoint
        registry = entrypoint._kser_registry
        if entrypoint._kser_is_durable and registry is not None and registry._kser_has_store:
            return _registry_that_stores(kmsg.uuid, _with_store([entrypoint]))._kser_handle_message(kmsg, entrypoint)
        return execute_message(entrypoint, kmsg)

    @classmethod
    def _kser_registry_of_step(cls, kmsg: Message, entrypoint: type[Entrypoint] | None) -> RegistryProtocol:
        """Return the registry whose store contains the operation of a step.

        :raises kser.errors.StoreMissing: no registry of this process has a store.
        """
        attempt = current_attempt.get()
        takeover = None if attempt is None else attempt.takeover
        if takeover is not None and takeover.registry is not None:
            found: RegistryProtocol = takeover.registry
            return found
        registries = _with_store([*([entrypoint] if entrypoint else ()), *cls.ENTRYPOINTS.values()])
        if registries:
            return _registry_that_stores(kmsg.metadata[OPERATION_KEY], registries)
        missing = StoreMissing(
            f"the message is a step of the stored operation {kmsg.metadata[OPERATION_KEY]}, and this consumer has no"
            " shared database: set KSER_DATABASE_URI to the database of the other consumers of its topic"
        )
        _reject_attempt(FAILED, missing)
        raise missing

    @classmethod
    def _kser_report_unknown(cls, name: str) -> None:
        if hash(name) not in cls._kser_unknown_names and len(cls._kser_unknown_names) < MAX_UNKNOWN_NAMES:
            cls._kser_unknown_names.add(hash(name))
            logger.warning(
                f"unknown entrypoint {name!r}: import the module that defines the class and decorate it with"
                " @oregistry.subscribe (the path of a class in the script that was started is '__main__.ClassName')"
            )

    @classmethod
    def _kser_handle_undecodable(cls, raw_data: Any, exc: Exception) -> Any:
        """Log input that is not a message, and return a failed result.

        Call this method inside the ``except`` block of ``exc``, because the error that it builds contains the traceback
        of the exception that is being handled.
        """
        error = exc if isinstance(exc, LimitExceeded) else _load_error(exc)
        kmsg = _partial_message(raw_data, exc)
        result = Result(uuid=kmsg.uuid, retcode=error.code, stderr=error.message, retval={"error": error.to_dict()})
        logger.error(
            f"{cls.__name__}.ImportError: Failed to load data from kafka: {exc}",
            extra={"kafka_raw_data": raw_data, "error": error.to_dict()},
        )
        _reject_attempt(OVER_LIMIT if error is exc else UNDECODABLE, exc)
        signals.emit(signals.message_refused, cls, raw_data=raw_data, error=exc, result=result)
        try:
            with user_code_guard:
                return cls.onerror(kmsg, result)
        except Exception as hook_exc:
            return cls._kser_hook_failed(kmsg, result, hook_exc)


def _with_store(classes: Iterable[type[Entrypoint]]) -> list[RegistryProtocol]:
    """Return the registries of classes that have a store, without duplicates, in the order of the classes."""
    registries = (
        registry for subscribed in classes for registry in (subscribed._kser_registry, *subscribed._kser_registries)
    )
    return [found for found in dict.fromkeys(registries) if found is not None and found._kser_has_store]


def _registry_that_stores(uuid: str, registries: Sequence[RegistryProtocol]) -> RegistryProtocol:
    """Return the registry whose store contains an operation; if there is none, the first registry."""
    if len(registries) == 1 or not uuid:
        return registries[0]
    return next((registry for registry in registries if registry._kser_stores(uuid)), registries[0])


def _reject_attempt(reason: str, exc: Exception) -> None:
    """Record the failure of the current attempt as permanent, because a retry would fail as well.

    Outside of an attempt, do nothing.
    """
    if (attempt := current_attempt.get()) is not None:
        attempt.reject(reason, exc)


def _check_operation_key(value: Any) -> None:
    """Check the value of the metadata key of a step, because a step must never run outside of its operation.

    :raises cdumay_error.types.ValidationError: the value is not the uuid of an operation.
    """
    if not isinstance(value, str) or not value:
        invalid = ValidationError(
            f"the metadata key {OPERATION_KEY!r} must be the uuid of a stored operation, and it is"
            f" {'an empty text' if value == '' else f'a {type(value).__name__}'}: kser alone sets this key; remove it"
            " from the message"
        )
        _reject_attempt(UNDECODABLE, invalid)
        raise invalid


def _line(owner: type, tag: str, kmsg: Message, result: Any) -> str:
    return f"{owner.__name__}.{tag}: {kmsg.entrypoint}[{kmsg.uuid}]: {result}"


def _extra(kmsg: Message, result: Any) -> dict[str, Any]:
    return {"kmsg": kmsg.dump(), "kresult": dump_result(result)}


def _is_message(value: Any) -> bool:
    """Return whether ``value`` has the attributes of a message.

    This function does not check the class, because third parties have message classes of their own.
    """
    return hasattr(value, "uuid") and hasattr(value, "entrypoint")


def _load_error(exc: Exception) -> ValidationError:
    """Return the error for input that is not a message, from the exception of the transport."""
    reasons = exc.extra if isinstance(exc, ValidationError) else {"_schema": [str(exc)]}
    # If :attr:`TRANSPORT` raised an error that has a stack, use that stack. Otherwise, pass None as the stack:
    # ValidationError then uses the traceback of the exception that is being handled.
    return ValidationError("Failed to load message", extra=reasons, stack=getattr(exc, "stack", None))


def _partial_message(raw_data: Any, exc: Exception) -> Message:
    """Build a message for the hooks from undecodable input; read uuid and entrypoint from the input if possible.

    Do not decode input that exceeds a limit, because this could take much time and memory.
    """
    if isinstance(exc, LimitExceeded):
        uuid, entrypoint = ("", "") if exc.received is None or isinstance(exc, UuidTooLong) else exc.received
    else:
        uuid, entrypoint = _received(raw_data)
    return Message(
        uuid=uuid if uuid and isinstance(uuid, str) else str(uuid4()),
        entrypoint=entrypoint if isinstance(entrypoint, str) else "",
    )


def _received(raw_data: Any) -> tuple[Any, Any]:
    """Return uuid and entrypoint of undecodable input as far as they can be read."""
    try:
        data = json.loads(raw_data)
    except Exception:
        return None, None
    return (data.get("uuid"), data.get("entrypoint")) if isinstance(data, dict) else (None, None)
