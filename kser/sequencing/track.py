"""Where a stored operation stands, and what follows: pure bookkeeping, without a database and without user code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cdumay_result import Result

from kser import status as states
from kser.results import copy_result, merge
from kser.sequencing.stored import CHOOSES, ENDS, result_from_json, result_to_json
from kser.store.rows import (
    DISTRIBUTED,
    NEXT,
    START,
    TASK,
    Built,
    Checkpoint,
    Claim,
    Move,
    Note,
    OperationRow,
    Target,
    TaskEnd,
)

if TYPE_CHECKING:
    from kser.sequencing.operation import Operation


class Frame:
    """One operation on the way down from the root to what is done now.

    :param row: as it is stored.
    """

    def __init__(self, row: OperationRow) -> None:
        self.row = row
        self.phase = self.old_phase = row.phase
        self.status = row.status
        self.step = self.old_step = row.step
        self.size = row.size
        #: JSON of the results of the tasks that succeeded, added up, and the same as a Result.
        self.so_far = row.so_far
        self.total = result_from_json(row.so_far, row.uuid)
        #: JSON of what the operation ends with, once that is known.
        self.result = row.result
        #: The object, where there is one, and whether it has its tasks.
        self.operation: Operation | None = None
        self.loaded = False
        #: How many attempts are recorded, and how many of them a retry policy does not count, by the task's position.
        self.attempts: dict[int, tuple[int, int]] = {}

    @property
    def outcome(self) -> Result:
        """What the operation ends with."""
        return self.total if self.result is None else result_from_json(self.result, self.row.uuid)

    def add(self, result: Result) -> None:
        """A task succeeded with ``result``."""
        self.total = merge(self.total, result)
        self.so_far = result_to_json(self.total, self.row.uuid)

    def move(self) -> Move:
        """What is to be recorded of it."""
        before = self.old_step, self.old_phase
        return Move(self.row.id, *before, self.step, self.phase, self.status, self.so_far, self.result)

    @property
    def target(self) -> Target:
        """The message that asks for what is to be done with the operation itself."""
        return Target(self.row.uuid, self.row.entrypoint, self.row.topic)


class Track:
    """The way from the root of a claim to the operation whose turn it is, and what came of the step since.

    :param claim: it.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.distributed = claim.root.mode == DISTRIBUTED
        self.frames = [Frame(row) for row in claim.path]
        self.root = self.frames[0]
        #: Operations that ended with this step, and that have no hooks of their own.
        self.ended: list[Frame] = []
        #: The tasks that were built in this step.
        self.built: Built | None = None
        self._moves: dict[int, Frame] = {}
        self._ends: list[TaskEnd] = []
        self._notes: list[Note] = []

    @property
    def top(self) -> Frame:
        """The operation whose turn it is."""
        return self.frames[-1]

    @property
    def is_over(self) -> bool:
        """Whether the root has ended."""
        return states.is_final(self.root.status)

    # -- what came of the step -----------------------------------------------------------------------------------------

    def note(self, note: Note) -> None:
        """Record this beside what comes of the step."""
        self._notes.append(note)

    def enter(self, row: OperationRow) -> Frame:
        """The current task is an operation: its turn comes."""
        frame = Frame(row)
        self.frames.append(frame)
        return frame

    def begun(self, built: Built | None) -> None:
        """The operation is ready to run its tasks.

        :param built: the tasks, when they were built just now.
        """
        frame = self.top
        if built is not None:
            self.built = built
            frame.size = len(built.tasks)
            self._notes.append(Note("built", frame.row.uuid, f"{frame.size} task(s)"))
        frame.status = states.RUNNING
        if frame.phase == START and len(self.frames) > 1:
            # It goes on from what there is: as a task gets the results of those before it.
            frame.add(copy_result(self.frames[-2].total))
        self._go_on(frame, frame.step)

    def ran(self, uuid: str, result: Result, text: str, number: int, duration: float) -> None:
        """An attempt at the current task ended for good.

        :param uuid: the task's.
        :param text: ``result`` as JSON.
        :param number: of the attempt; 0 when none was made.
        :param duration: seconds that it took.
        """
        frame = self.top
        failed = states.outcome(result) != states.SUCCESS
        status = states.FAILED if failed else states.SUCCESS
        error = (result.stderr or f"return code {result.retcode}") if failed else None
        self._ends.append(TaskEnd(frame.row.id, frame.step, number, status, text, duration, error))
        self._notes.append(Note("task-failed" if failed else "task-succeeded", uuid, error))
        self._after(frame, status, result)

    def retried(self, uuid: str, error: str, number: int, duration: float) -> None:
        """An attempt at the current task failed, and another one is to follow."""
        frame = self.top
        self._ends.append(TaskEnd(frame.row.id, frame.step, number, states.PENDING, None, duration, error))
        self._notes.append(Note("task-retried", uuid, error))
        self._moves.setdefault(frame.row.id, frame)

    def chose(self, step: int | None, failure: Result | None) -> None:
        """What follows the current task was chosen.

        :param step: position of the next one; None for the end.
        :param failure: what the operation fails with, if it is to fail.
        """
        frame = self.top
        self._notes.append(Note("moved", frame.row.uuid, "to the end" if step is None else f"to task {step}"))
        if failure is not None:
            self._finish(frame, states.FAILED, merge(copy_result(frame.total), failure))
        else:
            self._go_on(frame, frame.size or 0 if step is None else step)

    def failed(self, failure: Result) -> None:
        """The operation could not be begun or moved on."""
        self._finish(self.top, states.FAILED, merge(copy_result(self.top.total), failure))

    def end(self, status: str, result: Result) -> None:
        """The operation ends, and with it the task that it is."""
        frame = self.top
        frame.status = frame.phase = status
        frame.result = result_to_json(result, frame.row.entrypoint)
        self._moves[frame.row.id] = frame
        if len(self.frames) == 1:
            self._notes.append(Note("ended", text=status))
            return
        self.frames.pop()
        parent = self.top
        # It ran again and again inside: there is no attempt at the whole.
        error = result.stderr if status == states.FAILED else None
        self._ends.append(TaskEnd(parent.row.id, parent.step, 0, status, frame.result, 0, error))
        self._after(parent, status, result)

    def _after(self, frame: Frame, status: str, result: Result) -> None:
        """A task of ``frame`` ended."""
        if status == states.SUCCESS:
            frame.add(result)
        if self.distributed and frame.row.hooks & CHOOSES:
            frame.phase = NEXT
            self._moves[frame.row.id] = frame
        elif status == states.SUCCESS:
            self._go_on(frame, frame.step + 1)
        else:
            self._finish(frame, states.FAILED, merge(copy_result(frame.total), result))

    def _go_on(self, frame: Frame, step: int) -> None:
        frame.step = step
        self._moves[frame.row.id] = frame
        if step < (frame.size or 0):
            frame.phase = TASK
        else:
            # What it came with may be a failure that no task has touched.
            self._finish(frame, states.outcome(frame.total), frame.total)

    def _finish(self, frame: Frame, status: str, result: Result) -> None:
        self._moves[frame.row.id] = frame
        if frame.row.hooks & ENDS:
            frame.phase = status
            frame.result = result_to_json(result, frame.row.entrypoint)
        else:
            self.ended.append(frame)
            self.end(status, result)

    # -- recording -----------------------------------------------------------------------------------------------------

    def checkpoint(
        self, consumer: str, keep: bool, target: Target | None, delay: float = 0, notes: tuple[Note, ...] = ()
    ) -> Checkpoint:
        """What is to be recorded of the step."""
        claim = self.claim
        moved = [frame.move() for at, frame in self._moves.items() if at != claim.id]
        return Checkpoint(
            claim.id,
            claim.epoch,
            claim.root.token or "",
            consumer,
            (*moved, self.root.move()),
            self._ends,
            self.built,
            (*self._notes, *notes),
            target,
            keep,
            delay,
        )

    def recorded(self) -> None:
        """It is: the next step begins."""
        for frame in self._moves.values():
            frame.old_step, frame.old_phase = frame.step, frame.phase
        self._moves, self._ends, self._notes, self.built, self.ended = {}, [], [], None, []
