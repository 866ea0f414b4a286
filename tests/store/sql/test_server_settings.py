"""Tests of PostgreSQL servers, roles and databases with settings of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kser.store.base import Store
from tests.postgres import Database
from tests.store.harness import LEASE, SQLStoreHarness, due_steps, new_operation, reserve, row_of, save_and_claim

pytestmark = pytest.mark.postgresql

#: Values of ``extra_float_digits``: with a value below 1, the server rounds each number that it sends as text to 15
#: digits or fewer.
DIGITS = (-15, 0, 3)


@pytest.fixture(params=DIGITS)
def harness(request: pytest.FixtureRequest, postgresql: str) -> Iterator[SQLStoreHarness]:
    """Return stores in a database with a value of ``extra_float_digits``."""
    with contextlib.closing(Database(postgresql)) as database:
        database.run(f"ALTER DATABASE {database.name} SET extra_float_digits = {request.param}")
        with contextlib.closing(SQLStoreHarness(database.uri)) as harness:
            yield harness


def expired_steps(harness: SQLStoreHarness, count: int) -> None:
    """Save operations whose leases have expired."""
    for _ in range(count):
        save_and_claim(harness.store, new_operation(2))
    harness.advance(LEASE + 5)


def test_rounding_of_numbers_stops_no_takeover(harness: SQLStoreHarness) -> None:
    expired_steps(harness, 10)
    assert len(reserve(harness.store, 10)) == 10


def test_rounding_of_numbers_stops_no_send(harness: SQLStoreHarness) -> None:
    expired_steps(harness, 10)
    assert len(due_steps(harness.store)) == 10


def test_rounding_of_numbers_stops_no_end_of_a_reservation(harness: SQLStoreHarness) -> None:
    expired_steps(harness, 2)
    store: Store = harness.store
    returned, postponed = reserve(store)
    store.return_reservations([returned])
    store.postpone_takeover([postponed], 60)
    assert [step.uuid for step in reserve(store)] == [returned.uuid]
    assert row_of(store, postponed.uuid).send_count == 1


def test_rounding_of_numbers_changes_no_time_and_no_id(harness: SQLStoreHarness) -> None:
    rows = [save_and_claim(harness.store, new_operation(1)).root for _ in range(5)]
    assert [row.id for row in rows] == sorted({row.id for row in rows})
    for row in rows:
        assert row_of(harness.other, row.uuid) == row
        assert row.created_at == pytest.approx(harness.now, abs=60)
        # Times are measured in microseconds: at least one of these times has more digits than 15.
        assert row.take_at == row.lease_until
    assert any(round(row.created_at, 5) != row.created_at for row in rows)
