"""Tests of poison messages: each kind has a failed result and one log line, and the consumer continues behind it.

The contract tests of the transports test bad input of producers.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from kser.schemas import Message
from tests.consumer.harness import committed
from tests.support import UUID, lines, message, ok_result, records, run_python


class SuccessfulTask(Entrypoint):
    """A task that records its uuid and succeeds."""

    handled: list[str] = []  # noqa: RUF012  emptied after each test

    def run(self) -> Result:
        self.handled.append(self.uuid)
        return ok_result("done")


class MisbehavingTask(Entrypoint):
    """A task that exits, raises or returns a value, and whose hook may raise, as its params say."""

    def run(self) -> Any:
        action = self.params["action"]
        if action == "exit":
            raise SystemExit(1)
        if action == "raise":
            raise ValueError("raised")
        return action

    def onerror(self, result: Result) -> Result:
        if self.params.get("onerror"):
            raise RuntimeError("onerror raised")
        return result


class RecordingController(Controller):
    """A controller that records the messages and results of its error hook."""

    errors: list[tuple[Message, Result]] = []  # noqa: RUF012  emptied after each test

    @classmethod
    def onerror(cls, kmsg: Message, result: Result) -> Result:
        cls.errors.append((kmsg, result))
        return result


@pytest.fixture(autouse=True)
def registered(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    for cls in (SuccessfulTask, MisbehavingTask):
        Controller.register(cls.path, cls)
    caplog.set_level(logging.INFO, "kser")
    yield
    InMemoryBroker.reset()
    SuccessfulTask.handled.clear()
    RecordingController.errors.clear()


def consume(*values: Any, registry: Any = RecordingController) -> int | None:
    """Consume records with ``values`` and then a valid message ``next``; return the committed offset."""
    broker = InMemoryBroker.at("")
    for value in (*values, message(SuccessfulTask, uuid="next").dumps().encode()):
        broker.send("dice", value)
    consumer = Consumer({"enable_auto_commit": False}, ["dice"])
    consumer.REGISTRY = registry
    consumer.run_until_idle()
    consumer.close()
    return committed()


def record_value(**changes: Any) -> bytes:
    """Return the record value of a valid message with changed fields; ``...`` removes a field."""
    data = {**json.loads(message(SuccessfulTask).dumps()), **changes}
    return json.dumps({key: value for key, value in data.items() if value is not ...}).encode()


ANY = object()

#: Rejected record values, each with the uuid and the entrypoint of the message that the error hook gets. ANY stands
#: for a new uuid.
REJECTED = {
    "not UTF-8": (b'{"uuid": "\xff"}', ANY, ""),
    "UTF-8 with a byte order mark": (b"\xef\xbb\xbf" + record_value(), ANY, ""),
    "not JSON": (b"hello", ANY, ""),
    "cut off": (record_value()[:-1], ANY, ""),
    "empty": (b"", ANY, ""),
    "a null value": (None, ANY, ""),
    "JSON null": (b"null", ANY, ""),
    "a list": (b"[]", ANY, ""),
    "a number": (b"5", ANY, ""),
    "an empty object": (b"{}", ANY, ""),
    "a million closing brackets": (b"]" * 1_000_000, ANY, ""),
    "a number of 5000 digits": (record_value(params={"n": 0}).replace(b'"n": 0', b'"n": 1' + b"0" * 5000), ANY, ""),
    "no uuid": (record_value(uuid=...), ANY, SuccessfulTask.path),
    "a null uuid": (record_value(uuid=None), ANY, SuccessfulTask.path),
    "a uuid that is a number": (record_value(uuid=5), ANY, SuccessfulTask.path),
    "a uuid that is a list": (record_value(uuid=["a"]), ANY, SuccessfulTask.path),
    "no entrypoint": (record_value(entrypoint=...), UUID, ""),
    "a null entrypoint": (record_value(entrypoint=None), UUID, ""),
    "an entrypoint that is a number": (record_value(entrypoint=5), UUID, ""),
    "params that are text": (record_value(params="a"), UUID, SuccessfulTask.path),
    "params that are null": (record_value(params=None), UUID, SuccessfulTask.path),
    "metadata that is a list": (record_value(metadata=[]), UUID, SuccessfulTask.path),
    "a result that is text": (record_value(result="a"), UUID, SuccessfulTask.path),
    "a return code that is text": (record_value(result={"retcode": "a"}), UUID, SuccessfulTask.path),
    "a retval that is a list": (record_value(result={"retval": []}), UUID, SuccessfulTask.path),
}


@pytest.mark.parametrize(("value", "uuid", "entrypoint"), REJECTED.values(), ids=REJECTED)
def test_poison_message_is_rejected_and_the_next_one_is_handled(
    value: Any, uuid: Any, entrypoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """C12, C13, D3: undecodable input of any kind."""
    assert consume(value) == 2
    assert SuccessfulTask.handled == ["next"]
    ((kmsg, result),) = RecordingController.errors
    assert kmsg.entrypoint == entrypoint
    assert isinstance(kmsg.uuid, str)
    assert kmsg.uuid
    assert uuid is ANY or kmsg.uuid == uuid
    assert (result.uuid, result.retcode, result.stderr) == (kmsg.uuid, 400, "Failed to load message")
    assert (result.retval["error"]["name"], result.retval["error"]["msgid"]) == ("ValidationError", "ERR-04413")
    (record,) = [record for record in records(caplog) if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("RecordingController.ImportError: Failed to load data from kafka: ")
    assert record.error["message"] == "Failed to load message"  # type: ignore[attr-defined]
    assert hasattr(record, "kafka_raw_data")


def test_rejected_message_is_logged_with_its_data_and_reasons(caplog: pytest.LogCaptureFixture) -> None:
    """C13"""
    raw = record_value(uuid=5, params=None).decode()
    result = RecordingController.run(raw)
    (record,) = records(caplog)
    reasons = {"uuid": ["Not a valid string."], "params": ["Field may not be null."]}
    assert record.getMessage().endswith(": ERR-04413: Failed to load message")
    assert record.kafka_raw_data == raw  # type: ignore[attr-defined]
    assert record.error == result.retval["error"]  # type: ignore[attr-defined]
    assert result.retval["error"]["extra"] == reasons
    assert result.retval["error"]["stack"].startswith("Traceback")


def test_rejected_message_returns_the_value_of_its_onerror_hook() -> None:
    """C13"""

    class ReturningController(Controller):
        @classmethod
        def onerror(cls, kmsg: Message, result: Result) -> Any:
            return "returned", result.retcode

    assert ReturningController.run("nonsense") == ("returned", 400)


def test_raising_onerror_hook_of_a_rejected_message_is_contained(caplog: pytest.LogCaptureFixture) -> None:
    """C13: the hook is not called a second time."""
    calls: list[str] = []

    class RaisingController(Controller):
        @classmethod
        def onerror(cls, kmsg: Message, result: Result) -> Any:
            calls.append(kmsg.uuid)
            raise RuntimeError("hook")

    result = RaisingController.run(record_value(entrypoint=5).decode())
    assert (calls, result.uuid, result.retcode, result.stderr) == ([UUID], UUID, 500, "hook")
    assert records(caplog)[-1].exc_info


ACCEPTED = {
    "NaN": b'{"uuid": "x", "entrypoint": "%s", "params": {"n": NaN, "i": -Infinity}}',
    "double keys": b'{"uuid": "y", "uuid": "x", "entrypoint": "%s"}',
    "a lone surrogate": b'{"uuid": "x", "entrypoint": "%s", "params": {"s": "\\ud800"}}',
    "unknown keys": b'{"uuid": "x", "entrypoint": "%s", "new": {}, "result": {"new": 1}}',
    "nulls in the result": b'{"uuid": "x", "entrypoint": "%s", "result": {"uuid": null, "retcode": null}}',
    "no result": b'{"uuid": "x", "entrypoint": "%s", "result": null}',
}


@pytest.mark.parametrize("value", ACCEPTED.values(), ids=ACCEPTED)
def test_unusual_input_accepted_by_earlier_versions_still_runs(value: bytes) -> None:
    """C14"""
    assert consume(value % SuccessfulTask.path.encode()) == 2
    assert (SuccessfulTask.handled, RecordingController.errors) == (["x", "next"], [])


def test_message_with_a_lone_surrogate_uuid_runs() -> None:
    """C14: the running file contains the uuid in escaped form."""
    consume(record_value(uuid="\ud800"))
    assert SuccessfulTask.handled == ["\ud800", "next"]


# -- unknown entrypoints -----------------------------------------------------------------------------------------------


def test_unknown_entrypoint_fails_as_published(caplog: pytest.LogCaptureFixture) -> None:
    """C1b"""
    assert consume(message("shop.Pya").dumps().encode()) == 2
    ((kmsg, result),) = RecordingController.errors
    assert (kmsg.uuid, result.uuid, result.retcode) == (UUID, UUID, 400)
    assert result.stderr == "Entrypoint 'shop.Pya' not registred"
    extra = result.retval["error"]["extra"]
    assert (extra["uuid"], extra["entrypoint"], SuccessfulTask.path in extra["allowed"]) == (UUID, "shop.Pya", True)
    assert f"RecordingController.Failed: shop.Pya[{UUID}]: Entrypoint 'shop.Pya' not registred" in lines(caplog)
    assert SuccessfulTask.handled == ["next"]


def test_each_unknown_entrypoint_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """C1b"""
    for name in ("shop.Twice", "shop.Twice", "shop.Once"):
        Controller.run(message(name).dumps())
    warnings = [record for record in records(caplog) if record.levelno == logging.WARNING]
    assert {record.name for record in warnings} == {"kser.controller"}
    assert [record.getMessage().split(":")[0] for record in warnings] == [
        "unknown entrypoint 'shop.Twice'",
        "unknown entrypoint 'shop.Once'",
    ]
    assert "@oregistry.subscribe" in warnings[0].getMessage()


# -- entrypoints that misbehave ----------------------------------------------------------------------------------------

MISBEHAVIOUR = {
    "returns text": ({"action": "text"}, 500, "'str' object has no attribute 'retcode'"),
    "returns a dict": ({"action": {"a": 1}}, 500, "'dict' object has no attribute 'retcode'"),
    "raises": ({"action": "raise"}, 500, "raised"),
    "exits": ({"action": "exit"}, 500, "SystemExit(1) ended the task"),
    "raises, and so does its hook": ({"action": "raise", "onerror": True}, 500, "onerror raised"),
}


@pytest.mark.parametrize(("params", "retcode", "stderr"), MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_misbehaving_entrypoint_fails_and_the_consumer_continues(
    params: dict[str, Any], retcode: int, stderr: str
) -> None:
    """C6, C8, C16"""
    assert consume(message(MisbehavingTask, params=params).dumps().encode()) == 2
    ((_, result),) = RecordingController.errors
    assert (result.uuid, result.retcode, result.stderr) == (UUID, retcode, stderr)
    assert SuccessfulTask.handled == ["next"]
    assert Path(os.environ["RUNNING_FILE"]).read_text() == ""


# -- onmessage that misbehaves -----------------------------------------------------------------------------------------


def test_onmessage_that_returns_none_fails_the_received_message() -> None:
    """C14"""

    class NoneController(RecordingController):
        @classmethod
        def onmessage(cls, kmsg: Message) -> None:
            return None

    assert consume(record_value(), registry=NoneController) == 2
    kmsg, result = RecordingController.errors[0]
    assert (kmsg.uuid, kmsg.entrypoint) == (UUID, SuccessfulTask.path)
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 400, "onmessage returned None")


def test_onmessage_that_raises_fails_the_received_message() -> None:
    """C14"""

    class RaisingController(RecordingController):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            raise ValueError("no")

    consume(record_value(), registry=RaisingController)
    kmsg, result = RecordingController.errors[0]
    assert (kmsg.entrypoint, result.uuid, result.retcode) == (SuccessfulTask.path, UUID, 400)
    assert result.stderr == "onmessage failed: no"


@pytest.mark.parametrize("value", [True, "text", {"uuid": "1"}])
def test_onmessage_that_returns_no_message_fails_the_received_message(value: Any) -> None:
    """C14: ``Controller.run`` raises nothing but interrupts."""

    class ReturningController(RecordingController):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Any:
            return value

    result = ReturningController.run(record_value().decode())
    assert (result.uuid, result.retcode >= 400) == (UUID, True)


def test_transport_that_loads_none_gives_a_failed_result() -> None:
    """C13: ``Controller.run`` raises nothing but interrupts."""

    class NoneTransport:
        @classmethod
        def loads(cls, data: Any) -> None:
            return None

    class ControllerWithTransport(RecordingController):
        TRANSPORT = NoneTransport

    assert ControllerWithTransport.run(record_value().decode()).retcode == 400


# -- an unusable LOCK_PATH ---------------------------------------------------------------------------------------------


def control_files(folder: str | Path) -> dict[str, str]:
    """Return the environment variables of the control files in a folder."""
    names = {"RUNNING_FILE": "run", "LOCK_FILE": "pause", "TERMINATE_FILE": "terminate"}
    return {
        "LOCK_PATH": str(folder),
        **{variable: os.path.join(folder, f"kser-{name}.lock") for variable, name in names.items()},
    }


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_invalid_lock_path_is_logged_once_and_messages_are_handled(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """C10"""
    folder = tmp_path / "locks"
    if kind == "a file":
        folder.touch()
    for variable, path in control_files(folder).items():
        monkeypatch.setenv(variable, path)
    assert consume(record_value(), record_value()) == 3
    assert len(SuccessfulTask.handled) == 3
    (line,) = lines(caplog, logging.WARNING)
    assert str(folder) in line
    assert "LOCK_PATH" in line


#: A consumer that runs as the user nobody if the tests run as root, because root needs no permission.
UNPRIVILEGED_PROGRAM = """
import logging, os, sys
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from tests.consumer.test_poison_messages import Controller, SuccessfulTask, record_value
Controller.register(SuccessfulTask.path, SuccessfulTask)
if os.geteuid() == 0:
    os.setuid(65534)
InMemoryBroker.at("").send("dice", record_value())
InMemoryBroker.at("").send("dice", record_value())
consumer = Consumer({}, ["dice"])
print(consumer.run_until_idle(), len(SuccessfulTask.handled))
consumer.close()
"""


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["not writable", "no access"])
def test_lock_path_without_permission_is_logged_once_and_messages_are_handled(mode: int) -> None:
    """C10"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, mode)
        done = run_python(UNPRIVILEGED_PROGRAM, COVERAGE_PROCESS_CONFIG=None, **control_files(folder))
    assert done.stdout.split() == ["2", "2"], done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("WARNING")
    assert folder in line
    assert "LOCK_PATH" in line
