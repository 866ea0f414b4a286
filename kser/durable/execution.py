"""Execution of a stored operation: one claim, with one checkpoint per step, until the claim is released.

A step is the work of one transaction: build an operation, run a task, choose the next task, or end an operation
(:mod:`kser.durable.step_runner`). In a local operation, the same execution runs all steps one after the other. In a
distributed operation, each step is sent to a consumer that knows the class of the step.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from kser import signals
from kser import status as states
from kser.attempt import Deferred, current_attempt
from kser.controller import user_code_guard
from kser.durable.context import DurableContext
from kser.durable.execution_state import ExecutionState, OperationFrame
from kser.durable.step_runner import NO_REPLY, StepOutcome, StepRunner
from kser.errors import FencedError, KserError, StoreError, StoreUnavailable
from kser.results import copy_result
from kser.sequencing.operation import Operation
from kser.store.model import Checkpoint, Claim, NewEvent, OperationUpdate, Phase, StepMessage

logger = logging.getLogger(__name__)


class Execution:
    """Execution of an operation under one claim.

    :param context: the durable context of this process.
    :param claim: the claim under which the execution works.
    :param operation: the object of the root, if it was just built.
    :param timeout_error: the timeout error of an attempt at the current task. Another thread is still stuck in that
        attempt. The execution records this error and releases the claim.
    """

    def __init__(
        self,
        context: DurableContext,
        claim: Claim,
        operation: Operation | None = None,
        timeout_error: Exception | None = None,
    ) -> None:
        self._context = context
        self._claim = claim
        self._timeout_error = timeout_error
        self._attempt = current_attempt.get()
        self._state = ExecutionState(claim)
        self._step_runner = StepRunner(context, self._state, timeout_error)
        self._step_runner.attach(self._state.root, operation)
        self._released = False
        #: The result of the message, which is the reply of the last step that had a reply.
        self._reply: Any = None

    @property
    def key(self) -> tuple[int, int]:
        """Id of the root and epoch of the claim."""
        return self._claim.id, self._claim.epoch

    @property
    def uuid(self) -> str:
        """UUID of the root operation."""
        return self._claim.root.uuid

    @property
    def is_abandoned(self) -> bool:
        """True if the consumer has abandoned the attempt that this execution runs in."""
        return self._attempt is not None and self._attempt.abandoned

    @property
    def claim(self) -> Claim:
        """The claim of this execution."""
        return self._claim

    def run(self) -> Any:
        """Run steps until the claim is released.

        :return: a Result, or :class:`kser.attempt.Deferred`.
        """
        self._context.register_claim(self)
        try:
            if self._claim.epoch == 1:
                self._emit_operation(states.PENDING, states.RUNNING)
            if self._claim.root.cancel_requested:
                # The previous owner died before cancelling. Releasing the claim cancels the operation.
                self.release()
                self._released, self._reply = True, Deferred(self._state.root.accumulated)
            elif self._claim.exhausted:
                error = _retries_exhausted(self._claim)
                self._state.add_event(NewEvent("exhausted", text=error.message))
                outcome = self._step_runner.fail_step(error)
                self._after_checkpoint(outcome, *self._checkpoint(outcome))
            while not self._released:
                self._run_step()
        except FencedError as error:
            self._released = True
            logger.warning(f"{self.label}: the outcome of its step is dropped: {error.message}")
            return Deferred(self._state.root.accumulated)
        finally:
            self._context.release_claim(self)
            if not self._released:
                with suppress(KserError):
                    self.release()
        return self._reply

    def release(self) -> None:
        """Release the claim at the stored position, and send the current step. A step may still run under the claim."""
        root, epoch, store = self._claim.root, self._claim.epoch, self._context.store.direct
        row = store.get_operation(root.uuid)
        if row is None or row.status != states.RUNNING or row.epoch != epoch:
            return
        update = OperationUpdate(
            row.id, row.step, row.phase, row.step, row.phase, row.status, row.accumulated, row.result
        )
        token, events = root.token or "", (NewEvent("released"),)
        status = store.checkpoint(
            Checkpoint(row.id, epoch, token, self._context.owner, (update,), events=events, keep=False)
        )
        if status == states.CANCELLED:
            self._on_cancelled()
            return
        # Wait for the delivery, because the process may exit next, and then a later delivery report would be lost.
        self._context.send(row.target, row.uuid, (row.id, epoch + 1))

    # -- recording -----------------------------------------------------------------------------------------------------

    def _run_step(self) -> None:
        """Run a step and record its outcome."""
        try:
            with user_code_guard:
                outcome = self._step_runner.run_next()
                recorded = self._checkpoint(outcome)
        except (FencedError, StoreUnavailable):
            raise
        except Exception as exc:
            # A StoreError is permanent, and any other exception would occur again immediately. So fail the step instead
            # of retrying it.
            logger.exception(f"{self.label}: the outcome of a step cannot be recorded, so the step fails")
            outcome = self._reload_and_fail(exc)
            recorded = self._checkpoint(outcome)
        self._after_checkpoint(outcome, *recorded)

    def _checkpoint(self, outcome: StepOutcome) -> tuple[Checkpoint, str, StepMessage | None]:
        """Record the outcome of the step.

        :return: the checkpoint, the status of the root, and the message for the next step (None if it is unchanged).
        """
        delay = outcome.retry_in
        keep, target = self._next_hop(outcome)
        stays = not keep and target is None and delay is None
        checkpoint = self._state.checkpoint(
            self._context.owner, keep, target, delay or 0, (NewEvent("released"),) if stays else ()
        )
        return checkpoint, self._context.store.checkpoint(checkpoint), target

    def _after_checkpoint(
        self, outcome: StepOutcome, checkpoint: Checkpoint, status: str, target: StepMessage | None
    ) -> None:
        """Emit the events of a recorded checkpoint. If the next step does not run in this execution, send it."""
        state, delay = self._state, outcome.retry_in
        if outcome.reply is not NO_REPLY:
            self._reply = outcome.reply
        is_finished = state.is_finished
        self._released = is_finished or status == states.CANCELLED or not checkpoint.keep
        if self._released:
            # Unregister the claim before sending the next step. The store has already released the claim, so during a
            # slow send the heartbeat would report the claim as lost.
            self._context.release_claim(self)
        ended = list(state.ended)
        state.mark_flushed()
        self._emit_tasks(checkpoint)
        if status == states.CANCELLED:
            self._on_cancelled()
            return
        for frame in ended:
            self._emit_end(frame)
        if is_finished:
            self._emit_operation(states.RUNNING, status)
        elif delay is not None:
            self._reply = Deferred(self._reply or state.root.accumulated)
            if not delay:
                # Send a retry without a delay from here. The store cannot distinguish it from a step that a consumer is
                # about to send, so the reaper would wait RESEND_UNSENT_AFTER seconds.
                self._send(state.root.row.target)
        elif self._released:
            self._dispatch_next(target)

    def _next_hop(self, outcome: StepOutcome) -> tuple[bool, StepMessage | None]:
        """Return whether to keep the claim, and the message for the next step (None if it is unchanged)."""
        state, frame = self._state, self._state.top
        outer = current_attempt.get()
        continues = self._timeout_error is None and not (outer is not None and outer.shutting_down)
        if state.is_finished:
            return True, None
        if outcome.retry_in is not None:
            return False, None
        if not state.distributed:
            return continues, None
        if frame.phase == Phase.RUN_TASK:
            return False, self._target_of_task(frame)
        known = self._context.loader.lookup(frame.row.entrypoint) is not None
        return continues and known and frame.phase != Phase.BUILD, frame.target

    def _target_of_task(self, frame: OperationFrame) -> StepMessage:
        position = frame.row.id, frame.step
        built = self._state.built
        if built is not None and built.operation_id == frame.row.id:
            new = built.tasks[frame.step]
            return StepMessage(new.uuid, new.entrypoint, new.topic)
        row = self._claim.next_task
        if row is None or (row.operation_id, row.position) != position:
            row = self._context.store.get_task(*position)
        assert row is not None, "the step is below the number of tasks"
        return StepMessage(row.uuid, row.entrypoint, row.topic)

    def _dispatch_next(self, target: StepMessage | None) -> None:
        root = self._state.root
        if not self._state.distributed or self._reply is None or self._timeout_error is not None:
            self._reply = Deferred(root.accumulated)
        self._send(target or root.row.target)

    def _send(self, target: StepMessage) -> None:
        """Send a step. During a shutdown of the consumer, wait for the delivery."""
        shutting_down = self._attempt is not None and self._attempt.shutting_down
        send = self._context.send if shutting_down else self._context.send_nowait
        send(target, self._claim.root.uuid, (self._claim.id, self._claim.epoch + 1))

    def _reload_and_fail(self, error: Exception) -> StepOutcome:
        """Discard the outcome of the step, reload the claim and fail the step with ``error``."""
        claim = self._context.reclaim(self._claim)
        if claim is None:
            raise FencedError(f"the claim on operation {self.uuid} was lost while a step was recorded")
        objects = {frame.row.id: frame.operation for frame in self._state.frames}
        self._claim, self._state = claim, ExecutionState(claim)
        self._step_runner = StepRunner(self._context, self._state, self._timeout_error)
        for frame in self._state.frames:
            self._step_runner.attach(frame, objects.get(frame.row.id))
        return self._step_runner.fail_step(error)

    # -- logs and signals ----------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Label of the root operation for log lines."""
        root = self._claim.root
        return f"{root.entrypoint}[{root.uuid}]"

    def _on_cancelled(self) -> None:
        logger.info(f"{self.label}: cancelled")
        self._emit_operation(states.RUNNING, states.CANCELLED)
        self._reply = Deferred(self._state.root.accumulated)

    def _emit_end(self, frame: OperationFrame) -> None:
        """Log the end of an operation that has no hooks of its own, with the log lines of an operation in memory."""
        operation, outcome = frame.operation, frame.outcome
        if operation is None:
            old, new = states.RUNNING, frame.status
            name = frame.row.entrypoint.rpartition(".")[2]
            logger.info(f"{name}.SetStatus: {frame.row.entrypoint}[{frame.row.uuid}] status update '{old}' -> '{new}'")
            return
        operation.result = outcome
        hook = operation._onsuccess if frame.status == states.SUCCESS else operation._onerror
        returned = hook(operation.result)
        if frame is self._state.root:
            self._reply = returned

    def _emit_operation(self, old: str, new: str) -> None:
        root = self._claim.root
        result = None if new == states.RUNNING else copy_result(self._state.root.outcome)
        self._context.emit_operation_changed(root.uuid, root.entrypoint, old, new, result)

    def _emit_tasks(self, checkpoint: Checkpoint) -> None:
        if not signals.task_changed.receivers:
            return
        for outcome in checkpoint.outcomes:
            signals.emit(
                signals.task_changed,
                self._context.registry,
                operation=self._claim.root.uuid,
                position=outcome.position,
                new=outcome.status,
                attempt=outcome.number,
                error=outcome.error,
            )


def _retries_exhausted(claim: Claim) -> StoreError:
    died = claim.root.claim_count - 1
    return StoreError(f"{died} consumers died during this step: find the cause, then resume the operation")
