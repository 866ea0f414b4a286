"""What the shared database must offer, so that operations survive: the contract of every store.

A store keeps rows (:mod:`kser.store.rows`) and moves them on; what a step *is*, and what follows it, is decided in
:mod:`kser.sequencing`.

**Time** is the store's: every time here is seconds since 1970 by its clock, taken inside the store. Waits go in as
seconds.

**Who may write.** A *claim* raises ``epoch``, and so does giving it back. Everything that a worker writes names the
epoch that it has: after somebody else's claim it changes nothing (:class:`kser.errors.Fenced`).

**When to look again.** ``wake_at`` is when the reaper has to look at a root: the end of the lease while it is claimed,
else when its step is to be sent (again). It is None once the operation has ended.

**Again and again.** After :class:`kser.errors.StoreUnavailable` nobody knows whether the call took effect. Each call
may be repeated with the same arguments: one that took effect answers as it did, or would have, the first time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from kser.store.rows import (
    Checkpoint,
    Claim,
    Claimant,
    Due,
    Found,
    NewOperation,
    OperationRow,
    Page,
    Refusal,
    Stored,
    TaskRow,
)


class Store(ABC):
    """Operations in a database. Safe to share by threads.

    Every method raises :class:`kser.errors.StoreUnavailable` when the database cannot be reached or does not work now,
    and :class:`kser.errors.StoreError` when it refuses this one call.
    """

    #: What must not be said aloud is not in it.
    name: str

    @abstractmethod
    def check(self) -> None:
        """See whether the database has the schema that is needed.

        :raises kser.errors.SchemaMismatch: it has not; the error says what to run.
        """

    @abstractmethod
    def save(self, operation: NewOperation, claimant: Claimant | None = None) -> Claim | Refusal | int:
        """Store an operation with all its tasks, and claim it for ``claimant`` if there is one: one transaction.

        Its step is ready, and unsent; the reaper sends it if nobody does. ``claimant`` may be refused nothing.

        :return: the claim; without a claimant its ``id``. A Refusal (``stale``) when the uuid is taken, which changes
            nothing, also when it is the very same operation.
        """

    @abstractmethod
    def claim(self, uuid: str, step: str, claimant: Claimant) -> Claim | Refusal | None:
        """Claim a root, if ``step`` is the uuid of its current :class:`kser.store.rows.Target`.

        One compare-and-set: the status is PENDING or RUNNING, nobody has it or the lease is over, and it is due. It
        raises ``epoch`` and ``claims``, sets RUNNING, and leaves everything else as it is. One whose ``claims`` were
        ``max_claims`` already is claimed all the same, and said to be ``exhausted``.

        :param uuid: the root's.
        :return: None when there is no such root.
        """

    @abstractmethod
    def peek(self, uuid: str) -> OperationRow | None:
        """The row of an operation, also of an inner one; None when there is none."""

    @abstractmethod
    def tasks(self, operation_id: int) -> Sequence[TaskRow]:
        """The tasks of an operation, in their order."""

    @abstractmethod
    def task(self, operation_id: int, position: int) -> TaskRow | None:
        """One task of an operation; None when there is none at that position."""

    @abstractmethod
    def children(self, root_id: int) -> Sequence[OperationRow]:
        """The rows of all operations inside a root, not in any order."""

    @abstractmethod
    def checkpoint(self, checkpoint: Checkpoint) -> str:
        """Record what came of a step.

        Only if the root is RUNNING, its epoch is the checkpoint's, and each move begins where the operation is. If the
        root is to be cancelled, it is CANCELLED in the same transaction, whatever its move says: the tasks' ends are
        recorded as they are, the other moves too, and inner operations that have not ended then are CANCELLED with
        it; an event ``ended`` says so, in place of the one of ``notes``.

        Giving the claim back, also at the end, raises ``epoch``; then the step is ready ``delay`` seconds later, and
        the reaper looks at it then, or after :data:`kser.store.rows.UNSENT_AFTER` without a delay. ``claims`` and
        ``sends`` begin again at 0. ``ended_at`` is set for each operation that ends. Checkpoints of several threads may
        share a transaction: one that is refused does not touch the others.

        :return: the root's status.
        :raises kser.errors.Fenced: nothing was recorded: somebody else has claimed it, or it has ended.
        :raises kser.errors.StoreError: the database refuses what is to be recorded; nothing was.
        """

    @abstractmethod
    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        """Prolong claims, each ``(root_id, epoch)``, to ``lease`` seconds from now; also one whose lease is over.

        :return: the ``root_id`` of each; those that are missing are not the owner's any more.
        """

    @abstractmethod
    def sent(self, steps: Iterable[tuple[int, int]], resend_after: float) -> None:
        """The current steps of these roots, each ``(root_id, epoch)``, were sent; changes nothing once it is claimed.

        :param resend_after: seconds until it is sent again if nobody claims it; doubled each time, to an hour.
        """

    @abstractmethod
    def take_due(self, limit: int, consumer: str, *, expired: bool) -> Sequence[Due]:
        """Roots whose steps are to be sent now, each for one caller only, which is given
        :data:`kser.store.rows.SENDING` for it, and then says that they are :meth:`sent`.

        They are taken from an owner whose lease is over, whose epoch stays good until somebody else claims. Each gets
        an event.

        :param expired: whether leases that are over count.
        """

    @abstractmethod
    def unsent(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        """These steps, each ``(root_id, epoch)``, were not sent: they are due again in ``wait`` seconds."""

    @abstractmethod
    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        """Cancel a root. An ended one stays as it is.

        When nobody has a lease on it, it is CANCELLED at once, with all operations in it that have not ended;
        ``epoch`` is raised and the token forgotten. Else ``cancel_requested`` is set, for the next checkpoint.

        :return: its row afterwards; None when there is no such root.
        """

    @abstractmethod
    def resume(self, uuid: str) -> OperationRow | None:
        """Let a FAILED or CANCELLED root go on, at the first task that is not SUCCESS, down to the innermost operation.

        That task is PENDING again, with a blank result and its attempts as ``resumed_after``, and current (phase TASK);
        its operations are RUNNING; one that was never built is begun (phase START); one whose tasks are all SUCCESS is
        ended again (phase SUCCESS).
        ``epoch`` is raised, the token, the result, the end and the cancellation are forgotten, ``claims`` and ``sends``
        begin again at 0, and the step is ready and unsent. Of a distributed one the target is the task, or the
        operation that is to be begun or ended; of a local one it stays the root.

        :return: its row afterwards; None when there is no such root.
        :raises kser.errors.StateConflict: it is neither FAILED nor CANCELLED (any more).
        """

    @abstractmethod
    def get(self, uuid: str) -> Stored | None:
        """Everything about one operation, also about an inner one; None when there is none."""

    @abstractmethod
    def find(self, found: Found, limit: int, after: str | None = None) -> Page:
        """Operations, newest first.

        :param after: the cursor of the page before.
        :raises kser.errors.UsageError: it is none.
        """

    @abstractmethod
    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        """Delete ended roots with everything that belongs to them, no more than ``limit`` of them.

        :param older_than: seconds since their end.
        :return: how many were deleted; less than ``limit`` when no more are left.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of all resources."""
