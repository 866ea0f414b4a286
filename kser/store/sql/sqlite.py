"""SQLite with one connection that writes, and several connections that read without waiting for the writer."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Double, Engine, bindparam, create_engine, event
from sqlalchemy.pool import QueuePool

from kser.errors import KserError, SettingError, StoreError, StoreUnavailable
from kser.store.sql.database import Database, OwnConnection, Transaction
from kser.store.sql.statements import CLOCK

#: Maximum number of seconds that a statement waits for a lock of another process.
BUSY_SECONDS: Final = 30.0

#: Maximum size of the page cache of a connection, in KiB.
CACHE_KIB: Final = 16_384

SYNCHRONOUS: Final = ("FULL", "NORMAL")

#: Result codes of errors that are not caused by the data in a statement, each with advice for the operator.
ERROR_TEXTS: Final = {
    sqlite3.SQLITE_ERROR: "its tables may be missing or of another version: run 'python -m kser.store status'",
    sqlite3.SQLITE_PERM: "this process is not allowed to open the file",
    sqlite3.SQLITE_BUSY: "another process has held the write lock for longer than 30 s",
    sqlite3.SQLITE_LOCKED: "another connection of this process is writing to the file",
    sqlite3.SQLITE_NOMEM: "there is not enough memory",
    sqlite3.SQLITE_READONLY: "this process is not allowed to write to the file or to its folder",
    sqlite3.SQLITE_INTERRUPT: "",
    sqlite3.SQLITE_IOERR: "the disk reported an error",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore it from a backup",
    sqlite3.SQLITE_FULL: "the disk is full: make room",
    sqlite3.SQLITE_CANTOPEN: "the folder of the file must exist, and this process must be allowed to write to it",
    sqlite3.SQLITE_PROTOCOL: "other processes hold locks on the file",
    sqlite3.SQLITE_SCHEMA: "its tables were changed",
    sqlite3.SQLITE_NOLFS: "the file is larger than the system allows",
    sqlite3.SQLITE_AUTH: "",
    sqlite3.SQLITE_NOTADB: "the file is not a SQLite database",
}


class Sqlite(Database):
    """A SQLite file.

    :param url: the address of the file.
    :param clock_offset: function that returns the number of seconds to add to the clock.
    :param synchronous: ``"FULL"`` or ``"NORMAL"``. With ``"NORMAL"``, a power failure can lose the last transactions.
    """

    prefix = "sqlite"
    json_batches = False
    max_concurrent_writers = 1
    now = bindparam(CLOCK, type_=Double)

    def __init__(self, url: URL, clock_offset: Callable[[], float], synchronous: str) -> None:
        if synchronous not in SYNCHRONOUS:
            raise SettingError(f"synchronous must be 'FULL' or 'NORMAL'; it is {synchronous!r}")
        if url.database in (None, "", ":memory:"):
            raise SettingError("SQLite needs a file, like sqlite:///shop.db; for a store in memory use memory://")
        self._synchronous = synchronous
        self._lock = threading.Lock()
        self._writer: Any = None
        self._closed = False
        super().__init__(url, clock_offset)

    def exists(self) -> bool:
        name = self.url.database or ""
        return name.startswith("file:") or Path(name).exists()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop_writer()
        self.engine.dispose()

    def _engine(self) -> Engine:
        # Disable the implicit transactions of the driver: they start only before the first write, so they do not
        # include earlier reads, and they do not take the write lock at their start. kser starts its transactions with
        # explicit statements.
        options = {"check_same_thread": False, "isolation_level": None, "timeout": BUSY_SECONDS}
        options = {name: value for name, value in options.items() if name not in self.url.query}
        engine = create_engine(
            self.url,
            connect_args={**options, "cached_statements": 256},
            poolclass=QueuePool,
            pool_size=4,
            max_overflow=-1,
            pool_reset_on_return=None,
            paramstyle="named",
        )
        event.listen(engine, "connect", self._prepare)
        return engine

    def _prepare(self, connection: sqlite3.Connection, _record: Any) -> None:
        _write_ahead(connection)
        connection.execute(f"PRAGMA synchronous={self._synchronous}")
        connection.execute(f"PRAGMA cache_size={-CACHE_KIB}")

    @contextmanager
    def _writing(self, single: bool) -> Iterator[Transaction]:
        with self._lock, self._locked_writer() as transaction:
            yield transaction

    @contextmanager
    def write_within(self, timeout: float) -> Iterator[Transaction]:
        """Provide a transaction that starts within ``timeout`` seconds."""
        start_at = time.monotonic() + timeout
        if not self._lock.acquire(timeout=timeout):
            raise StoreUnavailable(
                f"the database {self.name} cannot be used now: another thread has written to it for longer than"
                f" {timeout:g} s"
            )
        try:
            with self.translated(), self._locked_writer(max(start_at - time.monotonic(), 0)) as transaction:
                yield transaction
        finally:
            self._lock.release()

    @contextmanager
    def _locked_writer(self, busy_seconds: float | None = None) -> Iterator[Transaction]:
        """Provide a transaction on the connection that writes. The caller holds the lock of this connection.

        :param busy_seconds: maximum number of seconds to wait for another process that writes; None for the default.
        """
        if self._writer is None:
            self._writer = self.engine.raw_connection()
        cursor = self._writer.cursor()
        try:
            self._begin(cursor, busy_seconds)
            yield self._transaction(cursor)
            cursor.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        finally:
            if self._closed:
                self._drop_writer()

    @staticmethod
    def _begin(cursor: Any, busy_seconds: float | None) -> None:
        if busy_seconds is None:
            cursor.execute("BEGIN IMMEDIATE")
            return
        (before,) = cursor.execute("PRAGMA busy_timeout").fetchone()
        cursor.execute(f"PRAGMA busy_timeout={int(busy_seconds * 1000)}")
        try:
            cursor.execute("BEGIN IMMEDIATE")
        finally:
            cursor.execute(f"PRAGMA busy_timeout={before}")

    def own_connection(self) -> OwnConnection:
        return SqliteConnection(self)

    def _transaction(self, cursor: Any) -> Transaction:
        # Read the clock inside the transaction, after the write lock was obtained. A time from before the wait for the
        # lock would be stale.
        now = time.time() + self._clock_offset()
        return Transaction(cursor, now, now, self.json_batches)

    def _roll_back(self) -> None:
        try:
            self._writer.rollback()
        except sqlite3.Error:
            self._drop_writer()

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.invalidate()

    @contextmanager
    def _reading(self, snapshot: bool) -> Iterator[Transaction]:
        connection = self.engine.raw_connection()
        try:
            cursor = connection.cursor()
            if snapshot:
                cursor.execute("BEGIN")
            yield self._transaction(cursor)
            if snapshot:
                cursor.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.rollback()
            raise
        finally:
            # A thread that was not joined may still read during or after close(). Its connection cannot return to the
            # pool, because close() has disposed of the pool, so discard the connection.
            connection.invalidate() if self._closed else connection.close()

    @contextmanager
    def _migrating(self) -> Iterator[Connection]:
        with self._lock, self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    def _classify_error(self, error: Exception) -> tuple[type[KserError], str]:
        # The lowest byte of an extended result code is the primary result code.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in ERROR_TEXTS:
            return StoreUnavailable, ERROR_TEXTS[code]
        return StoreError, ""


class SqliteConnection(OwnConnection):
    """A connection of its own in name only: it shares the connection that writes with the other threads.

    A second connection of this process would have to poll for the write lock of the file, and so would wait longer than
    a thread that waits for its turn in this process.

    :param database: the file.
    """

    def __init__(self, database: Sqlite) -> None:
        self._database = database

    def write(self, timeout: float) -> AbstractContextManager[Transaction]:
        return self._database.write_within(timeout)

    def close(self) -> None:
        """Do nothing, because the database closes the shared connection."""


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch the file to write-ahead logging (WAL).

    SQLite ignores the busy timeout for this pragma, so retry while another process has locked the file.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
