"""The life cycle of whole operations: cancel, resume and purge."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Text, bindparam, func, or_, select, update

from kser import status as states
from kser.store.model import SEND_DELAY, DueReason, Mode, OperationRow, Phase, StepMessage, TaskRow
from kser.store.sql.database import Database, Transaction
from kser.store.sql.ids import id_at
from kser.store.sql.inserts import Inserts, event_row, without_nul
from kser.store.sql.statements import types_of
from kser.store.sql.tables import OPERATION_COLUMNS, TASK_COLUMNS, attempt, event, label, operation, operation_row, task
from kser.store.transitions import entrypoints_json, is_resumed


class Lifecycle:
    """The statements that cancel, resume and purge operations.

    :param database: the database to write to.
    :param inserts: the insert statements of this database.
    """

    def __init__(self, database: Database, inserts: Inserts) -> None:
        self._inserts = inserts
        own = operation.c
        locked = select(*OPERATION_COLUMNS, own.lease_until > database.now)
        self._lock = database.statement(
            locked.where(own.uuid == bindparam("uuid", type_=Text), own.parent_id.is_(None)).with_for_update()
        )
        self._by_id = database.statement(select(*OPERATION_COLUMNS).where(own.id == bindparam("key")))
        self._prepare_cancel(database)
        self._make_resume(database)
        self._prepare_purge(database)

    def _prepare_cancel(self, database: Database) -> None:
        own = operation.c
        now = database.now
        this = update(operation).where(own.id == bindparam("key"))
        reason = bindparam("reason", type_=Text)
        self._request = database.statement(this.values(cancel_requested=True, cancel_reason=reason))
        ended: dict[str, Any] = {"status": states.CANCELLED, "ended_at": now, "result": own.accumulated}
        released = {
            "epoch": own.epoch + 1,
            "owner": None,
            "token": None,
            "lease_until": None,
            "take_at": None,
            "send_at": None,
            "due_reason": None,
            "cancel_reason": reason,
        }
        self._cancel = database.statement(this.values({**ended, **released}))
        children = update(operation).where(
            own.root_id == bindparam("key"),
            own.parent_id.is_not(None),
            or_(own.status == states.PENDING, own.status == states.RUNNING),
        )
        self._cancel_children = database.statement(children.values(ended))

    def _make_resume(self, database: Database) -> None:
        own = operation.c
        now = database.now
        this = update(operation).where(own.id == bindparam("key"))
        token = bindparam("token", type_=Text)
        free: dict[str, Any] = {"epoch": own.epoch + 1, "owner": None, "token": token, "cancel_requested": False}
        free |= {"cancel_reason": None, "claim_count": 0, "send_count": 0, "sent_at": None}
        free |= {"refusal_count": 0, "refused_since": None, "lease_until": None}
        free |= {"due_at": now, "take_at": now, "send_at": now + SEND_DELAY, "due_reason": DueReason.RESUMED}
        free |= {"current_entrypoints": bindparam("entrypoints", type_=Text)}
        free |= {name: func.coalesce(bindparam(name, type_=Text), own[name]) for name in TARGET}
        self._release = database.statement(this.values(free))
        again = {"status": states.RUNNING, "result": None, "ended_at": None}
        self._run_again = database.statement(
            this.values({**again, "phase": bindparam("next_phase", type_=Text), "step": bindparam("next_step")})
        )
        first = select(*TASK_COLUMNS).where(task.c.operation_id == bindparam("key"), task.c.status != states.SUCCESS)
        self._first = database.statement(first.order_by(task.c.position).limit(1))
        place = (task.c.operation_id == bindparam("key"), task.c.position == bindparam("at"))
        self._task = database.statement(select(*TASK_COLUMNS).where(*place))
        pending = {"status": states.PENDING, "result": None, "attempts_before_resume": task.c.attempts}
        self._pending = database.statement(update(task).where(*place).values(pending))

    def _prepare_purge(self, database: Database) -> None:
        own = operation.c
        old = select(own.id).where(
            own.status == bindparam("status", type_=Text),
            own.parent_id.is_(None),
            # An operation that ended before a point in time was also created before this point. Ids increase with the
            # time of creation, so this condition on the id limits the range that the database reads from the index on
            # status and id.
            own.id < bindparam("before"),
            own.ended_at < database.now - bindparam("seconds"),
        )
        old = old.order_by(own.id).limit(bindparam("limit")).with_for_update(skip_locked=True)
        self._expired = database.statement(old)
        row = database.source(types_of(operation, "root_id"))
        children = row.select([own.id], operation, own.root_id == row["root_id"], own.parent_id.is_not(None))
        self._children = database.statement(children)
        self._deletions = [
            database.statement(row.delete(table, table.c[name] == row["root_id"]))
            for table, name in ((task, "operation_id"), (attempt, "operation_id"), (label, "operation_id"))
        ]
        self._delete_operation = database.statement(row.delete(operation, own.id == row["root_id"]))
        self._delete_events = database.statement(row.delete(event, event.c.root_id == row["root_id"]))

    # -- cancel --------------------------------------------------------------------------------------------------------

    def cancel(self, transaction: Transaction, uuid: str, reason: str | None) -> OperationRow | None:
        """See :meth:`kser.store.base.Store.cancel`."""
        locked = transaction.execute(self._lock, {"uuid": uuid}).fetchone()
        if locked is None:
            return None
        row = operation_row(locked)
        if states.is_final(row.status):
            return row
        values = {"key": row.id, "reason": without_nul(reason)}
        if row.owner is not None and locked[-1]:
            if row.cancel_requested:
                return row
            transaction.execute(self._request, values)
            events = [event_row(row.id, "cancel-requested", row.epoch, None, text=reason)]
        else:
            transaction.execute(self._cancel, values)
            transaction.execute(self._cancel_children, {"key": row.id})
            events = [event_row(row.id, "ended", row.epoch, None, text=states.CANCELLED)]
        transaction.execute_many(self._inserts.events, events)
        return self._row(transaction, row.id)

    def _row(self, transaction: Transaction, identifier: int) -> OperationRow:
        return operation_row(transaction.execute(self._by_id, {"key": identifier}).fetchone())

    # -- resume --------------------------------------------------------------------------------------------------------

    def resume(self, transaction: Transaction, uuid: str, epoch: int, token: str) -> OperationRow | None:
        """See :meth:`kser.store.base.Store.resume`."""
        found = transaction.execute(self._lock, {"uuid": uuid}).fetchone()
        if found is None:
            return None
        root = operation_row(found)
        if is_resumed(root, epoch, token):
            return root
        target = self._resume_task(transaction, root)
        is_distributed = root.mode == Mode.DISTRIBUTED
        values = target if is_distributed else (None, None, None)
        paths = [] if is_distributed else self._current_entrypoints(transaction, root.id)
        own = {"key": root.id, "token": token, "entrypoints": entrypoints_json(paths)}
        transaction.execute(self._release, {**own, **dict(zip(TARGET, values, strict=True))})
        transaction.execute_many(self._inserts.events, [event_row(root.id, "resumed", root.epoch + 1, None)])
        return self._row(transaction, root.id)

    def _current_entrypoints(self, transaction: Transaction, root_id: int) -> list[str]:
        paths: list[str] = []
        child: int | None = root_id
        while child is not None and (row := self._row(transaction, child)).phase == Phase.RUN_TASK:
            current = TaskRow(*transaction.execute(self._task, {"key": row.id, "at": row.step}).fetchone())
            paths.append(current.entrypoint)
            child = current.child_id
        return paths

    def _resume_task(self, transaction: Transaction, row: OperationRow) -> StepMessage:
        """Move the position of an operation to its first task whose status is not SUCCESS.

        If this task is a nested operation that has started, do the same in the nested operation.

        :return: the message of the step to run.
        """
        while True:
            first = transaction.execute(self._first, {"key": row.id}).fetchone()
            if first is None:
                phase, step = (Phase.BUILD, row.step) if row.task_count is None else (Phase.END_SUCCESS, row.task_count)
                transaction.execute(self._run_again, {"key": row.id, "next_phase": phase, "next_step": step})
                return StepMessage(row.uuid, row.entrypoint, row.topic)
            current = TaskRow(*first)
            transaction.execute(
                self._run_again, {"key": row.id, "next_phase": Phase.RUN_TASK, "next_step": current.position}
            )
            transaction.execute(self._pending, {"key": row.id, "at": current.position})
            child = None if current.child_id is None else self._row(transaction, current.child_id)
            if child is None or child.started_at is None:
                return StepMessage(current.uuid, current.entrypoint, current.topic)
            row = child

    # -- purge ---------------------------------------------------------------------------------------------------------

    def purge(self, transaction: Transaction, older_than: float, status: Collection[str], limit: int) -> int:
        """See :meth:`kser.store.base.Store.purge`."""
        before = id_at(transaction.time - older_than)
        roots: list[dict[str, int]] = []
        for final in sorted(set(status)):
            values = {"status": final, "before": before, "seconds": older_than, "limit": limit - len(roots)}
            roots += ({"root_id": root_id} for (root_id,) in transaction.execute(self._expired, values).fetchall())
        every = [*roots, *({"root_id": child_id} for (child_id,) in transaction.fetch(self._children, roots))]
        for deletion in (*self._deletions, self._delete_operation):
            transaction.execute_many(deletion, every)
        transaction.execute_many(self._delete_events, roots)
        return len(roots)


TARGET = ("target_uuid", "target_entrypoint", "target_topic")
