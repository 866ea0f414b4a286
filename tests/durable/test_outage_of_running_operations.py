"""Tests of outages while operations run, and of incompatible schema versions."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from kser.errors import SchemaMismatch, StoreMissing, StoreUnavailable
from kser.sequencing.registry import OperationRegistry
from kser.status import SUCCESS
from kser.store import open_store, retrying
from kser.store.base import Store
from kser.store.memory import MemoryStore
from kser.store.model import OperationRow
from tests.consumer.harness import ConsumerThread, ScriptedTask, committed, send_messages
from tests.durable.harness import BOTH_WAYS, DurableHarness, Process, Sale, Spread, send_raw_message, sent_messages
from tests.support import WAIT_SECONDS, lines, wait_until


class FaultyConsumer:
    """A store that does not work as long as a reason is given."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.trouble = ""
        #: How often it was asked in vain.
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.trouble:
                self.asked += 1
                raise StoreUnavailable(self.trouble)
            return found(*args, **kwargs)

        return call


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_BACKOFF", lambda _failures: 0.01)


@pytest.fixture
def troubled(harness: DurableHarness) -> FaultyConsumer:
    return FaultyConsumer(harness.store)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said about the database."""
    return [line for line in lines(caplog, logging.INFO) if line.startswith("Store: ")]


@BOTH_WAYS
@pytest.mark.parametrize("workers", [1, 3])
def test_outage_delays_running_operations_and_duplicates_no_record(
    harness: DurableHarness, troubled: FaultyConsumer, cls: type[Sale], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 33: one ERROR per change of state."""
    process = harness.process(cls, store=troubled, group="troubled", workers=workers)

    def fall() -> None:
        troubled.trouble = "it does not answer"

    ScriptedTask.script["1.b"] = fall
    send_raw_message(cls)
    with ConsumerThread(process.consumer):
        wait_until(lambda: troubled.asked > 3)
        assert ScriptedTask.ran == ["1.a", "1.b"]
        troubled.trouble = "it is read-only"
        asked = troubled.asked
        wait_until(lambda: troubled.asked > asked + 2)
        troubled.trouble = ""
        wait_until(harness.has_ended)
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert told(caplog) == [
        "Store: it does not answer; work in flight waits, and the call is retried",
        "Store: it is read-only; the database is still unavailable",
        "Store: the database works again",
    ]


def test_late_response_from_before_an_outage_does_not_end_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """durability rule 33: of many threads some are answered later than they asked."""
    caplog.set_level(logging.INFO, "kser")

    class Slow(MemoryStore):
        def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
            retrying_store.report_outage(StoreUnavailable("it does not answer"))
            return super().cancel(uuid, reason)

    retrying_store = retrying.RetryingStore(Slow())
    assert retrying_store.cancel("1", None) is None
    assert told(caplog) == ["Store: it does not answer; work in flight waits, and the call is retried"]
    assert retrying_store.get_operation("1") is None
    assert told(caplog)[1:] == ["Store: the database works again"]


class OneOutage:
    """A store whose first call finds the database away; the later ones return their own arguments."""

    name = "flaky://"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == 1:
                raise StoreUnavailable("it does not answer")
            return args, options

        return call


#: Arguments of each call that is repeated.
REPEATED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "check": ((), {}),
    "save": (("operation", "request"), {}),
    "claim": (("uuid", "step", "request"), {}),
    "get_operation": (("uuid",), {}),
    "get_tasks": ((7,), {}),
    "get_task": ((7, 1), {}),
    "get_children": ((7,), {}),
    "checkpoint": (("checkpoint",), {}),
    "renew": (([(7, 1)], "owner", 30.0), {}),
    "mark_sent": (([(7, 1)], 60.0), {}),
    "take_due_steps": ((500, "owner"), {"expired": True}),
    "postpone_send": (([(7, 1)], 3.0), {}),
    "cancel": (("uuid", "reason"), {}),
    "resume": (("uuid", 3, "token"), {}),
    "snapshot": (("uuid",), {}),
    "find": (("query", 50, "cursor"), {}),
    "purge": ((60.0, ["SUCCESS"], 500), {}),
}
#: Calls that return nothing.
WITHOUT_RESULT = {"check", "mark_sent", "postpone_send"}


