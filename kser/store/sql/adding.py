"""The insert statements for new operations and events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Double, Integer, case, literal

from kser.store.sql.database import Database, Transaction
from kser.store.sql.rows import InsertRows
from kser.store.sql.statements import ROWS, types_of
from kser.store.sql.tables import event, label, operation, task

#: Values of a new operation's row that are not columns.
_RESEND_WAIT: Final = {"wait": Double(), "started": Integer()}

#: Columns with the same value in every new row.
_BLANK_RESULT: Final[Mapping[str, Any]] = {"cancel_requested": False, "send_count": 0}


class Inserts:
    """The compiled insert statements.

    :param database: the database to write to.
    """

    def __init__(self, database: Database) -> None:
        self.operations = database.statement(insert_operations(database))
        self.tasks = database.statement(insert_tasks(database))
        self.labels = database.statement(insert_labels(database))
        self.events = database.statement(insert_events(database))

    def insert(self, transaction: Transaction, rows: InsertRows) -> None:
        """Insert operations with their tasks and labels."""
        transaction.execute_many(self.operations, rows.operations)
        transaction.execute_many(self.tasks, rows.tasks)
        transaction.execute_many(self.labels, rows.labels)


def insert_operations(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts operations."""
    now = database.now
    types = types_of(operation)
    for name in (
        *_BLANK_RESULT,
        "started_at",
        "ended_at",
        "next_check_at",
        "due_at",
        "sent_at",
        "result",
        "cancel_reason",
    ):
        del types[name]
    row = database.source({**types, **_RESEND_WAIT}, rows)
    values = {name: row[name] for name in types}
    values |= {name: literal(value) for name, value in _BLANK_RESULT.items()}
    values |= {
        "started_at": case((row["started"] == 1, now), else_=None),
        "next_check_at": now + row["wait"],
        "due_at": now,
    }
    return row.insert(operation, values)


def insert_tasks(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts tasks."""
    return _insert_whole_rows(database, task, rows)


def insert_labels(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts labels."""
    return _insert_whole_rows(database, label, rows)


def insert_events(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts events."""
    types = types_of(event, "root_id", "kind", "epoch", "consumer", "uuid", "text")
    row = database.source(types, rows)
    return row.insert(event, {**{name: row[name] for name in types}, "at": database.now})


def _insert_whole_rows(database: Database, table: Any, rows: str) -> Any:
    types = types_of(table)
    row = database.source(types, rows)
    return row.insert(table, {name: row[name] for name in types})


def event_row(
    root_id: int, kind: str, epoch: int, consumer: str | None, *, uuid: str | None = None, text: str | None = None
) -> dict[str, Any]:
    """Return the row of a new event."""
    return {
        "root_id": root_id,
        "kind": kind,
        "epoch": epoch,
        "consumer": consumer,
        "uuid": uuid,
        "text": without_nul(text),
    }


def without_nul(text: str | None) -> str | None:
    """Replace the characters that a database rejects, in a text of a user or an exception."""
    if text is None:
        return None
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
