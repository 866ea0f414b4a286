"""Manager of the stored operations. Clients call it to send, find, resume, cancel and purge operations."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any
from uuid import uuid4

from cdumay_result import Result

from kser import signals
from kser import status as states
from kser.durable.context import DurableContext
from kser.durable.serialization import check_same_operation, new_operation, result_from_json, searchable_pair
from kser.errors import StateConflict, StoreUnavailable, UsageError, WaitTimeout
from kser.escaping import escape_lines
from kser.limits import applied
from kser.sequencing.operation import Operation
from kser.sequencing.runner import is_distributed
from kser.store.model import ClaimRefused, Mode, NewOperation, OperationQuery, OperationRow, Phase

logger = escape_lines(logging.getLogger(__name__))

#: The first interval and the longest interval between two polls of ``wait()``, in seconds.
_POLL_INTERVALS = (0.01, 0.25)

#: Maximum number of operations that are deleted in one transaction.
PURGE_BATCH = 500


class OperationManager:
    """Manager of a registry's stored operations.

    :param context: the durable context of this process.
    """

    def __init__(self, context: DurableContext) -> None:
        self._context = context
        self._store = context.store

    # -- accepting -----------------------------------------------------------------------------------------------------

    def send(self, operation: Operation, result: Result | None, topic: str | None, key: str | bytes | None) -> None:
        """Accept an operation, that is, save it in the store, and then send its message.

        :param result: a result to forward to the operation.
        :raises kser.errors.KserError: the operation was not accepted and will not run. After a StoreUnavailable, it is
            unknown whether the operation was accepted.
        """
        # Resolve the producer and the topic before the operation is accepted. If one of them is missing, the caller
        # gets an error and the operation is not accepted.
        _ = self._context.producer
        topic = self._context.registry.topic_for(operation, topic)
        if result is not None:
            operation.result = result
        mode = Mode.DISTRIBUTED if is_distributed(operation) else Mode.LOCAL
        self._save_intent(self._new_operation(operation, mode, topic), key)

    def launch(self, operation: Operation) -> Result:
        """Accept a distributed operation, that is, save it in the store, and then send the message of its first task.

        :return: the Result of the producer. The operation is accepted even if the send failed.
        :raises kser.errors.KserError: the operation was not accepted and will not run. After a StoreUnavailable, it is
            unknown whether the operation was accepted.
        """
        # Resolve the producer and the topic before the operation is accepted. If one of them is missing, the caller
        # gets an error and the operation is not accepted.
        _ = self._context.producer
        topic = self._context.registry.topic_for(operation)
        return self._save_intent(self._new_operation(operation, Mode.DISTRIBUTED, topic), None)

    def _new_operation(self, operation: Operation, mode: str, topic: str) -> NewOperation:
        """Return the row of a new operation.

        :param topic: topic of the operation. If ``KSER_TOPICS`` is not set, tasks whose class declares no topic get
            this topic too.
        """
        task_topic = self._context.registry.settings.first_topic(topic)
        with applied(self._context.limits):
            return new_operation(operation, mode, topic, task_topic)

    def _save_intent(self, new: NewOperation, key: str | bytes | None) -> Result:
        saved = self._store.save(new)
        if isinstance(saved, ClaimRefused):
            row = saved.root
            check_same_operation(row, new.entrypoint, new.params)
            if states.is_final(row.status):
                raise StateConflict(
                    f"operation {row.uuid} was sent before, and is {row.status}: use a new uuid, or resume() if it"
                    " FAILED or was CANCELLED"
                )
            return Result(uuid=row.uuid, stdout=f"operation {row.uuid} was sent before, and is {row.status}")
        assert isinstance(saved, int), "save() without a claim request returns the id"
        self._emit_changed(new.uuid, new.entrypoint, None, states.PENDING)
        result = self._context.send(new.target, new.uuid, key=key)
        if states.final_status(result) == states.SUCCESS:
            self._record_sent(saved, 0)
        return result

    def _record_sent(self, root_id: int, epoch: int) -> None:
        # Ignore an outage, because a send that is not recorded only causes a second message.
        with suppress(StoreUnavailable):
            settings = self._context.settings
            self._store.direct.mark_sent([(root_id, epoch)], settings.resend, settings.lease)

    # -- requests of clients -------------------------------------------------------------------------------------------

    def get(self, uuid: str) -> Operation | None:
        """Return a stored operation, or None if no operation has this uuid.

        The object is an instance of the operation's class if this class is registered in this process. Otherwise, the
        object is a plain Operation.
        """
        snapshot = self._store.snapshot(uuid)
        if snapshot is None:
            return None
        row = snapshot.operation
        operation = self._load(row)
        nested = any(task.child_id is not None for task in snapshot.tasks)
        children = self._store.get_children(row.root_id) if nested else ()
        operation.tasks = self._context.loader.tasks(snapshot.tasks, children)
        operation._kser_snapshot = snapshot
        if row.status == states.RUNNING and row.phase == Phase.RUN_TASK and self._is_claimed(row, snapshot.root_uuid):
            operation.tasks[row.step].status = states.RUNNING
        return operation

    def _is_claimed(self, row: OperationRow, root_uuid: str) -> bool:
        root = row if row.parent_id is None else self._store.get_operation(root_uuid)
        return root is not None and root.owner is not None

    def _load(self, row: OperationRow) -> Operation:
        return self._context.loader.operation(row)

    def find(self, query: OperationQuery, limit: int, after: str | None) -> tuple[list[Operation], str | None]:
        """Return a page of operations without their tasks, newest first, and the cursor of the next page."""
        page = self._store.find(query, limit, after)
        return [self._load(row) for row in page.rows], page.cursor

    def resume(self, uuid: str) -> None:
        """Resume a FAILED or CANCELLED operation at its first task whose status is not SUCCESS.

        The first task is due at once: a consumer takes it over, so this process needs no producer.

        :raises kser.errors.StateConflict: the operation is neither FAILED nor CANCELLED, or the operation has changed
            during the call.
        :raises kser.errors.UsageError: no root operation with this uuid is stored.
        """
        before = self._require(uuid)
        row = _require_row(uuid, self._store.resume(uuid, before.epoch, uuid4().hex))
        self._emit_changed(row.uuid, row.entrypoint, before.status, row.status)

    def cancel(self, uuid: str, reason: str | None) -> str:
        """Cancel an operation: immediately if no consumer holds a claim on it, otherwise after its running task.

        :return: the status of the operation after the call.
        :raises kser.errors.UsageError: no root operation with this uuid is stored.
        """
        before = self._require(uuid)
        row = _require_row(uuid, self._store.cancel(uuid, reason))
        if row.status == states.CANCELLED and not states.is_final(before.status):
            self._emit_changed(row.uuid, row.entrypoint, before.status, row.status)
        return row.status

    def _emit_changed(self, uuid: str, entrypoint: str, old: str | None, new: str) -> None:
        signals.emit_operation_changed(self._context.registry, uuid, entrypoint, old, new)

    def _require(self, uuid: str) -> OperationRow:
        return _require_row(uuid, self._store.get_operation(uuid))

    def wait(self, uuid: str, timeout: float | None) -> Result:
        """Wait for the end of an operation and return its result.

        :param timeout: seconds to wait; None waits without a limit.
        :raises kser.errors.WaitTimeout: the operation has not ended in time.
        :raises kser.errors.UsageError: no operation with this uuid is stored.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        interval, longest = _POLL_INTERVALS
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                row = self._require(uuid)
            except StoreUnavailable:
                # Poll until the deadline, because the outage may end before the deadline.
                if left is not None and left <= 0:
                    raise
            else:
                if states.is_final(row.status):
                    return result_from_json(row.result or row.accumulated, row.uuid)
                if left is not None and left <= 0:
                    raise WaitTimeout(f"operation {uuid} is {row.status} after {timeout:g} s, at task {row.step}")
            time.sleep(interval if left is None else max(min(interval, left), 0))
            interval = min(interval * 1.5, longest)

    def purge(self, older_than: float, status: Collection[str]) -> int:
        """Delete ended operations with all their rows, and return the number of deleted operations.

        :param older_than: minimum number of seconds since the end of an operation.
        :param status: the final statuses of the operations to delete.
        :raises kser.errors.UsageError: a status is not final.
        """
        invalid = set(status) - states.FINAL
        if invalid:
            raise UsageError(
                f"only operations that have ended are purged, not those that are {', '.join(sorted(invalid))}"
            )
        total = 0
        while True:
            count = self._store.purge(older_than, status, PURGE_BATCH)
            total += count
            if count < PURGE_BATCH:
                return total


def build_query(
    status: str | Collection[str] | None,
    entrypoint: Any,
    since: Any,
    until: Any,
    metadata: Mapping[str, Any] | None,
    parent: str | None,
) -> OperationQuery:
    """Build the store's query from the arguments of ``find()``."""
    return OperationQuery(
        status={status} if isinstance(status, str) else status,
        entrypoint=getattr(entrypoint, "path", entrypoint),
        since=_timestamp("since", since),
        until=_timestamp("until", until),
        labels=[searchable_pair(key, value) for key, value in (metadata or {}).items()],
        parent=parent,
    )


def _timestamp(name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if not hasattr(value, "timestamp"):
        raise UsageError(f"{name} must be a datetime, or seconds since 1970; it is {value!r}")
    return float(value.timestamp())


def _require_row(uuid: str, row: OperationRow | None) -> OperationRow:
    if row is None:
        raise UsageError(
            f"there is no stored operation {uuid!r}: it was never sent, was purged, or is nested in another operation"
        )
    return row
