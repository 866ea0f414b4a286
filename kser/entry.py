"""Entrypoint: one unit of work and its life cycle. Drop-in for ``kser.entry`` of 0.8.27."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Final, Protocol, Self
from uuid import uuid4

from cdumay_error.types import NotImplemented as NotImplementedYet
from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import records, signals, status
from kser.delivery import CURRENT, FAILED, Failure, error_name, settle
from kser.results import error_of, failure, merge
from kser.schemas import Message

logger = logging.getLogger(__name__)

#: What stands in an object whose ``postinit`` did not raise, in place of what its ``onerror`` returned.
NOT_REFUSED: Final = object()


class Surroundings(Protocol):
    """What an entrypoint runs in: the registry that its class is subscribed to."""

    def context(self) -> AbstractContextManager[Any]:
        """What to enter around a whole execution."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether it has a database, where operations are kept."""
        ...

    def receive(self, kmsg: Message, entrypoint: type[Entrypoint] | None) -> Any:
        """Handle the message of an operation that is kept, or is to be, or of a step of it.

        :param entrypoint: the class that it names; None for one that is not known here.
        :return: a Result; or :class:`kser.delivery.Unfinished`.
        """
        ...


class EntrypointMeta(type):
    """Gives each class its ``path``."""

    @property
    def path(cls) -> str:
        """The name under which messages ask for the class: ``module.ClassName``."""
        return f"{cls.__module__}.{cls.__name__}"


class _InstancePath:
    """``path`` on instances; no data descriptor, so that a user's attribute of that name wins (decision C18)."""

    def __get__(self, instance: Any, owner: EntrypointMeta) -> str:
        return owner.path


