"""Tests of bad input: each kind ends in a failed result, one log line and the next message.

What producers do with bad input of theirs is in the modules of the transports.
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


class Good(Entrypoint):
    handled: list[str] = []  # noqa: RUF012  emptied after each test

    def run(self) -> Result:
        self.handled.append(self.uuid)
        return ok_result("good")


class Bad(Entrypoint):
    """Does at one step of its life what its params say."""

    def run(self) -> Any:
        what = self.params["what"]
        if what == "exit":
            raise SystemExit(1)
        if what == "raise":
            raise ValueError("raised")
        return what

    def onerror(self, result: Result) -> Result:
        if self.params.get("onerror"):
            raise RuntimeError("onerror raised")
        return result


class Hooked(Controller):
    """Notes what its hooks get."""

    errors: list[tuple[Message, Result]] = []  # noqa: RUF012  emptied after each test

    @classmethod
    def onerror(cls, kmsg: Message, result: Result) -> Result:
        cls.errors.append((kmsg, result))
        return result


@pytest.fixture(autouse=True)
def registered(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    for cls in (Good, Bad):
        Controller.register(cls.path, cls)
    caplog.set_level(logging.INFO, "kser")
    yield
    InMemoryBroker.reset()
    Good.handled.clear()
    Hooked.errors.clear()


def consume(*values: Any, registry: Any = Hooked) -> int | None:
    """Have a consumer handle ``values`` and a good message behind them; returns the offset that it committed."""
    bus = InMemoryBroker.at("")
    for value in (*values, message(Good, uuid="next").dumps().encode()):
        bus.send("dice", value)
    consumer = Consumer({"enable_auto_commit": False}, ["dice"])
    consumer.REGISTRY = registry
    consumer.run_until_idle()
    consumer.close()
    return committed()


def wire(**changes: Any) -> bytes:
    """A good message with changes; None takes a field away."""
    data = {**json.loads(message(Good).dumps()), **changes}
    return json.dumps({key: value for key, value in data.items() if value is not ...}).encode()


ANY = object()

#: What is refused, then the uuid and the entrypoint that the hook sees (ANY: a new one).
REFUSED = {
    "not UTF-8": (b'{"uuid": "\xff"}', ANY, ""),
    "UTF-8 with a byte order mark": (b"\xef\xbb\xbf" + wire(), ANY, ""),
    "not JSON": (b"hello", ANY, ""),
    "cut off": (wire()[:-1], ANY, ""),
    "empty": (b"", ANY, ""),
    "a null value": (None, ANY, ""),
    "JSON null": (b"null", ANY, ""),
    "a list": (b"[]", ANY, ""),
    "a number": (b"5", ANY, ""),
    "an empty object": (b"{}", ANY, ""),
    "5 MB of brackets": (b"[" * 5_000_000, ANY, ""),
    "a number of 5000 digits": (wire(params={"n": 0}).replace(b'"n": 0', b'"n": 1' + b"0" * 5000), ANY, ""),
    "no uuid": (wire(uuid=...), ANY, Good.path),
    "a null uuid": (wire(uuid=None), ANY, Good.path),
    "a uuid that is a number": (wire(uuid=5), ANY, Good.path),
    "a uuid that is a list": (wire(uuid=["a"]), ANY, Good.path),
    "no entrypoint": (wire(entrypoint=...), UUID, ""),
    "a null entrypoint": (wire(entrypoint=None), UUID, ""),
    "an entrypoint that is a number": (wire(entrypoint=5), UUID, ""),
    "params that are text": (wire(params="a"), UUID, Good.path),
    "params that are null": (wire(params=None), UUID, Good.path),
    "metadata that is a list": (wire(metadata=[]), UUID, Good.path),
    "a result that is text": (wire(result="a"), UUID, Good.path),
    "a return code that is text": (wire(result={"retcode": "a"}), UUID, Good.path),
    "a retval that is a list": (wire(result={"retval": []}), UUID, Good.path),
}


@pytest.mark.parametrize(("value", "uuid", "entrypoint"), REFUSED.values(), ids=REFUSED)
def test_poison_message_is_rejected_and_the_next_one_is_handled(
    value: Any, uuid: Any, entrypoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """C12, C13, D3: undecodable input of any kind."""
    assert consume(value) == 2
    assert Good.handled == ["next"]
    ((kmsg, result),) = Hooked.errors
    assert kmsg.entrypoint == entrypoint
    assert isinstance(kmsg.uuid, str)
    assert kmsg.uuid
    assert uuid is ANY or kmsg.uuid == uuid
    assert (result.uuid, result.retcode, result.stderr) == (kmsg.uuid, 400, "Failed to load message")
    assert (result.retval["error"]["name"], result.retval["error"]["msgid"]) == ("ValidationError", "ERR-04413")
    (record,) = [record for record in records(caplog) if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("Hooked.ImportError: Failed to load data from kafka: ")
    assert record.error["message"] == "Failed to load message"  # type: ignore[attr-defined]
    assert hasattr(record, "kafka_raw_data")


def test_rejected_message_is_logged_with_its_data_and_reasons(caplog: pytest.LogCaptureFixture) -> None:
    """C13"""
    raw = wire(uuid=5, params=None).decode()
    result = Hooked.run(raw)
    (record,) = records(caplog)
    reasons = {"uuid": ["Not a valid string."], "params": ["Field may not be null."]}
    assert record.getMessage().endswith(": ERR-04413: Failed to load message")
    assert record.kafka_raw_data == raw  # type: ignore[attr-defined]
    assert record.error == result.retval["error"]  # type: ignore[attr-defined]
    assert result.retval["error"]["extra"] == reasons
    assert result.retval["error"]["stack"].startswith("Traceback")


def test_rejected_message_returns_the_value_of_its_onerror_hook() -> None:
    """C13"""

    class Answering(Controller):
        @classmethod
        def onerror(cls, kmsg: Message, result: Result) -> Any:
            return "answer", result.retcode

    assert Answering.run("nonsense") == ("answer", 400)


def test_raising_onerror_hook_of_a_rejected_message_is_contained(caplog: pytest.LogCaptureFixture) -> None:
    """C13: no hook is called again."""
    calls: list[str] = []

    class Raising(Controller):
        @classmethod
        def onerror(cls, kmsg: Message, result: Result) -> Any:
            calls.append(kmsg.uuid)
            raise RuntimeError("hook")

    result = Raising.run(wire(entrypoint=5).decode())
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
    assert consume(value % Good.path.encode()) == 2
    assert (Good.handled, Hooked.errors) == (["x", "next"], [])


def test_message_with_a_lone_surrogate_uuid_runs() -> None:
    """C14: the running file shows it escaped."""
    consume(wire(uuid="\ud800"))
    assert Good.handled == ["\ud800", "next"]


# -- entrypoints that nobody knows -------------------------------------------------------------------------------------


def test_unknown_entrypoint_fails_as_published(caplog: pytest.LogCaptureFixture) -> None:
    """C1b"""
    assert consume(message("shop.Pya").dumps().encode()) == 2
    ((kmsg, result),) = Hooked.errors
    assert (kmsg.uuid, result.uuid, result.retcode) == (UUID, UUID, 400)
    assert result.stderr == "Entrypoint 'shop.Pya' not registred"
    extra = result.retval["error"]["extra"]
    assert (extra["uuid"], extra["entrypoint"], Good.path in extra["allowed"]) == (UUID, "shop.Pya", True)
    assert f"Hooked.Failed: shop.Pya[{UUID}]: Entrypoint 'shop.Pya' not registred" in lines(caplog)
    assert Good.handled == ["next"]


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
    "returns text": ({"what": "text"}, 500, "'str' object has no attribute 'retcode'"),
    "returns a dict": ({"what": {"a": 1}}, 500, "'dict' object has no attribute 'retcode'"),
    "raises": ({"what": "raise"}, 500, "raised"),
    "exits": ({"what": "exit"}, 500, "SystemExit(1) ended the task"),
    "raises, and so does its hook": ({"what": "raise", "onerror": True}, 500, "onerror raised"),
}


@pytest.mark.parametrize(("params", "retcode", "stderr"), MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_misbehaving_entrypoint_fails_and_the_consumer_continues(
    params: dict[str, Any], retcode: int, stderr: str
) -> None:
    """C6, C8, C16"""
    assert consume(message(Bad, params=params).dumps().encode()) == 2
    ((_, result),) = Hooked.errors
    assert (result.uuid, result.retcode, result.stderr) == (UUID, retcode, stderr)
    assert Good.handled == ["next"]
    assert Path(os.environ["RUNNING_FILE"]).read_text() == ""


# -- onmessage that misbehaves -----------------------------------------------------------------------------------------


def test_onmessage_that_returns_none_fails_the_received_message() -> None:
    """C14"""

    class Forgetful(Hooked):
        @classmethod
        def onmessage(cls, kmsg: Message) -> None:
            return None

    assert consume(wire(), registry=Forgetful) == 2
    kmsg, result = Hooked.errors[0]
    assert (kmsg.uuid, kmsg.entrypoint) == (UUID, Good.path)
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 400, "onmessage returned None")


def test_onmessage_that_raises_fails_the_received_message() -> None:
    """C14"""

    class Raising(Hooked):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            raise ValueError("no")

    consume(wire(), registry=Raising)
    kmsg, result = Hooked.errors[0]
    assert (kmsg.entrypoint, result.uuid, result.retcode) == (Good.path, UUID, 400)
    assert result.stderr == "onmessage failed: no"


@pytest.mark.parametrize("answer", [True, "text", {"uuid": "1"}])
def test_onmessage_that_returns_no_message_fails_the_received_message(answer: Any) -> None:
    """C14: `Controller.run` raises nothing but interrupts."""

    class Odd(Hooked):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Any:
            return answer

    result = Odd.run(wire().decode())
    assert (result.uuid, result.retcode >= 400) == (UUID, True)


def test_transport_that_loads_none_gives_a_failed_result() -> None:
    """C13: `Controller.run` raises nothing but interrupts."""

    class Nothing:
        @classmethod
        def loads(cls, data: Any) -> None:
            return None

    class Reading(Hooked):
        TRANSPORT = Nothing

    assert Reading.run(wire().decode()).retcode == 400


# -- a machine that does not play along --------------------------------------------------------------------------------


def set_lock_path(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("LOCK_PATH", str(folder))
    for variable, name in (("RUNNING_FILE", "run"), ("LOCK_FILE", "pause"), ("TERMINATE_FILE", "terminate")):
        monkeypatch.setenv(variable, str(folder / f"kser-{name}.lock"))


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_invalid_lock_path_is_logged_once_and_messages_are_handled(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """C10"""
    folder = tmp_path / "locks"
    if kind == "a file":
        folder.touch()
    set_lock_path(monkeypatch, folder)
    assert consume(wire(), wire()) == 3
    assert len(Good.handled) == 3
    (line,) = lines(caplog, logging.WARNING)
    assert str(folder) in line
    assert "LOCK_PATH" in line


NOBODY = """
import logging, os, sys
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from tests.consumer.test_poison_messages import Good, Controller, wire
Controller.register(Good.path, Good)
if os.geteuid() == 0:
    os.setuid(65534)
InMemoryBroker.at("").send("dice", wire())
InMemoryBroker.at("").send("dice", wire())
consumer = Consumer({}, ["dice"])
print(consumer.run_until_idle(), len(Good.handled))
consumer.close()
"""


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["not writable", "not to be entered"])
def test_lock_path_without_permission_is_logged_once_and_messages_are_handled(mode: int) -> None:
    """C10"""
    names = {"RUNNING_FILE": "run", "LOCK_FILE": "pause", "TERMINATE_FILE": "terminate"}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, mode)
        files = {variable: os.path.join(folder, f"kser-{name}.lock") for variable, name in names.items()}
        done = run_python(NOBODY, LOCK_PATH=folder, COVERAGE_PROCESS_CONFIG=None, **files)
    assert done.stdout.split() == ["2", "2"], done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("WARNING")
    assert folder in line
    assert "LOCK_PATH" in line
