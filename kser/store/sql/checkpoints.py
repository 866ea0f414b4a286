"""The statements that record checkpoints in batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Double,
    Integer,
    Text,
    bindparam,
    case,
    cast,
    func,
    literal,
    null,
    or_,
    select,
)

from kser import status as states
from kser.errors import FencedError
from kser.store.model import (
    MAX_ERROR_LENGTH,
    Checkpoint,
    NewEvent,
    OperationRow,
    OperationUpdate,
    TaskOutcome,
)
from kser.store.sql.database import Database, Transaction
from kser.store.sql.ids import IdGenerator
from kser.store.sql.inserts import InsertRows, Inserts, count_in, event_row, insert_events, without_nul
from kser.store.sql.statements import ONE, ROWS, ZERO, RowSource, types_of
from kser.store.sql.tables import OPERATION_COLUMNS, attempt, operation, operation_row, task
from kser.store.transitions import cancelled_events, release_waits


class Position(NamedTuple):
    """The stored position of an operation."""

    id: int
    step: int
    phase: str
    task_count: int | None

    def differs_from(self, step: int, phase: str) -> bool:
        """Return whether the stored step is not ``step``, or the stored phase is not ``phase``."""
        return (self.step, self.phase) != (step, phase)


class RowCountMismatch(Exception):
    """A statement changed fewer rows than expected, so a checkpoint does not match the stored rows."""


class CheckpointRows:
    """The row values of a batch of checkpoints, grouped by the statement that writes them."""

    def __init__(self) -> None:
        #: Roots whose claims are kept; ``redirected`` are those of them whose next step has another message.
        self.kept: list[dict[str, Any]] = []
        self.redirected: list[dict[str, Any]] = []
        self.released: list[dict[str, Any]] = []
        self.children: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []
        self.attempts: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.task_counts: list[dict[str, Any]] = []
        self.inserts = InsertRows()

    def add_root(self, checkpoint: Checkpoint, cancelled: bool) -> None:
        """Add the row values for the root of a checkpoint.

        :param cancelled: True if a client has requested to cancel the root. The root then becomes CANCELLED.
        """
        update = checkpoint.updates[-1]
        if cancelled:
            update = update._replace(status=states.CANCELLED, result=update.accumulated)
        final = states.is_final(update.status)
        kept = checkpoint.keep and not final
        row: dict[str, Any] = {
            "id": update.operation_id,
            "epoch": checkpoint.epoch,
            "stored_step": update.stored_step,
            "stored_phase": update.stored_phase,
            "cancelled": cancelled,
            "step": update.step,
            "phase": update.phase,
            "accumulated": update.accumulated,
            "result": update.result,
            "current_entrypoints": checkpoint.current_entrypoints,
            "status": update.status,
            "released": int(not kept),
            "ended": int(final),
        }
        if kept and checkpoint.target is None:
            # Most checkpoints end here. A value that is missing in a row is NULL in the statement of PostgreSQL, and is
            # not named in the statement of SQLite.
            self.kept.append(row)
            return
        row |= zip(_TARGET, checkpoint.target or _NO_TARGET, strict=True)
        if kept:
            self.redirected.append(row)
        else:
            row |= _release_values(None if final else checkpoint)
            self.released.append(row)

    def in_order(self) -> list[dict[str, Any]]:
        """Return the row values for all roots, ordered by the id of the root."""
        return sorted((*self.kept, *self.redirected, *self.released), key=lambda row: row["id"])

    def add_rest(self, checkpoint: Checkpoint, first_id: int, events: Sequence[NewEvent]) -> None:
        """Add all row values of a checkpoint except those for its root.

        :param first_id: the first of the consecutive ids that are reserved for the operations among newly built tasks,
            including all operations nested in these at any depth.
        """
        self.children += (_child_row(update) for update in checkpoint.updates[:-1])
        for outcome in checkpoint.outcomes:
            self.outcomes.append(_outcome_row(outcome))
            if outcome.number:
                self.attempts.append(_attempt_row(outcome, checkpoint))
        for event in events:
            self.events.append(
                event_row(
                    checkpoint.root_id,
                    event.kind,
                    checkpoint.epoch,
                    checkpoint.consumer,
                    uuid=event.uuid,
                    text=event.text,
                )
            )
        built = checkpoint.built
        if built is not None:
            self.task_counts.append({"id": built.operation_id, "task_count": len(built.tasks)})
            self.inserts.add_tasks(built.tasks, built.operation_id, checkpoint.root_id, itertools.count(first_id))


class CheckpointWriter:
    """The statements that record checkpoints.

    :param database: the database to write to.
    :param inserts: the insert statements of this database.
    :param ids: generator of the ids of the operations among newly built tasks.
    """

    def __init__(self, database: Database, inserts: Inserts, ids: IdGenerator) -> None:
        self._inserts = inserts
        self._ids = ids
        self._single_statement = database.statement(single_statement(database)) if database.json_batches else None
        self._prepare_updates(database)
        self._prepare_reads(database)

    def _prepare_updates(self, database: Database) -> None:
        # SQLite rewrites the index entries of every column that an UPDATE names, even if the value is unchanged. So the
        # statement for checkpoints that keep their claims names no indexed column.
        self._keep_claim = database.statement(keep_claim(database))
        self._redirect_claim = database.statement(keep_claim(database, target=True))
        self._update_roots = database.statement(update_roots(database))
        self._update_children = database.statement(update_children(database))
        self._set_task_count = database.statement(set_task_count(database))
        self._apply_outcomes = database.statement(apply_outcomes(database))
        self._insert_attempts = database.statement(insert_attempts(database))

    def _prepare_reads(self, database: Database) -> None:
        row = database.source(types_of(operation, "id"))
        same_id = operation.c.id == row["id"]
        self._lock_root = database.statement(
            row.select(OPERATION_COLUMNS, operation, same_id).with_for_update(of=operation)
        )
        columns = [operation.c[name] for name in Position._fields]
        self._read_positions = database.statement(row.select(columns, operation, same_id))
        row = database.source(types_of(attempt, "operation_id", "position", "number"))
        key = [attempt.c[name] == row[name] for name in ("operation_id", "position", "number")]
        self._read_attempts = database.statement(row.select([attempt.c.number], attempt, *key))
        cancelled = {"status": states.CANCELLED, "ended_at": database.now, "result": operation.c.accumulated}
        row = database.source(types_of(operation, "root_id"))
        unfinished = (
            operation.c.root_id == row["root_id"],
            operation.c.parent_id.is_not(None),
            or_(operation.c.status == states.PENDING, operation.c.status == states.RUNNING),
        )
        self._cancel_children = database.statement(row.update(operation, cancelled, *unfinished))

    # -- batches -------------------------------------------------------------------------------------------------------

    def record(self, transaction: Transaction, checkpoints: Sequence[Checkpoint]) -> list[str]:
        """Record checkpoints of different roots, and return the status of each root.

        :raises RowCountMismatch: a checkpoint does not match the stored rows, or a client has requested to cancel its
            root.
        """
        rows = CheckpointRows()
        for checkpoint in checkpoints:
            rows.add_root(checkpoint, cancelled=False)
            self._add_rest(transaction, rows, checkpoint, checkpoint.events)
        self._write(transaction, rows)
        return [checkpoint.updates[-1].status for checkpoint in checkpoints]

    def fits_one_statement(self, checkpoints: Sequence[Checkpoint]) -> bool:
        """Return whether :meth:`record_in_one_statement` can record the checkpoints.

        This is the case if no checkpoint contains built tasks or updates of nested operations.
        """
        return not any(checkpoint.built or len(checkpoint.updates) > 1 for checkpoint in checkpoints)

    def record_in_one_statement(self, transaction: Transaction, checkpoints: Sequence[Checkpoint]) -> list[str]:
        """Record checkpoints in one statement, with the same effect as :meth:`record`.

        One statement is faster than several, because each statement costs a round trip to the server, which takes as
        long as the execution of the statement.

        :raises kser.errors.StoreError: a checkpoint does not match the stored rows; nothing was recorded.
        """
        rows = CheckpointRows()
        for checkpoint in checkpoints:
            rows.add_root(checkpoint, cancelled=False)
            rows.add_rest(checkpoint, 0, checkpoint.events)
        roots = rows.in_order()
        assert self._single_statement is not None, "fits_one_statement() allows this on PostgreSQL only"
        transaction.execute(
            self._single_statement,
            {
                "updates": json.dumps(roots),
                "outcomes": json.dumps(rows.outcomes),
                "attempts": json.dumps(rows.attempts),
                "events": json.dumps(rows.events),
                "expected": len(roots) + len(rows.outcomes),
            },
        )
        return [checkpoint.updates[-1].status for checkpoint in checkpoints]

    def _add_rest(
        self, transaction: Transaction, rows: CheckpointRows, checkpoint: Checkpoint, events: Sequence[NewEvent]
    ) -> None:
        built = checkpoint.built
        count = 0 if built is None else count_in(built.tasks)
        rows.add_rest(checkpoint, self._ids.next_ids(transaction.time, count) if count else 0, events)

    def _write(self, transaction: Transaction, rows: CheckpointRows) -> None:
        statements = [
            (self._keep_claim, rows.kept),
            (self._redirect_claim, rows.redirected),
            (self._update_roots, rows.released),
        ]
        if self._single_statement is not None:
            # Update all roots in one statement, ordered by id; otherwise this transaction and a transaction that renews
            # leases could deadlock.
            statements = [(self._update_roots, rows.in_order())]
        for statement, roots in statements:
            if transaction.execute_many(statement, roots) != len(roots):
                raise RowCountMismatch
        if transaction.execute_many(self._update_children, rows.children) != len(rows.children):
            raise RowCountMismatch
        if transaction.execute_many(self._apply_outcomes, rows.outcomes) != len(rows.outcomes):
            raise RowCountMismatch
        transaction.execute_many(self._insert_attempts, rows.attempts)
        transaction.execute_many(self._set_task_count, rows.task_counts)
        self._inserts.insert(transaction, rows.inserts)
        transaction.execute_many(self._inserts.events, rows.events)

    # -- single checkpoints --------------------------------------------------------------------------------------------

    def resolve_mismatch(self, transaction: Transaction, checkpoint: Checkpoint) -> str:
        """Record one checkpoint that could not be recorded with its batch.

        If an earlier call has recorded this checkpoint, the call changes nothing. If a client has requested to cancel
        the root, the root becomes CANCELLED.

        :return: the status of the root.
        :raises kser.errors.FencedError: the checkpoint does not match the stored rows.
        """
        rows = transaction.fetch(self._lock_root, [{"id": checkpoint.root_id}])
        if not rows:
            raise FencedError(f"operation {checkpoint.root_id} is not stored: it was deleted")
        root = operation_row(rows[0])
        rows = transaction.fetch(self._read_positions, [{"id": update.operation_id} for update in checkpoint.updates])
        positions = {position.id: position for position in (Position(*row) for row in rows)}
        if len(positions) < len({update.operation_id for update in checkpoint.updates}):
            raise FencedError(f"a nested operation of operation {root.uuid} is not stored")
        if self._is_recorded(transaction, checkpoint, root, positions):
            return root.status
        if root.status != states.RUNNING or root.epoch != checkpoint.epoch:
            raise FencedError(
                f"another consumer has claimed operation {root.uuid}, or the operation has ended: its status is"
                f" {root.status}"
            )
        if any(
            positions[update.operation_id].differs_from(update.stored_step, update.stored_phase)
            for update in checkpoint.updates
        ):
            raise FencedError(f"operation {root.uuid} is not at the step of the checkpoint")
        return self._record_one(transaction, checkpoint, root)

    def _is_recorded(
        self, transaction: Transaction, checkpoint: Checkpoint, root: OperationRow, positions: Mapping[int, Position]
    ) -> bool:
        """Return whether an earlier transaction, whose COMMIT had an unknown outcome, recorded this checkpoint."""
        kept = checkpoint.keep and not states.is_final(root.status)
        if root.token != checkpoint.token or root.epoch != checkpoint.epoch + (not kept):
            return False
        if any(positions[update.operation_id].differs_from(update.step, update.phase) for update in checkpoint.updates):
            return False
        keys = [
            {"operation_id": outcome.operation_id, "position": outcome.position, "number": outcome.number}
            for outcome in checkpoint.outcomes
            if outcome.number
        ]
        if len(transaction.fetch(self._read_attempts, keys)) < len(keys):
            return False
        # A checkpoint that keeps the claim, changes no position, adds no attempt and builds no tasks leaves no trace in
        # the rows, so it is unknown whether it was recorded. Return False for such a checkpoint, so that the caller
        # records it. If it was recorded before, the second recording does not change the state of the operation.
        built = checkpoint.built is not None and positions[checkpoint.built.operation_id].task_count is not None
        return bool(not kept or keys or built or any(update.changes_position for update in checkpoint.updates))

    def _record_one(self, transaction: Transaction, checkpoint: Checkpoint, root: OperationRow) -> str:
        cancelled = root.cancel_requested
        rows = CheckpointRows()
        rows.add_root(checkpoint, cancelled)
        events = cancelled_events(root, checkpoint.events) if cancelled else checkpoint.events
        self._add_rest(transaction, rows, checkpoint, events)
        try:
            self._write(transaction, rows)
        except RowCountMismatch:
            raise FencedError(
                f"a nested operation or task of operation {root.uuid} is not at the step of the checkpoint"
            ) from None
        if not cancelled:
            return checkpoint.updates[-1].status
        transaction.execute_many(self._cancel_children, [{"root_id": root.id}])
        return states.CANCELLED


def _release_values(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return the values of a root that releases its claim; without ``checkpoint``, of a root that has ended."""
    if checkpoint is None:
        return {"take_after": None, "send_delay": None, "due_reason": None, "delay": None}
    take_after, send_delay = release_waits(checkpoint)
    return {
        "take_after": take_after,
        "send_delay": send_delay,
        "due_reason": checkpoint.due_reason,
        "delay": checkpoint.delay,
    }


