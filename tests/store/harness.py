"""Harnesses of the stores under test, and builders of operations, claims and checkpoints."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kser import status as states
from kser.store.base import Store
from kser.store.memory import MemoryStore
from kser.store.model import (
    Checkpoint,
    Claim,
    ClaimRequest,
    DueStep,
    Mode,
    NewEvent,
    NewOperation,
    NewTask,
    OperationRow,
    OperationUpdate,
    Phase,
    StepMessage,
    TakeoverQuery,
    TaskOutcome,
)

#: Duration of a lease in seconds.
LEASE = 15.0
#: Seconds after which an unclaimed step is sent again: ``resend_after``.
RESEND = 60.0
#: Duration of a reservation in seconds, by default.
RESERVATION = 5.0
#: Duration of the reservations of :func:`reserve`. It is long, so that no reservation ends while a test stands still.
LONG_RESERVATION = 30.0
#: Seconds by which two times may differ that a test reads one after the other.
TIME_TOLERANCE = 5.0


class StoreHarness(ABC):
    """A store under test, with a clock that the test advances."""

    @property
    @abstractmethod
    def store(self) -> Store:
        """Return the store."""

    @property
    @abstractmethod
    def other(self) -> Store:
        """Return a store of another process on the same database; in memory, the same store."""

    @property
    @abstractmethod
    def now(self) -> float:
        """Return the time by the store's clock."""

    @abstractmethod
    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass by the store's clock."""

    @abstractmethod
    def close(self) -> None:
        """Close the stores."""


class MemoryStoreHarness(StoreHarness):
    """A store in the memory of this process."""

    def __init__(self) -> None:
        self._clock_offset = 0.0
        self._store = MemoryStore(clock=lambda: self.now)

    @property
    def store(self) -> Store:
        return self._store

    @property
    def other(self) -> Store:
        return self._store

    @property
    def now(self) -> float:
        return time.time() + self._clock_offset

    def advance(self, seconds: float) -> None:
        self._clock_offset += seconds

    def close(self) -> None:
        self._store.close()


class SQLStoreHarness(StoreHarness):
    """Two stores on the database at a URI, whose clock is the clock of this machine."""

    def __init__(self, uri: str) -> None:
        # SQLAlchemy is optional, so tests without SQL must not import it.
        from kser.store.sql import SQLStore

        self._clock_offset = 0.0
        self._stores = [SQLStore(uri, clock_offset=lambda: self._clock_offset) for _ in range(2)]

    @property
    def store(self) -> Any:
        return self._stores[0]

    @property
    def other(self) -> Any:
        return self._stores[1]

    @property
    def now(self) -> float:
        return time.time() + self._clock_offset

    def advance(self, seconds: float) -> None:
        self._clock_offset += seconds

    def close(self) -> None:
        for store in self._stores:
            store.close()


def unique_name(prefix: str = "") -> str:
    """Return a unique name."""
    return f"{prefix}{uuid.uuid4()}"


def new_task(child: NewOperation | None = None, **values: Any) -> NewTask:
    """Return a task; with ``child``, a nested operation as a task."""
    if child is not None:
        task = NewTask(
            uuid=child.uuid,
            entrypoint=child.entrypoint,
            topic=child.topic,
            params=child.params,
            metadata=child.metadata,
            result=None,
            child=child,
        )
    else:
        task = NewTask(
            uuid=unique_name(),
            entrypoint="shop.Charge",
            topic="gpu",
            params='{"amount": 7}',
            metadata='{"via": "test"}',
            result=None,
        )
    return replace(task, **values)


def new_operation(tasks: int | Sequence[NewTask] | None = 3, **values: Any) -> NewOperation:
    """Return an operation with a number of tasks or with the given ones; None leaves the tasks unbuilt."""
    built = [new_task() for _ in range(tasks)] if isinstance(tasks, int) else tasks
    own_uuid = unique_name()
    phase = Phase.BUILD if built is None else Phase.RUN_TASK if built else Phase.END_SUCCESS
    operation = NewOperation(
        uuid=own_uuid,
        entrypoint="shop.PlaceOrder",
        mode=Mode.LOCAL,
        topic="orders",
        overrides=3,
        params='{"order": 42, "nan": NaN}',
        metadata='{"customer": "7"}',
        accumulated='{"retval": {}}',
        tasks=built,
        labels=[],
        phase=phase,
        target=StepMessage(own_uuid, "shop.PlaceOrder", "orders"),
    )
    operation = replace(operation, **values)
    if "target" in values:
        return operation
    # The uuid may have changed, and the message of the first step names the operation.
    return replace(operation, target=StepMessage(operation.uuid, operation.entrypoint, operation.topic))


