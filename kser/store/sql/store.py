"""The store in an SQL database. It delegates each method to a class with the SQL statements of this method."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from kser.errors import MissingDependency, SettingError
from kser.store.base import LeaseRenewer, Store
from kser.store.model import (
    MAX_SENDS,
    UNKNOWN_AFTER,
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
    TakeoverQuery,
    TaskRow,
)
from kser.store.sql import schema
from kser.store.sql.claims import ClaimCommand
from kser.store.sql.database import Database, Transaction, no_offset
from kser.store.sql.due_steps import DueSteps
from kser.store.sql.leases import Leases, SQLLeaseRenewer
from kser.store.sql.lifecycle import Lifecycle
from kser.store.sql.postgresql import Postgresql
from kser.store.sql.queries import OperationSearch, Queries
from kser.store.sql.saves import SaveRequest
from kser.store.sql.sqlite import Sqlite
from kser.store.sql.writer import BatchWriter, retry_on_conflict

P = ParamSpec("P")
R = TypeVar("R")

EXAMPLES = "sqlite:///shop.db or postgresql+psycopg://user@host/database"


class SQLStore(Store):
    """A store in a SQLite file or in PostgreSQL.

    The first use of a SQLite file creates the file and its tables. In PostgreSQL, create the tables with ``python -m
    kser.store upgrade``.

    :param uri: ``sqlite:///file.db`` or ``postgresql+psycopg://user@host/database``, in any form that SQLAlchemy
        accepts.
    :param synchronous: for SQLite: ``"FULL"`` or ``"NORMAL"``. ``"NORMAL"`` is faster, but a power failure can lose the
        last transactions.
    :param clock_offset: for tests: function that returns the number of seconds to add to the clock of the database.
    :raises kser.errors.SettingError: ``uri`` is not the address of a supported database.
    :raises kser.errors.MissingDependency: the driver is not installed.
    """

    def __init__(self, uri: str, *, synchronous: str = "FULL", clock_offset: Callable[[], float] = no_offset) -> None:
        self._database = database_at(uri, synchronous, clock_offset)
        self.name = self._database.name
        self._writer = BatchWriter(self._database)
        self._queries = Queries(self._database)
        self._search = OperationSearch(self._database)
        self._leases = Leases(self._database)
        self._due_steps = DueSteps(self._database, self._writer.inserts)
        self._lifecycle = Lifecycle(self._database, self._writer.inserts)
        self._checked = False
        self._lock = threading.Lock()

    def check(self) -> None:
        with self._lock:
            schema.check(self._database, create=isinstance(self._database, Sqlite))
            self._checked = True

    def save(self, operation: NewOperation, request: ClaimRequest | None = None) -> Claim | ClaimRefused | int:
        self._ensure_schema()
        return self._writer.write(SaveRequest(operation, request))

    def claim(self, uuid: str, step: str, request: ClaimRequest) -> Claim | ClaimRefused | None:
        self._ensure_schema()
        return self._writer.write(ClaimCommand(uuid, step, request))

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        self._ensure_schema()
        return self._writer.write(checkpoint)

    def get_operation(self, uuid: str) -> OperationRow | None:
        return self._read(self._queries.get_operation, uuid)

    def get_tasks(self, operation_id: int) -> Sequence[TaskRow]:
        return self._read(self._queries.get_tasks, operation_id)

    def get_task(self, operation_id: int, position: int) -> TaskRow | None:
        return self._read(self._queries.get_task, operation_id, position)

    def get_children(self, root_id: int) -> Sequence[OperationRow]:
        return self._read(self._queries.get_children, root_id)

    def snapshot(self, uuid: str) -> OperationSnapshot | None:
        return self._read_snapshot(self._queries.snapshot, uuid)

    def find(self, query: OperationQuery, limit: int, after: str | None = None) -> Page:
        return self._read_snapshot(self._search.find, query, limit, after)

    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        pairs = list(claims)
        renewed = self._write(self._leases.renew_unlocked, pairs, owner, lease)
        # In PostgreSQL, the statement has skipped locked rows, so try each claim that was not renewed again. In SQLite,
        # there is only one writer and no locked row, so a claim that was not renewed is lost.
        missing = [pair for pair in pairs if pair[0] not in renewed] if self._database.json_batches else []
        for pair in missing:
            renewed |= self._write(self._leases.renew, pair, owner, lease)
        return renewed

    def lease_renewer(self, timeout: float) -> LeaseRenewer:
        return SQLLeaseRenewer(self._database.own_connection(), self._leases, timeout)

    def get_topics(self) -> Sequence[str]:
        return self._read(self._due_steps.get_topics)

    def reserve_due_steps(self, query: TakeoverQuery, reservation: float) -> Sequence[DueStep]:
        found = self._read(self._due_steps.find_takeovers, query)
        return self._write(self._due_steps.reserve, found, query.limit, reservation) if found else []

    def reserve_step(self, row: OperationRow, reservation: float) -> DueStep | None:
        return self._write(self._due_steps.reserve_step, row, reservation)

    def return_reservations(self, steps: Iterable[DueStep]) -> None:
        self._write(self._due_steps.return_reservations, list(steps))

    def postpone_takeover(self, steps: Iterable[DueStep], wait: float) -> None:
        self._write(self._due_steps.postpone_takeover, list(steps), wait)

    def take_due_steps(
        self,
        limit: int,
        consumer: str,
        *,
        expired: bool,
        max_sends: int = MAX_SENDS,
        unknown_after: float = UNKNOWN_AFTER,
    ) -> Sequence[DueStep]:
        find = self._due_steps.find_sends
        found = self._read(find, limit, expired=expired, max_sends=max_sends, unknown_after=unknown_after)
        return self._write(self._due_steps.take, found, consumer) if found else []

    def mark_sent(self, steps: Iterable[tuple[int, int]], resend_after: float, lease: float) -> None:
        self._write(self._due_steps.mark_sent, list(steps), resend_after, lease)

    def postpone_send(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        self._write(self._due_steps.postpone_send, list(steps), wait)

    def refuse_class(self, uuid: str, step: str) -> OperationRow | None:
        return self._write(self._due_steps.refuse_class, uuid, step)

    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        return self._write(self._lifecycle.cancel, uuid, reason)

    def resume(self, uuid: str, epoch: int, token: str) -> OperationRow | None:
        return self._write(self._lifecycle.resume, uuid, epoch, token)

    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        return self._write(self._lifecycle.purge, older_than, status, limit)

    def close(self) -> None:
        self._database.close()

    def _ensure_schema(self) -> None:
        """Check the schema before the first use of the store.

        If the SQLite file is missing, the check first creates it with its tables. The check rejects incompatible
        tables.
        """
        if not self._checked:
            self.check()

    def _read(self, query: Callable[Concatenate[Transaction, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a query that executes only one statement."""
        self._ensure_schema()
        with self._database.read() as transaction:
            return query(transaction, *args, **kwargs)

    def _read_snapshot(self, query: Callable[Concatenate[Transaction, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a query whose statements must all see the same state."""
        self._ensure_schema()
        with self._database.read(snapshot=True) as transaction:
            return query(transaction, *args, **kwargs)

    def _write(self, change: Callable[Concatenate[Transaction, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a change in a transaction, and repeat the change after a conflict with another transaction."""
        self._ensure_schema()

        def run() -> R:
            with self._database.write() as transaction:
                return change(transaction, *args, **kwargs)

        return retry_on_conflict(run)


def database_at(uri: str, synchronous: str = "FULL", clock_offset: Callable[[], float] = no_offset) -> Database:
    """Return the database at an address, without connecting to it. The parameters are those of :class:`SQLStore`.

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
            return Sqlite(url.set(drivername="sqlite+pysqlite"), clock_offset, synchronous)
        if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
            return Postgresql(url.set(drivername="postgresql+psycopg"), clock_offset)
    except ImportError as error:
        raise MissingDependency(
            f'PostgreSQL needs psycopg ({error}); install it with: pip install "kser[postgresql]"'
        ) from error
    raise SettingError(f"kser supports databases like {EXAMPLES}, not {url.drivername}")
