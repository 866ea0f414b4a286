"""Finding operations among very many: identifiers first, and texts of no more rows than are returned."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, Select, exists, false, func, literal_column, or_, select, union_all

from kser import status as states
from kser.errors import UsageError
from kser.store.rows import Found, Page
from kser.store.sql.database import Database, Transaction
from kser.store.sql.rows import OPERATION_COLUMNS, id_at, label, operation_row
from kser.store.sql.statements import types_of
from kser.store.sql.tables import label as labels
from kser.store.sql.tables import operation

#: The largest number that a column holds.
LARGEST: Final = (1 << 63) - 1

STATES: Final = (states.PENDING, states.RUNNING, states.SUCCESS, states.FAILED, states.CANCELLED)

#: Seconds by which a time in a key may differ from the one in a column, for rounding.
ROUNDING: Final = 2e-6

#: So far is counted what a filter admits: beyond, it admits many.
MANY: Final = 20_000
#: The same for a filter that does not admit them in the order of pages: all of them are looked at for one page.
MANY_UNORDERED: Final = 5000


class Finding:
    """Statements that find.

    :param database: where.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        row = database.source(types_of(operation, "id"))
        self._by_id = database.statement(row.select(OPERATION_COLUMNS, operation, operation.c.id == row["id"]))

    def find(self, transaction: Transaction, found: Found, limit: int, after: str | None) -> Page:
        """See :meth:`kser.store.base.Store.find`."""
        before = _cursor(after)
        if found.labels:
            query = self._with_labels(transaction, found, before)
        else:
            query = _children(found, before) if found.parent is not None else _roots(found, before, limit + 1)
        ids = self._ids(transaction, query.limit(limit + 1))
        rows = transaction.fetch(self._by_id, [{"id": each} for each in ids[:limit]])
        newest_first = sorted((operation_row(row) for row in rows), reverse=True)
        return Page(newest_first, str(ids[limit - 1]) if len(ids) > limit else None)

    def _ids(self, transaction: Transaction, query: Select[Any]) -> list[int]:
        return [row[0] for row in transaction.run(self._database.statement(query)).fetchall()]

    def _with_labels(self, transaction: Transaction, found: Found, before: int | None) -> Select[Any]:
        """Begin with the filter that admits the fewest, which databases guess badly, and look at each of these."""
        filters: list[Labelled | Plain] = [Labelled(found, index, before) for index in range(len(found.labels))]
        plain = Plain(found, before)
        if plain.is_narrow:
            # An index tells whether an operation has a label, and only its row whether it admits the rest.
            filters.insert(0 if plain.is_ordered else len(filters), plain)
        # Of those that admit many the first one: they come in the order of the page.
        driver, fewest = filters[0], MANY
        for each in filters if len(filters) > 1 else ():
            limit = min(fewest, MANY if each.is_ordered else MANY_UNORDERED)
            count = self._count(transaction, each.nearly(), limit)
            if count < limit:
                driver, fewest = each, count
        start = driver.ids().subquery()
        others = [each.admits(start.c.id) for each in dict.fromkeys((*filters, plain)) if each is not driver]
        return select(start.c.id).where(*others).order_by(start.c.id.desc())

    def _count(self, transaction: Transaction, query: Select[Any], limit: int) -> int:
        some = query.limit(limit).subquery()
        return self._ids(transaction, select(func.count()).select_from(some))[0]


class Labelled:
    """One of the labels that are looked for."""

    #: Whether an index has what it admits in the order of pages.
    is_ordered = True

    def __init__(self, found: Found, index: int, before: int | None) -> None:
        self._table = labels.alias(f"label_{index}")
        key, value = label(*found.labels[index])
        self._where = (self._table.c.key == key, self._table.c.value == value)
        self._bounds = _bounds(found, self._table.c.operation_id, before)

    def ids(self) -> Select[Any]:
        """The operations that have it."""
        return select(self._table.c.operation_id.label("id")).where(*self._where, *self._bounds)

    def nearly(self) -> Select[Any]:
        """The same, for counting."""
        return self.ids()

    def admits(self, identifier: ColumnElement[int]) -> ColumnElement[bool]:
        """Whether an operation has it."""
        here = exists(literal_column("1")).select_from(self._table)
        return here.where(*self._where, self._table.c.operation_id == identifier)


