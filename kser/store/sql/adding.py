"""The insert statements for new operations and events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Double, Integer, case, literal

from kser.store.sql.database import Database, Transaction
from kser.store.sql.rows import NewRows
from kser.store.sql.statements import ROWS, types_of
from kser.store.sql.tables import event, label, operation, task

#: Values of a new operation's row that are not columns.
_WAIT: Final = {"wait": Double(), "started": Integer()}

#: Columns with the same value in every new row.
_BLANK: Final[Mapping[str, Any]] = {"cancel_requested": False, "sends": 0}


class Adding:
    """The compiled insert statements.

    :param database: the database to write to.
    """

    def __init__(self, database: Database) -> None:
        self.operations = database.statement(adding_operations(database))
        self.tasks = database.statement(adding_tasks(database))
        self.labels = database.statement(adding_labels(database))
        self.events = database.statement(adding_events(database))

    def add(self, transaction: Transaction, rows: NewRows) -> None:
        """Insert operations with their tasks and labels."""
        transaction.change(self.operations, rows.operations)
        transaction.change(self.tasks, rows.tasks)
        transaction.change(self.labels, rows.labels)


def adding_operations(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts operations."""
    now = database.now
    types = types_of(operation)
    for name in (*_BLANK, "started_at", "ended_at", "wake_at", "due_at", "sent_at", "result", "cancel_reason"):
        del types[name]
    row = database.source({**types, **_WAIT}, rows)
    values = {name: row[name] for name in types}
    values |= {name: literal(value) for name, value in _BLANK.items()}
    values |= {
        "started_at": case((row["started"] == 1, now), else_=None),
        "wake_at": now + row["wait"],
        "due_at": now,
    }
    return row.insert(operation, values)


def adding_tasks(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts tasks."""
    return _whole(database, task, rows)


def adding_labels(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts labels."""
    return _whole(database, label, rows)


def adding_events(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts events."""
    types = types_of(event, "root_id", "kind", "epoch", "consumer", "uuid", "text")
    row = database.source(types, rows)
    return row.insert(event, {**{name: row[name] for name in types}, "at": database.now})


def _whole(database: Database, table: Any, rows: str) -> Any:
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
        "text": storable(text),
    }


def storable(text: str | None) -> str | None:
    """Replace the characters that a database rejects, in a text of a user or an exception."""
    if text is None:
        return None
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
