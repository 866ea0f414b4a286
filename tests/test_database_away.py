"""A consumer that starts while the database is away waits for it (rule 33)."""

from __future__ import annotations

import threading

import pytest

from kser.errors import SchemaMismatch, StoreUnavailable
from kser.store.memory import MemoryStore
from tests.durable import Process, Sale
from tests.engine import InThread, until
from tests.support import message

pytestmark = pytest.mark.usefixtures("bus")


class AwayStore(MemoryStore):
    """Cannot be reached before somebody says so."""

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.Event()
        self.asked = 0

    def check(self) -> None:
        self.asked += 1
        if not self.here.is_set():
            raise StoreUnavailable("there is no server")
        super().check()


def arrive(process: Process) -> None:
    """A message comes of somebody who has no database."""
    process.registry.producer.send("dice", message(Sale, uuid="1"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_consumer_that_starts_while_the_database_is_away_waits_for_it(workers: int) -> None:
    store = AwayStore()
    process = Process(None, Sale, workers=workers)
    process.registry._store = store
    arrive(process)
    with InThread(process.consumer) as thread:
        # Those who wait, and what runs beside.
        until(lambda: store.asked > 6)
        assert thread.ending is None
        assert store.peek("1") is None
        store.here.set()
        until(lambda: (row := store.peek("1")) is not None and row.status == "SUCCESS")
        until(lambda: [each.name for each in threading.enumerate()].count("kser-beside") == 1)


def test_a_consumer_that_waits_for_its_database_from_the_start_can_be_ended() -> None:
    process = Process(None, Sale, workers=2)
    process.registry._store = store = AwayStore()
    arrive(process)
    with InThread(process.consumer) as thread:
        until(lambda: store.asked > 6)
        process.consumer.stop()
        assert isinstance(thread.join(), SystemExit)
    store.here.set()
    other = Process(store, Sale)
    assert other.handle() == 1, "the message was handed back"
    other.consumer.close()


def test_a_database_of_another_version_is_refused_at_the_start() -> None:
    class Old(MemoryStore):
        def check(self) -> None:
            raise SchemaMismatch("run something")

    process = Process(None, Sale, workers=2)
    process.registry._store = Old()
    with InThread(process.consumer) as thread:
        assert isinstance(thread.join(), SchemaMismatch)
