"""SQL made once from expressions, so that running it costs what the driver costs.

One row at a time is what SQLite is fastest with; PostgreSQL gets all rows of a statement as one JSON text, which takes
a fifth of the time that the driver takes for as many parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import (
    JSON,
    ColumnElement,
    Dialect,
    Integer,
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

#: What a statement knows the time by: the time itself in SQLite, what is added to the server's in PostgreSQL.
CLOCK: Final = "clock"
#: All rows of a statement as JSON.
ROWS: Final = "rows"

Types = Mapping[str, Any]


class Statement:
    """A statement for one row, or for all rows at once.

    :param dialect: whose SQL.
    """

    __slots__ = ("constants", "sql")

    def __init__(self, clause: ClauseElement, dialect: Dialect) -> None:
        compiled: Any = clause.compile(dialect=dialect)
        self.sql = str(compiled)
        self.constants: dict[str, Any] = {name: b.value for name, b in compiled.binds.items() if not b.required}


class Source:
    """Where a statement has the values of its rows from.

    :param packed: all rows come as one JSON text.
    :param types: names and types of the values.
    :param name: of that text.
    """

    def __init__(self, packed: bool, types: Types, name: str = ROWS) -> None:
        self.packed = packed
        if packed:
            text = cast(bindparam(name, type_=Text), JSON)
            columns = [column(name, kind) for name, kind in types.items()]
            self._rows = func.json_to_recordset(text).table_valued(*columns).render_derived(with_types=True)
        self._types = types
        self._where = self._few() if packed else ()

    def __getitem__(self, name: str) -> ColumnElement[Any]:
        if self.packed:
            found: ColumnElement[Any] = self._rows.c[name]
            return found
        return bindparam(name, type_=self._types[name])

    def _few(self) -> tuple[ColumnElement[bool], ...]:
        """Always true, and makes the planner expect a row or so.

        It would take a hundred for granted, and rather read the whole table while that is small; and it keeps that plan
        when the table has grown.
        """
        first = next(iter(self._types))
        kind = self._types[first]
        number = self[first] if isinstance(kind, Integer) else func.length(self[first])
        return (number % literal_column("1") == literal_column("0"),)

    def insert(self, table: Table, values: Mapping[str, ColumnElement[Any]]) -> Any:
        """A statement that adds each row."""
        if self.packed:
            return insert(table).from_select(list(values), select(*values.values()).select_from(self._rows))
        return insert(table).values(dict(values)).inline()

    def update(self, table: Table, values: Mapping[str, Any], *where: ColumnElement[bool]) -> Any:
        """A statement that changes what each row stands for."""
        return update(table).where(*where, *self._where).values(dict(values))

    def update_free(self, table: Table, values: Mapping[str, Any], *where: ColumnElement[bool]) -> Any:
        """The same, but for rows that another transaction holds now: nobody is waited for."""
        if not self.packed:
            return self.update(table, values, *where)
        key = table.c.id
        free = select(key).select_from(self._rows, table).where(*where, *self._where)
        found = free.with_for_update(of=table, skip_locked=True).cte("free")
        return update(table).where(key == found.c.id).values(dict(values))

    def delete(self, table: Table, *where: ColumnElement[bool]) -> Any:
        """A statement that deletes what each row stands for."""
        return delete(table).where(*where, *self._where)

    def select(self, columns: Any, table: Table, *where: ColumnElement[bool]) -> Any:
        """A statement that reads what each row stands for."""
        found = select(*columns).where(*where, *self._where)
        return found.select_from(self._rows, table) if self.packed else found.select_from(table)


def types_of(table: Table, *names: str) -> dict[str, Any]:
    """The types of some columns, by name; of all without names."""
    return {found.name: found.type for found in table.columns if not names or found.name in names}
