"""The base class of the SQLite and PostgreSQL databases: connections, transactions, classification of errors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Final

from sqlalchemy import URL, ColumnElement, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from kser.errors import KserError, StoreError, StoreUnavailable
from kser.store.sql.statements import CLOCK, ROWS, RowSource, Statement, Types

#: Maximum number of tries of a transaction that fails because of a conflict with another transaction.
CONFLICT_ATTEMPTS: Final = 3

#: Builtin exceptions that drivers raise for a text that is not valid Unicode, or for a number out of range.
BAD_VALUES: Final = (UnicodeError, OverflowError)


class SerializationConflict(StoreUnavailable):
    """A conflict with another transaction aborted this transaction; nothing was written"""


class Transaction:
    """An open transaction that executes statements.

    :param cursor: the cursor of the database driver.
    :param clock: the value of the bind parameter ``clock``.
    :param time: the current time in seconds since 1970, by the clock of the database; it may be slightly too early.
    :param json_batches: True if all rows of values for a statement are passed to it as one JSON text.
    """

    def __init__(self, cursor: Any, clock: float, time: float, json_batches: bool) -> None:
        self._cursor = cursor
        self._clock = clock
        self._json_batches = json_batches
        self.time = time

    def execute(self, statement: Statement, values: Mapping[str, Any] | None = None, *, replan: bool = False) -> Any:
        """Execute a statement with one set of values, and return the cursor of the database driver.

        :param replan: True if the server must plan the statement for these values, because the best plan depends on
            them.
        """
        options = {"prepare": False} if replan and self._json_batches else {}
        self._cursor.execute(statement.sql, {**statement.constants, CLOCK: self._clock, **(values or {})}, **options)
        return self._cursor

    def execute_many(self, statement: Statement, rows: Sequence[Mapping[str, Any]], **values: Any) -> int:
        """Execute a statement for all rows of values, and return the number of changed table rows."""
        if not rows:
            return 0
        cursor, base = self._cursor, {**statement.constants, CLOCK: self._clock, **values}
        if self._json_batches:
            cursor.execute(statement.sql, {**base, ROWS: json.dumps(rows)})
            return int(cursor.rowcount)
        cursor.executemany(statement.sql, ({**base, **row} for row in rows))
        return int(cursor.rowcount)

    def fetch(self, statement: Statement, rows: Sequence[Mapping[str, Any]], **values: Any) -> list[Any]:
        """Execute a statement for all rows of values, and return all rows that the statement produces."""
        if not rows:
            return []
        cursor, base = self._cursor, {**statement.constants, CLOCK: self._clock, **values}
        if self._json_batches:
            cursor.execute(statement.sql, {**base, ROWS: json.dumps(rows)})
            return list(cursor.fetchall())
        fetched: list[Any] = []
        for row in rows:
            cursor.execute(statement.sql, {**base, **row})
            fetched += cursor.fetchall()
        return fetched


class OwnConnection(ABC):
    """A connection that no other call of the store uses. One thread at a time may use it."""

    @abstractmethod
    def write(self, timeout: float) -> AbstractContextManager[Transaction]:
        """Provide a transaction that ends within ``timeout`` seconds. Each of its statements is committed by itself.

        :raises kser.errors.StoreUnavailable: the database cannot be used now, or did not answer in time. The next call
            uses a new connection.
        :raises kser.errors.StoreError: the database rejects a statement.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""


def no_offset() -> float:
    """Return 0.0 as the number of seconds to add to the clock of the database. Only tests add another number."""
    return 0.0


class Database(ABC):
    """A SQLite or PostgreSQL database.

    :param url: the address of the database.
    :param clock_offset: function that returns the number of seconds to add to the clock of the database.
    """

    #: URI scheme with which the address in the attribute ``name`` starts, for example ``sqlite``.
    prefix: ClassVar[str]
    #: True if all rows of values for a statement are passed to it as one JSON text.
    json_batches: ClassVar[bool]
    #: The number of concurrent write transactions with which the throughput is highest.
    max_concurrent_writers: ClassVar[int]
    #: The current time in seconds since 1970, as an SQL expression.
    now: ColumnElement[float]

    def __init__(self, url: URL, clock_offset: Callable[[], float]) -> None:
        self.url = url
        #: The address without passwords and options.
        self.name = url.set(drivername=self.prefix, query={}).render_as_string()
        self._clock_offset = clock_offset
        self.engine: Engine = self._engine()

    def statement(self, clause: Any) -> Statement:
        """Compile a statement for this database."""
        return Statement(clause, self.engine.dialect)

    def source(self, types: Types, name: str = ROWS) -> RowSource:
        """Return the source of the row values for a statement."""
        return RowSource(self.json_batches, types, name)

    @contextmanager
    def write(self, *, single: bool = False) -> Iterator[Transaction]:
        """Provide a transaction, and commit it at the end of the ``with`` block.

        If the block raises an exception, the transaction is rolled back. After the block, the transaction holds no
        locks.

        :param single: True if the block executes only one statement.
        :raises kser.errors.StoreUnavailable: the database cannot be used now.
        :raises kser.errors.StoreError: the database rejects a statement.
        """
        with self.translated(), self._writing(single) as transaction:
            yield transaction

    @contextmanager
    def read(self, *, snapshot: bool = False) -> Iterator[Transaction]:
        """Provide a transaction for statements that write nothing.

        :param snapshot: True if all statements must see the same state of the database.
        """
        with self.translated(), self._reading(snapshot) as transaction:
            yield transaction

    @contextmanager
    def inspect_connection(self) -> Iterator[Connection]:
        """Provide an SQLAlchemy connection for inspecting tables."""
        with self.translated(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def migration_transaction(self) -> Iterator[Connection]:
        """Provide an SQLAlchemy connection in a transaction that excludes all other migrations."""
        with self.translated(), self._migrating() as connection:
            yield connection

    @abstractmethod
    def own_connection(self) -> OwnConnection:
        """Return a new connection for one thread, which connects when it is first used."""

    def exists(self) -> bool:
        """Return whether the database exists.

        Call this method before connecting, because a connection would create a missing SQLite file.
        """
        return True

    @abstractmethod
    def close(self) -> None:
        """Close all connections."""

    @abstractmethod
    def _engine(self) -> Engine: ...

    @abstractmethod
    def _writing(self, single: bool) -> AbstractContextManager[Transaction]: ...

    @abstractmethod
    def _reading(self, snapshot: bool) -> AbstractContextManager[Transaction]: ...

    @abstractmethod
    def _migrating(self) -> AbstractContextManager[Connection]: ...

    @abstractmethod
    def _classify_error(self, error: Exception) -> tuple[type[KserError], str]:
        """Return the class of the exception to raise for a driver error, and a text with advice for the operator."""

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Translate errors of the driver into those of kser."""
        try:
            yield
        except BAD_VALUES as error:
            raise StoreError(f"the database {self.name} cannot store a value: {error}") from error
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None)
            raise self._translate(cause if isinstance(cause, Exception) else error) from error
        except self.engine.dialect.loaded_dbapi.Error as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> KserError:
        kind, advice = self._classify_error(error)
        problem = "rejects the statement" if issubclass(kind, StoreError) else "cannot be used now"
        text = " ".join(str(error).split()) or type(error).__name__
        return kind(f"the database {self.name} {problem}: {text}" + (f"; {advice}" if advice else ""))
