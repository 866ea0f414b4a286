"""Tests of the renewer of leases: nothing that other threads or transactions do holds it up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kser.errors import StoreUnavailable
from kser.store.base import LeaseRenewer
from kser.store.model import Claim, ClaimRefused, RefusalReason
from kser.store.sql import SQLStore
from tests.postgres import Database
from tests.store.harness import (
    LEASE,
    claim_request,
    claim_root,
    new_operation,
    reserve,
    reserved_steps,
    row_of,
    save_and_claim,
    step_checkpoint,
)
from tests.store.sql.conftest import ClockOffset
from tests.store.sql.helpers import foreign_connection
from tests.support import WAIT_SECONDS, wait_until

TIMEOUT = 1.0


@pytest.fixture
def renewer(any_store: SQLStore) -> Iterator[LeaseRenewer]:
    """Return a renewer of the store."""
    with contextlib.closing(any_store.lease_renewer(TIMEOUT)) as renewer:
        yield renewer


def _key(claim: Claim) -> tuple[int, int]:
    return claim.id, claim.epoch


def test_renewer_waits_for_no_pooled_connection(any_store: SQLStore, renewer: LeaseRenewer) -> None:
    """durability rule 9: 60 threads that read and write at the same time take all connections of the pool."""
    claims = [save_and_claim(any_store, new_operation(2)) for _ in range(60)]
    stop = threading.Event()

    def work(claim: Claim) -> None:
        while not stop.is_set():
            any_store.snapshot(claim.root.uuid)
            any_store.renew([_key(claim)], "consumer-a", LEASE)

    threads = [threading.Thread(target=work, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    try:
        renewals = 0
        stop_at = time.monotonic() + WAIT_SECONDS
        while renewals < 5 and time.monotonic() < stop_at:
            # On a machine under load, a call may meet its deadline. The next heartbeat follows at once.
            with contextlib.suppress(StoreUnavailable):
                assert renewer.renew(map(_key, claims), "consumer-a", LEASE).held == {claim.id for claim in claims}
                renewals += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert renewals == 5


@pytest.mark.postgresql
def test_renewer_uses_its_own_connection_while_the_pool_is_empty(postgresql_store: SQLStore) -> None:
    claim = save_and_claim(postgresql_store, new_operation(2))
    with contextlib.ExitStack() as stack, contextlib.closing(postgresql_store.lease_renewer(TIMEOUT)) as renewer:
        for _ in range(8):
            stack.enter_context(postgresql_store._database.read())
        assert renewer.renew([_key(claim)], "consumer-a", LEASE) == ({claim.id}, set())


@pytest.mark.postgresql
def test_claim_whose_row_is_locked_is_not_lost(
    postgresql_store: SQLStore, database: Database, clock_offset: ClockOffset
) -> None:
    """durability rule 9: the other claims are renewed at once, and the locked one after its lock is released."""
    claims = [save_and_claim(postgresql_store, new_operation(2)) for _ in range(3)]
    everyone, locked = {claim.id for claim in claims}, claims[1]
    with contextlib.closing(postgresql_store.lease_renewer(TIMEOUT)) as renewer:
        with foreign_connection(database) as foreign:
            foreign.execute("SELECT 1 FROM kser_operation WHERE id = %s FOR UPDATE", [locked.id])
            assert renewer.renew(map(_key, claims), "consumer-b", LEASE) == (everyone, {locked.id})
            assert row_of(postgresql_store, claims[0].root.uuid).owner == "consumer-b"
            assert row_of(postgresql_store, locked.root.uuid).owner == "consumer-a"
            # The lease of the locked row expires. While the row is locked, no consumer can take the step over.
            clock_offset.seconds = LEASE + 5
            assert locked.root.uuid not in dict(reserved_steps(postgresql_store))
        # Another consumer is faster than the heartbeat, and gives the owner a grace period before its claim.
        (step,) = (step for step in reserve(postgresql_store) if step.id == locked.id)
        assert renewer.renew([_key(locked)], "consumer-b", LEASE) == ({locked.id}, set())
    refusal = postgresql_store.claim(step.uuid, step.uuid, claim_request("consumer-c", epoch=step.epoch))
    assert isinstance(refusal, ClaimRefused)
    assert refusal.reason == RefusalReason.HELD


@pytest.mark.postgresql
def test_locked_row_of_a_lost_claim_counts_as_lost(
    postgresql_store: SQLStore, database: Database, clock_offset: ClockOffset
) -> None:
    claim = save_and_claim(postgresql_store, new_operation(2))
    clock_offset.seconds = LEASE + 1
    claim_root(postgresql_store, claim.root, claim_request("consumer-b"))
    with (
        contextlib.closing(postgresql_store.lease_renewer(0.2)) as renewer,
        foreign_connection(database) as foreign,
    ):
        foreign.execute("SELECT 1 FROM kser_operation WHERE id = %s FOR UPDATE", [claim.id])
        assert renewer.renew([_key(claim)], "consumer-a", LEASE) == (set(), set())


@pytest.mark.postgresql
def test_renewer_ends_in_time_when_the_server_stands_still(postgresql_store: SQLStore, database: Database) -> None:
    """durability rule 9: the deadline is on the client's side, and the next call uses a new connection."""
    claim = save_and_claim(postgresql_store, new_operation(2))
    with contextlib.closing(postgresql_store.lease_renewer(TIMEOUT)) as renewer:
        assert renewer.renew([_key(claim)], "consumer-a", LEASE) == ({claim.id}, set())
        with foreign_connection(database) as foreign:
            query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'kser' AND query LIKE '%kser_operation%'"
            servers = [pid for (pid,) in foreign.execute(query).fetchall()]
        try:
            for pid in servers:
                os.kill(pid, signal.SIGSTOP)
            started_at = time.monotonic()
            with pytest.raises(StoreUnavailable):
                renewer.renew([_key(claim)], "consumer-a", LEASE)
            assert time.monotonic() - started_at < WAIT_SECONDS / 2
            # The next call connects again, to a server process that runs.
            assert renewer.renew([_key(claim)], "consumer-a", LEASE) == ({claim.id}, set())
        finally:
            for pid in servers:
                os.kill(pid, signal.SIGCONT)


