"""The insert statements for new operations and events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Double, Integer, case, literal

from kser import status as states
from kser.store.model import (
    RESEND_UNSENT_AFTER,
    SEND_DELAY,
    ClaimRequest,
    DueReason,
    NewOperation,
    NewTask,
)
from kser.store.sql.database import Database, Transaction
from kser.store.sql.ids import time_of
from kser.store.sql.statements import ROWS, types_of
from kser.store.sql.tables import event, label, label_row, operation, task
from kser.store.transitions import first_entrypoints

#: Types of the values that the insert statement of an operation needs besides the columns of the table: the length of
#: the lease, the seconds until ``take_at``, the seconds from then until ``send_at``, and ``started``, which is 1 if the
#: operation is claimed.
_EXTRA_TYPES: Final = {"lease": Double(), "take_after": Double(), "send_delay": Double(), "started": Integer()}

#: Columns that have the same value in the row of every new operation.
_CONSTANTS: Final[Mapping[str, Any]] = {"cancel_requested": False, "send_count": 0, "refusal_count": 0}

#: Columns whose values the insert statement computes, or that are NULL in the row of every new operation.
_COMPUTED: Final = (
    *("started_at", "ended_at", "lease_until", "take_at", "send_at", "due_at", "sent_at", "refused_since"),
    *("result", "cancel_reason", "urgent"),
)


class Inserts:
    """The compiled insert statements.

    :param database: the database to write to.
    """

    def __init__(self, database: Database) -> None:
        self.operations = database.statement(insert_operations(database))
        self.tasks = database.statement(insert_tasks(database))
        self.labels = database.statement(insert_labels(database))
        self.events = database.statement(insert_events(database))

    def insert(self, transaction: Transaction, rows: InsertRows) -> None:
        """Insert operations with their tasks and labels."""
        transaction.execute_many(self.operations, rows.operations)
        transaction.execute_many(self.tasks, rows.tasks)
        transaction.execute_many(self.labels, rows.labels)


def insert_operations(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts operations."""
    now = database.now
    types = types_of(operation)
    for name in (*_CONSTANTS, *_COMPUTED):
        del types[name]
    row = database.source({**types, **_EXTRA_TYPES}, rows)
    values = {name: row[name] for name in types}
    values |= {name: literal(value) for name, value in _CONSTANTS.items()}
    values |= {
        "started_at": case((row["started"] == 1, now), else_=None),
        "lease_until": now + row["lease"],
        "take_at": now + row["take_after"],
        "send_at": now + row["take_after"] + row["send_delay"],
        "due_at": now,
    }
    return row.insert(operation, values)


