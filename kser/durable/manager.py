"""Stored operations: acceptance, handling of their messages, and requests of clients."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from cdumay_result import Result

from kser import signals
from kser import status as states
from kser.attempt import FAILED, Attempt, Deferred, current_attempt, raise_if_decided
from kser.durable.context import DurableContext
from kser.durable.execution import Execution
from kser.durable.serialization import json_equal, new_operation, result_from_json, searchable_pair
from kser.entry import Entrypoint
from kser.errors import ProducerMissing, StateConflict, StoreError, StoreUnavailable, UsageError, WaitTimeout
from kser.schemas import OPERATION_KEY, ORIGINAL_PARAMS_KEY, Message
from kser.sequencing.operation import Operation
from kser.sequencing.runner import is_distributed, prepare_operation
from kser.store.model import Claim, ClaimRefused, Mode, NewOperation, OperationQuery, OperationRow, Phase

logger = logging.getLogger(__name__)

#: Seconds between two polls for the end of an operation in ``wait()``: the first interval and the longest one.
_POLL_INTERVALS = (0.01, 0.25)

#: Maximum number of operations deleted per transaction.
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
        """Accept an operation and send it.

        :param result: forwarded to the operation.
        :raises kser.errors.KserError: the operation was not accepted and will not run.
        """
        # Resolve producer and topic before the operation is accepted, so that the caller gets the error if one is
        # missing.
        _ = self._context.producer
        place = self._context.registry.topic_for(operation, topic)
        if result is not None:
            operation.result = result
        mode = Mode.DISTRIBUTED if is_distributed(operation) else Mode.LOCAL
        self._save_intent(new_operation(operation, mode, place, self._context.topic_resolver(place)), key)

    def launch(self, operation: Operation) -> Result:
        """Accept an operation that runs over the consumers, and send its first task.

        :return: the producer's result; the operation is accepted even if sending failed.
        :raises kser.errors.KserError: the operation was not accepted and will not run.
        """
        # Resolve producer and topic before the operation is accepted, so that the caller gets the error if one is
        # missing.
        _ = self._context.producer
        place = self._context.registry.topic_for(operation)
        return self._save_intent(
            new_operation(operation, Mode.DISTRIBUTED, place, self._context.topic_resolver(place)), None
        )

    def _save_intent(self, new: NewOperation, key: str | bytes | None) -> Result:
        known = self._store.save(new)
        if isinstance(known, ClaimRefused):
            row = known.root
            self._check_same_operation(row, new.entrypoint, new.params)
            if states.is_final(row.status):
                raise StateConflict(
                    f"operation {row.uuid} was sent before, and is {row.status}: use a new uuid, or resume() if it"
                    " FAILED or was CANCELLED"
                )
            return Result(uuid=row.uuid, stdout=f"operation {row.uuid} was sent before, and is {row.status}")
        assert isinstance(known, int), "save() without a claim request returns the id"
        self._emit_changed(new.uuid, new.entrypoint, None, states.PENDING)
        answer = self._context.send(new.target, new.uuid, key=key)
        if states.final_status(answer) == states.SUCCESS:
            self._record_sent(known, 0)
        return answer

    def _record_sent(self, root_id: int, epoch: int) -> None:
        # Ignore an outage, because an unrecorded send costs no more than a second message.
        with suppress(StoreUnavailable):
            self._store.direct.mark_sent([(root_id, epoch)], self._context.settings.resend)

    @staticmethod
    def _check_same_operation(row: OperationRow, entrypoint: str, params: str) -> None:
        """Check that a stored operation has the entrypoint and params of a new one with the same uuid.

        :raises kser.errors.StateConflict: they differ, or the uuid belongs to a nested operation.
        """
        if row.parent_id is not None:
            raise StateConflict(f"{row.uuid} is the uuid of a nested operation")
        given = json.loads(row.metadata).get(ORIGINAL_PARAMS_KEY, row.params)
        if row.entrypoint != entrypoint or not (json_equal(row.params, params) or json_equal(given, params)):
            raise StateConflict(
                f"the uuid {row.uuid} is taken by a stored {row.entrypoint} with params {row.params}: {entrypoint} with"
                f" params {params} is another operation, and needs a uuid of its own"
            )

    # -- messages ------------------------------------------------------------------------------------------------------

    def handle_message(self, kmsg: Message, entrypoint: type[Entrypoint] | None) -> Any:
        """Handle a message of a stored operation, or of one that is stored on arrival.

        :param entrypoint: the class that the message names; None if it is not registered here.
        """
        root_uuid = kmsg.metadata.get(OPERATION_KEY)
        if root_uuid is not None:
            return self._claim_and_run(str(root_uuid), kmsg.uuid)
        if not kmsg.uuid:
            kmsg.uuid = (current_attempt.get() or Attempt()).deterministic_uuid()
        row = self._store.get_operation(kmsg.uuid)
        if row is not None:
            return self._handle_duplicate(row, kmsg.entrypoint, json.dumps(kmsg.params))
        assert entrypoint is not None, "only the message of a step may name an unknown class"
        # User code may change the params of the operation.
        params = json.dumps(kmsg.params)
        operation: Any = entrypoint.from_Message(kmsg)
        if not isinstance(operation, Operation):
            return operation.execute()
        operation._kser_runner = DurableStart(self, params)
        try:
            return operation.execute()
        finally:
            operation._kser_runner = None

    def save_and_run(self, operation: Operation, result: Result | None, params: str) -> Any:
        """Store an operation that was built from a message, and run it if it runs in this consumer.

        :param result: forwarded to the operation.
        :param params: JSON of the message's params.
        """
        prepare_operation(operation, result)
        # Raise if the attempt has timed out by now, because a failed attempt must not accept its operation.
        raise_if_decided(operation)
        delivery = current_attempt.get()
        place = operation.TOPIC or (delivery.topic if delivery else "") or self._context.registry.topic_for(operation)
        mode = Mode.DISTRIBUTED if is_distributed(operation) else Mode.LOCAL
        new = new_operation(operation, mode, place, self._context.topic_resolver(place), params)
        claimant = self._context.new_claim_request() if mode == Mode.LOCAL else None
        saved = self._store.save(new, claimant)
        if isinstance(saved, ClaimRefused):
            # Another consumer has stored the same operation in the meantime.
            return self._handle_duplicate(saved.root, new.entrypoint, params)
        if delivery is not None:
            delivery.ack()
        self._emit_changed(new.uuid, new.entrypoint, None, states.PENDING)
        if isinstance(saved, int):
            self._context.send_nowait(new.target, new.uuid, (saved, 0))
            return Deferred(operation.result)
        return Execution(self._context, saved, operation).run()

    def _handle_duplicate(self, row: OperationRow, entrypoint: str, params: str) -> Any:
        """Handle a message for an operation that is already stored, if both describe the same operation."""
        try:
            self._check_same_operation(row, entrypoint, params)
        except StateConflict as conflict:
            if (delivery := current_attempt.get()) is not None:
                delivery.reject(FAILED, conflict)
            raise
        return self._claim_and_run(row.uuid, row.target.uuid if row.mode == Mode.LOCAL else row.uuid)

    def _claim_and_run(self, root_uuid: str, step: str) -> Any:
        """Claim and run a step of a stored operation, if it is the current one."""
        delivery = current_attempt.get()
        if delivery is not None and delivery.timeout_error is not None:
            self._record_timeout(root_uuid, delivery.timeout_error)
            delivery.timeout_error = None
        claimant = self._context.new_claim_request()
        claim = self._store.claim(root_uuid, step, claimant)
        if claim is None:
            return self._unknown_operation(root_uuid, step)
        if delivery is not None:
            delivery.ack()
        return self._claim_refused(claim) if isinstance(claim, ClaimRefused) else Execution(self._context, claim).run()

    def _record_timeout(self, root_uuid: str, timeout_error: Exception) -> None:
        """Record the timeout of an attempt in which another thread is still stuck."""
        stuck = next(
            (run for run in self._context.active_claims() if isinstance(run, Execution) and run.uuid == root_uuid), None
        )
        if stuck is None:
            return
        claimant = self._context.new_claim_request()._replace(token=stuck.claim.root.token or "")
        step = stuck.claim.root.target.uuid
        again = self._store.claim(root_uuid, step, claimant)
        if isinstance(again, Claim) and again.epoch == stuck.claim.epoch:
            Execution(self._context, again, timeout_error=timeout_error).run()

    def _unknown_operation(self, root_uuid: str, step: str) -> Any:
        error = StoreError(
            f"step {step} belongs to operation {root_uuid}, which {self._store.name} does not know: all consumers of a"
            " topic must share one database, and operations must be stored for longer than the topic retains its"
            " messages"
        )
        logger.error(error.message)
        if (delivery := current_attempt.get()) is not None:
            delivery.reject(FAILED, error)
        raise error

    @staticmethod
    def _claim_refused(refusal: ClaimRefused) -> Deferred:
        root = refusal.root
        logger.info(f"{root.entrypoint}[{root.uuid}]: nothing to do for this message: {refusal.reason}, {root.status}")
        return Deferred(result_from_json(root.result or root.accumulated, root.uuid))

    # -- requests of clients -------------------------------------------------------------------------------------------

    def get(self, uuid: str) -> Operation | None:
        """Return an operation as stored, as an object of its class if that is registered here; None if not found."""
        stored = self._store.snapshot(uuid)
        if stored is None:
            return None
        row = stored.operation
        operation = self._load(row)
        inside = any(task.child_id is not None for task in stored.tasks)
        children = self._store.get_children(row.root_id) if inside else ()
        operation.tasks = self._context.loader.tasks(stored.tasks, children)
        operation._kser_snapshot = stored
        if row.status == states.RUNNING and row.phase == Phase.RUN_TASK and self._is_claimed(row, stored.root_uuid):
            operation.tasks[row.step].status = states.RUNNING
        return operation

    def _is_claimed(self, row: OperationRow, root_uuid: str) -> bool:
        root = row if row.parent_id is None else self._store.get_operation(root_uuid)
        return root is not None and root.owner is not None

    def _load(self, row: OperationRow) -> Operation:
        operation = self._context.loader.operation(row)
        operation._kser_loaded_from = self._context.registry
        return operation

    def find(self, query: OperationQuery, limit: int, after: str | None) -> tuple[list[Operation], str | None]:
        """Return a page of operations without their tasks, newest first, and the cursor of the next page."""
        page = self._store.find(query, limit, after)
        return [self._load(row) for row in page.rows], page.cursor

    def resume(self, uuid: str) -> None:
        """Resume a FAILED or CANCELLED operation at its first task that is not SUCCESS.

        :raises kser.errors.StateConflict: the operation is in another state.
        :raises kser.errors.UsageError: there is no such operation.
        """
        before = self._require(uuid)
        row = _require_row(uuid, self._resume(uuid))
        self._emit_changed(row.uuid, row.entrypoint, before.status, row.status)
        try:
            _ = self._context.producer
        except ProducerMissing as missing:
            # A client needs no producer, because the reaper of a consumer sends the step with its own.
            logger.info(f"operation {uuid} is resumed, and the reaper of a consumer will send it: {missing.message}")
        else:
            answer = self._context.send(row.target, row.uuid)
            if states.final_status(answer) == states.SUCCESS:
                self._record_sent(row.id, row.epoch)

    def _resume(self, uuid: str) -> OperationRow | None:
        asked = False

        def ask() -> OperationRow | None:
            nonlocal asked
            try:
                return self._store.direct.resume(uuid)
            except StateConflict:
                if not asked:
                    raise
                # The first call took effect and its reply was lost.
                return self._store.direct.get_operation(uuid)
            finally:
                asked = True

        return self._store.retry(ask)

    def cancel(self, uuid: str, reason: str | None) -> str:
        """Cancel an operation, at once or after its running task.

        :return: the status of the operation now.
        :raises kser.errors.UsageError: there is no such operation.
        """
        before = self._require(uuid)
        row = _require_row(uuid, self._store.cancel(uuid, reason))
        if row.status == states.CANCELLED and not states.is_final(before.status):
            self._emit_changed(row.uuid, row.entrypoint, before.status, row.status)
        return row.status

    def _require(self, uuid: str) -> OperationRow:
        return _require_row(uuid, self._store.get_operation(uuid))

    def wait(self, uuid: str, timeout: float | None) -> Result:
        """Wait for the end of an operation and return its result.

        :param timeout: seconds; None waits without limit.
        :raises kser.errors.WaitTimeout: the operation has not ended in time.
        :raises kser.errors.UsageError: there is no such operation.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        look, slowest = _POLL_INTERVALS
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                row = self._require(uuid)
            except StoreUnavailable:
                # Poll until the deadline, because the outage may end before it.
                if left is not None and left <= 0:
                    raise
            else:
                if states.is_final(row.status):
                    return result_from_json(row.result or row.accumulated, row.uuid)
                if left is not None and left <= 0:
                    raise WaitTimeout(f"operation {uuid} is {row.status} after {timeout:g} s, at task {row.step}")
            time.sleep(look if left is None else max(min(look, left), 0))
            look = min(look * 1.5, slowest)

    def purge(self, older_than: float, status: Collection[str]) -> int:
        """Delete ended operations with everything that belongs to them, and return how many were deleted."""
        odd = set(status) - states.FINAL
        if odd:
            raise UsageError(f"only operations that have ended are purged, not those that are {', '.join(sorted(odd))}")
        total = 0
        while True:
            count = self._store.purge(older_than, status, PURGE_BATCH)
            total += count
            if count < PURGE_BATCH:
                return total

    def _emit_changed(self, uuid: str, entrypoint: str, old: str | None, new: str) -> None:
        registry = self._context.registry
        signals.emit(
            signals.operation_changed, registry, uuid=uuid, entrypoint=entrypoint, old=old, new=new, result=None
        )


class DurableStart:
    """Runner of an operation that was built from a message: it stores the operation first.

    :param manager: the manager that stores the operation.
    :param params: JSON of the message's params.
    """

    def __init__(self, manager: OperationManager, params: str) -> None:
        self._manager = manager
        self._params = params

    def run(self, operation: Operation, result: Result | None) -> Any:
        return self._manager.save_and_run(operation, result, self._params)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Become None in a copy or pickle of the operation, because only the operation itself is stored."""
        return type(None), ()


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
