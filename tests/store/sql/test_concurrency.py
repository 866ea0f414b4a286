"""Tests of processes and transactions that use one database at the same time."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from kser import status as states
from kser.errors import FencedError
from kser.store.model import DueReason, OperationQuery, RefusalReason
from kser.store.sql import SQLStore
from tests.postgres import Database
from tests.store.harness import (
    claim_request,
    due_steps,
    new_operation,
    row_of,
    save_and_claim,
    step_checkpoint,
)
from tests.store.sql.conftest import ClockOffset
from tests.store.sql.helpers import foreign_connection, run_in_processes, wait_for_blocked_statement
from tests.support import wait_until


def test_concurrent_processes_claim_each_operation_once(any_store: SQLStore) -> None:
    """durability rule 7: an operation has one claim at a time."""
    for _ in range(40):
        any_store.save(new_operation(2))
    # The name of the store hides the password, which the processes need.
    uri = any_store._database.url.render_as_string(hide_password=False)
    assert sum(run_in_processes(4, "claim_and_run_all", uri)) == 40
    rows = any_store.find(OperationQuery(), 100).rows
    assert {(row.status, row.epoch) for row in rows} == {(states.SUCCESS, 2)}


def test_sqlite_readers_do_not_wait_for_a_writer(store: SQLStore, path: Path) -> None:
    """A reader that waited would raise StoreUnavailable, because the writer does not end its transaction meanwhile."""
    claim = save_and_claim(store, new_operation(1))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        foreign.execute("UPDATE kser_operation SET step = 5")
        assert row_of(store, claim.root.uuid).step == 0
        assert len(store.find(OperationQuery(), 5).rows) == 1
        foreign.execute("ROLLBACK")


def test_epoch_changed_by_another_process_fences_the_checkpoint(store: SQLStore, path: Path) -> None:
    claim = save_and_claim(store, new_operation(2))
    assert row_of(store, claim.root.uuid).epoch == 1
    with contextlib.closing(sqlite3.connect(path)) as foreign, foreign:
        foreign.execute("UPDATE kser_operation SET epoch = 9")
    assert row_of(store, claim.root.uuid).epoch == 9
    with pytest.raises(FencedError):
        store.checkpoint(step_checkpoint(claim, 0))


@pytest.mark.postgresql
def test_take_due_skips_rows_locked_by_another_transaction(
    postgresql_store: SQLStore, database: Database, clock_offset: ClockOffset
) -> None:
    """durability rule 20: a reaper does not wait for the row that another one has locked."""
    operations = [new_operation(1), new_operation(1)]
    for operation in operations:
        postgresql_store.save(operation)
    clock_offset.seconds = 10
    with foreign_connection(database) as foreign:
        foreign.execute("SELECT 1 FROM kser_operation WHERE uuid = %s FOR UPDATE", [operations[0].uuid])
        assert due_steps(postgresql_store) == [(operations[1].uuid, DueReason.UNSENT)]
    assert due_steps(postgresql_store) == [(operations[0].uuid, DueReason.UNSENT)]


@pytest.mark.postgresql
def test_heartbeat_renews_unlocked_claims_without_waiting_for_locked_ones(
    postgresql_store: SQLStore, database: Database
) -> None:
    """durability rule 9: the heartbeat renews the locked claim when its lock is released."""
    claims = [save_and_claim(postgresql_store, new_operation(1)) for _ in range(3)]
    results: list[Any] = []
    with foreign_connection(database) as foreign:
        foreign.execute("SELECT 1 FROM kser_operation WHERE id = %s FOR UPDATE", [claims[1].id])
        pairs = [(claim.id, 1) for claim in claims]
        thread = threading.Thread(target=lambda: results.append(postgresql_store.renew(pairs, "consumer-b", 300)))
        thread.start()
        wait_until(lambda: row_of(postgresql_store, claims[2].root.uuid).owner == "consumer-b")
        assert results == []
    thread.join()
    assert results == [{claim.id for claim in claims}]
    assert {row.owner for row in postgresql_store.find(OperationQuery(), 5).rows} == {"consumer-b"}


@pytest.mark.postgresql
def test_claim_that_waited_for_another_claim_is_refused(postgresql_store: SQLStore, database: Database) -> None:
    """durability rule 7: PostgreSQL evaluates the condition of the claim again after it waited for the row."""
    root = new_operation(1)
    postgresql_store.save(root)
    results: list[Any] = []
    with foreign_connection(database) as foreign:
        foreign.execute(
            "UPDATE kser_operation SET status = 'RUNNING', owner = 'other', token = 'other', epoch = 1,"
            " lease_until = take_at + 100 WHERE uuid = %s",
            [root.uuid],
        )
        thread = threading.Thread(
            target=lambda: results.append(postgresql_store.claim(root.uuid, root.uuid, claim_request()))
        )
        thread.start()
        wait_for_blocked_statement(database)
    thread.join()
    (refusal,) = results
    assert refusal.reason == RefusalReason.HELD


@pytest.mark.postgresql
def test_claim_that_waited_for_a_checkpoint_sees_its_changes(postgresql_store: SQLStore, database: Database) -> None:
    """durability rule 7: after the wait PostgreSQL reads only the locked row again, not the row of its task."""
    root = new_operation(1)
    postgresql_store.save(root)
    results: list[Any] = []
    with foreign_connection(database) as foreign:
        foreign.execute("UPDATE kser_operation SET epoch = epoch + 2 WHERE uuid = %s", [root.uuid])
        foreign.execute("UPDATE kser_task SET attempts = 1")
        thread = threading.Thread(
            target=lambda: results.append(postgresql_store.claim(root.uuid, root.uuid, claim_request()))
        )
        thread.start()
        wait_for_blocked_statement(database)
    thread.join()
    (claim,) = results
    assert (claim.epoch, claim.task.attempts) == (3, 1)
