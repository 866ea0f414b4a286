"""Tests of user overrides on stored operations, and of user code that drives the sequence itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from kser.store.model import Mode
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import (
    BOTH_MODES,
    MODES,
    DistributedSale,
    DurableHarness,
    Sale,
    send_raw_message,
    sent_messages,
)
from tests.support import SuccessfulError

#: The calls of overridden methods.
calls: list[Any] = []


@pytest.fixture(autouse=True)
def recorded_calls() -> Iterator[None]:
    """Forget the calls after the test."""
    yield
    calls.clear()


# -- operations from messages ------------------------------------------------------------------------------------------


def test_shallow_copy_of_an_arriving_operation_runs_in_memory(harness: DurableHarness) -> None:
    """durability rule 2: only the object that was built from the message is stored."""

    class CopyingSale(Sale):
        def execute(self, result: Result | None = None) -> Any:
            return super(CopyingSale, copy.copy(self)).execute(result)

    harness.first.subscribe_copy(CopyingSale)
    send_raw_message(CopyingSale)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.store.get_operation("1")) == (["1.a", "1.b", "1.c"], None)


def test_object_of_an_unsubscribed_class_runs_in_memory(harness: DurableHarness) -> None:
    """durability rule 2: ``from_Message`` of a stored class may return another object."""

    class UnsubscribedSale(Sale):
        _kser_registry = None

    class ReplacedSale(Sale):
        @classmethod
        def from_Message(cls, kmsg: Any) -> Any:
            return UnsubscribedSale(uuid=kmsg.uuid, params=kmsg.params)

    harness.first.subscribe_copy(ReplacedSale)
    send_raw_message(ReplacedSale)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.store.get_operation("1")) == (["1.a", "1.b", "1.c"], None)


# -- finalize and send -------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_user_finalize_may_send_the_operation(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 4: users of 0.8 do so; ``build`` returns the value of ``finalize``."""

    class SelfSendingSale(cls):  # type: ignore[valid-type,misc]
        def finalize(self) -> Any:
            calls.append("finalize")
            return "mine" if self.send() is self else None

    assert harness.first.subscribe_copy(SelfSendingSale)("1").build() == "mine"
    harness.first.handle()
    assert (calls, harness.status(), ScriptedTask.ran) == (["finalize"], SUCCESS, ["1.a", "1.b", "1.c"])


@BOTH_MODES
def test_user_send_that_calls_super_stores_the_operation(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 4"""

    class SendOverride(cls):  # type: ignore[valid-type,misc]
        def send(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("send")
            return super().send(*args, **kwargs)

    operation = harness.first.subscribe_copy(SendOverride)("1").build()
    assert operation.send() is operation
    assert (calls, harness.status()) == (["send"], PENDING)


@BOTH_MODES
def test_user_send_without_super_is_stored_by_the_consumer(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 4: no method of a user has to save the operation."""

    class SendOverride(cls):  # type: ignore[valid-type,misc]
        def send(self, result: Result | None = None, **_: Any) -> Any:
            calls.append("send")
            return harness.registry.producer.send("dice", self.to_Message(result=result))

    harness.first.subscribe_copy(SendOverride)("1").build().send()
    assert harness.registry.get("1") is None
    harness.first.handle()
    assert (calls, harness.status(), ScriptedTask.ran) == (["send"], SUCCESS, ["1.a", "1.b", "1.c"])


@pytest.mark.parametrize("hook", ["prebuild", "build_tasks", "finalize", "prerun"])
def test_raising_build_hook_fails_or_rejects_the_operation(harness: DurableHarness, hook: str) -> None:
    """durability rule 4: a received operation is saved after its build; one that was sent unbuilt becomes FAILED."""

    def fail(self: Any, **_: Any) -> Any:
        raise ConnectionError("no")

    cls = harness.first.subscribe_copy(type("FailingHook", (Sale,), {hook: fail, "__module__": __name__}))
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.registry.get("1"), harness.first.consumer.counts["failed"]) == (None, 1)
    cls("2").send()
    harness.first.handle()
    assert (harness.status("2"), ScriptedTask.ran) == (FAILED, [])


# -- set_status --------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_user_set_status_is_called_at_start_and_end(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 32: in a consumer that knows the class, with the same calls as in memory."""

    class SetStatusOverride(cls):  # type: ignore[valid-type,misc]
        def set_status(self, status: str, result: Result | None = None) -> Any:
            calls.append((status, self.uuid))
            return super().set_status(status, result)

    harness.first.subscribe_copy(SetStatusOverride)
    send_raw_message(SetStatusOverride)
    harness.first.handle()
    assert calls == [(RUNNING, "1"), (SUCCESS, "1")]
    ScriptedTask.script["2.b"] = ConnectionError("no")
    send_raw_message(SetStatusOverride, uuid="2")
    harness.first.handle()
    assert calls[2:] == [(RUNNING, "2"), (FAILED, "2")]