class Entrypoint(metaclass=EntrypointMeta):
    """One unit of work: subclass it and implement :meth:`run`.

    Every step of the life cycle has a hook without underscore, to override freely, and a trigger with one, which logs
    and calls the hook.

    :param uuid: identifier, a new one by default.
    :param params: parameters of the work.
    :param result: the forwarded result of what ran before.
    :param metadata: context that is carried through.
    """

    #: Names of the parameters that must be present.
    REQUIRED_FIELDS: ClassVar[Any] = []

    path: ClassVar[Any] = _InstancePath()

    _kser_registry: ClassVar[Surroundings | None] = None
    #: Whether its messages are for the registry, when that has a database.
    _kser_kept: ClassVar[bool] = False
    _kser_refusal: Any = NOT_REFUSED

    def __init__(
        self,
        uuid: str | None = None,
        params: Mapping[str, Any] | None = None,
        result: Result | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        #: Identifier; the same in the message, the logs and the result.
        self.uuid: str = uuid or str(uuid4())
        #: Parameters of the work.
        self.params: Any = params or {}
        #: Context that is carried through.
        self.metadata: Any = metadata or {}
        #: What came in, with what the work gave merged into it.
        self.result: Result = result or Result(uuid=self.uuid)
        self._post_init()

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def postinit(self) -> None:
        """Called at the end of construction; an object for which it raises is not run, and fails with that error."""

    def prerun(self) -> None:
        """Called before :meth:`run`, when the required parameters are there."""

    def run(self) -> Result | None:
        """The work. To implement.

        :return: a Result, merged into :attr:`result`; None stands for a blank one.
        :raises cdumay_error.types.NotImplemented: it was not overridden.
        """
        raise NotImplementedYet(f"Task '{type(self).path}' not implemented")

    def postrun(self, result: Any) -> Any:
        """Called with what :meth:`run` returned, not at all when it raised; returns what goes on in its place."""
        return result

    def onsuccess(self, result: Result) -> Any:
        """Called with the final result when its return code is 0; what it returns, :meth:`execute` returns."""
        return result

    def onerror(self, result: Result) -> Any:
        """Called with the final result of a failure; what it returns, :meth:`execute` returns.

        When it raises, its error is logged and merged into the result, and no hook is called again.
        """
        return result

    # -- triggers ------------------------------------------------------------------------------------------------------

    def _post_init(self) -> None:
        if (delivery := CURRENT.get()) is not None:
            delivery.construct(self)
        try:
            self.postinit()
        except Exception as exc:
            failed = failure(exc, self.uuid)
            answer = postpone(self, failed, exc)
            self._kser_refusal = self._onerror(failed) if answer is None else answer

    def _prerun(self) -> None:
        records.step(logger, self, "PreRun")
        self.check_required_params()
        self.prerun()

    def _run(self) -> Any:
        records.step(logger, self, "Run")
        return self.run()

    def _postrun(self, result: Any) -> Any:
        records.step(logger, self, "PostRun")
        return self.postrun(result)

    def _onsuccess(self, result: Any) -> Any:
        self.result = merge(self.result, result)
        records.success(logger, self, self.result)
        signals.emit(signals.entry_succeeded, type(self), entry=self, result=self.result)
        return self.onsuccess(self.result)

    def _onerror(self, result: Any) -> Any:
        self.result = merge(self.result, result)
        records.failure(logger, self)
        return call_onerror(self)

    # -- execution -----------------------------------------------------------------------------------------------------

    def unsafe_execute(self, result: Result | None = None) -> Any:
        """Execute; what a hook or :meth:`run` raises is raised.

        :param result: merged into :attr:`result` before anything else.
        :return: what :meth:`onsuccess` or, for a returned failure, :meth:`onerror` returned.
        """
        if self._kser_refusal is not NOT_REFUSED:
            return self._kser_refusal
        self.result = merge(self.result, result)
        signals.emit(signals.entry_started, type(self), entry=self)
        self._prerun()
        value = self._run()
        settle(self)
        value = self._postrun(value)
        if status.outcome(self.result, value) == status.SUCCESS:
            return self._onsuccess(value)
        if (answer := postpone(self, value)) is not None:
            return answer
        return self._onerror(value)

    def execute(self, result: Result | None = None) -> Any:
        """Execute; what is raised becomes a failed result. SystemExit and KeyboardInterrupt pass.

        :param result: merged into :attr:`result` before anything else.
        :return: what :meth:`onsuccess` or :meth:`onerror` returned: the result, unless they were overridden.
        """
        registry = self._kser_registry
        with nullcontext() if registry is None else registry.context():
            try:
                if (delivery := CURRENT.get()) is not None:
                    delivery.start(self)
                return self.unsafe_execute(result=result)
            except Exception as exc:
                failed = failure(exc, self.uuid)
                if (answer := postpone(self, failed, exc)) is not None:
                    return answer
                return self._onerror(failed)

    def check_required_params(self) -> None:
        """Check that every parameter of :attr:`REQUIRED_FIELDS` is present.

        :raises cdumay_error.types.ValidationError: naming the first one that is missing.
        """
        for key in self.REQUIRED_FIELDS:
            if key not in self.params:
                raise ValidationError(f"Missing parameter: {key}")

    # -- messages and logs ---------------------------------------------------------------------------------------------

    def to_Message(self, result: Result | None = None) -> Message:
        """The message that asks for this work; it shares this object's params, result and metadata.

        :param result: forwarded in place of :attr:`result`.
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
        """An object from a message, sharing its params, result and metadata."""
        return cls(uuid=kmsg.uuid, params=kmsg.params, result=kmsg.result, metadata=kmsg.metadata)

    def label(self, action: str | None = None) -> str:
        """``Name[uuid]``, followed by ``- action`` if there is one."""
        label = f"{type(self).__name__}[{self.uuid}]"
        return f"{label} - {action}" if action else label

    def log(self, message: str, level: int = logging.INFO, *args: Any, **kwargs: Any) -> None:
        """Log ``message``, formatted with ``args``, behind this object's name, path and uuid.

        :param level: level of the record.
        :param kwargs: what :meth:`logging.Logger.log` takes: ``extra``, ``exc_info``, ``stack_info``, ``stacklevel``.
        """
        records.message(logger, self, "MESSAGE", message, level, *args, **kwargs)


def postpone(entry: Entrypoint, result: Any, exc: Exception | None = None) -> Any:
    """Leave a failure to the next attempt, if the consumer that runs ``entry`` makes one: no hook is called.

    :param result: what it failed with.
    :param exc: the exception that it failed with, if one did.
    :return: the result of this attempt; None when the failure is final.
    :raises kser.delivery.Abandoned: nobody waits for the result any more.
    """
    delivery = CURRENT.get()
    if delivery is None:
        return None
    delivery.settle(entry)
    if entry is not delivery.entry:
        return None
    text = (result if result and result.stderr else entry.result).stderr
    name = error_name(exc) if exc is not None else _name_of_error(result or entry.result)
    if not delivery.postpones(exc, Failure(FAILED, name, text)):
        return None
    answer = entry.result = merge(entry.result, result) if result is not entry.result else entry.result
    records.retry(logger, entry, delivery.attempt, delivery.retry_in or 0)
    signals.emit(signals.entry_retried, type(entry), entry=entry, result=answer, attempt=delivery.attempt)
    return answer


def _name_of_error(result: Result) -> str:
    error = error_of(result)
    return str(error.get("name", "")) if isinstance(error, Mapping) else ""


def call_onerror(entry: Entrypoint) -> Any:
    """Tell listeners and the hook of an object that it failed; a raising hook adds its own error (decision C6)."""
    signals.emit(signals.entry_failed, type(entry), entry=entry, result=entry.result)
    try:
        return entry.onerror(entry.result)
    except Exception as exc:
        logger.exception(f"{records.line(entry, 'Failed')}: onerror raised: {exc}")
        return merge(entry.result, failure(exc, entry.uuid))


def check_entrypoint(name: Any, candidate: Any) -> None:
    """Check that ``candidate`` is a class of entrypoints.

    :param name: what it was to be registered under.
    :raises cdumay_error.types.ValidationError: it is not.
    """
    if not (isinstance(candidate, type) and issubclass(candidate, Entrypoint)):
        raise ValidationError(
            f"Invalid type for entry '{name}', MUST implement kser.entry.Entrypoint", extra={"entrypoint": name}
        )
