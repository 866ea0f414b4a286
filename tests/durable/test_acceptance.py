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
from kser.store.base import Store
from kser.store.model import Mode
from tests.consumer.harness import ScriptedTask, committed
from tests.durable.harness import (
    BOTH_WAYS,
    DurableHarness,
    Process,
    Sale,
    Spread,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.store.harness import MemoryStoreHarness
from tests.support import lines, message


class Unsaving:
    """A producer to a Kafka that is down."""

    def send(self, topic: str, kmsg: Any, timeout: float = 60, **options: Any) -> Result:
        return Result(uuid=kmsg.uuid, retcode=500, stderr="no broker answers")

    def close(self) -> None:
        """There is nothing to close."""


class Refusing:
    """A store whose ``save`` does not work."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def save(self, *_: Any) -> Any:
        raise StoreUnavailable("the database is away")


# -- by a call ---------------------------------------------------------------------------------------------------------


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
    row, tasks, _, events, _ = harness.stored()
    assert (row.mode, row.topic, row.status, row.task_count) == (Mode.LOCAL, "orders", PENDING, 3)
    assert (json.loads(row.params), json.loads(row.metadata)) == ({"order": 42}, {"customer": "7"})
    assert [(task.uuid, task.entrypoint) for task in tasks] == [(f"1.{name}", ScriptedTask.path) for name in "abc"]
    assert [event.kind for event in events] == ["accepted"]
    (kmsg,) = sent_messages("orders")
    assert (kmsg.uuid, kmsg.entrypoint, kmsg.metadata) == ("1", Sale.path, {OPERATION_KEY: "1"})


def test_launch_saves_the_operation_and_sends_its_first_task(harness: DurableHarness) -> None:
    """durability rule 1"""
    assert harness.first.class_of(Sale)("1").build().launch().retcode == 0
    assert (harness.stored().operation.mode, harness.stored().operation.topic) == (Mode.DISTRIBUTED, "dice")
    assert [(kmsg.uuid, kmsg.entrypoint) for kmsg in sent_messages()] == [("1.a", ScriptedTask.path)]


@BOTH_WAYS
def test_operation_accepted_during_a_kafka_outage_is_sent_by_a_reaper(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 1: from the commit on it is accepted."""
    harness.registry._kser_producer = Unsaving()  # type: ignore[assignment]
    harness.first.class_of(cls)("1").build().send()
    (warning,) = lines(caplog, logging.WARNING)
    assert "could not be sent; the reaper of a consumer will send it: no broker answers" in warning
    assert (harness.status(), harness.first.handle()) == (PENDING, 0)
    harness.registry._kser_producer = Producer({})
    harness.advance_with_reaper(5)
    harness.first.handle()
    assert (harness.status(), harness.tasks()) == (SUCCESS, [SUCCESS] * 3)


def test_launch_that_cannot_be_sent_reports_it_and_is_still_accepted(harness: DurableHarness) -> None:
    """durability rule 1"""
    harness.registry._kser_producer = Unsaving()  # type: ignore[assignment]
    answer = harness.first.class_of(Sale)("1").build().launch()
    assert (answer.retcode, answer.stderr) == (500, "no broker answers")
    assert harness.status() == PENDING


@pytest.mark.parametrize("how", ["send", "launch"])
def test_operation_that_cannot_be_saved_is_not_sent_and_raises(harness: DurableHarness, how: str) -> None:
    """durability rule 1: otherwise an operation would run without a stored state."""
    process = Process(Refusing(harness.store), Sale)  # type: ignore[arg-type]
    operation = process.class_of(Sale)("1").build()
    with pytest.raises(StoreUnavailable, match="the database is away"):
        getattr(operation, how)()
    assert (sent_messages(), harness.registry.get("1")) == ([], None)
    process.consumer.close()


def test_incoming_result_is_saved_with_the_operation(harness: DurableHarness) -> None:
    """durability rule 1"""
    harness.first.class_of(Sale)("1").build().send(result=Result(retval={"before": 1}))
    harness.first.handle()
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"before": 1}


def test_launch_of_an_operation_without_tasks_stores_nothing(harness: DurableHarness) -> None:
    class Empty(Operation):
        pass

    answer = harness.first.subscribe_copy(Empty)("1").build().launch()
    assert (answer.retcode, answer.stderr) == (1, "Nothing to do, empty operation !")
    assert harness.registry.get("1") is None


