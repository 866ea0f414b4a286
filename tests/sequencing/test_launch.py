"""Tests of sending operations and launching their tasks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.errors import ProducerMissing, SendError, StoreMissing, TopicMissing
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.support import UUID, lines, ok_result


class PlainTask(Task):
    pass


class SelfSendingTask(Task):
    """A task with its own ``send``, as in users' code for 0.8."""

    def send(self, result: Result | None = None) -> Any:  # type: ignore[override]
        return Result(uuid=self.uuid, stdout=f"sent {self.uuid} after {result}")


@pytest.fixture
def registry() -> Any:
    yield OperationRegistry(producer=Producer({"bootstrap_servers": "launch"}))
    InMemoryBroker.reset()


def operation(*statuses: str) -> Operation:
    """Return an operation with a task of each status; the uuids are 0, 1, 2 …"""
    return Operation(
        UUID, tasks=[SelfSendingTask(str(number), status=status) for number, status in enumerate(statuses)]
    )


# -- send --------------------------------------------------------------------------------------------------------------


def test_operation_is_sent_as_one_message_and_returned(registry: OperationRegistry) -> None:
    """B7"""

    @registry.subscribe
    class Game(Operation):
        TOPIC = "games"

    game = Game(UUID, {"a": 1})
    assert game.send(result=ok_result("before")) is game
    (raw,) = InMemoryBroker.at("launch").values("games")
    kmsg = Message.loads(raw)
    assert (kmsg.uuid, kmsg.entrypoint, kmsg.params, kmsg.result.stdout) == (UUID, Game.path, {"a": 1}, "before")


def test_undelivered_operation_raises_send_error_with_the_result(registry: OperationRegistry) -> None:
    """B7"""

    @registry.subscribe
    class Game(Operation):
        TOPIC = "games"

    with pytest.raises(SendError, match="was not delivered: Object of type object is not JSON") as caught:
        Game(UUID, {"when": object()}).send()
    assert (caught.value.result.uuid, caught.value.result.retcode) == (UUID, 500)


def test_missing_producer_or_topic_is_named_by_send(registry: OperationRegistry) -> None:
    """B4 to B7"""

    class NoTopic(Operation):
        pass

    with pytest.raises(ProducerMissing, match=r"@oregistry\.subscribe"):
        NoTopic().send()
    registry.subscribe(NoTopic)
    with pytest.raises(TopicMissing, match="KSER_TOPICS"):
        NoTopic().send()


# -- next --------------------------------------------------------------------------------------------------------------


def test_next_returns_the_next_task_that_has_not_succeeded() -> None:
    sequence = operation("SUCCESS", "PENDING", "SUCCESS", "SUCCESS", "FAILED", "SUCCESS")
    next_tasks = [sequence.next(task) for task in sequence.tasks]
    assert [task.uuid if task else None for task in next_tasks] == ["1", "4", "4", "4", None, None]


def test_next_finds_a_task_by_its_uuid_in_any_form() -> None:
    """B12"""
    task_from_database = SelfSendingTask(12)  # type: ignore[arg-type]
    last = SelfSendingTask("13")
    sequence = Operation(tasks=[task_from_database, last])
    assert sequence.next(PlainTask("12")) is last
    assert sequence.next(task_from_database) is last


def test_next_of_an_unknown_task_is_none() -> None:
    assert operation("PENDING").next(PlainTask("unknown")) is None
    assert Operation().next(PlainTask()) is None


# -- launch ------------------------------------------------------------------------------------------------------------


def test_launch_sends_the_first_unfinished_task() -> None:
    """B6"""
    result = operation("SUCCESS", "PENDING", "PENDING").launch()
    assert (result.uuid, result.stdout) == ("1", "sent 1 after None")


@pytest.mark.parametrize("status", ["FAILED", "RUNNING"])
def test_launch_sends_an_unsuccessful_task_again(status: str) -> None:
    assert operation("SUCCESS", status).launch().uuid == "1"


def test_launch_of_an_empty_operation_fails_and_keeps_its_status() -> None:
    """B4"""
    empty = Operation(UUID)
    result = empty.launch()
    assert (result.retcode, result.stderr) == (1, "Nothing to do, empty operation !")
    assert empty.status == "PENDING"


