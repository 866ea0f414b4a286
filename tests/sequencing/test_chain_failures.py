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
from tests.consumer.harness import DICE, ConsumerThread, ScriptedTask
from tests.durable.harness import (
    BOTH_MODES,
    LEASE_EXPIRED,
    DurableHarness,
    Sale,
    DistributedSale,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.support import WAIT_SECONDS, wait_until

ORDER = ["1.a", "1.b", "1.c"]


def lose_what_is_on_its_way(harness: DurableHarness) -> None:
    """Lose the records that the consumer has not taken yet."""
    client: Any = harness.first.consumer._kser_poller._client
    (log,) = InMemoryBroker.at("").topics["dice"]
    del log[client._positions[DICE] :]


@BOTH_MODES
@pytest.mark.parametrize("when", ["the next message is lost", "the message comes again", "a retry"])
def test_chain_is_neither_lost_nor_duplicated_around_a_crash(
    harness: DurableHarness, cls: type[Sale], when: str
) -> None:
    """celery/celery#9835, #5006, #6631: between the end of a task and the message of the next one."""
    if when == "a retry":
        ScriptedTask.script["1.b"] = [Retry.later(5), None]
    send_raw_message(cls)
    harness.first.step()
    harness.first.step()
    if when == "the message comes again":
        for kmsg in sent_messages():
            InMemoryBroker.at("").send("dice", kmsg.dumps().encode())
    else:
        lose_what_is_on_its_way(harness)
    harness.advance_with_reaper(70)
    harness.first.handle()
    harness.advance_with_reaper(70)
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert ScriptedTask.ran == (ORDER if when != "a retry" else ["1.a", "1.b", "1.b", "1.c"])


@pytest.mark.parametrize("how", ["killed", "SystemExit", "stopped"])
def test_killed_task_is_rerun_and_finished_one_is_not_after_a_graceful_shutdown(
    harness: DurableHarness, how: str
) -> None:
    """celery/celery#1628, #7924, #3802: each way out of a process keeps what is done, and what is not."""
    process = harness.start_process(Sale, group="dying")
    gate = threading.Event()
    other = harness.start_process(Sale, group="next")
    if how == "killed":
        # It is never heard of again, in the middle of a task.
        harness.first.class_of(Sale)("1").build().send()
        harness.claim_and_die()
        harness.advance(LEASE_EXPIRED)
    else:
        ScriptedTask.script["1.b"] = [SystemExit(9) if how == "SystemExit" else lambda: gate.wait(WAIT_SECONDS), None]
        send_raw_message(Sale)
        with ConsumerThread(process.consumer) as thread:
            wait_until(lambda: "1.b" in ScriptedTask.ran)
            process.stop_gracefully()
            gate.set()
            thread.join()
    if how == "SystemExit":
        assert (harness.status(), harness.task_statuses()) == (FAILED, [SUCCESS, FAILED, PENDING])
        harness.registry.get("1").resume()  # type: ignore[union-attr]
    other.handle()
    assert harness.status() == SUCCESS
    assert ScriptedTask.ran == {"killed": ORDER, "stopped": ORDER, "SystemExit": ["1.a", "1.b", "1.b", "1.c"]}[how]


@BOTH_MODES
def test_idempotent_side_effect_happens_once_although_its_task_runs_twice(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """celery/celery#4426, #4671: code may run twice, so it has a key that is the same each time to give to others."""
    charged: dict[str, int] = {}
    second = harness.start_process(cls, group="second")

    def charge() -> Result:
        charged.setdefault("1.b", 100)
        return Result(retval={"charged": charged["1.b"]})

    def charge_and_die() -> Result:
        result = charge()
        in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle)()
        return result

    ScriptedTask.script["1.b"] = [charge_and_die, charge]
    send_raw_message(cls)
    harness.first.handle()
    assert [uuid for uuid in ScriptedTask.ran if uuid == "1.b"] == ["1.b", "1.b"]
    assert (charged, harness.status()) == ({"1.b": 100}, SUCCESS)
    assert [each.status for each in harness.snapshot().attempts if each.position == 1] == [SUCCESS]


@BOTH_MODES
def test_retry_delayed_for_hours_runs_once_despite_redelivered_messages(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """celery/celery#2599, #3270, #4400, #9882; celery/kombu#337: delayed for longer than anything else waits."""
    ScriptedTask.script["1.b"] = [Retry.later(3 * 3600), None]
    send_raw_message(cls)
    harness.first.handle()
    for _ in range(17):
        harness.advance(600)
        harness.first.background_service.tick()
        for kmsg in sent_messages()[:3]:
            InMemoryBroker.at("").send("dice", kmsg.dumps().encode())
        harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b"]
    harness.advance(700)
    harness.first.background_service.tick()
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.b", "1.c"], SUCCESS)


@BOTH_MODES
def test_recovery_continues_after_a_database_restart_at_the_start(harness: DurableHarness, cls: type[Sale]) -> None:
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
        harness.first.class_of(cls)(str(number)).build().send()
        harness.claim_and_die(str(number))
    for log in InMemoryBroker.at("").topics["dice"]:
        log.clear()
    store = Restarting(harness.store)
    process = harness.start_process(cls, store=store, group="restarted")
    harness.advance_with_reaper(20, process)
    store.away = False
    harness.advance_with_reaper(45, process)
    process.handle()
    assert [harness.status(str(number)) for number in range(5)] == [SUCCESS] * 5


def test_concurrent_writers_record_each_task_once(harness: DurableHarness) -> None:
    """getsentry/taskbroker PR#17, PR#487: many workers of two consumers write; each task is recorded once."""
    InMemoryBroker.at("").create_topic("dice", 8)
    processes = [harness.start_process(Sale, DistributedSale, workers=8) for _ in range(2)]
    harness.first.consumer.close()
    for number in range(60):
        send_raw_message(Sale if number % 2 else DistributedSale, uuid=str(number))
    with ConsumerThread(processes[0].consumer), ConsumerThread(processes[1].consumer):
        wait_until(lambda: all(harness.has_ended(str(number)) for number in range(60)))
    assert sorted(ScriptedTask.ran) == sorted(f"{number}.{name}" for number in range(60) for name in "abc")
    for number in range(60):
        assert harness.attempts(str(number)) == [(at, 1, SUCCESS) for at in range(3)]


class Broken(Task):
    """Code with a mistake in it."""

    fixed: ClassVar[bool] = False

    def run(self) -> Result:
        if not self.fixed:
            raise KeyError("total")
        return Result(retval={"total": self.result.retval["price"] * 2})


class Invoice(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask("1.price"), Broken("1.total"), ScriptedTask("1.mail")]


class InvoiceSpread(Invoice):
    DISTRIBUTED = True


@pytest.mark.parametrize("cls", [Invoice, InvoiceSpread])
def test_resume_continues_at_the_failed_task_after_a_code_fix(
    harness: DurableHarness, cls: type[Invoice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """celery/celery#5970; ydf0509/funboost#3; durable-workflow/workflow#262"""
    for known in (Broken, cls):
        harness.first.subscribe_copy(known)
    ScriptedTask.script["1.price"] = lambda: Result(retval={"price": 21})
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (FAILED, ["1.price"])
    harness.first.consumer.close()
    monkeypatch.setattr(Broken, "fixed", True)
    deployed = harness.start_process(Broken, cls)
    operation = deployed.registry.get("1")
    assert operation is not None
    operation.resume()
    deployed.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.price", "1.mail"])
    assert operation.wait(1).retval == {"price": 21, "total": 42}


@BOTH_MODES
@pytest.mark.parametrize("state", ["pending", "running"])
def test_pending_or_running_operation_is_cancelled_by_its_uuid(
    harness: DurableHarness, cls: type[Sale], state: str
) -> None:
    """taskiq-python/taskiq#305; Flared/dramatiq-abort PR#6: from a process that knows nothing but the uuid."""
    desk = harness.start_process(group="desk")

    def cancel() -> None:
        operation = desk.registry.get("1")
        assert operation is not None
        assert operation.cancel("by the desk") == (CANCELLED if state == "pending" else RUNNING)

    if state == "running":
        ScriptedTask.script["1.b"] = in_other_thread(cancel)
    harness.first.class_of(cls)("1").build().send()
    if state == "pending":
        cancel()
    harness.first.handle()
    assert harness.status() == CANCELLED
    assert ScriptedTask.ran == ([] if state == "pending" else ["1.a", "1.b"])


@BOTH_MODES
@pytest.mark.parametrize("fate", ["it fails", "it is abandoned"])
def test_operation_fails_when_its_task_failed_or_was_abandoned(
    harness: DurableHarness, cls: type[Sale], fate: str
) -> None:
    """rq/rq#2074, #1093, #2006: an operation always ends, and what has not is listed."""
    harness.first.class_of(cls)("1").build().send()
    if fate == "it fails":
        ScriptedTask.script["1.a"] = ConnectionError("no")
        harness.first.handle()
    else:
        for _ in range(20):
            harness.claim_and_die()
            assert [operation.uuid for operation in harness.registry.find(status=[PENDING, RUNNING])] == ["1"]
            harness.advance(LEASE_EXPIRED)
        harness.advance_with_reaper(70)
        harness.first.handle()
    assert (harness.status(), harness.task_statuses()) == (FAILED, [FAILED, PENDING, PENDING])
    assert harness.registry.find(status=[PENDING, RUNNING]) == []


def test_long_chain_needs_no_recursion_and_only_small_messages(harness: DurableHarness) -> None:
    """celery/celery#1078, #5000, #9202, PR#10171: a message names a step, and nothing of the rest."""
    uuids = [f"1.{number}" for number in range(500)]
    operation = harness.first.class_of(DistributedSale)(
        "1", {"text": "x" * 10_000}, tasks=[ScriptedTask(uuid) for uuid in uuids]
    )
    operation.launch()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, uuids)
    assert max(len(value or b"") for value in InMemoryBroker.at("").values("dice")) < 400
