"""Execution state of a stored operation: a state machine that uses no database and runs no user code.

The execution state has one *frame* for each operation on the path from the root operation to the current operation. A
frame contains the position, the status and the results of its operation, and the operation object if it exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cdumay_result import Result

from kser import status as states
from kser.durable.serialization import (
    CHOOSES,
    ENDS,
    SerializedOutcome,
    add_result,
    result_from_json,
    result_to_json,
)
from kser.results import copy_result, merge
from kser.store.model import (
    BuiltTasks,
    Checkpoint,
    Claim,
    Mode,
    NewEvent,
    OperationRow,
    OperationUpdate,
    Phase,
    TaskOutcome,
)
from kser.store.transitions import entrypoints_json

if TYPE_CHECKING:
    from kser.sequencing.operation import Operation
    from kser.sequencing.task import Task


class OperationFrame:
    """Frame: the state of one operation on the path from the root operation to the current operation.

    :param row: the stored row of the operation.
    :param operation: the operation object, if the object already exists.
    """

    def __init__(self, row: OperationRow, operation: Operation | None = None) -> None:
        self.row = row
        self.phase = self.stored_phase = row.phase
        self.status = row.status
        self.step = self.stored_step = row.step
        self.task_count = row.task_count
        #: Accumulated result of the operation, as JSON and as a Result.
        self.accumulated_json = row.accumulated
        self.accumulated: Result
        #: JSON of the final result; None while the final result is not known.
        self.result = row.result
        #: ``operation`` is the operation object, or None if it was not built. ``is_loaded`` is True if this object has
        #: its tasks.
        self.operation: Operation | None = None
        self.is_loaded = False
        #: True if the operation itself chooses the next task after each task.
        self.chooses_next = row.mode == Mode.DISTRIBUTED and bool(row.overrides & CHOOSES)
        #: For the position of each task: the number of recorded attempts, and the number of attempts before the last
        #: resume. A retry policy does not count the attempts before the resume.
        self.attempts: dict[int, tuple[int, int]] = {}
        if operation is None or row.phase != Phase.RUN_TASK:
            self.accumulated = result_from_json(row.accumulated, row.uuid)
        if operation is not None:
            self.attach(operation)

    def attach(self, operation: Operation) -> None:
        """Attach the operation object to the frame."""
        self.operation = operation
        self.is_loaded = bool(operation.tasks) or self.task_count is None
        if self.phase == Phase.RUN_TASK:
            self.accumulated = operation.result

    @property
    def outcome(self) -> Result:
        """Final result of the operation, or the accumulated result while there is no final result."""
        return self.accumulated if self.result is None else result_from_json(self.result, self.row.uuid)

    def to_update(self) -> OperationUpdate:
        """Return the update that writes the state of the frame to the operation's row."""
        stored = self.stored_step, self.stored_phase
        return OperationUpdate(
            self.row.id, *stored, self.step, self.phase, self.status, self.accumulated_json, self.result
        )


class StepChange(NamedTuple):
    """The changes of one step."""

    #: The checkpoint that records the step. It keeps the claim; the caller changes this if the claim must be released.
    checkpoint: Checkpoint
    #: Frames of the operations that ended in this step and whose classes override no hook for the end; the innermost
    #: operation is first. The end of an operation with such a hook is a step of its own.
    ended: Sequence[OperationFrame]
    #: True if the root has ended.
    is_finished: bool


