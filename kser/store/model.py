"""The data types of a store: the rows of its tables, and the requests that change these rows.

============== =====================================================================================================
operation      one row per operation. The row of a *root* (an operation that is not a task of another one) holds the
               one claim for itself and all operations nested in it: owner, token, epoch and ``next_check_at``
task           the tasks of an operation, numbered from 0. A task that is an operation has an operation row too
attempt        the outcome of each attempt at a task; append-only
event          the history of a root, one row per event; append-only
label          the searchable metadata of an operation
============== =====================================================================================================

Types that have an instance for each row or checkpoint are named tuples, because it takes more than twice as long to
build a frozen dataclass. With dataclasses for a checkpoint and its parts, a step took 1.5 to 4 % longer.
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
    #: Each step is sent as a message. Any consumer that knows the class of the step can run it.
    DISTRIBUTED = "distributed"


class Phase(StrEnum):
    """The next action of an operation. The values of the two ends equal the final statuses SUCCESS and FAILED."""

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
    """The reason why a claim is refused."""

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

#: Seconds that a reaper has to send a step that it has reserved. After that, another reaper may reserve the step.
SEND_GRACE: Final = 10.0

#: Longest delay in seconds before an unclaimed step is sent again.
MAX_RESEND_DELAY: Final = 3600.0

#: Maximum length of the error in an attempt row, in characters.
MAX_ERROR_LENGTH: Final = 2000


class DueReason(StrEnum):
    """The reason why the reaper must send a step."""

    #: The lease of the owner expired.
    EXPIRED = "lease-expired"
    #: The step is ready and was not marked as sent.
    UNSENT = "unsent"
    #: The delay of a retry is over.
    RETRY = "retry-due"
    #: The step was sent, and no consumer has claimed it.
    UNCLAIMED = "unclaimed"


class StepMessage(NamedTuple):
    """The message that starts a step: of a task to run, or of an operation to build, advance or end."""

    uuid: str
    entrypoint: str
    topic: str


class OperationRow(NamedTuple):
    """The row of an operation. JSON columns hold text in the format of messages: ASCII, and possibly ``NaN``."""

    #: The id of the operation. Operations that are created later have higher ids.
    id: int
    uuid: str
    entrypoint: str
    #: ``parent_id`` is the ``id`` of the parent operation, or None for a root. ``root_id`` is the ``id`` of the root; a
    #: root has its own ``id`` here.
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
    #: Number of tasks; None before the tasks are built.
    task_count: int | None
    #: JSON of the accumulated result of all tasks that have run.
    accumulated: str
    #: JSON of the final result; None before the operation has a final result.
    result: str | None
    created_at: float
    #: Time of the first claim; None before the first claim.
    started_at: float | None
    ended_at: float | None
    cancel_requested: bool
    cancel_reason: str | None
    # -- only used in roots --
    epoch: int
    #: The process that has claimed the root; None when it is not claimed.
    owner: str | None
    #: Token of the last claim or resume.
    token: str | None
    #: Time of the reaper's next check; None once the operation has ended.
    next_check_at: float | None
    #: Earliest time of the next claim. While an operation waits for a retry, this time is in the future.
    due_at: float
    #: Number of claims since the last checkpoint or resume.
    claim_count: int
    #: ``send_count`` is the number of times that the current step was sent, and ``sent_at`` is the time of the last
    #: send.
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
    #: JSON of the initial result before the task has ended, and of the final result after that; None for a blank
    #: result.
    result: str | None
    #: Number of recorded attempts.
    attempts: int
    #: If the task is an operation, the ``id`` of this operation; None for a plain task.
    child_id: int | None
    #: Number of recorded attempts at the time of the last resume. A retry policy counts only the attempts after a
    #: resume.
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
    #: The error of a failed attempt, limited to ``MAX_ERROR_LENGTH`` characters; None for a success.
    error: str | None


class EventRow(NamedTuple):
    """The row of one event of a root, or of a task or operation nested in it."""

    root_id: int
    at: float
    #: A key of :data:`EVENTS`.
    kind: str
    epoch: int
    #: The consumer that caused the event; None if a request from outside a consumer caused it.
    consumer: str | None
    #: The uuid of the task or nested operation that the event describes; None if the event describes the root.
    uuid: str | None
    text: str | None


#: Kinds of events, with their meanings.
EVENTS: Final[Mapping[str, str]] = {
    "accepted": "the operation was saved; from then on, kser guarantees that it ends",
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
    #: If the task is an operation, this operation; None for a plain task.
    child: NewOperation | None = None
    #: PENDING, or SUCCESS for a task that has already run. In the second case, ``result`` is the final result of the
    #: task.
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
    #: The tasks; None if a consumer builds them later, in the phase BUILD.
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

    #: The identifier of the claiming process. It is created at the start of the process, and has a random part.
    owner: str
    #: The random token of this claim. A repeated call has the same token.
    token: str
    #: Length of the lease in seconds.
    lease: float
    #: Maximum number of claims without a checkpoint. A step that exceeds this number counts as failed.
    max_claims: int


class Claim(NamedTuple):
    """A granted claim on a root."""

    id: int
    epoch: int
    #: The operations from the root down to the current operation.
    path: tuple[OperationRow, ...]
    #: The current task; None when the next action is to build, advance or end the operation.
    task: TaskRow | None
    #: The task after the current task in the same operation; the store reads it only for a distributed root.
    next_task: TaskRow | None = None
    #: True if the step was claimed more than ``max_claims`` times without a checkpoint. The consumer must then record
    #: the step as failed and must not run it.
    exhausted: bool = False

    @property
    def root(self) -> OperationRow:
        """The row of the root."""
        return self.path[0]


class ClaimRefused(NamedTuple):
    """A claim that was not granted, with the reason: ``ended``, ``held``, ``waiting`` or ``stale``."""

    reason: str
    root: OperationRow


class TaskOutcome(NamedTuple):
    """The outcome of an attempt at a task. The task may be a nested operation that has ended."""

    operation_id: int
    position: int
    #: Number of the attempt: the number of recorded attempts plus 1. It is 0 if no attempt was made; in that case, the
    #: store adds no attempt row.
    number: int
    #: SUCCESS, FAILED, or PENDING if a retry follows. In the last case, the attempt row gets the status FAILED.
    status: str
    #: JSON of the result. With the status PENDING it is None, and the stored result stays unchanged.
    result: str | None
    #: Duration of the attempt in seconds.
    duration: float
    #: The error of a failed attempt; None for a success.
    error: str | None


class NewEvent(NamedTuple):
    """An event to add. The store adds the root, the time, the epoch and the consumer to it."""

    kind: str
    uuid: str | None = None
    text: str | None = None


class OperationUpdate(NamedTuple):
    """The new position, status and results of an operation."""

    operation_id: int
    #: The stored step and phase must equal these two values; otherwise the store records nothing.
    stored_step: int
    stored_phase: str
    step: int
    phase: str
    status: str
    accumulated: str
    #: JSON of the final result; None before the operation has a final result.
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
    """The outcome of a step. The store records all of it in one transaction, or nothing.

    ``updates`` and ``outcomes`` start with the innermost operation and end with the outermost one. The last of
    ``updates`` belongs to the root, even if it does not change the position of the root.
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
    #: The message of the new current step; None if the stored message stays unchanged.
    target: StepMessage | None = None
    #: True to keep the claim; False to release the claim, which makes the step ready. A checkpoint that ends the root
    #: always releases the claim.
    keep: bool = True
    #: Seconds before a consumer may claim the step; only used if the checkpoint releases the claim.
    delay: float = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DueStep:
    """A root whose step the reaper must send."""

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
    #: The labels that an operation must have. An operation without one of them does not match.
    labels: Sequence[tuple[str, str]] = ()
    #: The uuid of an operation, to match its nested operations; None to match roots.
    parent: str | None = None
