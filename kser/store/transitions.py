"""The state transitions of rows, as pure functions of a row and the time."""

from __future__ import annotations

from kser import status as states
from kser.store.rows import (
    ENDED,
    ERROR_LIMIT,
    EXPIRED,
    HELD,
    LONGEST_RESEND,
    RETRY,
    SENDING,
    STALE,
    UNCLAIMED,
    UNSENT,
    UNSENT_AFTER,
    WAITING,
    AttemptRow,
    Checkpoint,
    Claimant,
    Move,
    NewOperation,
    NewTask,
    OperationRow,
    TaskEnd,
    TaskRow,
)


def new_row(new: NewOperation, at: int, parent_id: int | None, root_id: int | None, now: float) -> OperationRow:
    """Return the row of a new operation.

    :param at: id of the operation.
    :param root_id: None for a root.
    """
    return OperationRow(
        id=at,
        uuid=new.uuid,
        entrypoint=new.entrypoint,
        parent_id=parent_id,
        root_id=root_id or at,
        mode=new.mode,
        topic=new.topic,
        hooks=new.hooks,
        params=new.params,
        metadata=new.metadata,
        status=states.PENDING,
        phase=new.phase,
        step=new.step,
        size=None if new.tasks is None else len(new.tasks),
        so_far=new.so_far,
        result=None,
        created_at=now,
        started_at=None,
        ended_at=None,
        cancel_requested=False,
        cancel_reason=None,
        epoch=0,
        owner=None,
        token=None,
        wake_at=now + UNSENT_AFTER if parent_id is None else None,
        due_at=now,
        claims=0,
        sends=0,
        sent_at=None,
        target=new.target,
    )


def new_task_row(new: NewTask, operation_id: int, position: int, child_id: int | None) -> TaskRow:
    """Return the row of a new task."""
    place = operation_id, position
    own = new.uuid, new.entrypoint, new.topic, new.params, new.metadata
    now = new.status, new.result
    return TaskRow(*place, *own, *now, attempts=0, child_id=child_id, resumed_after=0)


def refusal(row: OperationRow, step: str, now: float) -> str | None:
    """Return why a claim on a root is refused; None when it is granted."""
    if states.is_final(row.status):
        return ENDED
    if row.target.uuid != step:
        return STALE
    if is_held(row, now):
        return HELD
    return WAITING if row.due_at > now else None


def is_held(row: OperationRow, now: float) -> bool:
    """Return whether a root has an owner whose lease is valid."""
    return row.owner is not None and (row.wake_at or 0) > now


def claimed(row: OperationRow, claimant: Claimant, now: float) -> OperationRow:
    """Return the row of a root after a claim."""
    return row._replace(
        status=states.RUNNING,
        epoch=row.epoch + 1,
        owner=claimant.owner,
        token=claimant.token,
        claims=row.claims + 1,
        wake_at=now + claimant.lease,
        started_at=row.started_at or now,
    )


def moved(row: OperationRow, move: Move, now: float) -> OperationRow:
    """Return the row of an operation after an update of its position, status and results."""
    return row._replace(
        step=move.step,
        phase=move.phase,
        status=move.status,
        so_far=move.so_far,
        result=move.result,
        started_at=row.started_at or now,
        ended_at=now if states.is_final(move.status) else None,
    )


def settled(root: OperationRow, checkpoint: Checkpoint, now: float) -> OperationRow:
    """Return the row of a root at the end of a checkpoint: keep or release the claim, and set the next check."""
    root = root._replace(claims=0, sends=0, sent_at=None, target=checkpoint.target or root.target)
    if states.is_final(root.status):
        return root._replace(owner=None, wake_at=None, epoch=root.epoch + 1)
    if checkpoint.keep:
        return root
    return root._replace(
        owner=None,
        epoch=root.epoch + 1,
        due_at=now + checkpoint.delay,
        wake_at=now + (checkpoint.delay or UNSENT_AFTER),
    )


def cancelled(row: OperationRow, now: float) -> OperationRow:
    """Return the row of an operation after its cancellation."""
    return row._replace(status=states.CANCELLED, ended_at=now, result=row.so_far)


def ended(task: TaskRow, end: TaskEnd) -> TaskRow:
    """Return the row of a task after an attempt."""
    result = task.result if end.status == states.PENDING else end.result
    return task._replace(status=end.status, result=result, attempts=max(task.attempts, end.number))


def attempt_row(end: TaskEnd, checkpoint: Checkpoint, now: float) -> AttemptRow:
    """Return the row of an attempt."""
    return AttemptRow(
        operation_id=end.operation_id,
        position=end.position,
        number=end.number,
        epoch=checkpoint.epoch,
        status=states.SUCCESS if end.status == states.SUCCESS else states.FAILED,
        consumer=checkpoint.consumer,
        started_at=now - end.duration,
        ended_at=now,
        error=None if end.error is None else end.error[:ERROR_LIMIT],
    )


def why_due(row: OperationRow) -> str:
    """Return why the step of a root is due for sending."""
    if row.owner is not None:
        return EXPIRED
    if row.sends:
        return UNCLAIMED
    return RETRY if row.wake_at == row.due_at else UNSENT


def taken_up(row: OperationRow, now: float) -> OperationRow:
    """Return the row of a root after a reaper reserved its step for sending."""
    return row._replace(owner=None, wake_at=now + SENDING)


def sent(row: OperationRow, resend_after: float, now: float) -> OperationRow:
    """Return the row of a root after its step was sent."""
    wait = min(resend_after * 2.0 ** min(row.sends, 20), LONGEST_RESEND)
    return row._replace(sends=row.sends + 1, sent_at=now, wake_at=max(now, row.due_at) + wait)


def resumed(root: OperationRow, now: float) -> OperationRow:
    """Return the row of a root after a resume; the position is set separately."""
    return root._replace(
        epoch=root.epoch + 1,
        token=None,
        owner=None,
        cancel_requested=False,
        cancel_reason=None,
        claims=0,
        sends=0,
        sent_at=None,
        due_at=now,
        wake_at=now + UNSENT_AFTER,
    )
