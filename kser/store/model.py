"""The values of a store: the rows that it holds, and the requests that change them.

============== =====================================================================================================
operation      one row per operation. The row of a *root* (an operation that is not a task of another one) holds the
               one claim for itself and all operations nested in it: owner, token, epoch and ``next_check_at``
task           the tasks of an operation, numbered from 0. A task that is an operation has an operation row too
attempt        the outcome of each attempt at a task; append-only
event          the history of a root, one row per event; append-only
label          the searchable metadata of an operation
============== =====================================================================================================

Values that are built or read for each row or checkpoint are named tuples, because a frozen dataclass takes more than
twice the time to build: with dataclasses for a checkpoint and its parts, a step took 1.5 to 4 % longer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


class Mode(StrEnum):
    """How an operation runs."""

    #: All steps run in one consumer.
    LOCAL = "local"
    #: Each step is sent as a message, to any consumer that knows its class.
    DISTRIBUTED = "distributed"


class Phase(StrEnum):
    """Next action of an operation. The two ends have the values of the final statuses."""

    #: Build the tasks.
    BUILD = "BUILD"
    #: Run the task at ``step``.
    RUN_TASK = "RUN_TASK"
    #: Choose the task that follows ``step``.
    CHOOSE_NEXT = "CHOOSE_NEXT"
    #: End with SUCCESS.
    END_SUCCESS = "SUCCESS"
    #: End with FAILED.
    END_FAILED = "FAILED"


class RefusalReason(StrEnum):
    """Why a claim is refused."""

    #: The operation has ended.
    ENDED = "ended"
    #: Another owner has a valid lease.
    HELD = "held"
    #: The step is not due yet.
    WAITING = "waiting"
    #: Another step is current.
    STALE = "stale"


#: Seconds after which the reaper sends a step that is ready and not marked as sent.
RESEND_UNSENT_AFTER: Final = 3.0

#: Seconds that a reaper has to send a step that it reserved, before another reaper may reserve it.
SEND_GRACE: Final = 10.0

#: Longest delay in seconds before an unclaimed step is sent again.
MAX_RESEND_DELAY: Final = 3600.0

#: Maximum number of characters of an error that an attempt row stores.
MAX_ERROR_LENGTH: Final = 2000


class DueReason(StrEnum):
    """Why a step is due for sending by the reaper."""

    #: The lease of its owner expired.
    EXPIRED = "lease-expired"
    #: It is ready and was not marked as sent.
    UNSENT = "unsent"
    #: The delay of a retry is over.
    RETRY = "retry-due"
    #: It was sent, and no consumer claimed it.
    UNCLAIMED = "unclaimed"


class StepMessage(NamedTuple):
    """The message that starts a step: of a task to run, or of an operation to build, advance or end."""

    uuid: str
    entrypoint: str
    topic: str


class OperationRow(NamedTuple):
    """The row of an operation. JSON columns hold text in the format of messages: ASCII, and possibly ``NaN``."""

    #: Increases with the time of creation.
    id: int
    uuid: str
    entrypoint: str
    #: ``id`` of the parent operation, None for a root; then ``id`` of the root, which for a root is its own.
    parent_id: int | None
    root_id: int
    mode: str
    topic: str
    #: Bits of ``kser.durable.serialization.ENDS`` and ``CHOOSES``: the methods that the class overrides.
    overrides: int
    #: JSON object.
    params: str
    #: JSON object.
    metadata: str
    status: str
    #: The next action: BUILD, RUN_TASK, CHOOSE_NEXT, END_SUCCESS or END_FAILED.
    phase: str
    #: Position of the current task.
    step: int
    #: Number of tasks; None before they are built.
    task_count: int | None
    #: JSON of the accumulated result of the tasks that have run.
    accumulated: str
    #: JSON of the final result; None before the operation has one.
    result: str | None
    created_at: float
    #: Time of the first claim; None before.
    started_at: float | None
    ended_at: float | None
    cancel_requested: bool
    cancel_reason: str | None
    # -- only used in roots --
    epoch: int
    #: The process that has claimed the root; None when it is not claimed.
    owner: str | None
    #: Token of the current claim, or of the last claim or resume.
    token: str | None
    #: Time of the reaper's next check; None once the operation has ended.
    next_check_at: float | None
    #: Earliest time of the next claim; in the future while a retry waits.
    due_at: float
    #: Number of claims of the current step without a recorded end.
    claim_count: int
    #: Number of sends of the current step; then the time of the last one.
    send_count: int
    sent_at: float | None
    #: The message that is sent for the current step.
    target: StepMessage


class TaskRow(NamedTuple):
    """The row of a task."""

    operation_id: int
    position: int
    uuid: str
    entrypoint: str
    topic: str
    params: str
    metadata: str
    status: str
    #: JSON of the initial result, later of the final result; None for a blank result.
    result: str | None
    #: Number of recorded attempts.
    attempts: int
    #: ``id`` of the operation, for a task that is an operation; None for a plain task.
    child_id: int | None
    #: Number of recorded attempts at the last resume; a retry policy counts only the attempts after it.
    attempts_before_resume: int


class AttemptRow(NamedTuple):
    """The row of one attempt at a task."""

    operation_id: int
    position: int
    #: Number of the attempt, from 1.
    number: int
    epoch: int
    #: SUCCESS or FAILED.
    status: str
    #: ``host:process:random`` of the consumer that made the attempt.
    consumer: str
    started_at: float
    ended_at: float
    #: The error of a failed attempt, cut to a few lines; None for a success.
    error: str | None


class EventRow(NamedTuple):
    """The row of one event of a root, or of a task or operation nested in it."""

    root_id: int
    at: float
    #: A key of :data:`EVENTS`.
    kind: str
    epoch: int
    #: The consumer that caused the event; None for a request from outside a consumer.
    consumer: str | None
    #: uuid of the task or nested operation that the event is about; None for the root.
    uuid: str | None
    text: str | None


#: Kinds of events, with their meanings.
EVENTS: Final[Mapping[str, str]] = {
    "accepted": "the operation was saved; from then on it will end",
    "claimed": "a consumer claimed the operation",
    "built": "the tasks of the operation, or of a nested operation, were built",
    "task-succeeded": "an attempt at a task succeeded",
    "task-failed": "an attempt at a task failed permanently",
    "task-retried": "an attempt at a task failed, and a retry follows",
    "moved": "the next task was chosen",
    "released": "a consumer released the claim before the operation had ended",
    "sent-again": "the reaper sent the current step; the text has the reason",
    "exhausted": "too many consumers died during a step",
    "cancel-requested": "the operation will be cancelled after the running task",
    "ended": "the operation ended; the text has the outcome",
    "resumed": "the operation continues after it had ended",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTask:
    """A task to store."""

    uuid: str
    entrypoint: str
    topic: str
    params: str
    metadata: str
    result: str | None
    #: The operation, for a task that is an operation; None for a plain task.
    child: NewOperation | None = None
    #: PENDING, or SUCCESS for a task that has already run; ``result`` is then its final result.
    status: str = "PENDING"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewOperation:
    """An operation to store."""

    uuid: str
    entrypoint: str
    mode: str
    topic: str
    overrides: int
    params: str
    metadata: str
    accumulated: str
    #: None when the consumer that runs the phase BUILD builds them.
    tasks: Sequence[NewTask] | None
    #: Searchable metadata.
    labels: Sequence[tuple[str, str]]
    #: BUILD or RUN_TASK, or END_SUCCESS for an operation without tasks.
    phase: str
    #: The message of the first step; only used in roots.
    target: StepMessage
    #: Position of the first task that has not run yet.
    step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimRequest:
    """A request for a claim."""

    #: The claiming process. The name is made when the process starts, and has a random part.
    owner: str
    #: Random token of this claim. A repeated call carries the same token.
    token: str
    #: Length of the lease in seconds.
    lease: float
    #: Number of claims without a recorded end after which a step counts as failed.
    max_claims: int


class Claim(NamedTuple):
    """A granted claim on a root."""

    id: int
    epoch: int
    #: The operations from the root down to the current one.
    path: tuple[OperationRow, ...]
    #: The current task; None when the next action is to build, advance or end the operation.
    task: TaskRow | None
    #: The task after the current one in the same operation; only read for a distributed root.
    next_task: TaskRow | None = None
    #: True if the step was claimed too often without a recorded end: it must be recorded as failed without running.
    exhausted: bool = False

    @property
    def root(self) -> OperationRow:
        """The row of the root."""
        return self.path[0]


class ClaimRefused(NamedTuple):
    """A claim that was not granted: ``ended``, ``held``, ``waiting`` or ``stale``."""

    reason: str
    root: OperationRow


class TaskOutcome(NamedTuple):
    """The outcome of an attempt at a task, or of a nested operation as a task of its parent."""

    operation_id: int
    position: int
    #: Number of the attempt: the number of recorded attempts plus 1. 0 if no attempt was made; no attempt row is added.
    number: int
    #: SUCCESS or FAILED; PENDING when the task is retried (the attempt row then has FAILED).
    status: str
    #: JSON of the result. None with PENDING, which leaves the stored result unchanged.
    result: str | None
    #: Duration of the attempt in seconds.
    duration: float
    #: The error of a failed attempt; None for a success.
    error: str | None


class NewEvent(NamedTuple):
    """An event to add. The store fills in the root, the time, the epoch and the consumer."""

    kind: str
    uuid: str | None = None
    text: str | None = None


class OperationUpdate(NamedTuple):
    """The new position, status and results of an operation."""

    operation_id: int
    #: The stored step and phase must equal these two; otherwise nothing is recorded.
    stored_step: int
    stored_phase: str
    step: int
    phase: str
    status: str
    accumulated: str
    #: JSON of the final result; None before the operation has one.
    result: str | None

    @property
    def changes_position(self) -> bool:
        """True if the update changes the step or the phase."""
        return (self.stored_step, self.stored_phase) != (self.step, self.phase)


class BuiltTasks(NamedTuple):
    """The newly built tasks of an operation."""

    operation_id: int
    tasks: Sequence[NewTask]


class Checkpoint(NamedTuple):
    """The outcome of a step, recorded in one transaction or not at all.

    ``updates`` and ``outcomes`` are ordered from the innermost operation outwards. The last of ``updates`` belongs to
    the root, even when it does not change the position of the root.
    """

    root_id: int
    epoch: int
    #: Token of the claim.
    token: str
    consumer: str
    updates: Sequence[OperationUpdate]
    outcomes: Sequence[TaskOutcome] = ()
    built: BuiltTasks | None = None
    events: Sequence[NewEvent] = ()
    #: The message of the new current step; None to leave the stored message unchanged.
    target: StepMessage | None = None
    #: True to keep the claim. False to release it, which makes the step ready. The end of the root always releases it.
    keep: bool = True
    #: Seconds before the step may be claimed; only used when the claim is released.
    delay: float = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DueStep:
    """A root whose step is due for sending by the reaper."""

    id: int
    uuid: str
    epoch: int
    target: StepMessage
    #: ``lease-expired``, ``unsent``, ``retry-due`` or ``unclaimed``.
    reason: str


class Page(NamedTuple):
    """One page of the result of a query, newest operations first."""

    rows: Sequence[OperationRow]
    #: The value of ``after`` for the next page; None on the last page.
    cursor: str | None


class OperationSnapshot(NamedTuple):
    """A full snapshot of an operation: its row, its tasks, their attempts, and the events of its root."""

    operation: OperationRow
    tasks: Sequence[TaskRow]
    attempts: Sequence[AttemptRow]
    events: Sequence[EventRow]
    #: ``uuid`` of the root.
    root_uuid: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationQuery:
    """A query for operations. A filter that is None matches every operation."""

    status: Collection[str] | None = None
    entrypoint: str | None = None
    #: Lower bound (inclusive) and upper bound (exclusive) of the time of creation.
    since: float | None = None
    until: float | None = None
    #: Labels that an operation must have, all of them.
    labels: Sequence[tuple[str, str]] = ()
    #: uuid of the parent, to match the operations that are its tasks; None to match roots.
    parent: str | None = None
