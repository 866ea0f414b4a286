"""Queries for operations by uuid or id."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import BigInteger, Text, bindparam, select

from kser.store.rows import AttemptRow, EventRow, OperationRow, OperationSnapshot, TaskRow
from kser.store.sql.database import Database, Transaction
from kser.store.sql.rows import OPERATION_COLUMNS, TASK_COLUMNS, operation_row
from kser.store.sql.tables import attempt, event, operation, task


class Queries:
    """The statements that read single operations and their parts.

    :param database: the database to read from.
    """

    def __init__(self, database: Database) -> None:
        own = operation.c
        uuid = bindparam("uuid", type_=Text)
        key = bindparam("key", type_=BigInteger)
        self._by_uuid = database.statement(select(*OPERATION_COLUMNS).where(own.uuid == uuid))
        inner = (own.root_id == key, own.parent_id.is_not(None))
        self._children = database.statement(select(*OPERATION_COLUMNS).where(*inner))
        tasks = select(*TASK_COLUMNS).where(task.c.operation_id == key)
        self._tasks = database.statement(tasks.order_by(task.c.position))
        self._task = database.statement(tasks.where(task.c.position == bindparam("position", type_=BigInteger)))
        columns = [attempt.c[name] for name in AttemptRow._fields]
        attempts = select(*columns).where(attempt.c.operation_id == key)
        self._attempts = database.statement(attempts.order_by(attempt.c.position, attempt.c.number))
        events = select(*(event.c[name] for name in EventRow._fields)).where(event.c.root_id == key)
        self._events = database.statement(events.order_by(event.c.id))
        self._uuid = database.statement(select(own.uuid).where(own.id == key))

    def get_operation(self, transaction: Transaction, uuid: str) -> OperationRow | None:
        """See :meth:`kser.store.base.Store.get_operation`."""
        found = transaction.execute(self._by_uuid, {"uuid": uuid}).fetchone()
        return None if found is None else operation_row(found)

    def get_tasks(self, transaction: Transaction, operation_id: int) -> Sequence[TaskRow]:
        """See :meth:`kser.store.base.Store.get_tasks`."""
        return [TaskRow(*row) for row in transaction.execute(self._tasks, {"key": operation_id}).fetchall()]

    def get_task(self, transaction: Transaction, operation_id: int, position: int) -> TaskRow | None:
        """See :meth:`kser.store.base.Store.get_task`."""
        row = transaction.execute(self._task, {"key": operation_id, "position": position}).fetchone()
        return None if row is None else TaskRow(*row)

    def get_children(self, transaction: Transaction, root_id: int) -> Sequence[OperationRow]:
        """See :meth:`kser.store.base.Store.get_children`."""
        return [operation_row(row) for row in transaction.execute(self._children, {"key": root_id}).fetchall()]

    def snapshot(self, transaction: Transaction, uuid: str) -> OperationSnapshot | None:
        """See :meth:`kser.store.base.Store.snapshot`."""
        row = self.get_operation(transaction, uuid)
        if row is None:
            return None
        tasks = self.get_tasks(transaction, row.id)
        attempts = [AttemptRow(*found) for found in transaction.execute(self._attempts, {"key": row.id}).fetchall()]
        events = [EventRow(*found) for found in transaction.execute(self._events, {"key": row.root_id}).fetchall()]
        (root_uuid,) = transaction.execute(self._uuid, {"key": row.root_id}).fetchone()
        return OperationSnapshot(row, tasks, attempts, events, root_uuid)
