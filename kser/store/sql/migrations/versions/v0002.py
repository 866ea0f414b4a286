"""Version 2 of the tables: the times and the reason of due steps, the classes that a step needs, and its refusals."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

#: Condition of the rows that can have a due step.
UNFINISHED = "parent_id IS NULL AND status IN ('PENDING', 'RUNNING')"

#: The seconds between the expiry of a lease and the next takeover of the step.
TAKEOVER_DELAY = "CASE WHEN claim_count <= 2 THEN 0 WHEN claim_count >= 11 THEN 300 ELSE 1 << (claim_count - 2) END"

#: While a root has an owner, ``next_check_at`` is the end of its lease. Otherwise it is the time at which the reaper
#: sends the message of the step. An unfinished root without this time would never continue, so it becomes due.
CHECK_AT = "COALESCE(next_check_at, due_at)"

LEASE_UNTIL = f"CASE WHEN owner IS NOT NULL THEN {CHECK_AT} END"
TAKE_AT = f"{CHECK_AT} + CASE WHEN owner IS NOT NULL THEN {TAKEOVER_DELAY} ELSE 0 END"
DUE_REASON = (
    "CASE WHEN owner IS NOT NULL THEN 'lease-expired' WHEN send_count > 0 THEN 'unclaimed'"
    " WHEN next_check_at = due_at THEN 'retry-due' ELSE 'unsent' END"
)
SEND_AT = f"{TAKE_AT} + CASE ({DUE_REASON}) WHEN 'unsent' THEN 0 ELSE 1 END"

#: The values of the new columns in the rows of unfinished roots. In all other rows, these columns are NULL.
VALUES = {"lease_until": LEASE_UNTIL, "take_at": TAKE_AT, "send_at": SEND_AT, "due_reason": DUE_REASON}

#: Value of the column ``urgent``.
IS_URGENT = "CASE WHEN due_reason IN ('lease-expired', 'retry-due') THEN 1 ELSE 0 END"


def upgrade() -> None:
    """Replace ``next_check_at`` by the times and the reason of the due step, and add the other columns."""
    if op.get_bind().dialect.name == "postgresql":
        _alter()
    else:
        _copy()
    scheduled = sa.text("take_at IS NOT NULL")
    op.create_index(
        "kser_operation_due",
        "kser_operation",
        ["target_topic", "urgent", "take_at", "send_at"],
        sqlite_where=scheduled,
        postgresql_where=scheduled,
    )
    op.execute("UPDATE kser_schema SET version = 2, oldest = 2")


def _alter() -> None:
    """Alter the table, because a new table would lose the privileges that were granted on it."""
    columns = [column for column in _new_columns(is_stored=True) if column.name != "urgent"]
    for column in columns:
        column.server_default = sa.DefaultClause("0") if column.name == "refusal_count" else None
        op.add_column("kser_operation", column)
    op.alter_column("kser_operation", "refusal_count", server_default=None)
    assignments = ", ".join(f"{name} = {value}" for name, value in VALUES.items())
    op.execute(f"UPDATE kser_operation SET {assignments} WHERE {UNFINISHED}")
    op.drop_index("kser_operation_next_check", "kser_operation")
    op.drop_column("kser_operation", "next_check_at")
    # This statement writes the table again, without the old versions of the updated rows.
    op.add_column("kser_operation", _new_columns(is_stored=True)[-1])


def _copy() -> None:
    """Copy the rows to a table that has the new columns before the large texts.

    SQLite appends an added column to the row. To read it, SQLite would have to read the large texts before it.
    """
    op.create_table("kser_operation_2", *_columns(), sa.UniqueConstraint("uuid", name="kser_operation_uuid"))
    values = {name: f"CASE WHEN {UNFINISHED} THEN {value} END" for name, value in VALUES.items()}
    values |= {"refusal_count": "0", "refused_since": "NULL", "current_entrypoints": "NULL"}
    names = [column.name for column in _columns() if column.computed is None]
    op.execute(
        f"INSERT INTO kser_operation_2 ({', '.join(names)})"
        f" SELECT {', '.join(values.get(name, name) for name in names)} FROM kser_operation"
    )
    # Create all other indexes again, and also triggers of the user. DROP TABLE deletes them.
    dependents = op.get_bind().exec_driver_sql(
        "SELECT sql FROM sqlite_master WHERE tbl_name = 'kser_operation' AND type IN ('index', 'trigger')"
        " AND sql IS NOT NULL AND name <> 'kser_operation_next_check' ORDER BY rowid"
    )
    statements = [sql for (sql,) in dependents]
    op.drop_table("kser_operation")
    # Without this setting, SQLite refuses to rename the table if a view of the user names it.
    op.execute("PRAGMA legacy_alter_table = ON")
    op.rename_table("kser_operation_2", "kser_operation")
    op.execute("PRAGMA legacy_alter_table = OFF")
    for statement in statements:
        op.get_bind().exec_driver_sql(statement)


def _columns() -> list[sa.Column[Any]]:
    """Return the columns of the table in SQLite."""
    return [
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("uuid", sa.Text, nullable=False),
        sa.Column("entrypoint", sa.Text, nullable=False),
        sa.Column("parent_id", sa.BigInteger),
        sa.Column("root_id", sa.BigInteger, nullable=False),
        sa.Column("mode", sa.Text, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("overrides", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("phase", sa.Text, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("task_count", sa.Integer),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("ended_at", sa.Double),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("cancel_reason", sa.Text),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("token", sa.Text),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.Column("claim_count", sa.Integer, nullable=False),
        sa.Column("send_count", sa.Integer, nullable=False),
        sa.Column("sent_at", sa.Double),
        # SQLite computes ``urgent`` faster than it stores it.
        *_new_columns(is_stored=False),
        sa.Column("target_uuid", sa.Text, nullable=False),
        sa.Column("target_entrypoint", sa.Text, nullable=False),
        sa.Column("target_topic", sa.Text, nullable=False),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("accumulated", sa.Text, nullable=False),
        sa.Column("result", sa.Text),
    ]


def _new_columns(*, is_stored: bool) -> list[sa.Column[Any]]:
    """Return the columns that version 2 adds.

    :param is_stored: True if the table stores the value of the computed column. PostgreSQL before version 18 can only
        store it.
    """
    return [
        sa.Column("lease_until", sa.Double),
        sa.Column("take_at", sa.Double),
        sa.Column("send_at", sa.Double),
        sa.Column("due_reason", sa.Text),
        sa.Column("refusal_count", sa.Integer, nullable=False),
        sa.Column("refused_since", sa.Double),
        sa.Column("current_entrypoints", sa.Text),
        sa.Column("urgent", sa.Integer, sa.Computed(IS_URGENT, persisted=is_stored)),
    ]
