"""Handler that a consumer calls for the messages of operations. It stores or claims an operation, and executes it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import status as states
from kser.attempt import FAILED, UNDECODABLE, Attempt, Deferred, current_attempt
from kser.durable.context import DurableContext
from kser.durable.execution import DurableStart, Execution, execute_claim
from kser.durable.serialization import check_same_operation, is_json_object, result_from_json
from kser.entry import Entrypoint
from kser.errors import StateConflict, StoreError, StoreUnavailable
from kser.escaping import escape_lines
from kser.schemas import OPERATION_KEY, ORIGINAL_PARAMS_KEY, Message
from kser.sequencing.operation import Operation
from kser.store.model import Claim, ClaimRefused, Mode, OperationRow, RefusalReason

logger = escape_lines(logging.getLogger(__name__))

#: Minimum number of seconds between two log lines about one unknown class.
UNKNOWN_CLASS_LOG_INTERVAL = 60.0


class MessageHandler:
    """Handler of the messages of a registry's operations, and of the messages of their steps.

    :param context: the durable context of this process.
    """

    def __init__(self, context: DurableContext) -> None:
        self._context = context
        self._store = context.store
        #: The time of the last log line about each unknown class.
        self._logged_classes: dict[str, float] = {}

    def handle_message(self, kmsg: Message, entrypoint: type[Entrypoint] | None) -> Any:
        """Handle the message of a step, or the message of an operation.

        If the operation is not stored yet, the method stores the operation before it executes it.

        :param entrypoint: the class that the message names; None if the class is not registered in this process.
        """
        root_uuid = kmsg.metadata.get(OPERATION_KEY)
        if root_uuid is not None:
            if kmsg.uuid == root_uuid or self._context.loader.lookup(kmsg.entrypoint) is None:
                # The message of a task needs only the class that it names, so read no row for a known one.
                row = self._store.get_operation(root_uuid)
                if row is not None and (name := self._unknown_class(row, kmsg.uuid)) is not None:
                    return self._refuse_class(row, name)
            return self._claim_and_run(root_uuid, kmsg.uuid)
        self._check_original_params(kmsg.metadata)
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
            # from_Message returned an object that is no operation or that belongs to another registry. So this handler
            # does not store the object: ``execute`` decides how the object runs.
            return operation.execute()
        operation._kser_runner = DurableStart(self._context, operation, params, self._handle_duplicate)
        try:
            return operation.execute()
        finally:
            operation._kser_runner = None

    @staticmethod
    def _check_original_params(metadata: Mapping[str, Any]) -> None:
        """Check the metadata key of the original params, which redelivered messages are compared with.

        :raises cdumay_error.types.ValidationError: the value is not the text of a JSON object.
        """
        value = metadata.get(ORIGINAL_PARAMS_KEY, "{}")
        if not is_json_object(value):
            invalid = ValidationError(
                f"the metadata key {ORIGINAL_PARAMS_KEY!r} must be the JSON text of params, and it is a"
                f" {type(value).__name__}: kser alone sets this key; remove it from the message"
            )
            if (attempt := current_attempt.get()) is not None:
                attempt.reject(UNDECODABLE, invalid)
            raise invalid

    def _handle_duplicate(self, row: OperationRow, entrypoint: str, params: str) -> Any:
        """Handle a message of an operation that is already stored.

        :raises kser.errors.StateConflict: the entrypoint or the params in the message differ from those of the stored
            operation.
        """
        try:
            check_same_operation(row, entrypoint, params)
        except StateConflict as conflict:
            if (attempt := current_attempt.get()) is not None:
                attempt.reject(FAILED, conflict)
            raise
        step = row.target.uuid if row.mode == Mode.LOCAL else row.uuid
        if (name := self._unknown_class(row, step)) is not None:
            return self._refuse_class(row, name)
        return self._claim_and_run(row.uuid, step)

    def _claim_and_run(self, root_uuid: str, step: str) -> Any:
        """Claim a stored operation, and execute the operation if ``step`` is the uuid of its current step."""
        attempt = current_attempt.get()
        if attempt is not None and attempt.timeout_error is not None:
            self._record_timeout(root_uuid, attempt.timeout_error)
            attempt.timeout_error = None
        claim = self._claim(attempt, root_uuid, step)
        if isinstance(claim, Deferred):
            return claim
        if claim is None:
            return self._unknown_operation(root_uuid, step)
        if attempt is not None:
            attempt.ack()
        return self._claim_refused(claim) if isinstance(claim, ClaimRefused) else execute_claim(self._context, claim)

    def _claim(self, attempt: Attempt | None, root_uuid: str, step: str) -> Claim | ClaimRefused | Deferred | None:
        """Claim a stored operation for the record or the takeover of the current attempt.

        :return: the claim, the refusal, or None if the store does not know the operation; a Deferred if the claim of a
            takeover met an outage, so that the takeover ends.
        """
        takeover = None if attempt is None else attempt.takeover
        if attempt is None or takeover is None:
            return self._claim_for_record(root_uuid, step, attempt)
        context = self._context
        context.sleep(max(takeover.claim_after - context.clock(), 0))
        if attempt.abandoned or attempt.shutting_down or context.clock() >= takeover.expires_at:
            takeover.is_started = False
            return Deferred(Result(uuid=step))
        request = context.new_claim_request(takeover.topic, epoch=takeover.epoch, taken_over=takeover.reason)
        try:
            claim = self._store.once(self._store.direct.claim, root_uuid, step, request)
        except StoreUnavailable as error:
            # A reservation from before an outage must not lead to a claim after it, because the owner of an expired
            # lease could not renew it during the outage. But the claim may have taken effect although its reply was
            # lost: its token shows this.
            self._store.report_outage(error)
            takeover.is_answered = True
            row = self._store.get_operation(root_uuid)
            if row is None or row.token != request.token:
                return Deferred(Result(uuid=step))
            return self._store.claim(root_uuid, step, request)
        takeover.is_answered = claim is not None
        return claim

    def _claim_for_record(self, root_uuid: str, step: str, attempt: Attempt | None) -> Claim | ClaimRefused | None:
        """Claim a stored operation for a record.

        If the lease of the owner has expired, the owner gets the same chance to renew it as before a takeover.
        """
        context, topic = self._context, None if attempt is None else attempt.topic or None
        claim = self._store.claim(root_uuid, step, context.new_claim_request(topic, expired=False))
        if not isinstance(claim, ClaimRefused) or claim.reason != RefusalReason.EXPIRED:
            return claim
        reserved = self._store.reserve_step(claim.root, context.settings.reservation)
        if reserved is None:
            return claim
        context.sleep(context.settings.grace)
        if attempt is not None and attempt.shutting_down:
            self._store.return_reservations([reserved])
            return claim
        return self._store.claim(root_uuid, step, context.new_claim_request(topic, epoch=reserved.epoch))

    # -- unknown classes -----------------------------------------------------------------------------------------------

    def _unknown_class(self, row: OperationRow, step: str) -> str | None:
        """Return the path of a class that the current step of a root needs and this process does not know.

        :param step: uuid of the requested step.
        :return: None if all classes are known, or if a claim for the step is refused anyway.
        """
        if states.is_final(row.status) or row.target.uuid != step:
            return None
        return next(iter(self._context.unknown_classes(row)), None)

    def _refuse_class(self, row: OperationRow, name: str) -> Deferred:
        """Leave a step to the other consumers, because this process does not know a class that the step needs."""
        attempt = current_attempt.get()
        topic = row.target.topic
        now = time.monotonic()
        if now - self._logged_classes.get(name, -float("inf")) >= UNKNOWN_CLASS_LOG_INTERVAL:
            self._logged_classes[name] = now
            logger.error(
                f"{row.entrypoint}[{row.uuid}]: this consumer of {topic} does not know class {name}, and leaves the"
                " step to other consumers: import its module in this consumer, or use another topic for the class"
            )
        self._store.refuse_class(row.uuid, row.target.uuid)
        if attempt is not None:
            attempt.ack()
        return Deferred(result_from_json(row.result or row.accumulated, row.uuid))

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
        reason = "of another topic" if refusal.reason == RefusalReason.TOPIC else refusal.reason
        logger.info(f"{root.entrypoint}[{root.uuid}]: nothing to do for this message: {reason}, {root.status}")
        return Deferred(result_from_json(root.result or root.accumulated, root.uuid))
