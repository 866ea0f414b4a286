"""Serialization of operations and tasks to rows of a store, and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import status as states
from kser.entry import Entrypoint, RegistryProtocol
from kser.errors import LimitExceeded, StateConflict, UsageError
from kser.limits import current_limits
from kser.results import copy_result, failed_result, merge
from kser.schemas import ORIGINAL_PARAMS_KEY, Message, dump_result
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.store.model import Mode, NewOperation, NewTask, OperationRow, Phase, StepMessage, TaskRow

#: Flags for the methods that an operation class overrides. ``ENDS`` stands for methods that are called at the end of
#: the operation, and ``CHOOSES`` for methods that choose the next task.
ENDS: Final = 1
CHOOSES: Final = 2
_ENDS = ("onsuccess", "onerror", "_onsuccess", "_onerror", "set_status", "_set_status")
_CHOOSES = ("next", "launch_next", "set_status")

#: Maximum length of searchable metadata keys and values. Longer keys and values are stored, but a search does not find
#: them.
MAX_SEARCHABLE_VALUE: Final = 200
T = TypeVar("T", bound=Task)


def overrides_of(cls: type) -> int:
    """Return the flags of an operation class: :data:`ENDS`, :data:`CHOOSES`, both flags or no flag."""

    def overrides(names: Iterable[str]) -> bool:
        return any(getattr(cls, name, None) is not getattr(Operation, name) for name in names)

    return ENDS * overrides(_ENDS) | CHOOSES * overrides(_CHOOSES)


def to_json(value: Any, subject: str, owner: object) -> str:
    """Return a value as JSON text, in the format of Kafka messages.

    :param subject: name of the value, for the error text.
    :param owner: the object with the value, for the error text.
    :raises kser.errors.UsageError: the value has no JSON form, or has too many levels for a message.
    """
    try:
        return current_limits().encode_part(value, subject)
    except LimitExceeded as error:
        raise UsageError(f"{subject} of {owner!r} cannot be stored: {error.message}", msgid=error.msgid) from error
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{subject} of {owner!r} cannot be stored: {error}; only JSON values can be stored and sent"
        ) from error


def result_to_json(result: Result, owner: object) -> str:
    """Return a result as JSON text.

    :raises kser.errors.UsageError: the result has no JSON form.
    """
    return to_json(dump_result(result), "the result", owner)


def result_from_json(text: str | None, uuid: str) -> Result:
    """Return the result that a JSON text contains. For None, return a blank result with ``uuid``."""
    return Result(uuid=uuid) if text is None else Result(**json.loads(text))


class SerializedOutcome(NamedTuple):
    """The outcome of a task, as it is stored."""

    #: Result of the task. If the task returned a value that cannot be stored, this is a failed result that states the
    #: reason.
    result: Result
    #: ``result`` as JSON.
    text: str
    #: SUCCESS or FAILED.
    status: str
    #: The accumulated result of the operation, including ``result``, as a Result and as JSON.
    total: Result
    total_text: str
    #: The reason why the value that the task returned cannot be stored; None if this value can be stored.
    error: UsageError | None


def serialize_outcome(
    task: Task, result: Any, accumulated: Result, unchanged_text: str | None = None
) -> SerializedOutcome:
    """Return the outcome of a task from the return value of its last hook.

    :param accumulated: the accumulated result of the operation. If the task succeeded, this function merges the result
        of the task into this object.
    :param unchanged_text: see :func:`add_result`.
    """
    stored, text, error = serializable_result(task, result)
    status = states.final_status(stored)
    return SerializedOutcome(stored, text, status, *add_result(accumulated, stored, status, unchanged_text), error)


def serialize_failure(failed: Result, accumulated: Result, unchanged_text: str | None = None) -> SerializedOutcome:
    """Return the outcome of a task that ended without an attempt, because an exception was raised.

    :param unchanged_text: see :func:`add_result`.
    :raises kser.errors.UsageError: the result has no JSON form.
    """
    text = result_to_json(failed, "a task")
    # The status may be SUCCESS, because the code of an exception may be 0.
    status = states.final_status(failed)
    return SerializedOutcome(failed, text, status, *add_result(accumulated, failed, status, unchanged_text), None)


def serializable_result(task: Task, result: Any) -> tuple[Result, str, UsageError | None]:
    """Return the result that must be stored, its JSON, and the error that prevents the storing of ``result``.

    The error is None if ``result`` can be stored. If ``result`` is no Result or has no JSON form, the result that must
    be stored is a failed result, and the error states the reason.
    """
    try:
        if not isinstance(result, Result):
            raise UsageError(f"a hook of {task!r} returned {result!r} in place of a Result")
        return result, result_to_json(result, task), None
    except UsageError as error:
        failed = failed_result(error, task.uuid)
        return failed, result_to_json(failed, "a failure"), error


def add_result(
    accumulated: Result, result: Result, status: str, unchanged_text: str | None = None
) -> tuple[Result, str]:
    """Add the result of a task to the accumulated result of its operation; return the merged result and its JSON.

    If the task failed, the object ``accumulated`` stays unchanged.

    :param status: status of the task.
    :param unchanged_text: JSON of ``accumulated`` if a failed task does not change the accumulated result of the
        operation, because the operation then chooses its next task. None if a failure is merged.
    """
    if status != states.SUCCESS and unchanged_text is not None:
        return accumulated, unchanged_text
    total = merge(accumulated if status == states.SUCCESS else copy_result(accumulated), result)
    return total, result_to_json(total, total.uuid)


def searchable_metadata(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the searchable metadata of an operation: pairs of a short key and a short scalar value."""
    pairs = [searchable_pair(key, value) for key, value in metadata.items() if not isinstance(value, Mapping | list)]
    return [
        (key, value) for key, value in pairs if len(key) <= MAX_SEARCHABLE_VALUE and len(value) <= MAX_SEARCHABLE_VALUE
    ]


