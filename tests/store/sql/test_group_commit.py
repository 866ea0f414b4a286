"""Tests of the group commit: concurrent writes share a transaction."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kser import status as states
from kser.errors import FencedError, StoreError, StoreUnavailable
from kser.store.model import Claim, ClaimRefused
from kser.store.sql import SQLStore
from kser.store.sql.database import SerializationConflict, Transaction
from kser.store.sql.group_commit import GroupCommit, PendingWrite
from tests.store.harness import (
    claim_request,
    new_operation,
    outcome_of,
    row_of,
    save_and_claim,
    step_checkpoint,
    update_of,
)
from tests.store.sql.helpers import GroupCommitGate
from tests.support import WAIT_SECONDS, wait_until


def test_group_commit_writes_concurrent_calls_in_one_transaction(any_store: SQLStore) -> None:
    """durability rule 14. SQLite writes one transaction, PostgreSQL one for each kind of write."""
    claims = [save_and_claim(any_store, new_operation(2)) for _ in range(5)]
    free = [new_operation(1) for _ in range(3)]
    for operation in free:
        any_store.save(operation)
    gate = GroupCommitGate(any_store)
    commits = _count_commits(any_store)
    results = gate.run(
        *(lambda claim=claim: any_store.checkpoint(step_checkpoint(claim, 0)) for claim in claims),
        *(lambda uuid=root.uuid: any_store.claim(uuid, uuid, claim_request()).epoch for root in free),
        *[lambda: any_store.save(new_operation(2))] * 2,
    )
    *statuses_and_epochs, first_id, second_id = results
    assert statuses_and_epochs == [states.RUNNING] * 5 + [1] * 3
    assert (type(first_id), type(second_id)) == (int, int)
    sizes = [2, 3, 5] if any_store._database.json_batches else [10]
    assert (sorted(gate.sizes), len(commits)) == (sizes, len(sizes))


def test_group_commit_includes_refused_claims(any_store: SQLStore) -> None:
    """After a crash the reaper sends steps that other consumers may claim first."""
    operations = [new_operation(1) for _ in range(5)]
    for operation in operations:
        any_store.save(operation)
    for operation in operations[2:]:
        any_store.claim(operation.uuid, operation.uuid, claim_request("another"))
    commits = _count_commits(any_store)
    results = GroupCommitGate(any_store).run(
        *(lambda uuid=root.uuid: any_store.claim(uuid, uuid, claim_request()) for root in operations)
    )
    assert [type(result) for result in results] == [Claim, Claim, ClaimRefused, ClaimRefused, ClaimRefused]
    assert len(commits) == (2 if any_store._database.json_batches else 1)


def _count_commits(store: SQLStore) -> list[None]:
    """Return a list that gets an element for each transaction that the store commits."""
    commits: list[None] = []
    database = store._database
    writing = database._writing

    @contextlib.contextmanager
    def counted(*arguments: Any) -> Iterator[Transaction]:
        with writing(*arguments) as transaction:
            yield transaction
        commits.append(None)

    database._writing = counted  # type: ignore[method-assign]
    return commits


def test_group_commit_rejects_an_invalid_value_alone(any_store: SQLStore) -> None:
    """durability rule 14: the group is split until the invalid write is alone."""
    claims = [save_and_claim(any_store, new_operation(3)) for _ in range(6)]
    offender = claims[2]
    invalid = step_checkpoint(offender, 0, outcomes=[outcome_of(offender.root, 0, status=None)])
    results = GroupCommitGate(any_store).run(
        *(
            lambda claim=claim: any_store.checkpoint(invalid if claim is offender else step_checkpoint(claim, 0))
            for claim in claims
        ),
        lambda: any_store.save(new_operation(1, params=None)),
        lambda: any_store.save(new_operation(1)),
    )
    assert [type(result) for result in results] == [str, str, StoreError, str, str, str, StoreError, int]
    assert "rejects the statement" in str(results[claims.index(offender)])
    for claim in claims:
        assert row_of(any_store, claim.root.uuid).step == (0 if claim is offender else 1)
    assert any_store.checkpoint(step_checkpoint(offender, 0)) == states.RUNNING


def test_group_commit_fences_each_checkpoint_alone(any_store: SQLStore) -> None:
    """durability rules 8, 14 and 24."""
    current, stale, cancelled, repeated = (save_and_claim(any_store, new_operation(3)) for _ in range(4))
    any_store.checkpoint(step_checkpoint(stale, 0, keep=False))
    any_store.cancel(cancelled.root.uuid, None)
    any_store.checkpoint(step_checkpoint(repeated, 0))
    status, error, cancelled_status, repeated_status = GroupCommitGate(any_store).run(
        lambda: any_store.checkpoint(step_checkpoint(current, 0)),
        lambda: any_store.checkpoint(step_checkpoint(stale, 0, token="another")),
        lambda: any_store.checkpoint(step_checkpoint(cancelled, 0)),
        lambda: any_store.checkpoint(step_checkpoint(repeated, 0)),
    )
    assert isinstance(error, FencedError)
    assert (status, cancelled_status, repeated_status) == (states.RUNNING, states.CANCELLED, states.RUNNING)


def test_group_commit_records_one_of_two_checkpoints_of_a_root(any_store: SQLStore) -> None:
    """durability rule 8: for example, an abandoned attempt ends beside its retry."""
    claim = save_and_claim(any_store, new_operation(3))
    other = step_checkpoint(
        claim, 0, updates=[update_of(claim.root, 2)], outcomes=[outcome_of(claim.root, 0, result='{"other": 1}')]
    )
    results = GroupCommitGate(any_store).run(
        lambda: any_store.checkpoint(step_checkpoint(claim, 0)), lambda: any_store.checkpoint(other)
    )
    assert sorted(type(result).__name__ for result in results) == ["FencedError", "str"]
    stored = any_store.snapshot(claim.root.uuid)
    assert stored is not None
    assert len(stored.attempts) == 1


def test_group_commit_stores_a_duplicate_operation_once(any_store: SQLStore) -> None:
    """durability rule 3."""
    root = new_operation(2)
    results = GroupCommitGate(any_store).run(
        *[lambda: any_store.save(root, claim_request())] * 2, lambda: any_store.save(new_operation(1), claim_request())
    )
    assert sorted(type(result).__name__ for result in results) == ["Claim", "Claim", "ClaimRefused"]


def test_group_commit_reports_a_database_error_to_every_caller(
    store: SQLStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = [save_and_claim(store, new_operation(2)) for _ in range(3)]
    monkeypatch.setattr(store._database, "_writing", _unavailable)
    calls = [lambda claim=claim: store.checkpoint(step_checkpoint(claim, 0)) for claim in claims]
    results = GroupCommitGate(store).run(*calls)
    assert [type(result) for result in results] == [StoreUnavailable] * 3
    assert len({id(result) for result in results}) == 3
    monkeypatch.undo()
    assert GroupCommitGate(store).run(*calls) == [states.RUNNING] * 3


@contextlib.contextmanager
def _unavailable(*_: Any) -> Iterator[Any]:
    raise StoreUnavailable("gone")
    yield


def test_serialization_conflict_is_retried(store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, conflicts = store._database._writing, iter([SerializationConflict("deadlock")] * 4)
    claim = save_and_claim(store, new_operation(3))

    @contextlib.contextmanager
    def conflicting(*arguments: Any) -> Iterator[Any]:
        for error in conflicts:
            raise error
        with writing(*arguments) as transaction:
            yield transaction

    monkeypatch.setattr(store._database, "_writing", conflicting)
    with pytest.raises(StoreUnavailable, match="deadlock"):
        store.checkpoint(step_checkpoint(claim, 0))
    assert store.checkpoint(step_checkpoint(claim, 0)) == states.RUNNING
    conflicts = iter([SerializationConflict("deadlock")])
    assert store.renew([(claim.id, 1)], "consumer-a", 30) == {claim.id}


def test_group_commit_continues_after_an_interrupted_leader() -> None:
    """Calls that were queued when the leader was interrupted are written by another leader."""
    interrupted = threading.Event()

    def run(entries: Any) -> None:
        if not interrupted.is_set():
            interrupted.set()
            wait_until(lambda: len(group._waiting) == 3)
            raise KeyboardInterrupt
        for entry in entries:
            entry.result = entry.item

    group: GroupCommit[int] = GroupCommit(run, 1)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: results.append(group.write(n))) for n in range(3)]

    def start() -> None:
        interrupted.wait(WAIT_SECONDS)
        for thread in threads:
            thread.start()

    starter = threading.Thread(target=start)
    starter.start()
    with pytest.raises(KeyboardInterrupt):
        group.write(99)
    for thread in (starter, *threads):
        thread.join(WAIT_SECONDS)
    assert sorted(results) == [0, 1, 2]
    assert group.write(7) == 7


def test_group_commit_reports_an_interrupted_leader_to_its_followers() -> None:
    started, may_continue = threading.Event(), threading.Event()

    def run(entries: list[PendingWrite[int]]) -> None:
        started.set()
        may_continue.wait(WAIT_SECONDS)
        if len(entries) > 1:
            raise KeyboardInterrupt
        entries[0].result = entries[0].item

    group: GroupCommit[int] = GroupCommit(run, 1)
    results: list[str] = []

    def write(number: int) -> None:
        try:
            results.append(str(group.write(number)))
        except (KeyboardInterrupt, StoreUnavailable) as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    threads[0].start()
    started.wait(WAIT_SECONDS)
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: len(group._waiting) == 3)
    may_continue.set()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert sorted(results) == ["0", "KeyboardInterrupt", "StoreUnavailable", "StoreUnavailable"]
