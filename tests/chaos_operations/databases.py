"""Databases that can be made unavailable and available again."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Protocol

from kser.store import open_store
from tests.postgres import Database, Postgresql

#: Seconds after which a process that is not suspended has released the lock.
LOCK_SECONDS = 0.7


class FaultyDatabase(Protocol):
    """A database with kser's tables that can be made unavailable."""

    name: str
    uri: str

    def start_outage(self) -> None:
        """Make the database unavailable."""

    def end_outage(self) -> None:
        """Make the database available."""

    def is_locked(self) -> bool:
        """Return whether a suspended process holds a lock that blocks all writers."""


class StoppedPostgresql:
    """A PostgreSQL server; an outage is a crash of the server."""

    name = "PostgreSQL"

    def __init__(self, server: Postgresql) -> None:
        self._server = server
        self.uri = Database(server.uri).uri

    def start_outage(self) -> None:
        self._server.stop("immediate")

    def end_outage(self) -> None:
        self._server.start()

    def is_locked(self) -> bool:
        # A suspended process blocks only the rows that it has locked, and its session has timeouts.
        return False


class LockedSqlite:
    """A SQLite file; an outage is a lock of another connection."""

    name = "SQLite"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "operations.db"
        self.uri = f"sqlite:///{self._path}"
        self._outage_over = threading.Event()
        self._thread: threading.Thread | None = None
        with closing(open_store(self.uri)) as store:
            store.check()

    def start_outage(self) -> None:
        # Lock the file in a thread, because a suspended process may hold the lock until the caller continues it.
        self._outage_over.clear()
        self._thread = threading.Thread(target=self._keep_locked, name="locks the database")
        self._thread.start()

    def end_outage(self) -> None:
        self._outage_over.set()
        if self._thread is not None:
            self._thread.join()

    def is_locked(self) -> bool:
        with closing(self._connect(LOCK_SECONDS)) as connection:
            return not _lock(connection)

    def _keep_locked(self) -> None:
        with closing(self._connect(0.1)) as connection:
            while not _lock(connection):
                if self._outage_over.is_set():
                    return
            self._outage_over.wait()

    def _connect(self, timeout: float) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=timeout, isolation_level=None)


def _lock(connection: sqlite3.Connection) -> bool:
    """Try to lock the file for writing; return whether that succeeded."""
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True
