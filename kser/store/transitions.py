"""The state transitions of rows, as pure functions of a row and the time."""

from __future__ import annotations

from collections.abc import Sequence

from kser import backoff
from kser import status as states
from kser.errors import StateConflict
from kser.store.model import (
    MAX_ERROR_LENGTH,
    MAX_RESEND_DELAY,
    RESEND_UNSENT_AFTER,
    SEND_GRACE,
    AttemptRow,
    Checkpoint,
    ClaimRequest,
    DueReason,
    NewEvent,
    NewOperation,
    NewTask,
    OperationRow,
    OperationUpdate,
    RefusalReason,
    TaskOutcome,
    TaskRow,
)


def new_row(new: NewOperation, identifier: int, parent_id: int | None, root_id: int | None, now: float) -> OperationRow:
    """Return the row of a new operation.

    :param identifier: the id of the operation.
    :param root_id: the id of the root; None if the operation is a root.
    """
    return OperationRow(
        id=identifier,
        uuid=new.uuid,
        entrypoint=new.entrypoint,
        parent_id=parent_id,
        root_id=root_id or identifier,
        mode=new.mode,
        topic=new.topic,
        overrides=new.overrides,
        params=new.params,
        metadata=new.metadata,
        status=states.PENDING,
        phase=new.phase,
        step=new.step,
        task_count=None if new.tasks is None else len(new.tasks),
        accumulated=new.accumulated,
        result=None,
        created_at=now,
        started_at=None,
        ended_at=None,
        cancel_requested=False,
        cancel_reason=None,
        epoch=0,
        owner=None,
        token=None,
        next_check_at=now + RESEND_UNSENT_AFTER if parent_id is None else None,
        due_at=now,
        claim_count=0,
        send_count=0,
        sent_at=None,
        target=new.target,
    )


def new_task_row(new: NewTask, operation_id: int, position: int, child_id: int | None) -> TaskRow:
    """Return the row of a new task."""
    return TaskRow(
        operation_id=operation_id,
        position=position,
        uuid=new.uuid,
        entrypoint=new.entrypoint,
        topic=new.topic,
        params=new.params,
        metadata=new.metadata,
        status=new.status,
        result=new.result,
        attempts=0,
        child_id=child_id,
        attempts_before_resume=0,
    )


def claim_refusal(row: OperationRow, step: str, now: float) -> str | None:
    """Return the reason why a claim on a root is refused, or None if the claim is granted."""
    if states.is_final(row.status):
        return RefusalReason.ENDED
    if row.target.uuid != step:
        return RefusalReason.STALE
    if has_live_owner(row, now):
        return RefusalReason.HELD
    return RefusalReason.WAITING if row.due_at > now else None


def has_live_owner(row: OperationRow, now: float) -> bool:
    """Return whether a root has an owner whose lease is valid."""
    return row.owner is not None and (row.next_check_at or 0) > now


def apply_claim(row: OperationRow, request: ClaimRequest, now: float) -> OperationRow:
    """Return the row of a root after a claim."""
    return row._replace(
        status=states.RUNNING,
        epoch=row.epoch + 1,
        owner=request.owner,
        token=request.token,
        claim_count=row.claim_count + 1,
        next_check_at=now + request.lease,
        started_at=row.started_at or now,
    )


def apply_update(row: OperationRow, update: OperationUpdate, now: float) -> OperationRow:
    """Return the row of an operation after an update of its position, status and results."""
    return row._replace(
        step=update.step,
        phase=update.phase,
        status=update.status,
        accumulated=update.accumulated,
        result=update.result,
        started_at=row.started_at or now,
        ended_at=now if states.is_final(update.status) else None,
    )


def finish_checkpoint(root: OperationRow, checkpoint: Checkpoint, now: float) -> OperationRow:
    """Return the row of a root at the end of a checkpoint.

    If the checkpoint releases the claim, the row contains the time of the next check.
    """
    root = root._replace(claim_count=0, send_count=0, sent_at=None, target=checkpoint.target or root.target)
    if states.is_final(root.status):
        return root._replace(owner=None, next_check_at=None, epoch=root.epoch + 1)
    if checkpoint.keep:
        return root
    return root._replace(
        owner=None,
        epoch=root.epoch + 1,
        due_at=now + checkpoint.delay,
        next_check_at=now + (checkpoint.delay or RESEND_UNSENT_AFTER),
    )


