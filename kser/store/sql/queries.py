"""Statements that read an operation with its tasks and events, and statements that search for operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    Text,
    bindparam,
    exists,
    false,
    func,
    or_,
    select,
    union_all,
)

from kser import status as states
from kser.errors import UsageError
from kser.store.model import AttemptRow, EventRow, OperationQuery, OperationRow, OperationSnapshot, Page, TaskRow
from kser.store.sql.database import Database, Transaction
from kser.store.sql.ids import id_at
from kser.store.sql.statements import ONE, ZERO, types_of
from kser.store.sql.tables import (
    OPERATION_COLUMNS,
    TASK_COLUMNS,
    attempt,
    event,
    label_row,
    operation,
    operation_row,
    task,
)
from kser.store.sql.tables import label as labels


class Queries:
    """The statements that read single operations and their parts.

    :param database: the database to read from.
    """

    def __init__(self, database: Database) -> None:
        own = operation.c
        uuid = bindparam("uuid", type_=Text)
        key = bindparam("key", type_=BigInteger)
        self._by_uuid = database.statement(select(*OPERATION_COLUMNS).where(own.uuid == uuid))
        children = (own.root_id == key, own.parent_id.is_not(None))
        self._children = database.statement(select(*OPERATION_COLUMNS).where(*children))
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
        row = transaction.execute(self._by_uuid, {"uuid": uuid}).fetchone()
        return None if row is None else operation_row(row)

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
        attempts = [AttemptRow(*raw) for raw in transaction.execute(self._attempts, {"key": row.id}).fetchall()]
        events = [EventRow(*raw) for raw in transaction.execute(self._events, {"key": row.root_id}).fetchall()]
        (root_uuid,) = transaction.execute(self._uuid, {"key": row.root_id}).fetchone()
        return OperationSnapshot(row, tasks, attempts, events, root_uuid)


#: The largest value of a BIGINT column.
MAX_ID: Final = (1 << 63) - 1
STATES: Final = (states.PENDING, states.RUNNING, states.SUCCESS, states.FAILED, states.CANCELLED)

#: Maximum difference in seconds between the time in an id and the time in the column ``created_at``, because of
#: rounding.
ROUNDING: Final = 2e-6

#: Maximum number of operations to count for a filter. A filter that matches at least this number of operations is
#: considered unselective.
COUNT_LIMIT: Final = 20_000


class OperationSearch:
    """The search for operations.

    :param database: the database to search.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        row = database.source(types_of(operation, "id"))
        self._by_id = database.statement(row.select(OPERATION_COLUMNS, operation, operation.c.id == row["id"]))

    def find(self, transaction: Transaction, query: OperationQuery, limit: int, after: str | None) -> Page:
        """See :meth:`kser.store.base.Store.find`."""
        before = _cursor(after)
        filters = [LabelFilter(query, index, before) for index in range(len(query.labels))]
        driver = self._most_selective(transaction, query, filters, before)
        others = [other.matches for other in filters if other is not driver]
        statement = (
            _merged(_parts(query, before), limit + 1, others) if driver is None else driver.with_rest(query, others)
        )
        ids = self._ids(transaction, statement.limit(limit + 1))
        rows = transaction.fetch(self._by_id, [{"id": operation_id} for operation_id in ids[:limit]])
        newest_first = sorted((operation_row(row) for row in rows), key=lambda row: row.id, reverse=True)
        return Page(newest_first, str(ids[limit - 1]) if len(ids) > limit else None)

    def _most_selective(
        self, transaction: Transaction, query: OperationQuery, filters: list[LabelFilter], before: int | None
    ) -> LabelFilter | None:
        """Return the label filter that is the *driving filter* of the query, or None if the column filters are.

        The column filters are the filters for status, entrypoint and parent.

        The query reads the operations that match the driving filter, and tests each of these operations against the
        remaining filters, until a page is full. So the driving filter must be the filter with the fewest matches. This
        method counts the matches, because databases estimate these numbers badly.

        If every label has at least ``COUNT_LIMIT`` matches, the column filters are the driving filter, because the
        database can test the labels with an index alone, but must read the row of an operation to test the column
        filters. If the query has no column filters, the first label is then the driving filter.
        """
        has_filters = (query.status, query.entrypoint, query.parent) != (None, None, None)
        if not has_filters and len(filters) == 1:
            return filters[0]
        driver, fewest = None if has_filters or not filters else filters[0], COUNT_LIMIT
        for candidate in filters:
            count = self._count(transaction, [candidate.ids()], fewest)
            if count < fewest:
                driver, fewest = candidate, count
        if driver is not None and has_filters and self._count(transaction, _parts(query, before), fewest) < fewest:
            return None
        return driver

    def _count(self, transaction: Transaction, parts: list[Select[Any]], limit: int) -> int:
        some = _union([part.limit(limit) for part in parts]).limit(limit).subquery()
        return self._ids(transaction, select(func.count()).select_from(some))[0]

    def _ids(self, transaction: Transaction, query: Select[Any]) -> list[int]:
        return [row[0] for row in transaction.execute(self._database.statement(query), replan=True).fetchall()]


