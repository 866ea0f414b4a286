"""Tests of processes and transactions that use one database at the same time."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from kser import status as states
from kser.errors import (
    FencedError,
)
from kser.store.model import OperationQuery
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
from tests.store.sql.helpers import run_in_processes
from tests.support import wait_until


def test_concurrent_processes_claim_each_operation_once(any_store: SQLStore) -> None:
    """Rule 7: each operation is for one of them."""
    for _ in range(40):
        any_store.save(new_operation(2))
    # With the password, if there is one.
    uri = any_store._database.url.render_as_string(hide_password=False)
    assert sum(run_in_processes(4, "work", uri)) == 40
    rows = any_store.find(OperationQuery(), 100).rows
    assert {(row.status, row.epoch) for row in rows} == {(states.SUCCESS, 2)}


def test_sqlite_readers_do_not_wait_for_a_writer(store: SQLStore, path: Path) -> None:
    claim = save_and_claim(store, new_operation(1))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        foreign.execute("UPDATE kser_operation SET step = 5")
        begun = time.monotonic()
        assert row_of(store, claim.root.uuid).step == 0
        assert len(store.find(OperationQuery(), 5).rows) == 1
        assert time.monotonic() - begun < 5
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
    in_postgresql: SQLStore, database: Database, clock_offset: ClockOffset
) -> None:
    """Rule 20: the reaper does not wait for a locked row."""
    operations = [new_operation(1), new_operation(1)]
    for each in operations:
        in_postgresql.save(each)
    clock_offset.seconds = 10
    with psycopg.connect(database.uri.replace("+psycopg", "")) as foreign:
        foreign.execute("SELECT 1 FROM kser_operation WHERE uuid = %s FOR UPDATE", [operations[0].uuid])
        assert due_steps(in_postgresql) == [(operations[1].uuid, "unsent")]
    assert due_steps(in_postgresql) == [(operations[0].uuid, "unsent")]


@pytest.mark.postgresql
def test_heartbeat_renews_locked_claims_after_the_other_ones(in_postgresql: SQLStore, database: Database) -> None:
    """Rule 9: and those that are not are not waited with."""
    claims = [save_and_claim(in_postgresql, new_operation(1)) for _ in range(3)]
    results: list[Any] = []
    with psycopg.connect(database.uri.replace("+psycopg", "")) as foreign:
        foreign.execute("SELECT 1 FROM kser_operation WHERE id = %s FOR UPDATE", [claims[1].id])
        pairs = [(claim.id, 1) for claim in claims]
        thread = threading.Thread(target=lambda: results.append(in_postgresql.renew(pairs, "consumer-b", 300)))
        thread.start()
        wait_until(lambda: row_of(in_postgresql, claims[2].root.uuid).owner == "consumer-b")
        assert results == []
    thread.join()
    assert results == [{claim.id for claim in claims}]
    assert {row.owner for row in in_postgresql.find(OperationQuery(), 5).rows} == {"consumer-b"}


@pytest.mark.postgresql
def test_claim_that_waited_for_another_claim_is_refused(in_postgresql: SQLStore, database: Database) -> None:
    """Rule 7: a compare-and-set, also where a statement sees rows as they were when it began."""
    root = new_operation(1)
    in_postgresql.save(root)
    results: list[Any] = []
    with psycopg.connect(database.uri.replace("+psycopg", "")) as foreign:
        foreign.execute(
            "UPDATE kser_operation SET status = 'RUNNING', owner = 'other', token = 'other', epoch = 1,"
            " next_check_at = next_check_at + 100 WHERE uuid = %s",
            [root.uuid],
        )
        thread = threading.Thread(
            target=lambda: results.append(in_postgresql.claim(root.uuid, root.uuid, claim_request()))
        )
        thread.start()
        time.sleep(0.3)
    thread.join()
    assert results[0].reason == "held"


@pytest.mark.postgresql
def test_claim_that_waited_for_a_checkpoint_sees_its_changes(in_postgresql: SQLStore, database: Database) -> None:
    """Rule 7: only what a statement changes is looked at again after it waited; the rest is as it was when it began."""
    root = new_operation(1)
    in_postgresql.save(root)
    results: list[Any] = []
    with psycopg.connect(database.uri.replace("+psycopg", "")) as foreign:
        foreign.execute("UPDATE kser_operation SET epoch = epoch + 2 WHERE uuid = %s", [root.uuid])
        foreign.execute("UPDATE kser_task SET attempts = 1")
        thread = threading.Thread(
            target=lambda: results.append(in_postgresql.claim(root.uuid, root.uuid, claim_request()))
        )
        thread.start()
        time.sleep(0.3)
    thread.join()
    assert (results[0].epoch, results[0].task.attempts) == (3, 1)