@pytest.mark.parametrize("built", [True, False])
def test_operation_without_tasks_succeeds_when_sent(harness: DurableHarness, built: bool) -> None:
    class Empty(Operation):
        pass

    operation = harness.first.subscribe_copy(Empty)("1")
    (operation.build() if built else operation).send()
    harness.first.handle()
    assert (harness.status(), harness.tasks()) == (SUCCESS, [])


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


# -- by a message ------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_operation_received_as_a_message_is_built_saved_and_run(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 2: its uuid is the message's. The sender needs neither the class nor a database."""
    send_raw_message(cls, params={"order": 42}, metadata={"customer": "7"})
    harness.first.handle()
    row = harness.stored().operation
    assert (row.status, json.loads(row.params), row.mode) == (
        SUCCESS,
        {"order": 42},
        Mode.DISTRIBUTED if cls is Spread else Mode.LOCAL,
    )
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]
    assert [found.uuid for found in harness.registry.find(metadata={"customer": 7})] == ["1"]


def test_received_operation_is_saved_and_claimed_in_one_transaction(harness: DurableHarness) -> None:
    """durability rule 2: no other consumer can claim it in between."""
    seen: list[Any] = []
    ScriptedTask.script["1.a"] = lambda: seen.append(harness.stored())
    send_raw_message(Sale)
    harness.first.handle()
    (stored,) = seen
    assert [event.kind for event in stored.events] == ["accepted", "claimed"]
    assert stored.operation.owner is not None


def test_redelivered_message_with_an_empty_uuid_gets_the_same_uuid(harness: DurableHarness) -> None:
    """durability rule 2: uuid5 of cluster, topic, partition and offset."""
    send_raw_message(Sale, uuid="")
    send_raw_message(Sale, uuid="")
    harness.first.handle()
    first = {operation.uuid for operation in harness.registry.find()}
    assert len(first) == 2
    assert {UUID(uuid).version for uuid in first} == {5}
    again = harness.process(Sale, group="again")
    again.handle()
    assert {operation.uuid for operation in harness.registry.find()} == first
    assert len(ScriptedTask.ran) == 6


@BOTH_WAYS
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

    class Counting(Sale):
        built: ClassVar[list[str]] = []

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            self.built.append(self.uuid)
            return super().build_tasks(**kwargs)

    harness.first.subscribe_copy(Counting)
    send_raw_message(Counting)
    send_raw_message(Counting)
    harness.first.handle()
    assert Counting.built == ["1"]


