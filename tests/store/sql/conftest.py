"""Fixtures of the SQL store tests: a store in SQLite and a store in PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kser.store.sql import SQLStore
from tests.postgres import Database


@pytest.fixture(scope="module", autouse=True)
def start_postgresql_first(request: pytest.FixtureRequest) -> None:
    """Start PostgreSQL, if a test needs it, before the leak detector lists the child processes."""
    if any(item.get_closest_marker("postgresql") for item in request.session.items):
        # A test that needs a missing server is skipped or fails by its own fixture.
        with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):
            request.getfixturevalue("database")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the SQLite file, which does not exist yet."""
    return tmp_path / "kser.db"


class ClockOffset:
    """The seconds by which the clock of a store is fast."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock_offset() -> ClockOffset:
    """Return the offset of the store's clock, which a test sets to let time pass."""
    return ClockOffset()


@pytest.fixture
def store(path: Path, clock_offset: ClockOffset) -> Iterator[SQLStore]:
    """Return a store in SQLite."""
    with contextlib.closing(SQLStore(f"sqlite:///{path}", clock_offset=clock_offset)) as store:
        yield store


@pytest.fixture
def postgresql_store(database: Database, clock_offset: ClockOffset) -> Iterator[SQLStore]:
    """Return a store in PostgreSQL, without operations."""
    database.empty()
    with contextlib.closing(SQLStore(database.uri, clock_offset=clock_offset)) as store:
        yield store


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def any_store(request: pytest.FixtureRequest) -> Any:
    """Return a store in SQLite, and in another test one in PostgreSQL."""
    return request.getfixturevalue("store" if request.param == "sqlite" else "postgresql_store")
