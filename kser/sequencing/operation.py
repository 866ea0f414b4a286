"""Operation: a task that executes a list of tasks one after the other.

This module is a drop-in replacement for ``kser.sequencing.operation`` of 0.8.27.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import log_lines, signals
from kser import status as states
from kser.attempt import current_attempt
from kser.entry import NO_INIT_FAILURE, RegistryProtocol, notify_failure
from kser.errors import SendError, StoreMissing, UsageError
from kser.escaping import escape_lines
from kser.results import merge
from kser.sequencing.runner import InMemoryRunner, Runner
from kser.sequencing.task import Task, registry_of

if TYPE_CHECKING:
    from kser.store.model import OperationSnapshot

logger = escape_lines(logging.getLogger(__name__))

#: The runner of operations whose class has no registry.
_DEFAULT_RUNNER: Runner = InMemoryRunner()


class _StoredAttribute:
    """Descriptor of an attribute that returns a list from the snapshot of a stored operation.

    This is a non-data descriptor, so an attribute of the same name in user code takes precedence (decision C18).
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> list[Any]:
        stored = getattr(instance, "_kser_snapshot", None)
        return [] if stored is None else list(getattr(stored, self._name))


class Operation(Task):
    """A :class:`~kser.sequencing.task.Task` that contains other tasks and runs these tasks one after the other.

    :param uuid: identifier; by default, a new uuid.
    :param params: parameters of the operation.
    :param status: status of the operation.
    :param result: the forwarded result of a previous task; the first task gets this result.
    :param metadata: data of the user, which kser stores in the message unchanged.
    :param tasks: tasks of the operation; :meth:`build` adds the tasks that :meth:`build_tasks` returns.
    :raises kser.errors.UsageError: the arguments are positional and in the order of kser 0.8 (decision B2).
    """

    #: Task classes. The operation must also have the required parameters of these classes.
    TASKS: ClassVar[Any] = ()
    #: True if kser sends a separate message for each task, so that any consumer in which the class of the task is
    #: registered can run the task. This mode needs a shared database.
    DISTRIBUTED: ClassVar[bool] = False

    #: Recorded attempts at the tasks, oldest first: :class:`kser.store.model.AttemptRow`. Only
    #: :meth:`.OperationRegistry.get` fills this list; otherwise, it is empty.
    attempts: ClassVar[Any] = _StoredAttribute("attempts")
    #: Events of the operation, oldest first: :class:`kser.store.model.EventRow`. Only :meth:`.OperationRegistry.get`
    #: fills this list; otherwise, it is empty.
    events: ClassVar[Any] = _StoredAttribute("events")

    _kser_is_durable = True
    #: The runner of this object only; None stands for the runner of the class's registry.
    _kser_runner: Runner | None = None
    _kser_snapshot: OperationSnapshot | None = None
    #: The registry that loaded the operation from its store; None for any other operation. It can differ from
    #: ``_kser_registry``, which is the registry that the class is subscribed to.
    _kser_loaded_from: RegistryProtocol | None = None

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
        self._kser_initial_result: Result | None = None
        super().__init__(uuid=uuid, params=params, status=status, result=result, metadata=metadata)

    # -- building ------------------------------------------------------------------------------------------------------

    @classmethod
    def new(cls, **kwargs: Any) -> Self:
        """Create an operation from the arguments of the constructor.

        .. deprecated:: 0.8
           Call the class.
        """
        warnings.warn("Operation.new is deprecated: call the class", DeprecationWarning, stacklevel=2)
        # Skip the default parse_inputs, because it would issue a second warning for a call that the user did not write.
        own = cls.parse_inputs.__func__ is Operation.parse_inputs.__func__  # type: ignore[attr-defined]
        return cls(**(kwargs if own else cls.parse_inputs(**kwargs)))

    @classmethod
    def parse_inputs(cls, **kwargs: Any) -> dict[str, Any]:
        """Check and return the arguments of :meth:`new`, which calls this method.

        .. deprecated:: 0.8
           Use :meth:`prebuild`.
        """
        warnings.warn("Operation.parse_inputs is deprecated: use prebuild", DeprecationWarning, stacklevel=2)
        return kwargs

    def prebuild(self, **kwargs: Any) -> Mapping[str, Any] | None:
        """Check or replace the arguments before the tasks are built. Subclasses may implement this hook.

        :return: arguments for :meth:`build_tasks` in place of ``kwargs``. If the value is falsy, ``kwargs`` stay
            unchanged.
        """
        return kwargs

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        """Return the tasks of the operation. Subclasses implement this hook.

        :param kwargs: the operation's params, or the arguments of :meth:`build`.
        """
        return []

    def finalize(self) -> Any:
        """Complete the operation after its tasks were built. :meth:`build` returns the return value of this hook.

        Subclasses may implement this hook.
        """
        return self

    def build(self, **kwargs: Any) -> Any:
        """Build the tasks and add them to the operation. A second call replaces the tasks that the first call built.

        :param kwargs: arguments for :meth:`prebuild` and :meth:`build_tasks`; by default, the operation's params.
        :return: the return value of :meth:`finalize`; by default, this operation.
        :raises cdumay_error.types.ValidationError: a required parameter is missing.
        """
        built = self.compute_tasks(**(kwargs or self.params))
        replaced = {id(task) for task in self._kser_built or ()}
        self.tasks = [*(task for task in self.tasks if id(task) not in replaced), *built]
        self._kser_built = built
        return self.finalize()

    def compute_tasks(self, **kwargs: Any) -> list[Task]:
        """Check the parameters and build the tasks, without adding them to the operation.

        :raises cdumay_error.types.ValidationError: a required parameter is missing.
        """
        return self._build_tasks(**(self._prebuild(**kwargs) or kwargs))

    def _prebuild(self, **kwargs: Any) -> Mapping[str, Any] | None:
        accepted = _supported_kwargs(self.prebuild, kwargs)
        log_lines.log_step(logger, self, "PreBuild", ": %s", accepted)
        self.check_required_params()
        return self.prebuild(**accepted)

    def _build_tasks(self, **kwargs: Any) -> list[Task]:
        tasks = self.build_tasks(**_supported_kwargs(self.build_tasks, kwargs))
        text = f"{type(self).__name__}.BuildTasks: {len(tasks)} task(s) found"
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(text, extra={"kmsg": log_lines.dump_entry(self)})
        return tasks

    def add_task(self, task: Task) -> None:
        """Append a task to the operation."""
        self.tasks.append(task)

    def check_required_params(self) -> None:
        """Check that the required parameters of this class and of each class in :attr:`TASKS` are present.

        The check is not recursive: if a class in :attr:`TASKS` is an operation class, the check ignores the attribute
        ``TASKS`` of that class.

        :raises cdumay_error.types.ValidationError: a parameter is missing. The error names the first missing parameter
            and the class that requires it.
        """
        for owner in (type(self), *self.TASKS):
            for key in owner.REQUIRED_FIELDS:
                if key not in self.params:
                    raise ValidationError(f"Missing parameter: {key} for {owner.path}")

    def display(self) -> None:
        """Print the operation and its tasks."""
        print("\n  - ".join(map(str, (self, *self.tasks))))  # noqa: T201  printing is the purpose of the method

    # -- status --------------------------------------------------------------------------------------------------------

    def set_status(self, status: str, result: Result | None = None) -> Any:
        """Set the status. You may override this method, for example to record the status in your own database.

        :param status: the new status; any value is allowed.
        :param result: the accumulated result, if any.
        """
        self.status = status

    def _set_status(self, status: str, result: Result | None = None) -> Any:
        statuses = self.status, status
        log_lines.log_step(logger, self, "SetStatus", " status update '%s' -> '%s'", *statuses, level=logging.INFO)
        return self.set_status(status, result)

    # -- execution -----------------------------------------------------------------------------------------------------

    def unsafe_execute(self, result: Result | None = None) -> Any:
        """Run, in order, the tasks whose status is not SUCCESS, until a task fails.

        If a task fails or raises an exception, the operation becomes FAILED. Only exceptions of the operation's own
        hooks reach the caller.

        :param result: a result to merge into :attr:`result` before the first task runs. The first task gets the merged
            result.
        :return: the return value of ``onsuccess`` or ``onerror``; by default, :attr:`result`.
        """
        if self._kser_init_failure is not NO_INIT_FAILURE:
            return self._kser_init_failure
        signals.emit(signals.entry_started, type(self), entry=self)
        runner, registry = self._kser_runner, self._kser_registry
        if runner is None:
            runner = _DEFAULT_RUNNER if registry is None else registry.runner
        return runner.run(self, result)

    def _prerun(self) -> None:
        self.check_required_params()
        self._set_status(states.RUNNING)
        log_lines.log_step(logger, self, "PreRun", ": running...")
        self.prerun()

    def _onsuccess(self, result: Any) -> Any:
        if result is not self.result:
            self.result = merge(self.result, result)
        self._set_status(states.SUCCESS, self.result)
        log_lines.log_success(logger, self, result)
        signals.emit(signals.entry_succeeded, type(self), entry=self, result=self.result)
        return self.onsuccess(self.result)

    def _onerror(self, result: Any) -> Any:
        if result is not self.result:
            self.result = merge(self.result, result)
        self._set_status(states.FAILED, self.result)
        log_lines.log_failure(logger, self)
        return notify_failure(self)

    # -- over Kafka ----------------------------------------------------------------------------------------------------

    def send(self, result: Result | None = None, topic: str | None = None, *, key: str | bytes | None = None) -> Any:
        """Send this operation to Kafka as one message.

        The consumer that receives the message builds and runs the operation.

        With a shared database, this method first *accepts* the operation: it saves the operation, together with its
        tasks if they are built. kser guarantees that an accepted operation ends. If the message cannot be sent now, the
        reaper of a consumer sends it later.

        :param result: a result to forward to the operation.
        :param topic: the topic; by default ``TOPIC``, else the first of ``KSER_TOPICS``.
        :param key: key of the message. Consumers handle messages with the same key one after the other.
        :return: this operation.
        :raises kser.errors.SendError: there is no shared database, and the broker did not confirm the delivery. The
            attribute ``result`` of the error is the Result of the producer.
        :raises kser.errors.StateConflict: another stored operation has the same uuid, or this operation has already
            ended.
        :raises kser.errors.StoreUnavailable: the database is unavailable, and it is unknown whether the operation was
            accepted. Call this method again.
        :raises kser.errors.ProducerMissing: the class has no registry, or the registry has no producer.
        :raises kser.errors.TopicMissing: neither the argument nor ``TOPIC`` nor ``KSER_TOPICS`` names a topic.
        """
        registry = registry_of(self)
        if registry._kser_has_store:
            registry._kser_operations.send(self, result, topic, key)
            return self
        sent = super().send(result=result, topic=topic, key=key)
        if not sent:
            # A hook of the producer returned no Result, so it is unknown whether the message was delivered. Treat it as
            # not delivered.
            sent = Result(uuid=self.uuid, retcode=500, stderr=f"a hook of the producer returned {sent!r}")
        if isinstance(sent, Result) and states.final_status(sent) != states.SUCCESS:
            raise SendError(f"{self!r} was not delivered: {sent.stderr}", sent)
        return self

    def next(self, task: Task) -> Task | None:
        """Return the first task after ``task`` whose status is not SUCCESS, or None if there is no such task.

        The method finds the position of ``task`` by its uuid, and returns None if no task of the operation has this
        uuid.
        """
        uuids = [str(known.uuid) for known in self.tasks]
        try:
            position = uuids.index(str(task.uuid))
        except ValueError:
            return None
        return _first_unfinished(self.tasks[position + 1 :])

    def launch(self) -> Result:
        """Accept this operation and send its first task. After each task, the consumer that ran it sends the next task.

        :return: the Result of the send. The operation is accepted even if the send failed. If the operation has no
            task, the return code is 1 and the operation is not accepted.
        :raises kser.errors.StoreMissing: there is no shared database, and the tasks do not override ``send``; see
            :meth:`launch_next`.
        :raises kser.errors.StateConflict: another stored operation has the same uuid, or this operation has already
            ended.
        """
        first = _first_unfinished(self.tasks)
        registry = self._kser_registry
        if first is None or _has_own_send(first) or registry is None or not registry._kser_has_store:
            return self.launch_next()
        return registry._kser_operations.launch(self)

    def launch_next(self, task: Task | None = None, result: Result | None = None) -> Result:
        """Send the task after ``task``, or end the operation if no task follows or ``task`` failed.

        If the class of the next task overrides ``send``, this method sends the task with that ``send``, as in kser 0.8.
        If the class of a stored operation that runs over the consumers overrides ``launch_next``, kser calls the
        override after each task. During this call, the inherited ``launch_next`` sends nothing and only chooses the
        next task. kser records the choice in a checkpoint, and then sends the chosen task. A call from inside a running
        task of a stored operation has no effect, because the checkpoint of the running task sends the next task.

        :param task: the task that ended; None sends the first task whose status is not SUCCESS.
        :param result: the result of ``task``, which is forwarded to the next task.
        :return: the return value of ``send``, or the final result of this operation. If ``send`` did not return a
            Result, this method returns a new Result.
        :raises kser.errors.UsageError: ``task`` does not belong to this operation.
        :raises kser.errors.StoreMissing: there is no shared database, and the next task does not override ``send``
            (decision B22).
        """
        if task is not None and str(task.uuid) not in {str(known.uuid) for known in self.tasks}:
            raise UsageError(f"{task!r} is no task of {self!r}: pass one of the operation's own tasks")
        if not self.tasks and task is None:
            return Result(retcode=1, stderr="Nothing to do, empty operation !")
        attempt = current_attempt.get()
        if self._kser_snapshot is not None or (attempt is not None and attempt.operation_uuid == self.uuid):
            return Result(uuid=self.uuid, stdout=f"{self!r} is stored: its checkpoints send the next task")
        failed = states.final_status(result) == states.FAILED or (task is not None and task.status == states.FAILED)
        following = _first_unfinished(self.tasks) if task is None else self.next(task)
        choice = current_choice.get()
        if choice is not None and choice.uuid == self.uuid:
            choice.choose(None if failed else following, failed)
            return result or self.result
        if failed or following is None:
            self._set_status(states.FAILED if failed else states.SUCCESS, result)
            return result or (task.result if failed and task is not None else self.result)
        if not _has_own_send(following):
            raise StoreMissing(
                f"{following!r} cannot be sent by {type(self).path}: running an operation over the consumers needs a"
                " shared database: set KSER_DATABASE_URI, or pass OperationRegistry(store=...). Without one, send the"
                " whole operation with send(), or override send(result=None) on the tasks and call launch_next() from"
                " them"
            )
        sent = following.send(result=result)
        return sent if isinstance(sent, Result) else Result(uuid=following.uuid, stdout=f"{following!r} sent")

    # -- stored --------------------------------------------------------------------------------------------------------

    @classmethod
    def init_by_id(cls, _id: Any) -> Any:
        """Return the stored operation whose uuid is ``_id``. See :meth:`.OperationRegistry.get`.

        Without a shared database, return None.
        """
        registry = cls._kser_registry
        return registry._kser_operations.get(str(_id)) if registry is not None and registry._kser_has_store else None

    def resume(self) -> Self:
        """Resume this FAILED or CANCELLED stored operation at its first task whose status is not SUCCESS.

        :return: this object, unchanged. :meth:`.OperationRegistry.get` returns the new state.
        :raises kser.errors.StateConflict: the operation is neither FAILED nor CANCELLED. If several calls run at the
            same time, one of them succeeds and the others raise this error.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        (self._kser_loaded_from or registry_of(self))._kser_operations.resume(self.uuid)
        return self

    def cancel(self, reason: str | None = None) -> str:
        """Cancel this stored operation: immediately if no consumer holds a claim on it, otherwise after its running
        task.

        :param reason: the reason, which is stored with the operation.
        :return: the status of the operation after the call. An operation that has ended does not change.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        return (self._kser_loaded_from or registry_of(self))._kser_operations.cancel(self.uuid, reason)

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end of this stored operation.

        :param timeout: seconds to wait; None waits without a limit.
        :return: the result of the operation.
        :raises kser.errors.WaitTimeout: the operation has not ended in time.
        :raises kser.errors.StoreMissing: there is no shared database.
        """
        return (self._kser_loaded_from or registry_of(self))._kser_operations.wait(self.uuid, timeout)

    def __repr__(self) -> str:
        return f"Operation [{type(self).__name__}](id={self.uuid},status={self.status})"

    __str__ = __repr__


def _has_own_send(task: Task) -> bool:
    """Return whether the class of a task, or the task object itself, overrides ``send``."""
    return getattr(type(task), "send", None) not in (Task.send, Operation.send) or "send" in vars(task)


def _first_unfinished(tasks: Iterable[Task]) -> Task | None:
    return next((task for task in tasks if task.status != states.SUCCESS), None)


def _supported_kwargs(hook: Callable[..., Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``kwargs``, or an empty mapping for a hook without parameters (decision B21b)."""
    if isinstance(hook, MethodType) and inspect.isfunction(hook.__func__):
        return kwargs if _accepts_any_argument(hook.__func__) else {}
    return kwargs if inspect.signature(hook).parameters else {}


@functools.lru_cache(maxsize=1024)
def _accepts_any_argument(function: Callable[..., Any]) -> bool:
    """Return whether a method has parameters besides ``self``."""
    # Cache the return value, because the inspection takes as long as a small task.
    return bool(inspect.signature(MethodType(function, object())).parameters)


class NextTaskChoice:
    """The choice of the next task by a class that overrides ``launch_next``. Only the first choice counts.

    :param uuid: uuid of the operation.
    """

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.is_made = False
        #: The next task; None if the operation ends.
        self.next_task: Task | None = None
        #: True if the operation fails.
        self.is_failed = False

    def choose(self, next_task: Task | None, is_failed: bool = False) -> None:
        """Choose the next task; None ends the operation."""
        if not self.is_made:
            self.is_made, self.next_task, self.is_failed = True, next_task, is_failed


#: The choice that kser requested from ``launch_next`` in this context; None if kser did not request a choice.
current_choice: ContextVar[NextTaskChoice | None] = ContextVar("kser_choice", default=None)
