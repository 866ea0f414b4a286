"""Tests of nested stored operations: the root alone is claimed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.errors import StateConflict, UsageError
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import CANCELLED, FAILED, PENDING, RUNNING, SUCCESS
from kser.store.base import Store
from kser.store.model import Checkpoint
from tests.consumer.harness import Act
from tests.durable.harness import Shop, bare, expire, meanwhile


class Innermost(Operation):
    """One task."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Act(f"{self.uuid}.leaf")]


class Inner(Operation):
    """A task, an operation and a task."""

    told: ClassVar[list[Any]] = []

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Act(f"{self.uuid}.x"), Innermost(f"{self.uuid}.deep"), Act(f"{self.uuid}.y")]


class Outer(Operation):
    """Likewise, with :class:`Inner` in the middle."""

    inner: ClassVar[type[Operation]] = Inner

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Act(f"{self.uuid}.a"), self.inner(f"{self.uuid}.in"), Act(f"{self.uuid}.z")]


class OuterSpread(Outer):
    DISTRIBUTED = True


class HookedInner(Inner):
    """Tells of its end."""

    def onsuccess(self, result: Result) -> Result:
        self.told.append(("onsuccess", self.uuid))
        return Result(uuid=self.uuid, retval={"inner": "made by its hook"})

    def onerror(self, result: Result) -> Result:
        self.told.append(("onerror", self.uuid))
        return result


BOTH = pytest.mark.parametrize("cls", [Outer, OuterSpread])
BUILT = pytest.mark.parametrize("built", [True, False], ids=["built before", "built on the way"])

ORDER = ["1.a", "1.in.x", "1.in.deep.leaf", "1.in.y", "1.z"]


@pytest.fixture(autouse=True)
def learn(shop: Shop) -> Iterator[None]:
    for cls in (Innermost, Inner, HookedInner, Outer, OuterSpread):
        shop.first.learn(cls)
    yield
    Inner.told.clear()


def begin(shop: Shop, cls: type[Outer], built: bool) -> Any:
    """Send it, with the operations inside it built already or not."""
    operation = shop.first.known(cls)("1").build()
    if built:
        operation.tasks[1].build()
        operation.tasks[1].tasks[1].build()
    return operation.send()