@BOTH_WAYS
def test_duplicate_message_is_recognised_after_user_code_changed_the_params(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 3: Kafka may deliver it again, with the params that it came with."""

    class Completing(cls):  # type: ignore[valid-type,misc]
        def prebuild(self, **kwargs: Any) -> Any:
            self.params["currency"] = "EUR"
            return self.params

    harness.first.subscribe_copy(Completing)
    for params in ({"order": 1}, {"order": 1}, {"order": 2}):
        send_raw_message(Completing, params=params)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.first.consumer.counts["failed"]) == (["1.a", "1.b", "1.c"], 1)
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.params == {"order": 1, "currency": "EUR"}


def test_registry_runner_runs_only_operations_that_are_not_stored(harness: DurableHarness) -> None:
    seen: list[str] = []

    class Counting(InMemoryRunner):
        def run(self, operation: Operation, result: Result | None) -> Any:
            seen.append(operation.uuid)
            return super().run(operation, result)

    harness.registry.runner = runner = Counting()
    send_raw_message(Sale)
    harness.first.handle()
    assert (harness.status(), seen) == (SUCCESS, [])
    assert harness.first.class_of(Sale)("2").execute().retcode == 0
    assert (harness.registry.get("2"), seen, harness.registry.runner) == (None, ["2"], runner)


def test_copies_of_an_operation_from_a_message_are_not_stored(harness: DurableHarness) -> None:
    copies: list[Sale] = []

    class Copied(Sale):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if not copies:
                copies.append(copy.deepcopy(self))
                assert copies[0].execute().retcode == 0
            return super().build_tasks(**kwargs)

    harness.first.subscribe_copy(Copied)
    send_raw_message(Copied)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"] * 2
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]


def test_concurrent_operations_under_one_uuid_have_one_winner(harness: DurableHarness) -> None:
    """durability rule 3: also when neither finds it stored before."""
    second = harness.process(Sale, group="second")

    class Racing(Sale):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            in_other_thread(lambda: second.run(message(Racing, uuid="1", params={"order": 2})))()
            return super().build_tasks(**kwargs)

    second.subscribe_copy(type("Racing", (Sale,), {"__module__": __name__}))
    harness.first.subscribe_copy(Racing)
    send_raw_message(Racing, params={"order": 1})
    harness.first.handle()
    assert harness.first.consumer.counts["failed"] == 1
    assert (ScriptedTask.ran, json.loads(harness.stored().operation.params)) == (["1.a", "1.b", "1.c"], {"order": 2})


@pytest.mark.parametrize("other", [{"order": 43}, None], ids=["other params", "another class"])
def test_message_with_a_taken_uuid_is_rejected(
    harness: DurableHarness, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 3: 409, the controller's hook, and what is stored stays as it is."""
    told: list[Result] = []

    def onerror(kmsg: Any, result: Result) -> Result:
        told.append(result)
        return result

    type(harness.registry.controller).onerror = staticmethod(onerror)  # type: ignore[method-assign,assignment]
    send_raw_message(Sale, params={"order": 42})
    harness.first.handle()
    before = harness.stored()
    send_raw_message(Sale if other else Spread, params=other or {"order": 42})
    harness.first.handle()
    (result,) = told
    assert result.retcode == 409
    assert "the uuid 1 is taken by a stored tests.durable.harness.Sale with params" in result.stderr
    assert (harness.stored(), harness.first.consumer.counts["failed"]) == (before, 1)


def test_send_with_a_taken_uuid_raises(harness: DurableHarness) -> None:
    """durability rule 3"""
    cls = harness.first.class_of(Sale)
    cls("1", {"order": 42}).build().send()
    before = harness.stored()
    cls("1", {"order": 42}).build().send()
    with pytest.raises(StateConflict, match="needs a uuid of its own") as caught:
        cls("1", {"order": 43}).build().send()
    assert caught.value.code == 409
    assert (harness.stored(), len(sent_messages())) == (before, 1)


def test_send_of_an_ended_operation_raises(harness: DurableHarness) -> None:
    """durability rule 3"""
    cls = harness.first.class_of(Sale)
    cls("1").build().send()
    harness.first.handle()
    with pytest.raises(StateConflict, match=r"was sent before, and is SUCCESS: use a new uuid, or resume\(\)"):
        cls("1").build().send()


# -- what users override -----------------------------------------------------------------------------------------------


class Overridden(Sale):
    """Users record what they like in these."""

    called: ClassVar[list[str]] = []
    seen_stored: ClassVar[Any] = None

    def prebuild(self, **kwargs: Any) -> Any:
        self.called.append("prebuild")
        return kwargs

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        self.called.append("build_tasks")
        return super().build_tasks(**kwargs)

    def finalize(self) -> Any:
        self.called.append("finalize")
        return self


class OverriddenSpread(Overridden):
    DISTRIBUTED = True


@pytest.mark.parametrize("cls", [Overridden, OverriddenSpread])
@pytest.mark.parametrize("by", ["a message", "send", "send without build", "launch"])
def test_build_hooks_without_super_are_called_once_and_the_operation_is_saved(
    harness: DurableHarness, cls: type[Overridden], by: str
) -> None:
    """durability rule 4: none of them has to call ``super()``."""
    cls.called.clear()
    own = harness.first.subscribe_copy(cls)
    if by == "a message":
        send_raw_message(cls)
    elif by == "launch":
        own("1").build().launch()
    else:
        (own("1") if by == "send without build" else own("1").build()).send()
    harness.first.handle()
    assert cls.called == ["prebuild", "build_tasks", "finalize"]
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])


# -- without ---------------------------------------------------------------------------------------------------------


