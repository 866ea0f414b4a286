"""Tests of nested stored operations: only the root is claimed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.errors import StateConflict, UsageError
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import CANCELLED, FAILED, PENDING, RUNNING, SUCCESS
from kser.store.base import Store
from kser.store.model import Checkpoint, OperationRow
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import LEASE_EXPIRED, MODES, DurableHarness, WrappedStore, in_other_thread, send_raw_message


class Innermost(Operation):
    """An operation of one task."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask(f"{self.uuid}.leaf")]


class Inner(Operation):
    """An operation of a task, an operation and a task."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask(f"{self.uuid}.x"), Innermost(f"{self.uuid}.deep"), ScriptedTask(f"{self.uuid}.y")]


class Outer(Operation):
    """An operation of a task, :class:`Inner` and a task."""

    inner: ClassVar[type[Operation]] = Inner

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask(f"{self.uuid}.a"), self.inner(f"{self.uuid}.in"), ScriptedTask(f"{self.uuid}.z")]


class DistributedOuter(Outer):
    DISTRIBUTED = True


class HookedInner(Inner):
    """An inner operation whose end hooks record their calls."""

    hook_calls: ClassVar[list[tuple[str, str]]] = []

    def onsuccess(self, result: Result) -> Result:
        self.hook_calls.append(("onsuccess", self.uuid))
        return Result(uuid=self.uuid, retval={"inner": "value of the hook"})

    def onerror(self, result: Result) -> Result:
        self.hook_calls.append(("onerror", self.uuid))
        return result


BOTH_OUTER = pytest.mark.parametrize("cls", [Outer, DistributedOuter], ids=MODES)
BUILT = pytest.mark.parametrize("built", [True, False], ids=["built by the sender", "built by the consumer"])

#: The tasks of :class:`Outer` in the order of their runs.
ORDER = ["1.a", "1.in.x", "1.in.deep.leaf", "1.in.y", "1.z"]


@pytest.fixture(autouse=True)
def nested_classes(harness: DurableHarness) -> Iterator[None]:
    """Subscribe the classes in the first process, and reset the hook calls after the test."""
    for cls in (Innermost, Inner, HookedInner, Outer, DistributedOuter):
        harness.first.subscribe_copy(cls)
    yield
    HookedInner.hook_calls.clear()


def send_outer(harness: DurableHarness, cls: type[Outer], built: bool) -> Any:
    """Send an outer operation, whose nested operations are built or not."""
    operation = harness.first.class_of(cls)("1").build()
    if built:
        operation.tasks[1].build()
        operation.tasks[1].tasks[1].build()
    return operation.send()


@BOTH_OUTER
@BUILT
def test_nested_tasks_run_in_order_and_all_levels_end(harness: DurableHarness, cls: type[Outer], built: bool) -> None:
    """durability rule 31"""
    send_outer(harness, cls, built)
    harness.first.handle()
    assert ScriptedTask.ran == ORDER
    assert [harness.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [SUCCESS] * 3
    assert harness.task_statuses("1") == harness.task_statuses("1.in") == [SUCCESS] * 3


@BOTH_OUTER
@BUILT
def test_results_accumulate_through_the_levels_as_in_memory(
    harness: DurableHarness, cls: type[Outer], built: bool
) -> None:
    """durability rule 31"""
    for number, uuid in enumerate(ORDER):
        result = Result(retval={f"n{number}": number}, stdout=f"{number}")
        ScriptedTask.script[uuid] = [partial(copy.deepcopy, result)] * 2
    expected = cls("1").execute()
    ScriptedTask.ran.clear()
    send_outer(harness, cls, built)
    harness.first.handle()
    result = harness.operation().result
    assert result.retval == expected.retval == {f"n{number}": number for number in range(5)}
    assert (result.stdout, result.retcode) == (expected.stdout, 0)


@BOTH_OUTER
def test_only_the_root_operation_is_claimed(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rule 31"""
    rows: list[OperationRow] = []

    def look() -> None:
        rows.extend(harness.snapshot(uuid).operation for uuid in ("1", "1.in", "1.in.deep"))

    ScriptedTask.script["1.in.deep.leaf"] = look
    send_outer(harness, cls, True)
    harness.first.handle()
    root, inner, deep = rows
    assert (root.parent_id, inner.parent_id, deep.parent_id) == (None, root.id, inner.id)
    assert {row.root_id for row in rows} == {root.id}
    assert root.owner is not None
    assert (inner.owner, inner.take_at) == (deep.owner, deep.take_at) == (None, None)


