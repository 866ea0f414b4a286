"""The update statements of checkpoints, each for the rows of one or of many checkpoints."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BigInteger, Boolean, Double, Integer, Text, bindparam, case, cast, func, literal, select

from kser import status as states
from kser.store.sql.adding import insert_events
from kser.store.sql.database import Database
from kser.store.sql.statements import ROWS, RowSource, types_of
from kser.store.sql.tables import attempt, operation, task

_TARGET: Final = ("target_uuid", "target_entrypoint", "target_topic")

#: Values that must match the stored root, so that an update by a stale owner changes no row.
_FENCE: Final = {"epoch": BigInteger(), "old_step": Integer(), "old_phase": Text(), "cancelled": Boolean()}

#: Values of an update that may release the claim.
_RELEASE: Final = {
    "status": Text(),
    "released": Integer(),
    "ended": Integer(),
    "wait": Double(),
    "delay": Double(),
}


def keep_claim(database: Database) -> Any:
    """Return a statement that updates roots and keeps their claims."""
    row = _root_rows(database, ROWS, {})
    return _update_values(row, {})


def update_roots(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that updates roots and keeps or releases their claims."""
    row = _root_rows(database, rows, _RELEASE)
    own, now = operation.c, database.now
    released = row["released"] == 1
    return _update_values(
        row,
        {
            "status": row["status"],
            "epoch": own.epoch + row["released"],
            "owner": case((released, None), else_=own.owner),
            "next_check_at": case((released, now + row["wait"]), else_=own.next_check_at),
            "due_at": func.coalesce(now + row["delay"], own.due_at),
            "ended_at": case((row["ended"] == 1, now), else_=None),
        },
    )


def _root_rows(database: Database, rows: str, more: dict[str, Any]) -> RowSource:
    types = types_of(operation, "id", "step", "phase", "accumulated", "result", *_TARGET)
    return database.source({**types, **_FENCE, **more}, rows)


def _update_values(row: RowSource, more: dict[str, Any]) -> Any:
    own = operation.c
    changed: dict[str, Any] = {name: row[name] for name in ("step", "phase", "accumulated", "result")}
    changed |= {name: func.coalesce(row[name], own[name]) for name in _TARGET}
    changed |= {"claim_count": 0, "send_count": 0, "sent_at": None, **more}
    return row.update(
        operation,
        changed,
        own.id == row["id"],
        own.epoch == row["epoch"],
        own.status == states.RUNNING,
        own.step == row["old_step"],
        own.phase == row["old_phase"],
        own.cancel_requested == row["cancelled"],
    )


def update_children(database: Database) -> Any:
    """Return a statement that updates nested operations, including those that end."""
    own, now = operation.c, database.now
    types = types_of(operation, "id", "step", "phase", "status", "accumulated", "result")
    row = database.source({**types, "old_step": Integer(), "old_phase": Text(), "ended": Integer()})
    values = {name: row[name] for name in types if name != "id"}
    values["started_at"] = func.coalesce(own.started_at, now)
    values["ended_at"] = case((row["ended"] == 1, now), else_=None)
    where = (own.id == row["id"], own.step == row["old_step"], own.phase == row["old_phase"])
    return row.update(operation, values, *where)


def set_task_count(database: Database) -> Any:
    """Return a statement that sets the number of tasks of operations."""
    row = database.source(types_of(operation, "id", "task_count"))
    return row.update(operation, {"task_count": row["task_count"]}, operation.c.id == row["id"])


def end_tasks(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that updates tasks after their attempts."""
    types = types_of(task, "operation_id", "position", "status", "result")
    row = database.source({**types, "number": Integer()}, rows)
    values = {
        "status": row["status"],
        "result": case((row["status"] == states.PENDING, task.c.result), else_=row["result"]),
        "attempts": case((task.c.attempts > row["number"], task.c.attempts), else_=row["number"]),
    }
    return row.update(task, values, task.c.operation_id == row["operation_id"], task.c.position == row["position"])


def add_attempts(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts attempts."""
    now = database.now
    types = types_of(attempt, "operation_id", "position", "number", "epoch", "status", "consumer", "error")
    row = database.source({**types, "duration": Double()}, rows)
    values = {name: row[name] for name in types} | {"started_at": now - row["duration"], "ended_at": now}
    return row.insert(attempt, values)


def single_statement(database: Database) -> Any:
    """Return a single statement for all changes of checkpoints of roots without nested operations.

    The statement fails unless it changes as many rows as ``expected``.
    """
    moved = update_roots(database, "moves").returning(operation.c.id).cte("moved")
    ended = end_tasks(database, "ends").returning(task.c.position).cte("ended")
    parts = [add_attempts(database, "attempts").cte("attempted"), insert_events(database, "events").cte("noted")]
    moved_rows, ended_rows = (select(func.count()).select_from(part).scalar_subquery() for part in (moved, ended))
    changed = moved_rows + ended_rows
    # The cast of a text to a number makes the statement fail, and the server's log shows the text as the reason.
    problem = literal("not every checkpoint of kser fits: ", Text) + cast(changed, Text)
    check = case((changed == bindparam("expected", type_=BigInteger), 1), else_=cast(problem, Integer))
    return select(check).add_cte(*parts)
