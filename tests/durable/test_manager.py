"""Tests of a registry with a database: get, find, purge, wait, settings."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import pytest
from cdumay_result import Result
from flask import Flask, current_app

from kser.dummy.producer import Producer
from kser.errors import MissingDependency, SettingError, StoreMissing, UsageError, WaitTimeout
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationPage, OperationRegistry
from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from kser.store import open_store
from kser.store.memory import MemoryStore
from kser.store.model import EVENTS
from tests.consumer.harness import ScriptedTask, send_messages
from tests.durable.harness import BOTH_MODES, DurableHarness, RecordingStore, Sale, in_other_thread, send_raw_message

# -- get ---------------------------------------------------------------------------------------------------------------


def test_get_of_an_unknown_operation_returns_none(harness: DurableHarness) -> None:
    assert harness.registry.get("unknown") is None


@BOTH_MODES
def test_get_returns_the_operation_with_tasks_attempts_and_events(harness: DurableHarness, cls: type[Sale]) -> None:
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls, params={"order": 42}, metadata={"customer": "7"})
    harness.first.handle()
    operation = harness.operation()
    assert type(operation) is harness.first.class_of(cls)
    assert (operation.uuid, operation.params, operation.metadata) == ("1", {"order": 42}, {"customer": "7"})
    assert (operation.status, [task.status for task in operation.tasks]) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert [type(task) for task in operation.tasks] == [harness.first.class_of(ScriptedTask)] * 3
    assert [(attempt.position, attempt.status, attempt.error) for attempt in operation.attempts] == [
        (0, SUCCESS, None),
        (1, FAILED, "no"),
    ]
    assert {event.kind for event in operation.events} <= EVENTS.keys()
    assert operation.events[0].kind == "accepted"
    assert operation.events[-1].text == FAILED


@BOTH_MODES
def test_running_task_is_shown_as_running(harness: DurableHarness, cls: type[Sale]) -> None:
    statuses: list[Any] = []

    def look() -> None:
        operation = harness.operation()
        statuses.append((operation.status, [task.status for task in operation.tasks]))

    ScriptedTask.script["1.b"] = look
    send_raw_message(cls)
    harness.first.handle()
    assert statuses == [(RUNNING, [SUCCESS, RUNNING, PENDING])]


def test_unclaimed_operation_shows_no_task_as_running(harness: DurableHarness) -> None:
    harness.first.class_of(Sale)("1").build().send()
    operation = harness.operation()
    assert (operation.status, [task.status for task in operation.tasks]) == (PENDING, [PENDING] * 3)


def test_get_of_an_unknown_class_returns_a_plain_operation(harness: DurableHarness) -> None:
    send_raw_message(Sale, params={"order": 42})
    harness.first.handle()
    web_process = harness.start_process(group="web")
    web_process.unsubscribe(ScriptedTask)
    operation = web_process.registry.get("1")
    assert operation is not None
    assert (type(operation), operation.params, operation.status) == (Operation, {"order": 42}, SUCCESS)
    assert [type(task) for task in operation.tasks] == [Task] * 3


def test_unstored_operation_has_neither_attempts_nor_events() -> None:
    assert (Sale().attempts, Sale().events) == ([], [])


# -- find --------------------------------------------------------------------------------------------------------------


def test_find_returns_the_newest_first_in_pages(harness: DurableHarness) -> None:
    for number in range(7):
        harness.first.send(Sale, str(number))
    pages = []
    cursor = None
    while True:
        page = harness.registry.find(limit=3, after=cursor)
        assert isinstance(page, OperationPage)
        pages.append([operation.uuid for operation in page])
        cursor = page.cursor
        if cursor is None:
            break
    assert pages == [["6", "5", "4"], ["3", "2", "1"], ["0"]]


def test_find_filters_by_class_status_metadata_and_time(harness: DurableHarness) -> None:
    class Refund(Sale):
        pass

    harness.first.subscribe_copy(Refund)
    ScriptedTask.script["2.a"] = ConnectionError("no")
    send_raw_message(Sale, uuid="1", metadata={"customer": "7", "shop": "north"})
    send_raw_message(Sale, uuid="2", metadata={"customer": 7})
    send_raw_message(Refund, uuid="3", metadata={"customer": "8"})
    harness.first.handle()
    start = harness.store_harness.now

    def found(**filters: Any) -> list[str]:
        return [operation.uuid for operation in harness.registry.find(**filters)]

    assert found(status=FAILED) == ["2"]
    assert found(status=[FAILED, SUCCESS]) == ["3", "2", "1"]
    assert found(entrypoint=Sale) == found(entrypoint=Sale.path) == ["2", "1"]
    assert found(metadata={"customer": "7"}) == found(metadata={"customer": 7}) == ["2", "1"]
    assert found(metadata={"customer": "7", "shop": "north"}) == ["1"]
    assert found(metadata={"customer": "9"}) == []
    assert found(since=start + 60) == []
    assert found(until=start - 3600) == []
    hour = datetime.timedelta(hours=1)
    now = datetime.datetime.fromtimestamp(start, datetime.UTC)
    assert found(since=now - hour, until=now + hour, status=SUCCESS, entrypoint=Refund) == ["3"]


@pytest.mark.parametrize("filters", [{"since": "yesterday"}, {"until": True}, {"after": "no cursor"}])
def test_find_rejects_invalid_filters(harness: DurableHarness, filters: Any) -> None:
    with pytest.raises(UsageError):
        harness.registry.find(**filters)


# -- purge -------------------------------------------------------------------------------------------------------------


def test_purge_deletes_old_ended_operations(harness: DurableHarness) -> None:
    ScriptedTask.script["2.a"] = ConnectionError("no")
    for uuid in "123":
        send_raw_message(Sale, uuid=uuid)
    harness.first.handle()
    harness.first.send(Sale, "open")
    harness.advance(3600)
    send_raw_message(Sale, uuid="young")
    harness.first.step()
    assert harness.registry.purge(older_than=datetime.timedelta(minutes=30), status=FAILED) == 1
    assert harness.registry.get("2") is None
    assert harness.registry.purge(older_than=1800) == 2
    assert sorted(operation.uuid for operation in harness.registry.find()) == ["open", "young"]
    assert harness.registry.purge(older_than=1800) == 0


def test_purge_accepts_only_final_statuses(harness: DurableHarness) -> None:
    with pytest.raises(UsageError, match="only operations that have ended are purged, not those that are RUNNING"):
        harness.registry.purge(older_than=1, status=[RUNNING, SUCCESS])


# -- wait --------------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_wait_returns_the_result(harness: DurableHarness, cls: type[Sale]) -> None:
    ScriptedTask.script["1.c"] = lambda: Result(retval={"c": 1})
    operation = harness.first.class_of(cls)("1").build().send()
    in_other_thread(harness.first.handle)()
    assert operation.wait(timeout=5).retval == {"c": 1}


def test_wait_returns_the_failure_of_a_failed_operation(harness: DurableHarness) -> None:
    ScriptedTask.script["1.b"] = ConnectionError("no")
    operation = harness.first.class_of(Sale)("1").build().send()
    harness.first.handle()
    result = operation.wait(timeout=5)
    assert (result.retcode, result.stderr) == (500, "no")


def test_wait_times_out_and_names_the_current_status(harness: DurableHarness) -> None:
    operation = harness.first.class_of(Sale)("1").build().send()
    with pytest.raises(WaitTimeout, match=r"operation 1 is PENDING after 0\.05 s, at task 0") as caught:
        operation.wait(timeout=0.05)
    assert isinstance(caught.value, TimeoutError)


# -- settings ----------------------------------------------------------------------------------------------------------


def open_and_close_store(registry: OperationRegistry) -> str:
    """Open and close the store of a registry, and return its name."""
    store = registry.store
    store.close()
    return store.name


def test_database_uri_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_DATABASE_URI", f"sqlite:///{tmp_path}/from-environment.db")
    registry = OperationRegistry()
    assert "from-environment.db" in open_and_close_store(registry)


def test_database_uri_of_the_app_overrides_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_DATABASE_URI", f"sqlite:///{tmp_path}/from-environment.db")
    app = Flask("shop")
    app.config["KSER_DATABASE_URI"] = f"sqlite:///{tmp_path}/from-app.db"
    registry = OperationRegistry()
    registry.init_app(app)
    assert "from-app.db" in open_and_close_store(registry)
    assert not (tmp_path / "from-environment.db").exists()


def test_store_argument_overrides_all_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_DATABASE_URI", f"sqlite:///{tmp_path}/from-environment.db")
    store = MemoryStore()
    assert OperationRegistry(store=store).store is store
    assert list(tmp_path.iterdir()) == []


def test_database_is_opened_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_DATABASE_URI", f"sqlite:///{tmp_path}/kser.db")
    registry = OperationRegistry()
    registry.subscribe(type("LazySale", (Sale,), {"__module__": __name__}))
    assert list(tmp_path.iterdir()) == []
    open_and_close_store(registry)
    assert (tmp_path / "kser.db").exists()


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
    assert registry.background_service is None


@pytest.mark.parametrize("uri", ["shop.db", "", 5, "mysql://host/shop", "sqlite:/shop.db", "://"])
def test_invalid_database_uri_is_rejected(uri: Any) -> None:
    with pytest.raises(SettingError):
        open_store(uri)


def test_missing_sqlalchemy_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("kser.store.sql")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(MissingDependency, match=r'pip install "kser\[sql\]"'):
        open_store("sqlite:///shop.db")


def test_password_is_hidden_in_the_store_name() -> None:
    pytest.importorskip("psycopg")
    store = open_store("postgresql+psycopg://user:secret@localhost/shop")
    assert "secret" not in store.name
    store.close()


# -- Flask -------------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_tasks_and_hooks_run_inside_the_app_context(harness: DurableHarness, cls: type[Sale]) -> None:
    app = Flask("shop")
    app.config.update(CURRENCY="EUR")
    seen: list[Any] = []

    class PricedSale(cls):  # type: ignore[valid-type,misc]
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            seen.append(("build", current_app.config["CURRENCY"]))
            return super().build_tasks(**kwargs)

        def onsuccess(self, result: Result) -> Result:
            seen.append(("onsuccess", current_app.config["CURRENCY"]))
            return result

    process = harness.start_process(PricedSale, app=app, group="app")
    ScriptedTask.script["1.a"] = lambda: seen.append(("run", current_app.config["CURRENCY"]))
    send_raw_message(PricedSale)
    process.handle()
    assert seen == [("build", "EUR"), ("run", "EUR"), ("onsuccess", "EUR")]


# -- calls of the store ------------------------------------------------------------------------------------------------


def test_plain_task_makes_no_store_call(harness: DurableHarness) -> None:
    store = RecordingStore(harness.store)
    process = harness.start_process(Sale, store=store, group="second")
    store.calls.clear()
    send_messages("1", "2")
    process.handle()
    # Each step of the consumer looks for due steps once.
    assert (ScriptedTask.ran, set(store.calls)) == (["1", "2"], {"reserve_due_steps"})


def test_local_step_makes_one_store_call(harness: DurableHarness) -> None:
    store = RecordingStore(harness.store)
    process = harness.start_process(Sale, store=store, group="second")
    store.calls.clear()
    send_raw_message(Sale)
    process.handle()
    calls = [call for call in store.calls if call != "reserve_due_steps"]
    assert calls == ["get_operation", "save", "checkpoint", "checkpoint", "checkpoint"]


def test_metadata_of_operation_and_tasks_is_stored(harness: DurableHarness) -> None:
    operation = harness.first.class_of(Sale)("1", metadata={"customer": "7"}).build()
    operation.tasks[1].metadata = {"of": "b"}
    operation.send()
    harness.first.handle()
    loaded = harness.operation()
    assert (loaded.metadata, loaded.tasks[1].metadata) == ({"customer": "7"}, {"of": "b"})


def test_registry_accepts_producer_and_store() -> None:
    producer, store = Producer({}), MemoryStore()
    registry = OperationRegistry(producer=producer, store=store)
    assert (registry.producer, registry.store) == (producer, store)
    assert registry.background_service is registry.background_service
