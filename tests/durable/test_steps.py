"""Tests of the steps of a stored operation: their input, their checkpoint, and the commit in Kafka."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser import signals
from kser.consumer.client import Partition
from kser.dummy.broker import InMemoryBroker
from kser.errors import StoreUnavailable
from kser.schemas import OPERATION_KEY, Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, SUCCESS
from kser.store.base import Store
from kser.store.model import Checkpoint
from tests.consumer.harness import DICE, ConsumerThread, ScriptedTask, committed, send_messages
from tests.durable.harness import (
    BOTH_WAYS,
    LEASE_EXPIRED,
    DurableHarness,
    Process,
    Sale,
    Spread,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.support import WAIT_SECONDS, lines, wait_until


class Adding(Task):
    """Adds one more to what the tasks before it have counted."""

    REQUIRED_FIELDS = ("by",)
    seen: ClassVar[list[Any]] = []

    def run(self) -> Result:
        self.seen.append((self.operation_uuid, dict(self.result.retval)))
        return Result(retval={"n": self.result.retval.get("n", 0) + self.params["by"]}, stdout=f"+{self.params['by']}")


class Counting(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Adding(f"{self.uuid}.{by}", {"by": by}) for by in (1, 10, 100)]


class CountingSpread(Counting):
    DISTRIBUTED = True


COUNTING = pytest.mark.parametrize("cls", [Counting, CountingSpread])


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    Adding.seen.clear()


# -- one transaction -----------------------------------------------------------------------------------------------


@COUNTING
def test_each_task_sees_the_stored_results_of_earlier_tasks(harness: DurableHarness, cls: type[Counting]) -> None:
    """durability rule 13"""
    for known in (Adding, cls):
        harness.first.subscribe_copy(known)
    send_raw_message(cls)
    harness.first.handle()
    assert Adding.seen == [("1", {}), ("1", {"n": 1}), ("1", {"n": 11})]
    operation = harness.registry.get("1")
    assert operation is not None
    assert (operation.result.retval, operation.result.stdout) == ({"n": 111}, operation.result.stdout)
    assert [task.result.retval for task in operation.tasks] == [{"n": 1}, {"n": 11}, {"n": 111}]


@COUNTING
def test_results_accumulate_as_in_memory(harness: DurableHarness, cls: type[Counting]) -> None:
    """durability rule 13: a database changes nothing of what an operation gives."""
    for known in (Adding, cls):
        harness.first.subscribe_copy(known)
    expected = cls("2").execute()
    send_raw_message(cls)
    harness.first.handle()
    operation = harness.registry.get("1")
    assert operation is not None
    found = operation.result
    assert (found.retval, found.stdout, found.retcode) == (expected.retval, expected.stdout, expected.retcode)


@BOTH_WAYS
def test_checkpoint_records_the_whole_step_before_the_next_one_starts(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 13"""
    seen: list[Any] = []
    ScriptedTask.script["1.a"] = lambda: Result(retval={"a": 1}, stdout="done")
    ScriptedTask.script["1.b"] = lambda: seen.append(harness.stored())
    send_raw_message(cls)
    harness.first.handle()
    ((row, tasks, attempts, events, _),) = seen
    assert (row.step, json.loads(row.accumulated)["retval"]) == (1, {"a": 1})
    assert [task.status for task in tasks] == [SUCCESS, PENDING, PENDING]
    assert json.loads(tasks[0].result)["stdout"] == "done"
    (attempt,) = attempts
    assert (attempt.position, attempt.number, attempt.status) == (0, 1, SUCCESS)
    assert attempt.consumer == harness.registry._kser_operations._context.owner
    assert "task-succeeded" in [event.kind for event in events]