def _child_row(update: OperationUpdate) -> dict[str, Any]:
    return {
        "id": update.operation_id,
        "stored_step": update.stored_step,
        "stored_phase": update.stored_phase,
        "step": update.step,
        "phase": update.phase,
        "status": update.status,
        "accumulated": update.accumulated,
        "result": update.result,
        "ended": int(states.is_final(update.status)),
    }


def _outcome_row(outcome: TaskOutcome) -> dict[str, Any]:
    return {
        "operation_id": outcome.operation_id,
        "position": outcome.position,
        "status": outcome.status,
        "result": outcome.result,
        "number": outcome.number,
    }


def _attempt_row(outcome: TaskOutcome, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "operation_id": outcome.operation_id,
        "position": outcome.position,
        "number": outcome.number,
        "epoch": checkpoint.epoch,
        "status": states.SUCCESS if outcome.status == states.SUCCESS else states.FAILED,
        "consumer": checkpoint.consumer,
        "error": without_nul(outcome.error and outcome.error[:MAX_ERROR_LENGTH]),
        "duration": outcome.duration,
    }


_TARGET: Final = ("target_uuid", "target_entrypoint", "target_topic")

_NO_TARGET: Final = (None, None, None)

#: Values that must match the stored root, so that an update by an owner that has lost its claim changes no row.
_FENCE: Final = {"epoch": BigInteger(), "stored_step": Integer(), "stored_phase": Text(), "cancelled": Boolean()}