class CheckpointStore(WrappedStore):
    """A store that records its checkpoints."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.checkpoints: list[Checkpoint] = []

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        self.checkpoints.append(checkpoint)
        return self._store.checkpoint(checkpoint)


def test_nested_end_and_outer_step_are_recorded_in_one_transaction(harness: DurableHarness) -> None:
    """durability rule 31: one checkpoint ends all levels up to the root."""

    class OuterOfOne(Outer):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [InnerOfOne("1.in")]

    class InnerOfOne(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Innermost("1.in.deep")]

    store = CheckpointStore(harness.store)
    process = harness.start_process(OuterOfOne, InnerOfOne, Innermost, store=store, group="second")
    send_raw_message(OuterOfOne)
    process.handle()
    last = store.checkpoints[-1]
    assert [update.status for update in last.updates] == [SUCCESS] * 3
    assert len(last.outcomes) == 3
    assert harness.status() == SUCCESS


@BOTH_OUTER
@BUILT
def test_nested_failure_fails_every_level_and_resume_continues_at_the_leaf(
    harness: DurableHarness, cls: type[Outer], built: bool
) -> None:
    """durability rule 31"""
    ScriptedTask.script["1.in.deep.leaf"] = [ConnectionError("no"), None]
    send_outer(harness, cls, built)
    harness.first.handle()
    assert [harness.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [FAILED] * 3
    operation = harness.operation()
    assert "no" in operation.result.stderr
    operation.resume()
    assert [harness.status(uuid) for uuid in ("1", "1.in", "1.in.deep")] == [RUNNING] * 3
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert ScriptedTask.ran == [*ORDER[:3], *ORDER[2:]]


@BOTH_OUTER
def test_cancel_of_the_root_cancels_unfinished_nested_operations(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rule 31"""
    ScriptedTask.script["1.in.deep.leaf"] = in_other_thread(lambda: harness.store.cancel("1", "enough"))
    send_outer(harness, cls, True)
    harness.first.handle()
    assert (harness.status(), harness.status("1.in")) == (CANCELLED, CANCELLED)
    assert ScriptedTask.ran == ORDER[:3]
    ScriptedTask.script.clear()
    harness.operation().resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)


@pytest.mark.parametrize("method", ["cancel", "resume"])
def test_nested_operation_is_cancelled_and_resumed_only_through_its_root(harness: DurableHarness, method: str) -> None:
    """durability rule 31"""
    send_outer(harness, Outer, True)
    with pytest.raises(UsageError, match="is nested in another operation"):
        getattr(harness.operation("1.in"), method)()


def test_nested_operation_can_be_loaded_and_awaited(harness: DurableHarness) -> None:
    """durability rule 31"""
    send_outer(harness, Outer, True)
    inner = harness.operation("1.in")
    assert [task.uuid for task in inner.tasks] == ["1.in.x", "1.in.deep", "1.in.y"]
    harness.first.handle()
    assert inner.wait(1).retcode == 0


def test_message_of_a_nested_operation_is_rejected(harness: DurableHarness) -> None:
    """durability rules 3 and 31: the nested operation has the uuid."""
    send_outer(harness, Outer, True)
    before = harness.snapshot("1.in")
    send_raw_message(Inner, uuid="1.in")
    harness.first.step()
    assert harness.first.consumer.counts["failed"] == 1
    assert harness.snapshot("1.in").operation.params == before.operation.params
    with pytest.raises(StateConflict, match="is the uuid of a nested operation"):
        harness.first.class_of(Inner)("1.in").build().send()


