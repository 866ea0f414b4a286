"""The statements that find due steps, reserve these for takeovers and sends, and record what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ARRAY,
    JSON,
    Double,
    Integer,
    Text,
    all_,
    and_,
    any_,
    bindparam,
    case,
    cast,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
)

from kser.store.model import SEND_DELAY, SEND_GRACE, DueReason, DueStep, OperationRow, StepMessage, TakeoverQuery
from kser.store.sql.database import Database, Transaction
from kser.store.sql.inserts import Inserts, event_row
from kser.store.sql.leases import Pairs, pair_rows
from kser.store.sql.schedule import may_be_sent, resend_delay
from kser.store.sql.statements import ONE, types_of
from kser.store.sql.tables import OPERATION_COLUMNS, operation, operation_row
from kser.store.transitions import apply_refusal

#: Maximum number of due steps of a topic that a search for takeovers reads. If the caller knows none of their classes,
#: consumers send their messages within seconds, and a later search reads other steps.
SCAN_LIMIT: Final = 1000

#: A search for takeovers reads this many times the steps that the caller wants. If several consumers search at the same
#: moment, each of them then finds steps that the others have not reserved.
OVERREAD: Final = 8

#: The values of the column ``urgent``.
_URGENT: Final = 1
_NOT_URGENT: Final = 0


class FoundStep(NamedTuple):
    """A due step as it was read, before it is reserved."""

    id: int
    uuid: str
    epoch: int
    target: StepMessage
    reason: str
    take_at: float
    send_at: float


class DueSteps:
    """The statements for due steps.

    :param database: the database to read from and write to.
    :param inserts: the insert statements of this database.
    """

    def __init__(self, database: Database, inserts: Inserts) -> None:
        self._database = database
        self._inserts = inserts
        self._prepare_topics(database)
        self._prepare_looks(database)
        self._prepare_reservations(database)
        self._prepare_sends(database)
        self._prepare_refusals(database)

    # -- looks ---------------------------------------------------------------------------------------------------------

    def _prepare_topics(self, database: Database) -> None:
        # Both databases read all rows for DISTINCT. This recursive query reads one index entry per topic instead.
        own = operation.c
        first = select(own.target_topic).where(own.take_at.is_not(None)).order_by(own.target_topic).limit(1)
        # SQLite searches the index for the first topic only if there is a condition on the topic.
        lowest = first.where(own.target_topic >= literal_column("''")).scalar_subquery()
        topics = select(lowest.label("topic")).cte("topics", recursive=True)
        following = first.where(own.target_topic > topics.c.topic).correlate(topics).scalar_subquery()
        topics = topics.union_all(select(following).where(topics.c.topic.is_not(None)))
        self._topics = database.statement(select(topics.c.topic).where(topics.c.topic.is_not(None)))

    def _prepare_looks(self, database: Database) -> None:
        own, now = operation.c, database.now
        expired = or_(own.owner.is_(None), bindparam("expired", type_=Integer) == 1)
        limit = bindparam("limit", type_=Integer)
        row = database.source({"topic": Text(), "urgent": Integer()})
        columns = [own[name] for name in _COLUMNS]
        due = select(*columns).where(own.target_topic == row["topic"], own.urgent == row["urgent"], own.take_at <= now)
        fails = and_(
            own.refusal_count >= bindparam("max_sends", type_=Integer),
            own.refused_since + bindparam("unknown_after", type_=Double) <= now,
        )
        sends = due.add_columns(case((fails, 1), else_=0).label("fails")).where(own.send_at <= now, expired)
        self._sends = database.statement(row.select_each(sends.order_by(own.take_at).limit(limit)))
        more = due.add_columns(own.owner, own.current_entrypoints).order_by(own.take_at).limit(SCAN_LIMIT)
        some = row.subquery_of(more, "some").c
        takeovers = (
            select(*(some[name] for name in _COLUMNS))
            .where(
                or_(some.owner.is_(None), bindparam("expired", type_=Integer) == 1),
                some.take_at + bindparam("overdue", type_=Double) <= now,
                self._is_known(some.target_entrypoint),
                ~self._has_unknown(some.current_entrypoints),
            )
            # Without ORDER BY, because the databases read the subquery in its order, and stop at the limit.
            .limit(limit)
        )
        self._takeovers = database.statement(row.select_each(takeovers))

    def _is_known(self, entrypoint: Any) -> Any:
        """Return the condition that the bind parameter ``known`` contains a class."""
        if self._database.json_batches:
            return entrypoint == any_(bindparam("known", type_=ARRAY(Text)))
        return entrypoint.in_(select(func.json_each(bindparam("known", type_=Text)).table_valued("value").c.value))

    def _has_unknown(self, entrypoints: Any) -> Any:
        """Return the condition that a JSON list contains a class that the bind parameter ``known`` does not."""
        # Do not negate the condition that a class is known: SQLAlchemy 2.0.0 turns NOT = ANY into != ANY.
        if self._database.json_batches:
            listed = func.json_array_elements_text(cast(entrypoints, JSON)).table_valued("value")
            is_unknown = listed.c.value != all_(bindparam("known", type_=ARRAY(Text)))
        else:
            listed = func.json_each(entrypoints).table_valued("value")
            known = select(func.json_each(bindparam("known", type_=Text)).table_valued("value").c.value)
            is_unknown = listed.c.value.not_in(known)
        return exists(select(ONE).select_from(listed).where(is_unknown))

    def get_topics(self, transaction: Transaction) -> Sequence[str]:
        """See :meth:`kser.store.base.StepSchedule.get_topics`."""
        return sorted(topic for (topic,) in transaction.execute(self._topics).fetchall())

    def find_takeovers(self, transaction: Transaction, query: TakeoverQuery) -> Sequence[FoundStep]:
        """Return at most ``OVERREAD`` times as many due steps as a query wants, the longest due first."""
        limit = query.limit * OVERREAD
        names = list(query.known) if self._database.json_batches else json.dumps(list(query.known))
        values = {"limit": limit, "expired": int(query.expired), "known": names, "overdue": query.overdue}
        rows = transaction.fetch(self._takeovers, _ranges(query.topics, only_urgent=query.only_urgent), **values)
        return sorted((_found(row) for row in rows), key=_take_at)[:limit]

    def find_sends(
        self, transaction: Transaction, limit: int, *, expired: bool, max_sends: int, unknown_after: float
    ) -> Sequence[FoundStep]:
        """Return due steps to send, the longest due first; see :meth:`kser.store.base.StepSchedule`."""
        values = {"limit": limit, "expired": int(expired), "max_sends": max_sends, "unknown_after": unknown_after}
        ranges = _ranges(self.get_topics(transaction), only_urgent=False)
        rows = transaction.fetch(self._sends, ranges, **values)
        found = [_found(row)._replace(reason=DueReason.UNKNOWN_CLASS) if fails else _found(row) for *row, fails in rows]
        return sorted(found, key=_take_at)[:limit]

    # -- reservations --------------------------------------------------------------------------------------------------

    def _prepare_reservations(self, database: Database) -> None:
        own, now = operation.c, database.now
        row = database.source(types_of(operation, "id", "epoch", "take_at"))
        # Compare with ``take_at`` as it was read: then no other consumer has reserved the step since, and no owner has
        # renewed its lease.
        unchanged = (own.id == row["id"], own.epoch == row["epoch"], own.take_at == row["take_at"])
        reserved = {"take_at": now + bindparam("reservation", type_=Double)}
        # Skip locked rows: the transaction that holds the lock is about to change the step.
        self._reserve = database.statement(
            row.update_skip_locked(operation, reserved, *unchanged).returning(own.id, own.take_at)
        )
        self._return = database.statement(row.update_skip_locked(operation, {"take_at": now}, *unchanged))
        take_at = now + resend_delay(bindparam("seconds", type_=Double))
        failed = {
            "send_count": own.send_count + 1,
            "take_at": take_at,
            "send_at": take_at + SEND_DELAY,
            "due_reason": DueReason.UNCLAIMED,
        }
        self._postpone_takeover = database.statement(row.update_skip_locked(operation, failed, *unchanged))

    def reserve(
        self, transaction: Transaction, found: Sequence[FoundStep], limit: int, reservation: float
    ) -> Sequence[DueStep]:
        """Reserve at most ``limit`` of the steps that have not changed since they were read, and return these."""
        steps: list[DueStep] = []
        while found and len(steps) < limit:
            missing = limit - len(steps)
            first, found = found[:missing], found[missing:]
            rows = transaction.fetch(self._reserve, _reserved_rows(first), reservation=reservation)
            ends = dict(tuple(row) for row in rows)
            steps += (_due_step(step, ends[step.id]) for step in first if step.id in ends)
        return steps

    def reserve_step(self, transaction: Transaction, row: OperationRow, reservation: float) -> DueStep | None:
        """See :meth:`kser.store.base.StepSchedule.reserve_step`."""
        assert row.take_at is not None and row.send_at is not None and row.due_reason is not None
        step = FoundStep(row.id, row.uuid, row.epoch, row.target, row.due_reason, row.take_at, row.send_at)
        return next(iter(self.reserve(transaction, [step], 1, reservation)), None)

    def return_reservations(self, transaction: Transaction, steps: Sequence[DueStep]) -> None:
        """See :meth:`kser.store.base.StepSchedule.return_reservations`."""
        transaction.execute_many(self._return, _reserved_rows(steps))

    def postpone_takeover(self, transaction: Transaction, steps: Sequence[DueStep], wait: float) -> None:
        """See :meth:`kser.store.base.StepSchedule.postpone_takeover`."""
        transaction.execute_many(self._postpone_takeover, _reserved_rows(steps), seconds=wait)

    # -- sends ---------------------------------------------------------------------------------------------------------

    def _prepare_sends(self, database: Database) -> None:
        own, now = operation.c, database.now
        row = database.source(types_of(operation, "id", "epoch", "take_at", "send_at"))
        unchanged = [own[name] == row[name] for name in ("id", "epoch", "take_at", "send_at")]
        self._take = database.statement(
            row.update_skip_locked(operation, {"send_at": now + SEND_GRACE}, *unchanged).returning(own.id)
        )
        row = database.source(types_of(operation, "id", "epoch"))
        unclaimed = (own.id == row["id"], own.epoch == row["epoch"], may_be_sent(now))
        seconds = bindparam("seconds", type_=Double)
        # The delays start at due_at or now, whichever is later.
        start = case((own.due_at > now, own.due_at), else_=now)
        first = case((own.epoch == 0, seconds), else_=bindparam("first", type_=Double))
        # A step that is already due stays due: its message may wait in the partition of a dead consumer.
        is_due = own.take_at <= now
        sent = {
            "send_count": own.send_count + 1,
            "sent_at": now,
            "take_at": case((is_due, own.take_at), else_=start + resend_delay(first)),
            "send_at": start + resend_delay(seconds),
            "due_reason": case((is_due, own.due_reason), else_=literal(DueReason.UNCLAIMED, Text)),
        }
        # Skip locked rows: the transaction that holds the lock is claiming the root, and the store does not record
        # sends for claimed roots.
        self._mark_sent = database.statement(row.update_skip_locked(operation, sent, *unclaimed))
        self._postpone_send = database.statement(row.update(operation, {"send_at": now + seconds}, *unclaimed))

    def take(self, transaction: Transaction, found: Sequence[FoundStep], consumer: str) -> Sequence[DueStep]:
        """Take the steps to send that have not changed since they were read, and return these."""
        send_at = {step.id: step.send_at for step in found}
        rows = [{**row, "send_at": send_at[row["id"]]} for row in _reserved_rows(found)]
        taken = {root_id for (root_id,) in transaction.fetch(self._take, rows)}
        steps = [_due_step(step, step.take_at) for step in found if step.id in taken]
        events = [
            event_row(step.id, "sent-again", step.epoch, consumer, text=step.reason)
            for step in steps
            if step.reason != DueReason.UNKNOWN_CLASS
        ]
        transaction.execute_many(self._inserts.events, events)
        return steps

    def mark_sent(self, transaction: Transaction, steps: Pairs, resend_after: float, lease: float) -> None:
        """See :meth:`kser.store.base.StepSchedule.mark_sent`."""
        first = min(lease, resend_after)
        transaction.execute_many(self._mark_sent, pair_rows(steps), seconds=resend_after, first=first)

    def postpone_send(self, transaction: Transaction, steps: Pairs, wait: float) -> None:
        """See :meth:`kser.store.base.StepSchedule.postpone_send`."""
        transaction.execute_many(self._postpone_send, pair_rows(steps), seconds=wait)

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _prepare_refusals(self, database: Database) -> None:
        own = operation.c
        uuid = bindparam("uuid", type_=Text)
        locked = select(*OPERATION_COLUMNS, database.now).where(own.uuid == uuid, own.parent_id.is_(None))
        self._lock = database.statement(locked.with_for_update())
        row = database.source(types_of(operation, "id", "refusal_count", "refused_since"))
        values = {name: row[name] for name in ("refusal_count", "refused_since")}
        self._refuse = database.statement(row.update(operation, values, own.id == row["id"]))

    def refuse_class(self, transaction: Transaction, uuid: str, step: str) -> OperationRow | None:
        """See :meth:`kser.store.base.StepSchedule.refuse_class`."""
        locked = transaction.execute(self._lock, {"uuid": uuid}).fetchone()
        if locked is None:
            return None
        before = operation_row(locked)
        row = apply_refusal(before, step, locked[-1])
        if row != before:
            values = {"id": row.id, "refusal_count": row.refusal_count, "refused_since": row.refused_since}
            transaction.execute_many(self._refuse, [values])
        return row


_COLUMNS: Final = (
    *("id", "uuid", "epoch", "target_uuid", "target_entrypoint", "target_topic"),
    *("due_reason", "take_at", "send_at"),
)


def _ranges(topics: Iterable[str], *, only_urgent: bool) -> list[dict[str, Any]]:
    """Return the row values that name the ranges of the index on due steps to read."""
    urgencies = (_URGENT,) if only_urgent else (_URGENT, _NOT_URGENT)
    return [{"topic": topic, "urgent": urgent} for topic in topics for urgent in urgencies]


def _found(row: Sequence[Any]) -> FoundStep:
    root_id, uuid, epoch, target_uuid, target_entrypoint, target_topic, *rest = row
    return FoundStep(root_id, uuid, epoch, StepMessage(target_uuid, target_entrypoint, target_topic), *rest)


def _take_at(step: FoundStep) -> float:
    return step.take_at


def _due_step(step: FoundStep, take_at: float) -> DueStep:
    return DueStep(
        id=step.id, uuid=step.uuid, epoch=step.epoch, target=step.target, reason=step.reason, take_at=take_at
    )


def _reserved_rows(steps: Iterable[FoundStep | DueStep]) -> list[dict[str, Any]]:
    # Sort the rows, because all transactions must lock rows in the same order; otherwise two transactions could
    # deadlock.
    in_order = sorted(steps, key=lambda step: step.id)
    return [{"id": step.id, "epoch": step.epoch, "take_at": step.take_at} for step in in_order]
