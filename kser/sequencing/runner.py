"""Runner that executes operations in memory.

The runner runs all tasks of an operation in order in one process. Each task receives the results of the tasks before
it.

The attribute ``runner`` of the registry holds the runner for operations that are not stored. You can set this attribute
to another runner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cdumay_result import Result

from kser import status
from kser.attempt import current_attempt, raise_if_decided
from kser.entry import schedule_retry
from kser.results import copy_result, failed_result, merge

if TYPE_CHECKING:
    from kser.sequencing.operation import Operation
    from kser.sequencing.task import Task


class Runner(Protocol):
    """Interface of the runners that execute operations."""

    def run(self, operation: Operation, result: Result | None) -> Any:
        """Execute ``operation`` to its end.

        :param result: a result to merge into the operation's result before the first task runs.
        :return: the return value of the operation's ``onsuccess`` or ``onerror``.
        """
        ...


class InMemoryRunner:
    """Runner that uses no database. A second run of an operation starts at its first task that has not succeeded.

    The operation's result starts as its initial result, and the runner adds the results of the tasks in order. Each
    task gets a copy of the accumulated result (decisions B8 to B11).
    """

    def run(self, operation: Operation, result: Result | None) -> Any:
        prepare_operation(operation, result)
        attempt = current_attempt.get()
        if attempt is not None and attempt.entry is operation and is_distributed(operation):
            # A distributed operation arrived as a message and there is no database. In this case, only tasks that
            # override send() can be sent. For other tasks, launch_next() raises StoreMissing.
            return operation.launch_next()
        for task in operation.tasks:
            outcome = task.result if task.status == status.SUCCESS else run_task(task, operation.result, operation.uuid)
            # If a task's onsuccess returned None, this addition raises the same error as in kser 0.8.
            operation.result = operation.result + outcome
            if status.final_status(outcome) != status.SUCCESS:
                return _fail_operation(operation)
        if status.final_status(operation.result) != status.SUCCESS:
            # No task failed, but the initial result is a failure, so the operation fails.
            return _fail_operation(operation)
        raise_if_decided(operation)
        # If there are no tasks and no forwarded result, the log line Success shows `None`, as in kser 0.8.
        return operation._onsuccess(operation.result if operation.tasks or result else None)


def is_distributed(operation: Operation) -> bool:
    """Return whether an operation is distributed, that is, whether kser sends a message for each of its tasks."""
    # Only the value True counts, because a user's class may have its own attribute with this name (decision C18).
    return getattr(type(operation), "DISTRIBUTED", False) is True


def prepare_operation(operation: Operation, result: Result | None) -> None:
    """Reset the result of an operation, call its ``_prerun``, and build its tasks if they were never built.

    :param result: a result to merge into the initial result of the operation.
    """
    _reset_result(operation, result)
    operation._prerun()
    if not operation.tasks and operation._kser_built is None:
        operation.build(**operation.params)


def run_task(task: Task, accumulated: Result, operation_uuid: str) -> Any:
    """Run a task of an operation, and turn an exception into a failed result.

    :param accumulated: the accumulated result of the earlier tasks; the task gets a copy.
    :return: the return value of the task's ``onsuccess`` or ``onerror``.
    """
    # A task that has run before starts with a blank result. The status alone does not show whether a task has run,
    # because users set tasks back to PENDING to run the whole operation again.
    if task.status != status.PENDING or task._kser_executed:
        task.result = Result(uuid=task.uuid)
    task._kser_operation_uuid = operation_uuid
    try:
        return task.unsafe_execute(result=copy_result(accumulated))
    except Exception as exc:
        raise_if_decided(task)
        failed = failed_result(exc, task.uuid)
        retried = schedule_retry(task, failed, exc)
        return task._onerror(failed) if retried is None else retried


def _fail_operation(operation: Operation) -> Any:
    retried = schedule_retry(operation, operation.result)
    return operation._onerror(operation.result) if retried is None else retried


def _reset_result(operation: Operation, result: Result | None) -> None:
    """Reset an operation's result to its initial result, and merge ``result`` into it."""
    if operation._kser_initial_result is None:
        operation._kser_initial_result = copy_result(operation.result, uuid=operation.uuid)
        # The result must have the uuid of the operation. Change the uuid in place and do not create another Result,
        # because the message refers to this Result, and the controller logs the message after the run.
        operation.result.uuid = operation.uuid
    else:
        operation.result = copy_result(operation._kser_initial_result)
    operation.result = merge(operation.result, result)
