"""Raw bytes -> entrypoint -> result. Drop-in for ``kser.controller`` of 0.8.27."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from uuid import uuid4

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import signals, status
from kser.delivery import CURRENT, FAILED, UNDECODABLE, UNKNOWN, Abandoned, Failure, Unfinished, error_name
from kser.entry import Entrypoint, Surroundings, check_entrypoint, postpone
from kser.errors import StoreMissing
from kser.lockfiles import running_file
from kser.results import failure, merge
from kser.schemas import OPERATION, Message, dump_result

logger = logging.getLogger(__name__)

#: What travels beside a message: names and bytes.
Headers = Mapping[str, bytes] | Sequence[tuple[str, bytes | None]]

#: Unknown names that are reported: whoever sends random ones must not fill the memory.
MAX_REPORTED = 1000


_NOT_CONTAINED = (Exception, KeyboardInterrupt, Abandoned)


class _Contained:
    """Around code of users: SystemExit, asyncio's CancelledError and their like come out as an Exception.

    One message must not end the consumer, and then again at each restart. KeyboardInterrupt and what the consumer
    raises itself are not the code's doing.
    """

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        if exc is not None and not isinstance(exc, _NOT_CONTAINED):
            raise RuntimeError(f"{exc!r} ended the task") from exc


CONTAINED = _Contained()


class BaseController:
    """Hooks around messages, shared by controllers and producers. They are classmethods: override them as such."""

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
        """Called with each message before it is handled; returns the message to handle in its place."""
        return kmsg

    @classmethod
    def _onsuccess(cls, kmsg: Message, result: Any) -> Any:
        if logger.isEnabledFor(logging.INFO):
            logger.info(_line(cls, "Success", kmsg, result), extra=_extra(kmsg, result))
        return cls.onsuccess(kmsg, result)

    @classmethod
    def onsuccess(cls, kmsg: Message, result: Any) -> Any:
        """Called with the message and its successful result; what it returns is the result."""
        return result

    @classmethod
    def _onerror(cls, kmsg: Message, result: Any) -> Any:
        if logger.isEnabledFor(logging.ERROR):
            logger.error(_line(cls, "Failed", kmsg, result), extra=_extra(kmsg, result))
        return cls.onerror(kmsg, result)

    @classmethod
    def onerror(cls, kmsg: Message, result: Any) -> Any:
        """Called with the message and its failed result; what it returns is the result."""
        return result

    @classmethod
    def _finish(cls, kmsg: Message, result: Any) -> Any:
        """Log and call the hook for what came of a message; no exception of a hook gets out (decision C13).

        What is falsy and no Result (an entrypoint's hook returned nothing) is a failure, as in 0.8.
        """
        try:
            with CONTAINED:
                if result and status.outcome(result) == status.SUCCESS:
                    cls._note_success()
                    return cls._onsuccess(kmsg=kmsg, result=result)
                return cls._onerror(kmsg=kmsg, result=result)
        except Exception as exc:
            return cls._hook_failed(kmsg, result, exc)

    @classmethod
    def _note_success(cls) -> None:
        """Nothing: what a producer sends while a message is handled is not what comes of that one."""

    @classmethod
    def _hook_failed(cls, kmsg: Message, result: Any, exc: Exception) -> Result:
        logger.exception(f"{cls.__name__}.Failed: {kmsg.entrypoint}[{kmsg.uuid}]: a hook raised: {exc}")
        failed = failure(exc, kmsg.uuid)
        try:
            return merge(result, failed)
        except Exception:
            # What cannot be merged is no Result, or one that holds what it must not.
            return failed


class BaseProducer(BaseController):
    """What every producer offers."""

    def _send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
        """Send one message; transports (and third parties around them) implement it."""

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

        :param topic: where to.
        :param kmsg: the message.
        :param timeout: seconds for everything together.
        :param key: messages with the same key go to the same partition, and are handled one after the other; without
            one they are spread.
        :param headers: pairs of a name and bytes, carried beside the message; a mapping will do.
        :return: a Result, failed when delivery was not confirmed; the message may then still arrive.
        """
        # Third parties implement `_send` as 0.8 called it.
        given = {"key": key, "headers": headers}
        return self._send(topic, kmsg, timeout, **{name: value for name, value in given.items() if value is not None})

    def produce(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes | None]] = (),
        timeout: float = 60,
    ) -> None:
        """Write a record as it is, without hooks and log lines, and wait until it is delivered.

        :param value: its bytes.
        :param timeout: seconds for everything together.
        :raises kser.errors.MessageTooLarge: it exceeds what the client may send.
        :raises kser.errors.NotDelivered: delivery was not confirmed; the record may still arrive.
        """
        raise NotImplementedError(f"{type(self).__name__} writes no bare records")

    def close(self) -> None:
        """Let go of the connection; what is still on its way is given a moment."""

    def _sent(self, topic: str, kmsg: Message, result: Result) -> Any:
        """Finish a message: log, hook and signal. What the hook returns is the result."""
        # A raising hook makes the result a failure, but the message is on its way all the same.
        delivered = status.outcome(result) == status.SUCCESS
        answer = self._finish(kmsg, result)
        if delivered:
            signals.emit(signals.message_sent, type(self), topic=topic, kmsg=kmsg, result=result)
        return answer


