"""Tests of stored operations with several faults at once, or with faulty user code."""

from __future__ import annotations

import itertools
import logging
import signal
import threading
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer
from kser.errors import FencedError, StoreUnavailable, TaskTimeout
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import CANCELLED, FAILED, RUNNING, SUCCESS
from kser.store.sql.group_commit import GroupCommit, PendingWrite
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import BOTH_WAYS, TURN, DurableHarness, Sale, Spread, send_raw_message, sent_messages
from tests.store.harness import LEASE
from tests.support import WAIT_SECONDS, wait_until


class Broken(Producer):
    """A producer of somebody else's, which raises what nobody expects."""

    def send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
        raise RuntimeError("somebody else's producer")


@BOTH_WAYS
def test_poison_message_with_a_pending_cancel_is_cancelled_and_not_run_again(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 24: the task that killed its consumer must not kill the next one."""
    operation = harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    assert operation.cancel("it kills") == RUNNING
    harness.advance_with_reaper(LEASE + 2 * TURN)
    harness.first.handle()
    assert (harness.stored().operation.status, ScriptedTask.ran) == (CANCELLED, [])


def test_raising_producer_after_a_checkpoint_fails_no_step(harness: DurableHarness) -> None:
    """durability rule 8: the claim was released, so nothing more is recorded under it."""
    harness.first.class_of(Spread)("1").build().launch()
    good, harness.registry._kser_producer = harness.registry._kser_producer, Broken({})
    harness.first.step()
    assert (harness.stored().operation.status, harness.stored().operation.step, ScriptedTask.ran) == (
        RUNNING,
        1,
        ["1.a"],
    )
    harness.registry._kser_producer = good
    harness.advance_with_reaper(2 * TURN)
    harness.first.handle()
    assert harness.stored().operation.status == SUCCESS


class Exits(Task):
    """Fails, and its hook ends the process, or so it believes."""

    runs: ClassVar[int] = 0

    def run(self) -> None:
        Exits.runs += 1
        raise ValueError("no")

    def onerror(self, result: Result) -> Any:
        raise SystemExit(3)


@pytest.mark.parametrize("distributed", [False, True], ids=["in one consumer", "over the consumers"])
def test_hook_that_raises_system_exit_fails_its_step_once(harness: DurableHarness, distributed: bool) -> None:
    """durability rule 22: the same exit would otherwise recur at once, without end."""
    exits = harness.first.subscribe_copy(Exits)

    class Ends(Operation):
        DISTRIBUTED = distributed

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [exits(f"{self.uuid}.x")]

    before = Exits.runs
    send_raw_message(harness.registry.subscribe(Ends))
    harness.first.handle()
    assert (harness.stored().operation.status, Exits.runs - before) == (FAILED, 1)


def test_missing_topics_delay_neither_the_heartbeat_nor_other_operations(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rules 9, 12 and 20."""

    class Slow(Producer):
        def send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
            if topic.startswith("gone"):
                harness.advance(timeout)
                return Result(uuid=kmsg.uuid, retcode=500, stderr="there is no such topic")
            return super().send(topic, kmsg, timeout, **options)

    harness.registry._kser_producer = Slow({})
    harness.first.class_of(Sale)("dead").build().send()
    InMemoryBroker.at("").topics["dice"][0].clear()
    harness.claim_and_die("dead")
    for number in range(6):
        harness.first.class_of(Sale)(f"lost {number}").build().send(topic=f"gone {number}")
    background_service, beats, began = harness.first.background_service, [0.0], harness.store_harness.now
    beat = background_service.renew_leases

    def noted() -> None:
        beats.append(harness.store_harness.now - began)
        beat()

    noted.__name__ = "beat"
    monkeypatch.setattr(background_service, "renew_leases", noted)
    while harness.store_harness.now - began < 600:
        background_service.tick()
        harness.advance(0.5)
    assert max(later - earlier for earlier, later in itertools.pairwise(beats)) < LEASE * 2 / 3
    assert harness.stored("dead").operation.owner is None
    assert len(harness.stored("lost 0").events) < 40


def test_attempt_that_timed_out_while_building_does_not_accept_the_operation(harness: DurableHarness) -> None:
    """durability rules 2 and 28: the attempt was already reported as failed."""
    consumer = harness.first.consumer
    gates: list[Any] = []

    class Long(Operation):
        TIME_LIMIT = 5

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if gates:
                gates.pop()()
            return [ScriptedTask(f"{self.uuid}.a")]

    def gate() -> None:
        harness.first.clock.advance(6)
        consumer._kser_worker_pool.enforce_time_limits()
        wait_until(lambda: consumer.counts.get("failed"))

    gates.append(gate)
    send_raw_message(harness.registry.subscribe(Long))
    consumer.step(timeout=0)
    assert (harness.store.get_operation("1"), ScriptedTask.ran) == (None, [])
    consumer._kser_worker_pool.shutdown()


def test_task_that_ends_at_its_time_limit_does_not_time_out_the_next_one(harness: DurableHarness) -> None:
    """durability rule 28: the supervisor had read the time of the task before."""
    dispatch = harness.first.consumer._kser_work_queue
    looked: list[Any] = []
    found: list[bool] = []

    class Two(Operation):
        TIME_LIMIT = 5

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [ScriptedTask(f"{self.uuid}.a"), ScriptedTask(f"{self.uuid}.b")]

    def first() -> None:
        (item,) = dispatch.running()
        looked.extend((item, item.attempt.outcome))
        harness.first.clock.advance(5.1)

    ScriptedTask.script["1.a"] = first
    ScriptedTask.script["1.b"] = lambda: found.append(dispatch.time_out(looked[0], TaskTimeout("too long"), looked[1]))
    send_raw_message(harness.registry.subscribe(Two))
    harness.first.handle()
    assert (found, harness.stored().operation.status, len(harness.stored().attempts)) == ([False], SUCCESS, 2)


def test_resume_in_a_process_without_a_consumer_sends_once(harness: DurableHarness) -> None:
    """durability rules 15 and 25."""
    ScriptedTask.script["1.b"] = [ValueError("no"), None]
    send_raw_message(Sale)
    harness.first.handle()
    web = harness.process(Sale)
    found = web.registry.get("1")
    assert found is not None
    found.resume()
    before = len(sent_messages())
    harness.advance_with_reaper(2 * TURN)
    assert (len(sent_messages()), harness.stored().operation.send_count) == (before, 1)


def test_wait_survives_a_database_outage(harness: DurableHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 33"""
    send_raw_message(Sale)
    harness.first.handle()
    found = harness.registry.get("1")
    assert found is not None
    peek, asked = harness.store.get_operation, []

    def away(uuid: str) -> Any:
        asked.append(uuid)
        if len(asked) < 8:
            raise StoreUnavailable("the database restarts")
        return peek(uuid)

    monkeypatch.setattr(harness.store, "get_operation", away)
    assert found.wait(timeout=WAIT_SECONDS).retcode == 0


def test_claim_that_cannot_be_released_does_not_affect_the_others(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 9"""
    given_back = []

    class Held:
        is_abandoned, label = True, "held"

        def __init__(self, number: int) -> None:
            self.key = number, 1

        def release(self) -> None:
            if self.key[0] == 1:
                raise FencedError("its own worker was faster")
            given_back.append(self.key)

    context = harness.registry._kser_operations._context
    held = [Held(1), Held(2)]
    for each in held:
        context.register_claim(each)
    with caplog.at_level(logging.WARNING, "kser"):
        harness.first.background_service.close()
    assert given_back == [(2, 1)]
    for each in held:
        context.release_claim(each)


def test_group_commit_continues_after_an_interrupted_follower() -> None:
    """durability rule 14: otherwise no thread would lead any more."""
    go, entered = threading.Event(), threading.Event()

    def run(entries: Any) -> None:
        if entries[0].item == "slow":
            entered.set()
            go.wait(WAIT_SECONDS)
        for entry in entries:
            entry.result = entry.item

    group: GroupCommit[str] = GroupCommit(run, 1)
    slow = threading.Thread(target=group.write, args=("slow",))
    slow.start()
    assert entered.wait(WAIT_SECONDS)

    def interrupt() -> None:
        wait_until(lambda: group._waiting)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        group.write("interrupted")
    go.set()
    slow.join()
    interrupter.join()
    assert (group.write("late"), list(group._waiting), group._leading) == ("late", [], 0)


def test_group_commit_lead_is_handed_over_by_an_interrupted_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 14"""

    def run(entries: Any) -> None:
        for entry in entries:
            entry.result = entry.item

    group: GroupCommit[str] = GroupCommit(run, 1)

    def stopped(own: PendingWrite[str]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(group, "_lead", stopped)
        with pytest.raises(KeyboardInterrupt):
            group.write("stopped")
    assert (group.write("late"), group._leading) == ("late", 0)
