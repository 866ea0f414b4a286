"""Fixtures of the SQL store tests: a store in SQLite and one in PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kser.store.sql import SQLStore
from tests.postgres import Database


@pytest.fixture(scope="module", autouse=True)
def server_first(request: pytest.FixtureRequest) -> None:
    """Start PostgreSQL, if a test wants it, before anything looks at which processes a test leaves behind."""
    if any(item.get_closest_marker("postgresql") for item in request.session.items):
        # The tests that want it say so themselves.
        with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):
            request.getfixturevalue("database")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kser.db"


class ClockOffset:
    """Seconds that a test adds to the clock of its store."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock_offset() -> ClockOffset:
    return ClockOffset()


@pytest.fixture
def store(path: Path, clock_offset: ClockOffset) -> Iterator[SQLStore]:
    with contextlib.closing(SQLStore(f"sqlite:///{path}", clock_offset=clock_offset)) as store:
        yield store


@pytest.fixture
def in_postgresql(database: Database, clock_offset: ClockOffset) -> Iterator[SQLStore]:
    database.empty()
    with contextlib.closing(SQLStore(database.uri, clock_offset=clock_offset)) as store:
        yield store


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def any_store(request: pytest.FixtureRequest) -> Any:
    """A store in each of the two."""
    return request.getfixturevalue("store" if request.param == "sqlite" else "in_postgresql")