def test_launch_without_a_database_names_the_setting() -> None:
    """durability rule 5, decision B22"""
    registry = OperationRegistry(producer=Producer({}))
    operation = registry.subscribe(type("Game", (Sale,), {"__module__": __name__}))("1").build()
    with pytest.raises(StoreMissing, match="set KSER_DATABASE_URI, or pass OperationRegistry"):
        operation.launch()


@pytest.mark.parametrize("how", ["launch", "send"])
def test_operation_without_a_producer_is_not_accepted(harness: DurableHarness, how: str) -> None:
    """durability rule 5, decision B22"""
    harness.registry._kser_producer = None
    for cls in (Sale, Spread):
        operation = harness.first.class_of(cls)("1").build()
        with pytest.raises(ProducerMissing, match=r"OperationRegistry\(producer=Producer\(\)\)"):
            getattr(operation, how)()
        assert harness.registry.get("1") is None


@pytest.mark.usefixtures("bus")
def test_distributed_operation_without_a_database_fails_with_the_setting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """durability rule 5, decision B22: running it here would not be what its class asks for."""
    process = Process(None, Spread)
    send_raw_message(Spread)
    process.handle()
    assert ScriptedTask.ran == []
    assert any("KSER_DATABASE_URI" in line for line in lines(caplog, logging.ERROR))
    process.consumer.close()


@pytest.mark.usefixtures("bus")
def test_tasks_with_their_own_send_need_no_database() -> None:
    """durability rule 5, decision B22: as users of 0.8 wrote them."""

    class Own(ScriptedTask):
        def send(self, result: Result | None = None) -> Any:  # type: ignore[override]
            ScriptedTask.ran.append(f"sent {self.uuid}")
            return Result(uuid=self.uuid)

    class Game(Operation):
        DISTRIBUTED = True

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Own("a"), Own("b")]

    registry = OperationRegistry(producer=Producer({}))
    assert registry.subscribe(Game)("1").build().launch().retcode == 0
    assert ScriptedTask.ran == ["sent a"]


def test_execute_does_not_store_the_operation(harness: DurableHarness) -> None:
    """An operation that was neither sent nor launched runs as without a database."""
    assert harness.first.class_of(Sale)("1").execute().retcode == 0
    assert (harness.registry.get("1"), ScriptedTask.ran) == (None, ["1.a", "1.b", "1.c"])


def test_operation_of_ten_thousand_tasks_is_stored_and_runs() -> None:
    store_harness = MemoryStoreHarness()
    harness = DurableHarness(store_harness)
    operation = harness.first.class_of(Sale)("1")
    operation.tasks = [ScriptedTask(f"1.{number}") for number in range(10_000)]
    operation._kser_built = []
    operation.send(topic="dice")
    harness.first.handle()
    assert (harness.status(), len(harness.tasks()), set(harness.tasks())) == (SUCCESS, 10_000, {SUCCESS})
    harness.close()
    InMemoryBroker.reset()
    ScriptedTask.ran.clear()


@BOTH_WAYS
def test_tasks_that_already_succeeded_are_not_run_again(harness: DurableHarness, cls: type[Sale]) -> None:
    """Decision B6, and durability rule 1: users of 0.8 load their tasks from tables of their own."""
    operation = harness.first.class_of(cls)("1").build()
    for name, task in zip("ab", (operation.tasks[0], operation.tasks[2]), strict=True):
        task.status, task.result = SUCCESS, Result(uuid=task.uuid, retval={name: 1})
    operation.send()
    stored = harness.stored()
    assert (stored.operation.step, [task.status for task in stored.tasks]) == (1, ["SUCCESS", "PENDING", "SUCCESS"])
    harness.first.handle()
    assert ScriptedTask.ran == ["1.b"]
    found = harness.registry.get("1")
    assert found is not None
    assert (found.status, found.result.retval, len(found.attempts)) == ("SUCCESS", {"a": 1, "b": 1}, 1)


@BOTH_WAYS
def test_operation_whose_tasks_all_succeeded_ends(harness: DurableHarness, cls: type[Sale]) -> None:
    """Decision B6."""
    operation = harness.first.class_of(cls)("1").build()
    for task in operation.tasks:
        task.status = SUCCESS
    operation.send()
    harness.first.handle()
    assert (harness.stored().operation.status, ScriptedTask.ran) == ("SUCCESS", [])
