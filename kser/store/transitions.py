"""The state transitions of rows, as pure functions of a row and the time."""

from __future__ import annotations

import json
from collections.abc import Sequence

from kser import backoff
from kser import status as states
from kser.errors import StateConflict
from kser.store.model import (
    IMMEDIATE_TAKEOVERS,
    MAX_ERROR_LENGTH,
    MAX_RESEND_DELAY,
    MAX_TAKEOVER_DELAY,
    RESEND_UNSENT_AFTER,
    SEND_DELAY,
    AttemptRow,
    Checkpoint,
    ClaimRequest,
    DueReason,
    Mode,
    NewEvent,
    NewOperation,
    NewTask,
    OperationRow,
    OperationUpdate,
    Phase,
    RefusalReason,
    TaskOutcome,
    TaskRow,
)


def new_row(new: NewOperation, identifier: int, parent_id: int | None, root_id: int | None, now: float) -> OperationRow:
    """Return the row of a new operation.

    :param identifier: the id of the operation.
    :param root_id: the id of the root; None if the operation is a root.
    """
    is_root = parent_id is None
    due_at = now + RESEND_UNSENT_AFTER if is_root else None
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
        lease_until=None,
        take_at=due_at,
        send_at=due_at,
        due_reason=DueReason.UNSENT if is_root else None,
        due_at=now,
        claim_count=0,
        send_count=0,
        sent_at=None,
        refusal_count=0,
        refused_since=None,
        current_entrypoints=first_entrypoints(new) if is_root else None,
        target=new.target,
    )


def first_entrypoints(new: NewOperation) -> str | None:
    """Return the ``current_entrypoints`` of a new root."""
    if new.mode != Mode.LOCAL:
        return None
    paths = []
    current: NewOperation | None = new
    while current is not None and current.phase == Phase.RUN_TASK and current.tasks:
        task = current.tasks[current.step]
        paths.append(task.entrypoint)
        current = task.child
    return entrypoints_json(paths)


def entrypoints_json(paths: Sequence[str]) -> str | None:
    """Return the value of the column ``current_entrypoints`` for the paths of classes."""
    return json.dumps(paths) if paths else None


def needed_entrypoints(row: OperationRow) -> list[str]:
    """Return the paths of all classes that the current step of a root needs."""
    return [row.target.entrypoint, *json.loads(row.current_entrypoints or "[]")]


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


def claim_refusal(row: OperationRow, step: str, request: ClaimRequest, now: float) -> str | None:
    """Return the reason why a claim on a root is refused, or None if the claim is granted."""
    if states.is_final(row.status):
        return RefusalReason.ENDED
    if row.target.uuid != step:
        return RefusalReason.STALE
    if request.topic not in (None, row.target.topic):
        return RefusalReason.TOPIC
    if has_live_owner(row, now):
        return RefusalReason.HELD
    if request.epoch not in (None, row.epoch):
        return RefusalReason.STALE
    if row.owner is not None and (row.lease_until or 0) + takeover_delay(row.claim_count) > now:
        return RefusalReason.WAITING
    if row.owner is not None and not request.expired:
        # A step that another consumer has reserved waits for the claim of this consumer.
        return RefusalReason.EXPIRED if (row.take_at or 0) <= now else RefusalReason.WAITING
    return RefusalReason.WAITING if row.due_at > now else None


def has_live_owner(row: OperationRow, now: float) -> bool:
    """Return whether a root has an owner whose lease is valid."""
    return row.owner is not None and (row.lease_until or 0) > now


def takeover_delay(claim_count: int) -> float:
    """Return the number of seconds between the expiry of a lease and the next takeover of the step.

    :param claim_count: the number of claims of the step, including the claim whose lease expires.
    """
    further = claim_count - IMMEDIATE_TAKEOVERS
    return 0.0 if further <= 0 else backoff.delay(further, first=2.0, ceiling=MAX_TAKEOVER_DELAY)


def apply_lease(row: OperationRow, owner: str, lease: float, now: float) -> OperationRow:
    """Return the row of a claimed root after the start or the renewal of its lease."""
    lease_until = now + lease
    take_at = lease_until + takeover_delay(row.claim_count)
    return row._replace(
        owner=owner,
        lease_until=lease_until,
        take_at=take_at,
        send_at=take_at + SEND_DELAY,
        due_reason=DueReason.EXPIRED,
    )