def searchable_pair(key: Any, value: Any) -> tuple[str, str]:
    """Return a metadata key and its value as text, so that a search for ``7`` also matches ``"7"``."""
    return str(key), value if isinstance(value, str) else json.dumps(value)


def json_equal(one: str, other: str) -> bool:
    """Return whether two JSON texts have the same value."""
    # Compare normalised texts and not the decoded objects, because the object NaN is not equal to itself.
    return one == other or _sorted(one) == _sorted(other)


def is_json_object(value: Any) -> bool:
    """Return whether a value is the JSON text of an object."""
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


def _sorted(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)


def check_same_operation(row: OperationRow, entrypoint: str, params: str) -> None:
    """Check that a stored operation has the same entrypoint and params as a new operation with the same uuid.

    :raises kser.errors.StateConflict: the entrypoints or the params differ, or the uuid belongs to a nested operation.
    """
    if row.parent_id is not None:
        raise StateConflict(f"{row.uuid} is the uuid of a nested operation")
    original = json.loads(row.metadata).get(ORIGINAL_PARAMS_KEY)
    if not is_json_object(original):
        original = row.params
    if row.entrypoint != entrypoint or not (json_equal(row.params, params) or json_equal(original, params)):
        raise StateConflict(
            f"the uuid {row.uuid} is taken by a stored {row.entrypoint} with params {row.params}: {entrypoint} with"
            f" params {params} is another operation, and needs a uuid of its own"
        )


def new_operation(
    operation: Operation, mode: str, topic: str, task_topic: str, original_params: str | None = None
) -> NewOperation:
    """Return the row of a new operation, including its tasks and nested operations.

    :param topic: topic for messages about the operation as a whole.
    :param task_topic: topic of each task whose class declares no topic.
    :param original_params: params of the message that the operation was built from, as JSON. kser recognises a
        redelivered message by these params.
    :raises kser.errors.UsageError: a value has no JSON form, or has too many levels for a message.
    :raises kser.errors.LimitExceeded: a uuid is too long, or the metadata have too many keys.
    """
    current_limits().check_message(operation.uuid, operation.metadata)
    built = operation._kser_built is not None or bool(operation.tasks)
    tasks = new_tasks(operation.tasks, mode, task_topic) if built else None
    params, metadata = to_json(operation.params, "params", operation), operation.metadata
    if original_params is not None and not json_equal(original_params, params):
        metadata = {**metadata, ORIGINAL_PARAMS_KEY: original_params}
    done = list(itertools.takewhile(_is_done, operation.tasks))
    total = copy_result(operation.result)
    for task in done:
        total = merge(total, task.result)
    ahead = (tasks or [])[len(done) :]
    first = ahead[0] if ahead and mode == Mode.DISTRIBUTED else None
    path = type(operation).path
    return NewOperation(
        uuid=operation.uuid,
        entrypoint=path,
        mode=mode,
        topic=topic,
        overrides=overrides_of(type(operation)),
        params=params,
        metadata=to_json(metadata, "metadata", operation),
        accumulated=result_to_json(total, operation),
        tasks=tasks,
        labels=searchable_metadata(operation.metadata),
        phase=Phase.BUILD if tasks is None else Phase.RUN_TASK if ahead else Phase.END_SUCCESS,
        target=StepMessage(first.uuid, first.entrypoint, first.topic)
        if first
        else StepMessage(operation.uuid, path, topic),
        step=len(done),
    )