@BOTH
@BUILT
def test_nested_tasks_run_in_order_and_all_levels_end(shop: Shop, cls: type[Outer], built: bool) -> None:
    """durability rule 31"""
    begin(shop, cls, built)
    shop.first.handle()
    assert Act.seen == ORDER
    assert [shop.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [SUCCESS] * 3
    assert shop.tasks("1") == shop.tasks("1.in") == [SUCCESS] * 3


@BOTH
@BUILT
def test_results_accumulate_through_the_levels_as_in_memory(shop: Shop, cls: type[Outer], built: bool) -> None:
    """durability rule 31"""
    for at, uuid in enumerate(ORDER):
        Act.acts[uuid] = (lambda n: lambda: Result(retval={f"n{n}": n}, stdout=f"{n}"))(at)
    expected = cls("1").execute()
    Act.seen.clear()
    begin(shop, cls, built)
    shop.first.handle()
    operation = shop.registry.get("1")
    assert operation is not None
    assert operation.result.retval == expected.retval == {f"n{n}": n for n in range(5)}
    assert operation.result.retcode == 0


@BOTH
def test_claim_belongs_to_the_root_alone(shop: Shop, cls: type[Outer]) -> None:
    """durability rule 31"""
    seen: list[Any] = []

    def look() -> None:
        root, inner, deep = (shop.stored(uuid).operation for uuid in ("1", "1.in", "1.in.deep"))
        seen.append((root.owner is not None, inner.owner, deep.owner, inner.next_check_at, deep.next_check_at))
        assert (root.parent_id, inner.parent_id, deep.parent_id) == (None, root.id, inner.id)
        assert {root.root_id, inner.root_id, deep.root_id} == {root.id}

    Act.acts["1.in.deep.leaf"] = look
    begin(shop, cls, True)
    shop.first.handle()
    assert seen == [(True, None, None, None, None)]


class Counting:
    """A store that keeps the checkpoints."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.checkpoints: list[Checkpoint] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        self.checkpoints.append(checkpoint)
        return self._store.checkpoint(checkpoint)


def test_nested_end_and_outer_step_are_recorded_in_one_transaction(shop: Shop) -> None:
    """durability rule 31: up to the root."""

    class Short(Outer):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Shorter("1.in")]

    class Shorter(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Innermost("1.in.deep")]

    store = Counting(shop.store)
    process = shop.process(Short, Shorter, Innermost, store=store, group="counting")
    bare(Short)
    process.handle()
    last = store.checkpoints[-1]
    assert [move.status for move in last.updates] == [SUCCESS] * 3
    assert len(last.outcomes) == 3
    assert shop.status() == SUCCESS


@BOTH
@BUILT
def test_nested_failure_fails_every_level_and_resume_continues_at_the_leaf(
    shop: Shop, cls: type[Outer], built: bool
) -> None:
    """durability rule 31"""
    Act.acts["1.in.deep.leaf"] = [ConnectionError("no"), None]
    begin(shop, cls, built)
    shop.first.handle()
    assert [shop.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [FAILED] * 3
    operation = shop.registry.get("1")
    assert operation is not None
    assert "no" in operation.result.stderr
    operation.resume()
    assert [shop.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [RUNNING] * 3
    shop.first.handle()
    assert shop.status() == SUCCESS
    assert Act.seen == [*ORDER[:3], *ORDER[2:]]


@BOTH
def test_cancel_of_the_root_cancels_unfinished_nested_operations(shop: Shop, cls: type[Outer]) -> None:
    """durability rule 31"""
    Act.acts["1.in.deep.leaf"] = meanwhile(lambda: shop.store.cancel("1", "enough"))
    begin(shop, cls, True)
    shop.first.handle()
    assert (shop.status(), shop.status("1.in")) == (CANCELLED, CANCELLED)
    assert Act.seen == ORDER[:3]
    Act.acts.clear()
    operation = shop.registry.get("1")
    assert operation is not None
    operation.resume()
    shop.first.handle()
    assert (shop.status(), Act.seen) == (SUCCESS, ORDER)


@pytest.mark.parametrize("what", ["cancel", "resume", "wait"])
def test_nested_operation_is_cancelled_and_resumed_only_through_its_root(shop: Shop, what: str) -> None:
    """durability rule 31"""
    begin(shop, Outer, True)
    inner = shop.registry.get("1.in")
    assert inner is not None
    assert [task.uuid for task in inner.tasks] == ["1.in.x", "1.in.deep", "1.in.y"]
    if what == "wait":
        shop.first.handle()
        assert inner.wait(1).retcode == 0
        return
    with pytest.raises(UsageError, match="is nested in another operation"):
        getattr(inner, what)()


def test_message_of_a_nested_operation_is_rejected(shop: Shop) -> None:
    """durability rules 3 and 31: its uuid is taken."""
    begin(shop, Outer, True)
    before = shop.stored("1.in")
    bare(Inner, uuid="1.in")
    shop.first.step()
    assert shop.first.consumer.counts["failed"] == 1
    assert shop.stored("1.in").operation.params == before.operation.params
    with pytest.raises(StateConflict, match="is the uuid of a nested operation"):
        shop.first.known(Inner)("1.in").build().send()


def test_find_returns_roots_unless_a_parent_is_given(shop: Shop) -> None:
    """durability rule 31"""
    begin(shop, Outer, True)
    assert [operation.uuid for operation in shop.registry.find()] == ["1"]
    assert [operation.uuid for operation in shop.registry.find(parent="1")] == ["1.in"]
    assert [operation.uuid for operation in shop.registry.find(parent="1.in")] == ["1.in.deep"]
    assert shop.registry.find(parent="1.in.deep") == []


@pytest.mark.parametrize("distributed", [True, False])
def test_hooks_of_a_nested_operation_are_called_and_their_value_is_stored(shop: Shop, distributed: bool) -> None:
    """durability rules 23 and 31"""

    class Mine(Outer):
        DISTRIBUTED = distributed
        inner = HookedInner

    shop.first.learn(Mine)
    bare(Mine)
    shop.first.handle()
    assert Inner.told == [("onsuccess", "1.in")]
    operation = shop.registry.get("1")
    assert operation is not None
    assert operation.result.retval["inner"] == "made by its hook"
    assert operation.status == SUCCESS


@BOTH
def test_nested_operation_continues_at_its_step_after_owner_crash(shop: Shop, cls: type[Outer]) -> None:
    """durability rule 31: not from the beginning of the inner operation."""
    second = shop.process(Innermost, Inner, HookedInner, Outer, OuterSpread, group="second")
    Act.acts["1.in.y"] = [meanwhile(lambda: shop.pass_by(expire()), second.handle), None]
    begin(shop, cls, False)
    shop.first.handle()
    assert Act.seen == [*ORDER[:4], *ORDER[3:]]
    assert shop.status() == SUCCESS
    assert shop.attempts("1.in") == [(0, 1, SUCCESS), (2, 1, SUCCESS)]


@BOTH
def test_nested_retry_waits_and_continues_at_its_step(shop: Shop, cls: type[Outer]) -> None:
    """durability rules 27 and 31"""
    Act.acts["1.in.deep.leaf"] = [Retry.later(10), None]
    begin(shop, cls, False)
    shop.first.handle()
    assert (shop.stored().operation.owner, shop.status("1.in.deep")) == (None, RUNNING)
    shop.pass_by(11)
    shop.first.companion.reap()
    shop.first.handle()
    assert Act.seen == [*ORDER[:3], *ORDER[2:]]
    assert shop.attempts("1.in.deep") == [(0, 1, FAILED), (0, 2, SUCCESS)]


@BOTH
def test_resume_builds_a_nested_operation_whose_build_failed(shop: Shop, cls: type[Outer]) -> None:
    """durability rules 25 and 31"""

    class Moody(Inner):
        fails: ClassVar[bool] = True

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if self.fails:
                raise ConnectionError("no catalogue")
            return super().build_tasks(**kwargs)

    class Mine(cls):  # type: ignore[valid-type,misc]
        inner = Moody

    shop.first.learn(Moody)
    shop.first.learn(Mine)
    bare(Mine)
    shop.first.handle()
    assert (shop.status(), shop.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
    Moody.fails = False
    operation = shop.registry.get("1")
    assert operation is not None
    operation.resume()
    shop.first.handle()
    assert (shop.status(), Act.seen) == (SUCCESS, ORDER)


def test_nested_operation_without_tasks_succeeds(shop: Shop) -> None:
    class Nothing(Operation):
        pass

    class Mine(Outer):
        inner = Nothing

    shop.first.learn(Nothing)
    shop.first.learn(Mine)
    bare(Mine)
    shop.first.handle()
    assert (shop.status(), Act.seen) == (SUCCESS, ["1.a", "1.z"])