def apply_cancel(row: OperationRow, now: float) -> OperationRow:
    """Return the row of an operation after its cancellation."""
    return row._replace(status=states.CANCELLED, ended_at=now, result=row.accumulated)


def cancelled_events(root: OperationRow, events: Sequence[NewEvent]) -> Sequence[NewEvent]:
    """Return the events of a checkpoint that cancels its root.

    The root's event ``ended`` is replaced by an event ``ended`` with the text CANCELLED.
    """
    kept = (event for event in events if event.kind != "ended" or event.uuid not in (None, root.uuid))
    return [*kept, NewEvent("ended", text=states.CANCELLED)]


def apply_outcome(task: TaskRow, outcome: TaskOutcome) -> TaskRow:
    """Return the row of a task after an attempt."""
    result = task.result if outcome.status == states.PENDING else outcome.result
    return task._replace(status=outcome.status, result=result, attempts=max(task.attempts, outcome.number))


def attempt_row(outcome: TaskOutcome, checkpoint: Checkpoint, now: float) -> AttemptRow:
    """Return the row of an attempt."""
    return AttemptRow(
        operation_id=outcome.operation_id,
        position=outcome.position,
        number=outcome.number,
        epoch=checkpoint.epoch,
        status=states.SUCCESS if outcome.status == states.SUCCESS else states.FAILED,
        consumer=checkpoint.consumer,
        started_at=now - outcome.duration,
        ended_at=now,
        error=None if outcome.error is None else outcome.error[:MAX_ERROR_LENGTH],
    )


def due_reason(owner: str | None, send_count: int, *, is_retry: bool) -> str:
    """Return the reason why the current step of a root is a due step.

    :param is_retry: True if ``next_check_at`` equals ``due_at``, which shows that the step was waiting for a retry.
    """
    if owner is not None:
        return DueReason.EXPIRED
    if send_count:
        return DueReason.UNCLAIMED
    return DueReason.RETRY if is_retry else DueReason.UNSENT


def mark_taken(row: OperationRow, now: float) -> OperationRow:
    """Return the row of a root after a reaper reserved its step, to send the message of the step."""
    return row._replace(owner=None, next_check_at=now + SEND_GRACE)


def apply_sent(row: OperationRow, resend_after: float, now: float) -> OperationRow:
    """Return the row of a root after the message of its step was sent."""
    wait = backoff.delay(row.send_count + 1, first=resend_after, ceiling=MAX_RESEND_DELAY)
    return row._replace(send_count=row.send_count + 1, sent_at=now, next_check_at=max(now, row.due_at) + wait)


def is_resumed(root: OperationRow, epoch: int, token: str) -> bool:
    """Return whether an earlier call with the same token, whose response was lost, has already resumed the root.

    :raises kser.errors.StateConflict: the root cannot be resumed.
    """
    if (root.epoch, root.token) == (epoch + 1, token):
        return True
    if not (states.is_final(root.status) and states.can_transition(root.status, states.RUNNING)):
        raise StateConflict(f"operation {root.uuid} is {root.status}: only a FAILED or CANCELLED one can be resumed")
    if root.epoch != epoch:
        raise StateConflict(
            f"operation {root.uuid} has changed since it was read, and is {root.status} now: find the cause of this"
            " status, then call resume again"
        )
    return False


def apply_resume(root: OperationRow, token: str, now: float) -> OperationRow:
    """Return the row of a root after a resume. The caller has already set the position and the status in ``root``."""
    return root._replace(
        epoch=root.epoch + 1,
        token=token,
        owner=None,
        cancel_requested=False,
        cancel_reason=None,
        claim_count=0,
        send_count=0,
        sent_at=None,
        due_at=now,
        next_check_at=now + RESEND_UNSENT_AFTER,
    )