class Plain:
    """Everything that is looked for but labels."""

    def __init__(self, found: Found, before: int | None) -> None:
        own = operation.c
        self.is_narrow = (found.status, found.entrypoint, found.parent) != (None, None, None)
        self.is_ordered = found.parent is None and found.status is not None and len(set(found.status)) == 1
        self._indexed: list[ColumnElement[bool]] = [_family(found), *_filters(found)]
        self._where: list[ColumnElement[bool]] = [*self._indexed, *_times(found)]
        self._bounds = _bounds(found, own.id, before)

    def ids(self) -> Select[Any]:
        """The operations that it admits."""
        return select(operation.c.id).where(*self._where, *self._bounds)

    def nearly(self) -> Select[Any]:
        """The same but for rounding, for counting: what an index knows, without a look at the rows."""
        return select(operation.c.id).where(*self._indexed, *self._bounds)

    def admits(self, identifier: ColumnElement[int]) -> ColumnElement[bool]:
        """Whether it admits an operation."""
        return exists(literal_column("1")).select_from(operation).where(operation.c.id == identifier, *self._where)


def _cursor(after: str | None) -> int | None:
    if after is None:
        return None
    if not (after.isascii() and after.isdigit()) or int(after) > LARGEST:
        raise UsageError(f"after must be the cursor of a page before; it is {after!r}")
    return int(after)


def _roots(found: Found, before: int | None, limit: int) -> Select[Any]:
    own = operation.c
    base = select(own.id).where(_family(found), *_bounds(found, own.id, before), *_times(found))
    if found.entrypoint is not None:
        base = base.where(own.entrypoint == found.entrypoint)
    # Each state is a range of an index, in the order of the page; all of them together are not in order.
    parts = [
        base.where(own.status == each).order_by(own.id.desc()).limit(limit).subquery()
        for each in sorted(set(STATES if found.status is None else found.status)) or [""]
    ]
    merged = union_all(*(select(part.c.id) for part in parts)).subquery()
    return select(merged.c.id).order_by(merged.c.id.desc())


def _children(found: Found, before: int | None) -> Select[Any]:
    own = operation.c
    bounds = (*_bounds(found, own.id, before), *_times(found))
    return select(own.id).where(_family(found), *bounds, *_filters(found)).order_by(own.id.desc())


def _family(found: Found) -> ColumnElement[bool]:
    if found.parent is None:
        return operation.c.parent_id.is_(None)
    other = operation.alias("parent")
    return operation.c.parent_id == select(other.c.id).where(other.c.uuid == found.parent).scalar_subquery()


def _filters(found: Found) -> list[ColumnElement[bool]]:
    filters: list[ColumnElement[bool]] = []
    if found.status is not None:
        filters.append(or_(false(), *(operation.c.status == each for each in sorted(set(found.status)))))
    if found.entrypoint is not None:
        filters.append(operation.c.entrypoint == found.entrypoint)
    return filters


def _bounds(found: Found, key: Any, before: int | None) -> list[ColumnElement[bool]]:
    """Bounds of an identifier, which rises with the time of creation."""
    bounds: list[ColumnElement[bool]] = []
    if before is not None:
        bounds.append(key < before)
    if found.since is not None:
        bounds.append(key >= id_at(found.since - ROUNDING))
    if found.until is not None:
        bounds.append(key < id_at(found.until + ROUNDING))
    return bounds


def _times(found: Found) -> list[ColumnElement[bool]]:
    """The same exactly."""
    times: list[ColumnElement[bool]] = []
    if found.since is not None:
        times.append(operation.c.created_at >= found.since)
    if found.until is not None:
        times.append(operation.c.created_at < found.until)
    return times
