"""Execution of a stored operation: the work of one worker under one claim, with one checkpoint per step.

To execute an operation that is already stored, a consumer claims the operation and calls ``execute_claim``. For a new
operation, ``DurableStart`` stores and claims the operation in one transaction, and then executes it.

A step builds the tasks of an operation, runs a task, chooses the next task, or ends an operation
(:mod:`kser.durable.step_runner`). In a local operation, the same execution runs all steps one after the other. In a
distributed operation, kser sends a message for each task, and any consumer in which the class of the task is registered
runs the task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cdumay_result import Result

from kser import signals
from kser import status as states
from kser.attempt import Deferred, current_attempt, raise_if_decided, user_code_guard
from kser.durable.context import DurableContext
from kser.durable.execution_state import ExecutionState, OperationFrame
from kser.durable.serialization import new_operation
from kser.durable.step_runner import NO_REPLY, StepOutcome, StepRunner
from kser.errors import FencedError, KserError, StoreError, StoreUnavailable
from kser.escaping import escape_lines
from kser.results import copy_result
from kser.sequencing.operation import Operation
from kser.sequencing.runner import Runner, is_distributed, prepare_operation
from kser.store.model import (
    IMMEDIATE_TAKEOVERS,
    BuiltTasks,
    Checkpoint,
    Claim,
    ClaimRefused,
    DueReason,
    DueStep,
    Mode,
    NewEvent,
    OperationRow,
    OperationUpdate,
    Phase,
    StepMessage,
)
from kser.store.transitions import needed_entrypoints

logger = escape_lines(logging.getLogger(__name__))


def fail_unknown_class(context: DurableContext, step: DueStep) -> None:
    """Fail a due step, because the consumers of its topic do not know a class that the step needs.

    The operation can be resumed. A hook for its end runs later, in a consumer that knows the class of the operation.

    :param context: the durable context of this process.
    """
    request = context.new_claim_request(step.target.topic, epoch=step.epoch)
    claim = context.store.direct.claim(step.uuid, step.target.uuid, request)
    if isinstance(claim, Claim):
        # A process that consumes another topic may know all of them.
        names = set(context.unknown_classes(claim.root) or needed_entrypoints(claim.root))
        error = StoreError(f"no consumer of topic {step.target.topic} knows class {' and '.join(sorted(names))}")
        Execution(context, claim, failure=error).run()


def execute_claim(context: DurableContext, claim: Claim, timeout_error: Exception | None = None) -> Any:
    """Execute a stored operation under a claim until the claim is released.

    :param context: the durable context of this process.
    :param claim: the claim under which the execution works.
    :param timeout_error: set if an attempt at the current task has timed out and its thread still runs: the timeout
        error of this attempt. Otherwise None. The execution records this error as the outcome of the attempt, and
        releases the claim.
    :return: a Result, or :class:`kser.attempt.Deferred` if this execution has no result for the message.
    """
    return Execution(context, claim, timeout_error=timeout_error).run()


@dataclass(frozen=True, eq=False, slots=True)
class DurableStart:
    """Runner that stores an operation that was built from a message, and then executes the operation.

    The runner stores only the object that was built from the message. If user code runs a copy of this object, the copy
    runs without being stored.

    :param context: the durable context of this process.
    :param operation: the object that was built from the message.
    :param params: JSON of the message's params.
    :param on_duplicate: function that handles the message if the operation is already stored. The arguments are the row
        of the root, the path of the operation's class, and ``params``.
    """

    context: DurableContext
    operation: Operation
    params: str
    on_duplicate: Callable[[OperationRow, str, str], Any]

    def run(self, operation: Operation, result: Result | None) -> Any:
        context = self.context
        if operation is not self.operation:
            in_memory: Runner = context.registry.runner
            return in_memory.run(operation, result)
        prepare_operation(operation, result)
        # If the attempt has timed out by now, the consumer already counts it as failed. Raise in this case, so that the
        # operation of a failed message is not stored.
        raise_if_decided(operation)
        attempt = current_attempt.get()
        # Steps may run only in consumers of their topic. The consumers of the record's topic know this operation, and
        # perhaps no consumer reads the topic of its class.
        topic = (attempt.topic if attempt else "") or context.registry.topic_for(operation)
        mode = Mode.DISTRIBUTED if is_distributed(operation) else Mode.LOCAL
        new = new_operation(operation, mode, topic, context.registry.settings.first_topic(topic), self.params)
        saved = context.store.save(new, context.new_claim_request() if mode == Mode.LOCAL else None)
        if isinstance(saved, ClaimRefused):
            # Another consumer has stored the same operation in the meantime.
            return self.on_duplicate(saved.root, new.entrypoint, self.params)
        if attempt is not None:
            attempt.ack()
        signals.emit_operation_changed(context.registry, new.uuid, new.entrypoint, None, states.PENDING)
        if isinstance(saved, int):
            context.send_nowait(new.target, new.uuid, (saved, 0))
            return Deferred(operation.result)
        return Execution(context, saved, operation).run()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Put None in place of this runner into a deep copy or a pickle of the operation.

        The reason is that the durable context cannot be copied.
        """
        return type(None), ()


