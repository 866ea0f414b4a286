"""Execution state of a stored operation: a pure state machine, which neither uses the database nor runs user code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cdumay_result import Result

from kser import status as states
from kser.durable.serialization import CHOOSES, ENDS, result_from_json, result_to_json
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
    StepMessage,
    TaskOutcome,
)

if TYPE_CHECKING:
    from kser.sequencing.operation import Operation


class OperationFrame:
    """One operation on the path from the root to the current operation.

    :param row: the stored row of the operation.
    """

    def __init__(self, row: OperationRow) -> None:
        self.row = row
        self.phase = self.stored_phase = row.phase
        self.status = row.status
        self.step = self.stored_step = row.step
        self.task_count = row.task_count
        #: Accumulated result of the tasks that succeeded, as JSON and as a Result.
        self.accumulated_json = row.accumulated
        self.accumulated = result_from_json(row.accumulated, row.uuid)
        #: JSON of the final result; None while the final result is not known.
        self.result = row.result
        #: ``operation`` is the operation object, or None if it was not built. ``is_loaded`` tells whether it has its
        #: tasks.
        self.operation: Operation | None = None
        self.is_loaded = False
        #: For the position of each task: the number of recorded attempts, and the number of attempts before the last
        #: resume. A retry policy does not count the attempts before the resume.
        self.attempts: dict[int, tuple[int, int]] = {}

    @property
    def outcome(self) -> Result:
        """Final result of the operation, or the accumulated result while there is no final result."""
        return self.accumulated if self.result is None else result_from_json(self.result, self.row.uuid)

    def add_result(self, result: Result) -> None:
        """Add the result of a successful task to the accumulated result."""
        self.accumulated = merge(self.accumulated, result)
        self.accumulated_json = result_to_json(self.accumulated, self.row.uuid)

    def to_update(self) -> OperationUpdate:
        """Return the update of the operation's row."""
        stored = self.stored_step, self.stored_phase
        return OperationUpdate(
            self.row.id, *stored, self.step, self.phase, self.status, self.accumulated_json, self.result
        )

    @property
    def target(self) -> StepMessage:
        """Message for a step of the operation itself: its build, its choice of the next task, or its end."""
        return StepMessage(self.row.uuid, self.row.entrypoint, self.row.topic)


