"""Tests of every store: one contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Database
from tests.store.contract import StoreContract
from tests.store.harness import MemoryWorld, SqlWorld, World


class TestMemory(StoreContract):
    @pytest.fixture
    def world(self) -> World:
        return MemoryWorld()


class TestSqlite(StoreContract):
    @pytest.fixture
    def world(self, tmp_path: Path) -> Iterator[World]:
        world = SqlWorld(f"sqlite:///{tmp_path}/kser.db")
        yield world
        world.close()


@pytest.mark.postgresql
class TestPostgresql(StoreContract):
    @pytest.fixture
    def world(self, database: Database) -> Iterator[World]:
        database.empty()
        world = SqlWorld(database.uri)
        yield world
        world.close()
