"""Tests of the steps of a stored operation: their input, their checkpoint, and the commit in Kafka."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser import signals
from kser.consumer.client import Partition
from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer
from kser.retry import Retry
from kser.schemas import OPERATION_KEY, Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from kser.store.base import Store
from kser.store.model import Checkpoint, OperationSnapshot
from tests.consumer.harness import DICE, ConsumerThread, ScriptedTask, committed, send_messages
from tests.durable.harness import (
    BOTH_MODES,
    LEASE_EXPIRED,
    MODES,
    TICK_INTERVAL,
    DistributedSale,
    DurableHarness,
    Process,
    Sale,
    UnavailableStore,
    WrappedStore,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.support import WAIT_SECONDS, lines, wait_until


class AddTask(Task):
    """A task that adds its param ``by`` to the number ``n`` in the results of earlier tasks."""

    REQUIRED_FIELDS = ("by",)
    #: The uuid of the operation and the received results, for each run.
    inputs: ClassVar[list[Any]] = []

    def run(self) -> Result:
        self.inputs.append((self.operation_uuid, dict(self.result.retval)))
        return Result(retval={"n": self.result.retval.get("n", 0) + self.params["by"]}, stdout=f"+{self.params['by']}")


class SumOperation(Operation):
    """An operation that adds 1, 10 and 100."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [AddTask(f"{self.uuid}.{by}", {"by": by}) for by in (1, 10, 100)]


class DistributedSumOperation(SumOperation):
    DISTRIBUTED = True


BOTH_SUMS = pytest.mark.parametrize("cls", [SumOperation, DistributedSumOperation], ids=MODES)


@pytest.fixture(autouse=True)
def recorded_inputs() -> Iterator[None]:
    """Forget the recorded inputs after the test."""
    yield
    AddTask.inputs.clear()


# -- checkpoints -------------------------------------------------------------------------------------------------------


@BOTH_SUMS
def test_each_task_sees_the_stored_results_of_earlier_tasks(harness: DurableHarness, cls: type[SumOperation]) -> None:
    """durability rule 13"""
    for known in (AddTask, cls):
        harness.first.subscribe_copy(known)
    send_raw_message(cls)
    harness.first.handle()
    assert AddTask.inputs == [("1", {}), ("1", {"n": 1}), ("1", {"n": 11})]
    operation = harness.operation()
    assert (operation.result.retval, operation.result.stdout) == ({"n": 111}, "+100")
    assert [task.result.retval for task in operation.tasks] == [{"n": 1}, {"n": 11}, {"n": 111}]


@BOTH_SUMS
def test_results_accumulate_as_in_memory(harness: DurableHarness, cls: type[SumOperation]) -> None:
    """durability rule 13: an operation has the same result with and without a database."""
    for known in (AddTask, cls):
        harness.first.subscribe_copy(known)
    expected = cls("2").execute()
    send_raw_message(cls)
    harness.first.handle()
    result = harness.operation().result
    assert (result.retval, result.stdout, result.retcode) == (expected.retval, expected.stdout, expected.retcode)