def new_tasks(tasks: Sequence[Task], mode: str, task_topic: str) -> list[NewTask]:
    """Return the rows of an operation's new tasks.

    :param task_topic: topic of each task whose class declares no topic.
    """
    return [_new_task(task, mode, task_topic) for task in tasks]


def _new_task(task: Task, mode: str, task_topic: str) -> NewTask:
    topic = task.TOPIC or task_topic
    current_limits().check_message(task.uuid, task.metadata)
    child = None
    done = _is_done(task)
    if isinstance(task, Operation) and not done:
        # A nested operation starts in the phase BUILD when it becomes the current task, even if its tasks already
        # exist.
        child = replace(new_operation(task, mode, topic, task_topic), phase=Phase.BUILD)
    return NewTask(
        uuid=task.uuid,
        entrypoint=type(task).path,
        topic=topic,
        params=to_json(task.params, "params", task),
        metadata=to_json(task.metadata, "metadata", task),
        # A task that has already run without success starts with a blank result when it runs again.
        result=result_to_json(task.result, task) if done or _has_initial_result(task) else None,
        child=child,
        status=states.SUCCESS if done else states.PENDING,
    )


def _is_done(task: Task) -> bool:
    return task.status == states.SUCCESS


def _has_initial_result(task: Task) -> bool:
    """Return whether a task that has not run yet has an initial result other than the blank result."""
    return task.status == states.PENDING and not task._kser_executed and not _is_blank(task.result)


def _is_blank(result: Result) -> bool:
    return not (result.retcode or result.stdout or result.stderr or result.retval)


class EntrypointLoader:
    """Loader that finds entrypoint classes by path, and builds tasks and operations from their rows.

    :param registry: the registry of the classes.
    """

    def __init__(self, registry: RegistryProtocol) -> None:
        self._registry = registry

    def lookup(self, path: str) -> type[Entrypoint] | None:
        """Return the class that is registered under a path in this process, or None if there is no such class."""
        found: type[Entrypoint] | None = self._registry.controller.ENTRYPOINTS.get(path)
        return found

    def operation(self, row: OperationRow) -> Operation:
        """Build an operation from its row, but without its tasks.

        If its class is not registered in this process or raises an exception, build an :class:`.Operation` with the
        error.
        """
        operation = self._construct(Operation, row, row.result if states.is_final(row.status) else row.accumulated)
        # The class may belong to another registry, which has another database.
        operation._kser_loaded_from = self._registry
        operation.status = row.status
        operation._kser_built = None if row.task_count is None else []
        return operation

    def task(self, row: TaskRow) -> Task:
        """Build a task from its row.

        If its class is not registered in this process or raises an exception, build a :class:`.Task` with the error.
        """
        task = self._construct(Task, row, row.result)
        task.status = row.status
        return task

    def tasks(self, rows: Iterable[TaskRow], children: Iterable[OperationRow] = ()) -> list[Task]:
        """Build the tasks of an operation from their rows.

        :param children: the operation row of each task that is a nested operation.
        """
        by_id = {child.id: child for child in children}
        return [self.task(row) if row.child_id is None else self.operation(by_id[row.child_id]) for row in rows]

    def _construct(self, kind: type[T], row: OperationRow | TaskRow, result: str | None) -> T:
        cls = self.lookup(row.entrypoint)
        if cls is not None and issubclass(cls, kind):
            try:
                return cls.from_Message(_message(row, result))
            except Exception as exc:
                load_error = exc
        else:
            load_error = unknown_entrypoint_error(row.entrypoint)
        instance = kind.from_Message(_message(row, result))
        instance._kser_load_error = load_error
        instance._kser_stored_path = row.entrypoint
        return instance


def unknown_entrypoint_error(entrypoint: str) -> ValidationError:
    """Return the error for an entrypoint that is not registered in this process."""
    return ValidationError(
        f"Entrypoint '{entrypoint}' not registred: import its module in this consumer, or send it to the topic of a"
        " consumer that knows the class",
        extra={"entrypoint": entrypoint},
    )


def _message(row: OperationRow | TaskRow, result: str | None) -> Message:
    return Message(
        uuid=row.uuid,
        entrypoint=row.entrypoint,
        params=json.loads(row.params),
        result=result_from_json(result, row.uuid),
        metadata=json.loads(row.metadata),
    )
