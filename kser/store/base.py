"""What the shared database must offer, so that operations survive: the contract of every store.

A store keeps rows and moves them on; what a step *is*, and what follows it, is decided in :mod:`kser.sequencing`.

============== =====================================================================================================
operation      one row each. The row of a *root* (an operation that is no task of another one) holds the one claim of
               everything in it: owner, token, epoch and ``wake_at``
task           the tasks of an operation, numbered from 0. One that is an operation itself has a row there too
attempt        what came of each attempt at a task; only ever added to
event          what happened to a root, one line each; only ever added to
label          the operation's metadata, to be found by
============== =====================================================================================================

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
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

#: How an operation runs: in one consumer, or over the consumers.
LOCAL: Final = "local"
DISTRIBUTED: Final = "distributed"

#: What is to be done next in an operation: begin it (build its tasks), run the task at ``step``, choose what follows
#: that one, or end it with one of two outcomes.
START: Final = "START"
TASK: Final = "TASK"
NEXT: Final = "NEXT"
END_SUCCESS: Final = "SUCCESS"
END_FAILED: Final = "FAILED"

#: Why a claim is refused: the operation has ended, somebody else has it, it is not due yet, another step is current.
ENDED: Final = "ended"
HELD: Final = "held"
WAITING: Final = "waiting"
STALE: Final = "stale"

#: Seconds after which the reaper sends a step that is ready and that nobody has said to have sent.
UNSENT_AFTER: Final = 3.0
#: Seconds: the longest time until a step is sent again that nobody claims.
LONGEST_RESEND: Final = 3600.0
#: Characters of an error that an attempt keeps.
ERROR_LIMIT: Final = 2000

#: Why the reaper sends a step.
EXPIRED: Final = "lease-expired"
UNSENT: Final = "unsent"
RETRY: Final = "retry-due"
UNCLAIMED: Final = "unclaimed"


class Target(NamedTuple):
    """The message that asks for a step: of a task, or of an operation that is to be begun, moved on or ended."""

    uuid: str
    entrypoint: str
    topic: str


class OperationRow(NamedTuple):
    """An operation as it is stored. What is called ``JSON`` is text, as on the wire: ASCII, may hold ``NaN``."""

    #: Rises with the time of creation.
    id: int
    uuid: str
    entrypoint: str
    #: ``id`` of the operation that it is a task of, and of the root; None and its own ``id`` for a root.
    parent_id: int | None
    root_id: int
    mode: str
    topic: str
    #: Bits of :mod:`kser.sequencing.durable`: what its class overrides.
    hooks: int
    #: JSON object.
    params: str
    #: JSON object.
    metadata: str
    status: str
    #: One of START, TASK, NEXT, SUCCESS, FAILED: what is to be done next.
    phase: str
    #: Position of the current task.
    step: int
    #: How many tasks there are; None as long as they are not built.
    size: int | None
    #: JSON of the results up to ``step``, added up.
    so_far: str
    #: JSON of the final result; None before that is known.
    result: str | None
    created_at: float
    #: When it was claimed first; None before.
    started_at: float | None
    ended_at: float | None
    cancel_requested: bool
    cancel_reason: str | None
    # -- of a root alone --
    epoch: int
    #: Who has claimed it; None when nobody has.
    owner: str | None
    #: What the claim in force, or the last one, was made with.
    token: str | None
    wake_at: float | None
    #: Before that nobody may claim it: a retry waits.
    due_at: float
    #: How often the current step was claimed without a recorded end.
    claims: int
    #: How often the current step was sent, and when last.
    sends: int
    sent_at: float | None
    #: What is sent for the current step.
    target: Target


class TaskRow(NamedTuple):
    """A task as it is stored."""

    operation_id: int
    position: int
    uuid: str
    entrypoint: str
    topic: str
    params: str
    metadata: str
    status: str
    #: JSON of what it came with, then of what it ended with; None for a blank one.
    result: str | None
    #: How many attempts are recorded.
    attempts: int
    #: ``id`` of the operation that it is; None for a plain task.
    child_id: int | None
    #: How many attempts were recorded when it was last resumed: a retry policy counts those behind them.
    resumed_after: int


class AttemptRow(NamedTuple):
    """What came of one attempt at a task."""

    operation_id: int
    position: int
    #: From 1.
    number: int
    epoch: int
    #: SUCCESS or FAILED.
    status: str
    #: ``host:process:random`` of whoever made it.
    consumer: str
    started_at: float
    ended_at: float
    #: What it failed with, cut to a few lines; None for a success.
    error: str | None


class EventRow(NamedTuple):
    """One thing that happened to a root or in it."""

    root_id: int
    at: float
    #: What happened: one of the words in :data:`EVENTS`.
    kind: str
    epoch: int
    #: Who did it; None for somebody who only asked for it.
    consumer: str | None
    #: Of which task or inner operation; None for the root itself.
    uuid: str | None
    text: str | None


#: Words of events, and what they say.
EVENTS: Final[Mapping[str, str]] = {
    "accepted": "it was saved; from then on it will end",
    "claimed": "a consumer took it up",
    "built": "its tasks were built, or those of an operation in it",
    "task-succeeded": "an attempt at a task succeeded",
    "task-failed": "an attempt at a task failed for good",
    "task-retried": "an attempt at a task failed, and another one follows",
    "moved": "what follows a task was chosen",
    "released": "a consumer gave it back before it had ended",
    "sent-again": "the reaper sent its step; the text says why",
    "exhausted": "too many consumers died in a step",
    "cancel-requested": "it is to be cancelled after the task that runs",
    "ended": "it ended; the text says how",
    "resumed": "it goes on after it had ended",
}


class NewTask(NamedTuple):
    """A task to store."""

    uuid: str
    entrypoint: str
    topic: str
    params: str
    metadata: str
    result: str | None
    #: The operation that it is; None for a plain task.
    child: NewOperation | None = None


class NewOperation(NamedTuple):
    """An operation to store."""

    uuid: str
    entrypoint: str
    mode: str
    topic: str
    hooks: int
    params: str
    metadata: str
    so_far: str
    #: None when they are to be built by whoever begins it.
    tasks: Sequence[NewTask] | None
    #: Metadata to be found by.
    labels: Sequence[tuple[str, str]]
    #: START or TASK, or SUCCESS for one without tasks.
    phase: str
    #: Of a root: what is sent for its first step.
    target: Target


class Claimant(NamedTuple):
    """Who claims."""

    #: A process: made at its start, with something random in it.
    owner: str
    #: Of this one claim: random. A call that is repeated has the same one.
    token: str
    #: Seconds.
    lease: float
    #: A step that was claimed that often without a recorded end is given up.
    max_claims: int


class Claim(NamedTuple):
    """A root that is claimed."""

    id: int
    epoch: int
    #: From the root to the operation whose turn it is.
    path: tuple[OperationRow, ...]
    #: The task whose turn it is; None when the operation is to be begun, moved on or ended.
    task: TaskRow | None
    #: The task behind it, of the same operation; only looked for when the root is distributed.
    following: TaskRow | None = None
    #: Whether too many consumers died in this step: it is to be recorded as failed, and not to be run.
    exhausted: bool = False

    @property
    def root(self) -> OperationRow:
        """The root's row."""
        return self.path[0]