def test_launch_next_passes_the_previous_result() -> None:
    sequence = operation("SUCCESS", "PENDING")
    assert sequence.launch_next(sequence.tasks[0], ok_result("one")).stdout == "sent 1 after one"


def test_launch_next_after_the_last_task_ends_the_operation(caplog: pytest.LogCaptureFixture) -> None:
    """B5: SUCCESS, logged, and the Result returned."""
    caplog.set_level(logging.INFO, "kser")
    sequence = operation("SUCCESS")
    result = ok_result("done")
    assert sequence.launch_next(sequence.tasks[0], result) is result
    assert sequence.status == "SUCCESS"
    assert lines(caplog) == [
        f"Operation.SetStatus: {Operation.path}[{UUID}] status update 'PENDING' -> 'SUCCESS'",
    ]


def test_launch_next_without_a_result_returns_the_accumulated_result() -> None:
    """B5"""
    sequence = operation("SUCCESS")
    assert sequence.launch_next(sequence.tasks[0]).retcode == 0
    assert sequence.launch() is sequence.result


def test_failed_result_ends_the_operation(caplog: pytest.LogCaptureFixture) -> None:
    """B6: through `_set_status`, logged."""
    caplog.set_level(logging.INFO, "kser")
    sequence = operation("SUCCESS", "PENDING")
    failure = Result(retcode=3)
    assert sequence.launch_next(sequence.tasks[0], failure) is failure
    assert sequence.status == "FAILED"
    assert "'PENDING' -> 'FAILED'" in lines(caplog)[0]


def test_failed_task_ends_the_operation_with_a_failed_result() -> None:
    """B6, C3: the returned result shows the failure."""
    sequence = operation("FAILED", "PENDING")
    sequence.tasks[0].result = Result(retcode=3, stderr="lost")
    result = sequence.launch_next(sequence.tasks[0])
    assert sequence.status == "FAILED"
    assert (result.retcode, result.stderr) == (3, "lost")


def test_return_value_of_a_user_send_becomes_a_result() -> None:
    """B5: `launch_next` always returns a Result."""

    class NoResultTask(Task):
        def send(self, result: Result | None = None) -> Any:  # type: ignore[override]
            return self

    result = Operation(tasks=[NoResultTask("1")]).launch()
    assert (result.uuid, result.retcode) == ("1", 0)


def test_send_attribute_of_a_task_instance_is_used() -> None:
    """B22"""
    task = PlainTask("1")
    task.send = lambda result=None: Result(stdout="own")  # type: ignore[method-assign,assignment,misc]
    assert Operation(tasks=[task]).launch().stdout == "own"


@pytest.mark.parametrize("task", [PlainTask, Operation])
def test_launch_without_a_shared_database_names_the_setting(task: type[Task]) -> None:
    """B22"""
    with pytest.raises(StoreMissing, match="KSER_DATABASE_URI"):
        Operation(tasks=[task()]).launch()


# -- sequences driven by the tasks, as with 0.8 ------------------------------------------------------------------------


def test_tasks_with_their_own_send_run_on_any_consumer(registry: OperationRegistry) -> None:
    """B22: users' code for 0.8 overrides `send`, and calls `launch_next` in the tasks."""
    database: dict[str, Operation] = {}
    ran: list[str] = []

    @registry.subscribe
    class DrivingTask(Task):
        def send(self, result: Result | None = None) -> Any:  # type: ignore[override]
            return registry.producer.send("driven", self.to_Message(result=result))

        def run(self) -> Result:
            ran.append(self.uuid)
            return Result(retval={self.uuid: True})

        def onsuccess(self, result: Result) -> Any:
            stored = database[self.params["operation"]]
            (stored_task,) = (task for task in stored.tasks if task.uuid == self.uuid)
            stored_task.status = self.status
            stored.launch_next(stored_task, result)
            return result

    stored = database[UUID] = Operation(UUID, tasks=[DrivingTask(name, {"operation": UUID}) for name in "abc"])
    stored.launch()
    consumer = Consumer({"bootstrap_servers": "launch"}, ["driven"])
    assert consumer.run_until_idle() == 3
    consumer.close()
    assert (ran, stored.status) == (["a", "b", "c"], "SUCCESS")
