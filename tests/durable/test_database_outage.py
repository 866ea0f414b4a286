"""Tests of database outages: at the start of a consumer, while operations run, and outside consumers."""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from kser.errors import StoreUnavailable
from kser.status import SUCCESS
from kser.store import open_store, retrying
from kser.store.base import Store
from kser.store.memory import MemoryStore
from kser.store.model import OperationRow
from tests.consumer.harness import ConsumerThread, ScriptedTask, committed, send_messages
from tests.durable.harness import (
    BOTH_MODES,
    DurableHarness,
    Process,
    RecordingStore,
    Sale,
    UnavailableStore,
    lose_records,
    send_raw_message,
    sent_messages,
)
from tests.support import WAIT_SECONDS, lines, wait_until

pytestmark = pytest.mark.usefixtures("bus")

NO_RESPONSE = "the database does not respond"
OUTAGE_START = f"Store: {NO_RESPONSE}; work in flight waits, and the call is retried"
OUTAGE_END = "Store: the database works again"


@pytest.fixture
def unavailable(harness: DurableHarness, short_backoff: None) -> UnavailableStore:
    """Return a store that fails while a test sets its error."""
    return UnavailableStore(harness.store)


def store_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines about the database."""
    return [line for line in lines(caplog, logging.INFO) if line.startswith("Store: ")]


# -- start of a consumer -----------------------------------------------------------------------------------------------


class UnreachableStore(MemoryStore):
    """A store whose check fails until ``is_reachable`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_reachable = threading.Event()
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        if not self.is_reachable.is_set():
            raise StoreUnavailable("the connection was refused")
        super().check()


@pytest.mark.parametrize("workers", [1, 2])
def test_consumer_started_during_a_database_outage_waits_for_the_database(workers: int) -> None:
    store = UnreachableStore()
    process = Process(store, Sale, workers=workers, opens_store=False)
    send_raw_message(Sale)
    with ConsumerThread(process.consumer) as thread:
        # The worker and the thread of the background service check the store.
        wait_until(lambda: store.checks > 6)
        assert thread.ending is None
        assert store.get_operation("1") is None
        store.is_reachable.set()
        wait_until(lambda: (row := store.get_operation("1")) is not None and row.status == SUCCESS)
        wait_until(lambda: [thread.name for thread in threading.enumerate()].count("kser-services") == 1)


def test_graceful_shutdown_ends_a_consumer_that_waits_for_its_database() -> None:
    store = UnreachableStore()
    process = Process(store, Sale, workers=2, opens_store=False)
    send_raw_message(Sale)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: store.checks > 6)
        process.consumer.stop()
        assert isinstance(thread.join(), SystemExit)
    store.is_reachable.set()
    second = Process(store, Sale)
    assert second.handle() == 1
    second.consumer.close()


# -- running operations ------------------------------------------------------------------------------------------------


@BOTH_MODES
@pytest.mark.parametrize("workers", [1, 3])
def test_outage_delays_running_operations_and_duplicates_no_record(
    harness: DurableHarness,
    unavailable: UnavailableStore,
    cls: type[Sale],
    workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """durability rule 33: each change of the state of the database is logged once."""
    process = harness.start_process(cls, store=unavailable, group="second", workers=workers)

    def start_outage() -> None:
        unavailable.error = NO_RESPONSE

    ScriptedTask.script["1.b"] = start_outage
    send_raw_message(cls)
    with ConsumerThread(process.consumer):
        wait_until(lambda: unavailable.failed_calls > 3)
        assert ScriptedTask.ran == ["1.a", "1.b"]
        unavailable.error = "the database is read-only"
        failed_before = unavailable.failed_calls
        wait_until(lambda: unavailable.failed_calls > failed_before + 2)
        unavailable.error = ""
        wait_until(harness.has_ended)
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert store_log(caplog) == [
        OUTAGE_START,
        "Store: the database is read-only; the database is still unavailable",
        OUTAGE_END,
    ]


def test_late_response_from_before_an_outage_does_not_end_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """durability rule 33: another thread may have seen the outage since the call started."""
    caplog.set_level(logging.INFO, "kser")

    class SlowCancelStore(MemoryStore):
        def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
            retrying_store.report_outage(StoreUnavailable(NO_RESPONSE))
            return super().cancel(uuid, reason)

    retrying_store = retrying.RetryingStore(SlowCancelStore())
    assert retrying_store.cancel("1", None) is None
    assert store_log(caplog) == [OUTAGE_START]
    assert retrying_store.get_operation("1") is None
    assert store_log(caplog)[1:] == [OUTAGE_END]


class OneOutageStore:
    """A store whose first call fails; later calls return their arguments."""

    name = "one-outage://"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == 1:
                raise StoreUnavailable(NO_RESPONSE)
            return args, options

        return call


#: The arguments of each call of the contract.
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "check": ((), {}),
    "save": (("operation", "request"), {}),
    "claim": (("uuid", "step", "request"), {}),
    "get_operation": (("uuid",), {}),
    "get_tasks": ((7,), {}),
    "get_task": ((7, 1), {}),
    "get_children": ((7,), {}),
    "checkpoint": (("checkpoint",), {}),
    "renew": (([(7, 1)], "owner", 30.0), {}),
    "get_topics": ((), {}),
    "reserve_due_steps": (("query", 5.0), {}),
    "reserve_step": (("row", 5.0), {}),
    "return_reservations": ((["step"],), {}),
    "postpone_takeover": ((["step"], 60.0), {}),
    "mark_sent": (([(7, 1)], 60.0, 15.0), {}),
    "take_due_steps": ((500, "owner"), {"expired": True, "max_sends": 20, "unknown_after": 3600.0}),
    "refuse_class": (("uuid", "step"), {}),
    "postpone_send": (([(7, 1)], 3.0), {}),
    "cancel": (("uuid", "reason"), {}),
    "resume": (("uuid", 3, "token"), {}),
    "snapshot": (("uuid",), {}),
    "find": (("query", 50, "cursor"), {}),
    "purge": ((60.0, ["SUCCESS"], 500), {}),
}
#: The calls without a result.
WITHOUT_RESULT = {"check", "mark_sent", "postpone_send", "postpone_takeover", "return_reservations"}
#: The calls that are made once: the heartbeat must not wait for the end of an outage.
ONCE = {"lease_renewer"}


@pytest.mark.parametrize("name", sorted(Store.__abstractmethods__ - {"close"} - ONCE))
def test_retrying_store_repeats_each_call_of_the_contract(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 33"""
    direct: Any = OneOutageStore()
    args, options = ARGUMENTS[name]
    with caplog.at_level(logging.INFO, "kser"):
        result = getattr(retrying.RetryingStore(direct), name)(*args, **options)
    assert result == (None if name in WITHOUT_RESULT else (args, options))
    assert direct.calls == [name] * 2
    assert len(store_log(caplog)) == 2


def test_outage_delays_new_operations_but_not_plain_tasks(
    harness: DurableHarness, unavailable: UnavailableStore
) -> None:
    """durability rule 33: a plain task has no step to record and needs no database."""
    process = harness.start_process(Sale, store=unavailable, workers=2)
    harness.first.consumer.close()
    unavailable.error = NO_RESPONSE
    send_raw_message(Sale)
    send_messages("plain")
    with ConsumerThread(process.consumer):
        wait_until(lambda: "plain" in ScriptedTask.ran and unavailable.failed_calls > 2)
        assert committed() in (None, 0)
        unavailable.error = ""
        wait_until(harness.has_ended)
    assert committed() == 2


def test_consumer_waiting_for_the_database_keeps_polling(
    harness: DurableHarness, unavailable: UnavailableStore
) -> None:
    """durability rule 33"""
    process = harness.start_process(Sale, store=unavailable, group="second")
    unavailable.error = NO_RESPONSE
    send_raw_message(Sale)
    with ConsumerThread(process.consumer):
        wait_until(lambda: unavailable.failed_calls > 2)
        polls = process.consumer.current_client.polls
        polls_before = len(polls)
        wait_until(lambda: len(polls) > polls_before + 2)
        unavailable.error = ""
        wait_until(harness.has_ended)


def test_heartbeat_and_reaper_continue_after_an_outage(
    harness: DurableHarness, unavailable: UnavailableStore, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 33"""
    process = harness.start_process(Sale, store=unavailable, group="second")
    harness.first.send(Sale)
    lose_records()
    unavailable.error = NO_RESPONSE
    harness.advance_with_reaper(60, process)
    unavailable.error = ""
    harness.advance_with_reaper(60, process)
    assert len(sent_messages()) >= 1
    assert store_log(caplog) == [
        OUTAGE_START,
        OUTAGE_END,
    ]


@pytest.mark.parametrize("call", ["send", "get", "find", "cancel", "resume", "purge"])
def test_outage_raises_soon_outside_a_consumer(
    harness: DurableHarness, unavailable: UnavailableStore, call: str
) -> None:
    """durability rule 33: outside a consumer, each call is tried three times."""
    process = harness.start_process(Sale, store=unavailable, group="second")
    operation = process.class_of(Sale)("1").build()
    operation.send()
    unavailable.error = NO_RESPONSE
    calls: dict[str, Any] = {
        "send": lambda: process.class_of(Sale)("2").build().send(),
        "get": lambda: process.registry.get("1"),
        "find": lambda: process.registry.find(),
        "cancel": operation.cancel,
        "resume": operation.resume,
        "purge": lambda: process.registry.purge(older_than=1),
    }
    with pytest.raises(StoreUnavailable, match=NO_RESPONSE):
        calls[call]()
    assert unavailable.failed_calls == 3


def test_wait_during_an_outage_raises_after_its_timeout(harness: DurableHarness, unavailable: UnavailableStore) -> None:
    """durability rule 33"""
    process = harness.start_process(Sale, store=unavailable, group="second")
    operation = process.class_of(Sale)("1").build().send()
    unavailable.error = NO_RESPONSE
    with pytest.raises(StoreUnavailable, match=NO_RESPONSE):
        operation.wait(0.1)


def test_locked_sqlite_file_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 33: another connection has locked the file."""
    monkeypatch.setenv("KSER_TOPICS", "dice")
    store = open_store(f"sqlite:///{tmp_path}/kser.db")
    recording = RecordingStore(store)
    process = Process(recording, Sale)
    other = sqlite3.connect(tmp_path / "kser.db", isolation_level=None, check_same_thread=False)
    ScriptedTask.script["1.b"] = lambda: other.execute("BEGIN IMMEDIATE")
    send_raw_message(Sale)
    with ConsumerThread(process.consumer):
        # The second checkpoint waits for the lock.
        wait_until(lambda: recording.calls.count("checkpoint") == 2)
        assert ScriptedTask.ran == ["1.a", "1.b"]
        other.execute("ROLLBACK")
        wait_until(lambda: (row := store.get_operation("1")) is not None and row.status == SUCCESS)
    other.close()
    store.close()


def test_wait_survives_a_database_outage(harness: DurableHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 33"""
    send_raw_message(Sale)
    harness.first.handle()
    operation = harness.operation()
    get_operation, failed_calls = harness.store.get_operation, []

    def fail_seven_times(uuid: str) -> Any:
        if len(failed_calls) == 7:
            return get_operation(uuid)
        failed_calls.append(uuid)
        raise StoreUnavailable("the database restarts")

    monkeypatch.setattr(harness.store, "get_operation", fail_seven_times)
    assert operation.wait(timeout=WAIT_SECONDS).retcode == 0
    assert len(failed_calls) == 7
