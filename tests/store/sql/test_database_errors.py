"""Tests of database errors: locks, full disks, lost connections and outages."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from kser import status as states
from kser.errors import StoreError, StoreUnavailable
from kser.store.model import Claim, OperationQuery
from kser.store.sql import SQLStore, schema
from kser.store.sql.store import database_at
from tests.conftest import own_postgresql
from tests.postgres import Database
from tests.store.harness import (
    TIME_TOLERANCE,
    claim_request,
    new_operation,
    outcome_of,
    row_of,
    save_and_claim,
    step_checkpoint,
)
from tests.store.sql.helpers import GroupCommitGate
from tests.support import WAIT_SECONDS, run_concurrently, wait_until


def test_locked_sqlite_file_raises_store_unavailable_and_recovers(path: Path) -> None:
    """durability rule 33: a failed checkpoint records nothing, and its repetition succeeds after the lock."""
    with contextlib.closing(SQLStore(f"sqlite:///{path}?timeout=0.2")) as store:
        claim = save_and_claim(store, new_operation(3))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as foreign:
            foreign.execute("BEGIN IMMEDIATE")
            for call in (
                lambda: store.checkpoint(step_checkpoint(claim, 0)),
                lambda: store.renew([(claim.id, 1)], "a", 30),
            ):
                with pytest.raises(StoreUnavailable, match="another process has held the write lock"):
                    call()
            foreign.execute("ROLLBACK")
        assert store.checkpoint(step_checkpoint(claim, 0)) == states.RUNNING


def test_read_only_sqlite_file_raises_store_unavailable(store: SQLStore) -> None:
    claim = save_and_claim(store, new_operation(3))
    with store._database.write() as transaction:
        transaction._cursor.execute("SELECT 1")
    store._database._writer.execute("PRAGMA query_only = 1")  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable, match="not allowed to write"):
        store.checkpoint(step_checkpoint(claim, 0))
    store._database._writer.execute("PRAGMA query_only = 0")  # type: ignore[attr-defined]
    assert store.checkpoint(step_checkpoint(claim, 0)) == states.RUNNING


def test_full_disk_raises_store_unavailable(store: SQLStore) -> None:
    claim = save_and_claim(store, new_operation(3))
    writer = store._database._writer  # type: ignore[attr-defined]
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    large = step_checkpoint(claim, 0, outcomes=[outcome_of(claim.root, 0, result="x" * 1_000_000)])
    with pytest.raises(StoreUnavailable, match="disk is full: make room"):
        store.checkpoint(large)
    assert row_of(store, claim.root.uuid).step == 0
    writer.execute("PRAGMA max_page_count = 1000000")
    assert store.checkpoint(large) == states.RUNNING


def test_file_that_is_no_database_raises_store_unavailable(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)
    with (
        contextlib.closing(SQLStore(f"sqlite:///{path}")) as store,
        pytest.raises(StoreUnavailable, match="not a SQLite database"),
    ):
        store.check()


def test_missing_folder_of_a_sqlite_file_is_named(tmp_path: Path) -> None:
    with (
        contextlib.closing(SQLStore(f"sqlite:///{tmp_path}/no/kser.db")) as store,
        pytest.raises(StoreUnavailable, match="the folder of the file must exist"),
    ):
        store.save(new_operation(1))


def test_missing_table_raises_store_unavailable(any_store: SQLStore) -> None:
    any_store.save(new_operation(1))
    with any_store._database.write() as transaction:
        transaction._cursor.execute("ALTER TABLE kser_event RENAME TO gone")
    try:
        with pytest.raises(StoreUnavailable, match=r"python -m kser\.store"):
            any_store.save(new_operation(1))
    finally:
        with any_store._database.write() as transaction:
            transaction._cursor.execute("ALTER TABLE gone RENAME TO kser_event")


@pytest.mark.parametrize("text", ["nul \0", "lone surrogate \ud800"])
def test_text_that_a_column_cannot_store_is_rejected(any_store: SQLStore, text: str) -> None:
    any_store.save(new_operation(1))
    # SQLite stores a NUL as any other character.
    if any_store._database.json_batches or "\0" not in text:
        with pytest.raises(StoreError):
            any_store.save(new_operation(1, entrypoint=text))
    for call in (lambda: any_store.get_operation(text), lambda: any_store.claim(text, text, claim_request())):
        # A driver may reject the text as a parameter.
        with contextlib.suppress(StoreError):
            assert call() is None
    assert isinstance(any_store.save(new_operation(1)), int)


def test_closed_store_releases_the_sqlite_file_and_reopens_it(store: SQLStore, path: Path) -> None:
    save_and_claim(store, new_operation(1))
    store.close()
    assert not path.with_name("kser.db-wal").exists()
    assert len(store.find(OperationQuery(), 5).rows) == 1


@pytest.mark.postgresql
def test_killed_server_raises_store_unavailable_until_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """durability rules 10 and 33: each call can be repeated with the same arguments."""
    caplog.set_level(logging.WARNING)
    with own_postgresql() as server, contextlib.closing(database_at(server.uri)) as database:
        schema.upgrade(database)
        with contextlib.closing(SQLStore(server.uri)) as store:
            claims = [save_and_claim(store, new_operation(3)) for _ in range(8)]
            checkpoints = [step_checkpoint(claim, 0) for claim in claims]
            run_concurrently(*(lambda item=item: store.checkpoint(item) for item in checkpoints))
            server.stop("immediate")
            calls: list[Callable[[], Any]] = [lambda item=item: store.checkpoint(item) for item in checkpoints]
            calls += [
                lambda: store.get_operation("x"),
                lambda: store.renew([(1, 1)], "a", 30),
                lambda: store.save(new_operation(1)),
            ]
            start = time.monotonic()
            assert {type(result) for result in run_concurrently(*calls)} == {StoreUnavailable}
            assert time.monotonic() - start < WAIT_SECONDS
            server.start()
            results: list[Any] = []

            def every_call_succeeds() -> bool:
                # The first calls may get broken connections from the pool.
                results[:] = run_concurrently(*calls)
                return StoreUnavailable not in {type(result) for result in results}

            wait_until(every_call_succeeds)
            assert results[: len(checkpoints)] == [states.RUNNING] * len(checkpoints)
            for claim in claims:
                stored = store.snapshot(claim.root.uuid)
                assert stored is not None
                assert (stored.operation.step, len(stored.attempts)) == (1, 1)


@pytest.mark.postgresql
def test_postgresql_session_has_statement_lock_and_idle_timeouts(
    postgresql_store: SQLStore, database: Database
) -> None:
    """A process that hangs in a transaction loses its locks after the timeout."""
    with postgresql_store._database.write() as transaction:
        cursor = transaction._cursor
        assert cursor.execute("SHOW statement_timeout").fetchone() == ("30s",)
        assert cursor.execute("SHOW lock_timeout").fetchone() == ("10s",)
        assert cursor.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("10s",)


@pytest.mark.postgresql
def test_terminated_connections_are_replaced(postgresql_store: SQLStore, database: Database) -> None:
    claim = save_and_claim(postgresql_store, new_operation(5))
    for step in range(3):
        database.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kser'")
        with pytest.raises(StoreUnavailable):
            postgresql_store.checkpoint(step_checkpoint(claim, step))
        assert postgresql_store.checkpoint(step_checkpoint(claim, step)) == states.RUNNING


@pytest.mark.postgresql
def test_group_commit_returns_claims_granted_before_a_lost_connection(
    postgresql_store: SQLStore, database: Database
) -> None:
    """The reasons of refused claims are read by a second query, whose connection may be lost."""
    operations = [new_operation(1) for _ in range(3)]
    for operation in operations:
        postgresql_store.save(operation)
    postgresql_store.claim(operations[2].uuid, operations[2].uuid, claim_request("another"))
    writer, write_batch = postgresql_store._writer, postgresql_store._writer._in_one_statement

    def lose_connection_afterwards(batch: Any) -> list[Any]:
        results = write_batch(batch)
        database.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kser'")
        return results

    writer._in_one_statement = lose_connection_afterwards  # type: ignore[method-assign]
    results = GroupCommitGate(postgresql_store).run(
        *(lambda uuid=root.uuid: postgresql_store.claim(uuid, uuid, claim_request()) for root in operations)
    )
    assert [type(result) for result in results] == [Claim, Claim, StoreUnavailable]


@pytest.mark.postgresql
def test_read_only_postgresql_session_raises_store_unavailable(postgresql_store: SQLStore, database: Database) -> None:
    claim = save_and_claim(postgresql_store, new_operation(3))
    separator = "&" if "?" in database.uri else "?"
    uri = f"{database.uri}{separator}options=-c%20default_transaction_read_only%3Don"
    with contextlib.closing(SQLStore(uri)) as store:
        with pytest.raises(StoreUnavailable, match="accepts no writes"):
            store.checkpoint(step_checkpoint(claim, 0))
        assert row_of(store, claim.root.uuid).step == 0


@pytest.mark.postgresql
def test_timestamps_come_from_the_postgresql_clock(postgresql_store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 11: a wrong clock of a host affects neither times nor the order of ids."""
    before = save_and_claim(postgresql_store, new_operation(1))
    correct_time = time.time
    monkeypatch.setattr("kser.store.sql.postgresql.time.time", lambda: correct_time() - 5000)
    after = save_and_claim(postgresql_store, new_operation(1))
    assert after.id > before.id
    row = after.root
    assert row.started_at is not None
    assert row.created_at == pytest.approx(correct_time(), abs=TIME_TOLERANCE)
    assert row.created_at <= row.started_at
    assert row.started_at == pytest.approx(correct_time(), abs=TIME_TOLERANCE)


def test_sqlalchemy_errors_are_wrapped(any_store: SQLStore) -> None:
    any_store.check()
    with pytest.raises(StoreUnavailable), any_store._database.inspect_connection() as connection:
        connection.execute(text("SELECT no_such_column FROM kser_operation"))
