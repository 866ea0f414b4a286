"""Step runner: runs one step of a stored operation, including the user code in it."""

from __future__ import annotations

import logging
import time
from typing import Any

from cdumay_result import Result

from kser import status as states
from kser.controller import user_code_guard
from kser.delivery import Attempt, current_attempt, time_limit_of
from kser.entry import schedule_retry
from kser.errors import StoreError, UsageError
from kser.results import failed_result
from kser.retry import Retry
from kser.sequencing.handover import CHOICE, Choice, StepDelivery
from kser.sequencing.means import Means
from kser.sequencing.operation import Operation
from kser.sequencing.runner import prepare, run_task
from kser.sequencing.stored import new_tasks, result_to_json
from kser.sequencing.task import Task
from kser.sequencing.track import Frame, Track
from kser.store.rows import END_SUCCESS, NEXT, START, TASK, Built

logger = logging.getLogger(__name__)


class Steps:
    """Step runner: runs the current step and updates the execution state with its outcome.

    :param means: the durable context of this process.
    :param track: the execution state of the operation.
    :param timeout_error: the error of a timed-out attempt at the current task, in which another thread is still stuck.
    """

    def __init__(self, means: Means, track: Track, verdict: Exception | None = None) -> None:
        self._means = means
        self._track = track
        self._verdict = verdict
        #: Outcome of the last task or end of an operation; the result of the message.
        self.answer: Any = None
        #: Seconds until the next attempt at the task; None without a retry.
        self.delay: float | None = None

    def take(self) -> None:
        """Run the next step."""
        if not self._take_up():
            return
        self._go_in()
        frame = self._track.top
        if frame.phase == START:
            self._begin(frame)
        elif frame.phase == TASK:
            self._run(frame)
        elif frame.phase == NEXT:
            self._choose(frame)
        else:
            self._end(frame)

    def give_up(self, error: Exception) -> None:
        """Fail the current step without running it."""
        frame, task = self._track.top, self._track.claim.task
        failed = failed_result(error, frame.row.uuid)
        self.answer = failed
        if frame.phase == TASK and task is not None:
            self._track.ran(task.uuid, failed, result_to_json(failed, "a task"), 0, 0)
        elif frame.phase in (START, NEXT):
            self._track.failed(failed)
        else:
            self._track.end(states.FAILED, failed)

    # -- objects -------------------------------------------------------------------------------------------------------

    def _take_up(self) -> bool:
        """Restore the objects of operations that continue in this consumer, and call their prerun triggers.

        :return: False if one of them raised; that operation has failed.
        """
        if self._track.distributed or self._verdict is not None:
            return True
        for depth, frame in enumerate(self._track.frames):
            if frame.operation is None and frame.phase == TASK:
                try:
                    with user_code_guard:
                        parent = self._track.frames[depth - 1].operation if depth else None
                        self.adopt(frame, None if parent is None else parent.tasks[self._track.frames[depth - 1].step])
                        operation = self._load(frame)
                        operation.status = states.PENDING
                        operation._prerun()
                except Exception as exc:
                    del self._track.frames[depth + 1 :]
                    self._fail(frame, exc)
                    return False
        return True

    def _go_in(self) -> None:
        """Descend to the innermost operation that is current."""
        while (frame := self._track.top).phase == TASK and frame.operation is not None:
            task = frame.operation.tasks[frame.step]
            row = None
            if isinstance(task, Operation):
                row = self._means.patience.call(lambda uuid=task.uuid: self._means.store.peek(uuid))  # type: ignore[misc]
            if row is None:
                break
            self.adopt(self._track.enter(row), task)

    def adopt(self, frame: Frame, operation: Any = None) -> None:
        """Attach an operation object to a frame."""
        if operation is not None:
            frame.operation = operation
            frame.loaded = bool(operation.tasks) or frame.size is None
            if frame.phase == TASK:
                frame.total = operation.result

    def _load(self, frame: Frame) -> Operation:
        """Return the operation object of a frame, with its tasks.

        :raises Exception: the object could not be built: its class is not registered here, or raised.
        """
        if frame.operation is None:
            self.adopt(frame, self._means.classes.operation(frame.row))
        operation = frame.operation
        assert operation is not None
        if operation._kser_load_error is not None:
            raise operation._kser_load_error
        if not frame.loaded:
            store, row = self._means.store, frame.row
            rows = self._means.patience.call(lambda: store.tasks(row.id))
            children = ()
            if any(task.child_id is not None for task in rows):
                children = self._means.patience.call(lambda: store.children(row.root_id))  # type: ignore[assignment]
            operation.tasks = self._means.classes.tasks(rows, children)
            frame.attempts = {task.position: (task.attempts, task.resumed_after) for task in rows}
            frame.loaded = True
        return operation

    def _fail(self, frame: Frame, exc: Exception) -> None:
        logger.error(f"{frame.row.entrypoint}[{frame.row.uuid}] could not be built or advanced: {exc}")
        self.answer = failed_result(exc, frame.row.uuid)
        self._track.failed(self.answer)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _begin(self, frame: Frame) -> None:
        try:
            with user_code_guard:
                operation = self._load(frame)
                prepare(operation, None)
                built = None
                if frame.size is None:
                    tasks = new_tasks(operation.tasks, frame.row.mode, self._means.topic_finder(frame.row.topic))
                    built = Built(frame.row.id, tasks)
        except Exception as exc:
            self._fail(frame, exc)
            return
        frame.total = operation.result
        frame.loaded = True
        self._track.begun(built)

    def _run(self, frame: Frame) -> None:
        task = self._task(frame)
        if task.status == states.SUCCESS:
            # The task was done before the operation was stored, so record its result without an attempt.
            self.answer, text = storable(task, task.result)
            self._track.ran(task.uuid, self.answer, text, 0, 0)
            return
        recorded, forgiven = frame.attempts.get(frame.step, (0, 0))
        number = recorded + 1
        outer = current_attempt.get()
        owner = self._means.classes.find(frame.row.entrypoint) or Operation
        step = StepDelivery(outer, task, number, _policy(owner, outer), frame.row.uuid, self._is_cancelled)
        step.attempts_not_counted = forgiven
        if outer is not None:
            outer.restart_timer(time_limit_of(type(task)) or time_limit_of(owner))
        began = time.monotonic()
        before = current_attempt.set(step)
        try:
            result = self._attempt(task, frame)
        finally:
            current_attempt.reset(before)
            if outer is not None:
                outer.time_limit = None
        duration = time.monotonic() - began
        if step.retry_in is not None:
            self.delay = step.retry_in
            self._track.retried(task.uuid, result.stderr, number, duration)
            return
        self.answer, text = storable(task, result)
        self._track.ran(task.uuid, self.answer, text, number, duration)

    def _task(self, frame: Frame) -> Task:
        if frame.operation is not None:
            return frame.operation.tasks[frame.step]
        row = self._track.claim.task
        assert row is not None, "a task is current, so it was claimed"
        frame.attempts[row.position] = row.attempts, row.resumed_after
        return self._means.classes.task(row)

    def _attempt(self, task: Task, frame: Frame) -> Any:
        try:
            with user_code_guard:
                unfit = self._verdict or task._kser_load_error
                if unfit is not None:
                    raise unfit
                return run_task(task, frame.total, frame.row.uuid)
        except Exception as exc:
            failed = failed_result(exc, task.uuid)
            answer = schedule_retry(task, failed, exc)
            return task._onerror(failed) if answer is None else answer

    def _is_cancelled(self) -> bool:
        row = self._means.patience.call(lambda: self._means.store.peek(self._track.claim.root.uuid))
        return row is not None and (row.cancel_requested or row.epoch != self._track.claim.epoch)

    def _choose(self, frame: Frame) -> None:
        choice = Choice(frame.row.uuid)
        before = CHOICE.set(choice)
        try:
            with user_code_guard:
                operation = self._load(frame)
                task = operation.tasks[frame.step]
                operation.launch_next(task=task, result=task.result)
                if not choice.made:
                    raise StoreError(f"launch_next of {type(operation).path} chose neither a next task nor the end")
                following = None if choice.following is None else _position(operation, choice.following)
        except Exception as exc:
            self._fail(frame, exc)
        else:
            self._track.chose(following, task.result if choice.failed else None)
        finally:
            CHOICE.reset(before)

    def _end(self, frame: Frame) -> None:
        status = frame.phase
        try:
            with user_code_guard:
                operation = self._load(frame)
                operation.result = frame.outcome
        except Exception as exc:
            self.answer = failed_result(exc, frame.row.uuid)
            self._track.end(states.FAILED, self.answer)
            return
        try:
            with user_code_guard:
                hook = operation._onsuccess if status == END_SUCCESS else operation._onerror
                returned = hook(operation.result)
        except Exception as exc:
            status = states.FAILED
            returned = operation._onerror(failed_result(exc, frame.row.uuid))
        result, _ = storable(operation, returned if isinstance(returned, Result) else operation.result)
        if states.final_status(result) != states.SUCCESS:
            status = states.FAILED
        operation.status = status
        self.answer = returned
        self._track.end(status, result)


def storable(task: Task, result: Any) -> tuple[Result, str]:
    """Return a result and its JSON; a failed result if the value is not a Result or has no JSON form."""
    try:
        if not isinstance(result, Result):
            raise UsageError(f"a hook of {task!r} returned {result!r} in place of a Result")
        return result, result_to_json(result, task)
    except UsageError as error:
        logger.error(f"{type(task).path}[{task.uuid}]: {error.message}")
        failed = failed_result(error, task.uuid)
        return failed, result_to_json(failed, "a failure")


def _position(operation: Operation, chosen: Task) -> int:
    for position, task in enumerate(operation.tasks):
        if str(task.uuid) == str(chosen.uuid):
            return position
    raise UsageError(f"{type(operation).path} chose {chosen!r} as the next task, which is no task of {operation!r}")


def _policy(owner: type, outer: Attempt | None) -> Retry | None:
    """Return the retry policy for tasks whose class declares none: that of the operation, or of the consumer."""
    declared = getattr(owner, "RETRY", None)
    if isinstance(declared, Retry):
        return declared
    return None if outer is None else outer.retry
