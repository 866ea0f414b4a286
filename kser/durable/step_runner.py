"""Step runner: runs one step of a stored operation, including the user code in it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from cdumay_result import Result

from kser import status as states
from kser.attempt import Attempt, TaskAttempt, current_attempt, time_limit_of, user_code_guard
from kser.durable.context import DurableContext
from kser.durable.execution_state import ExecutionState, OperationFrame, StepChange
from kser.durable.serialization import new_tasks, serializable_result, serialize_failure, serialize_outcome
from kser.entry import schedule_retry
from kser.errors import StoreError, UsageError
from kser.escaping import escape_lines
from kser.results import failed_result
from kser.retry import Retry
from kser.sequencing.operation import NextTaskChoice, Operation, current_choice
from kser.sequencing.runner import prepare_operation, run_task
from kser.sequencing.task import Task
from kser.store.model import BuiltTasks, Phase

logger = escape_lines(logging.getLogger(__name__))


#: The reply of a step that has no result for the message, because the step built the tasks or chose the next task.
NO_REPLY: Final = object()


class StepOutcome(NamedTuple):
    """Outcome of a step, for the checkpoint and for the message that caused the step."""

    #: The changes of the step.
    change: StepChange
    #: The result to return for the message: the result of the task, or of the operation that ended. :data:`NO_REPLY` if
    #: the step has no such result.
    reply: Any = NO_REPLY
    #: Seconds until the next attempt at the task; None if no retry follows.
    retry_in: float | None = None


@dataclass(frozen=True, slots=True)
class StepRunner:
    """Step runner, which runs the current step and applies the outcome of the step to the execution state.

    :param context: the durable context of this process.
    :param state: the execution state of the operation.
    :param timeout_error: set if an attempt at the current task has timed out and its thread still runs: the timeout
        error of this attempt. Otherwise None.
    """

    context: DurableContext
    state: ExecutionState
    timeout_error: Exception | None = None

    def run_next(self) -> StepOutcome:
        """Run the current step, and return its outcome."""
        failed = self._restore_operations()
        if failed is not None:
            return failed
        self._descend()
        frame = self.state.frames[-1]
        if frame.phase == Phase.BUILD:
            return self._build_operation(frame)
        if frame.phase == Phase.RUN_TASK:
            return self._run_task(frame)
        if frame.phase == Phase.CHOOSE_NEXT:
            return self._choose_next(frame)
        return self._end_operation(frame)

    def fail_step(self, error: Exception) -> StepOutcome:
        """Fail the current step with ``error`` without running the step."""
        frame, task = self.state.frames[-1], self.state.claim.task
        failed = failed_result(error, frame.row.uuid)
        if frame.phase == Phase.RUN_TASK and task is not None:
            change = self.state.on_task_finished(task.uuid, serialize_failure(failed, *_total_of(frame)), 0, 0)
        elif frame.phase in (Phase.BUILD, Phase.CHOOSE_NEXT):
            change = self.state.on_failed(failed)
        else:
            change = self.state.on_ended(states.FAILED, failed)
        return StepOutcome(change, failed)

    # -- objects -------------------------------------------------------------------------------------------------------

    def _restore_operations(self) -> StepOutcome | None:
        """Restore the objects of the operations that continue in this consumer, and call ``_prerun`` of each object.

        :return: None if no object raised an exception. If an object raises an exception, its operation fails, and the
            method returns the outcome of this failed step.
        """
        frames = self.state.frames
        if self.state.distributed or self.timeout_error is not None:
            return None
        for depth, frame in enumerate(frames):
            if frame.operation is None and frame.phase == Phase.RUN_TASK:
                try:
                    with user_code_guard:
                        parent = frames[depth - 1].operation if depth else None
                        if parent is not None:
                            nested: Any = parent.tasks[frames[depth - 1].step]
                            frame.attach(nested)
                        operation = self._load(frame)
                        operation.status = states.PENDING
                        operation._prerun()
                except Exception as exc:
                    del frames[depth + 1 :]
                    return self._fail(frame, exc)
        return None

    def _descend(self) -> None:
        """Append a frame for each nested operation that is a current task, down to the innermost operation."""
        while (frame := self.state.frames[-1]).phase == Phase.RUN_TASK and frame.operation is not None:
            task = frame.operation.tasks[frame.step]
            if not isinstance(task, Operation) or (row := self.context.store.get_operation(task.uuid)) is None:
                break
            self.state.push(row, task)

    def _load(self, frame: OperationFrame) -> Operation:
        """Return the operation object of a frame, with its tasks.

        :raises Exception: the object could not be built, because its class is not registered in this process or raised
            this exception.
        """
        if frame.operation is None:
            frame.attach(self.context.loader.operation(frame.row))
        operation = frame.operation
        assert operation is not None
        if operation._kser_load_error is not None:
            raise operation._kser_load_error
        if not frame.is_loaded:
            rows = self.context.store.get_tasks(frame.row.id)
            nested = any(task.child_id is not None for task in rows)
            children = self.context.store.get_children(frame.row.root_id) if nested else ()
            operation.tasks = self.context.loader.tasks(rows, children)
            frame.attempts = {task.position: (task.attempts, task.attempts_before_resume) for task in rows}
            frame.is_loaded = True
        return operation

    def _fail(self, frame: OperationFrame, exc: Exception) -> StepOutcome:
        logger.error(f"{frame.row.entrypoint}[{frame.row.uuid}] could not be built or advanced: {exc}")
        failed = failed_result(exc, frame.row.uuid)
        return StepOutcome(self.state.on_failed(failed), failed)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _build_operation(self, frame: OperationFrame) -> StepOutcome:
        try:
            with user_code_guard:
                operation = self._load(frame)
                prepare_operation(operation, None)
                built = None
                if frame.task_count is None:
                    topic = self.context.registry.settings.first_topic(frame.row.topic)
                    built = BuiltTasks(frame.row.id, new_tasks(operation.tasks, frame.row.mode, topic))
        except Exception as exc:
            return self._fail(frame, exc)
        frame.accumulated = operation.result
        frame.is_loaded = True
        return StepOutcome(self.state.on_built(built))

    def _run_task(self, frame: OperationFrame) -> StepOutcome:
        task = self._current_task(frame)
        if task.status == states.SUCCESS:
            # The task had succeeded before the operation was stored, so record the task's result without an attempt.
            return self._finish_task(frame, task, task.result)
        recorded, not_counted = frame.attempts.get(frame.step, (0, 0))
        number = recorded + 1
        outer = current_attempt.get()
        owner = self.context.loader.lookup(frame.row.entrypoint) or Operation
        attempt = TaskAttempt(outer, task, number, _retry_policy(owner, outer), frame.row.uuid, self._is_cancelled)
        attempt.attempts_not_counted = not_counted
        if outer is not None:
            outer.restart_timer(time_limit_of(type(task)) or time_limit_of(owner))
        started_at = time.monotonic()
        token = current_attempt.set(attempt)
        try:
            result = self._attempt_task(task, frame)
        finally:
            current_attempt.reset(token)
            if outer is not None:
                outer.time_limit = None
        duration = time.monotonic() - started_at
        if attempt.retry_in is not None:
            change = self.state.on_task_retried(task.uuid, result.stderr, number, duration)
            return StepOutcome(change, retry_in=attempt.retry_in)
        return self._finish_task(frame, task, result, number, duration)

    def _finish_task(
        self, frame: OperationFrame, task: Task, result: Any, number: int = 0, duration: float = 0
    ) -> StepOutcome:
        outcome = serialize_outcome(task, result, *_total_of(frame))
        _log_unserializable(task, outcome.error)
        return StepOutcome(self.state.on_task_finished(task.uuid, outcome, number, duration), outcome.result)

    def _current_task(self, frame: OperationFrame) -> Task:
        if frame.operation is not None:
            return frame.operation.tasks[frame.step]
        row = self.state.claim.task
        assert row is not None, "a task is current, so it was claimed"
        frame.attempts[row.position] = row.attempts, row.attempts_before_resume
        return self.context.loader.task(row)

    def _attempt_task(self, task: Task, frame: OperationFrame) -> Any:
        try:
            with user_code_guard:
                error = self.timeout_error or task._kser_load_error
                if error is not None:
                    raise error
                return run_task(task, frame.accumulated, frame.row.uuid)
        except Exception as exc:
            failed = failed_result(exc, task.uuid)
            retried = schedule_retry(task, failed, exc)
            return task._onerror(failed) if retried is None else retried

    def _is_cancelled(self) -> bool:
        row = self.context.store.get_operation(self.state.claim.root.uuid)
        return row is not None and (row.cancel_requested or row.epoch != self.state.claim.epoch)

    def _choose_next(self, frame: OperationFrame) -> StepOutcome:
        choice = NextTaskChoice(frame.row.uuid)
        token = current_choice.set(choice)
        try:
            with user_code_guard:
                operation = self._load(frame)
                task = operation.tasks[frame.step]
                operation.launch_next(task=task, result=task.result)
                if not choice.is_made:
                    raise StoreError(f"launch_next of {type(operation).path} chose neither a next task nor the end")
                following = None if choice.next_task is None else _position(operation, choice.next_task)
        except Exception as exc:
            return self._fail(frame, exc)
        else:
            return StepOutcome(self.state.on_next_chosen(following, task.result if choice.is_failed else None))
        finally:
            current_choice.reset(token)

    def _end_operation(self, frame: OperationFrame) -> StepOutcome:
        status = states.SUCCESS if frame.phase == Phase.END_SUCCESS else states.FAILED
        try:
            with user_code_guard:
                operation = self._load(frame)
                operation.result = frame.outcome
        except Exception as exc:
            failed = failed_result(exc, frame.row.uuid)
            return StepOutcome(self.state.on_ended(states.FAILED, failed), failed)
        try:
            with user_code_guard:
                hook = operation._onsuccess if status == states.SUCCESS else operation._onerror
                returned = hook(operation.result)
        except Exception as exc:
            status = states.FAILED
            returned = operation._onerror(failed_result(exc, frame.row.uuid))
        final = returned if isinstance(returned, Result) else operation.result
        result, text, error = serializable_result(operation, final)
        _log_unserializable(operation, error)
        if states.final_status(result) != states.SUCCESS:
            status = states.FAILED
        operation.status = status
        return StepOutcome(self.state.on_ended(status, result, text), returned)


def _log_unserializable(task: Task, error: UsageError | None) -> None:
    """Log the error if the result of a task cannot be stored."""
    if error is not None:
        logger.error(f"{type(task).path}[{task.uuid}]: {error.message}")


def _total_of(frame: OperationFrame) -> tuple[Result, str | None]:
    """Return the accumulated result of an operation, and its JSON if a failed task does not change the result."""
    return frame.accumulated, frame.accumulated_json if frame.chooses_next else None


def _position(operation: Operation, chosen: Task) -> int:
    for position, task in enumerate(operation.tasks):
        if str(task.uuid) == str(chosen.uuid):
            return position
    raise UsageError(f"{type(operation).path} chose {chosen!r} as the next task, which is no task of {operation!r}")


def _retry_policy(owner: type, outer: Attempt | None) -> Retry | None:
    """Return the retry policy for tasks whose class declares no policy.

    It is the policy of the operation's class or, if this class declares none, the policy of the consumer.
    """
    declared = getattr(owner, "RETRY", None)
    if isinstance(declared, Retry):
        return declared
    return None if outer is None else outer.retry
