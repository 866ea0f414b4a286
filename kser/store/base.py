"""The contract of every store of operations.

A store holds rows (:mod:`kser.store.model`) and updates them. The steps of an operation and their order are decided in
:mod:`kser.durable`.

**Time.** Every time is in seconds since 1970 by the store's clock, and is read inside the store. Callers pass waits in
seconds.

**Fencing.** A *claim* increments ``epoch``, and so does its release. Every write of a worker carries the epoch of its
claim. After a claim by another worker such a write changes nothing (:class:`kser.errors.FencedError`).

**Next check.** ``next_check_at`` is the time at which the reaper checks a root: the end of the lease while the root is
claimed, otherwise the time at which its step must be sent (again). It is None once the operation has ended.

**Repeated calls.** After :class:`kser.errors.StoreUnavailable` the caller cannot know whether the call took effect.
Each call may be repeated with the same arguments: if the first call took effect, the repeated one returns the same
value.
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
    """A database of operations. Thread-safe.

    Every method raises :class:`kser.errors.StoreUnavailable` when the database cannot be reached or does not work now,
    and :class:`kser.errors.StoreError` when the database rejects this call.
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

        The first step is ready and unsent; the reaper sends it unless the caller does. The claim on an operation that
        this call stored is always granted.

        :return: the claim; without ``request`` the operation's ``id``. A ClaimRefused (``stale``) when the uuid is
            already stored, even for an identical operation; then the call changes nothing.
        """

    @abstractmethod
    def claim(self, uuid: str, step: str, request: ClaimRequest) -> Claim | ClaimRefused | None:
        """Claim a root if ``step`` is the uuid of its current :class:`kser.store.model.StepMessage`.

        One compare-and-set: the status is PENDING or RUNNING, the root has no owner or its lease has expired, and
        ``due_at`` has passed. The claim increments ``epoch`` and ``claim_count``, sets the status to RUNNING, and
        changes nothing else. A root whose ``claim_count`` had reached ``max_claims`` is claimed too; its claim is
        marked ``exhausted``.

        :param uuid: uuid of the root.
        :return: None when no such root is stored.
        """

    @abstractmethod
    def get_operation(self, uuid: str) -> OperationRow | None:
        """Return the row of an operation, nested or not; None when it is not stored."""

    @abstractmethod
    def get_tasks(self, operation_id: int) -> Sequence[TaskRow]:
        """Return the tasks of an operation, ordered by position."""

    @abstractmethod
    def get_task(self, operation_id: int, position: int) -> TaskRow | None:
        """Return the task of an operation at a position; None when the position is empty."""

    @abstractmethod
    def get_children(self, root_id: int) -> Sequence[OperationRow]:
        """Return the rows of all operations nested in a root, in no particular order."""

    @abstractmethod
    def checkpoint(self, checkpoint: Checkpoint) -> str:
        """Record the outcome of a step.

        The checkpoint is recorded only if the root is RUNNING, its epoch is the checkpoint's, and every operation is at
        the stored step and phase that its update names. If cancellation of the root was requested, the root becomes
        CANCELLED in the same transaction, regardless of its own update. The task outcomes and the other updates are
        recorded unchanged, and nested operations that have not ended by then become CANCELLED too. An event ``ended``
        replaces the one in ``events``.

        Releasing the claim, also at the end of the operation, increments ``epoch``. The step is then ready after
        ``delay`` seconds, and the reaper checks it at that time, or after
        :data:`kser.store.model.RESEND_UNSENT_AFTER` without a delay. ``claim_count`` and ``send_count`` restart at 0.
        ``ended_at`` is set for each operation that ends. Checkpoints of several threads may share a transaction; a
        rejected one does not affect the others.

        :return: the status of the root.
        :raises kser.errors.FencedError: another worker has claimed the root, or it has ended; nothing was recorded.
        :raises kser.errors.StoreError: the database rejects the data; nothing was recorded.
        """

    @abstractmethod
    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        """Renew the leases of claims, each ``(root_id, epoch)``, to ``lease`` seconds from now; also expired ones.

        :return: the ``root_id`` of each renewed claim. ``owner`` has lost every claim whose ``root_id`` is not
            in this set.
        """

    @abstractmethod
    def mark_sent(self, steps: Iterable[tuple[int, int]], resend_after: float) -> None:
        """Record that the current steps of roots, each ``(root_id, epoch)``, were sent. Claimed roots are unchanged.

        :param resend_after: seconds after which an unclaimed step is sent again; doubled with each send, up to
            :data:`kser.store.model.MAX_RESEND_DELAY`.
        """

    @abstractmethod
    def take_due_steps(self, limit: int, consumer: str, *, expired: bool) -> Sequence[DueStep]:
        """Reserve the roots whose steps are due for sending, each for this caller only.

        The caller has :data:`kser.store.model.SEND_GRACE` seconds to send a step and to record that with
        :meth:`mark_sent`. A root with an expired lease loses its owner, but the epoch of that owner stays valid until
        the next claim. Each root gets an event.

        :param expired: True to include roots whose lease has expired.
        """

    @abstractmethod
    def postpone_send(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        """Make steps that could not be sent, each ``(root_id, epoch)``, due again in ``wait`` seconds."""

    @abstractmethod
    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        """Cancel a root. A root that has ended is unchanged.

        Without a valid lease the root becomes CANCELLED at once, with all nested operations that have not ended;
        ``epoch`` is incremented and the token cleared. With a valid lease ``cancel_requested`` is set, for the next
        checkpoint.

        :return: the row of the root after the call; None when no such root is stored.
        """

    @abstractmethod
    def resume(self, uuid: str, epoch: int, token: str) -> OperationRow | None:
        """Resume a FAILED or CANCELLED root at the first task that is not SUCCESS, down to the innermost operation.

        That task becomes PENDING and current (phase RUN_TASK), with a blank result and ``attempts_before_resume`` set
        to its number of attempts. Its operations become RUNNING. An operation that was never built gets the phase
        BUILD; one whose tasks are all SUCCESS gets the phase END_SUCCESS.
        ``epoch`` is incremented and ``token`` stored; the result, the end and the cancellation are cleared;
        ``claim_count`` and ``send_count`` restart at 0; the step is ready and unsent. The step message of a distributed
        root is that of the task, or of the operation to build or end; the step message of a local root stays that of
        the root.

        :param epoch: epoch of the row that the caller has read.
        :param token: random token of this resume. A repeated call carries the same token and changes nothing; a
            concurrent call carries another one and is rejected.
        :return: the row of the root after the call; None when no such root is stored.
        :raises kser.errors.StateConflict: the root is neither FAILED nor CANCELLED, or has another epoch, because it
            has changed since the caller read it.
        """

    @abstractmethod
    def snapshot(self, uuid: str) -> OperationSnapshot | None:
        """Return the full snapshot of an operation, nested or not; None when it is not stored."""

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
        :return: the number of deleted roots; less than ``limit`` when no more are left.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all resources."""