class Slow:
    """A store whose checkpoints tell what had run when they began, and when they had returned."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.told: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        self.told.append(list(ScriptedTask.ran))
        status = self._store.checkpoint(checkpoint)
        self.told.append(list(ScriptedTask.ran))
        return status


def test_next_task_starts_only_after_the_checkpoint_is_committed(harness: DurableHarness) -> None:
    """durability rule 13"""
    slow = Slow(harness.store)
    process = harness.process(Sale, store=slow, group="slow")
    send_raw_message(Sale)
    process.handle()
    abc = ["1.a", "1.b", "1.c"]
    assert slow.told == [abc[:n] for n in (1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize("doomed", [False, True])
def test_group_commit_fences_a_lost_claim_alone(harness: DurableHarness, doomed: bool) -> None:
    """durability rule 14: a lost claim in a group does not fail the others."""
    together = threading.Barrier(8)
    uuids = [str(number) for number in range(8)]
    process = harness.process(Sale, workers=8, group="many")
    process.disable_background_service()
    for uuid in uuids:
        ScriptedTask.script[f"{uuid}.a"] = lambda: together.wait(WAIT_SECONDS)
        send_raw_message(Sale, uuid=uuid)
    if doomed:

        def lose() -> None:
            harness.store_harness.advance(LEASE_EXPIRED)
            harness.claim_and_die("3")
            together.wait(WAIT_SECONDS)

        ScriptedTask.script["3.a"] = lose
    with ConsumerThread(process.consumer):
        wait_until(lambda: all(harness.has_ended(uuid) for uuid in uuids if uuid != "3" or not doomed))
    assert (harness.stored("3").operation.step == 0) is doomed


# -- over the consumers --------------------------------------------------------------------------------------------


def test_step_message_contains_only_its_identity(harness: DurableHarness) -> None:
    """durability rule 15: params and results are read at the claim."""
    for known in (Adding, CountingSpread):
        harness.first.subscribe_copy(known)
    send_raw_message(CountingSpread, params={"x": 1}, metadata={"customer": "7"}, result=Result(retval={"n": 5}))
    harness.first.handle()
    steps = sent_messages()[1:]
    assert [(kmsg.uuid, kmsg.entrypoint) for kmsg in steps] == [(f"1.{by}", Adding.path) for by in (1, 10, 100)]
    for kmsg in steps:
        assert (kmsg.params, kmsg.metadata, kmsg.result.retval) == ({}, {OPERATION_KEY: "1"}, {})
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"n": 116}


def test_mark_sent_records_time_and_count_later(harness: DurableHarness) -> None:
    """durability rule 15"""
    send_raw_message(Spread)
    harness.first.step()
    assert (harness.stored().operation.send_count, len(sent_messages())) == (0, 2)
    harness.first.background_service.record_sends()
    row = harness.stored().operation
    assert (row.send_count, row.sent_at) == (1, pytest.approx(harness.store_harness.now, abs=5))
    assert row.next_check_at == pytest.approx(harness.store_harness.now + 60, abs=5)


@pytest.mark.parametrize("trouble", [None, ConnectionError("the broker is gone")])
def test_step_counts_as_sent_after_its_delivery_report(
    harness: DurableHarness, trouble: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 15: the worker has gone on long before; what was not delivered is the reaper's."""
    posted: list[Callable[[Exception | None], None]] = []
    producer: Any = harness.registry.producer
    begin = producer._kser_deliver_nowait
    producer._kser_deliver_nowait = lambda *arguments: posted.append(arguments[-1])
    send_raw_message(Spread)
    assert harness.first.step() == 1
    harness.first.background_service.record_sends()
    assert (harness.stored().operation.send_count, len(posted)) == (0, 1)
    posted[0](trouble)
    harness.first.background_service.record_sends()
    assert harness.stored().operation.send_count == (0 if trouble else 1)
    said = [line for line in lines(caplog) if "could not be sent; the reaper of a consumer will send it" in line]
    assert len(said) == (1 if trouble else 0)
    producer._kser_deliver_nowait = begin
    harness.advance_with_reaper(10)
    assert len(sent_messages()) == (2 if trouble else 1)


def test_each_task_runs_on_a_consumer_that_knows_its_class(harness: DurableHarness) -> None:
    """durability rule 15: to the topic that its class names."""

    class Far(ScriptedTask):
        TOPIC = "gpu"

    class Trip(Operation):
        DISTRIBUTED = True

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [ScriptedTask("1.a"), Far("1.b"), ScriptedTask("1.c")]

    harness.first.subscribe_copy(Trip)
    far = harness.process(Far)
    far.consumer.close()
    far.unsubscribe(ScriptedTask)
    send_raw_message(Trip)
    harness.first.handle()
    assert (ScriptedTask.ran, [kmsg.uuid for kmsg in sent_messages("gpu")]) == (["1.a"], ["1.b"])
    far.run(sent_messages("gpu")[0])
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert len({each.consumer for each in harness.stored().attempts}) == 2


# -- JSON ----------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_every_json_value_survives_storage(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 16: NaN and NUL are legal on the wire."""
    odd = {"nan": math.nan, "nul": "\x00", "half": "\ud800", "big": 2**80, "deep": [{"a": None}]}
    ScriptedTask.script["1.b"] = lambda: Result(retval=odd)
    send_raw_message(cls, params=odd, metadata={"odd": odd})
    harness.first.handle()
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.status == SUCCESS
    for found in (operation.params, operation.metadata["odd"], operation.result.retval):
        assert math.isnan(found.pop("nan"))
        assert found == {key: value for key, value in odd.items() if key != "nan"}


