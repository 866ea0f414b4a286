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
from kser.store.model import (
    Checkpoint,
    Claim,
    ClaimRefused,
    ClaimRequest,
    DueStep,
    NewOperation,
    OperationQuery,
    OperationRow,
    OperationSnapshot,
    Page,
    TaskRow,
)
from kser.store.sql import schema
from kser.store.sql.claims import ClaimCommand
from kser.store.sql.database import Database, Transaction
from kser.store.sql.leases import Leases
from kser.store.sql.lifecycle import Lifecycle
from kser.store.sql.postgresql import Postgresql
from kser.store.sql.queries import OperationSearch, Queries
from kser.store.sql.saves import SaveRequest
from kser.store.sql.sqlite import Sqlite
from kser.store.sql.writer import BatchWriter, retry_on_conflict

R = TypeVar("R")

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
        self._writer = BatchWriter(self._database)
        self._queries = Queries(self._database)
        self._search = OperationSearch(self._database)
        self._leases = Leases(self._database, self._writer.inserts)
        self._lifecycle = Lifecycle(self._database, self._writer.inserts)
        self._checked = False
        self._lock = threading.Lock()

    @property
    def _clock_offset(self) -> float:
        """Seconds that are added to the clock; used by tests."""
        return self._database.clock_offset

    @_clock_offset.setter
    def _clock_offset(self, seconds: float) -> None:
        self._database.clock_offset = seconds

    def check(self) -> None:
        with self._lock:
            schema.check(self._database, create=isinstance(self._database, Sqlite))
            self._checked = True

    def save(self, operation: NewOperation, request: ClaimRequest | None = None) -> Claim | ClaimRefused | int:
        self._ensure_schema()
        found: Claim | ClaimRefused | int = self._writer.write(SaveRequest(operation, request))
        return found

    def claim(self, uuid: str, step: str, request: ClaimRequest) -> Claim | ClaimRefused | None:
        self._ensure_schema()
        found: Claim | ClaimRefused | None = self._writer.write(ClaimCommand(uuid, step, request))
        return found

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        self._ensure_schema()
        return str(self._writer.write(checkpoint))

    def get_operation(self, uuid: str) -> OperationRow | None:
        with self._read() as transaction:
            return self._queries.get_operation(transaction, uuid)

    def get_tasks(self, operation_id: int) -> Sequence[TaskRow]:
        with self._read() as transaction:
            return self._queries.get_tasks(transaction, operation_id)

    def get_task(self, operation_id: int, position: int) -> TaskRow | None:
        with self._read() as transaction:
            return self._queries.get_task(transaction, operation_id, position)

    def get_children(self, root_id: int) -> Sequence[OperationRow]:
        with self._read() as transaction:
            return self._queries.get_children(transaction, root_id)

    def snapshot(self, uuid: str) -> OperationSnapshot | None:
        with self._read(snapshot=True) as transaction:
            return self._queries.snapshot(transaction, uuid)

    def find(self, query: OperationQuery, limit: int, after: str | None = None) -> Page:
        with self._read(snapshot=True) as transaction:
            return self._search.find(transaction, query, limit, after)

    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        pairs = list(claims)
        found = self._write(lambda transaction: self._leases.renew_free(transaction, pairs, owner, lease))
        # In SQLite there is only one writer, so no row was locked and skipped; a missing claim is really lost.
        missing = [pair for pair in pairs if pair[0] not in found] if self._database.json_batches else []
        for pair in missing:
            found |= self._write(partial(self._leases.renew, claim=pair, owner=owner, lease=lease))
        return found

    def mark_sent(self, steps: Iterable[tuple[int, int]], resend_after: float) -> None:
        pairs = list(steps)
        self._write(lambda transaction: self._leases.mark_sent(transaction, pairs, resend_after))

    def take_due_steps(self, limit: int, consumer: str, *, expired: bool) -> Sequence[DueStep]:
        return self._write(
            lambda transaction: self._leases.take_due_steps(transaction, limit, consumer, expired=expired)
        )

    def postpone_send(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        pairs = list(steps)
        self._write(lambda transaction: self._leases.postpone_send(transaction, pairs, wait))

    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        return self._write(lambda transaction: self._lifecycle.cancel(transaction, uuid, reason))

    def resume(self, uuid: str, epoch: int, token: str) -> OperationRow | None:
        return self._write(lambda transaction: self._lifecycle.resume(transaction, uuid, epoch, token))

    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        return self._write(lambda transaction: self._lifecycle.purge(transaction, older_than, status, limit))

    def close(self) -> None:
        self._database.close()

    def _ensure_schema(self) -> None:
        """Check the schema before the first use: create a SQLite file, and reject incompatible tables."""
        if not self._checked:
            self.check()

    @contextmanager
    def _read(self, *, snapshot: bool = False) -> Iterator[Transaction]:
        self._ensure_schema()
        with self._database.read(snapshot=snapshot) as transaction:
            yield transaction

    def _write(self, work: Callable[[Transaction], R]) -> R:
        self._ensure_schema()

        def run() -> R:
            with self._database.write() as transaction:
                return work(transaction)

        return retry_on_conflict(run)


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
