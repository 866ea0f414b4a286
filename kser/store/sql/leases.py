"""The statements that renew leases, and the renewer that executes them on a connection of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Double, Text, bindparam

from kser import status as states
from kser.store.base import LeaseRenewer, Renewal
from kser.store.sql.database import Database, OwnConnection, Transaction
from kser.store.sql.schedule import lease_values
from kser.store.sql.statements import types_of
from kser.store.sql.tables import operation

Pairs = Iterable[tuple[int, int]]


class Leases:
    """The statements for leases.

    :param database: the database to write to.
    """

    def __init__(self, database: Database) -> None:
        own = operation.c
        row = database.source(types_of(operation, "id", "epoch"))
        lease = bindparam("lease", type_=Double)
        renewed = lease_values(database.now, bindparam("owner", type_=Text), lease, own.claim_count)
        claimed = (own.id == row["id"], own.epoch == row["epoch"], own.status == states.RUNNING)
        self._renew = database.statement(row.update(operation, renewed, *claimed).returning(own.id))
        self._renew_unlocked = database.statement(
            row.update_skip_locked(operation, renewed, *claimed).returning(own.id)
        )
        self._held = database.statement(row.select([own.id], operation, *claimed))

    def renew_unlocked(self, transaction: Transaction, claims: Pairs, owner: str, lease: float) -> set[int]:
        """Renew leases, except in rows that other transactions have locked, and return the ids of the renewed roots.

        If this transaction waited for locked rows, it could deadlock, because it already holds locks on the renewed
        rows.
        """
        return _ids(transaction.fetch(self._renew_unlocked, pair_rows(claims), owner=owner, lease=lease))

    def renew(self, transaction: Transaction, claim: tuple[int, int], owner: str, lease: float) -> set[int]:
        """Renew the lease of one claim, and return the id of its root, or an empty set if the claim is lost.

        If another transaction has locked the row of the root, the statement waits for the lock.
        """
        return _ids(transaction.fetch(self._renew, pair_rows([claim]), owner=owner, lease=lease))

    def held(self, transaction: Transaction, claims: Pairs) -> set[int]:
        """Return the ids of the roots whose claims are not lost. The statement does not wait for locked rows."""
        return _ids(transaction.fetch(self._held, pair_rows(claims)))


class SQLLeaseRenewer(LeaseRenewer):
    """A renewer of leases with a connection of its own.

    :param connection: the connection.
    :param leases: the statements.
    :param timeout: maximum duration of a call in seconds.
    """

    def __init__(self, connection: OwnConnection, leases: Leases, timeout: float) -> None:
        self._connection = connection
        self._leases = leases
        self._timeout = timeout

    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> Renewal:
        pairs = list(claims)
        if not pairs:
            return Renewal(set(), set())
        with self._connection.write(self._timeout) as transaction:
            renewed = self._leases.renew_unlocked(transaction, pairs, owner, lease)
            locked = self._leases.held(transaction, [pair for pair in pairs if pair[0] not in renewed])
        return Renewal(renewed | locked, locked)

    def close(self) -> None:
        self._connection.close()


def _ids(rows: Iterable[Any]) -> set[int]:
    return {root_id for (root_id,) in rows}


def pair_rows(pairs: Pairs) -> list[dict[str, int]]:
    """Return the row values for roots that are given as pairs ``(root_id, epoch)``."""
    # Sort the rows, because all transactions must lock rows in the same order; otherwise two transactions could
    # deadlock.
    return [{"id": root_id, "epoch": epoch} for root_id, epoch in sorted(pairs)]
