"""Tests of accepting operations: when one is stored, and how duplicate uuids are handled."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any, ClassVar
from uuid import UUID

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer
from kser.errors import ProducerMissing, StateConflict, StoreMissing, StoreUnavailable, UsageError
from kser.schemas import OPERATION_KEY
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.runner import InMemoryRunner
from kser.sequencing.task import Task
from kser.status import PENDING, SUCCESS
from kser.store.model import Mode, OperationSnapshot
from tests.consumer.harness import ScriptedTask, committed
from tests.durable.harness import (
    BOTH_MODES,
    DistributedSale,
    DurableHarness,
    Process,
    Sale,
    UnavailableStore,
    UnreachableProducer,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.store.harness import MemoryStoreHarness
from tests.support import lines, message

# -- accepted by a call ------------------------------------------------------------------------------------------------


def test_build_stores_nothing(harness: DurableHarness) -> None:
    """durability rule 1"""
    harness.first.class_of(Sale)("1").build()
    assert harness.registry.get("1") is None
    assert sent_messages() == []


def test_send_saves_operation_tasks_mode_and_topic_before_sending(harness: DurableHarness) -> None:
    """durability rule 1"""
    cls = harness.first.class_of(Sale)
    operation = cls("1", {"order": 42}, metadata={"customer": "7"}).build()
    assert operation.send(topic="orders") is operation
    stored = harness.snapshot()
    row = stored.operation
    assert (row.mode, row.topic, row.status, row.task_count) == (Mode.LOCAL, "orders", PENDING, 3)
    assert (json.loads(row.params), json.loads(row.metadata)) == ({"order": 42}, {"customer": "7"})
    assert [(task.uuid, task.entrypoint) for task in stored.tasks] == [
        (f"1.{name}", ScriptedTask.path) for name in "abc"
    ]
    assert [event.kind for event in stored.events] == ["accepted"]
    (kmsg,) = sent_messages("orders")
    assert (kmsg.uuid, kmsg.entrypoint, kmsg.metadata) == ("1", Sale.path, {OPERATION_KEY: "1"})


def test_launch_saves_the_operation_and_sends_its_first_task(harness: DurableHarness) -> None:
    """durability rule 1"""
    assert harness.first.class_of(Sale)("1").build().launch().retcode == 0
    assert (harness.snapshot().operation.mode, harness.snapshot().operation.topic) == (Mode.DISTRIBUTED, "dice")
    assert [(kmsg.uuid, kmsg.entrypoint) for kmsg in sent_messages()] == [("1.a", ScriptedTask.path)]


@BOTH_MODES
def test_operation_accepted_during_a_kafka_outage_is_sent_by_a_reaper(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 1: the commit accepts the operation."""
    with harness.first.producer_replaced(UnreachableProducer()):
        harness.first.class_of(cls)("1").build().send()
    (warning,) = lines(caplog, logging.WARNING)
    assert "could not be sent: no broker answers" in warning
    assert warning.endswith("; the reaper of a consumer will send it")
    assert (harness.status(), harness.first.handle()) == (PENDING, 0)
    harness.advance_with_reaper(5)
    harness.first.handle()
    assert (harness.status(), harness.task_statuses()) == (SUCCESS, [SUCCESS] * 3)


def test_launch_during_a_kafka_outage_returns_the_failure_and_accepts_the_operation(harness: DurableHarness) -> None:
    """durability rule 1"""
    with harness.first.producer_replaced(UnreachableProducer()):
        result = harness.first.class_of(Sale)("1").build().launch()
    assert (result.retcode, result.stderr) == (500, UnreachableProducer.error)
    assert harness.status() == PENDING


@pytest.mark.parametrize("method", ["send", "launch"])
def test_operation_that_cannot_be_saved_is_not_sent_and_raises(harness: DurableHarness, method: str) -> None:
    """durability rule 1: otherwise an operation would run without a stored state."""
    store = UnavailableStore(harness.store)
    operation = harness.start_process(Sale, store=store).class_of(Sale)("1").build()
    store.error = "the database does not respond"
    with pytest.raises(StoreUnavailable, match="the database does not respond"):
        getattr(operation, method)()
    assert (sent_messages(), harness.registry.get("1")) == ([], None)


def test_incoming_result_is_saved_with_the_operation(harness: DurableHarness) -> None:
    """durability rule 1"""
    harness.first.class_of(Sale)("1").build().send(result=Result(retval={"before": 1}))
    harness.first.handle()
    operation = harness.operation()
    assert operation.result.retval == {"before": 1}


def test_launch_of_an_operation_without_tasks_stores_nothing(harness: DurableHarness) -> None:
    class Empty(Operation):
        pass

    result = harness.first.subscribe_copy(Empty)("1").build().launch()
    assert (result.retcode, result.stderr) == (1, "Nothing to do, empty operation !")
    assert harness.registry.get("1") is None