class Refusal(NamedTuple):
    """A root that could not be claimed: ``ended``, ``held``, ``waiting`` or ``stale``."""

    reason: str
    root: OperationRow


class TaskEnd(NamedTuple):
    """An attempt at a task is over, or an operation that is a task has ended."""

    operation_id: int
    position: int
    #: From 1: one more than the recorded ones. 0 when no attempt was made: nothing is added to the attempts.
    number: int
    #: SUCCESS or FAILED; PENDING when another attempt is to follow (the attempt's own row says FAILED).
    status: str
    #: JSON of what it gave; None with PENDING: what is stored stays.
    result: str | None
    #: Seconds that it took.
    duration: float
    #: What it failed with; None for a success.
    error: str | None


class Note(NamedTuple):
    """An event to add; the store knows the rest of it."""

    kind: str
    uuid: str | None = None
    text: str | None = None


class Move(NamedTuple):
    """Where an operation is from now on."""

    operation_id: int
    #: Where it was: else nothing is recorded.
    old_step: int
    step: int
    phase: str
    status: str
    so_far: str
    #: JSON of the final result; None before that is known.
    result: str | None


class Built(NamedTuple):
    """The tasks of an operation were built."""

    operation_id: int
    tasks: Sequence[NewTask]


class Checkpoint(NamedTuple):
    """What came of a step; all of it is recorded in one transaction, or nothing.

    ``moves`` and ``ends`` go from the inside out. The last move is the root's, also where it stays where it is.
    """

    root_id: int
    epoch: int
    #: What the root was claimed with.
    token: str
    consumer: str
    moves: Sequence[Move]
    ends: Sequence[TaskEnd] = ()
    built: Built | None = None
    notes: Sequence[Note] = ()
    #: What is sent for the step that is current now; None when that stays as it is.
    target: Target | None = None
    #: The claim goes on; else it is given back, and the step is ready. An end gives it back too.
    keep: bool = True
    #: Seconds before the step may be claimed.
    delay: float = 0