def insert_tasks(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts tasks."""
    return _insert_whole_rows(database, task, rows)


def insert_labels(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts labels."""
    return _insert_whole_rows(database, label, rows)


def insert_events(database: Database, rows: str = ROWS) -> Any:
    """Return a statement that inserts events."""
    types = types_of(event, "root_id", "kind", "epoch", "consumer", "uuid", "text")
    row = database.source(types, rows)
    return row.insert(event, {**{name: row[name] for name in types}, "at": database.now})


def _insert_whole_rows(database: Database, table: Any, rows: str) -> Any:
    types = types_of(table)
    row = database.source(types, rows)
    return row.insert(table, {name: row[name] for name in types})


def event_row(
    root_id: int, kind: str, epoch: int, consumer: str | None, *, uuid: str | None = None, text: str | None = None
) -> dict[str, Any]:
    """Return the row values of a new event."""
    return {
        "root_id": root_id,
        "kind": kind,
        "epoch": epoch,
        "consumer": consumer,
        "uuid": uuid,
        "text": without_nul(text),
    }


def without_nul(text: str | None) -> str | None:
    """Replace the characters that a database rejects (NUL and lone surrogates) in a text, and return the text.

    :param text: a text from a user or from an exception.
    """
    if text is None:
        return None
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


class InsertRows:
    """The row values to insert for new operations, and for the operations nested in them."""

    def __init__(self) -> None:
        self.operations: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []

    def add_root(self, new: NewOperation, first_id: int, request: ClaimRequest | None) -> None:
        """Add the row values of a new root, which is already claimed if ``request`` is given.

        :param first_id: the first of the consecutive ids that are reserved for the root and its nested operations;
            :func:`count` returns the number of these ids.
        """
        if request is None:
            root = {**_UNSENT_DEFAULTS}
        else:
            root = {**_CLAIMED_DEFAULTS, "owner": request.owner, "token": request.token}
            root["lease"] = root["take_after"] = request.lease
        root["current_entrypoints"] = first_entrypoints(new)
        self._add(new, iter(range(first_id, first_id + count(new))), None, first_id, root)

    def add_tasks(self, tasks: Sequence[NewTask], operation_id: int, root_id: int, ids: Iterator[int]) -> None:
        """Add the row values of an operation's tasks, and of the operations among these tasks, at any depth."""
        for position, new in enumerate(tasks):
            child = None if new.child is None else self._add(new.child, ids, operation_id, root_id, CHILD_DEFAULTS)
            self.tasks.append(
                {
                    "operation_id": operation_id,
                    "position": position,
                    "uuid": new.uuid,
                    "entrypoint": new.entrypoint,
                    "topic": new.topic,
                    "status": new.status,
                    "attempts": 0,
                    "attempts_before_resume": 0,
                    "child_id": child,
                    "params": new.params,
                    "metadata": new.metadata,
                    "result": new.result,
                }
            )

    def _add(
        self, new: NewOperation, ids: Iterator[int], parent_id: int | None, root_id: int, own: Mapping[str, Any]
    ) -> int:
        identifier = next(ids)
        self.operations.append(
            {
                "id": identifier,
                "uuid": new.uuid,
                "entrypoint": new.entrypoint,
                "parent_id": parent_id,
                "root_id": root_id,
                "mode": new.mode,
                "topic": new.topic,
                "overrides": new.overrides,
                "params": new.params,
                "metadata": new.metadata,
                "phase": new.phase,
                "step": new.step,
                "task_count": None if new.tasks is None else len(new.tasks),
                "accumulated": new.accumulated,
                "created_at": time_of(identifier),
                "target_uuid": new.target.uuid,
                "target_entrypoint": new.target.entrypoint,
                "target_topic": new.target.topic,
                **own,
            }
        )
        labels = {label_row(key, value) for key, value in new.labels}
        self.labels += ({"key": key, "value": value, "operation_id": identifier} for key, value in labels)
        self.add_tasks(new.tasks or (), identifier, root_id, ids)
        return identifier


#: Values of the claim columns in the row of a nested operation. Only a root has a claim.
CHILD_DEFAULTS: Final[Mapping[str, Any]] = {
    "status": states.PENDING,
    "epoch": 0,
    "claim_count": 0,
    "started": 0,
    "owner": None,
    "token": None,
    "lease": None,
    "take_after": None,
    "send_delay": None,
    "due_reason": None,
    "current_entrypoints": None,
}

#: The same values in the row of a root without a claim, and in the row of a root that is claimed when it is stored.
_UNSENT_DEFAULTS: Final[Mapping[str, Any]] = {
    **CHILD_DEFAULTS,
    "take_after": RESEND_UNSENT_AFTER,
    "send_delay": 0.0,
    "due_reason": DueReason.UNSENT,
}
_CLAIMED_DEFAULTS: Final[Mapping[str, Any]] = {
    **CHILD_DEFAULTS,
    "status": states.RUNNING,
    "epoch": 1,
    "claim_count": 1,
    "started": 1,
    "send_delay": SEND_DELAY,
    "due_reason": DueReason.EXPIRED,
}


def count(new: NewOperation) -> int:
    """Return the number of operations in a new operation: itself, and all operations nested in it at any depth."""
    return 1 + count_in(new.tasks or ())


def count_in(tasks: Sequence[NewTask]) -> int:
    """Return the number of operations among ``tasks``, including all operations nested in these at any depth."""
    return sum(count(new.child) for new in tasks if new.child is not None)


def uuids_in(tasks: Sequence[NewTask]) -> list[str]:
    """Return the uuids of the operations among ``tasks``, including all operations nested in these at any depth."""
    uuids: list[str] = []
    for new in tasks:
        if new.child is not None:
            uuids += (new.child.uuid, *uuids_in(new.child.tasks or ()))
    return uuids
