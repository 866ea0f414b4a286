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
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import LEASE_EXPIRED, DurableHarness, in_other_thread, send_raw_message


class Innermost(Operation):
    """One task."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask(f"{self.uuid}.leaf")]


class Inner(Operation):
    """A task, an operation and a task."""

    told: ClassVar[list[Any]] = []

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask(f"{self.uuid}.x"), Innermost(f"{self.uuid}.deep"), ScriptedTask(f"{self.uuid}.y")]


class Outer(Operation):
    """Likewise, with :class:`Inner` in the middle."""

    inner: ClassVar[type[Operation]] = Inner

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask(f"{self.uuid}.a"), self.inner(f"{self.uuid}.in"), ScriptedTask(f"{self.uuid}.z")]


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
def learn(harness: DurableHarness) -> Iterator[None]:
    for cls in (Innermost, Inner, HookedInner, Outer, OuterSpread):
        harness.first.subscribe_copy(cls)
    yield
    Inner.told.clear()


def begin(harness: DurableHarness, cls: type[Outer], built: bool) -> Any:
    """Send it, with the operations inside it built already or not."""
    operation = harness.first.class_of(cls)("1").build()
    if built:
        operation.tasks[1].build()
        operation.tasks[1].tasks[1].build()
    return operation.send()


@BOTH
@BUILT
def test_nested_tasks_run_in_order_and_all_levels_end(harness: DurableHarness, cls: type[Outer], built: bool) -> None:
    """durability rule 31"""
    begin(harness, cls, built)
    harness.first.handle()
    assert ScriptedTask.ran == ORDER
    assert [harness.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [SUCCESS] * 3
    assert harness.tasks("1") == harness.tasks("1.in") == [SUCCESS] * 3


@BOTH
@BUILT
def test_results_accumulate_through_the_levels_as_in_memory(
    harness: DurableHarness, cls: type[Outer], built: bool
) -> None:
    """durability rule 31"""
    for at, uuid in enumerate(ORDER):
        ScriptedTask.script[uuid] = (lambda n: lambda: Result(retval={f"n{n}": n}, stdout=f"{n}"))(at)
    expected = cls("1").execute()
    ScriptedTask.ran.clear()
    begin(harness, cls, built)
    harness.first.handle()
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.result.retval == expected.retval == {f"n{n}": n for n in range(5)}
    assert operation.result.retcode == 0


@BOTH
def test_claim_belongs_to_the_root_alone(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rule 31"""
    seen: list[Any] = []

    def look() -> None:
        root, inner, deep = (harness.stored(uuid).operation for uuid in ("1", "1.in", "1.in.deep"))
        seen.append((root.owner is not None, inner.owner, deep.owner, inner.next_check_at, deep.next_check_at))
        assert (root.parent_id, inner.parent_id, deep.parent_id) == (None, root.id, inner.id)
        assert {root.root_id, inner.root_id, deep.root_id} == {root.id}

    ScriptedTask.script["1.in.deep.leaf"] = look
    begin(harness, cls, True)
    harness.first.handle()
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


def test_nested_end_and_outer_step_are_recorded_in_one_transaction(harness: DurableHarness) -> None:
    """durability rule 31: up to the root."""

    class Short(Outer):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Shorter("1.in")]

    class Shorter(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Innermost("1.in.deep")]

    store = Counting(harness.store)
    process = harness.process(Short, Shorter, Innermost, store=store, group="counting")
    send_raw_message(Short)
    process.handle()
    last = store.checkpoints[-1]
    assert [move.status for move in last.updates] == [SUCCESS] * 3
    assert len(last.outcomes) == 3
    assert harness.status() == SUCCESS


