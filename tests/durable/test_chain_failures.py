"""Tests of failures that users of other task queues reported for chains.

Each docstring names the thread of the other project.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.retry import Retry
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import CANCELLED, FAILED, PENDING, RUNNING, SUCCESS
from tests.consumer.harness import ConsumerThread, ScriptedTask, committed
from tests.durable.harness import (
    BOTH_MODES,
    LEASE_EXPIRED,
    MODES,
    TAKEOVER_DUE,
    DistributedSale,
    DurableHarness,
    Sale,
    UnavailableStore,
    in_other_thread,
    lose_records,
    send_raw_message,
    sent_messages,
)
from tests.support import WAIT_SECONDS, wait_until

ORDER = ["1.a", "1.b", "1.c"]


def lose_unfetched_records() -> None:
    """Delete the records that the consumer, which commits each record that it fetched, has not fetched yet."""
    (log,) = InMemoryBroker.at("").topics["dice"]
    del log[committed() :]


def resend_messages(messages: list[Message]) -> None:
    """Send messages again, as a producer with a lost acknowledgement does."""
    for kmsg in messages:
        InMemoryBroker.at("").send("dice", kmsg.dumps().encode())


@BOTH_MODES
@pytest.mark.parametrize("fault", ["next message lost", "messages redelivered", "message of a retry lost"])
def test_chain_is_neither_lost_nor_duplicated_around_a_crash(
    harness: DurableHarness, cls: type[Sale], fault: str
) -> None:
    """celery/celery#9835, #5006, #6631: the crash is between the end of a task and the message of the next one."""
    if fault == "message of a retry lost":
        ScriptedTask.script["1.b"] = [Retry.later(5), None]
    send_raw_message(cls)
    harness.first.step()
    harness.first.step()
    if fault == "messages redelivered":
        resend_messages(sent_messages())
    else:
        lose_unfetched_records()
    harness.advance_with_reaper(70)
    harness.first.handle()
    harness.advance_with_reaper(70)
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert ScriptedTask.ran == (["1.a", "1.b", "1.b", "1.c"] if fault == "message of a retry lost" else ORDER)


@pytest.mark.parametrize("end", ["killed", "SystemExit", "stopped"])
def test_killed_task_is_rerun_and_finished_one_is_not_after_a_graceful_shutdown(
    harness: DurableHarness, end: str, gate: threading.Event
) -> None:
    """celery/celery#1628, #7924, #3802: finished tasks stay finished, however the process ends."""
    process = harness.start_process(Sale, group="stopped")
    second = harness.start_process(Sale, group="second")
    if end == "killed":
        harness.first.class_of(Sale)("1").build().send()
        harness.claim_and_die()
        harness.advance(LEASE_EXPIRED)
    else:
        ScriptedTask.script["1.b"] = [SystemExit(9) if end == "SystemExit" else lambda: gate.wait(WAIT_SECONDS), None]
        send_raw_message(Sale)
        process.stop_during("1.b", gate)
    if end == "SystemExit":
        assert (harness.status(), harness.task_statuses()) == (FAILED, [SUCCESS, FAILED, PENDING])
        harness.operation().resume()
    second.handle()
    assert harness.status() == SUCCESS
    assert ScriptedTask.ran == {"killed": ORDER, "stopped": ORDER, "SystemExit": ["1.a", "1.b", "1.b", "1.c"]}[end]


@BOTH_MODES
def test_idempotent_side_effect_happens_once_although_its_task_runs_twice(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """celery/celery#4426, #4671: a task may run twice, so the uuid of the task serves as its idempotency key."""
    charged: dict[str, int] = {}
    second = harness.start_process(cls, group="second")

    def charge() -> Result:
        charged.setdefault("1.b", 100)
        return Result(retval={"charged": charged["1.b"]})

    def charge_and_exceed_the_lease() -> Result:
        result = charge()
        in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle)()
        return result

    ScriptedTask.script["1.b"] = [charge_and_exceed_the_lease, charge]
    send_raw_message(cls)
    harness.first.handle()
    assert ScriptedTask.ran.count("1.b") == 2
    assert (charged, harness.status()) == ({"1.b": 100}, SUCCESS)
    assert [attempt.status for attempt in harness.attempts() if attempt.position == 1] == [SUCCESS]