@pytest.mark.parametrize("built", [True, False])
def test_operation_without_tasks_succeeds_when_sent(harness: DurableHarness, built: bool) -> None:
    class Empty(Operation):
        pass

    operation = harness.first.subscribe_copy(Empty)("1")
    (operation.build() if built else operation).send()
    harness.first.handle()
    assert (harness.status(), harness.task_statuses()) == (SUCCESS, [])


def test_tasks_added_before_send_are_stored(harness: DurableHarness) -> None:
    operation = harness.first.class_of(Sale)("1").build()
    operation.add_task(ScriptedTask("1.more"))
    operation.send()
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c", "1.more"]


def test_params_that_are_not_json_are_rejected_before_anything_is_stored(harness: DurableHarness) -> None:
    with pytest.raises(UsageError, match=r"params of .* cannot be stored: Object of type object is not JSON"):
        harness.first.class_of(Sale)("1", {"when": object()}).build().send()
    assert (harness.registry.get("1"), sent_messages()) == (None, [])


# -- accepted from a message -------------------------------------------------------------------------------------------


@BOTH_MODES
def test_operation_received_as_a_message_is_built_saved_and_run(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 2: the operation has the uuid of the message. The sender needs neither class nor database."""
    send_raw_message(cls, params={"order": 42}, metadata={"customer": "7"})
    harness.first.handle()
    row = harness.snapshot().operation
    assert (row.status, json.loads(row.params), row.mode) == (
        SUCCESS,
        {"order": 42},
        Mode.DISTRIBUTED if cls is DistributedSale else Mode.LOCAL,
    )
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]
    assert [operation.uuid for operation in harness.registry.find(metadata={"customer": 7})] == ["1"]


def test_received_operation_is_saved_and_claimed_in_one_transaction(harness: DurableHarness) -> None:
    """durability rule 2: no other consumer can claim the operation in between."""
    snapshots: list[OperationSnapshot] = []
    ScriptedTask.script["1.a"] = lambda: snapshots.append(harness.snapshot())
    send_raw_message(Sale)
    harness.first.handle()
    (stored,) = snapshots
    assert [event.kind for event in stored.events] == ["accepted", "claimed"]
    assert stored.operation.owner is not None


def test_redelivered_message_with_an_empty_uuid_gets_the_same_uuid(harness: DurableHarness) -> None:
    """durability rule 2: uuid5 of cluster, topic, partition and offset."""
    send_raw_message(Sale, uuid="")
    send_raw_message(Sale, uuid="")
    harness.first.handle()
    uuids = {operation.uuid for operation in harness.registry.find()}
    assert len(uuids) == 2
    assert {UUID(uuid).version for uuid in uuids} == {5}
    harness.start_process(Sale, group="redelivered").handle()
    assert {operation.uuid for operation in harness.registry.find()} == uuids
    assert len(ScriptedTask.ran) == 6


@BOTH_MODES
def test_duplicate_message_runs_one_operation(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 3"""
    send_raw_message(cls, params={"order": 42, "rate": 1.5})
    send_raw_message(cls, params={"rate": 1.5, "order": 42})
    harness.first.handle()
    send_raw_message(cls, params={"order": 42, "rate": 1.5})
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]
    assert (committed(), harness.first.consumer.counts.get("failed")) == (len(sent_messages()), None)


def test_duplicate_message_does_not_build_the_operation_again(harness: DurableHarness) -> None:
    """durability rule 3: the stored tasks win."""

    class CountedBuild(Sale):
        built: ClassVar[list[str]] = []

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            self.built.append(self.uuid)
            return super().build_tasks(**kwargs)

    harness.first.subscribe_copy(CountedBuild)
    send_raw_message(CountedBuild)
    send_raw_message(CountedBuild)
    harness.first.handle()
    assert CountedBuild.built == ["1"]


