"""The contract of every store of operations.

A store holds rows (:mod:`kser.store.model`) and updates them. The store does not decide which steps an operation has,
or in which order the steps run; :mod:`kser.durable` decides this. In this package, a *root* is a root operation.

**Time.** Every time in a row is a number of seconds since 1970, by the store's clock. Only the store reads this clock.
So callers pass durations in seconds, and no times.

**Fencing.** Each claim, release, resume and immediate cancellation of a root increments its ``epoch``. Every checkpoint
contains the epoch of the claim that the worker held when it ran the step. If the root now has another epoch, for
example because another worker has claimed it, the checkpoint changes nothing and raises
:class:`kser.errors.FencedError`.

**Due steps.** The current step of a root is *due* when no living consumer works on it any more: the lease of the owner
has expired, a retry is due, the operation was resumed or released, or no consumer has claimed the step for long
(:class:`kser.store.model.DueReason`). ``take_at`` is the time at which the step becomes due. From then on, a consumer
that can run the step may *reserve* the step and run it without a message. A reservation moves ``take_at`` to its own
end, so that no other consumer reserves the step meanwhile, and changes nothing else: the owner may still renew its
lease, and any consumer may still claim the step. ``send_at`` is the time from which a consumer that cannot run the step
sends its message. A reserved step is not sent.

**Repeated calls.** If a call raises :class:`kser.errors.StoreUnavailable`, the caller cannot know whether the call took
effect. So the caller may repeat the call with the same arguments. If the first call took effect, the second call of
``claim``, ``checkpoint``, ``cancel`` or ``resume``, and of ``save`` with a claim request, returns the value that the
first call would have returned. In two cases, the second call does not recognise the first call: a second ``save``
without a claim request returns a ClaimRefused (``stale``), and a second ``resume`` raises
:class:`kser.errors.StateConflict` if a consumer has claimed the root meanwhile. A second ``reserve_due_steps`` or
``take_due_steps`` returns other steps than the first one; the steps that the first call reserved become due again when
their reservations end. A second ``mark_sent`` counts the send twice, and a second ``refuse_class`` may count the
refusal twice. Both only change delays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from kser.store.model import (
    MAX_SENDS,
    UNKNOWN_AFTER,
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
    TakeoverQuery,
    TaskRow,
)


class Renewal(NamedTuple):
    """The outcome of a renewal of leases."""

    #: The ids of the roots whose claims still belong to the owner.
    held: set[int]
    #: The ids of those of them whose leases were not renewed, because other transactions have locked their rows.
    locked: set[int]


class LeaseRenewer(ABC):
    """A renewer of leases that waits for no other call of the store. One thread at a time may use it."""

    @abstractmethod
    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> Renewal:
        """Renew leases like :meth:`StepSchedule.renew`, except in rows that other transactions have locked.

        The call ends within the timeout of the renewer.

        :raises kser.errors.StoreUnavailable: the database cannot be used now, or did not answer in time. The next call
            uses a new connection.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the connection of the renewer."""


class StepSchedule(ABC):
    """The part of a store that schedules the current steps of roots: leases, reservations and sends.

    In a call, a step is given by the id and the epoch of its root, ``(root_id, epoch)``, or by the DueStep that an
    earlier call returned. If the root has another epoch now, the call ignores the step.
    """

    @abstractmethod
    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        """Set the end of the leases of claims to ``lease`` seconds from now.

        The call renews a claim if the root is RUNNING and has the epoch of the claim, even if the lease has expired or
        another consumer has reserved the step.

        :param claims: the claims, each as a pair ``(root_id, epoch)``.

        :return: the ``root_id`` of each renewed claim. If the ``root_id`` of a claim is missing from the
            returned set, ``owner`` has lost the claim.
        """

    @abstractmethod
    def lease_renewer(self, timeout: float) -> LeaseRenewer:
        """Return a new renewer of leases with a database connection of its own.

        :param timeout: maximum duration of a call of the renewer, in seconds.
        """

    @abstractmethod
    def get_topics(self) -> Sequence[str]:
        """Return the topics of the current steps of all roots that have not ended, in alphabetical order."""

    @abstractmethod
    def reserve_due_steps(self, query: TakeoverQuery, reservation: float) -> Sequence[DueStep]:
        """Reserve due steps for a takeover, the longest due first, and return these steps.

        The call first reads without a lock, and writes only if it finds a step. Of several concurrent calls, one
        reserves the step. The call may leave out steps behind a thousand steps of one topic that are due for longer
        and whose classes the caller does not know.

        :param reservation: duration of the reservation in seconds. The step is due again afterwards.
        """

    @abstractmethod
    def reserve_step(self, row: OperationRow, reservation: float) -> DueStep | None:
        """Reserve the current step of one root, whose lease has expired, and return the step.

        :param row: the row of the root as the caller has read it.
        :param reservation: duration of the reservation in seconds.
        :return: None if the root has changed since the caller read its row, or if another transaction has locked it.
        """

    @abstractmethod
    def return_reservations(self, steps: Iterable[DueStep]) -> None:
        """End reservations of :meth:`reserve_due_steps` before their time: the steps are due at once.

        A step whose ``take_at`` has changed since it was reserved stays unchanged: its owner has renewed the lease, or
        another consumer has claimed or reserved it.
        """

    @abstractmethod
    def postpone_takeover(self, steps: Iterable[DueStep], wait: float) -> None:
        """End reservations whose takeovers ended before they claimed their steps: the steps are due later.

        A step whose ``take_at`` has changed since it was reserved stays unchanged.

        :param wait: seconds after which a step is due again. This delay doubles with each earlier send or takeover
            without a claim, up to :data:`kser.store.model.MAX_RESEND_DELAY`.
        """

    @abstractmethod
    def take_due_steps(
        self,
        limit: int,
        consumer: str,
        *,
        expired: bool,
        max_sends: int = MAX_SENDS,
        unknown_after: float = UNKNOWN_AFTER,
    ) -> Sequence[DueStep]:
        """Return due steps of all topics whose ``send_at`` has passed, so that the caller sends their messages.

        No other call returns these steps for :data:`kser.store.model.SEND_GRACE` seconds. Within this time, the caller
        sends the message of each step and records the send with :meth:`mark_sent`. The owner of an expired lease stays
        in the row: its checkpoints are accepted until the next claim. For each returned step, the call adds an event
        ``sent-again`` to the root, even if the message of the step was never sent before.

        Steps with the reason UNKNOWN_CLASS get no event. The caller does not send them, but claims them and records
        them as failed.

        :param expired: True to return also the steps of roots whose lease has expired.
        :param max_sends: number of refusals for an unknown class after which a step has the reason UNKNOWN_CLASS, if
            the first refusal was at least ``unknown_after`` seconds ago.
        """

    @abstractmethod
    def mark_sent(self, steps: Iterable[tuple[int, int]], resend_after: float, lease: float) -> None:
        """Record that messages for the current steps of roots were sent. Roots with a valid lease stay unchanged.

        A step that is already due stays due: its message may wait in the partition of a dead consumer.

        :param resend_after: seconds after which the step's message is sent again if no consumer has claimed the root.
            This delay doubles with each send, up to :data:`kser.store.model.MAX_RESEND_DELAY`.
        :param lease: seconds after which a consumer may take over the step of a root that was claimed before; at most
            ``resend_after``. This delay doubles too. A root that was never claimed may be taken over after
            ``resend_after``, because until then, its record may wait behind other records with the same key.
        """

    @abstractmethod
    def postpone_send(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        """Postpone the send of steps whose messages could not be sent by ``wait`` seconds from now.

        Consumers may still take over the steps meanwhile. Roots with a valid lease stay unchanged.
        """

    @abstractmethod
    def refuse_class(self, uuid: str, step: str) -> OperationRow | None:
        """Record that a consumer refused a message because it does not know the class of the step.

        The call changes nothing if ``step`` is no longer the current step, if the root has ended or has a valid lease,
        or if there are more recorded refusals than sends.

        :param uuid: uuid of the root.
        :param step: uuid in the message of the step.
        :return: the row of the root after the call, or None if no root with this uuid is stored.
        """


class Store(StepSchedule):
    """A store of operations. All methods are thread-safe.

    Every method raises :class:`kser.errors.StoreUnavailable` if the database cannot be reached or cannot be used now,
    and :class:`kser.errors.StoreError` if the database rejects the call.
    """

    #: The address of the store without passwords, for logs and error texts.
    name: str

    @abstractmethod
    def check(self) -> None:
        """Check that the database has the schema that this code needs.

        :raises kser.errors.SchemaMismatch: the schema is missing or incompatible; the error text names the command that
            creates or upgrades it.
        """

    @abstractmethod
    def save(self, operation: NewOperation, request: ClaimRequest | None = None) -> Claim | ClaimRefused | int:
        """Store an operation with all its tasks; if ``request`` is given, claim the operation in the same transaction.

        After the call, the first step is ready to run, but no message has been sent for the step. If the caller does
        not record a send, the step is due after :data:`kser.store.model.RESEND_UNSENT_AFTER` seconds. If the call
        stores the operation, it also grants the requested claim.

        :return: the claim, or the ``id`` of the operation if ``request`` is None. If an operation with this uuid is
            already stored, the call changes nothing. If an earlier call with the same ``request`` stored the operation,
            the call then returns the claim of that call. Otherwise, it returns a ClaimRefused (``stale``), even if the
            two operations are identical.
        """

    @abstractmethod
    def claim(self, uuid: str, step: str, request: ClaimRequest) -> Claim | ClaimRefused | None:
        """Claim a root for its current step.

        The claim is one compare-and-set. The store grants the claim if ``step`` is current, the status is PENDING or
        RUNNING, ``due_at`` has passed, the root has the epoch and the topic of the request, and either the root has no
        owner, or the owner's lease has expired, the delay of :data:`kser.store.model.IMMEDIATE_TAKEOVERS` has passed,
        and the request has ``expired``. A reservation of another consumer does not prevent the claim.

        A granted claim increments ``epoch`` and ``claim_count``, sets the status to RUNNING, stores the owner, the
        token and the lease, and clears the numbers of sends and refusals. The first claim on a root also stores
        ``started_at``. If ``claim_count`` has already reached ``max_claims``, the store still grants the claim, and
        marks the claim as ``exhausted``, so that the consumer records the step as failed and does not run it.

        :param uuid: uuid of the root.
        :param step: uuid in the message of the step that the caller wants to run. The store grants the claim only if
            the :class:`kser.store.model.StepMessage` of the root's current step has the same uuid.
        :return: the claim, or the refusal with its reason, or None if no root with this uuid is stored.
        """

    @abstractmethod
    def get_operation(self, uuid: str) -> OperationRow | None:
        """Return the row of a root or nested operation, or None if no operation with this uuid is stored."""

    @abstractmethod
    def get_tasks(self, operation_id: int) -> Sequence[TaskRow]:
        """Return the rows of an operation's tasks, ordered by position."""

    @abstractmethod
    def get_task(self, operation_id: int, position: int) -> TaskRow | None:
        """Return the row of the task at a position of an operation, or None if the operation has no such position."""

    @abstractmethod
    def get_children(self, root_id: int) -> Sequence[OperationRow]:
        """Return the rows of all operations nested in a root, in no particular order."""

    @abstractmethod
    def checkpoint(self, checkpoint: Checkpoint) -> str:
        """Record the outcome of a step.

        The store records the checkpoint only if the root is RUNNING, the epoch of the root equals the epoch of the
        checkpoint, and the row of each operation in ``updates`` still has the step and the phase that its update
        expects (``stored_step`` and ``stored_phase``).

        If a client has requested to cancel the root, the root becomes CANCELLED in the same transaction, whatever
        status the root's update contains. The store still records the task outcomes and the updates of nested
        operations. Then the nested operations that have not ended become CANCELLED too. The store also records an event
        ``ended`` of the root with the text CANCELLED; this event replaces the event ``ended`` of the root in
        ``events``, if there is one.

        A checkpoint with ``keep=False``, or a checkpoint that ends the root, releases the claim and increments
        ``epoch``. If the root has not ended, a consumer may claim its next step ``delay`` seconds after the release;
        when this step is due depends on the ``due_reason`` of the checkpoint.

        Every checkpoint sets ``claim_count`` and ``send_count`` to 0, stores the checkpoint's ``current_entrypoints``,
        and sets ``ended_at`` of each operation that ends. One transaction may record checkpoints of several threads. If
        the store rejects one of these checkpoints, it still records the others.

        :return: the status of the root after the checkpoint.
        :raises kser.errors.FencedError: another worker has claimed the root, or the root has ended. The store recorded
            nothing.
        :raises kser.errors.StoreError: the database rejects the data. The store recorded nothing.
        """

    @abstractmethod
    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        """Cancel a root. A root that has ended stays unchanged.

        If the root has no valid lease, the root and all nested operations that have not ended become CANCELLED
        immediately; the call also increments ``epoch`` and clears the token. If the root has a valid lease, the call
        sets ``cancel_requested``, and the next checkpoint cancels the root. A further call until then changes nothing.

        :return: the row of the root after the call, or None if no root with this uuid is stored.
        """

    @abstractmethod
    def resume(self, uuid: str, epoch: int, token: str) -> OperationRow | None:
        """Resume a FAILED or CANCELLED root at its first task whose status is not SUCCESS.

        The call selects this task. If this task is a nested operation that has started, the call also selects, in the
        nested operation, the first task whose status is not SUCCESS, and so on, down to the innermost operation. Each
        selected task becomes PENDING with a blank result, and its ``attempts_before_resume`` is set to the number of
        its attempts. Each operation that contains a selected task becomes RUNNING, with the phase RUN_TASK at its
        selected task. The innermost operation may have no task to select. In this case, it becomes RUNNING with the
        phase BUILD if its tasks were never built, or with the phase END_SUCCESS if all of its tasks have the status
        SUCCESS.

        The call increments ``epoch``, stores ``token``, clears ``result``, ``ended_at``, ``cancel_requested`` and
        ``cancel_reason``, and sets ``claim_count`` and ``send_count`` to 0. After the call, the current step is ready
        to run and due at once. In a distributed root, its message names the selected task, or the operation to build
        or end. In a local root, the message names the root.

        :param epoch: the epoch in the row that the caller has read.
        :param token: the random token of this resume. If the caller repeats the call with the same token, the second
            call changes nothing. A concurrent call of another caller has another token, so the store rejects it.
        :return: the row of the root after the call, or None if no root with this uuid is stored.
        :raises kser.errors.StateConflict: the root is neither FAILED nor CANCELLED, or its epoch is not ``epoch``
            because the root has changed since the caller read it.
        """

    @abstractmethod
    def snapshot(self, uuid: str) -> OperationSnapshot | None:
        """Return the full snapshot of a root or nested operation, or None if no operation with this uuid is stored."""

    @abstractmethod
    def find(self, query: OperationQuery, limit: int, after: str | None = None) -> Page:
        """Return a page of the operations that match a query, newest first.

        :param after: the cursor of the previous page; None for the first page.
        :raises kser.errors.UsageError: ``after`` is not a cursor.
        """

    @abstractmethod
    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        """Delete at most ``limit`` roots that have ended, with all rows that belong to these roots.

        :param older_than: minimum number of seconds since the end of a root.
        :param status: the final statuses of the roots to delete.
        :return: the number of deleted roots. A number below ``limit`` means that no root is left that meets the
            conditions.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all resources of the store, such as connections."""
