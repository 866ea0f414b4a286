"""A store in the memory of one process, for tests: the shortest implementation of the contract."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from kser import status as states
from kser.errors import FencedError, StateConflict, StoreError, UsageError
from kser.store.base import Store
from kser.store.rows import (
    DISTRIBUTED,
    END_SUCCESS,
    STALE,
    START,
    TASK,
    AttemptRow,
    Checkpoint,
    Claim,
    Claimant,
    Due,
    EventRow,
    Found,
    NewOperation,
    NewTask,
    Note,
    OperationRow,
    Page,
    Refusal,
    Stored,
    Target,
    TaskEnd,
    TaskRow,
)
from kser.store.transitions import (
    attempt_row,
    cancelled,
    claimed,
    ended,
    is_held,
    moved,
    new_row,
    new_task_row,
    refusal,
    resumed,
    sent,
    settled,
    taken_up,
    why_due,
)


class MemoryStore(Store):
    """A store in the memory of this process.

    :param clock: returns the time, in seconds since 1970.
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
        """Do nothing: a store in memory has no schema version."""

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, operation: NewOperation, claimant: Claimant | None = None) -> Claim | Refusal | int:
        with self._lock:
            known = self.peek(operation.uuid)
            if known is not None:
                if claimant is not None and known.token == claimant.token:
                    return self._claim_of(known, claimant)
                return Refusal(STALE, known)
            self._refuse_taken(operation.tasks or ())
            root = self._insert(operation, None, None)
            self._note(root, None, Note("accepted"))
            return root.id if claimant is None else self._take(root, claimant)

    def _insert(self, new: NewOperation, parent_id: int | None, root_id: int | None) -> OperationRow:
        self._last_id += 1
        row = self._put(new_row(new, self._last_id, parent_id, root_id, self._clock()))
        self._ids[row.uuid] = row.id
        self._labels[row.id] = set(new.labels)
        self._insert_tasks(row, new.tasks or ())
        return row

    def _insert_tasks(self, operation: OperationRow, tasks: Sequence[NewTask]) -> None:
        rows = self._tasks[operation.id] = []
        for position, new in enumerate(tasks):
            child = None if new.child is None else self._insert(new.child, operation.id, operation.root_id).id
            rows.append(new_task_row(new, operation.id, position, child))

    def _refuse_taken(self, tasks: Sequence[NewTask]) -> None:
        uuids = [task.child.uuid for task in _all_tasks(tasks) if task.child]
        taken = [uuid for uuid, count in Counter(uuids).items() if count > 1 or uuid in self._ids]
        if taken:
            raise StoreError(f"operations with these uuids are already stored: {', '.join(sorted(taken))}")

    # -- claiming ------------------------------------------------------------------------------------------------------

    def claim(self, uuid: str, step: str, claimant: Claimant) -> Claim | Refusal | None:
        with self._lock:
            row = self.peek(uuid)
            if row is None or row.parent_id is not None:
                return None
            if row.token == claimant.token:
                return self._claim_of(row, claimant)
            reason = refusal(row, step, self._clock())
            return self._take(row, claimant) if reason is None else Refusal(reason, row)

    def _take(self, row: OperationRow, claimant: Claimant) -> Claim:
        row = self._put(claimed(row, claimant, self._clock()))
        self._note(row, claimant.owner, Note("claimed"))
        return self._claim_of(row, claimant)

    def _claim_of(self, root: OperationRow, claimant: Claimant) -> Claim:
        path = [root]
        task = self._current(root)
        while task is not None and task.child_id is not None:
            path.append(self._operations[task.child_id])
            task = self._current(path[-1])
        last = path[-1]
        following = self.task(last.id, last.step + 1) if task and root.mode == DISTRIBUTED else None
        return Claim(root.id, root.epoch, tuple(path), task, following, root.claims > claimant.max_claims)

    def _current(self, row: OperationRow) -> TaskRow | None:
        return self._tasks[row.id][row.step] if row.phase == TASK else None

    # -- reading -------------------------------------------------------------------------------------------------------

    def peek(self, uuid: str) -> OperationRow | None:
        with self._lock:
            found = self._ids.get(uuid)
            return None if found is None else self._operations[found]

    def tasks(self, operation_id: int) -> Sequence[TaskRow]:
        with self._lock:
            return list(self._tasks.get(operation_id, ()))

    def task(self, operation_id: int, position: int) -> TaskRow | None:
        with self._lock:
            rows = self._tasks.get(operation_id, [])
            return rows[position] if 0 <= position < len(rows) else None

    def children(self, root_id: int) -> Sequence[OperationRow]:
        with self._lock:
            return [row for row in self._operations.values() if row.root_id == root_id and row.id != root_id]

    def get(self, uuid: str) -> Stored | None:
        with self._lock:
            row = self.peek(uuid)
            if row is None:
                return None
            attempts = sorted(self._attempts.get(row.id, ()))
            root = self._operations[row.root_id]
            return Stored(row, self.tasks(row.id), attempts, list(self._events[root.id]), root.uuid)

    def find(self, found: Found, limit: int, after: str | None = None) -> Page:
        if after is not None and not (after.isascii() and after.isdigit() and int(after) < 1 << 63):
            raise UsageError(f"after must be the cursor of the previous page; it is {after!r}")
        with self._lock:
            parent = None if found.parent is None else self._ids.get(found.parent, -1)
            rows = [
                row
                for row in sorted(self._operations.values(), reverse=True)
                if row.parent_id == parent and self._fits(row, found) and (after is None or row.id < int(after))
            ]
        return Page(rows[:limit], str(rows[limit - 1].id) if len(rows) > limit else None)

    def _fits(self, row: OperationRow, found: Found) -> bool:
        return (
            (found.status is None or row.status in found.status)
            and found.entrypoint in (None, row.entrypoint)
            and (found.since is None or row.created_at >= found.since)
            and (found.until is None or row.created_at < found.until)
            and self._labels[row.id].issuperset(found.labels)
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        with self._lock:
            root = self._operations.get(checkpoint.root_id)
            if root is not None and self._is_recorded(root, checkpoint):
                return root.status
            if root is None or root.status != states.RUNNING or root.epoch != checkpoint.epoch:
                name = root.uuid if root else checkpoint.root_id
                raise FencedError(f"another consumer has claimed operation {name}, or it has ended")
            places = [(self._operations[move.operation_id], move) for move in checkpoint.moves]
            if any((row.step, row.phase) != (move.old_step, move.old_phase) for row, move in places):
                raise FencedError(f"operation {root.uuid} is at another step")
            if checkpoint.built is not None:
                self._refuse_taken(checkpoint.built.tasks)
            now = self._clock()
            for move in checkpoint.moves:
                self._put(moved(self._operations[move.operation_id], move, now))
            for end in checkpoint.ends:
                self._end_task(end, checkpoint)
            if checkpoint.built is not None:
                built = self._operations[checkpoint.built.operation_id]
                self._insert_tasks(built, checkpoint.built.tasks)
                self._put(built._replace(size=len(checkpoint.built.tasks)))
            notes = checkpoint.notes
            if root.cancel_requested:
                self._cancel_all(root.id)
                notes = [*(note for note in notes if note.kind != "ended"), Note("ended", text=states.CANCELLED)]
            for note in notes:
                self._note(root, checkpoint.consumer, note)
            return self._put(settled(self._operations[root.id], checkpoint, now)).status

    def _is_recorded(self, root: OperationRow, checkpoint: Checkpoint) -> bool:
        """Return whether this same checkpoint was recorded before, by a call whose response was lost."""
        kept = checkpoint.keep and not states.is_final(root.status)
        if root.token != checkpoint.token or root.epoch != checkpoint.epoch + (not kept):
            return False
        places = [(self._operations[move.operation_id], move) for move in checkpoint.moves]
        if any((row.step, row.phase) != (move.step, move.phase) for row, move in places):
            return False
        attempts = [(end.operation_id, end.position, end.number) for end in checkpoint.ends if end.number]
        known = {row[:3] for at, *_ in attempts for row in self._attempts.get(at, ())}
        built = checkpoint.built is not None and self._operations[checkpoint.built.operation_id].size is not None
        traces = not kept or attempts or built or any(move.leaves for move in checkpoint.moves)
        return bool(traces) and known.issuperset(attempts)

    def _end_task(self, end: TaskEnd, checkpoint: Checkpoint) -> None:
        rows = self._tasks[end.operation_id]
        rows[end.position] = ended(rows[end.position], end)
        if end.number:
            row = attempt_row(end, checkpoint, self._clock())
            self._attempts.setdefault(end.operation_id, []).append(row)

    def _cancel_all(self, root_id: int) -> None:
        for row in (self._operations[root_id], *self.children(root_id)):
            if row.id == root_id or not states.is_final(row.status):
                self._put(cancelled(row, self._clock()))

    # -- leases and the reaper -----------------------------------------------------------------------------------------

    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        with self._lock:
            mine = [row for row in self._at(claims) if row.status == states.RUNNING]
            for row in mine:
                self._put(row._replace(owner=owner, wake_at=self._clock() + lease))
            return {row.id for row in mine}

    def sent(self, steps: Iterable[tuple[int, int]], resend_after: float) -> None:
        with self._lock:
            for row in self._unclaimed(steps):
                self._put(sent(row, resend_after, self._clock()))

    def take_due(self, limit: int, consumer: str, *, expired: bool) -> Sequence[Due]:
        with self._lock:
            now = self._clock()
            rows = [
                row
                for row in self._operations.values()
                if row.wake_at is not None and row.wake_at <= now and (expired or row.owner is None)
            ]
            return [self._take_up(row, consumer) for row in sorted(rows, key=lambda row: row.wake_at or 0)[:limit]]

    def _take_up(self, row: OperationRow, consumer: str) -> Due:
        reason = why_due(row)
        self._put(taken_up(row, self._clock()))
        self._note(row, consumer, Note("sent-again", text=reason))
        return Due(row.id, row.uuid, row.epoch, row.target, reason)

    def unsent(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        with self._lock:
            for row in self._unclaimed(steps):
                self._put(row._replace(wake_at=self._clock() + wait))

    def _at(self, pairs: Iterable[tuple[int, int]]) -> list[OperationRow]:
        rows = [(self._operations.get(root_id), epoch) for root_id, epoch in pairs]
        return [row for row, epoch in rows if row is not None and row.epoch == epoch]

    def _unclaimed(self, pairs: Iterable[tuple[int, int]]) -> list[OperationRow]:
        return [row for row in self._at(pairs) if row.owner is None and row.wake_at is not None]

    # -- cancel, resume, purge -----------------------------------------------------------------------------------------

    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        with self._lock:
            row = self.peek(uuid)
            if row is None or row.parent_id is not None:
                return None
            if states.is_final(row.status):
                return row
            if is_held(row, self._clock()):
                self._note(row, None, Note("cancel-requested", text=reason))
                return self._put(row._replace(cancel_requested=True, cancel_reason=reason))
            self._cancel_all(row.id)
            self._note(row, None, Note("ended", text=states.CANCELLED))
            row = self._operations[row.id]
            return self._put(
                row._replace(cancel_reason=reason, owner=None, token=None, wake_at=None, epoch=row.epoch + 1)
            )

    def resume(self, uuid: str) -> OperationRow | None:
        with self._lock:
            root = self.peek(uuid)
            if root is None or root.parent_id is not None:
                return None
            if not states.can_transition(root.status, states.RUNNING) or not states.is_final(root.status):
                raise StateConflict(f"operation {uuid} is {root.status}: only a FAILED or CANCELLED one can be resumed")
            target = self._restart(root)
            root = resumed(self._operations[root.id], self._clock())
            root = root._replace(target=target if root.mode == DISTRIBUTED else root.target)
            self._note(root, None, Note("resumed"))
            return self._put(root)

    def _restart(self, row: OperationRow) -> Target:
        """Set an operation back to its first task that is not SUCCESS, and return the message of that step."""
        rows = self._tasks[row.id]
        step = next((task.position for task in rows if task.status != states.SUCCESS), None)
        row = row._replace(status=states.RUNNING, result=None, ended_at=None)
        if row.size is None:
            row = row._replace(phase=START)
        elif step is None:
            row = row._replace(phase=END_SUCCESS, step=row.size)
        else:
            row = row._replace(phase=TASK, step=step)
        self._put(row)
        if step is None:
            return Target(row.uuid, row.entrypoint, row.topic)
        task = rows[step]
        rows[step] = task._replace(status=states.PENDING, result=None, resumed_after=task.attempts)
        child = None if task.child_id is None else self._operations[task.child_id]
        if child is None or child.started_at is None:
            return Target(task.uuid, task.entrypoint, task.topic)
        return self._restart(child)

    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        with self._lock:
            until = self._clock() - older_than
            old = [
                row.id
                for row in self._operations.values()
                if row.parent_id is None and row.status in status and row.ended_at is not None and row.ended_at < until
            ][:limit]
            for root_id in old:
                for row in (self._operations[root_id], *self.children(root_id)):
                    del self._operations[row.id], self._ids[row.uuid], self._tasks[row.id], self._labels[row.id]
                    self._attempts.pop(row.id, None)
                del self._events[root_id]
            return len(old)

    def close(self) -> None:
        """Do nothing: a store in memory holds no external resources."""

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _put(self, row: OperationRow) -> OperationRow:
        self._operations[row.id] = row
        return row

    def _note(self, root: OperationRow, consumer: str | None, note: Note) -> None:
        event = EventRow(root.id, self._clock(), note.kind, root.epoch, consumer, note.uuid, note.text)
        self._events.setdefault(root.id, []).append(event)


def _all_tasks(tasks: Iterable[NewTask]) -> list[NewTask]:
    """Return tasks, including those of the operations nested in them."""
    found: list[NewTask] = []
    for task in tasks:
        found += (task, *_all_tasks((task.child.tasks or ()) if task.child else ()))
    return found