@BOTH_MODES
def test_duplicate_message_is_recognised_after_user_code_changed_the_params(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 3: Kafka redelivers the message with its original params."""

    class CompletingSale(cls):  # type: ignore[valid-type,misc]
        def prebuild(self, **kwargs: Any) -> Any:
            self.params["currency"] = "EUR"
            return self.params

    harness.first.subscribe_copy(CompletingSale)
    for params in ({"order": 1}, {"order": 1}, {"order": 2}):
        send_raw_message(CompletingSale, params=params)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.first.consumer.counts["failed"]) == (["1.a", "1.b", "1.c"], 1)
    operation = harness.operation()
    assert operation.params == {"order": 1, "currency": "EUR"}


def test_registry_runner_runs_only_operations_that_are_not_stored(harness: DurableHarness) -> None:
    run_in_memory: list[str] = []

    class RecordingRunner(InMemoryRunner):
        def run(self, operation: Operation, result: Result | None) -> Any:
            run_in_memory.append(operation.uuid)
            return super().run(operation, result)

    harness.registry.runner = runner = RecordingRunner()
    send_raw_message(Sale)
    harness.first.handle()
    assert (harness.status(), run_in_memory) == (SUCCESS, [])
    assert harness.first.class_of(Sale)("2").execute().retcode == 0
    assert (harness.registry.get("2"), run_in_memory, harness.registry.runner) == (None, ["2"], runner)


def test_copies_of_an_operation_from_a_message_are_not_stored(harness: DurableHarness) -> None:
    copies: list[Sale] = []

    class CopiedSale(Sale):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if not copies:
                copies.append(copy.deepcopy(self))
                assert copies[0].execute().retcode == 0
            return super().build_tasks(**kwargs)

    harness.first.subscribe_copy(CopiedSale)
    send_raw_message(CopiedSale)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"] * 2
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]


def test_concurrent_operations_under_one_uuid_have_one_winner(harness: DurableHarness) -> None:
    """durability rule 3: both consumers build the operation before one of them has stored it."""
    second = harness.start_process(Sale, group="second")

    class RacingSale(Sale):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            in_other_thread(lambda: second.run(message(RacingSale, uuid="1", params={"order": 2})))()
            return super().build_tasks(**kwargs)

    second.subscribe_copy(type("RacingSale", (Sale,), {"__module__": __name__}))
    harness.first.subscribe_copy(RacingSale)
    send_raw_message(RacingSale, params={"order": 1})
    harness.first.handle()
    assert harness.first.consumer.counts["failed"] == 1
    assert (ScriptedTask.ran, json.loads(harness.snapshot().operation.params)) == (["1.a", "1.b", "1.c"], {"order": 2})


@pytest.mark.parametrize("other", [{"order": 43}, None], ids=["other params", "another class"])
def test_message_with_a_taken_uuid_is_rejected(
    harness: DurableHarness, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 3: code 409 reaches the controller's hook, and the stored operation stays unchanged."""
    failures: list[Result] = []

    def onerror(kmsg: Any, result: Result) -> Result:
        failures.append(result)
        return result

    type(harness.registry.controller).onerror = staticmethod(onerror)  # type: ignore[method-assign,assignment]
    send_raw_message(Sale, params={"order": 42})
    harness.first.handle()
    before = harness.snapshot()
    send_raw_message(Sale if other else DistributedSale, params=other or {"order": 42})
    harness.first.handle()
    (result,) = failures
    assert result.retcode == 409
    assert "the uuid 1 is taken by a stored tests.durable.harness.Sale with params" in result.stderr
    assert (harness.snapshot(), harness.first.consumer.counts["failed"]) == (before, 1)


def test_send_with_a_taken_uuid_raises(harness: DurableHarness) -> None:
    """durability rule 3"""
    cls = harness.first.class_of(Sale)
    cls("1", {"order": 42}).build().send()
    before = harness.snapshot()
    cls("1", {"order": 42}).build().send()
    with pytest.raises(StateConflict, match="needs a uuid of its own") as caught:
        cls("1", {"order": 43}).build().send()
    assert caught.value.code == 409
    assert (harness.snapshot(), len(sent_messages())) == (before, 1)


def test_send_of_an_ended_operation_raises(harness: DurableHarness) -> None:
    """durability rule 3"""
    cls = harness.first.class_of(Sale)
    cls("1").build().send()
    harness.first.handle()
    with pytest.raises(StateConflict, match=r"was sent before, and is SUCCESS: use a new uuid, or resume\(\)"):
        cls("1").build().send()


# -- build hooks of users ----------------------------------------------------------------------------------------------


class BuildHooks(Sale):
    """An operation whose build hooks record their calls."""

    called: ClassVar[list[str]] = []

    def prebuild(self, **kwargs: Any) -> Any:
        self.called.append("prebuild")
        return kwargs

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        self.called.append("build_tasks")
        return super().build_tasks(**kwargs)

    def finalize(self) -> Any:
        self.called.append("finalize")
        return self


class DistributedBuildHooks(BuildHooks):
    DISTRIBUTED = True


@pytest.mark.parametrize("cls", [BuildHooks, DistributedBuildHooks])
@pytest.mark.parametrize("sent_by", ["a message", "send", "send without build", "launch"])
def test_build_hooks_without_super_are_called_once_and_the_operation_is_saved(
    harness: DurableHarness, cls: type[BuildHooks], sent_by: str
) -> None:
    """durability rule 4: no build hook has to call ``super()``."""
    cls.called.clear()
    subscribed = harness.first.subscribe_copy(cls)
    if sent_by == "a message":
        send_raw_message(cls)
    elif sent_by == "launch":
        subscribed("1").build().launch()
    else:
        (subscribed("1") if sent_by == "send without build" else subscribed("1").build()).send()
    harness.first.handle()
    assert cls.called == ["prebuild", "build_tasks", "finalize"]
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])