@BOTH_WAYS
def test_result_that_is_not_json_fails_its_task(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 16"""
    ScriptedTask.script["1.b"] = lambda: Result(retval={"when": object()})
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.status(), harness.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert "cannot be stored: Object of type object is not JSON serializable" in str(harness.stored().attempts[1].error)


# -- what cannot be run here ---------------------------------------------------------------------------------------


def test_step_of_an_unknown_class_is_recorded_as_failed(harness: DurableHarness) -> None:
    """durability rule 17: a failed step does not wait without end, and can be resumed."""
    send_raw_message(Spread)
    harness.first.step()
    harness.first.unsubscribe(ScriptedTask)
    harness.first.handle()
    assert (harness.status(), harness.tasks()) == (FAILED, [FAILED, PENDING, PENDING])
    assert "not registred: import its module in this consumer" in str(harness.stored().attempts[0].error)


def test_step_of_an_unknown_class_in_a_local_operation_is_recorded_as_failed(harness: DurableHarness) -> None:
    """durability rule 17"""
    harness.first.class_of(Sale)("1").build().send()
    harness.first.unsubscribe(ScriptedTask)
    harness.first.handle()
    assert (harness.status(), harness.tasks()) == (FAILED, [FAILED, PENDING, PENDING])


def test_stored_operation_of_an_unknown_class_is_recorded_as_failed(harness: DurableHarness) -> None:
    """durability rule 17"""
    harness.first.class_of(Sale)("1").send()
    stranger = harness.process(group="stranger")
    stranger.handle()
    assert harness.status() == FAILED
    operation = harness.registry.get("1")
    assert operation is not None
    assert f"Entrypoint '{Sale.path}' not registred" in operation.result.stderr


class Unfit(Task):
    """Cannot be made."""

    how: ClassVar[str] = "postinit"

    def postinit(self) -> None:
        if self.how == "postinit" and self.uuid != "sender":
            raise ConnectionError("no connection")

    @classmethod
    def from_Message(cls, kmsg: Message) -> Any:
        if cls.how == "from_Message":
            raise ConnectionError("no connection")
        return super().from_Message(kmsg)

    def run(self) -> None:
        ScriptedTask.ran.append("ran")


class Needy(Task):
    REQUIRED_FIELDS = ("amount",)

    def run(self) -> None:
        ScriptedTask.ran.append("ran")


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("how", ["postinit", "from_Message", "required"])
def test_task_that_cannot_be_built_fails_its_step(
    harness: DurableHarness, how: str, distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 17: ``from_Message``, ``postinit``, required parameters."""

    class Odd(Operation):
        DISTRIBUTED = distributed

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Needy() if how == "required" else Unfit("sender"), ScriptedTask("never")]

    monkeypatch.setattr(Unfit, "how", how)
    for known in (Unfit, Needy, Odd):
        harness.first.subscribe_copy(known)
    operation = harness.first.class_of(Odd)("1").build()
    operation.tasks[0].uuid = "first"
    operation.send()
    harness.first.handle()
    assert (harness.status(), harness.tasks(), ScriptedTask.ran) == (FAILED, [FAILED, PENDING], [])
    assert "no connection" in str(harness.stored().attempts) or "Missing parameter: amount" in str(
        harness.stored().attempts
    )


