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
from tests.durable.harness import BOTH_WAYS, DurableHarness, Sale, Spread, send_raw_message, sent_messages

told: list[Any] = []


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    told.clear()


# -- operations from messages ------------------------------------------------------------------------------------------


def test_shallow_copy_of_an_arriving_operation_runs_in_memory(harness: DurableHarness) -> None:
    """durability rule 2: the object that was built from the message is stored, and no other."""

    class Own(Sale):
        def execute(self, result: Result | None = None) -> Any:
            return super(Own, copy.copy(self)).execute(result)

    harness.first.subscribe_copy(Own)
    send_raw_message(Own)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.store.get_operation("1")) == (["1.a", "1.b", "1.c"], None)


def test_object_of_an_unsubscribed_class_runs_in_memory(harness: DurableHarness) -> None:
    """durability rule 2: ``from_Message`` of a stored class may return another object."""

    class Other(Sale):
        _kser_registry = None

    class Own(Sale):
        @classmethod
        def from_Message(cls, kmsg: Any) -> Any:
            return Other(uuid=kmsg.uuid, params=kmsg.params)

    harness.first.subscribe_copy(Own)
    send_raw_message(Own)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.store.get_operation("1")) == (["1.a", "1.b", "1.c"], None)


# -- finalize and send -------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_user_finalize_may_send_the_operation(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 4: as users of 0.8 wrote it; what it returns, ``build`` returns."""

    class Own(cls):  # type: ignore[valid-type,misc]
        def finalize(self) -> Any:
            told.append("finalize")
            return "mine" if self.send() is self else None

    assert harness.first.subscribe_copy(Own)("1").build() == "mine"
    harness.first.handle()
    assert (told, harness.status(), ScriptedTask.ran) == (["finalize"], SUCCESS, ["1.a", "1.b", "1.c"])