# -- without a database or a producer ----------------------------------------------------------------------------------


def test_launch_without_a_database_names_the_setting() -> None:
    """durability rule 5, decision B22"""
    registry = OperationRegistry(producer=Producer({}))
    operation = registry.subscribe(type("Game", (Sale,), {"__module__": __name__}))("1").build()
    with pytest.raises(StoreMissing, match="set KSER_DATABASE_URI, or pass OperationRegistry"):
        operation.launch()


@pytest.mark.parametrize("method", ["launch", "send"])
def test_operation_without_a_producer_is_not_accepted(harness: DurableHarness, method: str) -> None:
    """durability rule 5, decision B22"""
    process = harness.start_process(Sale, DistributedSale, producer=None)
    for cls in (Sale, DistributedSale):
        operation = process.class_of(cls)("1").build()
        with pytest.raises(ProducerMissing, match=r"OperationRegistry\(producer=Producer\(\)\)"):
            getattr(operation, method)()
        assert harness.registry.get("1") is None


@pytest.mark.usefixtures("bus")
def test_distributed_operation_without_a_database_fails_with_the_setting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """durability rule 5, decision B22: without a database the consumer cannot distribute the tasks."""
    process = Process(None, DistributedSale)
    send_raw_message(DistributedSale)
    process.handle()
    assert ScriptedTask.ran == []
    assert any("KSER_DATABASE_URI" in line for line in lines(caplog, logging.ERROR))
    process.consumer.close()


@pytest.mark.usefixtures("bus")
def test_tasks_with_their_own_send_need_no_database() -> None:
    """durability rule 5, decision B22: users of 0.8 override ``send`` of their tasks."""

    class SelfSendingTask(ScriptedTask):
        def send(self, result: Result | None = None) -> Any:  # type: ignore[override]
            ScriptedTask.ran.append(f"sent {self.uuid}")
            return Result(uuid=self.uuid)

    class Game(Operation):
        DISTRIBUTED = True

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [SelfSendingTask("a"), SelfSendingTask("b")]

    registry = OperationRegistry(producer=Producer({}))
    assert registry.subscribe(Game)("1").build().launch().retcode == 0
    assert ScriptedTask.ran == ["sent a"]


def test_execute_does_not_store_the_operation(harness: DurableHarness) -> None:
    assert harness.first.class_of(Sale)("1").execute().retcode == 0
    assert (harness.registry.get("1"), ScriptedTask.ran) == (None, ["1.a", "1.b", "1.c"])


def test_operation_of_ten_thousand_tasks_is_stored_and_runs() -> None:
    store_harness = MemoryStoreHarness()
    harness = DurableHarness(store_harness)
    tasks = [ScriptedTask(f"1.{number}") for number in range(10_000)]
    harness.first.class_of(Sale)("1", tasks=tasks).send(topic="dice")
    harness.first.handle()
    assert (harness.status(), len(harness.task_statuses()), set(harness.task_statuses())) == (
        SUCCESS,
        10_000,
        {SUCCESS},
    )
    harness.close()
    InMemoryBroker.reset()
    ScriptedTask.ran.clear()


@BOTH_MODES
def test_tasks_that_already_succeeded_are_not_run_again(harness: DurableHarness, cls: type[Sale]) -> None:
    """Decision B6, and durability rule 1: users of 0.8 load the status of their tasks from their own tables."""
    operation = harness.first.class_of(cls)("1").build()
    for name, task in zip("ab", (operation.tasks[0], operation.tasks[2]), strict=True):
        task.status, task.result = SUCCESS, Result(uuid=task.uuid, retval={name: 1})
    operation.send()
    stored = harness.snapshot()
    assert (stored.operation.step, [task.status for task in stored.tasks]) == (1, ["SUCCESS", "PENDING", "SUCCESS"])
    harness.first.handle()
    assert ScriptedTask.ran == ["1.b"]
    loaded = harness.operation()
    assert (loaded.status, loaded.result.retval, len(loaded.attempts)) == ("SUCCESS", {"a": 1, "b": 1}, 1)


@BOTH_MODES
def test_operation_whose_tasks_all_succeeded_ends(harness: DurableHarness, cls: type[Sale]) -> None:
    """Decision B6."""
    operation = harness.first.class_of(cls)("1").build()
    for task in operation.tasks:
        task.status = SUCCESS
    operation.send()
    harness.first.handle()
    assert (harness.snapshot().operation.status, ScriptedTask.ran) == ("SUCCESS", [])