def test_consumer_without_a_database_rejects_a_step(harness: DurableHarness, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 17: the consumer does not run the step."""
    harness.first.class_of(Spread)("1").build().send()
    poor = Process(None, Spread, group="poor", dead_letter=True)
    poor.handle()
    assert (ScriptedTask.ran, harness.status()) == ([], PENDING)
    assert any("this consumer has no shared database: set KSER_DATABASE_URI" in line for line in lines(caplog))
    ((letter,),) = InMemoryBroker.at("").topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.StoreMissing"
    poor.consumer.close()


def test_step_of_an_unknown_operation_is_logged_and_dead_lettered(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 17: all consumers of a topic share one database."""
    process = harness.process(Spread, dead_letter=True, group="letters")
    send_messages("lost", cls=ScriptedTask)
    InMemoryBroker.at("").send(
        "dice", Message("1.a", ScriptedTask.path, metadata={OPERATION_KEY: "gone"}).dumps().encode()
    )
    process.handle()
    assert ScriptedTask.ran == ["lost"]
    assert any(
        "step 1.a belongs to operation gone, which" in line and "must share one database" in line
        for line in lines(caplog, logging.ERROR)
    )
    ((letter,),) = InMemoryBroker.at("").topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.StoreError"


# -- what Kafka may forget -----------------------------------------------------------------------------------------


def test_running_operation_does_not_block_the_commit(harness: DurableHarness) -> None:
    """durability rule 18: an operation may take hours."""
    gate = threading.Event()
    ScriptedTask.script["1.b"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(Sale)
    with ConsumerThread(harness.first.consumer):
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        wait_until(lambda: committed() == 1)
        gate.set()
        wait_until(lambda: harness.status() == SUCCESS)
    assert harness.first.consumer.counts["done"] == 1


def test_message_that_fails_before_its_ack_is_not_committed(harness: DurableHarness) -> None:
    """durability rule 18: done for Kafka once the database durably answers, and not before."""
    process = harness.process(Sale, group="dummy")
    harness.first.consumer.close()

    def away(*_: Any) -> Any:
        assert committed() == 0
        process.consumer._kser_worker_pool.stopping = True
        raise StoreUnavailable("the database is away")

    store = process.registry._kser_operations._context.store
    store.direct = type("Away", (), {"get_operation": away, "save": away})()
    send_raw_message(Sale)
    process.handle()
    assert (committed(), ScriptedTask.ran) == (0, [])


@BOTH_WAYS
def test_message_with_a_refused_claim_is_committed(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 18: ended, held by a live owner, or waiting for its time."""
    harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    harness.first.handle()
    assert committed() == 1


def test_records_of_the_same_key_wait_for_an_operation_to_end(harness: DurableHarness) -> None:
    """durability rule 18: the offset is free, the order of the key stays."""
    gate = threading.Event()
    process = harness.process(Sale, workers=3, group="keys")
    harness.first.consumer.close()
    ScriptedTask.script["1.a"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1", cls=Sale, key=b"k")
    send_messages("plain", key=b"k")
    send_messages("other", key=b"o")
    with ConsumerThread(process.consumer):
        wait_until(lambda: {"1.a", "other"} <= set(ScriptedTask.ran))
        wait_until(lambda: InMemoryBroker.at("").committed[("keys", DICE)].offset == 1)
        assert "plain" not in ScriptedTask.ran
        gate.set()
        wait_until(lambda: "plain" in ScriptedTask.ran)
    assert ScriptedTask.ran.index("1.c") < ScriptedTask.ran.index("plain")


def test_rebalance_neither_stops_nor_waits_for_a_running_operation(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rules 18 and 30: the operation continues under its claim, and no other consumer runs it."""
    InMemoryBroker.at("").create_topic("dice", 2)
    seen: list[Any] = []

    def rebalance() -> None:
        second = harness.process(Sale)
        for _ in range(4):
            second.step()
            harness.first.consumer._kser_poller.poll_once(0)
        seen.append((set(second.consumer.assignment), second.consumer.counts["done"], committed(1)))

    ScriptedTask.script["1.a"] = in_other_thread(rebalance)
    send_messages("1", cls=Sale, partition=1)
    harness.first.step()
    assert seen == [({Partition("dice", 1)}, 0, 1)]
    assert (ScriptedTask.ran, harness.status(), committed(1)) == (["1.a", "1.b", "1.c"], SUCCESS, 1)
    assert not [line for line in lines(caplog) if "was revoked" in line]


# -- refused claims ------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_redelivered_message_of_finished_operation_runs_nothing(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 19: no hook, no count, no line but one at INFO; and the stored result."""
    told: list[str] = []
    controller: Any = type(harness.registry.controller)

    def tell(kmsg: Any, result: Any) -> Any:
        told.append(kmsg.uuid)
        return result

    ScriptedTask.script["1.c"] = lambda: Result(retval={"c": 1})
    send_raw_message(cls)
    harness.first.handle()
    controller.onsuccess = controller.onerror = staticmethod(tell)
    caplog.clear()
    heard: list[Any] = []

    def hear(sender: Any, **_: Any) -> None:
        heard.append(sender)

    with signals.entry_started.connected_to(hear), signals.entry_succeeded.connected_to(hear):
        result = harness.first.run(Message("1", cls.path))
    assert (told, heard, result.retval) == ([], [], {"c": 1})
    assert lines(caplog, logging.INFO) == [f"{cls.path}[1]: nothing to do for this message: ended, SUCCESS"]
