"""A database with the tables of version 1, with rows as the code of version 1 wrote them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import MetaData, Table, insert, inspect, select

from kser.store.model import Mode, Phase
from kser.store.sql import schema
from kser.store.sql.database import Database
from kser.store.sql.store import database_at

#: Number of tasks of each operation whose tasks are built.
TASKS = 3
#: Params that SQLite stores in overflow pages, and PostgreSQL outside of the row.
LARGE = '{"large": "' + "x" * 100_000 + '"}'


class OldTables:
    """A database whose tables have version 1.

    :param uri: the address of an empty database.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        #: The time to which the times of the rows are relative.
        self.now = time.time()
        self._last_id = 1000
        self._rows: dict[str, list[dict[str, Any]]] = {}
        with self.open() as database, database.migration_transaction() as connection:
            schema.migrate(connection, "0001")

    @contextlib.contextmanager
    def open(self) -> Iterator[Database]:
        """Provide the database."""
        with contextlib.closing(database_at(self.uri)) as database:
            yield database

    def write(self) -> None:
        """Write all rows that were added."""
        rows, self._rows = self._rows, {}
        with self.open() as database, database.migration_transaction() as connection:
            for name, values in rows.items():
                # The rows of a statement must have the same columns.
                columns = {column: None for row in values for column in row}
                table = Table(name, MetaData(), autoload_with=connection)
                connection.execute(insert(table), [{**columns, **row} for row in values])

    def _add(self, table: str, **values: Any) -> None:
        self._rows.setdefault(table, []).append(values)

    def add_root(self, uuid: str, check: float | None, *, due: float = -100.0, **values: Any) -> int:
        """Add a root, which has a message in topic ``orders``, with its tasks.

        :param check: the time of ``next_check_at`` after :attr:`now`, in seconds; None for no time.
        :param due: the time of ``due_at`` after :attr:`now`, in seconds.
        """
        self._last_id += 10
        root_id = self._last_id
        row = {**self._operation(uuid, root_id), "due_at": self.now + due, **values}
        self._add("kser_operation", **row, next_check_at=None if check is None else self.now + check)
        for position in range(row["task_count"] or 0):
            self._add_task(root_id, position, "SUCCESS" if position < row["step"] else "PENDING")
        self._add("kser_event", root_id=root_id, at=self.now - 100, kind="saved", epoch=0)
        self._add("kser_label", key="customer", value="7", operation_id=root_id)
        return root_id

    def add_nested(self, uuid: str, root_id: int, position: int) -> None:
        """Add an operation that is a task of a root."""
        values = {**self._operation(uuid, root_id + 1), "parent_id": root_id, "root_id": root_id}
        self._add("kser_operation", **values, due_at=self.now, next_check_at=None)
        for own in range(TASKS):
            self._add_task(root_id + 1, own, "PENDING")
        for task in self._rows["kser_task"]:
            if (task["operation_id"], task["position"]) == (root_id, position):
                task["child_id"] = root_id + 1

    def _operation(self, uuid: str, operation_id: int) -> dict[str, Any]:
        target = {"target_uuid": uuid, "target_entrypoint": "shop.PlaceOrder", "target_topic": "orders"}
        texts = {"params": "{}", "metadata": '{"customer": "7"}', "accumulated": '{"retval": {}}', "result": None}
        return {
            **{"id": operation_id, "uuid": uuid, "entrypoint": "shop.PlaceOrder", "root_id": operation_id},
            **{"mode": Mode.LOCAL, "topic": "orders", "overrides": 0, "status": "PENDING", "phase": Phase.RUN_TASK},
            **{"step": 0, "task_count": TASKS, "created_at": self.now - 100, "cancel_requested": False},
            **{"epoch": 0, "claim_count": 0, "send_count": 0},
            **target,
            **texts,
        }

    def _add_task(self, operation_id: int, position: int, status: str) -> None:
        names = {"uuid": f"{operation_id}-{position}", "entrypoint": "shop.Charge", "topic": "gpu", "status": status}
        counts = {"attempts": int(status == "SUCCESS"), "attempts_before_resume": 0}
        texts = {"params": "{}", "metadata": "{}", "result": "{}" if status == "SUCCESS" else None}
        place = {"operation_id": operation_id, "position": position}
        self._add("kser_task", **place, **names, **counts, **texts)
        if status == "SUCCESS":
            times = {"started_at": self.now - 90, "ended_at": self.now - 80}
            self._add("kser_attempt", **place, number=1, epoch=1, status=status, consumer="old-consumer", **times)


def rows_of(database: Database) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of all tables, keyed by table."""
    rows: dict[str, list[dict[str, Any]]] = {}
    with database.inspect_connection() as connection:
        for name in inspect(connection).get_table_names():
            table = Table(name, MetaData(), autoload_with=connection)
            result = connection.execute(select(table))
            rows[name] = sorted((dict(row._mapping) for row in result), key=repr)
    return rows


def tables_of(database: Database) -> dict[str, Any]:
    """Return what the database knows about its tables: columns, types, constraints, indexes and options."""
    queries = (
        ["SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"]
        if database.prefix == "sqlite"
        else [
            "SELECT attrelid::regclass::text, attnum > 0, attname, format_type(atttypid, atttypmod), attnotnull,"
            " attgenerated::text, attstorage::text, pg_get_expr(adbin, adrelid)"
            " FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
            " WHERE attrelid::regclass::text LIKE 'kser%' AND NOT attisdropped"
            " ORDER BY attrelid::regclass::text, attnum",
            "SELECT relname, relkind::text, reloptions FROM pg_class WHERE relname LIKE 'kser%' ORDER BY relname",
            "SELECT indexdef FROM pg_indexes WHERE tablename LIKE 'kser%' ORDER BY indexname",
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE conname LIKE 'kser%' ORDER BY conname",
        ]
    )
    known: dict[str, Any] = {}
    with database.inspect_connection() as connection:
        for query in queries:
            known[query] = [tuple(row) for row in connection.exec_driver_sql(query.replace("%", "%%"))]
        inspector = inspect(connection)
        for name in inspector.get_table_names():
            columns = [{**column, "type": str(column["type"])} for column in inspector.get_columns(name)]
            # The conditions of partial indexes are expressions, which compare by identity.
            indexes = sorted(
                str({**index, "dialect_options": {key: str(value) for key, value in index["dialect_options"].items()}})
                for index in inspector.get_indexes(name)
            )
            unique, primary = inspector.get_unique_constraints(name), inspector.get_pk_constraint(name)
            known[name] = (columns, indexes, unique, primary, inspector.get_check_constraints(name))
    return known