@BOTH_MODES
def test_retry_delayed_for_hours_runs_once_despite_redelivered_messages(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """celery/celery#2599, #3270, #4400, #9882; celery/kombu#337: the delay is longer than every other time limit."""
    ScriptedTask.script["1.b"] = [Retry.later(3 * 3600), None]
    send_raw_message(cls)
    harness.first.handle()
    for _ in range(17):
        harness.advance(600)
        harness.first.background_service.tick()
        resend_messages(sent_messages()[:3])
        harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b"]
    harness.advance(700)
    harness.first.background_service.tick()
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.b", "1.c"], SUCCESS)


@BOTH_MODES
def test_recovery_continues_after_a_database_restart_at_the_start(harness: DurableHarness, cls: type[Sale]) -> None:
    """dbos-inc/dbos-transact-py#716, #804, #805: an outage does not end the recovery."""
    for number in range(5):
        harness.first.class_of(cls)(str(number)).build().send()
        harness.claim_and_die(str(number))
    lose_records()
    store = UnavailableStore(harness.store)
    process = harness.start_process(cls, store=store, group="second")
    store.error = "the database is starting up"
    harness.advance_with_reaper(20, process)
    assert store.failed_calls > 0
    store.error = ""
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
        assert harness.attempts(str(number)) == [(position, 1, SUCCESS) for position in range(3)]


class TotalTask(Task):
    """A task with an error in its code until ``is_fixed`` is set."""

    is_fixed: ClassVar[bool] = False

    def run(self) -> Result:
        if not self.is_fixed:
            raise KeyError("total")
        return Result(retval={"total": self.result.retval["price"] * 2})


class Invoice(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask("1.price"), TotalTask("1.total"), ScriptedTask("1.mail")]


class DistributedInvoice(Invoice):
    DISTRIBUTED = True


@pytest.mark.parametrize("cls", [Invoice, DistributedInvoice], ids=MODES)
def test_resume_continues_at_the_failed_task_after_a_code_fix(
    harness: DurableHarness, cls: type[Invoice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """celery/celery#5970; ydf0509/funboost#3; durable-workflow/workflow#262"""
    for known in (TotalTask, cls):
        harness.first.subscribe_copy(known)
    ScriptedTask.script["1.price"] = lambda: Result(retval={"price": 21})
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (FAILED, ["1.price"])
    harness.first.consumer.close()
    monkeypatch.setattr(TotalTask, "is_fixed", True)
    deployed = harness.start_process(TotalTask, cls)
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
    """taskiq-python/taskiq#305; Flared/dramatiq-abort PR#6: from a process that knows only the uuid."""
    web_process = harness.start_process(group="web")

    def cancel() -> None:
        operation = web_process.registry.get("1")
        assert operation is not None
        assert operation.cancel("by the customer") == (CANCELLED if state == "pending" else RUNNING)

    if state == "running":
        ScriptedTask.script["1.b"] = in_other_thread(cancel)
    harness.first.class_of(cls)("1").build().send()
    if state == "pending":
        cancel()
    harness.first.handle()
    assert harness.status() == CANCELLED
    assert ScriptedTask.ran == ([] if state == "pending" else ["1.a", "1.b"])


@BOTH_MODES
@pytest.mark.parametrize("cause", ["task fails", "consumers die"])
def test_operation_fails_when_its_task_fails_or_its_consumers_die(
    harness: DurableHarness, cls: type[Sale], cause: str
) -> None:
    """rq/rq#2074, #1093, #2006: an operation always ends, and ``find`` returns it until then."""
    harness.first.class_of(cls)("1").build().send()
    if cause == "task fails":
        ScriptedTask.script["1.a"] = ConnectionError("no")
        harness.first.handle()
    else:
        for _ in range(20):
            harness.claim_and_die()
            assert [operation.uuid for operation in harness.registry.find(status=[PENDING, RUNNING])] == ["1"]
            harness.advance(TAKEOVER_DUE)
        harness.advance_with_reaper(70)
        harness.first.handle()
    assert (harness.status(), harness.task_statuses()) == (FAILED, [FAILED, PENDING, PENDING])
    assert harness.registry.find(status=[PENDING, RUNNING]) == []


def test_long_chain_needs_no_recursion_and_only_small_messages(harness: DurableHarness) -> None:
    """celery/celery#1078, #5000, #9202, PR#10171: a message contains the identity of one step."""
    uuids = [f"1.{number}" for number in range(500)]
    operation = harness.first.class_of(DistributedSale)(
        "1", {"text": "x" * 10_000}, tasks=[ScriptedTask(uuid) for uuid in uuids]
    )
    operation.launch()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, uuids)
    assert max(len(value or b"") for value in InMemoryBroker.at("").values("dice")) < 400
