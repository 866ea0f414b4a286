"""The data types of a store: the rows of its tables, and the requests that change these rows.

============== =====================================================================================================
operation      one row per operation. The row of a *root* (a root operation) also holds the claim on the root and on
               all operations nested in the root: owner, token, epoch and ``lease_until``
task           one row per task of an operation. Positions count from 0. A task that is itself an operation also has
               a row in the table of operations
attempt        one row per attempt at a task, with the outcome of the attempt; append-only
event          one row per event in the history of a root; append-only
label          one row per pair of key and value in the searchable metadata of an operation
============== =====================================================================================================

The types that the store instantiates for each row or checkpoint are named tuples, because the creation of a frozen
dataclass takes more than twice as long. In a benchmark with dataclasses for a checkpoint and its parts, a step took 1.5
to 4 % longer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


class Mode(StrEnum):
    """The execution mode of an operation."""

    #: Local: one consumer runs all steps.
    LOCAL = "local"
    #: Distributed: kser sends a message for each task, and any consumer in which the class of the task is registered
    #: can run the task.
    DISTRIBUTED = "distributed"


class Phase(StrEnum):
    """The next action of an operation. The values of the END members are the final statuses SUCCESS and FAILED."""

    #: Build the tasks.
    BUILD = "BUILD"
    #: Run the task at ``step``.
    RUN_TASK = "RUN_TASK"
    #: Choose the task that follows ``step``.
    CHOOSE_NEXT = "CHOOSE_NEXT"
    #: End the operation with the status SUCCESS.
    END_SUCCESS = "SUCCESS"
    #: End the operation with the status FAILED.
    END_FAILED = "FAILED"


class RefusalReason(StrEnum):
    """The reason why the store refuses a claim."""

    #: The operation has ended.
    ENDED = "ended"
    #: Another owner has a valid lease.
    HELD = "held"
    #: The current step waits: for a retry, whose ``due_at`` is in the future, or for a takeover, because several
    #: consumers have died during the step (see :data:`kser.store.model.IMMEDIATE_TAKEOVERS`).
    WAITING = "waiting"
    #: The lease of the owner has expired, and the request does not end the claim of such an owner.
    EXPIRED = "expired"
    #: The step or the epoch in the request is not the current one. For a save: the operation is already stored.
    STALE = "stale"
    #: The current step belongs to another topic than the one in the request.
    TOPIC = "topic"


#: Seconds after which a step that is ready to run and is not marked as sent becomes due.
RESEND_UNSENT_AFTER: Final = 3.0

#: Seconds for which a due step waits for a consumer that reserves it. After this time, a consumer that cannot run the
#: step sends its message.
SEND_DELAY: Final = 1.0

#: Maximum number of seconds between the reservation of a step by a reaper and the send of its message. After this time,
#: another reaper may reserve the step.
SEND_GRACE: Final = 10.0

#: Maximum number of seconds before an unclaimed step becomes due again.
MAX_RESEND_DELAY: Final = 3600.0

#: Number of takeovers of one step after an expired lease that happen as soon as the lease has expired. Each further
#: takeover waits twice as long as the one before, first 2 s and at most :data:`kser.store.model.MAX_TAKEOVER_DELAY`
#: seconds, so that a step that kills its process does not kill all consumers within minutes.
IMMEDIATE_TAKEOVERS: Final = 2
MAX_TAKEOVER_DELAY: Final = 300.0

#: A step fails after ``MAX_SENDS`` messages that were refused for an unknown class, if the first of these refusals was
#: at least ``UNKNOWN_AFTER`` seconds ago.
MAX_SENDS: Final = 20
UNKNOWN_AFTER: Final = 3600.0

#: Maximum length of the error text in an attempt row, in characters.
MAX_ERROR_LENGTH: Final = 2000


class DueReason(StrEnum):
    """The reason why a step is due: why a consumer takes it over, or sends its message."""

    #: The lease of the root's owner has expired.
    EXPIRED = "lease-expired"
    #: The step is ready to run, and is not marked as sent.
    UNSENT = "unsent"
    #: The step waited for a retry, and the delay before this retry has passed.
    RETRY = "retry-due"
    #: A client resumed the operation.
    RESUMED = "resumed"
    #: A consumer released its claim before it had run the step.
    RELEASED = "released"
    #: The message of the step was sent, or a takeover of the step ended before its claim, and no consumer has claimed
    #: the step since.
    UNCLAIMED = "unclaimed"
    #: Every consumer that received the step refused it, because the step's class is unknown there. The step must fail.
    UNKNOWN_CLASS = "unknown-class"


#: The reasons for which a consumer that has no free worker may take over one step.
URGENT: Final = (DueReason.EXPIRED, DueReason.RETRY)


class StepMessage(NamedTuple):
    """The message that starts a step. It names the task to run, or the operation to build, advance or end."""

    uuid: str
    entrypoint: str
    topic: str


class OperationRow(NamedTuple):
    """The row of an operation.

    A JSON column holds JSON text in the same format as a message: the text is ASCII, and may contain the literal
    ``NaN``, which standard JSON does not allow.
    """

    #: The id of the operation. Ids increase with the time of creation.
    id: int
    uuid: str
    entrypoint: str
    #: ``parent_id`` is the ``id`` of the parent operation, or None for a root. ``root_id`` is the ``id`` of the root;
    #: in the row of a root, ``root_id`` equals ``id``.
    parent_id: int | None
    root_id: int
    mode: str
    topic: str
    #: Flags of :mod:`kser.durable.serialization`: ``ENDS`` if the class overrides a method that is called at the end of
    #: the operation, ``CHOOSES`` if the class overrides a method that chooses the next task.
    overrides: int
    #: The params as a JSON object.
    params: str
    #: The metadata as a JSON object.
    metadata: str
    status: str
    #: The next action: BUILD, RUN_TASK, CHOOSE_NEXT, END_SUCCESS or END_FAILED.
    phase: str
    #: Position of the current task.
    step: int
    #: Number of tasks; None before the tasks are built.
    task_count: int | None
    #: JSON of the accumulated result.
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
    #: The process that holds the claim on the root; None if no process holds a claim.
    owner: str | None
    #: Token of the last claim or resume.
    token: str | None
    #: End of the owner's lease; None while no process holds a claim. A reservation does not change this time.
    lease_until: float | None
    #: Time from which a consumer may reserve the current step to take it over; None after the operation has ended.
    take_at: float | None
    #: Time from which a consumer that cannot run the current step sends the step's message, if the step is due and not
    #: reserved; None after the operation has ended.
    send_at: float | None
    #: Why the current step is due at ``take_at``: a DueReason other than UNKNOWN_CLASS, EXPIRED while a process holds a
    #: claim; None after the operation has ended.
    due_reason: str | None
    #: Earliest time at which a consumer may claim the root. While an operation waits for a retry, this time is in the
    #: future.
    due_at: float
    #: Number of claims since the last checkpoint or resume.
    claim_count: int
    #: ``send_count`` is the number of times that the message of the current step was sent, or that a takeover of the
    #: step ended before its claim, since the last claim. ``sent_at`` is the time of the last send.
    send_count: int
    sent_at: float | None
    #: ``refusal_count`` is the number of these messages that a consumer refused because the step's class is unknown
    #: there, and ``refused_since`` is the time of the first such refusal.
    refusal_count: int
    refused_since: float | None
    #: In a local operation, the paths of the classes that the current step needs besides the class of the operation, as
    #: a JSON list: the classes of the nested operations that contain the step, and of the current task. None in a
    #: distributed operation, or if only the class of the operation is needed.
    current_entrypoints: str | None
    #: The message that starts the current step.
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
    #: Until the task ends: its initial result as JSON. After the end of the task: its final result as JSON. None stands
    #: for a blank result.
    result: str | None
    #: Number of recorded attempts.
    attempts: int
    #: If the task is an operation, the ``id`` of this operation; None for any other task.
    child_id: int | None
    #: Number of recorded attempts at the time of the last resume. A retry policy counts only the attempts after the
    #: last resume.
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
    #: Owner name of the process that made the attempt: ``host:process id:random text``.
    consumer: str
    started_at: float
    ended_at: float
    #: The error of a failed attempt, limited to ``MAX_ERROR_LENGTH`` characters; None for a success.
    error: str | None


class EventRow(NamedTuple):
    """The row of one event, which describes a root, or a task or operation nested in the root."""

    root_id: int
    at: float
    #: A key of :data:`EVENTS`.
    kind: str
    epoch: int
    #: The consumer that caused the event; None if a client caused the event.
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
    "taken-over": "a consumer claims the current step without a message; the text of the event states the reason",
    "sent-again": "the reaper sent the message of the current step; the text of the event states the reason",
    "exhausted": "too many consumers died during a step",
    "cancel-requested": "a client requested to cancel the operation after its running task",
    "ended": "the operation ended; the text of the event is the final status",
    "resumed": "a client resumed the operation after it had ended",
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
    #: The nested operation, if the task is an operation; None for any other task.
    child: NewOperation | None = None
    #: PENDING, or SUCCESS if the task has already succeeded. With SUCCESS, ``result`` is the final result of the task.
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
    #: The tasks; None if a consumer must build the tasks in the phase BUILD.
    tasks: Sequence[NewTask] | None
    #: Searchable metadata.
    labels: Sequence[tuple[str, str]]
    #: The first phase: BUILD, RUN_TASK, or END_SUCCESS if the operation has no task left to run.
    phase: str
    #: The message of the first step; only used in roots.
    target: StepMessage
    #: Position of the first task that has not succeeded yet.
    step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimRequest:
    """A request for a claim."""

    #: The owner name of the process that requests the claim. Every process start creates a new name with a random part.
    owner: str
    #: The random token of this claim. If the caller repeats the call, it passes the same token, so that the store
    #: recognises the repeated call.
    token: str
    #: Length of the lease in seconds.
    lease: float
    #: Maximum number of claims of one step without a checkpoint. A further claim has ``exhausted`` set.
    max_claims: int
    #: The epoch of the root that the caller has reserved; None to claim at any epoch.
    epoch: int | None = None
    #: The topic through which the caller received or reserved the step; None to claim a step of any topic.
    topic: str | None = None
    #: False to refuse the claim if it would end the claim of an owner whose lease has expired.
    expired: bool = True
    #: The DueReason of the step, if the claim is that of a takeover; None for any other claim.
    taken_over: str | None = None


class Claim(NamedTuple):
    """A granted claim on a root."""

    id: int
    epoch: int
    #: The operations from the root down to the current operation.
    path: tuple[OperationRow, ...]
    #: The current task; None if the next action is to build, advance or end the current operation.
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
    """The refusal of a claim, with the reason, which is a RefusalReason."""

    reason: str
    root: OperationRow


class TaskOutcome(NamedTuple):
    """The outcome of an attempt at a task. The task may be a nested operation that has ended."""

    operation_id: int
    position: int
    #: Number of the attempt: the number of recorded attempts plus 1. The number is 0 if the store must not add an
    #: attempt row: for a nested operation, and for a task that was not attempted, for example because the claim was
    #: exhausted.
    number: int
    #: The new status of the task: SUCCESS, FAILED, or PENDING if the attempt failed and a retry follows. For SUCCESS,
    #: the row of the attempt gets the status SUCCESS, otherwise FAILED.
    status: str
    #: JSON of the result. With the status PENDING, ``result`` is None, and the stored result stays unchanged.
    result: str | None
    #: Duration of the attempt in seconds.
    duration: float
    #: The error of a failed attempt; None for a success.
    error: str | None


class NewEvent(NamedTuple):
    """A new event. The store completes the event with the root, the time, the epoch and the consumer."""

    kind: str
    uuid: str | None = None
    text: str | None = None


class OperationUpdate(NamedTuple):
    """The new position, status and results of an operation."""

    operation_id: int
    #: ``stored_step`` and ``stored_phase`` are the step and the phase that the worker expects in the operation's row.
    #: If the row has other values, the store records nothing of the checkpoint.
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
    """The outcome of a step. The store records the whole outcome in one transaction, or records nothing.

    ``updates`` and ``outcomes`` start with the innermost operation and end with the outermost operation. The last item
    of ``updates`` is always the update of the root, even if the position of the root does not change.
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
    #: The message that starts the next step; None if the stored message stays unchanged.
    target: StepMessage | None = None
    #: True to keep the claim; False to release the claim, so that another consumer can claim the next step. A
    #: checkpoint that ends the root always releases the claim.
    keep: bool = True
    #: Seconds before a consumer may claim the next step; only used if the checkpoint releases the claim.
    delay: float = 0
    #: Why the next step is due if the checkpoint releases the claim. With RETRY or RELEASED, the step is due after
    #: ``delay`` seconds. With UNSENT, the caller sends the step's message, so the step is due ``RESEND_UNSENT_AFTER``
    #: seconds later.
    due_reason: str = DueReason.UNSENT
    #: The new value of the root's ``current_entrypoints``.
    current_entrypoints: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DueStep:
    """A due step.

    The fields ``id``, ``uuid`` and ``epoch`` describe the root of the step; ``target`` is the message of the step.
    """

    id: int
    uuid: str
    epoch: int
    target: StepMessage
    #: A DueReason.
    reason: str
    #: The value of ``take_at`` in the row of the root; for a reserved step, the end of the reservation.
    take_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TakeoverQuery:
    """A query for due steps that a consumer can take over."""

    #: Maximum number of steps.
    limit: int
    #: Topics of the steps: the topics that the consumer reads.
    topics: Collection[str]
    #: Paths of the classes that the consumer knows. The class of the step's message must be among them, and all classes
    #: in the root's ``current_entrypoints``.
    known: Collection[str]
    #: True to find also the steps of roots whose lease has expired.
    expired: bool
    #: True to find only steps whose reason is urgent: an expired lease or a retry that is due.
    only_urgent: bool = False
    #: Seconds for which the steps must have been due.
    overdue: float = 0


class Page(NamedTuple):
    """One page of the operations that match a query, newest operations first."""

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
    """A query for operations. Except for ``parent``, a filter that is None matches every operation."""

    status: Collection[str] | None = None
    entrypoint: str | None = None
    #: Lower bound (inclusive) and upper bound (exclusive) of the time of creation.
    since: float | None = None
    until: float | None = None
    #: Labels as pairs of key and value. An operation matches only if it has all of these labels.
    labels: Sequence[tuple[str, str]] = ()
    #: The uuid of an operation: the query matches only operations that are tasks of this operation. Unlike the other
    #: filters, None is a filter here too: the query then matches only roots.
    parent: str | None = None
