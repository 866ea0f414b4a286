"""Operations and tasks as rows of a store, and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import status as states
from kser.entry import Entrypoint
from kser.errors import UsageError
from kser.results import copy_result, merge
from kser.schemas import GIVEN, Message, dump_result
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.store.rows import DISTRIBUTED, END_SUCCESS, START, TASK, NewOperation, NewTask, OperationRow, Target, TaskRow

#: What a class overrides, as bits: what is called at the end, and what chooses the next task.
ENDS: Final = 1
CHOOSES: Final = 2

_ENDS = ("onsuccess", "onerror", "_onsuccess", "_onerror", "set_status", "_set_status")
_CHOOSES = ("next", "launch_next", "set_status")

#: Characters of metadata that operations are found by; longer values are kept, but not found.
LABEL_LIMIT: Final = 200

Made = TypeVar("Made", bound=Task)


def hooks_of(cls: type) -> int:
    """What a class of operations overrides: bits of :data:`ENDS` and :data:`CHOOSES`."""

    def overrides(names: Iterable[str]) -> bool:
        return any(getattr(cls, name, None) is not getattr(Operation, name) for name in names)

    return ENDS * overrides(_ENDS) | CHOOSES * overrides(_CHOOSES)


def to_json(value: Any, what: str, owner: object) -> str:
    """A value as the JSON text of the wire.

    :param what: what it is, and of what, for the error.
    :raises kser.errors.UsageError: it has no JSON form.
    """
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{what} of {owner!r} cannot be stored: {error}; only what JSON can express is stored and sent"
        ) from error


def result_to_json(result: Result, owner: object) -> str:
    """A result as JSON text.

    :raises kser.errors.UsageError: it has no JSON form.
    """
    return to_json(dump_result(result), "the result", owner)


def result_from_json(text: str | None, uuid: str) -> Result:
    """The result of :func:`result_to_json`; a blank one of that uuid for None."""
    return Result(uuid=uuid) if text is None else Result(**json.loads(text))


def labels_of(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an operation is found by: its metadata, as far as it is short."""
    found = [label_of(key, value) for key, value in metadata.items() if not isinstance(value, Mapping | list)]
    return [(key, value) for key, value in found if len(key) <= LABEL_LIMIT and len(value) <= LABEL_LIMIT]


def label_of(key: Any, value: Any) -> tuple[str, str]:
    """One key of metadata, and its value as text: ``7`` and ``"7"`` are found alike."""
    return str(key), value if isinstance(value, str) else json.dumps(value)


def same_json(one: str, other: str) -> bool:
    """Whether two JSON texts say the same."""
    # Not compared as objects: there, NaN differs from itself.
    return one == other or _sorted(one) == _sorted(other)


def _sorted(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)


def new_operation(
    operation: Operation, mode: str, topic: str, topic_of: Callable[[Task], str], given: str | None = None
) -> NewOperation:
    """An operation with everything in it, to be stored.

    :param topic: where what concerns the whole operation is sent.
    :param topic_of: where a task is sent.
    :param given: JSON of the params of the message that brought it, which is known again by them.
    :raises kser.errors.UsageError: something in it has no JSON form.
    """
    built = operation._kser_built is not None or bool(operation.tasks)
    tasks = new_tasks(operation.tasks, mode, topic_of) if built else None
    params, metadata = to_json(operation.params, "params", operation), operation.metadata
    if given is not None and not same_json(given, params):
        metadata = {**metadata, GIVEN: given}
    done = list(itertools.takewhile(_is_done, operation.tasks))
    total = copy_result(operation.result)
    for task in done:
        total = merge(total, task.result)
    ahead = (tasks or [])[len(done) :]
    first = ahead[0] if ahead and mode == DISTRIBUTED else None
    return NewOperation(
        uuid=operation.uuid,
        entrypoint=type(operation).path,
        mode=mode,
        topic=topic,
        hooks=hooks_of(type(operation)),
        params=params,
        metadata=to_json(metadata, "metadata", operation),
        so_far=result_to_json(total, operation),
        tasks=tasks,
        labels=labels_of(operation.metadata),
        phase=START if tasks is None else TASK if ahead else END_SUCCESS,
        target=Target(first.uuid, first.entrypoint, first.topic)
        if first
        else Target(operation.uuid, type(operation).path, topic),
        step=len(done),
    )


def new_tasks(tasks: Sequence[Task], mode: str, topic_of: Callable[[Task], str]) -> list[NewTask]:
    """The tasks of an operation, to be stored."""
    return [_new_task(task, mode, topic_of) for task in tasks]


def _new_task(task: Task, mode: str, topic_of: Callable[[Task], str]) -> NewTask:
    topic = topic_of(task)
    child = None
    done = _is_done(task)
    if isinstance(task, Operation) and not done:
        # It is begun when its turn comes, also when its tasks are there already.
        child = new_operation(task, mode, topic, topic_of)._replace(phase=START)
    return NewTask(
        uuid=task.uuid,
        entrypoint=type(task).path,
        topic=topic,
        params=to_json(task.params, "params", task),
        metadata=to_json(task.metadata, "metadata", task),
        # What has run before, and is to run again, begins with a blank one.
        result=result_to_json(task.result, task) if done or _brings(task) else None,
        child=child,
        status=states.SUCCESS if done else states.PENDING,
    )


def _is_done(task: Task) -> bool:
    return task.status == states.SUCCESS


def _brings(task: Task) -> bool:
    """Whether a task comes with a result of its own."""
    return task.status == states.PENDING and not task._kser_executed and not _is_blank(task.result)


def _is_blank(result: Result) -> bool:
    return not (result.retcode or result.stdout or result.stderr or result.retval)


class ClassFinder:
    """Classes by the path that rows name them by, and objects of them.

    :param find: finds one; None for one that is not known here.
    """

    def __init__(self, find: Callable[[str], type[Entrypoint] | None]) -> None:
        self.find = find

    def operation(self, row: OperationRow) -> Operation:
        """An operation from its row, without its tasks; a plain one, which cannot run, where that is impossible."""
        operation = self._make(Operation, row, row.result if states.is_final(row.status) else row.so_far)
        operation.status = row.status
        operation._kser_built = None if row.size is None else []
        return operation

    def task(self, row: TaskRow) -> Task:
        """A task from its row; a plain one, which cannot run, where that is impossible."""
        task = self._make(Task, row, row.result)
        task.status = row.status
        return task

    def tasks(self, rows: Iterable[TaskRow], children: Iterable[OperationRow] = ()) -> list[Task]:
        """The tasks of an operation.

        :param children: the operations among them.
        """
        by_id = {child.id: child for child in children}
        return [self.task(row) if row.child_id is None else self.operation(by_id[row.child_id]) for row in rows]

    def _make(self, kind: type[Made], row: OperationRow | TaskRow, result: str | None) -> Made:
        cls = self.find(row.entrypoint)
        if cls is not None and issubclass(cls, kind):
            try:
                return cls.from_Message(_message(row, result))
            except Exception as exc:
                unfit = exc
        else:
            unfit = unknown(row.entrypoint)
        made = kind.from_Message(_message(row, result))
        made._kser_unfit = unfit
        return made


def unknown(entrypoint: str) -> ValidationError:
    """Why an object whose class is not known here cannot run."""
    return ValidationError(
        f"Entrypoint '{entrypoint}' not registred: import its module in this consumer, or send it to the topic of one"
        " that knows it",
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