@BOTH_WAYS
def test_user_send_that_calls_super_stores_the_operation(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 4"""

    class Own(cls):  # type: ignore[valid-type,misc]
        def send(self, *args: Any, **kwargs: Any) -> Any:
            told.append("send")
            return super().send(*args, **kwargs)

    operation = harness.first.subscribe_copy(Own)("1").build()
    assert operation.send() is operation
    assert (told, harness.status()) == (["send"], PENDING)


@BOTH_WAYS
def test_user_send_without_super_is_stored_by_the_consumer(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 4: no method of users has to save anything."""

    class Own(cls):  # type: ignore[valid-type,misc]
        def send(self, result: Result | None = None, **_: Any) -> Any:
            told.append("send")
            return harness.registry.producer.send("dice", self.to_Message(result=result))

    harness.first.subscribe_copy(Own)("1").build().send()
    assert harness.registry.get("1") is None
    harness.first.handle()
    assert (told, harness.status(), ScriptedTask.ran) == (["send"], SUCCESS, ["1.a", "1.b", "1.c"])


@pytest.mark.parametrize("hook", ["prebuild", "build_tasks", "finalize", "prerun"])
def test_raising_build_hook_fails_or_rejects_the_operation(harness: DurableHarness, hook: str) -> None:
    """durability rule 4: by a message nothing is saved before it is built; what was sent unbuilt is FAILED."""

    def raising(self: Any, **_: Any) -> Any:
        raise ConnectionError("no")

    own = harness.first.subscribe_copy(type("Own", (Sale,), {hook: raising, "__module__": __name__}))
    send_raw_message(own)
    harness.first.handle()
    assert (harness.registry.get("1"), harness.first.consumer.counts["failed"]) == (None, 1)
    own("2").send()
    harness.first.handle()
    assert (harness.status("2"), ScriptedTask.ran) == (FAILED, [])


# -- set_status --------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_user_set_status_is_called_at_start_and_end(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 32: in a consumer that knows the class, as in memory."""

    class Own(cls):  # type: ignore[valid-type,misc]
        def set_status(self, status: str, result: Result | None = None) -> Any:
            told.append((status, self.uuid))
            return super().set_status(status, result)

    harness.first.subscribe_copy(Own)
    send_raw_message(Own)
    harness.first.handle()
    assert told == [(RUNNING, "1"), (SUCCESS, "1")]
    ScriptedTask.script["2.b"] = ConnectionError("no")
    send_raw_message(Own, uuid="2")
    harness.first.handle()
    assert told[2:] == [(RUNNING, "2"), (FAILED, "2")]


# -- next and launch_next ----------------------------------------------------------------------------------------------


class Skipping(Spread):
    """Leaves out what the result says."""

    def next(self, task: Task) -> Task | None:
        told.append(task.uuid)
        if task is self.tasks[0] and task.result.retval.get("skip"):
            return self.tasks[2]
        return super().next(task)


def test_user_next_chooses_the_next_task(harness: DurableHarness) -> None:
    """durability rule 32"""
    harness.first.subscribe_copy(Skipping)
    ScriptedTask.script["1.a"] = lambda: Result(retval={"skip": True})
    send_raw_message(Skipping)
    harness.first.handle()
    assert (ScriptedTask.ran, told) == (["1.a", "1.c"], ["1.a", "1.c"])
    assert (harness.status(), harness.tasks()) == (SUCCESS, [SUCCESS, PENDING, SUCCESS])
    assert "moved" in harness.event_kinds()


def test_user_next_is_called_in_a_consumer_that_knows_the_class(harness: DurableHarness) -> None:
    """durability rule 32: tasks may run where it is not known."""
    other = harness.process(group="other")
    harness.first.subscribe_copy(Skipping)("1").build().send(topic="orders")
    other.handle()
    assert (ScriptedTask.ran, told, len(sent_messages("orders"))) == (["1.a"], [], 1)
    assert sent_messages("orders")[0].entrypoint == Skipping.path
    harness.first.run(sent_messages("orders")[0])
    assert told == ["1.a"]
    other.handle()
    assert ScriptedTask.ran == ["1.a", "1.b"]


def test_raising_user_next_fails_the_operation(harness: DurableHarness) -> None:
    """durability rule 32"""

    class Raising(Spread):
        def next(self, task: Task) -> Task | None:
            raise ConnectionError("no")

    harness.first.subscribe_copy(Raising)
    send_raw_message(Raising)
    harness.first.handle()
    operation = harness.registry.get("1")
    assert operation is not None
    assert (operation.status, "no" in operation.result.stderr, ScriptedTask.ran) == (FAILED, True, ["1.a"])


def test_user_next_that_returns_a_foreign_task_fails_the_operation(harness: DurableHarness) -> None:
    """durability rule 32"""

    class Elsewhere(Spread):
        def next(self, task: Task) -> Task | None:
            return ScriptedTask("elsewhere")

    harness.first.subscribe_copy(Elsewhere)
    send_raw_message(Elsewhere)
    harness.first.handle()
    operation = harness.registry.get("1")
    assert operation is not None
    assert (operation.status, ScriptedTask.ran) == (FAILED, ["1.a"])
    assert "elsewhere" in operation.result.stderr
    assert "no task of" in operation.result.stderr


def test_user_launch_next_is_called_at_each_hand_over(harness: DurableHarness) -> None:
    """durability rule 32"""

    class Own(Spread):
        def launch_next(self, task: Task | None = None, result: Result | None = None) -> Result:
            told.append((task.uuid if task else None, task.status if task else None))
            return super().launch_next(task, result)

    harness.first.subscribe_copy(Own)
    ScriptedTask.script["2.b"] = ConnectionError("no")
    send_raw_message(Own)
    send_raw_message(Own, uuid="2")
    harness.first.handle()
    assert sorted(told) == [("1.a", SUCCESS), ("1.b", SUCCESS), ("1.c", SUCCESS), ("2.a", SUCCESS), ("2.b", FAILED)]
    assert (harness.status("1"), harness.status("2")) == (SUCCESS, FAILED)


def test_user_launch_next_may_continue_after_a_failure(harness: DurableHarness) -> None:
    """durability rule 32: an override decides about the next task."""

    class Stubborn(Spread):
        def launch_next(self, task: Task | None = None, result: Result | None = None) -> Result:
            if task is not None and task.status == FAILED:
                task.status = SUCCESS
                result = Result(uuid=task.uuid)
            return super().launch_next(task, result)

    harness.first.subscribe_copy(Stubborn)
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(Stubborn)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]
    assert (harness.status(), harness.tasks()) == (SUCCESS, [SUCCESS, FAILED, SUCCESS])