def test_find_returns_roots_unless_a_parent_is_given(harness: DurableHarness) -> None:
    """durability rule 31"""
    send_outer(harness, Outer, True)
    assert [operation.uuid for operation in harness.registry.find()] == ["1"]
    assert [operation.uuid for operation in harness.registry.find(parent="1")] == ["1.in"]
    assert [operation.uuid for operation in harness.registry.find(parent="1.in")] == ["1.in.deep"]
    assert harness.registry.find(parent="1.in.deep") == []


@pytest.mark.parametrize("distributed", [False, True], ids=MODES)
def test_hooks_of_a_nested_operation_are_called_and_their_value_is_stored(
    harness: DurableHarness, distributed: bool
) -> None:
    """durability rules 23 and 31"""

    class HookedOuter(Outer):
        DISTRIBUTED = distributed
        inner = HookedInner

    harness.first.subscribe_copy(HookedOuter)
    send_raw_message(HookedOuter)
    harness.first.handle()
    assert HookedInner.hook_calls == [("onsuccess", "1.in")]
    operation = harness.operation()
    assert operation.result.retval["inner"] == "value of the hook"
    assert operation.status == SUCCESS


@BOTH_OUTER
def test_nested_operation_continues_at_its_step_after_owner_crash(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rule 31: finished tasks of the nested operation do not run again."""
    second = harness.start_process(Innermost, Inner, HookedInner, Outer, DistributedOuter, group="second")
    ScriptedTask.script["1.in.y"] = [in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle), None]
    send_outer(harness, cls, False)
    harness.first.handle()
    assert ScriptedTask.ran == [*ORDER[:4], *ORDER[3:]]
    assert harness.status() == SUCCESS
    assert harness.attempts("1.in") == [(0, 1, SUCCESS), (2, 1, SUCCESS)]


@BOTH_OUTER
def test_nested_retry_waits_and_continues_at_its_step(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rules 27 and 31"""
    ScriptedTask.script["1.in.deep.leaf"] = [Retry.later(10), None]
    send_outer(harness, cls, False)
    harness.first.handle()
    assert (harness.snapshot().operation.owner, harness.status("1.in.deep")) == (None, RUNNING)
    harness.advance(11)
    harness.first.background_service.reap()
    harness.first.handle()
    assert ScriptedTask.ran == [*ORDER[:3], *ORDER[2:]]
    assert harness.attempts("1.in.deep") == [(0, 1, FAILED), (0, 2, SUCCESS)]


@BOTH_OUTER
def test_resume_builds_a_nested_operation_whose_build_failed(harness: DurableHarness, cls: type[Outer]) -> None:
    """durability rules 25 and 31"""

    class FailingBuild(Inner):
        fails: ClassVar[bool] = True

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if self.fails:
                raise ConnectionError("no catalogue")
            return super().build_tasks(**kwargs)

    class FailingOuter(cls):  # type: ignore[valid-type,misc]
        inner = FailingBuild

    harness.first.subscribe_copy(FailingBuild)
    harness.first.subscribe_copy(FailingOuter)
    send_raw_message(FailingOuter)
    harness.first.handle()
    assert (harness.status(), harness.task_statuses()) == (FAILED, [SUCCESS, FAILED, PENDING])
    FailingBuild.fails = False
    harness.operation().resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)


def test_nested_operation_without_tasks_succeeds(harness: DurableHarness) -> None:
    class Empty(Operation):
        pass

    class OuterOfEmpty(Outer):
        inner = Empty

    harness.first.subscribe_copy(Empty)
    harness.first.subscribe_copy(OuterOfEmpty)
    send_raw_message(OuterOfEmpty)
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.z"])