# -- next and launch_next ----------------------------------------------------------------------------------------------


class SkippingSale(DistributedSale):
    """A sale that skips its second task if the result of the first one says so."""

    def next(self, task: Task) -> Task | None:
        calls.append(task.uuid)
        if task is self.tasks[0] and task.result.retval.get("skip"):
            return self.tasks[2]
        return super().next(task)


def test_user_next_chooses_the_next_task(harness: DurableHarness) -> None:
    """durability rule 32"""
    harness.first.subscribe_copy(SkippingSale)
    ScriptedTask.script["1.a"] = lambda: Result(retval={"skip": True})
    send_raw_message(SkippingSale)
    harness.first.handle()
    assert (ScriptedTask.ran, calls) == (["1.a", "1.c"], ["1.a", "1.c"])
    assert (harness.status(), harness.task_statuses()) == (SUCCESS, [SUCCESS, PENDING, SUCCESS])
    assert "moved" in harness.event_kinds()


def test_user_next_is_called_in_a_consumer_that_knows_the_class(harness: DurableHarness) -> None:
    """durability rule 32: the tasks may run on consumers that do not know the class."""
    other = harness.start_process(group="other")
    harness.first.subscribe_copy(SkippingSale)("1").build().send(topic="orders")
    other.handle()
    assert (ScriptedTask.ran, calls, len(sent_messages("orders"))) == (["1.a"], [], 1)
    assert sent_messages("orders")[0].entrypoint == SkippingSale.path
    harness.first.run(sent_messages("orders")[0])
    assert calls == ["1.a"]
    other.handle()
    assert ScriptedTask.ran == ["1.a", "1.b"]


def test_raising_user_next_fails_the_operation(harness: DurableHarness) -> None:
    """durability rule 32"""

    class RaisingNext(DistributedSale):
        def next(self, task: Task) -> Task | None:
            raise ConnectionError("no")

    harness.first.subscribe_copy(RaisingNext)
    send_raw_message(RaisingNext)
    harness.first.handle()
    operation = harness.operation()
    assert (operation.status, "no" in operation.result.stderr, ScriptedTask.ran) == (FAILED, True, ["1.a"])


def test_user_next_that_returns_a_foreign_task_fails_the_operation(harness: DurableHarness) -> None:
    """durability rule 32"""

    class ForeignNext(DistributedSale):
        def next(self, task: Task) -> Task | None:
            return ScriptedTask("elsewhere")

    harness.first.subscribe_copy(ForeignNext)
    send_raw_message(ForeignNext)
    harness.first.handle()
    operation = harness.operation()
    assert (operation.status, ScriptedTask.ran) == (FAILED, ["1.a"])
    assert "elsewhere" in operation.result.stderr
    assert "no task of" in operation.result.stderr


def test_user_launch_next_is_called_at_each_hand_over(harness: DurableHarness) -> None:
    """durability rule 32"""

    class LaunchNextOverride(DistributedSale):
        def launch_next(self, task: Task | None = None, result: Result | None = None) -> Result:
            calls.append((task.uuid if task else None, task.status if task else None))
            return super().launch_next(task, result)

    harness.first.subscribe_copy(LaunchNextOverride)
    ScriptedTask.script["2.b"] = ConnectionError("no")
    send_raw_message(LaunchNextOverride)
    send_raw_message(LaunchNextOverride, uuid="2")
    harness.first.handle()
    assert sorted(calls) == [("1.a", SUCCESS), ("1.b", SUCCESS), ("1.c", SUCCESS), ("2.a", SUCCESS), ("2.b", FAILED)]
    assert (harness.status("1"), harness.status("2")) == (SUCCESS, FAILED)


def test_user_launch_next_may_continue_after_a_failure(harness: DurableHarness) -> None:
    """durability rule 32: an override decides about the next task."""

    class ContinuingSale(DistributedSale):
        def launch_next(self, task: Task | None = None, result: Result | None = None) -> Result:
            if task is not None and task.status == FAILED:
                task.status = SUCCESS
                result = Result(uuid=task.uuid)
            return super().launch_next(task, result)

    harness.first.subscribe_copy(ContinuingSale)
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(ContinuingSale)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]
    assert (harness.status(), harness.task_statuses()) == (SUCCESS, [SUCCESS, FAILED, SUCCESS])


# -- launch_next in a task ---------------------------------------------------------------------------------------------


class DrivingTask(ScriptedTask):
    """A task that calls ``launch_next`` of its operation, as tasks of 0.8 do."""

    def run(self) -> Any:
        super().run()
        assert self.operation_uuid is not None
        operation = stored_operation_of(self)
        for _ in range(2):
            calls.append(operation.launch_next(operation.tasks[0], Result(stdout="mine")).retcode)
        return Result(retval={self.uuid: 1})


def stored_operation_of(task: Task) -> Any:
    """Return the stored operation of a running task."""
    return task._kser_registry.get(task.operation_uuid)  # type: ignore[union-attr]