@pytest.mark.parametrize("name", sorted(Store.__abstractmethods__ - {"close"}))
def test_retrying_store_repeats_each_call_of_the_contract(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 33"""
    direct: Any = OneOutage()
    args, options = REPEATED[name]
    with caplog.at_level(logging.INFO, "kser"):
        result = getattr(retrying.RetryingStore(direct), name)(*args, **options)
    assert result == (None if name in WITHOUT_RESULT else (args, options))
    assert direct.calls == [name] * 2
    assert len(told(caplog)) == 2


def test_outage_delays_new_operations_but_not_plain_tasks(harness: DurableHarness, troubled: FaultyConsumer) -> None:
    """durability rule 33: a plain task has no step to record and needs no database."""
    process = harness.process(Sale, store=troubled, workers=2)
    harness.first.consumer.close()
    troubled.trouble = "it does not answer"
    send_raw_message(Sale)
    send_messages("plain")
    with ConsumerThread(process.consumer):
        wait_until(lambda: "plain" in ScriptedTask.ran and troubled.asked > 2)
        assert committed() in (None, 0)
        troubled.trouble = ""
        wait_until(harness.has_ended)
    assert committed() == 2


def test_consumer_waiting_for_the_database_keeps_polling(harness: DurableHarness, troubled: FaultyConsumer) -> None:
    """durability rule 33"""
    process = harness.process(Sale, store=troubled, group="troubled")
    troubled.trouble = "it does not answer"
    polls: list[int] = []
    turn = process.consumer._kser_poller.poll_once

    def counted(timeout: float) -> Any:
        polls.append(1)
        return turn(timeout)

    process.consumer._kser_poller.poll_once = counted  # type: ignore[method-assign]
    send_raw_message(Sale)
    with ConsumerThread(process.consumer):
        wait_until(lambda: troubled.asked > 2)
        before = len(polls)
        wait_until(lambda: len(polls) > before + 2)
        troubled.trouble = ""
        wait_until(harness.has_ended)


def test_heartbeat_and_reaper_continue_after_an_outage(
    harness: DurableHarness, troubled: FaultyConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 33"""
    process = harness.process(Sale, store=troubled, group="troubled")
    harness.first.send(Sale)
    for log in harness.first.consumer.client.topics["dice"]:
        log.clear()
    troubled.trouble = "it does not answer"
    harness.advance_with_reaper(60, process)
    troubled.trouble = ""
    harness.advance_with_reaper(60, process)
    assert len(sent_messages()) >= 1
    assert told(caplog) == [
        "Store: it does not answer; work in flight waits, and the call is retried",
        "Store: the database works again",
    ]


@pytest.mark.parametrize("what", ["send", "get", "find", "cancel", "resume", "purge"])
def test_outage_raises_soon_outside_a_consumer(harness: DurableHarness, troubled: FaultyConsumer, what: str) -> None:
    """durability rule 33: callers do not wait without end."""
    process = harness.process(Sale, store=troubled, group="troubled")
    operation = process.class_of(Sale)("1").build()
    operation.send()
    troubled.trouble = "it does not answer"
    calls: dict[str, Any] = {
        "send": lambda: process.class_of(Sale)("2").build().send(),
        "get": lambda: process.registry.get("1"),
        "find": lambda: process.registry.find(),
        "cancel": operation.cancel,
        "resume": operation.resume,
        "purge": lambda: process.registry.purge(older_than=1),
    }
    with pytest.raises(StoreUnavailable, match="it does not answer"):
        calls[what]()
    assert troubled.asked == 3


def test_wait_during_an_outage_raises_after_its_timeout(harness: DurableHarness, troubled: FaultyConsumer) -> None:
    """durability rule 33"""
    process = harness.process(Sale, store=troubled, group="troubled")
    operation = process.class_of(Sale)("1").build().send()
    troubled.trouble = "it does not answer"
    with pytest.raises(StoreUnavailable, match="it does not answer"):
        operation.wait(0.1)


def test_locked_sqlite_file_is_awaited(tmp_path: Path, bus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 33: a real file, locked by another connection."""
    monkeypatch.setenv("KSER_TOPICS", "dice")
    store = open_store(f"sqlite:///{tmp_path}/kser.db")
    process = Process(store, Sale)
    other = sqlite3.connect(tmp_path / "kser.db", isolation_level=None, check_same_thread=False)
    locked = threading.Event()

    def lock() -> None:
        other.execute("BEGIN IMMEDIATE")
        locked.set()

    ScriptedTask.script["1.b"] = lock
    send_raw_message(Sale)
    with ConsumerThread(process.consumer):
        assert locked.wait(WAIT_SECONDS)
        wait_until(lambda: ScriptedTask.ran == ["1.a", "1.b"])
        other.execute("ROLLBACK")
        wait_until(lambda: (row := store.get_operation("1")) is not None and row.status == SUCCESS)
    other.close()
    store.close()


# -- another version ---------------------------------------------------------------------------------------------------


def newer(path: Path, version: int, oldest: int) -> None:
    """Make the tables those of another version of kser."""
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        store.check()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE kser_schema SET version = ?, oldest = ?", (version, oldest))
    database.close()


def test_consumer_rejects_an_incompatible_schema_version_at_its_start(tmp_path: Path, bus: Any) -> None:
    """durability rule 34"""
    newer(tmp_path / "kser.db", 99, 99)
    process = Process(None, Sale)
    process.registry._kser_store = open_store(f"sqlite:///{tmp_path}/kser.db")
    send_raw_message(Sale)
    with pytest.raises(SchemaMismatch, match="99"):
        process.consumer.run()
    process.registry._kser_store.close()
    assert (ScriptedTask.ran, committed()) in (([], None), ([], 0))


def test_newer_compatible_schema_version_is_accepted(tmp_path: Path, bus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 34: rolling deploys."""
    monkeypatch.setenv("KSER_TOPICS", "dice")
    newer(tmp_path / "kser.db", 99, 1)
    process = Process(open_store(f"sqlite:///{tmp_path}/kser.db"), Sale)
    send_raw_message(Sale)
    process.handle()
    operation = process.registry.get("1")
    assert operation is not None
    assert operation.status == SUCCESS
    process.consumer.close()
    process.registry.store.close()


def test_call_without_a_database_names_the_setting() -> None:
    registry = OperationRegistry()
    for call in (
        lambda: registry.get("1"),
        registry.find,
        lambda: registry.purge(older_than=1),
        lambda: registry.store,
    ):
        with pytest.raises(StoreMissing, match="there is no shared database: set KSER_DATABASE_URI in the environment"):
            call()
    assert registry._kser_background_service is None
    assert Spread.DISTRIBUTED
