"""Tests of failures that users of other task queues reported for chains.

Each docstring names the thread of the other project.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.errors import StoreUnavailable
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import CANCELLED, FAILED, PENDING, RUNNING, SUCCESS
from kser.store.base import Store
from tests.consumer.harness import DICE, PATIENCE, Act, InThread, until
from tests.durable.harness import BOTH_WAYS, Sale, Shop, Spread, bare, expire, meanwhile, sent

ORDER = ["1.a", "1.b", "1.c"]


def lose_what_is_on_its_way(shop: Shop) -> None:
    """Lose the records that the consumer has not taken yet."""
    client: Any = shop.first.consumer._kser_poller._client
    (log,) = InMemoryBroker.at("").topics["dice"]
    del log[client._positions[DICE] :]


@BOTH_WAYS
@pytest.mark.parametrize("when", ["the next message is lost", "the message comes again", "a retry"])
def test_chain_is_neither_lost_nor_duplicated_around_a_crash(shop: Shop, cls: type[Sale], when: str) -> None:
    """celery/celery#9835, #5006, #6631: between the end of a task and the message of the next one."""
    if when == "a retry":
        Act.acts["1.b"] = [Retry.later(5), None]
    bare(cls)
    shop.first.step()
    shop.first.step()
    if when == "the message comes again":
        for kmsg in sent():
            InMemoryBroker.at("").send("dice", kmsg.dumps().encode())
    else:
        lose_what_is_on_its_way(shop)
    shop.live(70)
    shop.first.handle()
    shop.live(70)
    shop.first.handle()
    assert shop.status() == SUCCESS
    assert Act.seen == (ORDER if when != "a retry" else ["1.a", "1.b", "1.b", "1.c"])