class DrivenSale(Sale):
    """A sale of three driving tasks."""

    task_class: ClassVar[type[Task]] = DrivingTask

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [self.task_class(f"{self.uuid}.{name}") for name in "abc"]


class DistributedDrivenSale(DrivenSale):
    DISTRIBUTED = True


@pytest.mark.parametrize("cls", [DrivenSale, DistributedDrivenSale], ids=MODES)
@pytest.mark.parametrize("sent_by", ["message", "launch"])
def test_launch_next_in_a_running_task_is_deferred_to_its_checkpoint(
    harness: DurableHarness, cls: type[DrivenSale], sent_by: str
) -> None:
    """durability rule 32: a second call changes nothing."""
    cls.task_class = harness.first.subscribe_copy(DrivingTask)
    subscribed = harness.first.subscribe_copy(cls)
    if sent_by == "launch":
        subscribed("1").build().launch()
    else:
        send_raw_message(cls)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status(), harness.task_statuses()) == (
        ["1.a", "1.b", "1.c"],
        SUCCESS,
        [SUCCESS] * 3,
    )
    assert calls == [0] * 6
    assert harness.operation().result.retval == {"1.a": 1, "1.b": 1, "1.c": 1}
    is_distributed = sent_by == "launch" or cls is DistributedDrivenSale
    assert harness.snapshot().operation.mode == (Mode.DISTRIBUTED if is_distributed else Mode.LOCAL)


# -- init_by_id and user attributes ------------------------------------------------------------------------------------


def test_init_by_id_returns_the_stored_operation(harness: DurableHarness) -> None:
    cls = harness.first.class_of(Sale)
    assert cls.init_by_id("1") is None
    cls("1", {"order": 42}).build().send()
    loaded = cls.init_by_id("1")
    assert (type(loaded), loaded.uuid, loaded.params, len(loaded.tasks)) == (cls, "1", {"order": 42}, 3)


def test_user_init_by_id_overrides_the_stored_one(harness: DurableHarness) -> None:
    class InitByIdOverride(Sale):
        @classmethod
        def init_by_id(cls, _id: Any) -> Any:
            return f"mine {_id}"

    assert harness.first.subscribe_copy(InitByIdOverride).init_by_id(7) == "mine 7"


def test_init_by_id_without_a_database_returns_none() -> None:
    assert Sale.init_by_id("1") is None


@pytest.mark.parametrize("name", ["attempt", "operation_uuid", "cancel_requested", "attempts", "events", "DISTRIBUTED"])
def test_user_attributes_override_the_names_that_kser_adds(harness: DurableHarness, name: str) -> None:
    """decision C18"""
    cls = harness.first.subscribe_copy(type("OwnAttributes", (Sale,), {name: "mine", "__module__": __name__}))
    send_raw_message(cls)
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert getattr(harness.operation(), name) == "mine"


# -- unusual results ---------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_exception_with_code_0_in_an_overridden_hook_ends_its_task_successfully(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """The code of an exception is the return code of the result, and 0 means success."""

    class RaisingTask(Task):
        def run(self) -> Result:
            raise ValueError("no")

        def _onerror(self, result: Result) -> Any:
            raise SuccessfulError("nothing to do")

    harness.first.subscribe_copy(RaisingTask)

    class RaisingSale(cls):  # type: ignore[misc,valid-type]
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [harness.first.class_of(RaisingTask)("1.a"), ScriptedTask("1.b")]

    harness.first.subscribe_copy(RaisingSale)
    send_raw_message(RaisingSale)
    harness.first.handle()
    assert (harness.status(), harness.task_statuses(), ScriptedTask.ran) == (SUCCESS, [SUCCESS, SUCCESS], ["1.b"])


@pytest.mark.parametrize(("field", "value"), [("retval", None), ("stdout", 7)])
def test_failure_that_cannot_be_merged_reaches_an_overridden_launch_next(
    harness: DurableHarness, field: str, value: Any
) -> None:
    """``launch_next`` decides about a failure before it changes the accumulated result of the operation."""

    class UnmergeableTask(Task):
        def run(self) -> Result:
            return Result(uuid=self.uuid, retcode=4, stderr="bad card")

        def onerror(self, result: Result) -> Result:
            setattr(result, field, value)
            return result

    harness.first.subscribe_copy(UnmergeableTask)

    class ChoosingSale(DistributedSale):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [harness.first.class_of(UnmergeableTask)("1.a")]

        def launch_next(self, task: Task | None = None, result: Result | None = None) -> Any:
            if task is not None:
                calls.append((task.status, task.result.stderr))
            return super().launch_next(task=task, result=result)

    harness.first.subscribe_copy(ChoosingSale)
    send_raw_message(ChoosingSale)
    harness.first.handle()
    assert calls == [(FAILED, "bad card")]
    assert harness.snapshot().attempts[0].error == "bad card"
