"""Tests of the controller: raw bytes to entrypoint to result. Behaviour page, section 4."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser.controller import BaseController, BaseProducer, Controller
from kser.entry import Entrypoint
from kser.schemas import Message
from tests.support import UUID, SuccessfulError, lines, message, ok_result, record_of, recording_controller, records

PATH = "tests.test_controller.Greet"
LABEL = f"{PATH}[{UUID}]"


class Greet(Entrypoint):
    """Entrypoint that succeeds, or returns the value of the parameter ``returns``."""

    def run(self) -> Any:
        return self.params.get("returns") or ok_result("hello")


class ReturnCode(Entrypoint):
    """Entrypoint that returns the code of its parameter ``code``."""

    def run(self) -> Result:
        return Result(retcode=self.params["code"], stderr="code")


class ShowRunningFile(Entrypoint):
    def run(self) -> Result:
        return ok_result(Path(os.environ["RUNNING_FILE"]).read_text())


class Interrupted(Entrypoint):
    def run(self) -> Result:
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def registered(caplog: pytest.LogCaptureFixture) -> None:
    """Register the entrypoints of this module, and log everything."""
    for cls in (Greet, ReturnCode, ShowRunningFile, Interrupted):
        Controller.register(cls.path, cls)
    caplog.set_level(logging.DEBUG, "kser")
    caplog.clear()


# -- registration ------------------------------------------------------------------------------------------------------


def test_class_is_registered_under_any_name(caplog: pytest.LogCaptureFixture) -> None:
    assert Controller.register(("a", 1), Greet) is None  # type: ignore[func-returns-value]
    assert Controller.ENTRYPOINTS["a", 1] is Greet
    assert lines(caplog) == ["Controller.Registered: ('a', 1)"]


def test_registering_a_name_again_replaces_its_class() -> None:
    Controller.register("name", Greet)
    Controller.register("name", ReturnCode)
    assert Controller.ENTRYPOINTS["name"] is ReturnCode


@pytest.mark.parametrize("value", [int, "Greet", None, Greet(), lambda: None])
def test_only_entrypoint_classes_are_registered(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """C17"""
    with pytest.raises(ValidationError) as caught:
        Controller.register("name", value)
    assert caught.value.message == "Invalid type for entry 'name', MUST implement kser.entry.Entrypoint"
    assert caught.value.extra == {"entrypoint": "name"}
    assert lines(caplog) == []


def test_entrypoints_are_shared_unless_a_subclass_has_its_own() -> None:
    """B19"""

    class SharedRegistry(Controller):
        pass

    class OwnRegistry(Controller):
        ENTRYPOINTS = {}  # noqa: RUF012  as documented

    SharedRegistry.register("shared", Greet)
    OwnRegistry.register("own", Greet)
    assert Controller.ENTRYPOINTS["shared"] is Greet
    assert "own" not in Controller.ENTRYPOINTS


# -- a message that succeeds -------------------------------------------------------------------------------------------


def test_task_log_lines_match_the_published_ones(caplog: pytest.LogCaptureFixture) -> None:
    raw = message(Greet).dumps()
    Controller.run(raw)
    assert [(record.name, record.levelname, record.getMessage()) for record in records(caplog)] == [
        ("kser.controller", "DEBUG", f"Controller.ReceivedFromKafka: {raw}"),
        ("kser.controller", "DEBUG", f"Controller.ReceivedMessage {LABEL}"),
        ("kser.entry", "DEBUG", f"Greet.PreRun: {LABEL}"),
        ("kser.entry", "DEBUG", f"Greet.Run: {LABEL}"),
        ("kser.entry", "DEBUG", f"Greet.PostRun: {LABEL}"),
        ("kser.entry", "INFO", f"Greet.Success: {LABEL}: hello"),
        ("kser.controller", "INFO", f"Controller.Success: {LABEL}: hello"),
    ]


def test_log_records_show_the_final_result(caplog: pytest.LogCaptureFixture) -> None:
    """C19"""
    Controller.run(message(Greet, metadata={"m": 1}).dumps())
    record = record_of(caplog, "Controller.Success")
    assert record.kmsg["result"]["stdout"] == "hello"  # type: ignore[attr-defined]
    assert record.kmsg["metadata"] == {"m": 1}  # type: ignore[attr-defined]
    assert record.kresult["stdout"] == "hello"  # type: ignore[attr-defined]


def test_raw_bytes_are_logged_as_bytes(caplog: pytest.LogCaptureFixture) -> None:
    raw = message(Greet).dumps().encode()
    assert Controller.run(raw).stdout == "hello"
    assert lines(caplog)[0] == f"Controller.ReceivedFromKafka: {raw!r}"


def test_controller_runs_through_an_instance_and_a_subclass(caplog: pytest.LogCaptureFixture) -> None:
    class ShopController(Controller):
        pass

    assert ShopController().run(message(Greet).dumps()).stdout == "hello"
    assert lines(caplog)[-1] == f"ShopController.Success: {LABEL}: hello"


def test_running_file_shows_the_message_and_is_then_empty() -> None:
    assert Controller.run(message(ShowRunningFile).dumps()).stdout == f"{ShowRunningFile.path}[{UUID}]"
    assert Path(os.environ["RUNNING_FILE"]).read_text() == ""


def test_hooks_are_called_with_keywords_and_their_values_returned() -> None:
    class Hooked(Controller):
        @classmethod
        def _onsuccess(cls, kmsg: Any, result: Any) -> Any:
            return "trigger", super()._onsuccess(kmsg=kmsg, result=result)

        @classmethod
        def onsuccess(cls, kmsg: Any, result: Any) -> Any:
            return result.stdout

    assert Hooked.run(message(Greet).dumps()) == ("trigger", "hello")


def test_onmessage_may_replace_the_message() -> None:
    class Redirect(Controller):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            return message(ReturnCode, uuid="other", params={"code": 7})

    result = Redirect.run(message(Greet).dumps())
    assert (result.uuid, result.retcode) == ("other", 7)


def test_every_attempt_starts_from_a_fresh_object() -> None:
    """C7"""

    class CountRuns(Entrypoint):
        runs = 0

        def run(self) -> Result:
            self.runs += 1
            return Result(retcode=self.runs, stdout=f"run {self.runs}", stderr=self.result.stderr)

    Controller.register(CountRuns.path, CountRuns)
    raw = message(CountRuns).dumps()
    first, second = Controller.run(raw), Controller.run(raw)
    assert (first.stdout, first.retcode, first.stderr) == ("run 1", 1, "")
    assert (second.stdout, second.retcode, second.stderr) == ("run 1", 1, "")


# -- a message that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1, 299, 300, 500])
def test_entry_and_controller_agree_on_success_and_failure(code: int, caplog: pytest.LogCaptureFixture) -> None:
    """C3"""
    assert Controller.run(message(ReturnCode, params={"code": code}).dumps()).retcode == code
    assert lines(caplog, logging.INFO) == [
        f"ReturnCode.Failed: {ReturnCode.path}[{UUID}]: code",
        f"Controller.Failed: {ReturnCode.path}[{UUID}]: code",
    ]
    assert not hasattr(record_of(caplog, "Controller.Failed"), "error")


def test_negative_return_code_is_a_success() -> None:
    """C3"""
    assert Controller.run(message(ReturnCode, params={"code": -1}).dumps()).retcode == 0


def test_failed_incoming_result_fails_the_message_after_it_ran(caplog: pytest.LogCaptureFixture) -> None:
    """C3"""
    result = Controller.run(message(Greet, result=Result(retcode=500, stderr="old")).dumps())
    assert (result.stdout, result.retcode) == ("hello", 500)
    assert [line.split(":")[0] for line in lines(caplog, logging.INFO)] == ["Greet.Failed", "Controller.Failed"]


def test_entrypoint_that_cannot_be_built_fails_its_message() -> None:
    class Unbuildable(Greet):
        @classmethod
        def from_Message(cls, kmsg: Message) -> Any:
            raise LookupError("not found")

    Controller.register(Unbuildable.path, Unbuildable)
    result = Controller.run(message(Unbuildable).dumps())
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 500, "not found")


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (0, "0"), ("", "")])
def test_falsy_hook_value_is_a_failure_and_is_returned(
    value: Any, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    class FalsyHookValue(Greet):
        def onsuccess(self, result: Result) -> Any:
            return value

    Controller.register(FalsyHookValue.path, FalsyHookValue)
    assert Controller.run(message(FalsyHookValue).dumps()) == value
    record = record_of(caplog, "Controller.Failed")
    assert record.getMessage() == f"Controller.Failed: {FalsyHookValue.path}[{UUID}]: {shown}"
    assert record.kresult == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["text", 5, {"a": 1}])
def test_truthy_hook_value_that_is_no_result_gives_a_failed_result(value: Any) -> None:
    """C16"""

    class NoResult(Greet):
        def onsuccess(self, result: Result) -> Any:
            return value

    Controller.register(NoResult.path, NoResult)
    result = Controller.run(message(NoResult).dumps())
    assert (result.uuid, result.retcode) == (UUID, 500)
    assert type(value).__name__ in result.stderr


@pytest.mark.parametrize("hook", ["onsuccess", "onerror"])
def test_raising_hook_is_merged_and_no_hook_is_called_again(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    """C13, C16"""
    calls: list[str] = []

    def raising(cls: Any, kmsg: Any, result: Any) -> Any:
        calls.append(hook)
        raise RuntimeError("hook")

    cls = type("Hooked", (Controller,), {hook: classmethod(raising)})
    kmsg = message(
        ReturnCode, params={"code": 0 if hook == "onsuccess" else 3}, result=Result(uuid="r", retval={"kept": 1})
    )
    result = cls.run(kmsg.dumps())  # type: ignore[attr-defined]
    assert (result.uuid, result.retcode, result.stderr) == ("r", 500, "hook")
    assert result.retval["kept"] == 1
    assert calls == [hook]
    last = records(caplog)[-1]
    assert (last.levelname, bool(last.exc_info)) == ("ERROR", True)
    assert last.getMessage() == f"Hooked.Failed: {ReturnCode.path}[{UUID}]: a hook raised: hook"


def test_raising_hook_without_a_result_creates_a_failed_result() -> None:
    class FalsyHookValue(Greet):
        def onsuccess(self, result: Result) -> Any:
            return None

    class Hooked(Controller):
        @classmethod
        def onerror(cls, kmsg: Any, result: Any) -> Any:
            raise RuntimeError(f"hook got {result}")

    Hooked.register(FalsyHookValue.path, FalsyHookValue)
    result = Hooked.run(message(FalsyHookValue).dumps())
    assert (result.uuid, result.stderr) == (UUID, "hook got None")


def test_interrupt_propagates_and_clears_the_running_file(caplog: pytest.LogCaptureFixture) -> None:
    """C8"""
    with pytest.raises(KeyboardInterrupt):
        Controller.run(message(Interrupted).dumps())
    assert Path(os.environ["RUNNING_FILE"]).read_text() == ""
    assert not any("Controller.Failed" in line or "Controller.Success" in line for line in lines(caplog))


# -- producers ---------------------------------------------------------------------------------------------------------


def test_producer_sends_with_its_underscored_method() -> None:
    class EchoProducer(BaseProducer):
        def _send(self, topic: str, kmsg: Message, timeout: float = 60) -> Any:
            return topic, kmsg, timeout

    kmsg = message("x")
    assert EchoProducer().send("dice", kmsg) == ("dice", kmsg, 60)
    assert EchoProducer().send("dice", kmsg, 5) == ("dice", kmsg, 5)


def test_base_producer_sends_nothing() -> None:
    assert BaseProducer().send("dice", message("x")) is None
    assert BaseProducer().close() is None  # type: ignore[func-returns-value]
    assert issubclass(BaseProducer, BaseController)


@pytest.mark.parametrize("method", ["__init__", "execute"])
def test_exception_with_code_0_counts_as_success(method: str) -> None:
    """As in 0.8.27: its code is the return code of the result, and 0 means success everywhere."""

    def raise_error(*_args: Any, **_kwargs: Any) -> Any:
        raise SuccessfulError("nothing to do")

    events: list[Any] = []
    controller = recording_controller(events)
    controller.register("raising", type("Raising", (Entrypoint,), {method: raise_error}))
    assert controller.run(message("raising").dumps()).retcode == 0
    assert events == ["controller: onsuccess"]