@BOTH_MODES
def test_checkpoint_records_the_whole_step_before_the_next_one_starts(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 13"""
    snapshots: list[OperationSnapshot] = []
    ScriptedTask.script["1.a"] = lambda: Result(retval={"a": 1}, stdout="done")
    ScriptedTask.script["1.b"] = lambda: snapshots.append(harness.snapshot())
    send_raw_message(cls)
    harness.first.handle()
    (stored,) = snapshots
    row = stored.operation
    assert (row.step, json.loads(row.accumulated)["retval"]) == (1, {"a": 1})
    assert [task.status for task in stored.tasks] == [SUCCESS, PENDING, PENDING]
    assert json.loads(stored.tasks[0].result or "")["stdout"] == "done"
    (attempt,) = stored.attempts
    assert (attempt.position, attempt.number, attempt.status) == (0, 1, SUCCESS)
    assert attempt.consumer == row.owner
    assert "task-succeeded" in [event.kind for event in stored.events]


class CheckpointObserver(WrappedStore):
    """A store that records how many tasks ran before and after each checkpoint."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.runs_before: list[int] = []
        self.runs_after: list[int] = []

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        self.runs_before.append(len(ScriptedTask.ran))
        status = self._store.checkpoint(checkpoint)
        self.runs_after.append(len(ScriptedTask.ran))
        return status


def test_next_task_starts_only_after_the_checkpoint_is_committed(harness: DurableHarness) -> None:
    """durability rule 13"""
    store = CheckpointObserver(harness.store)
    process = harness.start_process(Sale, store=store, group="second")
    send_raw_message(Sale)
    process.handle()
    assert store.runs_before == store.runs_after == [1, 2, 3]


@pytest.mark.parametrize("one_claim_is_lost", [False, True])
def test_group_commit_fences_only_the_lost_claim(harness: DurableHarness, one_claim_is_lost: bool) -> None:
    """durability rule 14: a lost claim does not fail the other checkpoints of its transaction."""
    barrier = threading.Barrier(8)
    uuids = [str(number) for number in range(8)]
    process = harness.start_process(Sale, workers=8, group="second")
    process.disable_background_service()
    for uuid in uuids:
        ScriptedTask.script[f"{uuid}.a"] = lambda: barrier.wait(WAIT_SECONDS)
        send_raw_message(Sale, uuid=uuid)
    if one_claim_is_lost:

        def lose_claim() -> None:
            harness.store_harness.advance(LEASE_EXPIRED)
            harness.claim_and_die("3")
            barrier.wait(WAIT_SECONDS)

        ScriptedTask.script["3.a"] = lose_claim
    with ConsumerThread(process.consumer):
        wait_until(lambda: all(harness.has_ended(uuid) for uuid in uuids if uuid != "3" or not one_claim_is_lost))
    assert (harness.snapshot("3").operation.step == 0) is one_claim_is_lost


# -- messages of distributed steps -------------------------------------------------------------------------------------


def test_step_message_contains_only_its_identity(harness: DurableHarness) -> None:
    """durability rule 15: params and results are read at the claim."""
    for known in (AddTask, DistributedSumOperation):
        harness.first.subscribe_copy(known)
    send_raw_message(
        DistributedSumOperation, params={"x": 1}, metadata={"customer": "7"}, result=Result(retval={"n": 5})
    )
    harness.first.handle()
    steps = sent_messages()[1:]
    assert [(kmsg.uuid, kmsg.entrypoint) for kmsg in steps] == [(f"1.{by}", AddTask.path) for by in (1, 10, 100)]
    for kmsg in steps:
        assert (kmsg.params, kmsg.metadata, kmsg.result.retval) == ({}, {OPERATION_KEY: "1"}, {})
    operation = harness.operation()
    assert operation.result.retval == {"n": 116}


def test_mark_sent_records_time_and_count_later(harness: DurableHarness) -> None:
    """durability rule 15"""
    send_raw_message(DistributedSale)
    harness.first.step()
    assert (harness.snapshot().operation.send_count, len(sent_messages())) == (0, 2)
    harness.first.background_service.record_sends()
    row = harness.snapshot().operation
    assert (row.send_count, row.sent_at) == (1, pytest.approx(harness.store_harness.now, abs=5))
    assert row.send_at == pytest.approx(harness.store_harness.now + 60, abs=5)


class DelayedReportProducer(Producer):
    """A producer that keeps the callbacks of its delivery reports, and delivers nothing itself."""

    def __init__(self) -> None:
        super().__init__({})
        self.reports: list[Callable[[Exception | None], None]] = []

    def _kser_deliver_nowait(
        self, topic: str, value: bytes | None, deadline: float, on_delivered: Callable[[Exception | None], None]
    ) -> None:
        self.reports.append(on_delivered)


@pytest.mark.parametrize("error", [None, ConnectionError("the broker is gone")])
def test_step_counts_as_sent_after_its_delivery_report(
    harness: DurableHarness, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 15: the worker does not wait for the report; the reaper sends an undelivered step."""
    producer = DelayedReportProducer()
    with harness.first.producer_replaced(producer):
        send_raw_message(DistributedSale)
        assert harness.first.step() == 1
    harness.first.background_service.record_sends()
    assert (harness.snapshot().operation.send_count, len(producer.reports)) == (0, 1)
    (report,) = producer.reports
    report(error)
    harness.first.background_service.record_sends()
    assert harness.snapshot().operation.send_count == (0 if error else 1)
    failed_sends = [line for line in lines(caplog) if "; the reaper of a consumer will send it" in line]
    assert len(failed_sends) == (1 if error else 0)
    harness.advance_with_reaper(10)
    assert len(sent_messages()) == (2 if error else 1)


def test_each_task_runs_on_a_consumer_that_knows_its_class(harness: DurableHarness) -> None:
    """durability rule 15: the step is sent to the topic of its class."""

    class GpuTask(ScriptedTask):
        TOPIC = "gpu"

    class TwoTopics(Operation):
        DISTRIBUTED = True

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [ScriptedTask("1.a"), GpuTask("1.b"), ScriptedTask("1.c")]

    harness.first.subscribe_copy(TwoTopics)
    gpu_process = harness.start_process(GpuTask)
    gpu_process.consumer.close()
    gpu_process.unsubscribe(ScriptedTask)
    send_raw_message(TwoTopics)
    harness.first.handle()
    assert (ScriptedTask.ran, [kmsg.uuid for kmsg in sent_messages("gpu")]) == (["1.a"], ["1.b"])
    gpu_process.run(sent_messages("gpu")[0])
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert len({attempt.consumer for attempt in harness.snapshot().attempts}) == 2


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("configured", ["", "dice"])
def test_operation_that_arrives_as_a_message_continues_on_the_topic_of_its_record(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, distributed: bool, nested: bool, configured: str
) -> None:
    """durability rules 2 and 6: perhaps no consumer reads the topic of its class."""
    if configured:
        monkeypatch.setenv("KSER_TOPICS", configured)

    class Inner(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [ScriptedTask("1.a"), ScriptedTask("1.b")]

    class Express(Inner):
        TOPIC = "orders"
        DISTRIBUTED = distributed

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [inner(uuid="2")] if nested else super().build_tasks(**kwargs)

        def onsuccess(self, result: Result) -> Result:
            ended.append(self.uuid)
            return result

    ended: list[str] = []
    inner = harness.first.subscribe_copy(Inner)
    harness.first.subscribe_copy(Express)
    ScriptedTask.script["1.b"] = [Retry.later(10), None]
    ScriptedTask.script["1.a"] = [Retry.later(10), None]
    send_raw_message(Express)
    harness.first.handle()
    assert harness.snapshot().operation.topic == "dice"
    for _ in range(2):
        harness.advance(11)
        send_raw_message(Express)
        harness.first.handle()
    assert (harness.status(), ScriptedTask.ran, ended) == (SUCCESS, ["1.a", "1.a", "1.b", "1.b"], ["1"])
    assert sent_messages("orders") == []


@pytest.mark.parametrize("topic", [None, "dice"])
def test_sent_operation_keeps_the_topic_that_its_sender_chose(harness: DurableHarness, topic: str | None) -> None:
    """durability rule 1"""

    class Express(Sale):
        TOPIC = "orders"

    harness.first.subscribe_copy(Express)
    harness.first.class_of(Express)("1").send(topic=topic)
    assert harness.snapshot().operation.topic == (topic or "orders")
    harness.first.handle()
    assert (harness.status() == SUCCESS) == (topic == "dice")


# -- JSON --------------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_every_json_value_survives_storage(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 16: NaN and NUL are legal on the wire."""
    values = {"nan": math.nan, "nul": "\x00", "half": "\ud800", "big": 2**80, "deep": [{"a": None}]}
    ScriptedTask.script["1.b"] = lambda: Result(retval=values)
    send_raw_message(cls, params=values, metadata={"values": values})
    harness.first.handle()
    operation = harness.operation()
    assert operation.status == SUCCESS
    for stored in (operation.params, operation.metadata["values"], operation.result.retval):
        assert math.isnan(stored.pop("nan"))
        assert stored == {key: value for key, value in values.items() if key != "nan"}


@BOTH_MODES
def test_result_that_is_not_json_fails_its_task(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 16"""
    ScriptedTask.script["1.b"] = lambda: Result(retval={"when": object()})
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.status(), harness.task_statuses()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert "cannot be stored: Object of type object is not JSON serializable" in str(
        harness.snapshot().attempts[1].error
    )


# -- steps that cannot run ---------------------------------------------------------------------------------------------


class FailingConstructionTask(Task):
    """A task that the consumer cannot construct."""

    #: The method that raises.
    fails_in: ClassVar[str] = "postinit"

    def postinit(self) -> None:
        if self.fails_in == "postinit" and self.uuid != "sender":
            raise ConnectionError("no connection")

    @classmethod
    def from_Message(cls, kmsg: Message) -> Any:
        if cls.fails_in == "from_Message":
            raise ConnectionError("no connection")
        return super().from_Message(kmsg)

    def run(self) -> None:
        ScriptedTask.ran.append("ran")


class RequiredParamTask(Task):
    """A task with a required parameter."""

    REQUIRED_FIELDS = ("amount",)

    def run(self) -> None:
        ScriptedTask.ran.append("ran")


@pytest.mark.parametrize("distributed", [False, True], ids=MODES)
@pytest.mark.parametrize("cause", ["postinit", "from_Message", "required parameter"])
def test_task_that_cannot_be_built_fails_its_step(
    harness: DurableHarness, cause: str, distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 17: ``from_Message``, ``postinit``, required parameters."""
    has_required_param = cause == "required parameter"

    class FailingOperation(Operation):
        DISTRIBUTED = distributed

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            first = RequiredParamTask() if has_required_param else FailingConstructionTask("sender")
            return [first, ScriptedTask("never")]

    monkeypatch.setattr(FailingConstructionTask, "fails_in", cause)
    for known in (FailingConstructionTask, RequiredParamTask, FailingOperation):
        harness.first.subscribe_copy(known)
    operation = harness.first.class_of(FailingOperation)("1").build()
    operation.tasks[0].uuid = "first"
    operation.send()
    harness.first.handle()
    assert (harness.status(), harness.task_statuses(), ScriptedTask.ran) == (FAILED, [FAILED, PENDING], [])
    error = str(harness.snapshot().attempts[0].error)
    assert ("Missing parameter: amount" if has_required_param else "no connection") in error


def test_consumer_without_a_database_rejects_a_step(harness: DurableHarness, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 17: the consumer does not run the step."""
    harness.first.class_of(DistributedSale)("1").build().send()
    without_store = Process(None, DistributedSale, group="second", dead_letter=True)
    without_store.handle()
    assert (ScriptedTask.ran, harness.status()) == ([], PENDING)
    assert any("this consumer has no shared database: set KSER_DATABASE_URI" in line for line in lines(caplog))
    ((letter,),) = InMemoryBroker.at("").topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.StoreMissing"
    without_store.consumer.close()


def test_step_of_an_unknown_operation_is_logged_and_dead_lettered(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 17: all consumers of a topic must share one database."""
    process = harness.start_process(DistributedSale, dead_letter=True, group="letters")
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


# -- committed offsets -------------------------------------------------------------------------------------------------


def test_running_operation_does_not_block_the_commit(harness: DurableHarness, gate: threading.Event) -> None:
    """durability rule 18: an operation may take hours."""
    ScriptedTask.script["1.b"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(Sale)
    with ConsumerThread(harness.first.consumer):
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        wait_until(lambda: committed() == 1)
        gate.set()
        wait_until(lambda: harness.status() == SUCCESS)
    assert harness.first.consumer.counts["done"] == 1


def test_message_that_fails_before_its_ack_is_not_committed(harness: DurableHarness) -> None:
    """durability rule 18: a record is finished once its operation is stored, and not before."""
    store = UnavailableStore(harness.store)
    process = harness.start_process(Sale, store=store)
    harness.first.consumer.close()
    store.error = "the database does not respond"
    send_raw_message(Sale)
    with ConsumerThread(process.consumer):
        wait_until(lambda: store.failed_calls)
    assert (committed(), ScriptedTask.ran) == (0, [])


@BOTH_MODES
def test_message_with_a_refused_claim_is_committed(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 18: the operation has a live owner, so the record is finished."""
    harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    harness.first.handle()
    assert committed() == 1


def test_records_of_the_same_key_wait_for_an_operation_to_end(harness: DurableHarness, gate: threading.Event) -> None:
    """durability rule 18: the offset is committed, and the lane waits."""
    process = harness.start_process(Sale, workers=3, group="keys")
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
    after_rebalance: list[Any] = []

    def rebalance() -> None:
        second = harness.start_process(Sale)
        for _ in range(4):
            second.step()
            harness.first.poll()
        after_rebalance.append((set(second.consumer.assignment), second.consumer.counts["done"], committed(1)))

    ScriptedTask.script["1.a"] = in_other_thread(rebalance)
    send_messages("1", cls=Sale, partition=1)
    harness.first.step()
    assert after_rebalance == [({Partition("dice", 1)}, 0, 1)]
    assert (ScriptedTask.ran, harness.status(), committed(1)) == (["1.a", "1.b", "1.c"], SUCCESS, 1)
    assert not [line for line in lines(caplog) if "was revoked" in line]


# -- refused claims ----------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_redelivered_message_of_finished_operation_runs_nothing(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 19: no hook, no signal and one line at INFO; the message returns the stored result."""
    hook_calls: list[str] = []
    controller: Any = type(harness.registry.controller)

    def record_hook(kmsg: Any, result: Any) -> Any:
        hook_calls.append(kmsg.uuid)
        return result

    ScriptedTask.script["1.c"] = lambda: Result(retval={"c": 1})
    send_raw_message(cls)
    harness.first.handle()
    controller.onsuccess = controller.onerror = staticmethod(record_hook)
    caplog.clear()
    signals_sent: list[Any] = []

    def record_signal(sender: Any, **_: Any) -> None:
        signals_sent.append(sender)

    with signals.entry_started.connected_to(record_signal), signals.entry_succeeded.connected_to(record_signal):
        result = harness.first.run(Message("1", cls.path))
    assert (hook_calls, signals_sent, result.retval) == ([], [], {"c": 1})
    assert lines(caplog, logging.INFO) == [f"{cls.path}[1]: nothing to do for this message: ended, SUCCESS"]


class RaisingProducer(Producer):
    """A third-party producer that raises instead of returning a failed result."""

    def send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
        raise RuntimeError("unexpected error of the producer")


def test_raising_producer_after_a_checkpoint_fails_no_step(harness: DurableHarness) -> None:
    """durability rule 8: the claim was released before the send, so no failure can be recorded."""
    harness.first.class_of(DistributedSale)("1").build().launch()
    with harness.first.producer_replaced(RaisingProducer({})):
        harness.first.step()
    row = harness.snapshot().operation
    assert (row.status, row.step, ScriptedTask.ran) == (RUNNING, 1, ["1.a"])
    harness.advance_with_reaper(2 * TICK_INTERVAL)
    harness.first.handle()
    assert harness.status() == SUCCESS
