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


class Plain(Task):
    pass


class Own(Task):
    """Sends itself, as users of 0.8 wrote it."""

    def send(self, result: Result | None = None) -> Any:  # type: ignore[override]
        return Result(uuid=self.uuid, stdout=f"sent {self.uuid} after {result}")


@pytest.fixture
def registry() -> Any:
    yield OperationRegistry(producer=Producer({"bootstrap_servers": "launch"}))
    InMemoryBroker.reset()


def operation(*statuses: str) -> Operation:
    return Operation(UUID, tasks=[Own(str(number), status=status) for number, status in enumerate(statuses)])


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

    class Lost(Operation):
        pass

    with pytest.raises(ProducerMissing, match=r"@oregistry\.subscribe"):
        Lost().send()
    registry.subscribe(Lost)
    with pytest.raises(TopicMissing, match="KSER_TOPICS"):
        Lost().send()


# -- next --------------------------------------------------------------------------------------------------------------


def test_next_returns_the_first_unfinished_task_behind() -> None:
    tasks = operation("SUCCESS", "PENDING", "SUCCESS", "SUCCESS", "FAILED", "SUCCESS")
    found = [tasks.next(task) for task in tasks.tasks]
    assert [task.uuid if task else None for task in found] == ["1", "4", "4", "4", None, None]


def test_next_finds_a_task_by_its_uuid_in_any_form() -> None:
    """B12"""
    from_database = Own(12)  # type: ignore[arg-type]
    last = Own("13")
    tasks = Operation(tasks=[from_database, last])
    assert tasks.next(Plain("12")) is last
    assert tasks.next(from_database) is last


def test_next_of_an_unknown_task_is_none() -> None:
    assert operation("PENDING").next(Plain("unknown")) is None
    assert Operation().next(Plain()) is None


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
    tasks = operation("SUCCESS", "PENDING")
    assert tasks.launch_next(tasks.tasks[0], ok_result("one")).stdout == "sent 1 after one"


def test_launch_next_after_the_last_task_ends_the_operation(caplog: pytest.LogCaptureFixture) -> None:
    """B5: SUCCESS, logged, and the Result returned."""
    caplog.set_level(logging.INFO, "kser")
    tasks = operation("SUCCESS")
    result = ok_result("done")
    assert tasks.launch_next(tasks.tasks[0], result) is result
    assert tasks.status == "SUCCESS"
    assert lines(caplog) == [
        f"Operation.SetStatus: {Operation.path}[{UUID}] status update 'PENDING' -> 'SUCCESS'",
    ]


def test_launch_next_without_a_result_returns_the_accumulated_result() -> None:
    """B5"""
    tasks = operation("SUCCESS")
    assert tasks.launch_next(tasks.tasks[0]).retcode == 0
    assert tasks.launch() is tasks.result


def test_failed_result_ends_the_operation(caplog: pytest.LogCaptureFixture) -> None:
    """B6: through `_set_status`, logged."""
    caplog.set_level(logging.INFO, "kser")
    tasks = operation("SUCCESS", "PENDING")
    failure = Result(retcode=3)
    assert tasks.launch_next(tasks.tasks[0], failure) is failure
    assert tasks.status == "FAILED"
    assert "'PENDING' -> 'FAILED'" in lines(caplog)[0]


def test_failed_task_ends_the_operation_with_a_failed_result() -> None:
    """B6, C3: the returned result shows the failure."""
    tasks = operation("FAILED", "PENDING")
    tasks.tasks[0].result = Result(retcode=3, stderr="lost")
    answer = tasks.launch_next(tasks.tasks[0])
    assert tasks.status == "FAILED"
    assert (answer.retcode, answer.stderr) == (3, "lost")


def test_return_value_of_a_user_send_becomes_a_result() -> None:
    """B5: `launch_next` returns a Result whatever it sends."""

    class Silent(Task):
        def send(self, result: Result | None = None) -> Any:  # type: ignore[override]
            return self

    answer = Operation(tasks=[Silent("1")]).launch()
    assert (answer.uuid, answer.retcode) == ("1", 0)


def test_send_attribute_of_a_task_instance_is_used() -> None:
    """B22"""
    task = Plain("1")
    task.send = lambda result=None: Result(stdout="own")  # type: ignore[method-assign,assignment,misc]
    assert Operation(tasks=[task]).launch().stdout == "own"


@pytest.mark.parametrize("task", [Plain, Operation])
def test_launch_without_a_shared_database_names_the_setting(task: type[Task]) -> None:
    """B22"""
    with pytest.raises(StoreMissing, match="KSER_DATABASE_URI"):
        Operation(tasks=[task()]).launch()


# -- as users of 0.8 drove it ------------------------------------------------------------------------------------------


def test_tasks_with_their_own_send_run_on_any_consumer(registry: OperationRegistry) -> None:
    """B22: published users overrode `send`, and drove the sequence from the tasks."""
    database: dict[str, Operation] = {}
    ran: list[str] = []

    @registry.subscribe
    class Driven(Task):
        def send(self, result: Result | None = None) -> Any:  # type: ignore[override]
            return registry.producer.send("driven", self.to_Message(result=result))

        def run(self) -> Result:
            ran.append(self.uuid)
            return Result(retval={self.uuid: True})

        def onsuccess(self, result: Result) -> Any:
            stored = database[self.params["operation"]]
            (mine,) = (task for task in stored.tasks if task.uuid == self.uuid)
            mine.status = self.status
            stored.launch_next(mine, result)
            return result

    stored = database[UUID] = Operation(UUID, tasks=[Driven(name, {"operation": UUID}) for name in "abc"])
    stored.launch()
    consumer = Consumer({"bootstrap_servers": "launch"}, ["driven"])
    assert consumer.run_until_idle() == 3
    consumer.close()
    assert (ran, stored.status) == (["a", "b", "c"], "SUCCESS")
