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
from tests.consumer.harness import PATIENCE, Act, until
from tests.durable.harness import BOTH_WAYS, TURN, Sale, Shop, Spread, bare, sent
from tests.store.harness import LEASE


class Broken(Producer):
    """A producer of somebody else's, which raises what nobody expects."""

    def send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
        raise RuntimeError("somebody else's producer")


@BOTH_WAYS
def test_poison_message_with_a_pending_cancel_is_cancelled_and_not_run_again(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 24: the task that killed its consumer must not kill the next one."""
    operation = shop.first.known(cls)("1").build().send()
    shop.seize()
    assert operation.cancel("it kills") == RUNNING
    shop.live(LEASE + 2 * TURN)
    shop.first.handle()
    assert (shop.stored().operation.status, Act.seen) == (CANCELLED, [])


def test_raising_producer_after_a_checkpoint_fails_no_step(shop: Shop) -> None:
    """durability rule 8: the claim was released, so nothing more is recorded under it."""
    shop.first.known(Spread)("1").build().launch()
    good, shop.registry._kser_producer = shop.registry._kser_producer, Broken({})
    shop.first.step()
    assert (shop.stored().operation.status, shop.stored().operation.step, Act.seen) == (RUNNING, 1, ["1.a"])
    shop.registry._kser_producer = good
    shop.live(2 * TURN)
    shop.first.handle()
    assert shop.stored().operation.status == SUCCESS


class Exits(Task):
    """Fails, and its hook ends the process, or so it believes."""

    runs: ClassVar[int] = 0

    def run(self) -> None:
        Exits.runs += 1
        raise ValueError("no")

    def onerror(self, result: Result) -> Any:
        raise SystemExit(3)


@pytest.mark.parametrize("distributed", [False, True], ids=["in one consumer", "over the consumers"])
def test_hook_that_raises_system_exit_fails_its_step_once(shop: Shop, distributed: bool) -> None:
    """durability rule 22: the same exit would otherwise recur at once, without end."""
    exits = shop.first.learn(Exits)

    class Ends(Operation):
        DISTRIBUTED = distributed

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [exits(f"{self.uuid}.x")]

    before = Exits.runs
    bare(shop.registry.subscribe(Ends))
    shop.first.handle()
    assert (shop.stored().operation.status, Exits.runs - before) == (FAILED, 1)


def test_missing_topics_delay_neither_the_heartbeat_nor_other_operations(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rules 9, 12 and 20."""

    class Slow(Producer):
        def send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
            if topic.startswith("gone"):
                shop.pass_by(timeout)
                return Result(uuid=kmsg.uuid, retcode=500, stderr="there is no such topic")
            return super().send(topic, kmsg, timeout, **options)

    shop.registry._kser_producer = Slow({})
    shop.first.known(Sale)("dead").build().send()
    InMemoryBroker.at("").topics["dice"][0].clear()
    shop.seize("dead")
    for number in range(6):
        shop.first.known(Sale)(f"lost {number}").build().send(topic=f"gone {number}")
    companion, beats, began = shop.first.companion, [0.0], shop.world.now
    beat = companion.renew_leases

    def noted() -> None:
        beats.append(shop.world.now - began)
        beat()

    noted.__name__ = "beat"
    monkeypatch.setattr(companion, "renew_leases", noted)
    while shop.world.now - began < 600:
        companion.tick()
        shop.pass_by(0.5)
    assert max(later - earlier for earlier, later in itertools.pairwise(beats)) < LEASE * 2 / 3
    assert shop.stored("dead").operation.owner is None
    assert len(shop.stored("lost 0").events) < 40


def test_attempt_that_timed_out_while_building_does_not_accept_the_operation(shop: Shop) -> None:
    """durability rules 2 and 28: the attempt was already reported as failed."""
    consumer = shop.first.consumer
    gates: list[Any] = []

    class Long(Operation):
        TIME_LIMIT = 5

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if gates:
                gates.pop()()
            return [Act(f"{self.uuid}.a")]

    def gate() -> None:
        shop.first.clock.pass_by(6)
        consumer._kser_worker_pool.enforce_time_limits()
        until(lambda: consumer.counts.get("failed"))

    gates.append(gate)
    bare(shop.registry.subscribe(Long))
    consumer.step(timeout=0)
    assert (shop.store.get_operation("1"), Act.seen) == (None, [])
    consumer._kser_worker_pool.shutdown()


def test_task_that_ends_at_its_time_limit_does_not_time_out_the_next_one(shop: Shop) -> None:
    """durability rule 28: the supervisor had read the time of the task before."""
    dispatch = shop.first.consumer._kser_work_queue
    looked: list[Any] = []
    found: list[bool] = []

    class Two(Operation):
        TIME_LIMIT = 5

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Act(f"{self.uuid}.a"), Act(f"{self.uuid}.b")]

    def first() -> None:
        (item,) = dispatch.running()
        looked.extend((item, item.attempt.outcome))
        shop.first.clock.pass_by(5.1)

    Act.acts["1.a"] = first
    Act.acts["1.b"] = lambda: found.append(dispatch.time_out(looked[0], TaskTimeout("too long"), looked[1]))
    bare(shop.registry.subscribe(Two))
    shop.first.handle()
    assert (found, shop.stored().operation.status, len(shop.stored().attempts)) == ([False], SUCCESS, 2)


def test_resume_in_a_process_without_a_consumer_sends_once(shop: Shop) -> None:
    """durability rules 15 and 25."""
    Act.acts["1.b"] = [ValueError("no"), None]
    bare(Sale)
    shop.first.handle()
    web = shop.process(Sale)
    found = web.registry.get("1")
    assert found is not None
    found.resume()
    before = len(sent())
    shop.live(2 * TURN)
    assert (len(sent()), shop.stored().operation.send_count) == (before, 1)


def test_wait_survives_a_database_outage(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 33"""
    bare(Sale)
    shop.first.handle()
    found = shop.registry.get("1")
    assert found is not None
    peek, asked = shop.store.get_operation, []

    def away(uuid: str) -> Any:
        asked.append(uuid)
        if len(asked) < 8:
            raise StoreUnavailable("the database restarts")
        return peek(uuid)

    monkeypatch.setattr(shop.store, "get_operation", away)
    assert found.wait(timeout=PATIENCE).retcode == 0


def test_claim_that_cannot_be_released_does_not_affect_the_others(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
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

    context = shop.registry._kser_operations._context
    held = [Held(1), Held(2)]
    for each in held:
        context.register_claim(each)
    with caplog.at_level(logging.WARNING, "kser"):
        shop.first.companion.close()
    assert given_back == [(2, 1)]
    for each in held:
        context.release_claim(each)


def test_group_commit_continues_after_an_interrupted_follower() -> None:
    """durability rule 14: otherwise no thread would lead any more."""
    go, entered = threading.Event(), threading.Event()

    def run(entries: Any) -> None:
        if entries[0].item == "slow":
            entered.set()
            go.wait(PATIENCE)
        for entry in entries:
            entry.result = entry.item

    group: GroupCommit[str] = GroupCommit(run, 1)
    slow = threading.Thread(target=group.write, args=("slow",))
    slow.start()
    assert entered.wait(PATIENCE)

    def interrupt() -> None:
        until(lambda: group._waiting)
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
