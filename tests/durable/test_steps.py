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
from tests.consumer.harness import DICE, PATIENCE, Act, InThread, committed, put, until
from tests.durable.harness import BOTH_WAYS, Process, Sale, Shop, Spread, bare, expire, meanwhile, sent
from tests.support import lines


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
def test_each_task_sees_the_stored_results_of_earlier_tasks(shop: Shop, cls: type[Counting]) -> None:
    """durability rule 13"""
    for known in (Adding, cls):
        shop.first.learn(known)
    bare(cls)
    shop.first.handle()
    assert Adding.seen == [("1", {}), ("1", {"n": 1}), ("1", {"n": 11})]
    operation = shop.registry.get("1")
    assert operation is not None
    assert (operation.result.retval, operation.result.stdout) == ({"n": 111}, operation.result.stdout)
    assert [task.result.retval for task in operation.tasks] == [{"n": 1}, {"n": 11}, {"n": 111}]


@COUNTING
def test_results_accumulate_as_in_memory(shop: Shop, cls: type[Counting]) -> None:
    """durability rule 13: a database changes nothing of what an operation gives."""
    for known in (Adding, cls):
        shop.first.learn(known)
    expected = cls("2").execute()
    bare(cls)
    shop.first.handle()
    operation = shop.registry.get("1")
    assert operation is not None
    found = operation.result
    assert (found.retval, found.stdout, found.retcode) == (expected.retval, expected.stdout, expected.retcode)