class Due(NamedTuple):
    """A root whose step the reaper has to send."""

    id: int
    uuid: str
    epoch: int
    target: Target
    #: ``lease-expired``, ``unsent``, ``retry-due`` or ``unclaimed``.
    reason: str


class Page(NamedTuple):
    """Some of the operations that were looked for, newest first."""

    rows: Sequence[OperationRow]
    #: What to pass as ``after`` for the next ones; None when there are no more.
    cursor: str | None


class Stored(NamedTuple):
    """Everything about one operation. Attempts are those of its own tasks, events those of its root."""

    operation: OperationRow
    tasks: Sequence[TaskRow]
    attempts: Sequence[AttemptRow]
    events: Sequence[EventRow]
    #: ``uuid`` of the root.
    root_uuid: str


class Found(NamedTuple):
    """What to look for; None admits everything."""

    status: Collection[str] | None = None
    entrypoint: str | None = None
    #: Created at that time or later, and before that time.
    since: float | None = None
    until: float | None = None
    #: Each of these labels.
    labels: Sequence[tuple[str, str]] = ()
    #: Operations that are tasks of the one with this uuid; None for roots.
    parent: str | None = None


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
    def save(self, operation: NewOperation, claimant: Claimant | None = None) -> Claim | Refusal | None:
        """Store an operation with all its tasks, and claim it for ``claimant`` if there is one: one transaction.

        Its step is ready, and unsent; the reaper sends it if nobody does. ``claimant`` may be refused nothing.

        :return: the claim; None without a claimant. A Refusal (``stale``) when the uuid is taken, which changes
            nothing, also when it is the very same operation.
        """

    @abstractmethod
    def claim(self, uuid: str, step: str, claimant: Claimant) -> Claim | Refusal | None:
        """Claim a root, if ``step`` is the uuid of its current :class:`Target`.

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
        the reaper looks at it then, or after :data:`UNSENT_AFTER` without a delay. ``claims`` and ``sends`` begin
        again at 0. ``ended_at`` is set for each operation that ends. Checkpoints of several threads may share a
        transaction: one that is refused does not touch the others.

        :return: the root's status.
        :raises kser.errors.Fenced: nothing was recorded: somebody else has claimed it, or it has ended.
        :raises kser.errors.StoreError: the database refuses what is to be recorded; nothing was.
        """

    @abstractmethod
    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> Mapping[int, bool]:
        """Prolong claims, each ``(root_id, epoch)``, to ``lease`` seconds from now; also one whose lease is over.

        :return: whether it is to be cancelled, by ``root_id``; those that are missing are not the owner's any more.
        """

    @abstractmethod
    def sent(self, steps: Iterable[tuple[int, int]], resend_after: float) -> None:
        """The current steps of these roots, each ``(root_id, epoch)``, were sent; changes nothing once it is claimed.

        :param resend_after: seconds until it is sent again if nobody claims it.
        """

    @abstractmethod
    def take_due(self, limit: int, consumer: str, *, expired: bool, resend_after: float) -> Sequence[Due]:
        """Roots to look at now, each for one caller only: they are marked as sent, and taken from an owner whose lease
        is over (whose epoch stays good until somebody else claims). Each gets an event.

        :param expired: whether leases that are over count.
        :param resend_after: seconds until it is sent again if nobody claims it; doubled each time, to an hour.
        """

    @abstractmethod
    def unsent(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        """These steps, each ``(root_id, epoch)``, could not be sent: they are due again in ``wait`` seconds."""

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
