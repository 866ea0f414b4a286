"""Operation: a task that is a list of tasks, executed one after the other.

Drop-in for ``kser.sequencing.operation`` of 0.8.27.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import records, signals
from kser import status as states
from kser.delivery import CURRENT
from kser.entry import NOT_REFUSED, call_onerror
from kser.errors import SendError, StoreMissing, UsageError
from kser.results import merge
from kser.sequencing.handover import CHOICE
from kser.sequencing.runner import InProcessRunner, Runner
from kser.sequencing.task import Task, registry_of

if TYPE_CHECKING:
    from kser.sequencing.registry import OperationRegistry
    from kser.store.rows import Stored

logger = logging.getLogger(__name__)

#: What runs operations whose class has no registry.
DEFAULT_RUNNER: Runner = InProcessRunner()


class _Recorded:
    """What is stored of instances; no data descriptor, so that a user's attribute of that name wins (decision C18)."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> list[Any]:
        stored = getattr(instance, "_kser_stored", None)
        return [] if stored is None else list(getattr(stored, self._name))


class Operation(Task):
    """A :class:`~kser.sequencing.task.Task` that has other tasks as children, and runs them one after the other.

    :param uuid: identifier, a new one by default.
    :param params: parameters of the operation.
    :param status: its state.
    :param result: the forwarded result of a previous task; the first task gets it.
    :param metadata: context that is carried through.
    :param tasks: its tasks; :meth:`build` adds what :meth:`build_tasks` returns.
    :raises kser.errors.UsageError: a positional call in the order of kser 0.8 (decision B2).
    """

    #: Classes whose required parameters the operation must have too.
    TASKS: ClassVar[Any] = ()
    #: Whether each of its tasks is sent by itself, to run on any consumer that knows it; it needs a shared database.
    DISTRIBUTED: ClassVar[bool] = False

    #: What came of each attempt at its tasks, oldest first: :class:`kser.store.rows.AttemptRow`. Of an operation that
    #: :meth:`.OperationRegistry.get` gave; empty for others.
    attempts: ClassVar[Any] = _Recorded("attempts")
    #: What happened to it, oldest first: :class:`kser.store.rows.EventRow`; likewise.
    events: ClassVar[Any] = _Recorded("events")

    _kser_kept = True
    _kser_stored: Stored | None = None
    #: Where it was found: it may be of a class that is not known there.
    _kser_found_by: OperationRegistry | None = None

    def __init__(
        self,
        uuid: str | None = None,
        params: Mapping[str, Any] | None = None,
        status: str = states.PENDING,
        result: Result | None = None,
        metadata: Mapping[str, Any] | None = None,
        tasks: Iterable[Task] | None = None,
    ) -> None:
        #: The tasks, in the order in which they run.
        self.tasks: list[Task] = list(tasks or ())
        self._kser_built: list[Task] | None = None
        self._kser_incoming: Result | None = None
        super().__init__(uuid=uuid, params=params, status=status, result=result, metadata=metadata)

    # -- building ------------------------------------------------------------------------------------------------------

    @classmethod
    def new(cls, **kwargs: Any) -> Self:
        """Make an operation from the arguments of its constructor.

        .. deprecated:: 0.8
           Call the class.
        """
        warnings.warn("Operation.new is deprecated: call the class", DeprecationWarning, stacklevel=2)
        # The one below would warn again, of a call that the user did not write.
        own = cls.parse_inputs.__func__ is Operation.parse_inputs.__func__  # type: ignore[attr-defined]
        return cls(**(kwargs if own else cls.parse_inputs(**kwargs)))

    @classmethod
    def parse_inputs(cls, **kwargs: Any) -> dict[str, Any]:
        """Used by :meth:`new` to check its arguments; returns them.

        .. deprecated:: 0.8
           Use :meth:`prebuild`.
        """
        warnings.warn("Operation.parse_inputs is deprecated: use prebuild", DeprecationWarning, stacklevel=2)
        return kwargs

    def prebuild(self, **kwargs: Any) -> Mapping[str, Any] | None:
        """To implement: checks before the tasks are built.

        :return: what :meth:`build_tasks` gets in place of ``kwargs``; something falsy keeps them.
        """
        return kwargs

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        """To implement: make the tasks.

        :param kwargs: the operation's params, or what :meth:`build` was called with.
        """
        return []

    def finalize(self) -> Any:
        """To implement: what is to be done once the tasks are built. What it returns, :meth:`build` returns."""
        return self

    def build(self, **kwargs: Any) -> Any:
        """Make the tasks and add them; built again, they take the place of those built before.

        :param kwargs: passed on to :meth:`prebuild` and :meth:`build_tasks`; the operation's params by default.
        :return: what :meth:`finalize` returns: this operation.
        :raises cdumay_error.types.ValidationError: a required parameter is missing.
        """
        built = self.compute_tasks(**(kwargs or self.params))
        replaced = {id(task) for task in self._kser_built or ()}
        self.tasks = [*(task for task in self.tasks if id(task) not in replaced), *built]
        self._kser_built = built
        return self.finalize()

    def compute_tasks(self, **kwargs: Any) -> list[Task]:
        """Check, then make the tasks, without adding them.

        :raises cdumay_error.types.ValidationError: a required parameter is missing.
        """
        return self._build_tasks(**(self._prebuild(**kwargs) or kwargs))

    def _prebuild(self, **kwargs: Any) -> Mapping[str, Any] | None:
        accepted = _accepted(self.prebuild, kwargs)
        records.step(logger, self, "PreBuild", ": %s", accepted)
        self.check_required_params()
        return self.prebuild(**accepted)

    def _build_tasks(self, **kwargs: Any) -> list[Task]:
        tasks = self.build_tasks(**_accepted(self.build_tasks, kwargs))
        found = f"{type(self).__name__}.BuildTasks: {len(tasks)} task(s) found"
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(found, extra={"kmsg": records.dump_entry(self)})
        return tasks

    def add_task(self, task: Task) -> None:
        """Add a task behind those that there are."""
        self.tasks.append(task)

    def check_required_params(self) -> None:
        """Check this operation's params for what it and each class of :attr:`TASKS` requires (not what theirs require).

        :raises cdumay_error.types.ValidationError: naming the first one that is missing and the class that wants it.
        """
        for owner in (type(self), *self.TASKS):
            for key in owner.REQUIRED_FIELDS:
                if key not in self.params:
                    raise ValidationError(f"Missing parameter: {key} for {owner.path}")

    def display(self) -> None:
        """Print the operation and its tasks."""
        print("\n  - ".join(map(str, (self, *self.tasks))))  # noqa: T201  what the method is for

    # -- status --------------------------------------------------------------------------------------------------------

    def set_status(self, status: str, result: Result | None = None) -> Any:
        """Set the status; override it to record the status elsewhere.

        :param status: the new one; nothing is refused.
        :param result: the result so far, if any.
        """
        self.status = status

    def _set_status(self, status: str, result: Result | None = None) -> Any:
        moves = self.status, status
        records.step(logger, self, "SetStatus", " status update '%s' -> '%s'", *moves, level=logging.INFO)
        return self.set_status(status, result)

    # -- execution -----------------------------------------------------------------------------------------------------

    def unsafe_execute(self, result: Result | None = None) -> Any:
        """Run the tasks that are not SUCCESS yet, in order, until one fails.

        A failing task, also one that raises, makes the operation FAILED; only what the operation's own steps raise
        is raised.

        :param result: merged into :attr:`result` before anything else; the first task gets it.
        :return: :attr:`result`, unless ``onsuccess`` or ``onerror`` were overridden.
        """
        if self._kser_refusal is not NOT_REFUSED:
            return self._kser_refusal
        signals.emit(signals.entry_started, type(self), entry=self)
        registry = self._kser_registry
        return (DEFAULT_RUNNER if registry is None else registry.runner).run(self, result)

    def _prerun(self) -> None:
        self.check_required_params()
        self._set_status(states.RUNNING)
        records.step(logger, self, "PreRun", ": running...")
        self.prerun()

    def _onsuccess(self, result: Any) -> Any:
        if result is not self.result:
            self.result = merge(self.result, result)
        self._set_status(states.SUCCESS, self.result)
        records.success(logger, self, result)
        signals.emit(signals.entry_succeeded, type(self), entry=self, result=self.result)
        return self.onsuccess(self.result)

    def _onerror(self, result: Any) -> Any:
        if result is not self.result:
            self.result = merge(self.result, result)
        self._set_status(states.FAILED, self.result)
        records.failure(logger, self)
        return call_onerror(self)

    # -- over Kafka ----------------------------------------------------------------------------------------------------

    def send(self, result: Result | None = None, topic: str | None = None, *, key: str | bytes | None = None) -> Any:
        """Send this operation to Kafka as one message; the consumer that gets it builds and runs it.

        With a shared database it is accepted: saved with its tasks, if they are built, before it is sent. From then on
        it will end, also if it could not be sent now: the consumers send it as soon as they can.

        :param result: forwarded to the operation.
        :param topic: where to: this argument, else ``TOPIC``, else the first of ``KSER_TOPICS``.
        :param key: what has the same key is handled one after the other.
        :return: this operation.
        :raises kser.errors.SendError: delivery was not confirmed, and there is no database; its ``result`` says why.
        :raises kser.errors.StateConflict: its uuid is that of another stored operation, or it has ended before.
        :raises kser.errors.StoreUnavailable: the database does not answer, so it is not accepted.
        :raises kser.errors.ProducerMissing: the class has no registry, or that has no producer.
        :raises kser.errors.TopicMissing: none of the three names a topic.
        """
        registry = registry_of(self)
        if registry.keeps:
            registry.keeper.send(self, result, topic, key)
            return self
        answer = super().send(result=result, topic=topic, key=key)
        if not answer:
            # Nobody can tell from a hook that returns nothing whether the message was delivered.
            answer = Result(uuid=self.uuid, retcode=500, stderr=f"a hook of the producer returned {answer!r}")
        if isinstance(answer, Result) and states.outcome(answer) != states.SUCCESS:
            raise SendError(f"{self!r} was not delivered: {answer.stderr}", answer)
        return self

    def next(self, task: Task) -> Task | None:
        """The first task behind ``task`` (found by its uuid) that is not SUCCESS; None when there is none."""
        uuids = [str(known.uuid) for known in self.tasks]
        try:
            position = uuids.index(str(task.uuid))
        except ValueError:
            return None
        return _first_unfinished(self.tasks[position + 1 :])

    def launch(self) -> Result:
        """Run over the consumers: accept this operation, and send its first task; each finished one sends the next.

        :return: what came of sending; also after a failed one it is accepted. Return code 1 when there is no task at
            all: then nothing is accepted.
        :raises kser.errors.StoreMissing: there is no shared database, and the tasks do not send themselves; see
            :meth:`launch_next`.
        :raises kser.errors.StateConflict: its uuid is that of another stored operation, or it has ended before.
        """
        first = _first_unfinished(self.tasks)
        registry = self._kser_registry
        if first is None or _sends_itself(first) or registry is None or not registry.keeps:
            return self.launch_next()
        return registry.keeper.launch(self)

    def launch_next(self, task: Task | None = None, result: Result | None = None) -> Result:
        """Send the task that follows ``task``, or end the operation when there is none or when ``task`` failed.

        Tasks whose class overrides ``send`` are sent with it, as in kser 0.8. A stored operation calls this by itself
        at the checkpoint of a task, if its class overrides it: then the choice is recorded, and sent afterwards. Called
        from a task that runs, it changes nothing: the checkpoint of that task does it.

        :param task: the task that ended; without one the first that is not SUCCESS is sent.
        :param result: its result, forwarded to the next one.
        :return: what ``send`` returned (of an operation as a Result), or the result that the operation ended with.
        :raises kser.errors.UsageError: ``task`` is none of this operation's.
        :raises kser.errors.StoreMissing: sending over the consumers needs a shared database, unless ``send`` is
            overridden on the tasks (decision B22).
        """
        if task is not None and str(task.uuid) not in {str(known.uuid) for known in self.tasks}:
            raise UsageError(
                f"{task!r} is no task of {self!r}: what follows it cannot be told, nor whether it was the last"
            )
        if not self.tasks and task is None:
            return Result(retcode=1, stderr="Nothing to do, empty operation !")
        delivery = CURRENT.get()
        if self._kser_stored is not None or (delivery is not None and delivery.operation_uuid == self.uuid):
            return Result(uuid=self.uuid, stdout=f"{self!r} goes on by itself: it is stored")
        failed = states.outcome(result) == states.FAILED or (task is not None and task.status == states.FAILED)
        following = _first_unfinished(self.tasks) if task is None else self.next(task)
        choice = CHOICE.get()
        if choice is not None and choice.uuid == self.uuid:
            choice.make(None if failed else following, failed)
            return result or self.result
        if failed or following is None:
            self._set_status(states.FAILED if failed else states.SUCCESS, result)
            return result or (task.result if failed and task is not None else self.result)
        if not _sends_itself(following):
            raise StoreMissing(
                f"{following!r} cannot be sent by {type(self).path}: running an operation over the consumers needs a"
                " shared database: set KSER_DATABASE_URI, or pass OperationRegistry(store=...). Without one, send the"
                " whole operation with send(), or override send(result=None) on the tasks and call launch_next() from"
                " them"
            )
        answer = following.send(result=result)
        return answer if isinstance(answer, Result) else Result(uuid=following.uuid, stdout=f"{following!r} sent")

    # -- stored --------------------------------------------------------------------------------------------------------

    @classmethod
    def init_by_id(cls, _id: Any) -> Any:
        """The stored operation with that uuid, as :meth:`.OperationRegistry.get` gives it; None without a database."""
        registry = cls._kser_registry
        return registry.keeper.get(str(_id)) if registry is not None and registry.keeps else None

    def resume(self) -> Self:
        """Let this stored operation go on, after it FAILED or was CANCELLED, at its first task that is not SUCCESS.

        :return: this operation, as it was; ask the registry for what became of it.
        :raises kser.errors.StateConflict: it is in another state; of several at the same time one resumes it.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        (self._kser_found_by or registry_of(self)).keeper.resume(self.uuid)
        return self

    def cancel(self, reason: str | None = None) -> str:
        """Cancel this stored operation: at once when no consumer has it, else after the task that runs.

        :param reason: what is kept with it.
        :return: its status now; one that has ended stays as it is.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        return (self._kser_found_by or registry_of(self)).keeper.cancel(self.uuid, reason)

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end of this stored operation.

        :param timeout: seconds; None waits for ever.
        :return: its result.
        :raises kser.errors.WaitTimeout: it has not ended in time.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        return (self._kser_found_by or registry_of(self)).keeper.wait(self.uuid, timeout)

    def __repr__(self) -> str:
        return f"Operation [{type(self).__name__}](id={self.uuid},status={self.status})"

    __str__ = __repr__


def _sends_itself(task: Task) -> bool:
    """Whether a task's ``send`` is the user's own."""
    return getattr(type(task), "send", None) not in (Task.send, Operation.send) or "send" in vars(task)


def _first_unfinished(tasks: Iterable[Task]) -> Task | None:
    return next((task for task in tasks if task.status != states.SUCCESS), None)


def _accepted(hook: Callable[..., Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """``kwargs``, or nothing for a hook that takes nothing (decision B21b)."""
    if isinstance(hook, MethodType) and inspect.isfunction(hook.__func__):
        return kwargs if _takes_any(hook.__func__) else {}
    return kwargs if inspect.signature(hook).parameters else {}


@functools.lru_cache(maxsize=1024)
def _takes_any(function: Callable[..., Any]) -> bool:
    """Whether a method has parameters beside ``self``: remembered, for to find out takes as long as a small task."""
    return bool(inspect.signature(MethodType(function, object())).parameters)
