"""Tests of the entrypoint and its life cycle. Behaviour page, section 3."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import pytest
from cdumay_error.types import NotImplemented as NotImplementedYet
from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import log_lines
from kser.entry import Entrypoint
from kser.schemas import Message
from tests.support import UUID, lines, ok_result, record_of, records

PATH = "tests.test_entry.Greet"
LABEL = f"{PATH}[{UUID}]"


class Greet(Entrypoint):
    """Entrypoint that greets ``name``, or returns the value of the parameter ``returns``."""

    REQUIRED_FIELDS = ("name",)

    def run(self) -> Any:
        return self.params.get("returns", ok_result(f"hello {self.params['name']}"))


class Raising(Entrypoint):
    """Entrypoint that raises the exception of its parameter ``error``."""

    def run(self) -> Any:
        raise self.params["error"]


def greet(**params: Any) -> Greet:
    return Greet(uuid=UUID, params={"name": "world", **params})


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kser")


# -- objects -----------------------------------------------------------------------------------------------------------


def test_constructor_arguments_are_stored_as_is() -> None:
    params, result, metadata = {"a": 1}, Result(), {"m": 1}
    entry = Entrypoint(UUID, params, result, metadata)
    assert (entry.uuid, entry.params, entry.result, entry.metadata) == (UUID, params, result, metadata)
    assert (entry.params is params, entry.result is result, entry.metadata is metadata) == (True,) * 3


def test_constructor_without_arguments_creates_fresh_values() -> None:
    one, two = Entrypoint(), Entrypoint()
    assert one.uuid != two.uuid
    assert one.params is not two.params
    assert (one.params, one.metadata, one.result.uuid) == ({}, {}, one.uuid)


def test_path_is_that_of_the_class_everywhere() -> None:
    """C18"""

    class Local(Entrypoint):
        pass

    assert Greet.path == Greet().path == PATH
    assert Local.path == "tests.test_entry.Local"
    with pytest.raises(AttributeError):
        Greet.path = "other"  # type: ignore[misc]


def test_user_path_overrides_the_path_of_instances() -> None:
    """C18"""

    class PathAttribute(Entrypoint):
        path = "over.the.Hills"

    class PathSetInPostinit(Entrypoint):
        def postinit(self) -> None:
            self.path = "far.Away"

    assert (PathAttribute().path, PathAttribute.path) == ("over.the.Hills", "tests.test_entry.PathAttribute")
    assert PathSetInPostinit().path == "far.Away"
    assert PathSetInPostinit().to_Message().entrypoint == "tests.test_entry.PathSetInPostinit"


def test_label_contains_the_action_if_given() -> None:
    entry = greet()
    assert (entry.label(), entry.label("x"), entry.label("")) == (
        f"Greet[{UUID}]",
        f"Greet[{UUID}] - x",
        f"Greet[{UUID}]",
    )


def test_message_shares_the_values_of_its_entry() -> None:
    entry = greet()
    kmsg = entry.to_Message()
    assert (kmsg.uuid, kmsg.entrypoint) == (UUID, PATH)
    assert (kmsg.params is entry.params, kmsg.result is entry.result) == (True, True)
    other = Result()
    assert entry.to_Message(result=other).result is other


def test_entry_shares_the_values_of_its_message() -> None:
    """C19"""
    kmsg = Message(UUID, "anything", {"a": 1}, Result(), {"m": 1})
    entry = Greet.from_Message(kmsg)
    assert entry.uuid == UUID
    assert (entry.params is kmsg.params, entry.result is kmsg.result, entry.metadata is kmsg.metadata) == (True,) * 3


def test_entry_is_built_from_a_message_by_keywords() -> None:
    class KeywordOnly(Entrypoint):
        def __init__(self, *, uuid: Any, params: Any, result: Any, metadata: Any) -> None:
            super().__init__(uuid, params, result, metadata)

    assert KeywordOnly.from_Message(Message(UUID, "x")).uuid == UUID


def test_required_parameter_must_be_present_and_may_be_none() -> None:
    Greet(params={"name": None}).check_required_params()
    with pytest.raises(ValidationError) as caught:
        Greet().check_required_params()
    assert (caught.value.message, caught.value.extra) == ("Missing parameter: name", {})


# -- log ---------------------------------------------------------------------------------------------------------------


def test_log_line_starts_with_name_path_and_uuid(caplog: pytest.LogCaptureFixture) -> None:
    assert greet().log("100 %s", logging.WARNING, extra={"colour": "red"}) is None  # type: ignore[func-returns-value]
    record = record_of(caplog, f"Greet.MESSAGE: {LABEL}: 100 %s")
    assert (record.name, record.levelno, record.colour) == ("kser.entry", logging.WARNING, "red")  # type: ignore[attr-defined]


def test_log_line_is_formatted_with_its_arguments(caplog: pytest.LogCaptureFixture) -> None:
    """C2"""
    Greet(uuid="50%d").log("%s is %d %%", logging.INFO, "x", 5)
    assert lines(caplog) == [f"Greet.MESSAGE: {PATH}[50%d]: x is 5 %"]


# -- success -----------------------------------------------------------------------------------------------------------


def test_successful_execution_logs_the_published_lines(caplog: pytest.LogCaptureFixture) -> None:
    greet().execute()
    assert [(record.levelname, record.getMessage()) for record in records(caplog)] == [
        ("DEBUG", f"Greet.PreRun: {LABEL}"),
        ("DEBUG", f"Greet.Run: {LABEL}"),
        ("DEBUG", f"Greet.PostRun: {LABEL}"),
        ("INFO", f"Greet.Success: {LABEL}: hello world"),
    ]
    assert {record.name for record in records(caplog)} == {"kser.entry"}


def test_log_records_contain_the_message_with_a_blank_result(caplog: pytest.LogCaptureFixture) -> None:
    entry = Greet(UUID, {"name": "world"}, Result(uuid="other", stdout="before"), {"m": 1})
    entry.execute()
    blank = {"uuid": UUID, "retcode": 0, "stdout": "", "stderr": "", "retval": {}}
    expected = {"uuid": UUID, "entrypoint": PATH, "params": entry.params, "result": blank, "metadata": {"m": 1}}
    assert [record.kmsg for record in records(caplog)] == [expected] * 4  # type: ignore[attr-defined]
    success = record_of(caplog, "Greet.Success")
    assert success.kresult == {**blank, "uuid": "other", "stdout": "hello world"}  # type: ignore[attr-defined]
    assert not hasattr(success, "error")


def test_result_of_the_entry_is_merged_with_the_value_of_run() -> None:
    entry = greet(returns=Result(uuid="run's own", stdout="s", retval={"a": 1}))
    result = entry.execute()
    assert result is entry.result
    assert (result.uuid, result.stdout, result.retval) == (UUID, "s", {"a": 1})


def test_incoming_result_is_merged_and_not_modified() -> None:
    incoming = Result(uuid="before", stdout="before", retval={"b": 1})
    result = greet(returns=Result(retval={"a": 1})).execute(incoming)
    assert (result.stdout, result.retval) == ("before", {"a": 1, "b": 1})
    assert incoming.retval == {"b": 1}


@pytest.mark.parametrize("value", [None, 0, False, [], ()])
def test_falsy_return_value_is_a_blank_success(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    entry = greet(returns=value)
    assert entry.execute() is entry.result
    assert lines(caplog, logging.INFO) == [f"Greet.Success: {LABEL}: "]


def test_negative_return_code_becomes_zero() -> None:
    """C3: the return code of the merged result decides."""
    assert greet(returns=Result(retcode=-1)).execute().retcode == 0


def test_hook_return_values_are_passed_on() -> None:
    class ChainedHooks(Greet):
        def postrun(self, result: Result) -> Result:
            return Result(stdout=f"{result.stdout}, postrun")

        def onsuccess(self, result: Result) -> Any:
            return f"{result.stdout}, onsuccess"

    assert ChainedHooks(params={"name": "x"}).execute() == "hello x, postrun, onsuccess"


def test_triggers_may_be_overridden() -> None:
    calls: list[str] = []

    class OverriddenTriggers(Greet):
        def _run(self) -> Any:
            calls.append("_run")
            return super()._run()

        def _prerun(self) -> None:
            calls.append("_prerun")
            super()._prerun()

        def _postrun(self, result: Any) -> Any:
            calls.append("_postrun")
            return super()._postrun(result)

        def _onsuccess(self, result: Any) -> Any:
            calls.append("_onsuccess")
            return super()._onsuccess(result)

        def _post_init(self) -> None:
            calls.append("_post_init")
            super()._post_init()

    OverriddenTriggers(params={"name": "x"}).execute()
    assert calls == ["_post_init", "_prerun", "_run", "_postrun", "_onsuccess"]


# -- failure -----------------------------------------------------------------------------------------------------------


def test_exception_becomes_a_failed_result(caplog: pytest.LogCaptureFixture) -> None:
    result = Raising(UUID, {"error": ValueError("x")}).execute()
    error = result.retval["error"]
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 500, "x")
    # Compare without order, because old versions of marshmallow have no defined order.
    assert set(error) == {"code", "name", "message", "msgid", "extra", "stack"}
    assert (error["name"], error["msgid"], error["extra"]) == ("InternalError", "ERR-29885", {"uuid": UUID})
    assert error["stack"].startswith("Traceback (most recent call last):")
    assert [(record.levelname, record.getMessage()) for record in records(caplog)][2:] == [
        ("ERROR", f"Raising.Failed: {Raising.path}[{UUID}]: x")
    ]
    record = record_of(caplog, "Raising.Failed")
    assert record.error == error  # type: ignore[attr-defined]
    assert record.kresult["retcode"] == 500  # type: ignore[attr-defined]
    assert record.kmsg["result"]["retcode"] == 0  # type: ignore[attr-defined]


def test_cdumay_error_preserves_its_code_and_text() -> None:
    result = Raising(UUID, {"error": ValidationError("bad", extra={"field": "x"})}).execute()
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 400, "bad")
    assert result.retval["error"]["extra"] == {"field": "x"}


def test_unimplemented_run_gives_a_failed_result() -> None:
    """C1"""
    result = Entrypoint().execute()
    assert (result.retcode, result.stderr) == (501, "Task 'kser.entry.Entrypoint' not implemented")
    with pytest.raises(NotImplementedYet):
        Entrypoint().unsafe_execute()


@pytest.mark.parametrize("value", ["text", {"a": 1}, 5])
def test_return_value_that_is_no_result_is_a_failure(value: Any) -> None:
    result = greet(returns=value).execute()
    assert result.retcode == 500
    assert result.stderr == f"'{type(value).__name__}' object has no attribute 'retcode'"


@pytest.mark.parametrize("method", ["execute", "unsafe_execute"])
@pytest.mark.parametrize("retcode", [1, 299, 300, 500])
def test_returned_failure_is_a_failure(retcode: int, method: str, caplog: pytest.LogCaptureFixture) -> None:
    """C3: the result is passed to `onerror`, never to `onsuccess`, and no exception is raised."""
    entry = greet(returns=Result(retcode=retcode, stderr="no"))
    assert getattr(entry, method)().retcode == retcode
    assert lines(caplog, logging.INFO) == [f"Greet.Failed: {LABEL}: no"]
    assert not hasattr(record_of(caplog, "Greet.Failed"), "error")


@pytest.mark.parametrize("as_argument", [True, False])
def test_incoming_failure_fails_the_entry_after_it_ran(as_argument: bool, caplog: pytest.LogCaptureFixture) -> None:
    """C3"""
    failure = Result(retcode=2, stderr="old")
    entry = Greet(UUID, {"name": "world"}, None if as_argument else failure)
    result = entry.execute(failure if as_argument else None)
    assert (result.retcode, result.stdout, result.stderr) == (2, "hello world", "old")
    assert lines(caplog)[1:] == [f"Greet.Run: {LABEL}", f"Greet.PostRun: {LABEL}", f"Greet.Failed: {LABEL}: old"]


def test_postrun_is_not_called_when_run_raised(caplog: pytest.LogCaptureFixture) -> None:
    """C4"""
    Raising(params={"error": ValueError("x")}).execute()
    assert not any(".PostRun" in line for line in lines(caplog))


def test_missing_parameter_is_a_failure_before_run(caplog: pytest.LogCaptureFixture) -> None:
    result = Greet(UUID).execute()
    assert (result.retcode, result.stderr) == (400, "Missing parameter: name")
    assert lines(caplog) == [f"Greet.PreRun: {LABEL}", f"Greet.Failed: {LABEL}: Missing parameter: name"]
    with pytest.raises(ValidationError):
        Greet(UUID).unsafe_execute()


@pytest.mark.parametrize("hook", ["prerun", "postrun", "onsuccess"])
def test_raising_hook_is_a_failure(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    def raising(self: Any, *_: Any) -> None:
        raise ValueError(hook)

    entry = type("Hooked", (Greet,), {hook: raising})(UUID, {"name": "x"})
    result = entry.execute()
    assert (result.retcode, result.stderr) == (500, hook)
    expected = {"prerun": 1, "postrun": 3, "onsuccess": 4}
    assert len(lines(caplog)) == expected[hook] + 1
    assert lines(caplog)[-1].endswith(f": {hook}")
    assert (result.stdout == "hello x") is (hook == "onsuccess")


def test_raising_onerror_is_contained_and_not_called_again(caplog: pytest.LogCaptureFixture) -> None:
    """C6, C13"""
    calls: list[Result] = []

    class RaisingOnerror(Raising):
        def onerror(self, result: Result) -> Result:
            calls.append(result)
            raise RuntimeError("hook")

    result = RaisingOnerror(UUID, {"error": ValueError("x")}).execute()
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 500, "hook")
    assert len(calls) == 1
    last = records(caplog)[-1]
    assert (last.levelname, bool(last.exc_info)) == ("ERROR", True)
    assert last.getMessage().endswith("onerror raised: hook")


def test_onerror_return_value_is_returned() -> None:
    class OverriddenOnerror(Raising):
        def onerror(self, result: Result) -> Any:
            return "value of onerror"

    assert OverriddenOnerror(params={"error": ValueError("x")}).execute() == "value of onerror"


@pytest.mark.parametrize("method", ["execute", "unsafe_execute"])
def test_entry_with_a_raising_postinit_is_not_run(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """C5: the result is the failure, which is logged once."""

    class RaisingPostinit(Greet):
        def postinit(self) -> None:
            raise ValueError("postinit")

    entry = RaisingPostinit(UUID, {"name": "x"})
    result = getattr(entry, method)()
    assert result is entry.result
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 500, "postinit")
    assert lines(caplog) == [f"RaisingPostinit.Failed: tests.test_entry.RaisingPostinit[{UUID}]: postinit"]


def test_construction_survives_raising_postinit_and_onerror() -> None:
    """C5, C6"""

    class RaisingHooks(Greet):
        def postinit(self) -> None:
            raise ValueError("postinit")

        def onerror(self, result: Result) -> Result:
            raise ValueError("onerror")

    assert RaisingHooks().execute().stderr == "onerror"


def test_failure_persists_when_an_entry_is_executed_twice() -> None:
    """C7"""
    entry = greet(returns=Result(retcode=2, stderr="first"))
    entry.execute()
    entry.params["returns"] = ok_result("fine")
    result = entry.execute()
    assert (result.retcode, result.stdout, result.stderr) == (2, "fine", "first")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["execute", "unsafe_execute"])
def test_system_exit_and_interrupt_propagate(
    error: BaseException, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """C8"""
    with pytest.raises(type(error)):
        getattr(Raising(params={"error": error}), method)()
    assert not any("Failed" in line for line in lines(caplog))


@pytest.mark.parametrize(("level", "dumps"), [(logging.CRITICAL, 0), (logging.ERROR, 1), (logging.DEBUG, 6)])
def test_message_is_dumped_only_for_log_records_of_enabled_levels(
    level: int, dumps: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Design page, "Speed"."""
    dumped: list[dict[str, Any]] = []
    dump = log_lines.dump_entry

    def counting_dump(entry: Any) -> dict[str, Any]:
        dumped.append(dump(entry))
        return dumped[-1]

    monkeypatch.setattr(log_lines, "dump_entry", counting_dump)
    caplog.set_level(level, "kser")
    assert Greet(params={"name": "x"}).execute().retcode == 0
    assert Greet().execute().stderr == "Missing parameter: name"
    assert len(dumped) == dumps


@pytest.mark.parametrize(
    "arguments",
    [
        {"uuid": "1", "params": {"a": [1]}, "metadata": {"m": 1}},
        {"uuid": "1"},
        {"uuid": 5},
        {"uuid": "1", "params": OrderedDict(a=1)},
    ],
)
def test_dump_of_an_entry_is_the_dump_of_its_message_with_a_blank_result(arguments: dict[str, Any]) -> None:
    entry = Greet(**arguments)
    message = Message(entry.uuid, Greet.path, entry.params, metadata=entry.metadata)
    dumped = log_lines.dump_entry(entry)
    assert dumped == message.dump()
    assert list(dumped) == list(message.dump())
    assert dumped["params"] is not entry.params
