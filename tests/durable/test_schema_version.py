"""Tests of the schema version that a consumer accepts."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from kser.errors import SchemaMismatch
from kser.status import SUCCESS
from kser.store import open_store
from kser.store.memory import MemoryStore
from tests.consumer.harness import ConsumerThread, ScriptedTask, committed
from tests.durable.harness import Process, Sale, send_raw_message

pytestmark = pytest.mark.usefixtures("bus")


def test_schema_mismatch_ends_a_consumer_at_its_start() -> None:
    class OldStore(MemoryStore):
        def check(self) -> None:
            raise SchemaMismatch("the schema is too old")

    process = Process(OldStore(), Sale, workers=2, opens_store=False)
    with ConsumerThread(process.consumer) as thread:
        assert isinstance(thread.join(), SchemaMismatch)


def create_tables(path: Path, version: int, oldest: int) -> None:
    """Create the tables of kser with another schema version.

    :param oldest: the oldest version whose code can use these tables.
    """
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        store.check()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE kser_schema SET version = ?, oldest = ?", (version, oldest))
    database.close()


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (99, "has tables of version 99, which need a newer kser than this one, of version 2"),
        (1, "has tables of version 1, and this kser needs 2; run: python -m kser.store upgrade"),
    ],
)
def test_consumer_rejects_an_incompatible_schema_version_at_its_start(
    tmp_path: Path, version: int, problem: str
) -> None:
    """durability rule 34"""
    create_tables(tmp_path / "kser.db", version, version)
    store = open_store(f"sqlite:///{tmp_path}/kser.db")
    process = Process(store, Sale, opens_store=False)
    send_raw_message(Sale)
    with pytest.raises(SystemExit) as caught:
        process.consumer.run()
    store.close()
    assert (caught.value.code, type(caught.value.__cause__)) == (78, SchemaMismatch)
    assert problem in str(caught.value.__cause__)
    assert ScriptedTask.ran == []
    assert committed() in (None, 0)


def test_newer_compatible_schema_version_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 34: a rolling deployment upgrades the database first."""
    monkeypatch.setenv("KSER_TOPICS", "dice")
    create_tables(tmp_path / "kser.db", 99, 1)
    process = Process(open_store(f"sqlite:///{tmp_path}/kser.db"), Sale)
    send_raw_message(Sale)
    process.handle()
    operation = process.registry.get("1")
    assert operation is not None
    assert operation.status == SUCCESS
    process.consumer.close()
    process.registry.store.close()
