"""The statements that renew leases, reserve due steps, and mark steps as sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import BigInteger, Double, Integer, Text, bindparam, case, literal_column, or_, select

from kser import status as states
from kser.store.model import MAX_RESEND_DELAY, SEND_GRACE, DueStep, StepMessage
from kser.store.sql.database import Database, Transaction
from kser.store.sql.inserts import Inserts, event_row
from kser.store.sql.statements import RowSource, types_of
from kser.store.sql.tables import operation
from kser.store.transitions import due_reason

Pairs = Iterable[tuple[int, int]]

#: From this number of sends on, the resend delay is always ``MAX_RESEND_DELAY``. The delay doubles with each send, so
#: after 20 sends even a first delay of 10 ms exceeds this maximum.
MAX_DOUBLINGS = 20


class Leases:
    """The statements for leases and due steps.

    :param database: the database to write to.
    :param inserts: the insert statements of this database.
    """

    def __init__(self, database: Database, inserts: Inserts) -> None:
        self._inserts = inserts
        own = operation.c
        now = database.now
        row = database.source(types_of(operation, "id", "epoch"))
        renewed = {"owner": bindparam("owner", type_=Text), "next_check_at": now + bindparam("lease", type_=Double)}
        claimed = (*_same_claim(row), own.status == states.RUNNING)
        self._renew = database.statement(row.update(operation, renewed, *claimed).returning(own.id))
        self._renew_unlocked = database.statement(
            row.update_skip_locked(operation, renewed, *claimed).returning(own.id)
        )
        unclaimed = (*_same_claim(row), own.owner.is_(None), own.next_check_at.is_not(None))
        seconds = bindparam("seconds", type_=Double)
        # The wait for the next check starts at due_at or now, whichever is later.
        start = case((own.due_at > now, own.due_at), else_=now)
        doubled = seconds * literal_column("1").op("<<")(own.send_count)
        wait = case(
            (own.send_count >= MAX_DOUBLINGS, MAX_RESEND_DELAY),
            (doubled > MAX_RESEND_DELAY, MAX_RESEND_DELAY),
            else_=doubled,
        )
        sent = {"send_count": own.send_count + 1, "sent_at": now, "next_check_at": start + wait}
        # Skip locked rows: the transaction that holds the lock is claiming the root, and the store does not record
        # sends for claimed roots.
        self._mark_sent = database.statement(row.update_skip_locked(operation, sent, *unclaimed))
        self._postpone_send = database.statement(row.update(operation, {"next_check_at": now + seconds}, *unclaimed))
        self._prepare_due(database)

    def _prepare_due(self, database: Database) -> None:
        own = operation.c
        now = database.now
        columns = (own.id, own.uuid, own.epoch, own.target_uuid, own.target_entrypoint, own.target_topic)
        more = (own.owner, own.send_count, own.next_check_at == own.due_at)
        expired = bindparam("expired", type_=Integer)
        due = select(*columns, *more).where(own.next_check_at <= now, or_(own.owner.is_(None), expired == 1))
        due = due.order_by(own.next_check_at).limit(bindparam("limit", type_=Integer)).with_for_update(skip_locked=True)
        self._due = database.statement(due)
        row = database.source({"id": BigInteger()})
        self._mark_taken = database.statement(
            row.update(operation, {"owner": None, "next_check_at": now + SEND_GRACE}, own.id == row["id"])
        )

    def renew_unlocked(self, transaction: Transaction, claims: Pairs, owner: str, lease: float) -> set[int]:
        """Renew leases, except in rows that other transactions have locked, and return the ids of the renewed roots.

        If this transaction waited for locked rows, it could deadlock, because it already holds locks on the renewed
        rows.
        """
        return _ids(transaction.fetch(self._renew_unlocked, _rows(claims), owner=owner, lease=lease))

    def renew(self, transaction: Transaction, claim: tuple[int, int], owner: str, lease: float) -> set[int]:
        """Renew the lease of one claim, and return the id of its root, or an empty set if the claim is lost.

        If another transaction has locked the row of the root, the statement waits for the lock.
        """
        return _ids(transaction.fetch(self._renew, _rows([claim]), owner=owner, lease=lease))

    def mark_sent(self, transaction: Transaction, steps: Pairs, resend_after: float) -> None:
        """See :meth:`kser.store.base.Store.mark_sent`."""
        transaction.execute_many(self._mark_sent, _rows(steps), seconds=resend_after)

    def postpone_send(self, transaction: Transaction, steps: Pairs, wait: float) -> None:
        """See :meth:`kser.store.base.Store.postpone_send`."""
        transaction.execute_many(self._postpone_send, _rows(steps), seconds=wait)

    def take_due_steps(
        self, transaction: Transaction, limit: int, consumer: str, *, expired: bool
    ) -> Sequence[DueStep]:
        """See :meth:`kser.store.base.Store.take_due_steps`."""
        rows = transaction.execute(self._due, {"limit": limit, "expired": int(expired)}).fetchall()
        steps: list[DueStep] = []
        taken: list[dict[str, Any]] = []
        events: list[dict[str, Any]] = []
        for root_id, uuid, epoch, *target, owner, send_count, is_retry in rows:
            reason = due_reason(owner, send_count, is_retry=bool(is_retry))
            steps.append(DueStep(id=root_id, uuid=uuid, epoch=epoch, target=StepMessage(*target), reason=reason))
            taken.append({"id": root_id})
            events.append(event_row(root_id, "sent-again", epoch, consumer, text=reason))
        transaction.execute_many(self._mark_taken, taken)
        transaction.execute_many(self._inserts.events, events)
        return steps


def _ids(rows: Iterable[Any]) -> set[int]:
    return {root_id for (root_id,) in rows}


def _same_claim(row: RowSource) -> tuple[Any, Any]:
    return operation.c.id == row["id"], operation.c.epoch == row["epoch"]


def _rows(pairs: Pairs) -> list[dict[str, int]]:
    # Sort the rows, because all transactions must lock rows in the same order; otherwise two transactions could
    # deadlock.
    return [{"id": root_id, "epoch": epoch} for root_id, epoch in sorted(pairs)]