@BOTH_WAYS
def test_checkpoint_records_the_whole_step_before_the_next_one_starts(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 13"""
    seen: list[Any] = []
    Act.acts["1.a"] = lambda: Result(retval={"a": 1}, stdout="done")
    Act.acts["1.b"] = lambda: seen.append(shop.stored())
    bare(cls)
    shop.first.handle()
    ((row, tasks, attempts, events, _),) = seen
    assert (row.step, json.loads(row.accumulated)["retval"]) == (1, {"a": 1})
    assert [task.status for task in tasks] == [SUCCESS, PENDING, PENDING]
    assert json.loads(tasks[0].result)["stdout"] == "done"
    (attempt,) = attempts
    assert (attempt.position, attempt.number, attempt.status) == (0, 1, SUCCESS)
    assert attempt.consumer == shop.registry._kser_operations._context.owner
    assert "task-succeeded" in [event.kind for event in events]


class Slow:
    """A store whose checkpoints tell what had run when they began, and when they had returned."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.told: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        self.told.append(list(Act.seen))
        status = self._store.checkpoint(checkpoint)
        self.told.append(list(Act.seen))
        return status


def test_next_task_starts_only_after_the_checkpoint_is_committed(shop: Shop) -> None:
    """durability rule 13"""
    slow = Slow(shop.store)
    process = shop.process(Sale, store=slow, group="slow")
    bare(Sale)
    process.handle()
    abc = ["1.a", "1.b", "1.c"]
    assert slow.told == [abc[:n] for n in (1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize("doomed", [False, True])
def test_group_commit_fences_a_lost_claim_alone(shop: Shop, doomed: bool) -> None:
    """durability rule 14: a lost claim in a group does not fail the others."""
    together = threading.Barrier(8)
    uuids = [str(number) for number in range(8)]
    process = shop.process(Sale, workers=8, group="many")
    process.stop_its_heart()
    for uuid in uuids:
        Act.acts[f"{uuid}.a"] = lambda: together.wait(PATIENCE)
        bare(Sale, uuid=uuid)
    if doomed:

        def lose() -> None:
            shop.world.pass_by(expire())
            shop.seize("3")
            together.wait(PATIENCE)

        Act.acts["3.a"] = lose
    with InThread(process.consumer):
        until(lambda: all(shop.has_ended(uuid) for uuid in uuids if uuid != "3" or not doomed))
    assert (shop.stored("3").operation.step == 0) is doomed


# -- over the consumers --------------------------------------------------------------------------------------------


def test_step_message_contains_only_its_identity(shop: Shop) -> None:
    """durability rule 15: params and results are read at the claim."""
    for known in (Adding, CountingSpread):
        shop.first.learn(known)
    bare(CountingSpread, params={"x": 1}, metadata={"customer": "7"}, result=Result(retval={"n": 5}))
    shop.first.handle()
    steps = sent()[1:]
    assert [(kmsg.uuid, kmsg.entrypoint) for kmsg in steps] == [(f"1.{by}", Adding.path) for by in (1, 10, 100)]
    for kmsg in steps:
        assert (kmsg.params, kmsg.metadata, kmsg.result.retval) == ({}, {OPERATION_KEY: "1"}, {})
    operation = shop.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"n": 116}


def test_mark_sent_records_time_and_count_later(shop: Shop) -> None:
    """durability rule 15"""
    bare(Spread)
    shop.first.step()
    assert (shop.stored().operation.send_count, len(sent())) == (0, 2)
    shop.first.companion.record_sends()
    row = shop.stored().operation
    assert (row.send_count, row.sent_at) == (1, pytest.approx(shop.world.now, abs=5))
    assert row.next_check_at == pytest.approx(shop.world.now + 60, abs=5)


@pytest.mark.parametrize("trouble", [None, ConnectionError("the broker is gone")])
def test_step_counts_as_sent_after_its_delivery_report(
    shop: Shop, trouble: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 15: the worker has gone on long before; what was not delivered is the reaper's."""
    posted: list[Callable[[Exception | None], None]] = []
    producer: Any = shop.registry.producer
    begin = producer._kser_deliver_nowait
    producer._kser_deliver_nowait = lambda *arguments: posted.append(arguments[-1])
    bare(Spread)
    assert shop.first.step() == 1
    shop.first.companion.record_sends()
    assert (shop.stored().operation.send_count, len(posted)) == (0, 1)
    posted[0](trouble)
    shop.first.companion.record_sends()
    assert shop.stored().operation.send_count == (0 if trouble else 1)
    said = [line for line in lines(caplog) if "could not be sent; the reaper of a consumer will send it" in line]
    assert len(said) == (1 if trouble else 0)
    producer._kser_deliver_nowait = begin
    shop.live(10)
    assert len(sent()) == (2 if trouble else 1)


def test_each_task_runs_on_a_consumer_that_knows_its_class(shop: Shop) -> None:
    """durability rule 15: to the topic that its class names."""

    class Far(Act):
        TOPIC = "gpu"

    class Trip(Operation):
        DISTRIBUTED = True

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Act("1.a"), Far("1.b"), Act("1.c")]

    shop.first.learn(Trip)
    far = shop.process(Far)
    far.consumer.close()
    far.forget(Act)
    bare(Trip)
    shop.first.handle()
    assert (Act.seen, [kmsg.uuid for kmsg in sent("gpu")]) == (["1.a"], ["1.b"])
    far.run(sent("gpu")[0])
    shop.first.handle()
    assert (Act.seen, shop.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert len({each.consumer for each in shop.stored().attempts}) == 2


# -- JSON ----------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_every_json_value_survives_storage(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 16: NaN and NUL are legal on the wire."""
    odd = {"nan": math.nan, "nul": "\x00", "half": "\ud800", "big": 2**80, "deep": [{"a": None}]}
    Act.acts["1.b"] = lambda: Result(retval=odd)
    bare(cls, params=odd, metadata={"odd": odd})
    shop.first.handle()
    operation = shop.registry.get("1")
    assert operation is not None
    assert operation.status == SUCCESS
    for found in (operation.params, operation.metadata["odd"], operation.result.retval):
        assert math.isnan(found.pop("nan"))
        assert found == {key: value for key, value in odd.items() if key != "nan"}


@BOTH_WAYS
def test_result_that_is_not_json_fails_its_task(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 16"""
    Act.acts["1.b"] = lambda: Result(retval={"when": object()})
    bare(cls)
    shop.first.handle()
    assert (shop.status(), shop.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert "cannot be stored: Object of type object is not JSON serializable" in str(shop.stored().attempts[1].error)


# -- what cannot be run here ---------------------------------------------------------------------------------------


def test_step_of_an_unknown_class_is_recorded_as_failed(shop: Shop) -> None:
    """durability rule 17: a failed step does not wait without end, and can be resumed."""
    bare(Spread)
    shop.first.step()
    shop.first.forget(Act)
    shop.first.handle()
    assert (shop.status(), shop.tasks()) == (FAILED, [FAILED, PENDING, PENDING])
    assert "not registred: import its module in this consumer" in str(shop.stored().attempts[0].error)


def test_step_of_an_unknown_class_in_a_local_operation_is_recorded_as_failed(shop: Shop) -> None:
    """durability rule 17"""
    shop.first.known(Sale)("1").build().send()
    shop.first.forget(Act)
    shop.first.handle()
    assert (shop.status(), shop.tasks()) == (FAILED, [FAILED, PENDING, PENDING])


def test_stored_operation_of_an_unknown_class_is_recorded_as_failed(shop: Shop) -> None:
    """durability rule 17"""
    shop.first.known(Sale)("1").send()
    stranger = shop.process(group="stranger")
    stranger.handle()
    assert shop.status() == FAILED
    operation = shop.registry.get("1")
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
        Act.seen.append("ran")


class Needy(Task):
    REQUIRED_FIELDS = ("amount",)

    def run(self) -> None:
        Act.seen.append("ran")


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("how", ["postinit", "from_Message", "required"])
def test_task_that_cannot_be_built_fails_its_step(
    shop: Shop, how: str, distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 17: ``from_Message``, ``postinit``, required parameters."""

    class Odd(Operation):
        DISTRIBUTED = distributed

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Needy() if how == "required" else Unfit("sender"), Act("never")]

    monkeypatch.setattr(Unfit, "how", how)
    for known in (Unfit, Needy, Odd):
        shop.first.learn(known)
    operation = shop.first.known(Odd)("1").build()
    operation.tasks[0].uuid = "first"
    operation.send()
    shop.first.handle()
    assert (shop.status(), shop.tasks(), Act.seen) == (FAILED, [FAILED, PENDING], [])
    assert "no connection" in str(shop.stored().attempts) or "Missing parameter: amount" in str(shop.stored().attempts)


def test_consumer_without_a_database_rejects_a_step(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 17: the consumer does not run the step."""
    shop.first.known(Spread)("1").build().send()
    poor = Process(None, Spread, group="poor", dead_letter=True)
    poor.handle()
    assert (Act.seen, shop.status()) == ([], PENDING)
    assert any("this consumer has no shared database: set KSER_DATABASE_URI" in line for line in lines(caplog))
    ((letter,),) = InMemoryBroker.at("").topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.StoreMissing"
    poor.consumer.close()


def test_step_of_an_unknown_operation_is_logged_and_dead_lettered(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 17: all consumers of a topic share one database."""
    process = shop.process(Spread, dead_letter=True, group="letters")
    put("lost", cls=Act)
    InMemoryBroker.at("").send("dice", Message("1.a", Act.path, metadata={OPERATION_KEY: "gone"}).dumps().encode())
    process.handle()
    assert Act.seen == ["lost"]
    assert any(
        "step 1.a belongs to operation gone, which" in line and "must share one database" in line
        for line in lines(caplog, logging.ERROR)
    )
    ((letter,),) = InMemoryBroker.at("").topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.StoreError"


# -- what Kafka may forget -----------------------------------------------------------------------------------------


def test_running_operation_does_not_block_the_commit(shop: Shop) -> None:
    """durability rule 18: an operation may take hours."""
    gate = threading.Event()
    Act.acts["1.b"] = lambda: gate.wait(PATIENCE)
    bare(Sale)
    with InThread(shop.first.consumer):
        until(lambda: "1.b" in Act.seen)
        until(lambda: committed() == 1)
        gate.set()
        until(lambda: shop.status() == SUCCESS)
    assert shop.first.consumer.counts["done"] == 1


def test_message_that_fails_before_its_ack_is_not_committed(shop: Shop) -> None:
    """durability rule 18: done for Kafka once the database durably answers, and not before."""
    process = shop.process(Sale, group="dummy")
    shop.first.consumer.close()

    def away(*_: Any) -> Any:
        assert committed() == 0
        process.consumer._kser_worker_pool.stopping = True
        raise StoreUnavailable("the database is away")

    store = process.registry._kser_operations._context.store
    store.direct = type("Away", (), {"get_operation": away, "save": away})()
    bare(Sale)
    process.handle()
    assert (committed(), Act.seen) == (0, [])


@BOTH_WAYS
def test_message_with_a_refused_claim_is_committed(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 18: ended, held by a live owner, or waiting for its time."""
    shop.first.known(cls)("1").build().send()
    shop.seize()
    shop.first.handle()
    assert committed() == 1


def test_records_of_the_same_key_wait_for_an_operation_to_end(shop: Shop) -> None:
    """durability rule 18: the offset is free, the order of the key stays."""
    gate = threading.Event()
    process = shop.process(Sale, workers=3, group="keys")
    shop.first.consumer.close()
    Act.acts["1.a"] = lambda: gate.wait(PATIENCE)
    put("1", cls=Sale, key=b"k")
    put("plain", key=b"k")
    put("other", key=b"o")
    with InThread(process.consumer):
        until(lambda: {"1.a", "other"} <= set(Act.seen))
        until(lambda: InMemoryBroker.at("").committed[("keys", DICE)].offset == 1)
        assert "plain" not in Act.seen
        gate.set()
        until(lambda: "plain" in Act.seen)
    assert Act.seen.index("1.c") < Act.seen.index("plain")


def test_rebalance_neither_stops_nor_waits_for_a_running_operation(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rules 18 and 30: the operation continues under its claim, and no other consumer runs it."""
    InMemoryBroker.at("").create_topic("dice", 2)
    seen: list[Any] = []

    def rebalance() -> None:
        second = shop.process(Sale)
        for _ in range(4):
            second.step()
            shop.first.consumer._kser_poller.poll_once(0)
        seen.append((set(second.consumer.assignment), second.consumer.counts["done"], committed(1)))

    Act.acts["1.a"] = meanwhile(rebalance)
    put("1", cls=Sale, partition=1)
    shop.first.step()
    assert seen == [({Partition("dice", 1)}, 0, 1)]
    assert (Act.seen, shop.status(), committed(1)) == (["1.a", "1.b", "1.c"], SUCCESS, 1)
    assert not [line for line in lines(caplog) if "was revoked" in line]


# -- refused claims ------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_redelivered_message_of_finished_operation_runs_nothing(
    shop: Shop, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 19: no hook, no count, no line but one at INFO; and the stored result."""
    told: list[str] = []
    controller: Any = type(shop.registry.controller)

    def tell(kmsg: Any, result: Any) -> Any:
        told.append(kmsg.uuid)
        return result

    Act.acts["1.c"] = lambda: Result(retval={"c": 1})
    bare(cls)
    shop.first.handle()
    controller.onsuccess = controller.onerror = staticmethod(tell)
    caplog.clear()
    heard: list[Any] = []

    def hear(sender: Any, **_: Any) -> None:
        heard.append(sender)

    with signals.entry_started.connected_to(hear), signals.entry_succeeded.connected_to(hear):
        result = shop.first.run(Message("1", cls.path))
    assert (told, heard, result.retval) == ([], [], {"c": 1})
    assert lines(caplog, logging.INFO) == [f"{cls.path}[1]: nothing to do for this message: ended, SUCCESS"]