def apply_claim(row: OperationRow, request: ClaimRequest, now: float) -> OperationRow:
    """Return the row of a root after a claim."""
    claimed = row._replace(
        status=states.RUNNING,
        epoch=row.epoch + 1,
        token=request.token,
        claim_count=row.claim_count + 1,
        send_count=0,
        sent_at=None,
        refusal_count=0,
        refused_since=None,
        started_at=row.started_at or now,
    )
    return apply_lease(claimed, request.owner, request.lease, now)


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

    If the checkpoint releases the claim, the row contains the times at which the next step is due.
    """
    root = root._replace(
        claim_count=0,
        send_count=0,
        sent_at=None,
        target=checkpoint.target or root.target,
        current_entrypoints=checkpoint.current_entrypoints,
    )
    if states.is_final(root.status):
        return end_claim(root)
    if checkpoint.keep:
        return root
    take_after, send_delay = release_waits(checkpoint)
    take_at = now + take_after
    return root._replace(
        owner=None,
        lease_until=None,
        epoch=root.epoch + 1,
        due_at=now + checkpoint.delay,
        take_at=take_at,
        send_at=take_at + send_delay,
        due_reason=checkpoint.due_reason,
    )


def release_waits(checkpoint: Checkpoint) -> tuple[float, float]:
    """Return the seconds from a release until the next step is due, and from then until its message is sent."""
    if checkpoint.due_reason == DueReason.UNSENT:
        return checkpoint.delay + RESEND_UNSENT_AFTER, 0.0
    return checkpoint.delay, SEND_DELAY


def end_claim(row: OperationRow) -> OperationRow:
    """Return the row of a root whose status is final: the root has no owner and no due step."""
    return row._replace(owner=None, lease_until=None, take_at=None, send_at=None, due_reason=None, epoch=row.epoch + 1)


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


def may_be_sent(row: OperationRow, now: float) -> bool:
    """Return whether the current step of a root can be due: the root has not ended, and has no valid lease."""
    return row.take_at is not None and not has_live_owner(row, now)


def fails_for_its_class(row: OperationRow, max_sends: int, unknown_after: float, now: float) -> bool:
    """Return whether consumers have refused the current step of a root so often and for so long that it must fail."""
    return row.refusal_count >= max_sends and row.refused_since is not None and row.refused_since + unknown_after <= now


def apply_sent(row: OperationRow, resend_after: float, lease: float, now: float) -> OperationRow:
    """Return the row of a root after the message of its step was sent."""
    start = max(now, row.due_at)
    sent = row._replace(
        send_count=row.send_count + 1, sent_at=now, send_at=start + resend_delay(row.send_count, resend_after)
    )
    if (row.take_at or 0) <= now:
        # The step is already due: its message may wait in the partition of a dead consumer, so it stays due.
        return sent
    first = min(lease, resend_after) if row.epoch else resend_after
    return sent._replace(take_at=start + resend_delay(row.send_count, first), due_reason=DueReason.UNCLAIMED)


def apply_failed_takeover(row: OperationRow, wait: float, now: float) -> OperationRow:
    """Return the row of a root after a takeover of its step ended before its claim."""
    take_at = now + resend_delay(row.send_count, wait)
    return row._replace(
        send_count=row.send_count + 1,
        take_at=take_at,
        send_at=take_at + SEND_DELAY,
        due_reason=DueReason.UNCLAIMED,
    )


def resend_delay(send_count: int, first: float) -> float:
    """Return the seconds until a step is due again, after ``send_count`` earlier sends and takeovers without a claim.

    :param first: the delay without earlier sends; each earlier send doubles the delay.
    """
    return backoff.delay(send_count + 1, first=first, ceiling=MAX_RESEND_DELAY)


def apply_refusal(row: OperationRow, step: str, now: float) -> OperationRow:
    """Return the row of a root after a consumer refused a message of ``step`` because the step's class is unknown."""
    # A record may be delivered twice, so count at most one refusal more than messages that are marked as sent.
    if row.target.uuid != step or not may_be_sent(row, now) or row.refusal_count > row.send_count:
        return row
    since = now if row.refused_since is None else row.refused_since
    return row._replace(refusal_count=row.refusal_count + 1, refused_since=since)


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
        lease_until=None,
        cancel_requested=False,
        cancel_reason=None,
        claim_count=0,
        send_count=0,
        sent_at=None,
        refusal_count=0,
        refused_since=None,
        due_at=now,
        take_at=now,
        send_at=now + SEND_DELAY,
        due_reason=DueReason.RESUMED,
    )
