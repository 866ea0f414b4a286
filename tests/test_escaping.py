"""Tests of the escaping of log lines: messages and tasks can neither forge a line nor control a terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cdumay_result import Result

from kser.consumer.logs import ConsumerLogger
from kser.controller import Controller
from kser.entry import Entrypoint
from kser.escaping import MAX_LINE_LENGTH, escape, escape_lines
from kser.schemas import Message
from kser.sequencing.task import Task
from tests.support import ROOT, lines, message, record_of

#: Controls, each with the text that shows it.
CONTROLS = {
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\x00": r"\x00",
    "\x1b": r"\x1b",
    "\x7f": r"\x7f",
    "\x85": r"\x85",
    "\x9b": r"\x9b",
    "\u061c": r"\u061c",
    "\u2028": r"\u2028",
    "\u2029": r"\u2029",
    "\u202e": r"\u202e",
    "\u2066": r"\u2066",
    "\ud800": r"\ud800",
}
FORGED = "ok\r\n2026-11-30 ERROR forged\x1b[2J\u202e"
SHOWN = r"ok\r\n2026-11-30 ERROR forged\x1b[2J\u202e"


class EchoTask(Task):
    """Task whose Result, log line or exception contains the text of its parameter ``text``."""

    def run(self) -> Result:
        text = self.params["text"]
        if self.params.get("log"):
            self.log("customer %s, " + text, logging.INFO, text)
        if self.params.get("fail"):
            raise ValueError(text)
        return Result(stdout=text)


class RaisingHook(Entrypoint):
    """Entrypoint whose ``onerror`` raises an exception with the text of its parameter ``text``."""

    def run(self) -> Result:
        raise LookupError("run")

    def onerror(self, result: Result) -> Any:
        try:
            raise KeyError(self.params["text"])
        except KeyError as cause:
            raise ValueError(self.params["text"]) from cause


@pytest.fixture(autouse=True)
def output(caplog: pytest.LogCaptureFixture) -> Iterator[io.StringIO]:
    """Return the output of a log handler with the format of the standard library; all lines of kser are logged."""
    for cls in (EchoTask, RaisingHook):
        Controller.register(cls.path, cls)
    caplog.set_level(logging.DEBUG, "kser")
    handler = logging.StreamHandler(stream := io.StringIO())
    logging.getLogger("kser").addHandler(handler)
    yield stream
    logging.getLogger("kser").removeHandler(handler)


def controls_in(text: str) -> set[str]:
    """Return the controls in the lines of a text."""
    return {character for line in text.split("\n") for character in line if character in CONTROLS}


@pytest.mark.parametrize(("control", "shown"), CONTROLS.items())
def test_control_character_is_escaped(control: str, shown: str) -> None:
    assert escape(f"a{control}b") == f"a{shown}b"


@pytest.mark.parametrize("text", ["", "shop.Pay[1]: paid", "café 100 €", "漢字 \U0001f600", "a\\nb", "\xa0\u3000"])
def test_text_without_controls_is_unchanged(text: str) -> None:
    assert escape(text) == text


@pytest.mark.parametrize("character", ["x", "\n", "\ud800"])
def test_long_text_is_shortened_in_its_middle(character: str) -> None:
    text = escape("begin" + character * 10_000_000 + "end")
    assert len(text) <= MAX_LINE_LENGTH
    assert text.startswith("begin")
    assert text.endswith("end")
    assert "characters left out]" in text


@pytest.mark.parametrize("field", ["uuid", "entrypoint", "result"])
def test_message_cannot_forge_a_log_line(field: str, output: io.StringIO) -> None:
    data = {"uuid": "1", "entrypoint": EchoTask.path, "params": {"text": "paid"}}
    Controller.run(json.dumps({**data, field: {"retcode": 1, "stderr": FORGED} if field == "result" else FORGED}))
    assert controls_in(output.getvalue()) == set()
    assert SHOWN in output.getvalue()
    assert not any(line.startswith("2026") for line in output.getvalue().splitlines())


@pytest.mark.parametrize("params", [{}, {"fail": True}, {"log": True}])
def test_task_cannot_forge_a_log_line(params: dict[str, Any], output: io.StringIO) -> None:
    Controller.run(message(EchoTask, params={"text": FORGED, **params}).dumps())
    assert controls_in(output.getvalue()) == set()
    assert len([line for line in output.getvalue().split("\n") if SHOWN in line]) >= 2


def test_text_that_is_no_json_is_logged_escaped(output: io.StringIO) -> None:
    Controller.run(FORGED)
    assert controls_in(output.getvalue()) == set()
    assert f"ReceivedFromKafka: {SHOWN}\n" in output.getvalue()


def test_exception_texts_in_a_traceback_are_escaped(output: io.StringIO) -> None:
    Controller.run(message(RaisingHook, params={"text": FORGED}).dumps())
    assert controls_in(output.getvalue()) == set()
    assert f"\nValueError: {SHOWN}\n" in output.getvalue()
    assert "\nThe above exception was the direct cause of the following exception:\n" in output.getvalue()
    assert f'File "{__file__}"' in output.getvalue()


def test_traceback_with_plain_texts_is_left_to_the_formatter(caplog: pytest.LogCaptureFixture) -> None:
    Controller.run(message(RaisingHook, params={"text": "plain"}).dumps())
    (record,) = [record for record in caplog.records if record.exc_info]
    assert not record.exc_text or record.exc_text.endswith("ValueError: plain")


def test_notes_and_grouped_exceptions_are_escaped(output: io.StringIO) -> None:
    inner = ValueError(FORGED)
    inner.add_note(FORGED)
    try:
        raise ExceptionGroup("group", [inner])
    except ExceptionGroup:
        logging.getLogger("kser.controller").exception("failed")
    assert controls_in(output.getvalue()) == set()
    assert output.getvalue().count(SHOWN) == 2


def test_extra_attributes_of_a_log_record_stay_raw(caplog: pytest.LogCaptureFixture) -> None:
    Controller.run(message(EchoTask, uuid=FORGED, params={"text": FORGED}).dumps())
    record = record_of(caplog, "Controller.Success")
    assert record.kmsg["uuid"] == record.kresult["stdout"] == FORGED  # type: ignore[attr-defined]


def test_long_fields_of_a_log_line_are_shortened(caplog: pytest.LogCaptureFixture) -> None:
    Controller.run(message("x" * 1_000_000, uuid="1", params={"text": ""}).dumps())
    Controller.run(message(EchoTask, params={"text": "y" * 10_000_000}).dumps())
    assert max(map(len, lines(caplog))) <= MAX_LINE_LENGTH
    assert any(line.startswith("Controller.Failed: xxx") and line.endswith("not registred") for line in lines(caplog))


@pytest.mark.parametrize("value", ["yes", "YES", "true", "1"])
def test_setting_restores_raw_lines(value: str, output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_LOG_RAW", value)
    Controller.run(message(RaisingHook, uuid=FORGED, params={"text": "x" * 30_000}).dumps())
    assert FORGED in output.getvalue()
    assert "left out" not in output.getvalue()


@pytest.mark.parametrize("value", ["", "no", "0", "false"])
def test_lines_are_escaped_with_any_other_value_of_the_setting(
    value: str, output: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSER_LOG_RAW", value)
    Controller.run(message(EchoTask, params={"text": FORGED}).dumps())
    assert controls_in(output.getvalue()) == set()


def test_text_that_does_not_fit_its_arguments_reaches_the_handlers(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("kser.controller").debug("%s %s", 1, 2)
    assert lines(caplog) == ["1 2"]
    record = logging.LogRecord("kser.controller", logging.DEBUG, "", 0, "%d", ("a",), None)
    assert logging.getLogger("kser.controller").filter(record)
    assert (record.msg, record.args) == ("%d", ("a",))


def test_consumer_with_a_logger_of_its_own_escapes_its_lines(caplog: pytest.LogCaptureFixture) -> None:
    ConsumerLogger(logging.getLogger("kser.user"), "Consumer").warning(f"topic {FORGED}")
    assert lines(caplog) == [f"Consumer: topic {SHOWN}"]


@pytest.mark.parametrize("uuid", [FORGED, "\x9b31m", "a\u2028b"])
def test_running_file_has_one_line_for_a_message_with_controls(uuid: str) -> None:
    class ReadRunningFile(Entrypoint):
        def run(self) -> Result:
            return Result(stdout=Path(os.environ["RUNNING_FILE"]).read_bytes().decode())

    Controller.register("read", ReadRunningFile)
    assert Controller.run(message("read", uuid=uuid).dumps()).stdout == f"read[{escape(uuid)}]"


def test_running_file_keeps_the_uuid_of_a_message_with_a_long_entrypoint() -> None:
    shown: list[str] = []

    class LongName(Entrypoint):
        def run(self) -> Result:
            shown.append(Path(os.environ["RUNNING_FILE"]).read_text())
            return Result()

    Controller.register("x" * 1_000_000, LongName)
    Controller.run(Message("the-uuid", "x" * 1_000_000).dumps())
    assert len(shown[0]) <= 1000
    assert shown[0].endswith("x[the-uuid]")


def test_logger_gets_the_filter_only_once() -> None:
    logger = logging.getLogger("kser.user.twice")
    assert escape_lines(escape_lines(logger)) is logger
    assert len(logger.filters) == 1


def test_every_logger_of_kser_escapes_its_lines() -> None:
    bare = []
    for path in (ROOT / "kser").rglob("*.py"):
        tree = ast.parse(path.read_text())
        escaped = {
            argument
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "escape_lines"
            for argument in node.args
        }
        bare += [
            f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node) == "logging.getLogger(__name__)" and node not in escaped
        ]
    # This line is logged at import, and contains no text from outside.
    assert bare == ["kser/__init__.py: logging.getLogger(__name__)"]
