"""What SQLite and PostgreSQL have in common for us: connections, transactions, and what an error of theirs means."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Final

from sqlalchemy import URL, ColumnElement, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from kser.errors import KserError, StoreError, StoreUnavailable
from kser.store.sql.statements import CLOCK, ROWS, Source, Statement, Types

#: How often a transaction is run in all that another one made impossible.
ATTEMPTS: Final = 3

#: What drivers raise beside their own errors: a text that is no Unicode, a number that is too large.
BAD_VALUES: Final = (UnicodeError, OverflowError)


class Repeat(StoreUnavailable):
    """Another transaction was in the way; nothing of this one took effect"""


class Transaction:
    """Runs statements.

    :param cursor: the driver's.
    :param clock: what statements know the time by.
    :param time: the time by the database's clock, or a moment before.
    :param packed: whether a statement gets all its rows at once.
    """

    def __init__(self, cursor: Any, clock: float, time: float, packed: bool) -> None:
        self._cursor = cursor
        self._clock = clock
        self._packed = packed
        self.time = time

    def run(self, statement: Statement, values: Mapping[str, Any] | None = None, *, anew: bool = False) -> Any:
        """Run a statement that is no matter of many rows; returns the driver's cursor.

        :param anew: what is the best way to run it depends on the values.
        """
        options = {"prepare": False} if anew and self._packed else {}
        self._cursor.execute(statement.sql, {**statement.constants, CLOCK: self._clock, **(values or {})}, **options)
        return self._cursor

    def change(self, statement: Statement, rows: Sequence[Mapping[str, Any]], **values: Any) -> int:
        """Run a statement for all these rows; returns how many rows it changed."""
        if not rows:
            return 0
        cursor, base = self._cursor, {**statement.constants, CLOCK: self._clock, **values}
        if self._packed:
            cursor.execute(statement.sql, {**base, ROWS: json.dumps(rows)})
            return int(cursor.rowcount)
        cursor.executemany(statement.sql, ({**base, **row} for row in rows))
        return int(cursor.rowcount)

    def fetch(self, statement: Statement, rows: Sequence[Mapping[str, Any]], **values: Any) -> list[Any]:
        """Run a statement for all these rows; returns the rows that it gives."""
        if not rows:
            return []
        cursor, base = self._cursor, {**statement.constants, CLOCK: self._clock, **values}
        if self._packed:
            cursor.execute(statement.sql, {**base, ROWS: json.dumps(rows)})
            return list(cursor.fetchall())
        found: list[Any] = []
        for row in rows:
            cursor.execute(statement.sql, {**base, **row})
            found += cursor.fetchall()
        return found


class Database(ABC):
    """A database of one of the two kinds.

    :param url: where it is.
    """

    #: How its address begins.
    prefix: ClassVar[str]
    #: Whether a statement gets all its rows at once.
    packed: ClassVar[bool]
    #: How many transactions it is worth to run at the same time.
    writers: ClassVar[int]
    #: Seconds since 1970, as an expression.
    now: ColumnElement[float]

    def __init__(self, url: URL) -> None:
        self.url = url
        #: The address without anything secret.
        self.name = url.set(drivername=self.prefix, query={}).render_as_string()
        #: Seconds that its clock is put forward: for tests.
        self.shift = 0.0
        self.engine: Engine = self._engine()

    def statement(self, clause: Any) -> Statement:
        """Make a statement."""
        return Statement(clause, self.engine.dialect)

    def source(self, types: Types, name: str = ROWS) -> Source:
        """Where the rows of a statement come from."""
        return Source(self.packed, types, name)

    @contextmanager
    def write(self, *, single: bool = False) -> Iterator[Transaction]:
        """A transaction, committed at the end; afterwards nothing is held.

        :param single: it is one statement.
        :raises kser.errors.StoreUnavailable: the database cannot be used now.
        :raises kser.errors.StoreError: it refuses a statement.
        """
        with self._translated(), self._writing(single) as transaction:
            yield transaction

    @contextmanager
    def read(self, *, snapshot: bool = False) -> Iterator[Transaction]:
        """Statements that write nothing.

        :param snapshot: they all see the same state.
        """
        with self._translated(), self._reading(snapshot) as transaction:
            yield transaction

    @contextmanager
    def looking(self) -> Iterator[Connection]:
        """A connection to look at tables with, as SQLAlchemy has it."""
        with self._translated(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A transaction that is the only one to change tables, as SQLAlchemy has it."""
        with self._translated(), self._migrating() as connection:
            yield connection

    def exists(self) -> bool:
        """Whether there is something to connect to: else that would make it."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Let go of all connections."""

    @abstractmethod
    def _engine(self) -> Engine: ...

    @abstractmethod
    def _writing(self, single: bool) -> AbstractContextManager[Transaction]: ...

    @abstractmethod
    def _reading(self, snapshot: bool) -> AbstractContextManager[Transaction]: ...

    @abstractmethod
    def _migrating(self) -> AbstractContextManager[Connection]: ...

    @abstractmethod
    def _meaning(self, error: Exception) -> tuple[type[KserError], str]:
        """What an error of the driver is for us, and what to do about it."""

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except BAD_VALUES as error:
            raise StoreError(f"{self.name} cannot store this: {error}") from error
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None)
            raise self._translate(cause if isinstance(cause, Exception) else error) from error
        except self.engine.dialect.loaded_dbapi.Error as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> KserError:
        kind, advice = self._meaning(error)
        what = "refuses this" if issubclass(kind, StoreError) else "cannot be used now"
        text = " ".join(str(error).split()) or type(error).__name__
        return kind(f"the database {self.name} {what}: {text}" + (f"; {advice}" if advice else ""))
