"""A step of a stored operation: what it gets, what is recorded of it, and what Kafka hears."""

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
from kser.dummy.bus import Bus
from kser.errors import StoreUnavailable
from kser.schemas import OPERATION, Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, SUCCESS
from kser.store.base import Store
from kser.store.rows import Checkpoint
from tests.durable import BOTH_WAYS, Process, Sale, Shop, Spread, bare, expire, meanwhile, sent
from tests.engine import DICE, PATIENCE, Act, InThread, committed, put, until
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
def test_each_task_sees_the_stored_results_of_those_before_it(shop: Shop, cls: type[Counting]) -> None:
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
def test_it_adds_up_as_it_does_in_memory(shop: Shop, cls: type[Counting]) -> None:
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
def test_a_checkpoint_is_all_of_a_step_and_the_next_one_begins_behind_it(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 13"""
    seen: list[Any] = []
    Act.acts["1.a"] = lambda: Result(retval={"a": 1}, stdout="done")
    Act.acts["1.b"] = lambda: seen.append(shop.stored())
    bare(cls)
    shop.first.handle()
    ((row, tasks, attempts, events, _),) = seen
    assert (row.step, json.loads(row.so_far)["retval"]) == (1, {"a": 1})
    assert [task.status for task in tasks] == [SUCCESS, PENDING, PENDING]
    assert json.loads(tasks[0].result)["stdout"] == "done"
    (attempt,) = attempts
    assert (attempt.position, attempt.number, attempt.status) == (0, 1, SUCCESS)
    assert attempt.consumer == shop.registry.keeper._means.owner
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


def test_a_worker_goes_on_only_after_the_commit_returned(shop: Shop) -> None:
    """durability rule 13"""
    slow = Slow(shop.store)
    process = shop.process(Sale, store=slow, group="slow")
    bare(Sale)
    process.handle()
    abc = ["1.a", "1.b", "1.c"]
    assert slow.told == [abc[:n] for n in (1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize("doomed", [False, True])
def test_what_workers_record_at_the_same_time_is_judged_alone(shop: Shop, doomed: bool) -> None:
    """durability rule 14: one that lost its claim, among others, takes nobody with it."""
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


def test_the_message_of_a_step_says_who_it_is_and_nothing_else(shop: Shop) -> None:
    """durability rule 15: params and results are read at the claim."""
    for known in (Adding, CountingSpread):
        shop.first.learn(known)
    bare(CountingSpread, params={"x": 1}, metadata={"customer": "7"}, result=Result(retval={"n": 5}))
    shop.first.handle()
    steps = sent()[1:]
    assert [(kmsg.uuid, kmsg.entrypoint) for kmsg in steps] == [(f"1.{by}", Adding.path) for by in (1, 10, 100)]
    for kmsg in steps:
        assert (kmsg.params, kmsg.metadata, kmsg.result.retval) == ({}, {OPERATION: "1"}, {})
    operation = shop.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"n": 116}


def test_that_a_step_was_sent_is_a_time_and_a_count_and_is_recorded_later(shop: Shop) -> None:
    """durability rule 15"""
    bare(Spread)
    shop.first.step()
    assert (shop.stored().operation.sends, len(sent())) == (0, 2)
    shop.first.companion.mark()
    row = shop.stored().operation
    assert (row.sends, row.sent_at) == (1, pytest.approx(shop.world.now, abs=5))
    assert row.wake_at == pytest.approx(shop.world.now + 60, abs=5)


@pytest.mark.parametrize("trouble", [None, ConnectionError("the broker is gone")])
def test_a_step_counts_as_sent_once_its_delivery_is_told(
    shop: Shop, trouble: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 15: the worker has gone on long before; what was not delivered is the reaper's."""
    posted: list[Callable[[Exception | None], None]] = []
    producer: Any = shop.registry.producer
    begin = producer._begin
    producer._begin = lambda *arguments: posted.append(arguments[-1])
    bare(Spread)
    assert shop.first.step() == 1
    shop.first.companion.mark()
    assert (shop.stored().operation.sends, len(posted)) == (0, 1)
    posted[0](trouble)
    shop.first.companion.mark()
    assert shop.stored().operation.sends == (0 if trouble else 1)
    said = [line for line in lines(caplog) if "could not be sent, and will be by the reaper" in line]
    assert len(said) == (1 if trouble else 0)
    producer._begin = begin
    shop.live(10)
    assert len(sent()) == (2 if trouble else 1)


def test_each_task_runs_on_a_consumer_that_knows_it(shop: Shop) -> None:
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
def test_whatever_json_can_say_survives(shop: Shop, cls: type[Sale]) -> None:
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
def test_a_result_that_has_no_json_form_is_a_failure_of_its_task(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 16"""
    Act.acts["1.b"] = lambda: Result(retval={"when": object()})
    bare(cls)
    shop.first.handle()
    assert (shop.status(), shop.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert "cannot be stored: Object of type object is not JSON serializable" in str(shop.stored().attempts[1].error)


# -- what cannot be run here ---------------------------------------------------------------------------------------


def test_a_step_of_a_class_that_is_not_known_here_is_recorded_as_failed(shop: Shop) -> None:
    """durability rule 17: nobody waits for it for ever, and it can be resumed."""
    bare(Spread)
    shop.first.step()
    shop.first.forget(Act)
    shop.first.handle()
    assert (shop.status(), shop.tasks()) == (FAILED, [FAILED, PENDING, PENDING])
    assert "not registred: import its module in this consumer" in str(shop.stored().attempts[0].error)


def test_in_one_consumer_too(shop: Shop) -> None:
    """durability rule 17"""
    shop.first.known(Sale)("1").build().send()
    shop.first.forget(Act)
    shop.first.handle()
    assert (shop.status(), shop.tasks()) == (FAILED, [FAILED, PENDING, PENDING])


def test_a_stored_operation_of_a_class_that_is_not_known_here_is_recorded_as_failed(shop: Shop) -> None:
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
def test_a_task_that_cannot_be_built_is_a_failed_step(
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


def test_a_consumer_without_a_database_refuses_a_step(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 17: it does not run it."""
    shop.first.known(Spread)("1").build().send()
    poor = Process(None, Spread, group="poor", dead_letter=True)
    poor.handle()
    assert (Act.seen, shop.status()) == ([], PENDING)
    assert any("this consumer has no shared database: set KSER_DATABASE_URI" in line for line in lines(caplog))
    ((letter,),) = Bus.at("").topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.StoreMissing"
    poor.consumer.close()


def test_a_step_that_the_database_does_not_know_is_an_error_and_a_dead_letter(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 17: all consumers of a topic share one database."""
    process = shop.process(Spread, dead_letter=True, group="letters")
    put("lost", cls=Act)
    Bus.at("").send("dice", Message("1.a", Act.path, metadata={OPERATION: "gone"}).dumps().encode())
    process.handle()
    assert Act.seen == ["lost"]
    assert any(
        "step 1.a belongs to operation gone, which" in line and "must share one database" in line
        for line in lines(caplog, logging.ERROR)
    )
    ((letter,),) = Bus.at("").topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.StoreError"


# -- what Kafka may forget -----------------------------------------------------------------------------------------


def test_an_operation_that_runs_holds_no_offset(shop: Shop) -> None:
    """durability rule 18: it may take hours."""
    gate = threading.Event()
    Act.acts["1.b"] = lambda: gate.wait(PATIENCE)
    bare(Sale)
    with InThread(shop.first.consumer):
        until(lambda: "1.b" in Act.seen)
        until(lambda: committed() == 1)
        gate.set()
        until(lambda: shop.status() == SUCCESS)
    assert shop.first.consumer.counts["done"] == 1


def test_what_fails_before_it_is_answered_for_is_not_committed(shop: Shop) -> None:
    """durability rule 18: done for Kafka once the database durably answers, and not before."""
    process = shop.process(Sale, group="dummy")
    shop.first.consumer.close()

    def away(*_: Any) -> Any:
        assert committed() == 0
        process.consumer._workers.stopping = True
        raise StoreUnavailable("the database is away")

    process.registry.keeper._store = type("Away", (), {"peek": away, "save": away})()
    bare(Sale)
    process.handle()
    assert (committed(), Act.seen) == (0, [])


@BOTH_WAYS
def test_each_refused_claim_is_done_for_kafka(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 18: ended, held by a live owner, or waiting for its time."""
    shop.first.known(cls)("1").build().send()
    shop.seize()
    shop.first.handle()
    assert committed() == 1


def test_those_of_the_same_key_wait_for_an_operation_to_end(shop: Shop) -> None:
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
        until(lambda: Bus.at("").committed[("keys", DICE)].offset == 1)
        assert "plain" not in Act.seen
        gate.set()
        until(lambda: "plain" in Act.seen)
    assert Act.seen.index("1.c") < Act.seen.index("plain")


def test_a_partition_that_goes_does_not_stop_an_operation_nor_wait_for_it(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rules 18 and 30: it goes on under its claim, and nobody runs it again."""
    Bus.at("").create_topic("dice", 2)
    seen: list[Any] = []

    def rebalance() -> None:
        second = shop.process(Sale)
        for _ in range(4):
            second.step()
            shop.first.consumer._poller.turn(0)
        seen.append((set(second.consumer.assignment), second.consumer.counts["done"], committed(1)))

    Act.acts["1.a"] = meanwhile(rebalance)
    put("1", cls=Sale, partition=1)
    shop.first.step()
    assert seen == [({Partition("dice", 1)}, 0, 1)]
    assert (Act.seen, shop.status(), committed(1)) == (["1.a", "1.b", "1.c"], SUCCESS, 1)
    assert not [line for line in lines(caplog) if "taken away" in line]


# -- refused claims ------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_a_refused_claim_is_quiet(shop: Shop, cls: type[Sale], caplog: pytest.LogCaptureFixture) -> None:
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
