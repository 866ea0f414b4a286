"""Tests of tasks: entrypoints with a status (section 5 of the behaviour page)."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer
from kser.errors import ProducerMissing, TopicMissing, UsageError
from kser.schemas import Message
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.support import UUID, lines, record_of

PATH = "tests.sequencing.test_task.Roll"


class Roll(Task):
    """A task that records its status in ``seen``, and then raises ``error`` or returns ``returns`` of its params."""

    def run(self) -> Any:
        self.params["seen"] = self.status
        if "error" in self.params:
            raise self.params["error"]
        return self.params.get("returns")


@pytest.fixture
def registry() -> Any:
    """Return a registry with a producer."""
    yield OperationRegistry(producer=Producer({"bootstrap_servers": "tasks"}))
    InMemoryBroker.reset()


def test_constructor_arguments_follow_the_documented_order() -> None:
    params, result, metadata = {"a": 1}, Result(), {"m": 1}
    task = Task(UUID, params, "HALTED", result, metadata)
    assert (task.uuid, task.params, task.status, task.result, task.metadata) == (
        UUID,
        params,
        "HALTED",
        result,
        metadata,
    )


def test_postinit_sees_the_status() -> None:
    class StatusInPostinit(Task):
        def postinit(self) -> None:
            self.params["seen"] = self.status

    assert StatusInPostinit(status="X", params={"a": 1}).params["seen"] == "X"


def test_params_that_are_text_are_rejected_by_name() -> None:
    """B2"""
    with pytest.raises(
        UsageError, match=r"is \(uuid, params, status, result, metadata\); pass the arguments by keyword"
    ):
        Task(UUID, "PENDING")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({}, "SUCCESS"),
        ({"returns": Result(retcode=1)}, "FAILED"),
        ({"error": ValueError("x")}, "FAILED"),
    ],
)
def test_status_changes_while_a_task_runs(params: dict[str, Any], status: str) -> None:
    """B8"""
    task = Roll(params={"a": 1, **params})
    task.execute()
    assert (task.params["seen"], task.status) == ("RUNNING", status)


def test_task_with_missing_parameters_is_failed() -> None:
    class StrictRoll(Roll):
        REQUIRED_FIELDS = ["missing"]  # noqa: RUF012  as users write it

    task = StrictRoll()
    task.execute()
    assert task.status == "FAILED"


def test_task_with_a_raising_postinit_stays_failed() -> None:
    """C5"""

    class FailingPostinit(Roll):
        def postinit(self) -> None:
            raise ValueError("x")

    task = FailingPostinit()
    assert task.status == "FAILED"
    task.execute()
    assert task.status == "FAILED"


def test_status_change_of_a_task_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """B8"""
    caplog.set_level(logging.INFO, "kser")
    Roll(UUID).execute()
    assert lines(caplog) == [f"Roll.Success: {PATH}[{UUID}]: "]


def test_messages_contain_no_status() -> None:
    assert Roll.from_Message(Roll(status="SUCCESS").to_Message()).status == "PENDING"


def test_repr_and_str_show_the_task() -> None:
    text = f"Task [{PATH}](uuid={UUID},status=PENDING, params={{'a': 1}})"
    task = Roll(UUID, {"a": 1})
    assert (repr(task), str(task)) == (text, text)


def test_init_by_id_returns_none_by_default() -> None:
    assert Task.init_by_id(1) is None


def test_get_attr_uses_database_attribute_names() -> None:
    class Owner:
        ownerId = 7  # noqa: N815  the name of the column

    task = Task()
    assert task.get_attr("owner") == ("ownerId", None)
    task.owner = Owner()  # type: ignore[attr-defined]
    assert task.get_attr("owner") == ("ownerId", 7)
    task.itemId = 9  # type: ignore[attr-defined]
    assert task.get_attr("item") == ("itemId", 9)


# -- log ---------------------------------------------------------------------------------------------------------------


def test_log_line_shows_the_current_status(caplog: pytest.LogCaptureFixture) -> None:
    """B8"""
    caplog.set_level(logging.INFO, "kser")
    task = Roll(UUID, metadata={"m": 1})
    task.log("%s rolls", logging.INFO, "x")
    task.status = "RUNNING"
    task.log("100 %", logging.ERROR)
    task.log("hidden", logging.DEBUG)
    assert lines(caplog) == [f"Roll.PENDING: {PATH}[{UUID}]: x rolls", f"Roll.RUNNING: {PATH}[{UUID}]: 100 %"]
    record = record_of(caplog, "Roll.PENDING")
    assert record.name == "kser.sequencing.task"
    assert record.kmsg["metadata"] == {"m": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize("extra", [None, {"colour": "red", "kmsg": "mine"}])
def test_log_call_does_not_modify_the_extra_of_its_caller(extra: Any, caplog: pytest.LogCaptureFixture) -> None:
    """C20"""
    caplog.set_level(logging.INFO, "kser")
    argument = dict(extra) if extra else extra
    Roll(UUID).log("x", extra=argument)
    assert argument == extra
    assert record_of(caplog, "Roll.PENDING").kmsg["uuid"] == UUID  # type: ignore[attr-defined]


# -- send --------------------------------------------------------------------------------------------------------------


def test_task_sends_itself_with_the_producer_of_its_registry(registry: OperationRegistry) -> None:
    """B7"""

    @registry.subscribe
    class DiceRoll(Roll):
        TOPIC = "dice"

    result = DiceRoll(UUID, {"a": 1}).send(result=Result(stdout="before"))
    assert (result.uuid, result.retcode) == (UUID, 0)
    kmsg = Message.loads(InMemoryBroker.at("tasks").values("dice")[0])
    assert (kmsg.uuid, kmsg.entrypoint, kmsg.params, kmsg.result.stdout) == (UUID, DiceRoll.path, {"a": 1}, "before")


def test_topic_is_the_argument_then_the_class_then_the_setting(
    registry: OperationRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    @registry.subscribe
    class NoTopic(Roll):
        pass

    @registry.subscribe
    class OwnTopic(Roll):
        TOPIC = "class"

    monkeypatch.setenv("KSER_TOPICS", "first,second")
    NoTopic().send()
    OwnTopic().send()
    OwnTopic().send(topic="argument")
    assert {topic: len(values) for topic, values in InMemoryBroker.at("tasks").topics.items()} == {
        "first": 1,
        "class": 1,
        "argument": 1,
    }


def test_missing_topic_error_names_the_setting(registry: OperationRegistry) -> None:
    """B4: an error about a missing setting names the setting."""

    @registry.subscribe
    class NoTopic(Roll):
        pass

    with pytest.raises(TopicMissing, match=r"send\(topic=...\), set TOPIC on the class, or set KSER_TOPICS"):
        NoTopic().send()


def test_missing_registry_error_names_the_decorator() -> None:
    with pytest.raises(ProducerMissing, match=r"tests.sequencing.test_task.Roll has no registry.*@oregistry.subscribe"):
        Roll().send()


def test_missing_producer_error_names_the_argument() -> None:
    @OperationRegistry().subscribe
    class DiceRoll(Roll):
        TOPIC = "dice"

    with pytest.raises(ProducerMissing, match=r"OperationRegistry\(producer=Producer\(\)\)"):
        DiceRoll().send()


def test_failed_send_returns_a_failed_result(registry: OperationRegistry) -> None:
    """B7: `Task.send` returns the producer's Result."""

    @registry.subscribe
    class DiceRoll(Roll):
        TOPIC = "dice"

    result = DiceRoll(params={"when": object()}).send()
    assert result.retcode == 500
    assert "not JSON serializable" in result.stderr


def test_user_attributes_override_the_names_that_kser_adds() -> None:
    """C18"""

    class OwnAttributes(Roll):
        TOPIC = ["several", "of", "them"]  # type: ignore[assignment]  # noqa: RUF012

        def postinit(self) -> None:
            self.send = "a parcel"  # type: ignore[method-assign,assignment]

    task = OwnAttributes()
    assert task.execute().retcode == 0
    assert (task.send, task.TOPIC[0]) == ("a parcel", "several")
