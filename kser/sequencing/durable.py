"""Execution of a stored operation: one claim, one checkpoint per step, until the claim is released.

A step is the work of one transaction: build an operation, run a task, choose the next task, or end an operation
(:mod:`kser.durable.step_runner`). In one consumer, the same execution runs step after step. Over the consumers, each
step is sent to a consumer that knows its class.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from kser import signals
from kser import status as states
from kser.controller import user_code_guard
from kser.delivery import Deferred, current_attempt
from kser.errors import FencedError, KserError, StoreError, StoreUnavailable
from kser.results import copy_result
from kser.sequencing.means import Means
from kser.sequencing.operation import Operation
from kser.sequencing.steps import Steps
from kser.sequencing.track import Frame, Track
from kser.store.rows import START, TASK, Checkpoint, Claim, Move, Note, Target

logger = logging.getLogger(__name__)


class Run:
    """Execution of an operation under one claim.

    :param means: the durable context of this process.
    :param claim: the claim to work under.
    :param operation: the root's object, if it was just built.
    :param timeout_error: the error of a timed-out attempt at the current task, in which another thread is still stuck.
        The execution records this error and releases the claim.
    """

    def __init__(
        self, means: Means, claim: Claim, operation: Operation | None = None, verdict: Exception | None = None
    ) -> None:
        self._means = means
        self._claim = claim
        self._verdict = verdict
        self._delivery = current_attempt.get()
        self._track = Track(claim)
        self._steps = Steps(means, self._track, verdict)
        self._steps.adopt(self._track.root, operation)
        self._given_back = False

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
        return self._delivery is not None and self._delivery.abandoned

    @property
    def claim(self) -> Claim:
        """The claim of this execution."""
        return self._claim

    def go(self) -> Any:
        """Run steps until the claim is released.

        :return: a Result, or :class:`kser.attempt.Deferred`.
        """
        self._means.hold(self)
        try:
            if self._claim.epoch == 1:
                self._tell_operation(states.PENDING, states.RUNNING)
            if self._claim.root.cancel_requested:
                # The previous owner died before cancelling. Releasing the claim cancels the operation.
                self.release()
                self._given_back, self._steps.answer = True, Deferred(self._track.root.total)
            elif self._claim.exhausted:
                error = _exhausted(self._claim)
                self._track.note(Note("exhausted", text=error.message))
                self._steps.give_up(error)
                self._go_on(*self._commit())
            while not self._given_back:
                self._take()
        except FencedError as lost:
            self._given_back = True
            logger.warning(f"{self.label}: the outcome of its step is dropped: {lost.message}")
            return Deferred(self._track.root.total)
        finally:
            self._means.let_go(self)
            if not self._given_back:
                with suppress(KserError):
                    self.release()
        return self._steps.answer

    def release(self) -> None:
        """Release the claim at the stored position, even if a step still runs under it, and send the current step."""
        root, epoch = self._claim.root, self._claim.epoch
        row = self._means.store.peek(root.uuid)
        if row is None or row.status != states.RUNNING or row.epoch != epoch:
            return
        stay = Move(row.id, row.step, row.phase, row.step, row.phase, row.status, row.so_far, row.result)
        token, notes = root.token or "", (Note("released"),)
        status = self._means.store.checkpoint(
            Checkpoint(row.id, epoch, token, self._means.owner, (stay,), notes=notes, keep=False)
        )
        if status == states.CANCELLED:
            self._cancelled()
            return
        # Wait for the delivery, because the process may exit next; a later delivery report would be lost.
        self._means.send(row.target, row.uuid, (row.id, epoch + 1))

    # -- recording -----------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Run a step and record its outcome."""
        try:
            with user_code_guard:
                self._steps.take()
                recorded = self._commit()
        except (FencedError, StoreUnavailable):
            raise
        except Exception as exc:
            # A StoreError is permanent and any other exception would recur immediately, so fail the step instead of
            # retrying it.
            logger.exception(f"{self.label}: the outcome of a step cannot be recorded, so the step fails")
            self._start_over(exc)
            recorded = self._commit()
        self._go_on(*recorded)

    def _commit(self) -> tuple[Checkpoint, str, Target | None]:
        """Record the outcome of the step.

        :return: the checkpoint, the root's status, and the message for the next step (None if unchanged).
        """
        track, delay = self._track, self._steps.delay
        keep, target = self._following()
        stays = not keep and target is None and delay is None
        checkpoint = track.checkpoint(self._means.owner, keep, target, delay or 0, (Note("released"),) if stays else ())
        status = self._means.patience.call(lambda: self._means.store.checkpoint(checkpoint))
        return checkpoint, status, target

    def _go_on(self, checkpoint: Checkpoint, status: str, target: Target | None) -> None:
        """Emit the events of a recorded checkpoint, and send the next step if it does not run in this execution."""
        track, delay, keep = self._track, self._steps.delay, checkpoint.keep
        self._given_back = track.is_over or status == states.CANCELLED or not keep
        if self._given_back:
            # Unregister the claim before sending the next step. The store has released it, so during a slow send the
            # heartbeat would report the claim as lost.
            self._means.let_go(self)
        ended = list(track.ended)
        track.recorded()
        self._tell_tasks(checkpoint)
        if status == states.CANCELLED:
            self._cancelled()
            return
        for frame in ended:
            self._tell_end(frame)
        if track.is_over:
            self._tell_operation(states.RUNNING, status)
        elif delay is not None:
            self._steps.answer = Deferred(self._steps.answer or track.root.total)
            if not delay:
                # Send a retry without delay from here. In the store it looks like a step that a consumer is about to
                # send, so the reaper would wait UNSENT_AFTER seconds.
                self._send(track.root.row.target)
        elif self._given_back:
            self._hand_over(target)

    def _following(self) -> tuple[bool, Target | None]:
        """Return whether to keep the claim, and the message for the next step (None if unchanged)."""
        track, frame = self._track, self._track.top
        outer = current_attempt.get()
        goes_on = self._verdict is None and not (outer is not None and outer.shutting_down)
        if track.is_over:
            return True, None
        if self._steps.delay is not None:
            return False, None
        if not track.distributed:
            return goes_on, None
        if frame.phase == TASK:
            return False, self._target_of_task(frame)
        known = self._means.classes.find(frame.row.entrypoint) is not None
        return goes_on and known and frame.phase != START, frame.target

    def _target_of_task(self, frame: Frame) -> Target:
        place = frame.row.id, frame.step
        built = self._track.built
        if built is not None and built.operation_id == frame.row.id:
            new = built.tasks[frame.step]
            return Target(new.uuid, new.entrypoint, new.topic)
        row = self._claim.following
        if row is None or (row.operation_id, row.position) != place:
            row = self._means.patience.call(lambda: self._means.store.task(*place))
        assert row is not None, "the step is below the number of tasks"
        return Target(row.uuid, row.entrypoint, row.topic)

    def _hand_over(self, target: Target | None) -> None:
        root = self._track.root
        if not self._track.distributed or self._steps.answer is None or self._verdict is not None:
            self._steps.answer = Deferred(root.total)
        self._send(target or root.row.target)

    def _send(self, target: Target) -> None:
        """Send a step; during a shutdown of the consumer, wait for the delivery."""
        ending = self._delivery is not None and self._delivery.shutting_down
        send = self._means.send if ending else self._means.post
        send(target, self._claim.root.uuid, (self._claim.id, self._claim.epoch + 1))

    def _start_over(self, error: Exception) -> None:
        """Discard the outcome of the step, reload the claim and fail the step with ``error``."""
        root = self._claim.root
        claimant = self._means.claimant()._replace(token=root.token or "")
        again = self._means.patience.call(lambda: self._means.store.claim(root.uuid, root.target.uuid, claimant))
        if not isinstance(again, Claim) or again.epoch != self._claim.epoch:
            raise FencedError(f"the claim on operation {root.uuid} was lost while a step was recorded")
        objects = {frame.row.id: frame.operation for frame in self._track.frames}
        self._claim, self._track = again, Track(again)
        self._steps = Steps(self._means, self._track, self._verdict)
        for frame in self._track.frames:
            self._steps.adopt(frame, objects.get(frame.row.id))
        self._steps.give_up(error)

    # -- logs and signals ----------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Label of the root operation for log lines."""
        root = self._claim.root
        return f"{root.entrypoint}[{root.uuid}]"

    def _cancelled(self) -> None:
        logger.info(f"{self.label}: cancelled")
        self._tell_operation(states.RUNNING, states.CANCELLED)
        self._steps.answer = Deferred(self._track.root.total)

    def _tell_end(self, frame: Frame) -> None:
        """Log the end of an operation without hooks of its own, with the same lines as an operation in memory."""
        operation, outcome = frame.operation, frame.outcome
        if operation is None:
            old, new = states.RUNNING, frame.status
            name = frame.row.entrypoint.rpartition(".")[2]
            logger.info(f"{name}.SetStatus: {frame.row.entrypoint}[{frame.row.uuid}] status update '{old}' -> '{new}'")
            return
        operation.result = outcome
        hook = operation._onsuccess if frame.status == states.SUCCESS else operation._onerror
        returned = hook(operation.result)
        if frame is self._track.root:
            self._steps.answer = returned

    def _tell_operation(self, old: str, new: str) -> None:
        root = self._claim.root
        signals.emit(
            signals.operation_changed,
            self._means.registry,
            uuid=root.uuid,
            entrypoint=root.entrypoint,
            old=old,
            new=new,
            result=None if new == states.RUNNING else copy_result(self._track.root.outcome),
        )

    def _tell_tasks(self, checkpoint: Checkpoint) -> None:
        if not signals.task_changed.receivers:
            return
        for end in checkpoint.ends:
            signals.emit(
                signals.task_changed,
                self._means.registry,
                operation=self._claim.root.uuid,
                position=end.position,
                new=end.status,
                attempt=end.number,
                error=end.error,
            )


def _exhausted(claim: Claim) -> StoreError:
    died = claim.root.claims - 1
    return StoreError(f"its consumer died {died} times in this step: find the cause, then resume the operation")
