"""SQL statements that are compiled once from SQLAlchemy expressions.

The execution of a compiled statement costs no time in SQLAlchemy, only in the driver. SQLite is fastest if each
execution of a statement gets one row of values. In PostgreSQL, one execution gets all rows of values as one JSON text,
because psycopg needs five times as long to send the same values as parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import (
    JSON,
    ColumnElement,
    Dialect,
    Integer,
    Select,
    Subquery,
    Table,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.sql import ClauseElement

#: Bind parameter for the clock: the current time in SQLite, or an offset to the server's clock in PostgreSQL.
CLOCK: Final = "clock"
#: Bind parameter for all rows of values of a statement, as one JSON text.
ROWS: Final = "rows"

#: Numbers as part of the text of a statement, because each bind parameter costs time in each execution.
ZERO: Final[ColumnElement[Any]] = literal_column("0")
ONE: Final[ColumnElement[Any]] = literal_column("1")

#: A column with its own name as its alias. psycopg parses a statement of more than 4,096 characters in each execution,
#: so the aliases that change nothing are removed.
_SAME_NAME: Final = re.compile(r"\b(\w+\.(\w+)) AS \2\b")

Types = Mapping[str, Any]


class Statement:
    """A compiled statement. One execution handles one row of values, or all rows at once.

    :param clause: the expression to compile.
    :param dialect: the SQL dialect of the database.
    """

    __slots__ = ("constants", "sql")

    def __init__(self, clause: ClauseElement, dialect: Dialect) -> None:
        compiled: Any = clause.compile(dialect=dialect)
        self.sql = _SAME_NAME.sub(r"\1", str(compiled))
        #: The values of the bind parameters that are the same in each execution. Do not read them from
        #: ``compiled.binds``, which contains some of them twice, under different names.
        self.constants: dict[str, Any] = {
            name: bind.value for bind, name in compiled.bind_names.items() if not bind.required
        }


class RowSource:
    """The source of the row values for a statement: bind parameters, or one JSON text with all rows of values.

    :param json_batches: True if the source is one JSON text.
    :param types: names and types of the values.
    :param name: name of the bind parameter of the JSON text.
    """

    def __init__(self, json_batches: bool, types: Types, name: str = ROWS) -> None:
        self.json_batches = json_batches
        if json_batches:
            text = cast(bindparam(name, type_=Text), JSON)
            columns = [column(name, kind) for name, kind in types.items()]
            rows = func.json_to_recordset(text).table_valued(*columns)
            # A short alias keeps long statements below the limit of psycopg.
            self._rows = rows.render_derived(name=f"{name[:2]}_", with_types=True)
        self._types = types
        self._where = self._row_estimate_hint() if json_batches else ()

    def __getitem__(self, name: str) -> ColumnElement[Any]:
        if self.json_batches:
            value: ColumnElement[Any] = self._rows.c[name]
            return value
        return bindparam(name, type_=self._types[name])

    def _row_estimate_hint(self) -> tuple[ColumnElement[bool], ...]:
        """Return a condition that is always true, and that makes the planner assume about one row of values.

        Without this condition, the planner assumes that the JSON text has 100 rows of values, and prefers to read a
        small table completely. The server keeps this plan after the table has grown.
        """
        first = next(iter(self._types))
        kind = self._types[first]
        number = self[first] if isinstance(kind, Integer) else func.length(self[first])
        return (number % ONE == ZERO,)

    def insert(self, table: Table, values: Mapping[str, ColumnElement[Any]]) -> Any:
        """Return a statement that inserts each row of values."""
        if self.json_batches:
            return insert(table).from_select(list(values), select(*values.values()).select_from(self._rows))
        return insert(table).values(dict(values)).inline()

    def update(self, table: Table, values: Mapping[str, Any], *where: ColumnElement[bool]) -> Any:
        """Return a statement that updates, for each row of values, the matching table rows."""
        return update(table).where(*where, *self._where).values(dict(values))

    def update_skip_locked(self, table: Table, values: Mapping[str, Any], *where: ColumnElement[bool]) -> Any:
        """Return an update statement like :meth:`update`, but one that skips the rows that another transaction has
        locked.
        """
        if not self.json_batches:
            return self.update(table, values, *where)
        key = table.c.id
        matching = select(key).select_from(self._rows, table).where(*where, *self._where)
        unlocked = matching.with_for_update(of=table, skip_locked=True).cte("unlocked")
        return update(table).where(key == unlocked.c.id).values(dict(values))

    def delete(self, table: Table, *where: ColumnElement[bool]) -> Any:
        """Return a statement that deletes, for each row of values, the matching table rows."""
        return delete(table).where(*where, *self._where)

    def subquery_of(self, query: Select[Any], name: str) -> Subquery:
        """Return ``query``, which names values of this source, as a subquery of a query for :meth:`select_each`."""
        return (query.correlate(self._rows) if self.json_batches else query).subquery(name)

    def select_each(self, query: Select[Any]) -> Any:
        """Return a statement that runs ``query``, which names values of this source, for each row of values.

        In contrast to :meth:`select`, the order and the limit of the query apply to each row of values alone.
        """
        if not self.json_batches:
            return query
        part = query.lateral("part")
        return select(*part.c).select_from(self._rows.join(part, literal_column("true"))).where(*self._where)

    def select(self, columns: Any, table: Table, *where: ColumnElement[bool]) -> Any:
        """Return a statement that reads, for each row of values, the matching table rows."""
        matching = select(*columns).where(*where, *self._where)
        return matching.select_from(self._rows, table) if self.json_batches else matching.select_from(table)


def types_of(table: Table, *names: str) -> dict[str, Any]:
    """Return the types of the named columns, keyed by name. Without ``names``, return the types of all columns."""
    return {own.name: own.type for own in table.columns if not names or own.name in names}