@BOTH
@BUILT
def test_nested_failure_fails_every_level_and_resume_continues_at_the_leaf(
    harness: DurableHarness, cls: type[Outer], built: bool
) -> None:
    """durability rule 31"""
    ScriptedTask.script["1.in.deep.leaf"] = [ConnectionError("no"), None]
    begin(harness, cls, built)
    harness.first.handle()
    assert [harness.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [FAILED] * 3
    operation = harness.registry.get("1")
    assert operation is not None
    assert "no" in operation.result.stderr
    operation.resume()
    assert [harness.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [RUNNING] * 3
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert ScriptedTask.ran == [*ORDER[:3], *ORDER[2:]]


@BOTH
def test_cancel_of_the_root_cancels_unfinished_nested_operations(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rule 31"""
    ScriptedTask.script["1.in.deep.leaf"] = in_other_thread(lambda: harness.store.cancel("1", "enough"))
    begin(harness, cls, True)
    harness.first.handle()
    assert (harness.status(), harness.status("1.in")) == (CANCELLED, CANCELLED)
    assert ScriptedTask.ran == ORDER[:3]
    ScriptedTask.script.clear()
    operation = harness.registry.get("1")
    assert operation is not None
    operation.resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)


@pytest.mark.parametrize("what", ["cancel", "resume", "wait"])
def test_nested_operation_is_cancelled_and_resumed_only_through_its_root(harness: DurableHarness, what: str) -> None:
    """durability rule 31"""
    begin(harness, Outer, True)
    inner = harness.registry.get("1.in")
    assert inner is not None
    assert [task.uuid for task in inner.tasks] == ["1.in.x", "1.in.deep", "1.in.y"]
    if what == "wait":
        harness.first.handle()
        assert inner.wait(1).retcode == 0
        return
    with pytest.raises(UsageError, match="is nested in another operation"):
        getattr(inner, what)()


def test_message_of_a_nested_operation_is_rejected(harness: DurableHarness) -> None:
    """durability rules 3 and 31: its uuid is taken."""
    begin(harness, Outer, True)
    before = harness.stored("1.in")
    send_raw_message(Inner, uuid="1.in")
    harness.first.step()
    assert harness.first.consumer.counts["failed"] == 1
    assert harness.stored("1.in").operation.params == before.operation.params
    with pytest.raises(StateConflict, match="is the uuid of a nested operation"):
        harness.first.class_of(Inner)("1.in").build().send()


def test_find_returns_roots_unless_a_parent_is_given(harness: DurableHarness) -> None:
    """durability rule 31"""
    begin(harness, Outer, True)
    assert [operation.uuid for operation in harness.registry.find()] == ["1"]
    assert [operation.uuid for operation in harness.registry.find(parent="1")] == ["1.in"]
    assert [operation.uuid for operation in harness.registry.find(parent="1.in")] == ["1.in.deep"]
    assert harness.registry.find(parent="1.in.deep") == []


@pytest.mark.parametrize("distributed", [True, False])
def test_hooks_of_a_nested_operation_are_called_and_their_value_is_stored(
    harness: DurableHarness, distributed: bool
) -> None:
    """durability rules 23 and 31"""

    class Mine(Outer):
        DISTRIBUTED = distributed
        inner = HookedInner

    harness.first.subscribe_copy(Mine)
    send_raw_message(Mine)
    harness.first.handle()
    assert Inner.told == [("onsuccess", "1.in")]
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.result.retval["inner"] == "made by its hook"
    assert operation.status == SUCCESS


@BOTH
def test_nested_operation_continues_at_its_step_after_owner_crash(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rule 31: not from the beginning of the inner operation."""
    second = harness.process(Innermost, Inner, HookedInner, Outer, OuterSpread, group="second")
    ScriptedTask.script["1.in.y"] = [in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle), None]
    begin(harness, cls, False)
    harness.first.handle()
    assert ScriptedTask.ran == [*ORDER[:4], *ORDER[3:]]
    assert harness.status() == SUCCESS
    assert harness.attempts("1.in") == [(0, 1, SUCCESS), (2, 1, SUCCESS)]


@BOTH
def test_nested_retry_waits_and_continues_at_its_step(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rules 27 and 31"""
    ScriptedTask.script["1.in.deep.leaf"] = [Retry.later(10), None]
    begin(harness, cls, False)
    harness.first.handle()
    assert (harness.stored().operation.owner, harness.status("1.in.deep")) == (None, RUNNING)
    harness.advance(11)
    harness.first.background_service.reap()
    harness.first.handle()
    assert ScriptedTask.ran == [*ORDER[:3], *ORDER[2:]]
    assert harness.attempts("1.in.deep") == [(0, 1, FAILED), (0, 2, SUCCESS)]


@BOTH
def test_resume_builds_a_nested_operation_whose_build_failed(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rules 25 and 31"""

    class Moody(Inner):
        fails: ClassVar[bool] = True

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if self.fails:
                raise ConnectionError("no catalogue")
            return super().build_tasks(**kwargs)

    class Mine(cls):  # type: ignore[valid-type,misc]
        inner = Moody

    harness.first.subscribe_copy(Moody)
    harness.first.subscribe_copy(Mine)
    send_raw_message(Mine)
    harness.first.handle()
    assert (harness.status(), harness.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
    Moody.fails = False
    operation = harness.registry.get("1")
    assert operation is not None
    operation.resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)


def test_nested_operation_without_tasks_succeeds(harness: DurableHarness) -> None:
    class Nothing(Operation):
        pass

    class Mine(Outer):
        inner = Nothing

    harness.first.subscribe_copy(Nothing)
    harness.first.subscribe_copy(Mine)
    send_raw_message(Mine)
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.z"])