class Execution:
    """Execution of a stored operation under one claim.

    :param context: the durable context of this process.
    :param claim: the claim under which the execution works.
    :param operation: the object of the root operation, if the object already exists.
    :param timeout_error: set if an attempt at the current task has timed out and its thread still runs: the timeout
        error of this attempt. Otherwise None. The execution records this error as the outcome of the attempt, and
        releases the claim.
    :param failure: the error with which to fail the current step without running it; None to run the step. After the
        failure, the execution releases the claim.
    """

    def __init__(
        self,
        context: DurableContext,
        claim: Claim,
        operation: Operation | None = None,
        timeout_error: Exception | None = None,
        failure: StoreError | None = None,
    ) -> None:
        self._context = context
        #: The claim of this execution.
        self.claim = claim
        #: Id of the root and epoch of the claim.
        self.key = claim.id, claim.epoch
        self._timeout_error = timeout_error
        self._failure = failure
        #: True if the row delays a takeover, because several consumers have died during the step.
        self._delays_takeover = claim.root.claim_count > IMMEDIATE_TAKEOVERS
        self._attempt = current_attempt.get()
        self._state = ExecutionState(claim, context.owner, operation)
        self._step_runner = StepRunner(context, self._state, timeout_error)
        self._released = False
        #: The result to return for the message: the reply of the last step that had a reply.
        self._reply: Any = None

    @property
    def is_abandoned(self) -> bool:
        """True if the consumer has abandoned the attempt that this execution runs in."""
        return self._attempt is not None and self._attempt.abandoned

    @property
    def _is_shutting_down(self) -> bool:
        return self._attempt is not None and self._attempt.shutting_down

    def run(self) -> Any:
        """Run steps until the claim is released.

        :return: a Result, or :class:`kser.attempt.Deferred` if this execution has no result for the message.
        """
        claim, root = self.claim, self._state.root
        self._context.register_claim(self)
        try:
            if claim.epoch == 1:
                self._emit_operation(states.PENDING, states.RUNNING)
            if root.row.cancel_requested:
                # A client requested to cancel the operation, but the previous owner died before the next checkpoint. So
                # release the claim: the checkpoint of the release sets the status CANCELLED.
                self.release()
                self._unregister()
                self._reply = Deferred(root.accumulated)
            elif self._failure is not None or claim.exhausted:
                error = self._failure or _retries_exhausted(claim)
                outcome = self._step_runner.fail_step(error)
                self._after_checkpoint(outcome, *self._checkpoint(outcome, NewEvent("exhausted", text=error.message)))
            while not self._released:
                self._run_step()
        except FencedError as error:
            self._unregister()
            logger.warning(f"{self.label}: the outcome of its step is dropped: {error.message}")
            return Deferred(self._state.root.accumulated)
        finally:
            if not self._released:
                self._unregister()
                with suppress(KserError):
                    self.release()
        return self._reply

    def _unregister(self) -> None:
        """Unregister the claim, so that the heartbeat ignores it, and run no further step."""
        self._released = True
        self._context.release_claim(self)

    def release(self) -> None:
        """Release the claim, so that any consumer can take over the stored step at once.

        The operation stays at the position of its last checkpoint. Another thread may still run a step under the claim.
        The store then rejects the checkpoint of this step.
        """
        root, epoch, store = self.claim.root, self.claim.epoch, self._context.store.direct
        row = store.get_operation(root.uuid)
        if row is None or row.status != states.RUNNING or row.epoch != epoch:
            return
        update = OperationUpdate(
            row.id, row.step, row.phase, row.step, row.phase, row.status, row.accumulated, row.result
        )
        token, events = root.token or "", (NewEvent("released"),)
        status = store.checkpoint(
            Checkpoint(
                row.id,
                epoch,
                token,
                self._context.owner,
                (update,),
                events=events,
                keep=False,
                due_reason=DueReason.RELEASED,
                current_entrypoints=row.current_entrypoints,
            )
        )
        if status == states.CANCELLED:
            self._on_cancelled()

    # -- recording -----------------------------------------------------------------------------------------------------

    def _run_step(self) -> None:
        """Run a step, and record the outcome of the step."""
        try:
            with user_code_guard:
                outcome = self._step_runner.run_next()
                recorded = self._checkpoint(outcome)
        except (FencedError, StoreUnavailable):
            raise
        except Exception as exc:
            # A retry would not help. A StoreError is permanent, the store repeats its calls during an outage by itself,
            # and any other exception has a cause that would still exist at an immediate retry. So fail the step.
            logger.exception(f"{self.label}: the outcome of a step cannot be recorded, so the step fails")
            outcome = self._reload_and_fail(exc)
            recorded = self._checkpoint(outcome)
        self._after_checkpoint(outcome, *recorded)

    def _checkpoint(self, outcome: StepOutcome, *events: NewEvent) -> tuple[Checkpoint, str]:
        """Record the outcome of a step in a checkpoint.

        :param events: events to record before the events of the step.
        :return: the checkpoint and the status of the root.
        """
        checkpoint, delay = outcome.change.checkpoint, outcome.retry_in
        keep, target = self._next_hop(outcome)
        if events or not keep or target is not None:
            released = [] if keep or target is not None or delay is not None else [NewEvent("released")]
            checkpoint = checkpoint._replace(
                events=(*events, *checkpoint.events, *released),
                target=target,
                keep=keep,
                delay=delay or 0,
                due_reason=self._due_reason(target, delay),
            )
        status = self._context.store.checkpoint(checkpoint)
        if self._delays_takeover and checkpoint.keep and not states.is_final(status):
            # The delay before a takeover belongs to the step that has ended, and a renewal removes it from the row.
            self._delays_takeover = False
            self._context.store.renew([self.key], self._context.owner, self._context.settings.lease)
        return checkpoint, status

    def _after_checkpoint(self, outcome: StepOutcome, checkpoint: Checkpoint, status: str) -> None:
        """Emit signals and log lines after a checkpoint, and send the next step if this execution does not run it."""
        root, change, delay = self._state.root, outcome.change, outcome.retry_in
        if outcome.reply is not NO_REPLY:
            self._reply = outcome.reply
        if change.is_finished or status == states.CANCELLED or not checkpoint.keep:
            # Unregister the claim before sending the next step. The store has already released the claim. If the claim
            # were still registered during a slow send, the heartbeat would report it as lost.
            self._unregister()
        self._emit_tasks(checkpoint)
        if status == states.CANCELLED:
            self._on_cancelled()
            return
        for frame in change.ended:
            self._emit_end(frame)
        if change.is_finished:
            self._emit_operation(states.RUNNING, status)
        elif delay is not None:
            self._reply = Deferred(self._reply or root.accumulated)
            self._context.note_due(delay)
        elif self._released:
            self._dispatch_next(checkpoint)

    def _next_hop(self, outcome: StepOutcome) -> tuple[bool, StepMessage | None]:
        """Return whether to keep the claim, and the message of the next step.

        The message is None if the message in the store does not change.
        """
        change, frame = outcome.change, self._state.frames[-1]
        if change.is_finished:
            return True, None
        if outcome.retry_in is not None:
            return False, None
        continues = self._timeout_error is None and self._failure is None and not self._is_shutting_down
        if not self._state.distributed:
            # Leave the next task to the other consumers if this process does not know its class.
            path = self._state.unloadable_path
            return continues and (path is None or self._context.loader.lookup(path) is not None), None
        if frame.phase == Phase.RUN_TASK:
            return False, self._target_of_task(frame, change.checkpoint.built)
        row = frame.row
        known = self._context.loader.lookup(row.entrypoint) is not None
        target = StepMessage(row.uuid, row.entrypoint, row.topic)
        return continues and known and frame.phase != Phase.BUILD, target

    def _target_of_task(self, frame: OperationFrame, built: BuiltTasks | None) -> StepMessage:
        position = frame.row.id, frame.step
        if built is not None and built.operation_id == frame.row.id:
            new = built.tasks[frame.step]
            return StepMessage(new.uuid, new.entrypoint, new.topic)
        row = self.claim.next_task
        if row is None or (row.operation_id, row.position) != position:
            row = self._context.store.get_task(*position)
        assert row is not None, "the step is below the number of tasks"
        return StepMessage(row.uuid, row.entrypoint, row.topic)

    def _dispatch_next(self, checkpoint: Checkpoint) -> None:
        """Send the message of the next step if the checkpoint hands it over; a released step is taken over."""
        root = self._state.root
        if not self._state.distributed or self._reply is None or self._timeout_error is not None:
            self._reply = Deferred(root.accumulated)
        if checkpoint.due_reason == DueReason.UNSENT:
            target = checkpoint.target or root.row.target
            self._context.send_nowait(target, root.row.uuid, (self.claim.id, self.claim.epoch + 1))

    def _due_reason(self, target: StepMessage | None, delay: float | None) -> str:
        """Return the reason why the next step is due after a checkpoint that releases the claim.

        A hand-over goes by message. A retry, and a step that this consumer leaves to others, wait for a takeover.
        """
        if delay is not None:
            return DueReason.RETRY
        return DueReason.RELEASED if target is None or self._is_shutting_down else DueReason.UNSENT

    def _reload_and_fail(self, error: Exception) -> StepOutcome:
        """Discard the outcome of the step, reload the claim and fail the step with ``error``.

        :raises kser.errors.FencedError: another worker has claimed the operation.
        """
        claim = self._context.reclaim(self.claim)
        if claim is None:
            raise FencedError(f"the claim on operation {self._state.root.row.uuid} was lost while a step was recorded")
        objects = {frame.row.id: frame.operation for frame in self._state.frames}
        self.claim, self._state = claim, ExecutionState(claim, self._context.owner)
        self._step_runner = StepRunner(self._context, self._state, self._timeout_error)
        for frame in self._state.frames:
            operation = objects.get(frame.row.id)
            if operation is not None:
                frame.attach(operation)
        return self._step_runner.fail_step(error)

    # -- logs and signals ----------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Label of the root operation for log lines."""
        root = self._state.root.row
        return f"{root.entrypoint}[{root.uuid}]"

    def _on_cancelled(self) -> None:
        logger.info(f"{self.label}: cancelled")
        self._emit_operation(states.RUNNING, states.CANCELLED)
        self._reply = Deferred(self._state.root.accumulated)

    def _emit_end(self, frame: OperationFrame) -> None:
        """Log the end of an operation whose class overrides no hook for the end.

        The end of other operations is a step of its own, whose hooks log the end. The log lines are the same as for an
        operation that is not stored.
        """
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
        if not signals.operation_changed.receivers:
            return
        root = self._state.root
        result = None if new == states.RUNNING else copy_result(root.outcome)
        registry, row = self._context.registry, root.row
        signals.emit_operation_changed(registry, row.uuid, row.entrypoint, old, new, result)

    def _emit_tasks(self, checkpoint: Checkpoint) -> None:
        if not signals.task_changed.receivers:
            return
        for outcome in checkpoint.outcomes:
            signals.emit(
                signals.task_changed,
                self._context.registry,
                operation=self._state.root.row.uuid,
                position=outcome.position,
                new=outcome.status,
                attempt=outcome.number,
                error=outcome.error,
            )


def _retries_exhausted(claim: Claim) -> StoreError:
    died = claim.root.claim_count - 1
    return StoreError(f"{died} consumers died during this step: find the cause, then resume the operation")
