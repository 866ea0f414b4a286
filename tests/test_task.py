"""An entrypoint that knows its status. Behaviour page, section 5."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from cdumay_result import Result

from kser.dummy.bus import Bus
from kser.dummy.producer import Producer
from kser.errors import ProducerMissing, TopicMissing, UsageError
from kser.schemas import Message
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.support import UUID, lines, record_of

PATH = "tests.test_task.Roll"


class Roll(Task):
    def run(self) -> Any:
        self.params["seen"] = self.status
        if "error" in self.params:
            raise self.params["error"]
        return self.params.get("returns")


@pytest.fixture
def registry() -> Any:
    """A registry with a producer, that knows a class of this test's own."""
    yield OperationRegistry(producer=Producer({"bootstrap_servers": "tasks"}))
    Bus.reset()


def test_arguments_are_kept_in_the_documented_order() -> None:
    params, result, metadata = {"a": 1}, Result(), {"m": 1}
    task = Task(UUID, params, "HALTED", result, metadata)
    assert (task.uuid, task.params, task.status, task.result, task.metadata) == (
        UUID,
        params,
        "HALTED",
        result,
        metadata,
    )


def test_the_status_is_known_to_postinit() -> None:
    class Early(Task):
        def postinit(self) -> None:
            self.params["seen"] = self.status

    assert Early(status="X", params={"a": 1}).params["seen"] == "X"


def test_params_that_are_text_are_refused_by_name() -> None:
    """B2"""
    with pytest.raises(
        UsageError, match=r"order is \(uuid, params, status, result, metadata\), so pass them by keyword"
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
def test_the_status_moves_while_it_runs(params: dict[str, Any], status: str) -> None:
    """B8"""
    task = Roll(params={"a": 1, **params})
    task.execute()
    assert (task.params["seen"], task.status) == ("RUNNING", status)


def test_a_task_that_cannot_start_is_failed() -> None:
    class Picky(Roll):
        REQUIRED_FIELDS = ["missing"]  # noqa: RUF012  as users write it

    task = Picky()
    task.execute()
    assert task.status == "FAILED"


def test_a_task_whose_postinit_raised_stays_failed() -> None:
    """C5"""

    class Broken(Roll):
        def postinit(self) -> None:
            raise ValueError("x")

    task = Broken()
    assert task.status == "FAILED"
    task.execute()
    assert task.status == "FAILED"


def test_moving_the_status_of_a_task_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """B8"""
    caplog.set_level(logging.INFO, "kser")
    Roll(UUID).execute()
    assert lines(caplog) == [f"Roll.Success: {PATH}[{UUID}]: "]


def test_messages_carry_no_status() -> None:
    assert Roll.from_Message(Roll(status="SUCCESS").to_Message()).status == "PENDING"


def test_texts_of_a_task() -> None:
    text = f"Task [{PATH}](uuid={UUID},status=PENDING, params={{'a': 1}})"
    task = Roll(UUID, {"a": 1})
    assert (repr(task), str(task)) == (text, text)


def test_loading_by_id_is_left_to_users() -> None:
    assert Task.init_by_id(1) is None


def test_attributes_are_named_for_a_database() -> None:
    class Owner:
        ownerId = 7  # noqa: N815  what it looks for

    task = Task()
    assert task.get_attr("owner") == ("ownerId", None)
    task.owner = Owner()  # type: ignore[attr-defined]
    assert task.get_attr("owner") == ("ownerId", 7)
    task.itemId = 9  # type: ignore[attr-defined]
    assert task.get_attr("item") == ("itemId", 9)


# -- log ---------------------------------------------------------------------------------------------------------------


def test_a_log_line_shows_the_current_status(caplog: pytest.LogCaptureFixture) -> None:
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
def test_a_log_line_leaves_the_callers_extra_alone(extra: Any, caplog: pytest.LogCaptureFixture) -> None:
    """C20"""
    caplog.set_level(logging.INFO, "kser")
    given = dict(extra) if extra else extra
    Roll(UUID).log("x", extra=given)
    assert given == extra
    assert record_of(caplog, "Roll.PENDING").kmsg["uuid"] == UUID  # type: ignore[attr-defined]


# -- sending -----------------------------------------------------------------------------------------------------------


def test_a_task_sends_itself_with_its_registrys_producer(registry: OperationRegistry) -> None:
    """B7"""

    @registry.subscribe
    class Sent(Roll):
        TOPIC = "dice"

    result = Sent(UUID, {"a": 1}).send(result=Result(stdout="before"))
    assert (result.uuid, result.retcode) == (UUID, 0)
    kmsg = Message.loads(Bus.at("tasks").values("dice")[0])
    assert (kmsg.uuid, kmsg.entrypoint, kmsg.params, kmsg.result.stdout) == (UUID, Sent.path, {"a": 1}, "before")


def test_a_topic_is_the_argument_then_the_class_then_the_setting(
    registry: OperationRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    @registry.subscribe
    class Plain(Roll):
        pass

    @registry.subscribe
    class Placed(Roll):
        TOPIC = "placed"

    monkeypatch.setenv("KSER_TOPICS", "first,second")
    Plain().send()
    Placed().send()
    Placed().send(topic="argument")
    assert {topic: len(values) for topic, values in Bus.at("tasks").topics.items()} == {
        "first": 1,
        "placed": 1,
        "argument": 1,
    }


def test_without_a_topic_the_setting_is_named(registry: OperationRegistry) -> None:
    """B4: what is missing to send raises an error that names the setting."""

    @registry.subscribe
    class Lost(Roll):
        pass

    with pytest.raises(TopicMissing, match=r"send\(topic=...\), set TOPIC on the class, or set KSER_TOPICS"):
        Lost().send()


def test_without_a_registry_a_task_says_what_to_do() -> None:
    with pytest.raises(ProducerMissing, match=r"tests.test_task.Roll has no registry.*@oregistry.subscribe"):
        Roll().send()


def test_without_a_producer_a_task_says_what_to_do() -> None:
    @OperationRegistry().subscribe
    class Mute(Roll):
        TOPIC = "dice"

    with pytest.raises(ProducerMissing, match=r"OperationRegistry\(producer=Producer\(\)\)"):
        Mute().send()


def test_a_failed_delivery_is_a_result(registry: OperationRegistry) -> None:
    """B7: `Task.send` returns the producer's Result."""

    @registry.subscribe
    class Heavy(Roll):
        TOPIC = "dice"

    result = Heavy(params={"when": object()}).send()
    assert result.retcode == 500
    assert "not JSON serializable" in result.stderr


def test_a_users_own_names_win() -> None:
    """C18"""

    class Mine(Roll):
        TOPIC = ["several", "of", "them"]  # type: ignore[assignment]  # noqa: RUF012

        def postinit(self) -> None:
            self.send = "a parcel"  # type: ignore[method-assign,assignment]

    task = Mine()
    assert task.execute().retcode == 0
    assert (task.send, task.TOPIC[0]) == ("a parcel", "several")
