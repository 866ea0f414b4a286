"""Running an operation in the process that has it: its tasks in order, each with the result of those before it.

The registry holds the runner, so that another one can take the place of this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cdumay_result import Result

from kser import status
from kser.delivery import CURRENT, settle
from kser.entry import postpone
from kser.results import copy_result, failure, merge

if TYPE_CHECKING:
    from kser.sequencing.operation import Operation
    from kser.sequencing.task import Task


class Runner(Protocol):
    """What executes operations."""

    def run(self, operation: Operation, result: Result | None) -> Any:
        """Execute ``operation`` to its end.

        :param result: merged into the operation's own before anything else.
        :return: what the operation's ``onsuccess`` or ``onerror`` returned.
        """
        ...


class InProcessRunner:
    """Keeps everything in memory. Run again, an operation goes on at its first task that is not SUCCESS.

    The operation's result starts from what it came with, and the results of its tasks are added in order; each task
    gets a copy of what there is so far (decisions B8 to B11).
    """

    def run(self, operation: Operation, result: Result | None) -> Any:
        prepare(operation, result)
        delivery = CURRENT.get()
        if delivery is not None and delivery.entry is operation and is_distributed(operation):
            # It came as a message where no database is: its tasks send themselves, or it says what is missing.
            return operation.launch_next()
        for task in operation.tasks:
            outcome = task.result if task.status == status.SUCCESS else run_task(task, operation.result, operation.uuid)
            # A task whose onsuccess returned nothing fails here, with the error that 0.8 gives.
            operation.result = operation.result + outcome
            if status.outcome(outcome) != status.SUCCESS:
                return _fail(operation)
        if status.outcome(operation.result) != status.SUCCESS:
            # No task had to run, and what came in was a failure.
            return _fail(operation)
        settle(operation)
        # 0.8 says `None` where no task ran and nothing was forwarded.
        return operation._onsuccess(operation.result if operation.tasks or result else None)


def is_distributed(operation: Operation) -> bool:
    """Whether an operation's class asks to be run over the consumers."""
    # An attribute of that name that means something else is the user's own (decision C18).
    return getattr(type(operation), "DISTRIBUTED", False) is True


def prepare(operation: Operation, result: Result | None) -> None:
    """Make an operation ready to run its tasks.

    :param result: merged into what the operation came with.
    """
    _restart(operation, result)
    operation._prerun()
    if not operation.tasks and operation._kser_built is None:
        operation.build(**operation.params)


def run_task(task: Task, so_far: Result, operation_uuid: str) -> Any:
    """Run a task of an operation; what it raises becomes a failed result.

    :param so_far: the results of the tasks before it; the task gets a copy.
    :return: what the task's ``onsuccess`` or ``onerror`` returned.
    """
    # Whoever wants all of it again sets the tasks back to PENDING.
    if task.status != status.PENDING or task._kser_executed:
        task.result = Result(uuid=task.uuid)
    task._kser_operation_uuid = operation_uuid
    try:
        return task.unsafe_execute(result=copy_result(so_far))
    except Exception as exc:
        settle(task)
        failed = failure(exc, task.uuid)
        answer = postpone(task, failed, exc)
        return task._onerror(failed) if answer is None else answer


def _fail(operation: Operation) -> Any:
    answer = postpone(operation, operation.result)
    return operation._onerror(operation.result) if answer is None else answer


def _restart(operation: Operation, result: Result | None) -> None:
    """Set an operation's result back to what it came with, and merge ``result`` into that."""
    if operation._kser_incoming is None:
        operation._kser_incoming = copy_result(operation.result, uuid=operation.uuid)
        # The message shares this object: its log records show how it ends.
        operation.result.uuid = operation.uuid
    else:
        operation.result = copy_result(operation._kser_incoming)
    operation.result = merge(operation.result, result)