Condition = Callable[[ColumnElement[int]], ColumnElement[bool]]


class LabelFilter:
    """The filter for one label of a query."""

    def __init__(self, query: OperationQuery, index: int, before: int | None) -> None:
        self._table = labels.alias(f"label_{index}")
        key, value = label_row(*query.labels[index])
        self._where = (self._table.c.key == key, self._table.c.value == value)
        self._bounds = _bounds(query, self._table.c.operation_id, before)

    def ids(self) -> Select[Any]:
        """Return a query for the ids of the operations that have the label."""
        return select(self._table.c.operation_id.label("id")).where(*self._where, *self._bounds)

    def matches(self, identifier: ColumnElement[int]) -> ColumnElement[bool]:
        """Return the SQL condition that the operation with the id ``identifier`` has the label."""
        return _exists(self._table, *self._where, self._table.c.operation_id == identifier)

    def with_rest(self, query: OperationQuery, others: Sequence[Condition]) -> Select[Any]:
        """Return a query for the ids of the operations that have the label and match all other filters."""
        key = self._table.c.operation_id
        rest = _exists(operation, operation.c.id == key, _root_or_parent(query), *_filters(query), *_times(query))
        return self.ids().where(*(matches(key) for matches in others), rest).order_by(key.desc())


def _exists(table: Any, *where: ColumnElement[bool]) -> ColumnElement[bool]:
    # OFFSET 0 prevents PostgreSQL from merging this subquery into the outer query. Otherwise, PostgreSQL could start
    # the search with the filter in this subquery instead of the driving filter.
    return exists(select(ONE).select_from(table).where(*where).offset(ZERO))


def _cursor(after: str | None) -> int | None:
    if after is None:
        return None
    if not (after.isascii() and after.isdigit()) or int(after) > MAX_ID:
        raise UsageError(f"after must be the cursor of the previous page; it is {after!r}")
    return int(after)


def _parts(query: OperationQuery, before: int | None) -> list[Select[Any]]:
    """Return queries for the ids of the operations that match all filters except labels.

    Each query reads the ids from an index, newest operation first. There is one query per status, because the index is
    sorted by status first, and by id only within each status.
    """
    own = operation.c
    base = select(own.id).where(_root_or_parent(query), *_bounds(query, own.id, before), *_times(query))
    if query.parent is not None:
        return [base.where(*_filters(query))]
    if query.entrypoint is not None:
        base = base.where(own.entrypoint == query.entrypoint)
    statuses = sorted(set(STATES if query.status is None else query.status)) or [""]
    return [base.where(own.status == status) for status in statuses]


def _merged(parts: list[Select[Any]], limit: int, conditions: Sequence[Condition]) -> Select[Any]:
    """Return a query that merges the results of the queries in ``parts``, newest operation first.

    :param limit: maximum number of operations from each query in ``parts``.
    :param conditions: additional conditions that each operation must meet.
    """
    own = operation.c.id
    where = [condition(own) for condition in conditions]
    merged = _union([part.where(*where).order_by(own.desc()).limit(limit) for part in parts]).subquery()
    return select(merged.c.id).order_by(merged.c.id.desc())


def _union(parts: list[Select[Any]]) -> Any:
    return union_all(*(select(part.subquery().c.id) for part in parts))


def _root_or_parent(query: OperationQuery) -> ColumnElement[bool]:
    if query.parent is None:
        return operation.c.parent_id.is_(None)
    parent = operation.alias("parent")
    return operation.c.parent_id == select(parent.c.id).where(parent.c.uuid == query.parent).scalar_subquery()


def _filters(query: OperationQuery) -> list[ColumnElement[bool]]:
    filters: list[ColumnElement[bool]] = []
    if query.status is not None:
        filters.append(or_(false(), *(operation.c.status == status for status in sorted(set(query.status)))))
    if query.entrypoint is not None:
        filters.append(operation.c.entrypoint == query.entrypoint)
    return filters


def _bounds(query: OperationQuery, key: Any, before: int | None) -> list[ColumnElement[bool]]:
    """Return the conditions that limit the range of ids. Ids increase with the time of creation."""
    bounds: list[ColumnElement[bool]] = []
    if before is not None:
        bounds.append(key < before)
    if query.since is not None:
        bounds.append(key >= id_at(query.since - ROUNDING))
    if query.until is not None:
        bounds.append(key < id_at(query.until + ROUNDING))
    return bounds


def _times(query: OperationQuery) -> list[ColumnElement[bool]]:
    """Return the exact conditions on the time of creation.

    The conditions of :func:`_bounds` are wider, because the times in ids are rounded.
    """
    times: list[ColumnElement[bool]] = []
    if query.since is not None:
        times.append(operation.c.created_at >= query.since)
    if query.until is not None:
        times.append(operation.c.created_at < query.until)
    return times