def claim_request(owner: str = "consumer-a", **values: Any) -> ClaimRequest:
    """Return a request for a claim, with a unique token."""
    return replace(ClaimRequest(owner=owner, token=unique_name("token-"), lease=LEASE, max_claims=20), **values)


def save_and_claim(store: Store, operation: NewOperation, request: ClaimRequest | None = None) -> Claim:
    """Save an operation and claim it in the same transaction."""
    claim = store.save(operation, request or claim_request())
    assert isinstance(claim, Claim)
    return claim


def claim_root(store: Store, row: OperationRow, request: ClaimRequest | None = None) -> Claim:
    """Claim a root operation that has no owner, or whose lease has expired."""
    claim = store.claim(row.uuid, row.target.uuid, request or claim_request())
    assert isinstance(claim, Claim)
    return claim


def resume_stored(store: Store, uuid: str) -> OperationRow:
    """Resume an operation from its current row."""
    row = store.resume(uuid, row_of(store, uuid).epoch, unique_name("token-"))
    assert row is not None
    return row


def row_of(store: Store, uuid_or_id: str) -> OperationRow:
    """Return the row of an operation that exists."""
    row = store.get_operation(uuid_or_id)
    assert row is not None
    return row


def update_of(row: OperationRow, step: int, **values: Any) -> OperationUpdate:
    """Return the update that makes the task at ``step`` the current one."""
    update = OperationUpdate(
        row.id, row.step, row.phase, step, Phase.RUN_TASK, states.RUNNING, f'{{"up to": {step}}}', None
    )
    return update._replace(**values)


def outcome_of(row: OperationRow, step: int, number: int = 1, **values: Any) -> TaskOutcome:
    """Return the outcome of a successful attempt at the task at ``step``."""
    return TaskOutcome(row.id, step, number, states.SUCCESS, f'{{"of": {step}}}', 0.25, None)._replace(**values)


def step_checkpoint(claim: Claim, step: int, **values: Any) -> Checkpoint:
    """Return the checkpoint after the task at ``step`` of a root operation: the next task becomes the current one."""
    root = claim.root._replace(step=step)
    assert root.token is not None
    checkpoint = Checkpoint(
        root_id=claim.id,
        epoch=claim.epoch,
        token=root.token,
        consumer="consumer-a",
        updates=[update_of(root, step + 1)],
        outcomes=[outcome_of(root, step)],
        events=[NewEvent("task-succeeded", f"task {step}")],
    )
    return checkpoint._replace(**values)


def ending_checkpoint(claim: Claim, step: int, status: str = states.SUCCESS, **values: Any) -> Checkpoint:
    """Return the checkpoint that ends the operation after its last task, at ``step``."""
    root = claim.root._replace(step=step)
    phase = Phase.END_SUCCESS if status == states.SUCCESS else Phase.END_FAILED
    update = update_of(root, step, phase=phase, status=status, result='{"all": "over"}')
    outcomes = [outcome_of(root, step, status=status, error=None if status == states.SUCCESS else "ValueError: no")]
    return step_checkpoint(
        claim, step, updates=[update], outcomes=outcomes, events=[NewEvent("ended", text=status)]
    )._replace(**values)


def event_kinds(store: Store, uuid: str) -> list[str]:
    """Return the kinds of the events of an operation."""
    stored = store.snapshot(uuid)
    assert stored is not None
    return [event.kind for event in stored.events]


def due_steps(store: Store, limit: int = 10, *, expired: bool = True) -> list[tuple[str, str]]:
    """Take due steps as a reaper does, and return their uuids and reasons."""
    return [(step.uuid, step.reason) for step in store.take_due_steps(limit, "reaper", expired=expired)]


#: The classes of the operations and tasks that :func:`new_operation` and :func:`new_task` return.
CLASSES = ("shop.PlaceOrder", "shop.Charge")


def reserve(store: Store, limit: int = 10, **values: Any) -> Sequence[DueStep]:
    """Reserve due steps for a takeover, as a consumer does that consumes all topics and knows all classes."""
    options: dict[str, Any] = {"topics": ["orders", "gpu"], "known": CLASSES, "expired": True, **values}
    reservation = options.pop("reservation", LONG_RESERVATION)
    return store.reserve_due_steps(TakeoverQuery(limit=limit, **options), reservation)


def reserved_steps(store: Store, limit: int = 10, **values: Any) -> list[tuple[str, str]]:
    """Reserve due steps for a takeover, and return their uuids and reasons."""
    return [(step.uuid, step.reason) for step in reserve(store, limit, **values)]