#: Additional values for the update of a root that may release its claim.
_RELEASE: Final = {
    "status": Text(),
    "released": Integer(),
    "ended": Integer(),
    "take_after": Double(),
    "send_delay": Double(),
    "due_reason": Text(),
    "delay": Double(),
}


def keep_claim(database: Database, *, target: bool = False) -> Any:
    """Return a statement that updates roots and keeps their claims.

    :param target: True to update also the messages of the current steps, whose topics are in an index.
    """
    row = _root_rows(database, ROWS, {})
    return _update_values(row, _target_values(row) if target else {})


def update_roots(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that updates roots and, depending on the row values, keeps or releases each claim."""
    row = _root_rows(database, rows, _RELEASE)
    own, now = operation.c, database.now
    released, take_at = row["released"] == ONE, now + row["take_after"]
    return _update_values(
        row,
        {
            **_target_values(row),
            "status": row["status"],
            "epoch": own.epoch + row["released"],
            "owner": case((released, None), else_=own.owner),
            "lease_until": case((released, None), else_=own.lease_until),
            "take_at": case((released, take_at), else_=own.take_at),
            "send_at": case((released, take_at + row["send_delay"]), else_=own.send_at),
            "due_reason": case((released, row["due_reason"]), else_=own.due_reason),
            "due_at": func.coalesce(now + row["delay"], own.due_at),
            "ended_at": case((row["ended"] == ONE, now), else_=None),
        },
    )


def _root_rows(database: Database, rows: str, more: dict[str, Any]) -> RowSource:
    types = types_of(operation, "id", "step", "phase", "accumulated", "result", "current_entrypoints", *_TARGET)
    return database.source({**types, **_FENCE, **more}, rows)


def _target_values(row: RowSource) -> dict[str, Any]:
    return {name: func.coalesce(row[name], operation.c[name]) for name in _TARGET}


def _update_values(row: RowSource, more: dict[str, Any]) -> Any:
    own = operation.c
    names = ("step", "phase", "accumulated", "result", "current_entrypoints")
    changed: dict[str, Any] = {name: row[name] for name in names}
    changed |= {"claim_count": ZERO, "send_count": ZERO, "sent_at": null(), **more}
    return row.update(
        operation,
        changed,
        own.id == row["id"],
        own.epoch == row["epoch"],
        own.status == states.RUNNING,
        own.step == row["stored_step"],
        own.phase == row["stored_phase"],
        own.cancel_requested == row["cancelled"],
    )


def update_children(database: Database) -> Any:
    """Return a statement that updates nested operations, including those that end."""
    own, now = operation.c, database.now
    types = types_of(operation, "id", "step", "phase", "status", "accumulated", "result")
    row = database.source({**types, "stored_step": Integer(), "stored_phase": Text(), "ended": Integer()})
    values = {name: row[name] for name in types if name != "id"}
    values["started_at"] = func.coalesce(own.started_at, now)
    values["ended_at"] = case((row["ended"] == 1, now), else_=None)
    where = (own.id == row["id"], own.step == row["stored_step"], own.phase == row["stored_phase"])
    return row.update(operation, values, *where)


def set_task_count(database: Database) -> Any:
    """Return a statement that stores how many tasks were built for each operation."""
    row = database.source(types_of(operation, "id", "task_count"))
    return row.update(operation, {"task_count": row["task_count"]}, operation.c.id == row["id"])


def apply_outcomes(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that writes the outcomes of attempts to the rows of tasks."""
    types = types_of(task, "operation_id", "position", "status", "result")
    row = database.source({**types, "number": Integer()}, rows)
    values = {
        "status": row["status"],
        "result": case((row["status"] == states.PENDING, task.c.result), else_=row["result"]),
        "attempts": case((task.c.attempts > row["number"], task.c.attempts), else_=row["number"]),
    }
    return row.update(task, values, task.c.operation_id == row["operation_id"], task.c.position == row["position"])


def insert_attempts(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts attempt rows."""
    now = database.now
    types = types_of(attempt, "operation_id", "position", "number", "epoch", "status", "consumer", "error")
    row = database.source({**types, "duration": Double()}, rows)
    values = {name: row[name] for name in types} | {"started_at": now - row["duration"], "ended_at": now}
    return row.insert(attempt, values)


def single_statement(database: Database) -> Any:
    """Return one statement that records checkpoints without built tasks and without updates of nested operations.

    The statement fails unless the number of changed rows of roots and tasks equals the bind parameter ``expected``.
    """
    roots = update_roots(database, "updates").returning(operation.c.id).cte("updated_roots")
    tasks = apply_outcomes(database, "outcomes").returning(task.c.position).cte("updated_tasks")
    attempts = insert_attempts(database, "attempts").cte("inserted_attempts")
    events = insert_events(database, "events").cte("inserted_events")
    changed_roots, changed_tasks = (select(func.count()).select_from(part).scalar_subquery() for part in (roots, tasks))
    changed = changed_roots + changed_tasks
    # Make the statement fail if the number of changed rows differs from ``expected``: the cast of the text ``problem``
    # to a number then raises an error, and the server's log shows this text as the reason.
    problem = literal("not every checkpoint of kser matches the stored rows: ", Text) + cast(changed, Text)
    check = case((changed == bindparam("expected", type_=BigInteger), 1), else_=cast(problem, Integer))
    return select(check).add_cte(attempts, events)
