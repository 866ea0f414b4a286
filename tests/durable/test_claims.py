"""Tests of claims: only the owner of a claim can record."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
from cdumay_result import Result

from kser.durable.context import DurabilitySettings
from kser.errors import SettingError, StoreUnavailable
from kser.retry import Retry
from kser.schemas import OPERATION_KEY, Message
from kser.sequencing.registry import OperationRegistry
from kser.status import FAILED, RUNNING, SUCCESS
from kser.store import retrying
from kser.store.base import Store
from kser.store.memory import MemoryStore
from kser.store.model import ClaimRefused, Mode
from tests.consumer.harness import Act, committed
from tests.durable.harness import BOTH_WAYS, TURN, Sale, Shop, Spread, bare, expire, meanwhile
from tests.store.harness import LEASE, me
from tests.support import lines


def retval(**values: Any) -> Result:
    """A successful result with something in it."""
    return Result(retval=values)


# -- one claim, the root's -----------------------------------------------------------------------------------------


@BOTH_WAYS
def test_running_operation_row_names_its_owner_and_lease(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 6"""
    seen: list[Any] = []
    Act.acts["1.b"] = lambda: seen.append(shop.stored().operation)
    bare(cls)
    shop.first.handle()
    (row,) = seen
    assert (row.status, row.step, row.owner) == (RUNNING, 1, shop.first.registry._kser_operations._context.owner)
    assert row.next_check_at - shop.world.now == pytest.approx(LEASE, abs=5)
    after = shop.stored().operation
    assert (after.owner, after.next_check_at) == (None, None)


def test_owner_differs_at_each_start_of_a_process(shop: Shop) -> None:
    """durability rule 6"""
    second = shop.process()
    assert second.registry._kser_operations._context.owner != shop.registry._kser_operations._context.owner


def test_message_of_a_launched_operation_follows_the_stored_mode(shop: Shop) -> None:
    """durability rule 6: a launched operation is distributed even if its class is not."""
    shop.first.known(Sale)("1").build().launch()
    bare(Sale)
    assert shop.first.step() == 2
    assert (shop.stored().operation.mode, Act.seen) == (Mode.DISTRIBUTED, ["1.a"])
    shop.first.handle()
    assert Act.seen == ["1.a", "1.b", "1.c"]


def test_task_message_of_a_local_operation_runs_nothing(shop: Shop) -> None:
    """durability rule 6"""
    shop.first.known(Sale)("1").build().send()
    result = shop.first.run(Message("1.b", Act.path, metadata={OPERATION_KEY: "1"}))
    assert (result.retcode, Act.seen, shop.stored().operation.mode) == (0, [], Mode.LOCAL)


# -- one compare-and-set -------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_claimed_operation_is_not_claimed_by_another_consumer(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 7"""
    second = shop.process(cls, group="second")
    Act.acts["1.b"] = meanwhile(second.handle)
    bare(cls)
    shop.first.handle()
    assert Act.seen == ["1.a", "1.b", "1.c"]
    claim = shop.store.claim("1", "1", me())
    assert isinstance(claim, ClaimRefused)


