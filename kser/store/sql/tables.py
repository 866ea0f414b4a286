"""The tables in the state after the newest migration.

Large text columns come last in a row and are in no index, so a search does not read them. A checkpoint that keeps its
claim changes no indexed column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Computed,
    Double,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)

from kser.store.model import (
    OperationRow,
    StepMessage,
    TaskRow,
)

metadata: Final = MetaData()

#: SQLite uses a primary key as its rowid only if the type of the key is INTEGER.
_KEY = BigInteger().with_variant(Integer(), "sqlite")

#: Value of the column ``urgent``: 1 for the reasons in :data:`kser.store.model.URGENT`. The index on due steps needs
#: this column, because a consumer without a free worker looks only for urgent steps, and must not read all others.
IS_URGENT: Final = "CASE WHEN due_reason IN ('lease-expired', 'retry-due') THEN 1 ELSE 0 END"

operation: Final = Table(
    "kser_operation",
    metadata,
    Column("id", _KEY, primary_key=True, autoincrement=False),
    Column("uuid", Text, nullable=False),
    Column("entrypoint", Text, nullable=False),
    Column("parent_id", BigInteger),
    Column("root_id", BigInteger, nullable=False),
    Column("mode", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("overrides", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("phase", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("task_count", Integer),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("ended_at", Double),
    Column("cancel_requested", Boolean, nullable=False),
    Column("cancel_reason", Text),
    Column("epoch", BigInteger, nullable=False),
    Column("owner", Text),
    Column("token", Text),
    Column("lease_until", Double),
    Column("take_at", Double),
    Column("send_at", Double),
    Column("due_reason", Text),
    Column("due_at", Double, nullable=False),
    Column("claim_count", Integer, nullable=False),
    Column("send_count", Integer, nullable=False),
    Column("sent_at", Double),
    Column("refusal_count", Integer, nullable=False),
    Column("refused_since", Double),
    Column("current_entrypoints", Text),
    Column("target_uuid", Text, nullable=False),
    Column("target_entrypoint", Text, nullable=False),
    Column("target_topic", Text, nullable=False),
    Column("params", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("accumulated", Text, nullable=False),
    Column("result", Text),
    Column("urgent", Integer, Computed(IS_URGENT, persisted=True)),
    UniqueConstraint("uuid", name="kser_operation_uuid"),
)

_ROOT = text("parent_id IS NULL")
_INNER = text("parent_id IS NOT NULL")
_SCHEDULED = text("take_at IS NOT NULL")
# The database reads the due steps of one topic from this index, without the rows of other topics. It tests ``send_at``
# in the index too, because a backlog may contain many steps that may be taken over, and whose messages must not be sent
# again yet.
Index(
    "kser_operation_due",
    operation.c.target_topic,
    operation.c.urgent,
    operation.c.take_at,
    operation.c.send_at,
    sqlite_where=_SCHEDULED,
    postgresql_where=_SCHEDULED,
)

Index("kser_operation_status", operation.c.status, operation.c.id, sqlite_where=_ROOT, postgresql_where=_ROOT)

Index(
    "kser_operation_entrypoint",
    operation.c.entrypoint,
    operation.c.status,
    operation.c.id,
    sqlite_where=_ROOT,
    postgresql_where=_ROOT,
)

Index("kser_operation_parent", operation.c.parent_id, operation.c.id, sqlite_where=_INNER, postgresql_where=_INNER)

Index("kser_operation_root", operation.c.root_id, sqlite_where=_INNER, postgresql_where=_INNER)

task: Final = Table(
    "kser_task",
    metadata,
    Column("operation_id", BigInteger, nullable=False),
    Column("position", Integer, nullable=False),
    Column("uuid", Text, nullable=False),
    Column("entrypoint", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("attempts_before_resume", Integer, nullable=False),
    Column("child_id", BigInteger),
    Column("params", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("result", Text),
    PrimaryKeyConstraint("operation_id", "position", name="kser_task_pkey"),
    sqlite_with_rowid=False,
)

attempt: Final = Table(
    "kser_attempt",
    metadata,
    Column("operation_id", BigInteger, nullable=False),
    Column("position", Integer, nullable=False),
    Column("number", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("consumer", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double, nullable=False),
    Column("error", Text),
    PrimaryKeyConstraint("operation_id", "position", "number", name="kser_attempt_pkey"),
    sqlite_with_rowid=False,
)

event: Final = Table(
    "kser_event",
    metadata,
    Column("id", _KEY, primary_key=True, autoincrement=True),
    Column("root_id", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("consumer", Text),
    Column("uuid", Text),
    Column("text", Text),
)
Index("kser_event_root", event.c.root_id)

label: Final = Table(
    "kser_label",
    metadata,
    Column("key", Text, nullable=False),
    Column("value", Text, nullable=False),
    Column("operation_id", BigInteger, nullable=False),
    PrimaryKeyConstraint("key", "value", "operation_id", name="kser_label_pkey"),
    sqlite_with_rowid=False,
)
Index("kser_label_operation", label.c.operation_id)

#: The table has one row: the version of the tables, and the lowest version of the code that can use the tables.
schema: Final = Table(
    "kser_schema",
    metadata,
    Column("version", Integer, nullable=False),
    Column("oldest", Integer, nullable=False),
)

#: Maximum length of the key and of the value of a label, in characters. The store shortens longer labels, because
#: PostgreSQL limits an index entry to about 2,700 bytes.
MAX_LABEL_KEY: Final = 128
MAX_LABEL_VALUE: Final = 512

#: The columns of the tables, in the order of the fields of OperationRow and TaskRow.
OPERATION_COLUMNS: Final = (
    *(operation.c[name] for name in OperationRow._fields if name != "target"),
    operation.c.target_uuid,
    operation.c.target_entrypoint,
    operation.c.target_topic,
)


def short_columns(*ambiguous: str) -> list[ColumnElement[Any]]:
    """Return :data:`OPERATION_COLUMNS` for a RETURNING clause without the name of the table.

    psycopg parses a statement of more than 4,096 characters in each execution, and the name of the table before each
    column makes the longest statements longer than that.

    :param ambiguous: names of columns that need the name of the table, because another table has them too.
    """
    return [
        column if column.name in ambiguous else literal_column(column.name, column.type) for column in OPERATION_COLUMNS
    ]


TASK_COLUMNS: Final = tuple(task.c[name] for name in TaskRow._fields)
_PLAIN: Final = len(OperationRow._fields) - 1
_CANCEL: Final = OperationRow._fields.index("cancel_requested")


def operation_row(row: Sequence[Any]) -> OperationRow:
    """Convert a table row that was read with :data:`OPERATION_COLUMNS` to an OperationRow."""
    values = [*row[:_PLAIN], StepMessage(*row[_PLAIN : _PLAIN + 3])]
    values[_CANCEL] = bool(values[_CANCEL])
    return OperationRow._make(values)


def label_row(key: str, value: str) -> tuple[str, str]:
    """Return a label, shortened to the lengths that the store saves and searches."""
    return key[:MAX_LABEL_KEY], value[:MAX_LABEL_VALUE]
