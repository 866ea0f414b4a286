"""Conversion between the rows of the contract and the rows of the tables."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from kser import status as states
from kser.store.rows import RESEND_UNSENT_AFTER, ClaimRequest, NewOperation, NewTask, OperationRow, StepMessage, TaskRow
from kser.store.sql.tables import operation, task

#: Epoch of the ids: the start of 2020 in seconds since 1970. An id has microseconds in its high bits and 12 random low
#: bits, so 63 bits last until 2091.
ID_EPOCH: Final = 1_577_836_800
RANDOM_BITS: Final = 12

#: Maximum number of characters of a label that are stored and searched, because an index entry of PostgreSQL is limited
#: to about 2,700 bytes.
MAX_LABEL_KEY: Final = 128
MAX_LABEL_VALUE: Final = 512

#: The columns of the tables, in the field order of the contract's rows.
OPERATION_COLUMNS: Final = (
    *(operation.c[name] for name in OperationRow._fields if name != "target"),
    operation.c.target_uuid,
    operation.c.target_entrypoint,
    operation.c.target_topic,
)
TASK_COLUMNS: Final = tuple(task.c[name] for name in TaskRow._fields)

_PLAIN: Final = len(OperationRow._fields) - 1
_CANCEL: Final = OperationRow._fields.index("cancel_requested")


class IdGenerator:
    """A generator of ids that increase with time: strictly in one process, approximately across processes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next_ids(self, now: float, count: int) -> int:
        """Reserve ``count`` consecutive ids, and return the first one."""
        with self._lock:
            first = max(id_at(now) + random.getrandbits(RANDOM_BITS), self._last + 1)
            self._last = first + count - 1
            return first


def id_at(moment: float) -> int:
    """Return the lowest id of a time."""
    return int(max(moment - ID_EPOCH, 0) * 1_000_000) << RANDOM_BITS


def time_of(identifier: int) -> float:
    """Return the time at which an id was generated."""
    return ID_EPOCH + (identifier >> RANDOM_BITS) / 1_000_000


def operation_row(row: Sequence[Any]) -> OperationRow:
    """Convert a row that was read with :data:`OPERATION_COLUMNS`."""
    values = [*row[:_PLAIN], StepMessage(*row[_PLAIN : _PLAIN + 3])]
    values[_CANCEL] = bool(values[_CANCEL])
    return OperationRow._make(values)


def label_row(key: str, value: str) -> tuple[str, str]:
    """Return a label, cut to the lengths that are stored and searched."""
    return key[:MAX_LABEL_KEY], value[:MAX_LABEL_VALUE]


class InsertRows:
    """The rows to insert for new operations, including nested ones."""

    def __init__(self) -> None:
        self.operations: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []

    def add_root(self, new: NewOperation, first_id: int, request: ClaimRequest | None) -> None:
        """Add the rows of a root, claimed if ``claimant`` is given.

        :param first_id: first of the reserved consecutive ids, one per operation in the root (:func:`count`).
        """
        claimed = {} if request is None else {"owner": request.owner, "token": request.token}
        root = {
            "status": states.PENDING if request is None else states.RUNNING,
            "epoch": int(request is not None),
            "claim_count": int(request is not None),
            "wait": RESEND_UNSENT_AFTER if request is None else request.lease,
            "started": int(request is not None),
            "owner": None,
            "token": None,
            **claimed,
        }
        self._add(new, iter(range(first_id, first_id + count(new))), None, first_id, root)

    def add_tasks(self, new: Sequence[NewTask], operation_id: int, root_id: int, ids: Iterator[int]) -> None:
        """Add the rows of the tasks of an operation, and of the operations nested in them."""
        for position, each in enumerate(new):
            child = None if each.child is None else self._add(each.child, ids, operation_id, root_id, CHILD_DEFAULTS)
            self.tasks.append(
                {
                    "operation_id": operation_id,
                    "position": position,
                    "uuid": each.uuid,
                    "entrypoint": each.entrypoint,
                    "topic": each.topic,
                    "status": each.status,
                    "attempts": 0,
                    "attempts_before_resume": 0,
                    "child_id": child,
                    "params": each.params,
                    "metadata": each.metadata,
                    "result": each.result,
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


#: Column defaults of a nested operation, for the columns that describe the claim of a root.
CHILD_DEFAULTS: Final[Mapping[str, Any]] = {
    "status": states.PENDING,
    "epoch": 0,
    "claim_count": 0,
    "wait": None,
    "started": 0,
    "owner": None,
    "token": None,
}


def count(new: NewOperation) -> int:
    """Count an operation and all operations nested in it."""
    return 1 + count_in(new.tasks or ())


def count_in(tasks: Sequence[NewTask]) -> int:
    """Count all operations nested in tasks."""
    return sum(count(each.child) for each in tasks if each.child is not None)


def uuids_in(tasks: Sequence[NewTask]) -> list[str]:
    """Return the uuids of all operations nested in tasks."""
    found: list[str] = []
    for each in tasks:
        if each.child is not None:
            found += (each.child.uuid, *uuids_in(each.child.tasks or ()))
    return found
