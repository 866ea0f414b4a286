"""Databases that can be made unavailable and available again."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Protocol

from kser.store import open_store
from tests.postgres import Database, Postgresql

#: Seconds after which nobody who is at work can have the lock.
HELD = 0.7


class Faulty(Protocol):
    """A database with kser's tables."""

    name: str
    uri: str

    def take_away(self) -> None:
        """Nobody can use it from now on."""

    def give_back(self) -> None:
        """It can be used again."""

    def is_held(self) -> bool:
        """Whether a process that stands still keeps everybody from it."""


class StoppedPostgresql:
    """A server that is stopped as by a crash."""

    name = "PostgreSQL"

    def __init__(self, server: Postgresql) -> None:
        self._server = server
        self.uri = Database(server.uri).uri

    def take_away(self) -> None:
        self._server.stop("immediate")

    def give_back(self) -> None:
        self._server.start()

    def is_held(self) -> bool:
        # Only from the rows that it has locked, and not for long.
        return False


class LockedSqlite:
    """A file that somebody else locks."""

    name = "SQLite"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "operations.db"
        self.uri = f"sqlite:///{self._path}"
        self._enough = threading.Event()
        self._thread: threading.Thread | None = None
        with closing(open_store(self.uri)) as store:
            store.check()

    def take_away(self) -> None:
        # Whoever has the lock may stand still until the caller lets it go on.
        self._enough.clear()
        self._thread = threading.Thread(target=self._keep_locked, name="locks the database")
        self._thread.start()

    def give_back(self) -> None:
        self._enough.set()
        if self._thread is not None:
            self._thread.join()

    def is_held(self) -> bool:
        with closing(self._connect(HELD)) as connection:
            return not _lock(connection)

    def _keep_locked(self) -> None:
        with closing(self._connect(0.1)) as connection:
            while not _lock(connection):
                if self._enough.is_set():
                    return
            self._enough.wait()

    def _connect(self, timeout: float) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=timeout, isolation_level=None)


def _lock(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True