class Controller(BaseController):
    """Looks the entrypoint of each message up by its name and executes it.

    Everything is a classmethod, usable through an instance as well.
    """

    #: Classes by path. Shared by all controllers, unless a subclass defines its own.
    ENTRYPOINTS: ClassVar[dict[Any, type[Entrypoint]]] = {}
    #: What reads a message: any class that has ``loads``.
    TRANSPORT: ClassVar[Any] = Message

    _reported_unknown: ClassVar[set[str]] = set()

    @classmethod
    def register(cls, name: Any, entrypoint: type[Entrypoint]) -> None:
        """Make ``entrypoint`` answer to ``name``, in place of whatever did before.

        :raises cdumay_error.types.ValidationError: it is no subclass of Entrypoint.
        """
        check_entrypoint(name, entrypoint)
        cls.ENTRYPOINTS[name] = entrypoint
        logger.debug(f"{cls.__name__}.Registered: {name}")

    @classmethod
    def run(cls, raw_data: Any) -> Any:
        """Handle one message, from its raw form to its result.

        Nothing but KeyboardInterrupt is raised: SystemExit in a task is a failure of that task (decision C8).

        :param raw_data: what :attr:`TRANSPORT` reads: JSON, as text or bytes.
        :return: what the hook returned: the Result, unless hooks were overridden.
        """
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(f"{cls.__name__}.ReceivedFromKafka: {raw_data}")
        try:
            received = cls.TRANSPORT.loads(raw_data)
            if not _is_message(received):
                raise TypeError(f"{cls.TRANSPORT!r} read {received!r}, which is no message")
        except Exception as exc:
            return cls._refuse(raw_data, exc)
        try:
            with CONTAINED:
                kmsg = cls._onmessage(received)
        except Exception as exc:
            return cls._reject(received, ValidationError(f"onmessage failed: {exc}"))
        if not _is_message(kmsg):
            return cls._reject(received, ValidationError(f"onmessage returned {kmsg!r}"))
        result = cls._process(kmsg)
        if type(result) is Unfinished:
            return result.result
        delivery = CURRENT.get()
        if delivery is None:
            return cls._finish(kmsg, result)
        delivery.settle(delivery.entry)
        # What came of the message is only known after its last attempt.
        return result if delivery.retry_in is not None else cls._finish(kmsg, result)

    @classmethod
    def _note_success(cls) -> None:
        if (delivery := CURRENT.get()) is not None:
            # A hook of the entrypoint may have made a success of it.
            delivery.failure = None

    @classmethod
    def start_processing(cls, kmsg: Message) -> None:
        """Show the message in the running file."""
        running_file.show(f"{kmsg.entrypoint}[{kmsg.uuid}]")

    @classmethod
    def stop_processing(cls) -> None:
        """Empty the running file."""
        running_file.clear()

    @classmethod
    def _reject(cls, kmsg: Message, exc: ValidationError) -> Any:
        _note_refusal(FAILED, exc)
        return cls._finish(kmsg, failure(exc, kmsg.uuid))

    @classmethod
    def _process(cls, kmsg: Message) -> Any:
        try:
            with CONTAINED:
                try:
                    cls.start_processing(kmsg)
                    result = cls._execute(kmsg)
                finally:
                    cls.stop_processing()
            # Whoever comes after may rely on a Result; what is none fails here, with its type in the text.
            if not result or type(result) is Unfinished or status.outcome(result) == status.SUCCESS:
                return result
        except Exception as exc:
            return cls._judge(kmsg, failure(exc, kmsg.uuid), exc)
        return cls._judge(kmsg, result)

    @classmethod
    def _judge(cls, kmsg: Message, result: Any, exc: Exception | None = None) -> Any:
        """Tell the consumer, if one runs this, of a failure that the entrypoint itself did not tell it of."""
        delivery = CURRENT.get()
        if delivery is None or delivery.failure is not None or delivery.retry_in is not None or delivery.answered:
            return result
        if delivery.entry is not None:
            postpone(delivery.entry, result, exc)
        elif delivery.postpones(exc, Failure(FAILED, error_name(exc) if exc else "", str(exc or result))):
            logger.warning(_line(cls, "Retry", kmsg, result), extra=_extra(kmsg, result))
        return result

    @classmethod
    def _execute(cls, kmsg: Message) -> Any:
        entrypoint = cls.ENTRYPOINTS.get(kmsg.entrypoint)
        if OPERATION in (getattr(kmsg, "metadata", None) or ()):
            return cls._keeper_of(kmsg, entrypoint).receive(kmsg, entrypoint)
        if entrypoint is None:
            cls._report_unknown(kmsg.entrypoint)
            unknown = ValidationError(
                f"Entrypoint '{kmsg.entrypoint}' not registred",
                extra={"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint, "allowed": list(cls.ENTRYPOINTS)},
            )
            _note_refusal(UNKNOWN, unknown)
            raise unknown
        if (delivery := CURRENT.get()) is not None:
            delivery.expected = entrypoint
        registry = entrypoint._kser_registry
        if entrypoint._kser_kept and registry is not None and registry.keeps:
            return registry.receive(kmsg, entrypoint)
        return entrypoint.from_Message(kmsg).execute()

    @classmethod
    def _keeper_of(cls, kmsg: Message, entrypoint: type[Entrypoint] | None) -> Surroundings:
        """Who has the database that a message belongs to: it is a step of a stored operation.

        :raises kser.errors.StoreMissing: nobody here has one.
        """
        known = [entrypoint, *list(cls.ENTRYPOINTS.values())] if entrypoint else list(cls.ENTRYPOINTS.values())
        for each in known:
            if each._kser_registry is not None and each._kser_registry.keeps:
                return each._kser_registry
        missing = StoreMissing(
            f"the message is a step of the stored operation {kmsg.metadata[OPERATION]}, and this consumer has no shared"
            " database: set KSER_DATABASE_URI to the one of the other consumers of its topic"
        )
        _note_refusal(FAILED, missing)
        raise missing

    @classmethod
    def _report_unknown(cls, name: str) -> None:
        if name not in cls._reported_unknown and len(cls._reported_unknown) < MAX_REPORTED:
            cls._reported_unknown.add(name)
            logger.warning(
                f"messages ask for {name!r}, which this process does not know: import the module that defines the class"
                " and decorate it with @oregistry.subscribe"
                " (a class in the script that was started is called '__main__.ClassName')"
            )

    @classmethod
    def _refuse(cls, raw_data: Any, exc: Exception) -> Any:
        """Answer input that is no message. To be called while ``exc`` is being handled."""
        reasons = exc.extra if isinstance(exc, ValidationError) else {"_schema": [str(exc)]}
        # Where it was found wanting, if the transport said so; else where it was read.
        error = ValidationError("Failed to load message", extra=reasons, stack=getattr(exc, "stack", None))
        kmsg = _best_guess(raw_data)
        result = Result(uuid=kmsg.uuid, retcode=error.code, stderr=error.message, retval={"error": error.to_dict()})
        logger.error(
            f"{cls.__name__}.ImportError: Failed to load data from kafka: {exc}",
            extra={"kafka_raw_data": raw_data, "error": error.to_dict()},
        )
        _note_refusal(UNDECODABLE, exc)
        signals.emit(signals.message_refused, cls, raw_data=raw_data, error=exc, result=result)
        try:
            with CONTAINED:
                return cls.onerror(kmsg, result)
        except Exception as hook_exc:
            return cls._hook_failed(kmsg, result, hook_exc)


def _note_refusal(reason: str, exc: Exception) -> None:
    """Tell the consumer, if one runs this, that no other attempt will do better."""
    if (delivery := CURRENT.get()) is not None:
        delivery.refuse(reason, exc)


def _line(owner: type, tag: str, kmsg: Message, result: Any) -> str:
    return f"{owner.__name__}.{tag}: {kmsg.entrypoint}[{kmsg.uuid}]: {result}"


def _extra(kmsg: Message, result: Any) -> dict[str, Any]:
    return {"kmsg": kmsg.dump(), "kresult": dump_result(result)}


def _is_message(value: Any) -> bool:
    """Whether hooks and transports gave something that can be handled: third parties have classes of their own."""
    return hasattr(value, "uuid") and hasattr(value, "entrypoint")


def _best_guess(raw_data: Any) -> Message:
    """A message for hooks to look at, with as much identity as the refused input has."""
    try:
        data = json.loads(raw_data)
    except Exception:
        data = None
    if not isinstance(data, dict):
        data = {}
    uuid, entrypoint = data.get("uuid"), data.get("entrypoint")
    return Message(
        uuid=uuid if uuid and isinstance(uuid, str) else str(uuid4()),
        entrypoint=entrypoint if isinstance(entrypoint, str) else "",
    )
