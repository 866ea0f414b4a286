"""The store in a SQL database, which delegates the contract to one class per kind of statement."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from kser.errors import MissingDependency, SettingError
from kser.store.base import Store
from kser.store.rows import (
    Checkpoint,
    Claim,
    Claimant,
    Due,
    Found,
    NewOperation,
    OperationRow,
    Page,
    Refusal,
    Stored,
    TaskRow,
)
from kser.store.sql import schema
from kser.store.sql.claiming import Take
from kser.store.sql.database import Database, Transaction
from kser.store.sql.endings import Endings
from kser.store.sql.finding import Finding
from kser.store.sql.postgresql import Postgresql
from kser.store.sql.reading import Reading
from kser.store.sql.reaping import Reaping
from kser.store.sql.saving import Save
from kser.store.sql.sqlite import Sqlite
from kser.store.sql.writing import Writing, repeated

Result = TypeVar("Result")

EXAMPLES = "sqlite:///shop.db or postgresql+psycopg://user@host/database"


class SQLStore(Store):
    """A store in a SQLite file or in PostgreSQL.

    A SQLite file is created with its tables at the first use. In PostgreSQL, create the tables with
    ``python -m kser.store upgrade``.

    :param uri: ``sqlite:///file.db`` or ``postgresql+psycopg://user@host/database``, in any form that SQLAlchemy
        accepts.
    :param synchronous: for SQLite: ``"FULL"``, or ``"NORMAL"``, which is faster and loses the last transactions when
        the power fails.
    :raises kser.errors.SettingError: ``uri`` is not the address of a supported database.
    :raises kser.errors.MissingDependency: the driver is not installed.
    """

    def __init__(self, uri: str, *, synchronous: str = "FULL") -> None:
        self._database = database_at(uri, synchronous)
        self.name = self._database.name
        self._writing = Writing(self._database)
        self._reading = Reading(self._database)
        self._finding = Finding(self._database)
        self._reaping = Reaping(self._database, self._writing.adding)
        self._endings = Endings(self._database, self._writing.adding)
        self._checked = False
        self._lock = threading.Lock()

    @property
    def _shift(self) -> float:
        """Seconds that are added to the clock; used by tests."""
        return self._database.shift

    @_shift.setter
    def _shift(self, seconds: float) -> None:
        self._database.shift = seconds

    def check(self) -> None:
        with self._lock:
            schema.check(self._database, create=isinstance(self._database, Sqlite))
            self._checked = True

    def save(self, operation: NewOperation, claimant: Claimant | None = None) -> Claim | Refusal | int:
        self._first()
        found: Claim | Refusal | int = self._writing.write(Save(operation, claimant))
        return found

    def claim(self, uuid: str, step: str, claimant: Claimant) -> Claim | Refusal | None:
        self._first()
        found: Claim | Refusal | None = self._writing.write(Take(uuid, step, claimant))
        return found

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        self._first()
        return str(self._writing.write(checkpoint))

    def peek(self, uuid: str) -> OperationRow | None:
        with self._read() as transaction:
            return self._reading.peek(transaction, uuid)

    def tasks(self, operation_id: int) -> Sequence[TaskRow]:
        with self._read() as transaction:
            return self._reading.tasks(transaction, operation_id)

    def task(self, operation_id: int, position: int) -> TaskRow | None:
        with self._read() as transaction:
            return self._reading.task(transaction, operation_id, position)

    def children(self, root_id: int) -> Sequence[OperationRow]:
        with self._read() as transaction:
            return self._reading.children(transaction, root_id)

    def get(self, uuid: str) -> Stored | None:
        with self._read(snapshot=True) as transaction:
            return self._reading.get(transaction, uuid)

    def find(self, found: Found, limit: int, after: str | None = None) -> Page:
        with self._read(snapshot=True) as transaction:
            return self._finding.find(transaction, found, limit, after)

    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        pairs = list(claims)
        found = self._write(lambda transaction: self._reaping.renew_free(transaction, pairs, owner, lease))
        # In SQLite there is only one writer, so no row was locked and skipped; a missing claim is really lost.
        missing = [pair for pair in pairs if pair[0] not in found] if self._database.packed else []
        for pair in missing:
            found |= self._write(partial(self._reaping.renew, claim=pair, owner=owner, lease=lease))
        return found

    def sent(self, steps: Iterable[tuple[int, int]], resend_after: float) -> None:
        pairs = list(steps)
        self._write(lambda transaction: self._reaping.sent(transaction, pairs, resend_after))

    def take_due(self, limit: int, consumer: str, *, expired: bool) -> Sequence[Due]:
        return self._write(lambda transaction: self._reaping.take_due(transaction, limit, consumer, expired=expired))

    def unsent(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        pairs = list(steps)
        self._write(lambda transaction: self._reaping.unsent(transaction, pairs, wait))

    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        return self._write(lambda transaction: self._endings.cancel(transaction, uuid, reason))

    def resume(self, uuid: str) -> OperationRow | None:
        return self._write(lambda transaction: self._endings.resume(transaction, uuid))

    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        return self._write(lambda transaction: self._endings.purge(transaction, older_than, status, limit))

    def close(self) -> None:
        self._database.close()

    def _first(self) -> None:
        """Check the schema before the first use: create a SQLite file, and reject incompatible tables."""
        if not self._checked:
            self.check()

    @contextmanager
    def _read(self, *, snapshot: bool = False) -> Iterator[Transaction]:
        self._first()
        with self._database.read(snapshot=snapshot) as transaction:
            yield transaction

    def _write(self, work: Callable[[Transaction], Result]) -> Result:
        self._first()

        def run() -> Result:
            with self._database.write() as transaction:
                return work(transaction)

        return repeated(run)


def database_at(uri: str, synchronous: str = "FULL") -> Database:
    """Return the database at an address, without connecting to it.

    :raises kser.errors.SettingError: ``uri`` is not the address of a supported database.
    :raises kser.errors.MissingDependency: the driver is not installed.
    """
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        raise SettingError(
            "the database URI is not valid; use one like sqlite:///shop.db or postgresql+psycopg://user@host/database"
        ) from None
    try:
        if url.drivername in ("sqlite", "sqlite+pysqlite"):
            return Sqlite(url.set(drivername="sqlite+pysqlite"), synchronous)
        if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
            return Postgresql(url.set(drivername="postgresql+psycopg"))
    except ImportError as error:
        raise MissingDependency(
            f'PostgreSQL needs psycopg ({error}); install it with: pip install "kser[postgresql]"'
        ) from error
    raise SettingError(f"kser supports databases like {EXAMPLES}, not {url.drivername}")