@pytest.mark.postgresql
def test_renewer_ends_in_time_when_no_server_answers(database: Database) -> None:
    """A server that accepts connections and never answers, as a machine under load does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        store = SQLStore(f"postgresql+psycopg://kser@127.0.0.1:{port}/kser")
        with contextlib.closing(store), contextlib.closing(store.lease_renewer(TIMEOUT)) as renewer:
            started_at = time.monotonic()
            with pytest.raises(StoreUnavailable):
                renewer.renew([(1, 1)], "consumer-a", LEASE)
            assert time.monotonic() - started_at < WAIT_SECONDS / 2


@pytest.mark.postgresql
def test_renewer_reconnects_after_the_server_closed_its_connection(
    postgresql_store: SQLStore, database: Database
) -> None:
    claim = save_and_claim(postgresql_store, new_operation(2))
    with contextlib.closing(postgresql_store.lease_renewer(TIMEOUT)) as renewer:
        renewer.renew([_key(claim)], "consumer-a", LEASE)
        database.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kser'")
        with pytest.raises(StoreUnavailable):
            renewer.renew([_key(claim)], "consumer-a", LEASE)
        assert renewer.renew([_key(claim)], "consumer-a", LEASE) == ({claim.id}, set())


def test_renewer_of_sqlite_waits_no_longer_than_its_timeout_for_another_process(store: SQLStore, path: Path) -> None:
    claim = save_and_claim(store, new_operation(2))
    with contextlib.closing(store.lease_renewer(0.3)) as renewer:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as foreign:
            foreign.execute("BEGIN IMMEDIATE")
            started_at = time.monotonic()
            with pytest.raises(StoreUnavailable, match="another process has held the write lock"):
                renewer.renew([_key(claim)], "consumer-a", LEASE)
            # Other statements wait for 30 s.
            assert time.monotonic() - started_at < WAIT_SECONDS / 2
            foreign.execute("ROLLBACK")
        assert renewer.renew([_key(claim)], "consumer-a", LEASE) == ({claim.id}, set())
    ((timeout,),) = store._database._writer.cursor().execute("PRAGMA busy_timeout").fetchall()
    assert timeout == 30_000
    assert store.checkpoint(step_checkpoint(claim, 0)) == "RUNNING"


def test_renewer_of_sqlite_waits_no_longer_than_its_timeout_for_another_thread(store: SQLStore) -> None:
    claim = save_and_claim(store, new_operation(2))
    inside, leave = threading.Event(), threading.Event()

    def write() -> None:
        with store._database.write():
            inside.set()
            leave.wait(WAIT_SECONDS)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        wait_until(inside.is_set)
        with contextlib.closing(store.lease_renewer(0.3)) as renewer:
            with pytest.raises(StoreUnavailable, match=r"another thread has written to it for longer than 0\.3 s"):
                renewer.renew([_key(claim)], "consumer-a", LEASE)
            leave.set()
            thread.join()
            assert renewer.renew([_key(claim)], "consumer-a", LEASE) == ({claim.id}, set())
    finally:
        leave.set()
        thread.join()