@pytest.mark.parametrize("how", ["killed", "SystemExit", "stopped"])
def test_killed_task_is_rerun_and_finished_one_is_not_after_a_graceful_shutdown(shop: Shop, how: str) -> None:
    """celery/celery#1628, #7924, #3802: each way out of a process keeps what is done, and what is not."""
    process = shop.process(Sale, group="dying")
    gate = threading.Event()
    other = shop.process(Sale, group="next")
    if how == "killed":
        # It is never heard of again, in the middle of a task.
        shop.first.known(Sale)("1").build().send()
        shop.seize()
        shop.pass_by(expire())
    else:
        Act.acts["1.b"] = [SystemExit(9) if how == "SystemExit" else lambda: gate.wait(PATIENCE), None]
        bare(Sale)
        with InThread(process.consumer) as thread:
            until(lambda: "1.b" in Act.seen)
            process.consumer.stop()
            until(lambda: process.consumer._kser_poller.shutting_down)
            gate.set()
            thread.join()
    if how == "SystemExit":
        assert (shop.status(), shop.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
        shop.registry.get("1").resume()  # type: ignore[union-attr]
    other.handle()
    assert shop.status() == SUCCESS
    assert Act.seen == {"killed": ORDER, "stopped": ORDER, "SystemExit": ["1.a", "1.b", "1.b", "1.c"]}[how]


@BOTH_WAYS
def test_idempotent_side_effect_happens_once_although_its_task_runs_twice(shop: Shop, cls: type[Sale]) -> None:
    """celery/celery#4426, #4671: code may run twice, so it has a key that is the same each time to give to others."""
    charged: dict[str, int] = {}
    second = shop.process(cls, group="second")

    def charge() -> Result:
        charged.setdefault("1.b", 100)
        return Result(retval={"charged": charged["1.b"]})

    def charge_and_die() -> Result:
        result = charge()
        meanwhile(lambda: shop.pass_by(expire()), second.handle)()
        return result

    Act.acts["1.b"] = [charge_and_die, charge]
    bare(cls)
    shop.first.handle()
    assert [uuid for uuid in Act.seen if uuid == "1.b"] == ["1.b", "1.b"]
    assert (charged, shop.status()) == ({"1.b": 100}, SUCCESS)
    assert [each.status for each in shop.stored().attempts if each.position == 1] == [SUCCESS]


@BOTH_WAYS
def test_retry_delayed_for_hours_runs_once_despite_redelivered_messages(shop: Shop, cls: type[Sale]) -> None:
    """celery/celery#2599, #3270, #4400, #9882; celery/kombu#337: delayed for longer than anything else waits."""
    Act.acts["1.b"] = [Retry.later(3 * 3600), None]
    bare(cls)
    shop.first.handle()
    for _ in range(17):
        shop.pass_by(600)
        shop.first.companion.tick()
        for kmsg in sent()[:3]:
            InMemoryBroker.at("").send("dice", kmsg.dumps().encode())
        shop.first.handle()
    assert Act.seen == ["1.a", "1.b"]
    shop.pass_by(700)
    shop.first.companion.tick()
    shop.first.handle()
    assert (Act.seen, shop.status()) == (["1.a", "1.b", "1.b", "1.c"], SUCCESS)


@BOTH_WAYS
def test_recovery_continues_after_a_database_restart_at_the_start(shop: Shop, cls: type[Sale]) -> None:
    """dbos-inc/dbos-transact-py#716, #804, #805: here it never stops."""

    class Restarting:
        away = True

        def __init__(self, store: Store) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            if self.away and name not in ("check", "name"):
                raise StoreUnavailable("the database is starting up")
            return getattr(self._store, name)

    for number in range(5):
        shop.first.known(cls)(str(number)).build().send()
        shop.seize(str(number))
    for log in InMemoryBroker.at("").topics["dice"]:
        log.clear()
    store = Restarting(shop.store)
    process = shop.process(cls, store=store, group="restarted")
    shop.live(20, process)
    store.away = False
    shop.live(45, process)
    process.handle()
    assert [shop.status(str(number)) for number in range(5)] == [SUCCESS] * 5


def test_concurrent_writers_record_each_task_once(shop: Shop) -> None:
    """getsentry/taskbroker PR#17, PR#487: many workers of two consumers write; each task is recorded once."""
    InMemoryBroker.at("").create_topic("dice", 8)
    processes = [shop.process(Sale, Spread, workers=8) for _ in range(2)]
    shop.first.consumer.close()
    for number in range(60):
        bare(Sale if number % 2 else Spread, uuid=str(number))
    with InThread(processes[0].consumer), InThread(processes[1].consumer):
        until(lambda: all(shop.has_ended(str(number)) for number in range(60)))
    assert sorted(Act.seen) == sorted(f"{number}.{name}" for number in range(60) for name in "abc")
    for number in range(60):
        assert shop.attempts(str(number)) == [(at, 1, SUCCESS) for at in range(3)]


class Broken(Task):
    """Code with a mistake in it."""

    fixed: ClassVar[bool] = False

    def run(self) -> Result:
        if not self.fixed:
            raise KeyError("total")
        return Result(retval={"total": self.result.retval["price"] * 2})


class Invoice(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Act("1.price"), Broken("1.total"), Act("1.mail")]


class InvoiceSpread(Invoice):
    DISTRIBUTED = True


@pytest.mark.parametrize("cls", [Invoice, InvoiceSpread])
def test_resume_continues_at_the_failed_task_after_a_code_fix(
    shop: Shop, cls: type[Invoice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """celery/celery#5970; ydf0509/funboost#3; durable-workflow/workflow#262"""
    for known in (Broken, cls):
        shop.first.learn(known)
    Act.acts["1.price"] = lambda: Result(retval={"price": 21})
    bare(cls)
    shop.first.handle()
    assert (shop.status(), Act.seen) == (FAILED, ["1.price"])
    shop.first.consumer.close()
    monkeypatch.setattr(Broken, "fixed", True)
    deployed = shop.process(Broken, cls)
    operation = deployed.registry.get("1")
    assert operation is not None
    operation.resume()
    deployed.handle()
    assert (shop.status(), Act.seen) == (SUCCESS, ["1.price", "1.mail"])
    assert operation.wait(1).retval == {"price": 21, "total": 42}


@BOTH_WAYS
@pytest.mark.parametrize("state", ["pending", "running"])
def test_pending_or_running_operation_is_cancelled_by_its_uuid(shop: Shop, cls: type[Sale], state: str) -> None:
    """taskiq-python/taskiq#305; Flared/dramatiq-abort PR#6: from a process that knows nothing but the uuid."""
    desk = shop.process(group="desk")

    def cancel() -> None:
        operation = desk.registry.get("1")
        assert operation is not None
        assert operation.cancel("by the desk") == (CANCELLED if state == "pending" else RUNNING)

    if state == "running":
        Act.acts["1.b"] = meanwhile(cancel)
    shop.first.known(cls)("1").build().send()
    if state == "pending":
        cancel()
    shop.first.handle()
    assert shop.status() == CANCELLED
    assert Act.seen == ([] if state == "pending" else ["1.a", "1.b"])


@BOTH_WAYS
@pytest.mark.parametrize("fate", ["it fails", "it is abandoned"])
def test_operation_fails_when_its_task_failed_or_was_abandoned(shop: Shop, cls: type[Sale], fate: str) -> None:
    """rq/rq#2074, #1093, #2006: an operation always ends, and what has not is listed."""
    shop.first.known(cls)("1").build().send()
    if fate == "it fails":
        Act.acts["1.a"] = ConnectionError("no")
        shop.first.handle()
    else:
        for _ in range(20):
            shop.seize()
            assert [operation.uuid for operation in shop.registry.find(status=[PENDING, RUNNING])] == ["1"]
            shop.pass_by(expire())
        shop.live(70)
        shop.first.handle()
    assert (shop.status(), shop.tasks()) == (FAILED, [FAILED, PENDING, PENDING])
    assert shop.registry.find(status=[PENDING, RUNNING]) == []


def test_long_chain_needs_no_recursion_and_only_small_messages(shop: Shop) -> None:
    """celery/celery#1078, #5000, #9202, PR#10171: a message names a step, and nothing of the rest."""
    uuids = [f"1.{number}" for number in range(500)]
    operation = shop.first.known(Spread)("1", {"text": "x" * 10_000}, tasks=[Act(uuid) for uuid in uuids])
    operation.launch()
    shop.first.handle()
    assert (shop.status(), Act.seen) == (SUCCESS, uuids)
    assert max(len(value or b"") for value in InMemoryBroker.at("").values("dice")) < 400
