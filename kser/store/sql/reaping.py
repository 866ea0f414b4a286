"""Leases, due steps and sends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import BigInteger, Double, Integer, Text, bindparam, case, literal_column, or_, select

from kser import status as states
from kser.store.rows import EXPIRED, LONGEST_RESEND, RETRY, SENDING, UNCLAIMED, UNSENT, Due, Target
from kser.store.sql.adding import Adding, event_row
from kser.store.sql.database import Database, Transaction
from kser.store.sql.statements import Source, types_of
from kser.store.sql.tables import operation

Pairs = Iterable[tuple[int, int]]

#: Number of doublings after which the resend delay is ``MAX_RESEND_DELAY``; by then the doubled delay exceeds it.
DOUBLINGS = 20


class Reaping:
    """The statements for leases and due steps.

    :param database: the database to write to.
    :param adding: the insert statements of this database.
    """

    def __init__(self, database: Database, adding: Adding) -> None:
        self._adding = adding
        own = operation.c
        now = database.now
        row = database.source(types_of(operation, "id", "epoch"))
        renewed = {"owner": bindparam("owner", type_=Text), "wake_at": now + bindparam("lease", type_=Double)}
        mine = (*_same(row), own.status == states.RUNNING)
        self._renew = database.statement(row.update(operation, renewed, *mine).returning(own.id))
        self._renew_free = database.statement(row.update_free(operation, renewed, *mine).returning(own.id))
        unclaimed = (*_same(row), own.owner.is_(None), own.wake_at.is_not(None))
        later = bindparam("seconds", type_=Double)
        # The wait starts at due_at or now, whichever is later.
        begin = case((own.due_at > now, own.due_at), else_=now)
        doubled = later * literal_column("1").op("<<")(own.sends)
        wait = case((own.sends >= DOUBLINGS, LONGEST_RESEND), (doubled > LONGEST_RESEND, LONGEST_RESEND), else_=doubled)
        sent = {"sends": own.sends + 1, "sent_at": now, "wake_at": begin + wait}
        # Skip locked rows: the transaction that holds the lock is claiming the step, and sends of claimed steps are not
        # recorded.
        self._sent = database.statement(row.update_free(operation, sent, *unclaimed))
        self._unsent = database.statement(row.update(operation, {"wake_at": now + later}, *unclaimed))
        self._make_due(database)

    def _make_due(self, database: Database) -> None:
        own = operation.c
        now = database.now
        columns = (own.id, own.uuid, own.epoch, own.target_uuid, own.target_entrypoint, own.target_topic)
        more = (own.owner, own.sends, own.wake_at == own.due_at)
        expired = bindparam("expired", type_=Integer)
        due = select(*columns, *more).where(own.wake_at <= now, or_(own.owner.is_(None), expired == 1))
        due = due.order_by(own.wake_at).limit(bindparam("limit", type_=Integer)).with_for_update(skip_locked=True)
        self._due = database.statement(due)
        row = database.source({"id": BigInteger()})
        self._take = database.statement(
            row.update(operation, {"owner": None, "wake_at": now + SENDING}, own.id == row["id"])
        )

    def renew_free(self, transaction: Transaction, claims: Pairs, owner: str, lease: float) -> set[int]:
        """Renew leases, skipping rows that other transactions have locked.

        Waiting for them while holding locks on the renewed rows could deadlock.
        """
        return _ids(transaction.fetch(self._renew_free, _rows(claims), owner=owner, lease=lease))

    def renew(self, transaction: Transaction, claim: tuple[int, int], owner: str, lease: float) -> set[int]:
        """Renew the lease of one claim, if the claim exists; wait for its row if another transaction has locked it."""
        return _ids(transaction.fetch(self._renew, _rows([claim]), owner=owner, lease=lease))

    def sent(self, transaction: Transaction, steps: Pairs, resend_after: float) -> None:
        """See :meth:`kser.store.base.Store.mark_sent`."""
        transaction.change(self._sent, _rows(steps), seconds=resend_after)

    def unsent(self, transaction: Transaction, steps: Pairs, wait: float) -> None:
        """See :meth:`kser.store.base.Store.postpone_send`."""
        transaction.change(self._unsent, _rows(steps), seconds=wait)

    def take_due(self, transaction: Transaction, limit: int, consumer: str, *, expired: bool) -> Sequence[Due]:
        """See :meth:`kser.store.base.Store.take_due_steps`."""
        rows = transaction.run(self._due, {"limit": limit, "expired": int(expired)}).fetchall()
        found: list[Due] = []
        taken: list[dict[str, Any]] = []
        events: list[dict[str, Any]] = []
        for root_id, uuid, epoch, *target, owner, sends, is_retry in rows:
            unsent = RETRY if is_retry else UNSENT
            reason = EXPIRED if owner is not None else UNCLAIMED if sends else unsent
            found.append(Due(root_id, uuid, epoch, Target(*target), reason))
            taken.append({"id": root_id})
            events.append(event_row(root_id, "sent-again", epoch, consumer, text=reason))
        transaction.change(self._take, taken)
        transaction.change(self._adding.events, events)
        return found


def _ids(rows: Iterable[Any]) -> set[int]:
    return {root_id for (root_id,) in rows}


def _same(row: Source) -> tuple[Any, Any]:
    return operation.c.id == row["id"], operation.c.epoch == row["epoch"]


def _rows(pairs: Pairs) -> list[dict[str, int]]:
    # All transactions lock rows in the same order; otherwise two of them could deadlock.
    return [{"id": root_id, "epoch": epoch} for root_id, epoch in sorted(pairs)]
