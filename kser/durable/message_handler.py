"""Handling of the messages of operations in a consumer: store or claim the operation, and execute it."""

from __future__ import annotations

import json
import logging
from typing import Any

from kser.attempt import FAILED, Attempt, Deferred, current_attempt
from kser.durable.context import DurableContext
from kser.durable.execution import DurableStart, Execution, execute_claim
from kser.durable.serialization import check_same_operation, result_from_json
from kser.entry import Entrypoint
from kser.errors import StateConflict, StoreError
from kser.schemas import OPERATION_KEY, Message
from kser.sequencing.operation import Operation
from kser.store.model import ClaimRefused, Mode, OperationRow

logger = logging.getLogger(__name__)


class MessageHandler:
    """Handler of messages for the operations of a registry, and for the steps of these operations.

    :param context: the durable context of this process.
    """

    def __init__(self, context: DurableContext) -> None:
        self._context = context
        self._store = context.store

    def handle_message(self, kmsg: Message, entrypoint: type[Entrypoint] | None) -> Any:
        """Handle a message of a stored operation, or of an operation that is stored when its message arrives.

        :param entrypoint: the class that the message names; None if the class is not registered here.
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
        # Encode the params before user code can change them.
        params = json.dumps(kmsg.params)
        operation: Any = entrypoint.from_Message(kmsg)
        if not isinstance(operation, Operation) or operation._kser_registry is not self._context.registry:
            # from_Message returned an object of another class or of another registry, so the object itself decides how
            # it runs.
            return operation.execute()
        operation._kser_runner = DurableStart(self._context, operation, params, self._handle_duplicate)
        try:
            return operation.execute()
        finally:
            operation._kser_runner = None

    def _handle_duplicate(self, row: OperationRow, entrypoint: str, params: str) -> Any:
        """Handle a message for an operation that is already stored. The message must describe the same operation."""
        try:
            check_same_operation(row, entrypoint, params)
        except StateConflict as conflict:
            if (attempt := current_attempt.get()) is not None:
                attempt.reject(FAILED, conflict)
            raise
        return self._claim_and_run(row.uuid, row.target.uuid if row.mode == Mode.LOCAL else row.uuid)

    def _claim_and_run(self, root_uuid: str, step: str) -> Any:
        """Claim a stored operation, and run the given step if it is the current step."""
        attempt = current_attempt.get()
        if attempt is not None and attempt.timeout_error is not None:
            self._record_timeout(root_uuid, attempt.timeout_error)
            attempt.timeout_error = None
        claim = self._store.claim(root_uuid, step, self._context.new_claim_request())
        if claim is None:
            return self._unknown_operation(root_uuid, step)
        if attempt is not None:
            attempt.ack()
        return self._claim_refused(claim) if isinstance(claim, ClaimRefused) else execute_claim(self._context, claim)

    def _record_timeout(self, root_uuid: str, timeout_error: Exception) -> None:
        """Record the timeout of an attempt in which another thread is still stuck."""
        stuck = next(
            (
                execution
                for execution in self._context.active_claims()
                if isinstance(execution, Execution) and execution.claim.root.uuid == root_uuid
            ),
            None,
        )
        claim = None if stuck is None else self._context.reclaim(stuck.claim)
        if claim is not None:
            execute_claim(self._context, claim, timeout_error)

    def _unknown_operation(self, root_uuid: str, step: str) -> Any:
        error = StoreError(
            f"step {step} belongs to operation {root_uuid}, which {self._store.name} does not know: all consumers of a"
            " topic must share one database, and operations must be stored for longer than the topic retains its"
            " messages"
        )
        logger.error(error.message)
        if (attempt := current_attempt.get()) is not None:
            attempt.reject(FAILED, error)
        raise error

    @staticmethod
    def _claim_refused(refusal: ClaimRefused) -> Deferred:
        root = refusal.root
        logger.info(f"{root.entrypoint}[{root.uuid}]: nothing to do for this message: {refusal.reason}, {root.status}")
        return Deferred(result_from_json(root.result or root.accumulated, root.uuid))
