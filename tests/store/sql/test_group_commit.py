"""Tests of the group commit: concurrent writes share a transaction."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kser import status as states
from kser.errors import (
    FencedError,
    StoreError,
    StoreUnavailable,
)
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
from tests.store.sql.helpers import HeldGroups
from tests.support import wait_until


def test_group_commit_writes_concurrent_calls_in_one_transaction(any_store: SQLStore) -> None:
    """Rule 14: saving, claiming and checkpoints, all in one; or each in one where one statement is a transaction."""
    claims = [save_and_claim(any_store, new_operation(2)) for _ in range(5)]
    free = [new_operation(1) for _ in range(3)]
    for each in free:
        any_store.save(each)
    held = HeldGroups(any_store)
    commits = _count_commits(any_store)
    results = held.together(
        *(lambda claim=claim: any_store.checkpoint(step_checkpoint(claim, 0)) for claim in claims),
        *(lambda uuid=root.uuid: any_store.claim(uuid, uuid, claim_request()).epoch for root in free),
        *[lambda: any_store.save(new_operation(2))] * 2,
    )
    assert results[:8] == [states.RUNNING] * 5 + [1] * 3
    assert [type(result) for result in results[8:]] == [int, int]
    sizes = [2, 3, 5] if any_store._database.json_batches else [10]
    assert (sorted(held.sizes), len(commits)) == (sizes, len(sizes))


def test_group_commit_includes_refused_claims(any_store: SQLStore) -> None:
    """Typical after a crash: the reaper has sent steps that other consumers have claimed."""
    operations = [new_operation(1) for _ in range(5)]
    for each in operations:
        any_store.save(each)
    for each in operations[2:]:
        any_store.claim(each.uuid, each.uuid, claim_request("another"))
    commits = _count_commits(any_store)
    results = HeldGroups(any_store).together(
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
    """Rule 14: the group is split."""
    claims = [save_and_claim(any_store, new_operation(3)) for _ in range(6)]
    offender = claims[2]
    bad = step_checkpoint(offender, 0, outcomes=[outcome_of(offender.root, 0, status=None)])
    results = HeldGroups(any_store).together(
        *(
            lambda claim=claim: any_store.checkpoint(bad if claim is offender else step_checkpoint(claim, 0))
            for claim in claims
        ),
        lambda: any_store.save(new_operation(1, params=None)),
        lambda: any_store.save(new_operation(1)),
    )
    assert [type(result) for result in results] == [str, str, StoreError, str, str, str, StoreError, int]
    assert "rejects the statement" in str(results[2])
    for claim in claims:
        assert row_of(any_store, claim.root.uuid).step == (0 if claim is offender else 1)
    assert any_store.checkpoint(step_checkpoint(offender, 0)) == states.RUNNING


def test_group_commit_fences_each_checkpoint_alone(any_store: SQLStore) -> None:
    """Rules 8, 14 and 24."""
    good, stale, cancelled, again = (save_and_claim(any_store, new_operation(3)) for _ in range(4))
    any_store.checkpoint(step_checkpoint(stale, 0, keep=False))
    any_store.cancel(cancelled.root.uuid, None)
    any_store.checkpoint(step_checkpoint(again, 0))
    results = HeldGroups(any_store).together(
        lambda: any_store.checkpoint(step_checkpoint(good, 0)),
        lambda: any_store.checkpoint(step_checkpoint(stale, 0, token="another")),
        lambda: any_store.checkpoint(step_checkpoint(cancelled, 0)),
        lambda: any_store.checkpoint(step_checkpoint(again, 0)),
    )
    assert isinstance(results.pop(1), FencedError)
    assert results == [states.RUNNING, states.CANCELLED, states.RUNNING]


def test_group_commit_records_one_of_two_checkpoints_of_a_root(any_store: SQLStore) -> None:
    """Rule 8: as when an attempt that was given up comes back."""
    claim = save_and_claim(any_store, new_operation(3))
    other = step_checkpoint(
        claim, 0, updates=[update_of(claim.root, 2)], outcomes=[outcome_of(claim.root, 0, result='{"other": 1}')]
    )
    results = HeldGroups(any_store).together(
        lambda: any_store.checkpoint(step_checkpoint(claim, 0)), lambda: any_store.checkpoint(other)
    )
    assert sorted(type(result).__name__ for result in results) == ["FencedError", "str"]
    stored = any_store.snapshot(claim.root.uuid)
    assert stored is not None
    assert len(stored.attempts) == 1


def test_group_commit_stores_a_duplicate_operation_once(any_store: SQLStore) -> None:
    """Rule 3."""
    root = new_operation(2)
    results = HeldGroups(any_store).together(
        *[lambda: any_store.save(root, claim_request())] * 2, lambda: any_store.save(new_operation(1), claim_request())
    )
    assert sorted(type(result).__name__ for result in results) == ["Claim", "Claim", "ClaimRefused"]


def test_group_commit_reports_a_database_error_to_every_caller(
    store: SQLStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = [save_and_claim(store, new_operation(2)) for _ in range(3)]
    monkeypatch.setattr(store._database, "_writing", _unavailable)
    calls = [lambda claim=claim: store.checkpoint(step_checkpoint(claim, 0)) for claim in claims]
    results = HeldGroups(store).together(*calls)
    assert [type(result) for result in results] == [StoreUnavailable] * 3
    assert len({id(result) for result in results}) == 3
    monkeypatch.undo()
    assert HeldGroups(store).together(*calls) == [states.RUNNING] * 3


@contextlib.contextmanager
def _unavailable(*_: Any) -> Iterator[Any]:
    raise StoreUnavailable("gone")
    yield


def test_serialization_conflict_is_retried(store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, failures = store._database._writing, iter([SerializationConflict("deadlock")] * 4)
    claim = save_and_claim(store, new_operation(3))

    @contextlib.contextmanager
    def sometimes(*arguments: Any) -> Iterator[Any]:
        for error in failures:
            raise error
        with writing(*arguments) as transaction:
            yield transaction

    monkeypatch.setattr(store._database, "_writing", sometimes)
    with pytest.raises(StoreUnavailable, match="deadlock"):
        store.checkpoint(step_checkpoint(claim, 0))
    assert store.checkpoint(step_checkpoint(claim, 0)) == states.RUNNING
    failures = iter([SerializationConflict("deadlock")])
    assert store.renew([(claim.id, 1)], "consumer-a", 30) == {claim.id}


def test_group_commit_continues_after_an_interrupted_leader() -> None:
    """The followers get an error, and another thread leads."""
    interrupted = threading.Event()

    def run(entries: Any) -> None:
        if not interrupted.is_set():
            interrupted.set()
            wait_until(lambda: len(group._waiting) == 3)
            raise KeyboardInterrupt
        for entry in entries:
            entry.result = entry.item

    group: GroupCommit[int] = GroupCommit(run, 1)
    others: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: others.append(group.write(n))) for n in range(3)]

    def start() -> None:
        interrupted.wait(10)
        for thread in threads:
            thread.start()

    starter = threading.Thread(target=start)
    starter.start()
    with pytest.raises(KeyboardInterrupt):
        group.write(99)
    for thread in (starter, *threads):
        thread.join(10)
    assert sorted(others) == [0, 1, 2]
    assert group.write(7) == 7


def test_group_commit_reports_an_interrupted_leader_to_its_followers() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def run(entries: list[PendingWrite[int]]) -> None:
        begun.set()
        go_on.wait(10)
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
    begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: len(group._waiting) == 3)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert sorted(results) == ["0", "KeyboardInterrupt", "StoreUnavailable", "StoreUnavailable"]
