"""Version 1 of the tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

#: Conditions of the partial indexes.
ROOT, INNER, SCHEDULED = "parent_id IS NULL", "parent_id IS NOT NULL", "next_check_at IS NOT NULL"


def upgrade() -> None:
    """Create the tables."""
    _operation()
    _task()
    _attempt()
    _event()
    _label()
    schema = op.create_table(
        "kser_schema",
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("oldest", sa.Integer, nullable=False),
    )
    op.bulk_insert(schema, [{"version": 1, "oldest": 1}])
    if op.get_bind().dialect.name == "postgresql":
        # Leave free space in each page, so that the new version of an updated row fits into the page of the old
        # version. Such a HOT update (heap-only tuple) writes no index entries.
        op.execute("ALTER TABLE kser_operation SET (fillfactor = 60)")
        op.execute("ALTER TABLE kser_task SET (fillfactor = 80)")


def _operation() -> None:
    op.create_table(
        "kser_operation",
        sa.Column("id", KEY, primary_key=True, autoincrement=False),
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
        sa.Column("next_check_at", sa.Double),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.Column("claim_count", sa.Integer, nullable=False),
        sa.Column("send_count", sa.Integer, nullable=False),
        sa.Column("sent_at", sa.Double),
        sa.Column("target_uuid", sa.Text, nullable=False),
        sa.Column("target_entrypoint", sa.Text, nullable=False),
        sa.Column("target_topic", sa.Text, nullable=False),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("accumulated", sa.Text, nullable=False),
        sa.Column("result", sa.Text),
        sa.UniqueConstraint("uuid", name="kser_operation_uuid"),
    )
    _index("kser_operation_next_check", ["next_check_at"], SCHEDULED)
    _index("kser_operation_status", ["status", "id"], ROOT)
    _index("kser_operation_entrypoint", ["entrypoint", "status", "id"], ROOT)
    _index("kser_operation_parent", ["parent_id", "id"], INNER)
    _index("kser_operation_root", ["root_id"], INNER)


def _index(name: str, columns: list[str], part: str) -> None:
    op.create_index(name, "kser_operation", columns, sqlite_where=sa.text(part), postgresql_where=sa.text(part))


def _task() -> None:
    op.create_table(
        "kser_task",
        sa.Column("operation_id", sa.BigInteger, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("uuid", sa.Text, nullable=False),
        sa.Column("entrypoint", sa.Text, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("attempts_before_resume", sa.Integer, nullable=False),
        sa.Column("child_id", sa.BigInteger),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("result", sa.Text),
        sa.PrimaryKeyConstraint("operation_id", "position", name="kser_task_pkey"),
        sqlite_with_rowid=False,
    )


def _attempt() -> None:
    op.create_table(
        "kser_attempt",
        sa.Column("operation_id", sa.BigInteger, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("consumer", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double, nullable=False),
        sa.Column("error", sa.Text),
        sa.PrimaryKeyConstraint("operation_id", "position", "number", name="kser_attempt_pkey"),
        sqlite_with_rowid=False,
    )


def _event() -> None:
    op.create_table(
        "kser_event",
        sa.Column("id", KEY, primary_key=True, autoincrement=True),
        sa.Column("root_id", sa.BigInteger, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("consumer", sa.Text),
        sa.Column("uuid", sa.Text),
        sa.Column("text", sa.Text),
    )
    op.create_index("kser_event_root", "kser_event", ["root_id"])


def _label() -> None:
    op.create_table(
        "kser_label",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("operation_id", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("key", "value", "operation_id", name="kser_label_pkey"),
        sqlite_with_rowid=False,
    )
    op.create_index("kser_label_operation", "kser_label", ["operation_id"])
