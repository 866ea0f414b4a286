"""What a store keeps, and what it is asked to change, as values.

============== =====================================================================================================
operation      one row each. The row of a *root* (an operation that is no task of another one) holds the one claim of
               everything in it: owner, token, epoch and ``wake_at``
task           the tasks of an operation, numbered from 0. One that is an operation itself has a row there too
attempt        what came of each attempt at a task; only ever added to
event          what happened to a root, one line each; only ever added to
label          the operation's metadata, to be found by
============== =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
#: Seconds that a reaper is given to send what it has taken, before another one takes it.
SENDING: Final = 10.0
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
    #: PENDING, or SUCCESS for one that is done already: its ``result`` is what it gave.
    status: str = "PENDING"


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
    #: Position of the first task that is not done already.
    step: int = 0


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
    old_phase: str
    step: int
    phase: str
    status: str
    so_far: str
    #: JSON of the final result; None before that is known.
    result: str | None

    @property
    def leaves(self) -> bool:
        """Whether it is elsewhere afterwards."""
        return (self.old_step, self.old_phase) != (self.step, self.phase)


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
