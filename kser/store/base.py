"""The contract of every store of operations.

A store holds rows (:mod:`kser.store.model`) and updates them. It does not decide which steps an operation has and in
which order the steps run, because :mod:`kser.durable` decides that.

**Time.** Every time is a number of seconds since 1970, by the store's clock. Only the store reads this clock. Callers
pass durations in seconds instead of times.

**Fencing.** A *claim* increments the ``epoch`` of a root, and the release of a claim increments ``epoch`` again. Every
write of a worker contains the epoch of its claim. If another worker has claimed the root since then, the write changes
nothing and raises :class:`kser.errors.FencedError`.

**Next check.** ``next_check_at`` is the time at which the reaper checks a root. While the root is claimed, it is the
end of the lease. Otherwise it is the time at which the reaper sends the step, for the first time or again. It is None
once the operation has ended.

**Repeated calls.** After :class:`kser.errors.StoreUnavailable`, the caller cannot know whether the call took effect. So
the caller may repeat each call with the same arguments. If the first call took effect, the repeated call returns the
same value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from kser.store.model import (
    Checkpoint,
    Claim,
    ClaimRefused,
    ClaimRequest,
    DueStep,
    NewOperation,
    OperationQuery,
    OperationRow,
    OperationSnapshot,
    Page,
    TaskRow,
)


class Store(ABC):
    """A database of operations. All methods are thread-safe.

    Every method raises :class:`kser.errors.StoreUnavailable` if the database cannot be reached or cannot be used now,
    and :class:`kser.errors.StoreError` if the database rejects the call.
    """

    #: The address without passwords, for logs and error texts.
    name: str

    @abstractmethod
    def check(self) -> None:
        """Check that the database has the schema that this code needs.

        :raises kser.errors.SchemaMismatch: the schema is missing or incompatible; the error names the command to run.
        """

    @abstractmethod
    def save(self, operation: NewOperation, request: ClaimRequest | None = None) -> Claim | ClaimRefused | int:
        """Store an operation with all its tasks, and claim it if ``request`` is given, in one transaction.

        After the call, the first step is ready and is not sent yet. If the caller does not send the step, the reaper
        does. A claim on an operation that this call stored is always granted.

        :return: the claim, or the ``id`` of the operation if ``request`` is None. If the uuid is already stored, the
            call changes nothing and returns a ClaimRefused (``stale``), even if the operations are identical.
        """

    @abstractmethod
    def claim(self, uuid: str, step: str, request: ClaimRequest) -> Claim | ClaimRefused | None:
        """Claim a root if ``step`` is the uuid of its current :class:`kser.store.model.StepMessage`.

        The claim is one compare-and-set. It succeeds if the status is PENDING or RUNNING, the root has no owner or its
        lease has expired, and ``due_at`` has passed. It increments ``epoch`` and ``claim_count``, sets the status to
        RUNNING, stores the owner, the token and the end of the lease, and stores ``started_at`` at the first claim. It
        changes nothing else. A claim also succeeds if ``claim_count`` has already reached ``max_claims``; such a claim
        is marked as ``exhausted``.

        :param uuid: uuid of the root.
        :return: the claim, or the refusal with its reason, or None if no root with this uuid is stored.
        """

    @abstractmethod
    def get_operation(self, uuid: str) -> OperationRow | None:
        """Return the row of an operation, which may be a root or nested, or None if the operation is not stored."""

    @abstractmethod
    def get_tasks(self, operation_id: int) -> Sequence[TaskRow]:
        """Return the tasks of an operation, ordered by position."""

    @abstractmethod
    def get_task(self, operation_id: int, position: int) -> TaskRow | None:
        """Return the task of an operation at a position, or None if the operation has no task there."""

    @abstractmethod
    def get_children(self, root_id: int) -> Sequence[OperationRow]:
        """Return the rows of all operations nested in a root, in no particular order."""

    @abstractmethod
    def checkpoint(self, checkpoint: Checkpoint) -> str:
        """Record the outcome of a step.

        The store records the checkpoint only if the root is RUNNING, the epoch of the root equals the epoch of the
        checkpoint, and every operation is at the ``stored_step`` and ``stored_phase`` of its update. If cancellation of
        the root was requested, the root becomes CANCELLED in the same transaction, whatever status its own update
        contains. The task outcomes and the other updates are still recorded, and nested operations that have not ended
        by then become CANCELLED too. An event ``ended`` with CANCELLED replaces the event ``ended`` of the root in
        ``events``.

        Releasing the claim increments ``epoch``. The end of the operation releases the claim too. After a release, the
        step is ready after ``delay`` seconds, and the reaper checks it at that time. Without a delay, the step is ready
        immediately, and the reaper checks it after :data:`kser.store.model.RESEND_UNSENT_AFTER` seconds. The checkpoint
        sets ``claim_count`` and ``send_count`` to 0, and sets ``ended_at`` of each operation that ends. Checkpoints of
        several threads may share a transaction. The rejection of one checkpoint does not affect the others.

        :return: the status of the root.
        :raises kser.errors.FencedError: another worker has claimed the root, or the root has ended. Nothing was
            recorded.
        :raises kser.errors.StoreError: the database rejects the data. Nothing was recorded.
        """

    @abstractmethod
    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        """Renew the leases of claims, including expired leases, so that they end ``lease`` seconds from now.

        :param claims: the claims, each as a pair ``(root_id, epoch)``.

        :return: the ``root_id`` of each renewed claim. ``owner`` has lost every claim whose ``root_id`` is not
            in this set.
        """

    @abstractmethod
    def mark_sent(self, steps: Iterable[tuple[int, int]], resend_after: float) -> None:
        """Record that the current steps of roots were sent; claimed roots are unchanged.

        :param steps: the roots, each as a pair ``(root_id, epoch)``.

        :param resend_after: seconds after which the reaper sends a step again if no consumer has claimed it. The delay
            doubles with each send, up to :data:`kser.store.model.MAX_RESEND_DELAY`.
        """

    @abstractmethod
    def take_due_steps(self, limit: int, consumer: str, *, expired: bool) -> Sequence[DueStep]:
        """Reserve roots whose steps are due for sending, so that no other caller sends these steps.

        The caller has :data:`kser.store.model.SEND_GRACE` seconds to send a step and to record the send with
        :meth:`mark_sent`. A root with an expired lease loses its owner, but the epoch of that owner stays valid until
        the next claim. The store adds an event to each reserved root.

        :param expired: True to include roots whose lease has expired.
        """

    @abstractmethod
    def postpone_send(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        """Postpone steps that could not be sent: they become due in ``wait`` seconds.

        :param steps: the roots, each as a pair ``(root_id, epoch)``.
        """

    @abstractmethod
    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        """Cancel a root. A root that has ended is unchanged.

        If the root has no valid lease, the root and all nested operations that have not ended become CANCELLED
        immediately; the call increments ``epoch`` and clears the token. If the root has a valid lease, the call sets
        ``cancel_requested``, and the next checkpoint cancels the root.

        :return: the row of the root after the call, or None if no root with this uuid is stored.
        """

    @abstractmethod
    def resume(self, uuid: str, epoch: int, token: str) -> OperationRow | None:
        """Resume a FAILED or CANCELLED root at its first task that is not SUCCESS.

        If that task is an operation that has started, the same rule selects a task in it, down to the innermost
        operation. Each selected task becomes PENDING and current (phase RUN_TASK), with a blank result, and
        ``attempts_before_resume`` is set to its number of attempts. The operations that contain the selected tasks
        become RUNNING. An operation that was never built gets the phase BUILD. An operation whose tasks are all SUCCESS
        gets the phase END_SUCCESS.

        The call increments ``epoch`` and stores ``token``. It clears the result, the end and the cancellation, and sets
        ``claim_count`` and ``send_count`` to 0. The step is then ready and not sent. In a distributed root, the step
        message is the message of the task, or of the operation to build or end. In a local root, the step message stays
        the message of the root.

        :param epoch: the epoch in the row that the caller has read.
        :param token: the random token of this resume. A repeated call has the same token and changes nothing. A
            concurrent call has another token and is rejected.
        :return: the row of the root after the call, or None if no root with this uuid is stored.
        :raises kser.errors.StateConflict: the root is neither FAILED nor CANCELLED, or its epoch is not ``epoch``
            because the root has changed since the caller read it.
        """

    @abstractmethod
    def snapshot(self, uuid: str) -> OperationSnapshot | None:
        """Return the full snapshot of an operation, which may be a root or nested, or None if it is not stored."""

    @abstractmethod
    def find(self, query: OperationQuery, limit: int, after: str | None = None) -> Page:
        """Return a page of the operations that match a query, newest first.

        :param after: the cursor of the previous page.
        :raises kser.errors.UsageError: ``after`` is not a cursor.
        """

    @abstractmethod
    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        """Delete at most ``limit`` ended roots, with all rows that belong to them.

        :param older_than: seconds that must have passed since a root ended.
        :return: the number of deleted roots. A number below ``limit`` means that no more such roots are left.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all resources."""
