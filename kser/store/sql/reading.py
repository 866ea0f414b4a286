"""Reading operations, and finding them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import BigInteger, Select, Text, bindparam, false, or_, select, union_all

from kser import status as states
from kser.errors import UsageError
from kser.store.base import AttemptRow, EventRow, Found, OperationRow, Page, Stored, TaskRow
from kser.store.sql.database import Database, Transaction
from kser.store.sql.rows import OPERATION_COLUMNS, TASK_COLUMNS, id_at, label, operation_row
from kser.store.sql.statements import types_of
from kser.store.sql.tables import attempt, event, operation, task
from kser.store.sql.tables import label as labels

#: The largest number that a column holds.
LARGEST: Final = (1 << 63) - 1

STATES: Final = (states.PENDING, states.RUNNING, states.SUCCESS, states.FAILED, states.CANCELLED)


class Reading:
    """Statements that read.

    :param database: where.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
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
        row = database.source(types_of(operation, "id"))
        self._by_id = database.statement(row.select(OPERATION_COLUMNS, operation, own.id == row["id"]))

    def peek(self, transaction: Transaction, uuid: str) -> OperationRow | None:
        """See :meth:`kser.store.base.Store.peek`."""
        found = transaction.run(self._by_uuid, {"uuid": uuid}).fetchone()
        return None if found is None else operation_row(found)

    def tasks(self, transaction: Transaction, operation_id: int) -> Sequence[TaskRow]:
        """See :meth:`kser.store.base.Store.tasks`."""
        return [TaskRow(*row) for row in transaction.run(self._tasks, {"key": operation_id}).fetchall()]

    def task(self, transaction: Transaction, operation_id: int, position: int) -> TaskRow | None:
        """See :meth:`kser.store.base.Store.task`."""
        row = transaction.run(self._task, {"key": operation_id, "position": position}).fetchone()
        return None if row is None else TaskRow(*row)

    def children(self, transaction: Transaction, root_id: int) -> Sequence[OperationRow]:
        """See :meth:`kser.store.base.Store.children`."""
        return [operation_row(row) for row in transaction.run(self._children, {"key": root_id}).fetchall()]

    def get(self, transaction: Transaction, uuid: str) -> Stored | None:
        """See :meth:`kser.store.base.Store.get`."""
        row = self.peek(transaction, uuid)
        if row is None:
            return None
        tasks = self.tasks(transaction, row.id)
        attempts = [AttemptRow(*found) for found in transaction.run(self._attempts, {"key": row.id}).fetchall()]
        events = [EventRow(*found) for found in transaction.run(self._events, {"key": row.root_id}).fetchall()]
        (root_uuid,) = transaction.run(self._uuid, {"key": row.root_id}).fetchone()
        return Stored(row, tasks, attempts, events, root_uuid)

    # -- find ----------------------------------------------------------------------------------------------------------

    def find(self, transaction: Transaction, found: Found, limit: int, after: str | None) -> Page:
        """See :meth:`kser.store.base.Store.find`."""
        statement = self._database.statement(_ids(found, limit + 1, _cursor(after)))
        ids = [row[0] for row in transaction.run(statement).fetchall()]
        rows = transaction.fetch(self._by_id, [{"id": each} for each in ids[:limit]])
        newest_first = sorted((operation_row(row) for row in rows), reverse=True)
        return Page(newest_first, str(ids[limit - 1]) if len(ids) > limit else None)


def _cursor(after: str | None) -> int | None:
    if after is None:
        return None
    if not (after.isascii() and after.isdigit()) or int(after) > LARGEST:
        raise UsageError(f"after must be the cursor of a page before; it is {after!r}")
    return int(after)


def _ids(found: Found, limit: int, before: int | None) -> Select[Any]:
    """Identifiers alone: texts are read of rows that are returned, and of no others."""
    if found.labels:
        return _with_labels(found, limit, before)
    own = operation.c
    base = select(own.id).where(*_bounds(found, own.id, before))
    if found.parent is not None:
        parent = select(own.id).where(own.uuid == found.parent).scalar_subquery()
        inner = base.where(own.parent_id == parent, *_filters(found))
        return inner.order_by(own.id.desc()).limit(limit)
    base = base.where(own.parent_id.is_(None))
    if found.entrypoint is not None:
        base = base.where(own.entrypoint == found.entrypoint)
    # Each state is a range of an index that is in order; all of them together are not.
    parts = [
        base.where(own.status == each).order_by(own.id.desc()).limit(limit).subquery()
        for each in sorted(set(STATES if found.status is None else found.status)) or [""]
    ]
    merged = union_all(*(select(part.c.id) for part in parts)).subquery()
    return select(merged.c.id).order_by(merged.c.id.desc()).limit(limit)


def _with_labels(found: Found, limit: int, before: int | None) -> Select[Any]:
    own = operation.c
    first, *others = [labels.alias(f"label_{number}") for number in range(len(found.labels))]
    parent = None if found.parent is None else select(own.id).where(own.uuid == found.parent).scalar_subquery()
    query = select(first.c.operation_id).join(operation, own.id == first.c.operation_id)
    for other in others:
        query = query.join(other, other.c.operation_id == first.c.operation_id)
    for alias, pair in zip((first, *others), found.labels, strict=True):
        key, value = label(*pair)
        query = query.where(alias.c.key == key, alias.c.value == value)
    query = query.where(
        *_bounds(found, first.c.operation_id, before),
        *_filters(found),
        own.parent_id.is_(None) if parent is None else own.parent_id == parent,
    )
    return query.order_by(first.c.operation_id.desc()).limit(limit)


def _bounds(found: Found, key: Any, before: int | None) -> list[Any]:
    """Bounds of the key, which rises with the time of creation, and of that time."""
    bounds: list[Any] = []
    if before is not None:
        bounds.append(key < before)
    if found.since is not None:
        bounds += (key >= id_at(found.since - MICROSECOND), operation.c.created_at >= found.since)
    if found.until is not None:
        bounds += (key < id_at(found.until + MICROSECOND), operation.c.created_at < found.until)
    return bounds


def _filters(found: Found) -> list[Any]:
    filters: list[Any] = []
    if found.status is not None:
        filters.append(or_(false(), *(operation.c.status == each for each in sorted(set(found.status)))))
    if found.entrypoint is not None:
        filters.append(operation.c.entrypoint == found.entrypoint)
    return filters


#: Seconds by which a time in a key may differ from the one in a column, for rounding.
MICROSECOND: Final = 2e-6