@BOTH_WAYS
def test_claim_of_a_dead_consumer_is_taken_over_after_lease_expiry(
    shop: Shop, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 7"""
    shop.first.known(cls)("1").build().send()
    shop.seize()
    shop.pass_by(LEASE - 5)
    shop.first.handle()
    assert (Act.seen, committed()) == ([], 1)
    assert f"{cls.path}[1]: nothing to do for this message: held, RUNNING" in lines(caplog, logging.INFO)
    shop.pass_by(6)
    again = shop.process(cls, group="again")
    again.handle()
    assert (shop.status(), Act.seen) == (SUCCESS, ["1.a", "1.b", "1.c"])


@BOTH_WAYS
def test_epoch_always_increases(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 7: not for another attempt, not for a resume."""
    seen: list[int] = []

    def look(then: BaseException | None = None) -> Any:
        def act() -> None:
            seen.append(shop.stored().operation.epoch)
            if then is not None:
                raise then

        return act

    Act.acts["1.b"] = [look(Retry.later(5)), look(ConnectionError("no")), look(), look()]
    bare(cls)
    shop.first.handle()
    shop.pass_by(6)
    shop.first.companion.reap()
    shop.first.handle()
    while shop.status() != FAILED:
        shop.pass_by(60)
        shop.first.companion.reap()
        shop.first.handle()
        Act.acts["1.b"] = look(ConnectionError("no"))
    Act.acts["1.b"] = look()
    operation = shop.registry.get("1")
    assert operation is not None
    operation.resume()
    shop.first.handle()
    assert shop.status() == SUCCESS
    assert seen == sorted(set(seen))
    assert shop.stored().operation.epoch > seen[-1]


# -- the fence -----------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_consumer_that_lost_its_claim_is_fenced(shop: Shop, cls: type[Sale], caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 8: its code ran, and the result of the later claim is the one that is kept."""
    second = shop.process(cls, group="second")

    def late() -> Result:
        meanwhile(lambda: shop.pass_by(expire()), second.handle)()
        return retval(by="the first")

    Act.acts["1.b"] = [late, lambda: retval(by="the second")]
    bare(cls)
    shop.first.handle()
    assert Act.seen == ["1.a", "1.b", "1.b", "1.c"]
    operation = shop.registry.get("1")
    assert operation is not None
    assert (operation.status, operation.result.retval) == (SUCCESS, {"by": "the second"})
    assert shop.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    (dropped,) = [line for line in lines(caplog, logging.WARNING) if "is dropped" in line]
    assert dropped.startswith(
        f"{cls.path}[1]: the outcome of its step is dropped: another consumer has claimed operation 1, or it has ended"
    )


@BOTH_WAYS
def test_consumer_that_lost_its_claim_neither_runs_nor_sends_the_next_step(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 8"""
    second = shop.process(cls, group="second")
    Act.acts["1.a"] = [meanwhile(lambda: shop.pass_by(expire()), second.step), None]
    bare(cls)
    if cls is Spread:
        # The first one only sends the task.
        shop.first.step()
    shop.first.step()
    if cls is Sale:
        assert Act.seen == ["1.a", "1.a", "1.b", "1.c"]
    else:
        assert (Act.seen, shop.stored().operation.step) == (["1.a", "1.a"], 1)
        shop.first.handle()
        assert Act.seen == ["1.a", "1.a", "1.b", "1.c"]
    assert Counter(kind for kind in shop.kinds() if kind == "task-succeeded") == {"task-succeeded": 3}


# -- the heartbeat -------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_heartbeat_renews_the_claim_while_its_task_runs(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 9"""
    second = shop.process(cls, group="second")

    def long() -> None:
        for _ in range(10):
            shop.pass_by(LEASE / 3)
            shop.first.companion.renew_leases()

    Act.acts["1.b"] = meanwhile(long, second.handle)
    bare(cls)
    shop.first.handle()
    assert Act.seen == ["1.a", "1.b", "1.c"]


def test_heartbeat_renews_only_active_claims(shop: Shop) -> None:
    """durability rule 9: a leaked claim would otherwise be renewed without end."""
    asked: list[Any] = []

    class Asked(Watching):
        def renew(self, claims: Any, owner: str, lease: float) -> Any:
            asked.append(sorted(claims))
            return self._store.renew(claims, owner, lease)

    process = shop.process(Sale, store=Asked(shop.store))
    Act.acts["1.b"] = meanwhile(process.companion.renew_leases)
    shop.first.send(Sale, "other")
    shop.seize("other")
    bare(Sale)
    process.companion.renew_leases()
    process.consumer.REGISTRY.run(Message("1", Sale.path).dumps())
    process.companion.renew_leases()
    row = shop.stored().operation
    assert asked == [[(row.id, 1)]]


def test_heartbeat_renews_the_claim_after_lease_expiry_without_another_owner(shop: Shop) -> None:
    """durability rule 9: a process that was stopped for long continues."""
    second = shop.process(Sale, group="second")
    Act.acts["1.b"] = meanwhile(
        lambda: shop.pass_by(5 * LEASE),
        shop.first.companion.renew_leases,
        lambda: shop.pass_by(LEASE - 5),
        second.handle,
    )
    bare(Sale)
    shop.first.handle()
    assert Act.seen == ["1.a", "1.b", "1.c"]


def test_lost_claim_is_logged_at_the_next_heartbeat(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 9"""
    second = shop.process(Sale, group="second")
    Act.acts["1.b"] = [
        meanwhile(lambda: shop.pass_by(expire()), second.handle, shop.first.companion.renew_leases),
        None,
    ]
    bare(Sale)
    shop.first.handle()
    assert f"{Sale.path}[1]: the claim was lost; the result of the running task will not be recorded" in lines(
        caplog, logging.WARNING
    )


@pytest.mark.parametrize(
    "end",
    [None, ConnectionError("no"), SystemExit(3), KeyboardInterrupt()],
    ids=["success", "failure", "SystemExit", "KeyboardInterrupt"],
)
@BOTH_WAYS
def test_every_outcome_releases_the_claim(shop: Shop, cls: type[Sale], end: BaseException | None) -> None:
    """durability rule 9"""
    Act.acts["1.b"] = end
    bare(cls)
    try:
        shop.first.handle()
    except KeyboardInterrupt:
        assert isinstance(end, KeyboardInterrupt)
    assert shop.registry._kser_operations._context.active_claims() == []
    assert shop.stored().operation.owner is None


def test_raising_prerun_hook_releases_the_claim(shop: Shop) -> None:
    """durability rule 9"""

    class Bad(Sale):
        def prerun(self) -> None:
            raise ConnectionError("no")

    shop.first.learn(Bad)
    bare(Bad)
    shop.first.handle()
    assert shop.registry._kser_operations._context.active_claims() == []
    assert Act.seen == []


# -- a COMMIT of unknown outcome -----------------------------------------------------------------------------------


class Watching:
    """A store that somebody looks over the shoulder of."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class Unsure(Watching):
    """A store whose answer to a call gets lost, the so-manieth one."""

    def __init__(self, store: Store, method: str, number: int, before: bool) -> None:
        super().__init__(store)
        self._left = {method: number}
        self._before = before

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in self._left:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left[name] -= 1
            if self._left[name] or not self._before:
                answer = found(*args, **kwargs)
            if not self._left[name]:
                raise StoreUnavailable("the connection broke")
            return answer

        return call


@pytest.mark.parametrize("before", [True, False], ids=["refused", "acknowledgement lost"])
@pytest.mark.parametrize(
    ("method", "number"), [("save", 1), ("claim", 1), ("claim", 2), *(("checkpoint", number) for number in range(1, 5))]
)
@BOTH_WAYS
def test_store_call_with_unknown_outcome_is_repeated_and_applied_once(
    shop: Shop, cls: type[Sale], method: str, number: int, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 10: the call is repeated with the same arguments and returns the same value."""
    monkeypatch.setattr(retrying, "_BACKOFF", lambda _failures: 0.01)
    process = shop.process(cls, store=Unsure(shop.store, method, number, before), group="unsure")
    bare(cls)
    process.handle()
    # One that was accepted without its consumer hearing of it is sent by a reaper.
    shop.live(TURN)
    process.handle()
    assert (shop.status(), shop.tasks(), Act.seen) == (SUCCESS, [SUCCESS] * 3, ["1.a", "1.b", "1.c"])
    assert shop.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert Counter(shop.kinds())["task-succeeded"] == 3
    assert Counter(shop.kinds())["claimed"] == (1 if cls is Sale else 3)


# -- time ----------------------------------------------------------------------------------------------------------


def test_fast_process_clock_causes_no_lease_expiry(shop: Shop) -> None:
    """durability rule 11: times are compared inside the store."""
    shop.first.send(Sale)
    shop.seize()
    fast = shop.process(Sale, group="fast")
    fast.clock.pass_by(100 * LEASE)
    fast.handle()
    assert Act.seen == []


def test_timestamps_come_from_the_store(shop: Shop) -> None:
    """durability rule 11"""
    shop.world.pass_by(1_000_000)
    bare(Sale)
    shop.first.handle()
    row, _, attempts, events, _ = shop.stored()
    times = [row.created_at, row.started_at, row.ended_at, *(each.ended_at for each in attempts)]
    for at in [*times, *(event.at for event in events)]:
        assert at == pytest.approx(shop.world.now, abs=30)


@BOTH_WAYS
def test_operation_continues_within_five_seconds_of_lease_expiry(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 12"""
    shop.first.known(cls)("1").build().send()
    shop.first.consumer._kser_work_queue.pause(True)
    shop.live(2 * LEASE)
    shop.seize()
    shop.live(LEASE + 5 - TURN)
    assert shop.kinds().count("sent-again") >= 1
    shop.first.consumer._kser_work_queue.pause(False)
    shop.first.handle()
    assert shop.status() == SUCCESS


def test_durability_settings_have_defaults_and_are_configurable(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 12"""
    terms = DurabilitySettings(shop.registry.settings)
    assert (terms.lease, terms.heartbeat, terms.reaper, terms.resend, terms.max_claims) == (30, 10, 1, 60, 20)
    for name, value in {"LEASE": "60", "REAPER": "0.5", "RESEND": "90", "MAX_CLAIMS": "3"}.items():
        monkeypatch.setenv(f"KSER_{name}", value)
    terms = DurabilitySettings(shop.registry.settings)
    assert (terms.lease, terms.heartbeat, terms.reaper, terms.resend, terms.max_claims) == (60, 20, 0.5, 90, 3)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("KSER_LEASE", "soon", "KSER_LEASE must be a number above 0; it is 'soon'"),
        ("KSER_LEASE", "0", "KSER_LEASE must be a number above 0; it is '0'"),
        ("KSER_RESEND", "-1", "KSER_RESEND must be a number above 0; it is '-1'"),
        ("KSER_HEARTBEAT", "15", r"KSER_HEARTBEAT must be less than half of KSER_LEASE \(30 s\); it is 15 s"),
        ("KSER_MAX_CLAIMS", "nan", "KSER_MAX_CLAIMS must be a whole number above 0; it is 'nan'"),
        ("KSER_MAX_CLAIMS", "0.5", "KSER_MAX_CLAIMS must be a whole number above 0; it is '0.5'"),
    ],
)
def test_invalid_durability_settings_are_rejected_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    """durability rule 12"""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=text):
        _ = OperationRegistry(store=MemoryStore())._kser_background_service