class ExecutionState:
    """Execution state under a claim: the path from the root to the current operation, and the outcome to record.

    :param claim: the claim.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.distributed = claim.root.mode == Mode.DISTRIBUTED
        self.frames = [OperationFrame(row) for row in claim.path]
        self.root = self.frames[0]
        #: Operations that have no hooks of their own and ended in this step.
        self.ended: list[OperationFrame] = []
        #: Tasks that were built in this step.
        self.built: BuiltTasks | None = None
        self._updates: dict[int, OperationFrame] = {}
        self._outcomes: list[TaskOutcome] = []
        self._events: list[NewEvent] = []

    @property
    def top(self) -> OperationFrame:
        """Frame of the current operation."""
        return self.frames[-1]

    @property
    def is_finished(self) -> bool:
        """True if the root has ended."""
        return states.is_final(self.root.status)

    # -- outcome of the step -------------------------------------------------------------------------------------------

    def add_event(self, event: NewEvent) -> None:
        """Add an event to the next checkpoint."""
        self._events.append(event)

    def push(self, row: OperationRow) -> OperationFrame:
        """Push the frame of a nested operation that is the current task."""
        frame = OperationFrame(row)
        self.frames.append(frame)
        return frame

    def on_built(self, built: BuiltTasks | None) -> None:
        """Start the current operation, whose tasks are ready to run.

        :param built: the tasks; None if they were not built in this step.
        """
        frame = self.top
        if built is not None:
            self.built = built
            frame.task_count = len(built.tasks)
            self._events.append(NewEvent("built", frame.row.uuid, f"{frame.task_count} task(s)"))
        frame.status = states.RUNNING
        if frame.phase == Phase.BUILD and len(self.frames) > 1:
            # A nested operation starts with the accumulated result of its parent, like any other task of the parent.
            frame.add_result(copy_result(self.frames[-2].accumulated))
        self._advance(frame, frame.step)

    def on_task_finished(self, uuid: str, result: Result, text: str, number: int, duration: float) -> None:
        """Finish the current task with the outcome of its last attempt.

        :param uuid: uuid of the task.
        :param text: ``result`` as JSON.
        :param number: number of the attempt; 0 if there was no attempt.
        :param duration: duration of the attempt in seconds.
        """
        frame = self.top
        failed = states.final_status(result) != states.SUCCESS
        status = states.FAILED if failed else states.SUCCESS
        error = (result.stderr or f"return code {result.retcode}") if failed else None
        self._outcomes.append(TaskOutcome(frame.row.id, frame.step, number, status, text, duration, error))
        self._events.append(NewEvent("task-failed" if failed else "task-succeeded", uuid, error))
        self._pop_into_parent(frame, status, result)

    def on_task_retried(self, uuid: str, error: str, number: int, duration: float) -> None:
        """Add a failed attempt at the current task; a retry follows."""
        frame = self.top
        self._outcomes.append(TaskOutcome(frame.row.id, frame.step, number, states.PENDING, None, duration, error))
        self._events.append(NewEvent("task-retried", uuid, error))
        self._updates.setdefault(frame.row.id, frame)

    def on_next_chosen(self, step: int | None, failure: Result | None) -> None:
        """Advance to the task that the operation has chosen as the next task.

        :param step: position of the next task; None if the operation ends.
        :param failure: the failed result if the operation fails, else None.
        """
        frame = self.top
        self._events.append(NewEvent("moved", frame.row.uuid, "to the end" if step is None else f"to task {step}"))
        if failure is not None:
            self._finish(frame, states.FAILED, merge(copy_result(frame.accumulated), failure))
        else:
            self._advance(frame, frame.task_count or 0 if step is None else step)

    def on_failed(self, failure: Result) -> None:
        """Fail the current operation, which could not be built, restored or advanced."""
        self._finish(self.top, states.FAILED, merge(copy_result(self.top.accumulated), failure))

    def on_ended(self, status: str, result: Result) -> None:
        """End the current operation. If it is nested, this also ends the corresponding task of its parent."""
        frame = self.top
        frame.status = frame.phase = status
        frame.result = result_to_json(result, frame.row.entrypoint)
        self._updates[frame.row.id] = frame
        if len(self.frames) == 1:
            self._events.append(NewEvent("ended", text=status))
            return
        self.frames.pop()
        parent = self.top
        # The number 0 means that no attempt is recorded. Only attempts at tasks are recorded, and a nested operation
        # has none.
        error = result.stderr if status == states.FAILED else None
        self._outcomes.append(TaskOutcome(parent.row.id, parent.step, 0, status, frame.result, 0, error))
        self._pop_into_parent(parent, status, result)

    def _pop_into_parent(self, frame: OperationFrame, status: str, result: Result) -> None:
        """Apply the end of a task to its operation: choose the next task, advance to it, or finish the operation."""
        if status == states.SUCCESS:
            frame.add_result(result)
        if self.distributed and frame.row.overrides & CHOOSES:
            frame.phase = Phase.CHOOSE_NEXT
            self._updates[frame.row.id] = frame
        elif status == states.SUCCESS:
            self._advance(frame, frame.step + 1)
        else:
            self._finish(frame, states.FAILED, merge(copy_result(frame.accumulated), result))

    def _advance(self, frame: OperationFrame, step: int) -> None:
        frame.step = step
        self._updates[frame.row.id] = frame
        if step < (frame.task_count or 0):
            frame.phase = Phase.RUN_TASK
        else:
            # The outcome may be a failure although no task failed, because the initial result may be a failed result.
            self._finish(frame, states.final_status(frame.accumulated), frame.accumulated)

    def _finish(self, frame: OperationFrame, status: str, result: Result) -> None:
        self._updates[frame.row.id] = frame
        if frame.row.overrides & ENDS:
            frame.phase = status
            frame.result = result_to_json(result, frame.row.entrypoint)
        else:
            self.ended.append(frame)
            self.on_ended(status, result)

    # -- recording -----------------------------------------------------------------------------------------------------

    def checkpoint(
        self, consumer: str, keep: bool, target: StepMessage | None, delay: float = 0, events: tuple[NewEvent, ...] = ()
    ) -> Checkpoint:
        """Return the checkpoint that records the step.

        :param events: events to add after the events of the step.
        """
        claim = self.claim
        updates = [frame.to_update() for row_id, frame in self._updates.items() if row_id != claim.id]
        return Checkpoint(
            claim.id,
            claim.epoch,
            claim.root.token or "",
            consumer,
            (*updates, self.root.to_update()),
            self._outcomes,
            self.built,
            (*self._events, *events),
            target,
            keep,
            delay,
        )

    def mark_flushed(self) -> None:
        """Mark the step as recorded, and start with the next step."""
        for frame in self._updates.values():
            frame.stored_step, frame.stored_phase = frame.step, frame.phase
        self._updates, self._outcomes, self._events, self.built, self.ended = {}, [], [], None, []