# -- driving from a task -----------------------------------------------------------------------------------------------


class Driving(ScriptedTask):
    """Drives its operation itself, as tasks of 0.8 had to."""

    def run(self) -> Any:
        super().run()
        assert self.operation_uuid is not None
        operation = Operation_of(self)
        for _ in range(2):
            told.append(operation.launch_next(operation.tasks[0], Result(stdout="mine")).retcode)
        return Result(retval={self.uuid: 1})


def Operation_of(task: Task) -> Any:
    """The stored operation of a task that runs."""
    return task._kser_registry.get(task.operation_uuid)  # type: ignore[union-attr]


class Driven(Sale):
    own: ClassVar[type[Task]] = Driving

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [self.own(f"{self.uuid}.{name}") for name in "abc"]


class DrivenSpread(Driven):
    DISTRIBUTED = True


@pytest.mark.parametrize("cls", [Driven, DrivenSpread])
@pytest.mark.parametrize("way", ["message", "launch"])
def test_launch_next_in_a_running_task_is_deferred_to_its_checkpoint(
    harness: DurableHarness, cls: type[Driven], way: str
) -> None:
    """durability rule 32: also the second call changes nothing."""
    own = harness.first.subscribe_copy(Driving)
    cls.own = own
    known = harness.first.subscribe_copy(cls)
    known("1").build().launch() if way == "launch" else send_raw_message(cls)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status(), harness.tasks()) == (["1.a", "1.b", "1.c"], SUCCESS, [SUCCESS] * 3)
    assert told == [0] * 6
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"1.a": 1, "1.b": 1, "1.c": 1}
    assert harness.stored().operation.mode == (
        Mode.DISTRIBUTED if way == "launch" or cls is DrivenSpread else Mode.LOCAL
    )


# -- the load hook -----------------------------------------------------------------------------------------------------


def test_init_by_id_returns_the_stored_operation(harness: DurableHarness) -> None:
    cls = harness.first.class_of(Sale)
    assert cls.init_by_id("1") is None
    cls("1", {"order": 42}).build().send()
    found = cls.init_by_id("1")
    assert (type(found), found.uuid, found.params, len(found.tasks)) == (cls, "1", {"order": 42}, 3)


def test_user_init_by_id_overrides_the_stored_one(harness: DurableHarness) -> None:
    class Own(Sale):
        @classmethod
        def init_by_id(cls, _id: Any) -> Any:
            return f"mine {_id}"

    assert harness.first.subscribe_copy(Own).init_by_id(7) == "mine 7"


def test_init_by_id_without_a_database_returns_none() -> None:
    assert Sale.init_by_id("1") is None


@pytest.mark.parametrize("name", ["attempt", "operation_uuid", "cancel_requested", "attempts", "events", "DISTRIBUTED"])
def test_user_attributes_override_the_names_that_kser_adds(harness: DurableHarness, name: str) -> None:
    """decision C18"""
    own = harness.first.subscribe_copy(type("Own", (Sale,), {name: "mine", "__module__": __name__}))
    send_raw_message(own)
    harness.first.handle()
    assert harness.status() == SUCCESS
    found = harness.registry.get("1")
    assert getattr(found, name) == "mine"
