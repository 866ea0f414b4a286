"""Stores under test, and operations to save in them."""

from __future__ import annotations

import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kser import status as states
from kser.store.base import Store
from kser.store.memory import MemoryStore
from kser.store.model import (
    Checkpoint,
    Claim,
    ClaimRequest,
    Mode,
    NewEvent,
    NewOperation,
    NewTask,
    OperationRow,
    OperationUpdate,
    Phase,
    StepMessage,
    TaskOutcome,
)

LEASE = 30.0
RESEND = 60.0
#: Seconds by which times may differ that are taken one after the other.
CLOSE = 5.0


class StoreHarness(ABC):
    """A database, with a clock that a test puts forward."""

    @property
    @abstractmethod
    def store(self) -> Store:
        """A store in it."""

    @property
    @abstractmethod
    def other(self) -> Store:
        """One of another process, as far as that can be."""

    @property
    @abstractmethod
    def now(self) -> float:
        """The time by the store's clock."""

    @abstractmethod
    def advance(self, seconds: float) -> None:
        """Let time pass."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""


class MemoryStoreHarness(StoreHarness):
    """This process."""

    def __init__(self) -> None:
        self.shift = 0.0
        self._store = MemoryStore(clock=lambda: self.now)

    @property
    def store(self) -> Store:
        return self._store

    @property
    def other(self) -> Store:
        return self._store

    @property
    def now(self) -> float:
        return time.time() + self.shift

    def advance(self, seconds: float) -> None:
        self.shift += seconds

    def close(self) -> None:
        self._store.close()


class SQLStoreHarness(StoreHarness):
    """A database at an address, whose clock is this machine's."""

    def __init__(self, uri: str) -> None:
        # SQLAlchemy is optional, and only tests of SQL need it.
        from kser.store.sql import SQLStore

        self._shift = 0.0
        self._stores = [SQLStore(uri, clock_offset=lambda: self._shift) for _ in range(2)]

    @property
    def store(self) -> Any:
        return self._stores[0]

    @property
    def other(self) -> Any:
        return self._stores[1]

    @property
    def now(self) -> float:
        return time.time() + self._shift

    def advance(self, seconds: float) -> None:
        self._shift += seconds

    def close(self) -> None:
        for store in self._stores:
            store.close()


def unique_name(prefix: str = "") -> str:
    """A name that nothing else has."""
    return f"{prefix}{uuid.uuid4()}"


def new_task(child: NewOperation | None = None, **values: Any) -> NewTask:
    """A task, perhaps one that is an operation itself."""
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
    """An operation with so many tasks, or with these; with None they are not built."""
    built = [new_task() for _ in range(tasks)] if isinstance(tasks, int) else tasks
    own = unique_name()
    phase = Phase.BUILD if built is None else Phase.RUN_TASK if built else Phase.END_SUCCESS
    operation = NewOperation(
        uuid=own,
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
        target=StepMessage(own, "shop.PlaceOrder", "orders"),
    )
    operation = replace(operation, **values)
    if "target" in values:
        return operation
    # Without another target the first step is the operation itself.
    return replace(operation, target=StepMessage(operation.uuid, operation.entrypoint, operation.topic))


def claim_request(owner: str = "consumer-a", **values: Any) -> ClaimRequest:
    """Return a request for a claim, with a token of its own."""
    return replace(ClaimRequest(owner=owner, token=unique_name("token-"), lease=LEASE, max_claims=20), **values)


def save_and_claim(store: Store, new_operation: NewOperation, request: ClaimRequest | None = None) -> Claim:
    """Save and claim an operation."""
    claim = store.save(new_operation, request or claim_request())
    assert isinstance(claim, Claim)
    return claim


def claim_root(store: Store, row: OperationRow, request: ClaimRequest | None = None) -> Claim:
    """Claim a root that is free."""
    claim = store.claim(row.uuid, row.target.uuid, request or claim_request())
    assert isinstance(claim, Claim)
    return claim


def resume_stored(store: Store, uuid: str) -> OperationRow:
    """Resume an operation as it is stored now."""
    row = store.resume(uuid, row_of(store, uuid).epoch, unique_name("token-"))
    assert row is not None
    return row


def row_of(store: Store, uuid_or_id: str) -> OperationRow:
    """The row of an operation that is there."""
    row = store.get_operation(uuid_or_id)
    assert row is not None
    return row


def update_of(row: OperationRow, step: int, **values: Any) -> OperationUpdate:
    """Return the update that makes a task the current one."""
    update = OperationUpdate(
        row.id, row.step, row.phase, step, Phase.RUN_TASK, states.RUNNING, f'{{"up to": {step}}}', None
    )
    return update._replace(**values)


def outcome_of(row: OperationRow, step: int, number: int = 1, **values: Any) -> TaskOutcome:
    """Return the outcome of a successful attempt at a task."""
    return TaskOutcome(row.id, step, number, states.SUCCESS, f'{{"of": {step}}}', 0.25, None)._replace(**values)


def step_checkpoint(claim: Claim, step: int, **values: Any) -> Checkpoint:
    """Return the checkpoint after the task at ``step`` of a root without nested operations: the next one is current."""
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
    """Let a reaper take due steps, and return their uuids and reasons."""
    return [(step.uuid, step.reason) for step in store.take_due_steps(limit, "reaper", expired=expired)]


def run_concurrently(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls in threads at the same time, and return the result or exception of each."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
