"""Tests of the store contract on each store: in memory, in SQLite and in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Database
from tests.store.contract import StoreContract
from tests.store.harness import MemoryStoreHarness, SQLStoreHarness, StoreHarness


class TestMemory(StoreContract):
    @pytest.fixture
    def harness(self) -> StoreHarness:
        return MemoryStoreHarness()


class TestSqlite(StoreContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[StoreHarness]:
        harness = SQLStoreHarness(f"sqlite:///{tmp_path}/kser.db")
        yield harness
        harness.close()


@pytest.mark.postgresql
class TestPostgresql(StoreContract):
    @pytest.fixture
    def harness(self, database: Database) -> Iterator[StoreHarness]:
        database.empty()
        harness = SQLStoreHarness(database.uri)
        yield harness
        harness.close()