class ExecutionState:
    """Execution state under a claim: the frames from the root operation to the current operation.

    Each method ``on_…`` applies the outcome of one step, and returns the changes of this step.

    :param claim: the claim.
    :param consumer: owner name of this process, for the checkpoints.
    :param operation: the object of the root operation, if the object already exists.
    """

    def __init__(self, claim: Claim, consumer: str, operation: Operation | None = None) -> None:
        root, *nested = claim.path
        self.claim = claim
        self.distributed = root.mode == Mode.DISTRIBUTED
        self.root = OperationFrame(root, operation)
        #: The frames from the root operation to the current operation; the last frame is that of the current operation.
        self.frames = [self.root, *map(OperationFrame, nested)]
        self._consumer = consumer
        self._start_step()

    def _start_step(self) -> None:
        self._updates: dict[int, OperationFrame] = {}
        self._outcomes: list[TaskOutcome] = []
        self._events: list[NewEvent] = []
        self._built: BuiltTasks | None = None
        self._ended: list[OperationFrame] = []

    def push(self, row: OperationRow, operation: Operation) -> None:
        """Append a frame for the nested operation that is the current task."""
        self.frames.append(OperationFrame(row, operation))

    # -- outcome of the step -------------------------------------------------------------------------------------------

    def on_built(self, built: BuiltTasks | None) -> StepChange:
        """Start the current operation, whose tasks are ready to run.

        :param built: the tasks that this step has built; None if the tasks existed before this step.
        """
        frame = self.frames[-1]
        if built is not None:
            self._built = built
            frame.task_count = len(built.tasks)
            self._events.append(NewEvent("built", frame.row.uuid, f"{frame.task_count} task(s)"))
        frame.status = states.RUNNING
        if frame.phase == Phase.BUILD and len(self.frames) > 1:
            # A nested operation starts with the accumulated result of its parent, like any other task of the parent.
            parent = copy_result(self.frames[-2].accumulated)
            frame.accumulated, frame.accumulated_json = add_result(frame.accumulated, parent, states.SUCCESS)
        self._advance(frame, frame.step)
        return self._end_step()

    def on_task_finished(self, uuid: str, outcome: SerializedOutcome, number: int, duration: float) -> StepChange:
        """Finish the current task with the outcome of its last attempt.

        :param uuid: uuid of the task.
        :param number: number of the attempt; 0 if there was no attempt.
        :param duration: duration of the attempt in seconds.
        """
        frame, result, status = self.frames[-1], outcome.result, outcome.status
        failed = status != states.SUCCESS
        error = (result.stderr or f"return code {result.retcode}") if failed else None
        self._outcomes.append(TaskOutcome(frame.row.id, frame.step, number, status, outcome.text, duration, error))
        self._events.append(NewEvent("task-failed" if failed else "task-succeeded", uuid, error))
        self._end_task(frame, status, outcome.total, outcome.total_text)
        return self._end_step()

    def on_task_retried(self, uuid: str, error: str, number: int, duration: float) -> StepChange:
        """Record a failed attempt at the current task, after which a retry follows."""
        frame = self.frames[-1]
        self._outcomes.append(TaskOutcome(frame.row.id, frame.step, number, states.PENDING, None, duration, error))
        self._events.append(NewEvent("task-retried", uuid, error))
        self._updates.setdefault(frame.row.id, frame)
        return self._end_step()

    def on_next_chosen(self, step: int | None, failure: Result | None) -> StepChange:
        """Advance to the next task that the operation has chosen, or end the operation.

        :param step: position of the next task; None if the operation ends.
        :param failure: the failed result if the operation fails, else None.
        """
        frame = self.frames[-1]
        self._events.append(NewEvent("moved", frame.row.uuid, "to the end" if step is None else f"to task {step}"))
        if failure is not None:
            self._finish(frame, states.FAILED, merge(copy_result(frame.accumulated), failure))
        else:
            self._advance(frame, frame.task_count or 0 if step is None else step)
        return self._end_step()

    def on_failed(self, failure: Result) -> StepChange:
        """Fail the current operation, which could not be built, restored or advanced."""
        frame = self.frames[-1]
        self._finish(frame, states.FAILED, merge(copy_result(frame.accumulated), failure))
        return self._end_step()

    def on_ended(self, status: str, result: Result, text: str | None = None) -> StepChange:
        """End the current operation. If this operation is nested, also end the corresponding task of its parent.

        :param text: ``result`` as JSON, or None if the caller has no JSON of the result.
        """
        self._end_operation(status, result, text)
        return self._end_step()

    def _end_operation(self, status: str, result: Result, text: str | None) -> None:
        frame = self.frames[-1]
        frame.status = frame.phase = status
        frame.result = result_to_json(result, frame.row.entrypoint) if text is None else text
        self._updates[frame.row.id] = frame
        if frame is self.root:
            self._events.append(NewEvent("ended", text=status))
            return
        self.frames.pop()
        parent = self.frames[-1]
        # The attempt number 0 means that the store adds no attempt row, because the store records no attempts for
        # nested operations.
        error = result.stderr if status == states.FAILED else None
        self._outcomes.append(TaskOutcome(parent.row.id, parent.step, 0, status, frame.result, 0, error))
        unchanged = parent.accumulated_json if parent.chooses_next else None
        self._end_task(parent, status, *add_result(parent.accumulated, result, status, unchanged))

    def _end_task(self, frame: OperationFrame, status: str, total: Result, total_text: str) -> None:
        """Apply the end of a task to its operation: choose the next task, advance to the next task, or finish the
        operation.

        :param total: the accumulated result of the operation, including the result of the task.
        :param total_text: ``total`` as JSON.
        """
        if status == states.SUCCESS:
            frame.accumulated, frame.accumulated_json = total, total_text
        if frame.chooses_next:
            frame.phase = Phase.CHOOSE_NEXT
            self._updates[frame.row.id] = frame
        elif status == states.SUCCESS:
            self._advance(frame, frame.step + 1, total_text)
        else:
            self._finish(frame, states.FAILED, total, total_text)

    def _advance(self, frame: OperationFrame, step: int, accumulated_text: str | None = None) -> None:
        frame.step = step
        self._updates[frame.row.id] = frame
        if step < (frame.task_count or 0):
            frame.phase = Phase.RUN_TASK
        else:
            # The outcome may be a failure although no task failed, because the initial result may be a failed result.
            self._finish(frame, states.final_status(frame.accumulated), frame.accumulated, accumulated_text)

    def _finish(self, frame: OperationFrame, status: str, result: Result, text: str | None = None) -> None:
        self._updates[frame.row.id] = frame
        if frame.row.overrides & ENDS:
            frame.phase = status
            frame.result = result_to_json(result, frame.row.entrypoint) if text is None else text
        else:
            self._ended.append(frame)
            self._end_operation(status, result, text)

    def _end_step(self) -> StepChange:
        """Return the changes of the step, and start the next step."""
        claim = self.claim
        updates = [frame.to_update() for row_id, frame in self._updates.items() if row_id != claim.id]
        checkpoint = Checkpoint(
            claim.id,
            claim.epoch,
            self.root.row.token or "",
            self._consumer,
            (*updates, self.root.to_update()),
            self._outcomes,
            self._built,
            self._events,
            current_entrypoints=None if self.distributed else entrypoints_json(self._current_entrypoints()),
        )
        change = StepChange(checkpoint, self._ended, states.is_final(self.root.status))
        for frame in self._updates.values():
            frame.stored_step, frame.stored_phase = frame.step, frame.phase
        self._start_step()
        return change

    @property
    def unloadable_path(self) -> str | None:
        """Path of the class of the current task, if the task could not be loaded as an object of this class."""
        task = self._loaded_task()
        return None if task is None else task._kser_stored_path

    def _loaded_task(self) -> Task | None:
        frame = self.frames[-1]
        if frame.phase != Phase.RUN_TASK or frame.operation is None or not frame.is_loaded:
            return None
        return frame.operation.tasks[frame.step]

    def _current_entrypoints(self) -> list[str]:
        """Return the paths of the classes that the current step of a local operation needs, besides the root's class.

        They are the classes of the nested operations that contain the step, and of the current task.
        """
        paths, task = [frame.row.entrypoint for frame in self.frames[1:]], self.claim.task
        if self.frames[-1].phase == Phase.RUN_TASK:
            if (loaded := self._loaded_task()) is not None:
                paths += _needed_paths(loaded)
            elif task is not None:
                # Without the operation object, no step was run, so the current task is the one that was claimed.
                paths.append(task.entrypoint)
        return paths


def _needed_paths(task: Task) -> Iterator[str]:
    """Return the paths of the classes that the first step of a task needs: a nested operation also needs its task."""
    yield task._kser_stored_path or type(task).path
    if first := getattr(task, "tasks", None):
        yield from _needed_paths(first[0])
