"""A store in the memory of one process, for tests. It is the shortest implementation of the contract of a store."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from kser import status as states
from kser.errors import FencedError, StoreError, UsageError
from kser.store.base import LeaseRenewer, Renewal, Store
from kser.store.model import (
    MAX_SENDS,
    SEND_GRACE,
    UNKNOWN_AFTER,
    URGENT,
    AttemptRow,
    Checkpoint,
    Claim,
    ClaimRefused,
    ClaimRequest,
    DueReason,
    DueStep,
    EventRow,
    Mode,
    NewEvent,
    NewOperation,
    NewTask,
    OperationQuery,
    OperationRow,
    OperationSnapshot,
    Page,
    Phase,
    RefusalReason,
    StepMessage,
    TakeoverQuery,
    TaskOutcome,
    TaskRow,
)
from kser.store.transitions import (
    apply_cancel,
    apply_claim,
    apply_failed_takeover,
    apply_lease,
    apply_outcome,
    apply_refusal,
    apply_resume,
    apply_sent,
    apply_update,
    attempt_row,
    cancelled_events,
    claim_refusal,
    end_claim,
    entrypoints_json,
    fails_for_its_class,
    finish_checkpoint,
    has_live_owner,
    is_resumed,
    may_be_sent,
    needed_entrypoints,
    new_row,
    new_task_row,
)


class MemoryStore(Store):
    """A store in the memory of this process.

    :param clock: function that returns the current time in seconds since 1970.
    """

    name = "memory://"

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._operations: dict[int, OperationRow] = {}
        self._ids: dict[str, int] = {}
        self._tasks: dict[int, list[TaskRow]] = {}
        self._attempts: dict[int, list[AttemptRow]] = {}
        self._events: dict[int, list[EventRow]] = {}
        self._labels: dict[int, set[tuple[str, str]]] = {}
        self._last_id = 0

    def check(self) -> None:
        """Do nothing, because a store in memory has no schema."""

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, operation: NewOperation, request: ClaimRequest | None = None) -> Claim | ClaimRefused | int:
        with self._lock:
            known = self.get_operation(operation.uuid)
            if known is not None:
                if request is not None and known.token == request.token:
                    return self._claim_of(known, request)
                return ClaimRefused(RefusalReason.STALE, known)
            self._reject_taken_uuids(operation.tasks or ())
            root = self._insert(operation, None, None)
            self._add_event(root, None, NewEvent("accepted"))
            return root.id if request is None else self._claim(root, request)

    def _insert(self, new: NewOperation, parent_id: int | None, root_id: int | None) -> OperationRow:
        self._last_id += 1
        row = self._store(new_row(new, self._last_id, parent_id, root_id, self._clock()))
        self._ids[row.uuid] = row.id
        self._labels[row.id] = set(new.labels)
        self._insert_tasks(row, new.tasks or ())
        return row

    def _insert_tasks(self, operation: OperationRow, tasks: Sequence[NewTask]) -> None:
        rows = self._tasks[operation.id] = []
        for position, new in enumerate(tasks):
            child = None if new.child is None else self._insert(new.child, operation.id, operation.root_id).id
            rows.append(new_task_row(new, operation.id, position, child))

    def _reject_taken_uuids(self, tasks: Sequence[NewTask]) -> None:
        uuids = [task.child.uuid for task in _all_tasks(tasks) if task.child]
        taken = [uuid for uuid, count in Counter(uuids).items() if count > 1 or uuid in self._ids]
        if taken:
            raise StoreError(f"operations with these uuids are already stored: {', '.join(sorted(taken))}")

    # -- claiming ------------------------------------------------------------------------------------------------------

    def claim(self, uuid: str, step: str, request: ClaimRequest) -> Claim | ClaimRefused | None:
        with self._lock:
            row = self.get_operation(uuid)
            if row is None or row.parent_id is not None:
                return None
            if row.token == request.token:
                return self._claim_of(row, request)
            reason = claim_refusal(row, step, request, self._clock())
            return self._claim(row, request) if reason is None else ClaimRefused(reason, row)

    def _claim(self, row: OperationRow, request: ClaimRequest) -> Claim:
        if request.taken_over is not None:
            self._add_event(row, request.owner, NewEvent("taken-over", text=request.taken_over))
        row = self._store(apply_claim(row, request, self._clock()))
        self._add_event(row, request.owner, NewEvent("claimed"))
        return self._claim_of(row, request)

    def _claim_of(self, root: OperationRow, request: ClaimRequest) -> Claim:
        path = [root]
        task = self._current(root)
        while task is not None and task.child_id is not None:
            path.append(self._operations[task.child_id])
            task = self._current(path[-1])
        last = path[-1]
        following = self.get_task(last.id, last.step + 1) if task and root.mode == Mode.DISTRIBUTED else None
        return Claim(root.id, root.epoch, tuple(path), task, following, root.claim_count > request.max_claims)

    def _current(self, row: OperationRow) -> TaskRow | None:
        return self._tasks[row.id][row.step] if row.phase == Phase.RUN_TASK else None

    # -- reading -------------------------------------------------------------------------------------------------------

    def get_operation(self, uuid: str) -> OperationRow | None:
        with self._lock:
            operation_id = self._ids.get(uuid)
            return None if operation_id is None else self._operations[operation_id]

    def get_tasks(self, operation_id: int) -> Sequence[TaskRow]:
        with self._lock:
            return list(self._tasks.get(operation_id, ()))

    def get_task(self, operation_id: int, position: int) -> TaskRow | None:
        with self._lock:
            rows = self._tasks.get(operation_id, [])
            return rows[position] if 0 <= position < len(rows) else None

    def get_children(self, root_id: int) -> Sequence[OperationRow]:
        with self._lock:
            return [row for row in self._operations.values() if row.root_id == root_id and row.id != root_id]

    def snapshot(self, uuid: str) -> OperationSnapshot | None:
        with self._lock:
            row = self.get_operation(uuid)
            if row is None:
                return None
            attempts = sorted(self._attempts.get(row.id, ()), key=lambda attempt: (attempt.position, attempt.number))
            root = self._operations[row.root_id]
            return OperationSnapshot(row, self.get_tasks(row.id), attempts, list(self._events[root.id]), root.uuid)

    def find(self, query: OperationQuery, limit: int, after: str | None = None) -> Page:
        if after is not None and not (after.isascii() and after.isdigit() and int(after) < 1 << 63):
            raise UsageError(f"after must be the cursor of the previous page; it is {after!r}")
        with self._lock:
            parent = None if query.parent is None else self._ids.get(query.parent, -1)
            rows = [
                row
                for row in sorted(self._operations.values(), key=lambda row: row.id, reverse=True)
                if row.parent_id == parent and self._matches(row, query) and (after is None or row.id < int(after))
            ]
        return Page(rows[:limit], str(rows[limit - 1].id) if len(rows) > limit else None)

    def _matches(self, row: OperationRow, query: OperationQuery) -> bool:
        return (
            (query.status is None or row.status in query.status)
            and query.entrypoint in (None, row.entrypoint)
            and (query.since is None or row.created_at >= query.since)
            and (query.until is None or row.created_at < query.until)
            and self._labels[row.id].issuperset(query.labels)
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        with self._lock:
            root = self._operations.get(checkpoint.root_id)
            if root is not None and self._is_recorded(root, checkpoint):
                return root.status
            if root is None or root.status != states.RUNNING or root.epoch != checkpoint.epoch:
                name = root.uuid if root else checkpoint.root_id
                raise FencedError(f"another consumer has claimed operation {name}, or the operation has ended")
            positions = [(self._operations[update.operation_id], update) for update in checkpoint.updates]
            if any((row.step, row.phase) != (update.stored_step, update.stored_phase) for row, update in positions):
                raise FencedError(f"operation {root.uuid} is not at the step of the checkpoint")
            if checkpoint.built is not None:
                self._reject_taken_uuids(checkpoint.built.tasks)
            now = self._clock()
            for update in checkpoint.updates:
                self._store(apply_update(self._operations[update.operation_id], update, now))
            for outcome in checkpoint.outcomes:
                self._apply_outcome(outcome, checkpoint)
            if checkpoint.built is not None:
                built = self._operations[checkpoint.built.operation_id]
                self._insert_tasks(built, checkpoint.built.tasks)
                self._store(built._replace(task_count=len(checkpoint.built.tasks)))
            events = checkpoint.events
            if root.cancel_requested:
                self._cancel_all(root.id)
                events = cancelled_events(root, events)
            for event in events:
                self._add_event(root, checkpoint.consumer, event)
            return self._store(finish_checkpoint(self._operations[root.id], checkpoint, now)).status

    def _is_recorded(self, root: OperationRow, checkpoint: Checkpoint) -> bool:
        """Return whether an earlier call, whose response was lost, has already recorded ``checkpoint``."""
        kept = checkpoint.keep and not states.is_final(root.status)
        if root.token != checkpoint.token or root.epoch != checkpoint.epoch + (not kept):
            return False
        positions = [(self._operations[update.operation_id], update) for update in checkpoint.updates]
        if any((row.step, row.phase) != (update.step, update.phase) for row, update in positions):
            return False
        attempts = [
            (outcome.operation_id, outcome.position, outcome.number)
            for outcome in checkpoint.outcomes
            if outcome.number
        ]
        known = {
            (row.operation_id, row.position, row.number)
            for operation_id, *_ in attempts
            for row in self._attempts.get(operation_id, ())
        }
        built = checkpoint.built is not None and self._operations[checkpoint.built.operation_id].task_count is not None
        traces = not kept or attempts or built or any(update.changes_position for update in checkpoint.updates)
        return bool(traces) and known.issuperset(attempts)

    def _apply_outcome(self, outcome: TaskOutcome, checkpoint: Checkpoint) -> None:
        rows = self._tasks[outcome.operation_id]
        rows[outcome.position] = apply_outcome(rows[outcome.position], outcome)
        if outcome.number:
            row = attempt_row(outcome, checkpoint, self._clock())
            self._attempts.setdefault(outcome.operation_id, []).append(row)

    def _cancel_all(self, root_id: int) -> None:
        for row in (self._operations[root_id], *self.get_children(root_id)):
            if row.id == root_id or not states.is_final(row.status):
                self._store(apply_cancel(row, self._clock()))

    # -- leases and due steps ------------------------------------------------------------------------------------------

    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        with self._lock:
            running = [row for row in self._roots_at(claims) if row.status == states.RUNNING]
            for row in running:
                self._store(apply_lease(row, owner, lease, self._clock()))
            return {row.id for row in running}

    def lease_renewer(self, timeout: float) -> LeaseRenewer:
        return _MemoryRenewer(self)

    def get_topics(self) -> Sequence[str]:
        with self._lock:
            return sorted({row.target.topic for row in self._operations.values() if row.take_at is not None})

    def reserve_due_steps(self, query: TakeoverQuery, reservation: float) -> Sequence[DueStep]:
        with self._lock:
            rows = [
                row
                for row in self._due(query.expired)
                if row.target.topic in query.topics
                and all(path in query.known for path in needed_entrypoints(row))
                and (not query.only_urgent or row.due_reason in URGENT)
                and (row.take_at or 0) + query.overdue <= self._clock()
            ]
            return [self._reserve(row, reservation) for row in rows[: query.limit]]

    def reserve_step(self, row: OperationRow, reservation: float) -> DueStep | None:
        with self._lock:
            return self._reserve(row, reservation) if self._operations.get(row.id) == row else None

    def _reserve(self, row: OperationRow, reservation: float) -> DueStep:
        return _due_step(self._store(row._replace(take_at=self._clock() + reservation)))

    def return_reservations(self, steps: Iterable[DueStep]) -> None:
        with self._lock:
            for row in self._reserved(steps):
                self._store(row._replace(take_at=self._clock()))

    def postpone_takeover(self, steps: Iterable[DueStep], wait: float) -> None:
        with self._lock:
            for row in self._reserved(steps):
                self._store(apply_failed_takeover(row, wait, self._clock()))

    def take_due_steps(
        self,
        limit: int,
        consumer: str,
        *,
        expired: bool,
        max_sends: int = MAX_SENDS,
        unknown_after: float = UNKNOWN_AFTER,
    ) -> Sequence[DueStep]:
        with self._lock:
            now = self._clock()
            due = []
            for row in [row for row in self._due(expired) if (row.send_at or 0) <= now][:limit]:
                row = self._store(row._replace(send_at=now + SEND_GRACE))
                if fails_for_its_class(row, max_sends, unknown_after, now):
                    due.append(_due_step(row, DueReason.UNKNOWN_CLASS))
                else:
                    self._add_event(row, consumer, NewEvent("sent-again", text=row.due_reason))
                    due.append(_due_step(row))
            return due

    def mark_sent(self, steps: Iterable[tuple[int, int]], resend_after: float, lease: float) -> None:
        with self._lock:
            for row in self._unclaimed(steps):
                self._store(apply_sent(row, resend_after, lease, self._clock()))

    def postpone_send(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        with self._lock:
            for row in self._unclaimed(steps):
                self._store(row._replace(send_at=self._clock() + wait))

    def refuse_class(self, uuid: str, step: str) -> OperationRow | None:
        with self._lock:
            row = self.get_operation(uuid)
            if row is None or row.parent_id is not None:
                return None
            return self._store(apply_refusal(row, step, self._clock()))

    def _due(self, expired: bool) -> list[OperationRow]:
        """Return the roots whose current step is due and not reserved, the longest due first."""
        now = self._clock()
        due = [
            row
            for row in self._operations.values()
            if row.take_at is not None and row.take_at <= now and (expired or row.owner is None)
        ]
        return sorted(due, key=lambda row: row.take_at or 0)

    def _roots_at(self, pairs: Iterable[tuple[int, int]]) -> list[OperationRow]:
        rows = [(self._operations.get(root_id), epoch) for root_id, epoch in pairs]
        return [row for row, epoch in rows if row is not None and row.epoch == epoch]

    def _unclaimed(self, pairs: Iterable[tuple[int, int]]) -> list[OperationRow]:
        return [row for row in self._roots_at(pairs) if may_be_sent(row, self._clock())]

    def _reserved(self, steps: Iterable[DueStep]) -> list[OperationRow]:
        """Return the roots whose reservations have not ended and were not replaced."""
        ends = {(step.id, step.epoch): step.take_at for step in steps}
        return [row for row in self._roots_at(ends) if row.take_at == ends[row.id, row.epoch]]

    # -- cancel, resume, purge -----------------------------------------------------------------------------------------

    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        with self._lock:
            row = self.get_operation(uuid)
            if row is None or row.parent_id is not None:
                return None
            if states.is_final(row.status):
                return row
            if has_live_owner(row, self._clock()):
                if row.cancel_requested:
                    return row
                self._add_event(row, None, NewEvent("cancel-requested", text=reason))
                return self._store(row._replace(cancel_requested=True, cancel_reason=reason))
            self._cancel_all(row.id)
            self._add_event(row, None, NewEvent("ended", text=states.CANCELLED))
            row = self._operations[row.id]
            return self._store(end_claim(row)._replace(cancel_reason=reason, token=None))

    def resume(self, uuid: str, epoch: int, token: str) -> OperationRow | None:
        with self._lock:
            root = self.get_operation(uuid)
            if root is None or root.parent_id is not None:
                return None
            if is_resumed(root, epoch, token):
                return root
            target = self._resume_task(root)
            root = apply_resume(self._operations[root.id], token, self._clock())
            if root.mode == Mode.DISTRIBUTED:
                root = root._replace(target=target)
            else:
                root = root._replace(current_entrypoints=entrypoints_json(self._current_entrypoints(root)))
            self._add_event(root, None, NewEvent("resumed"))
            return self._store(root)

    def _current_entrypoints(self, root: OperationRow) -> list[str]:
        paths, task = [], self._current(root)
        while task is not None:
            paths.append(task.entrypoint)
            task = None if task.child_id is None else self._current(self._operations[task.child_id])
        return paths

    def _resume_task(self, row: OperationRow) -> StepMessage:
        """Move the position of an operation to its first task whose status is not SUCCESS.

        If this task is a nested operation that has started, do the same in the nested operation.

        :return: the message of the step to run.
        """
        rows = self._tasks[row.id]
        step = next((task.position for task in rows if task.status != states.SUCCESS), None)
        row = row._replace(status=states.RUNNING, result=None, ended_at=None)
        if row.task_count is None:
            row = row._replace(phase=Phase.BUILD)
        elif step is None:
            row = row._replace(phase=Phase.END_SUCCESS, step=row.task_count)
        else:
            row = row._replace(phase=Phase.RUN_TASK, step=step)
        self._store(row)
        if step is None:
            return StepMessage(row.uuid, row.entrypoint, row.topic)
        task = rows[step]
        rows[step] = task._replace(status=states.PENDING, result=None, attempts_before_resume=task.attempts)
        child = None if task.child_id is None else self._operations[task.child_id]
        if child is None or child.started_at is None:
            return StepMessage(task.uuid, task.entrypoint, task.topic)
        return self._resume_task(child)

    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        with self._lock:
            ended_before = self._clock() - older_than
            old = [
                row.id
                for row in self._operations.values()
                if row.parent_id is None
                and row.status in status
                and row.ended_at is not None
                and row.ended_at < ended_before
            ][:limit]
            for root_id in old:
                for row in (self._operations[root_id], *self.get_children(root_id)):
                    del self._operations[row.id], self._ids[row.uuid], self._tasks[row.id], self._labels[row.id]
                    self._attempts.pop(row.id, None)
                del self._events[root_id]
            return len(old)

    def close(self) -> None:
        """Do nothing, because a store in memory holds no external resources."""

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _store(self, row: OperationRow) -> OperationRow:
        self._operations[row.id] = row
        return row

    def _add_event(self, root: OperationRow, consumer: str | None, event: NewEvent) -> None:
        row = EventRow(root.id, self._clock(), event.kind, root.epoch, consumer, event.uuid, event.text)
        self._events.setdefault(root.id, []).append(row)


class _MemoryRenewer(LeaseRenewer):
    """A renewer of leases in the memory of this process, where no call waits."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> Renewal:
        return Renewal(self._store.renew(claims, owner, lease), set())

    def close(self) -> None:
        """Do nothing, because the renewer holds no connection."""


def _due_step(row: OperationRow, reason: str | None = None) -> DueStep:
    return DueStep(
        id=row.id,
        uuid=row.uuid,
        epoch=row.epoch,
        target=row.target,
        reason=reason or row.due_reason or "",
        take_at=row.take_at or 0,
    )


def _all_tasks(tasks: Iterable[NewTask]) -> list[NewTask]:
    """Return ``tasks`` and, recursively, the tasks of the operations among them."""
    every: list[NewTask] = []
    for task in tasks:
        every += (task, *_all_tasks((task.child.tasks or ()) if task.child else ()))
    return every
