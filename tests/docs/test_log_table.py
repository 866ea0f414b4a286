"""Tests of the table of log lines: kser logs the lines of the table, and no others."""

from __future__ import annotations

import ast
import csv
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cdumay_result import Result

from kser import Controller, Entrypoint, Message, Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from tests.docs.harness import DOCS
from tests.support import ROOT


class LogRow(NamedTuple):
    """A row of the table of log lines."""

    logger: str
    level: str
    text: str
    #: The extra attributes of the log record; optional ones are in brackets.
    extra: frozenset[str]

    def is_of(self, logger: str, level: str) -> bool:
        """Return whether the row documents lines of this logger and level."""
        pattern = re.escape(self.logger).replace("<transport>", r"kser\.(python_kafka|confluent|dummy)")
        return self.level in (level, "any") and re.fullmatch(pattern, logger) is not None

    def matches(self, record: logging.LogRecord) -> bool:
        """Return whether the row documents this log record."""
        pattern = re.sub(r"<[^<>]+>", ".*", re.escape(self.text))
        attributes = {key for key in ("kmsg", "kresult", "error", "kafka_raw_data") if hasattr(record, key)}
        required = {key for key in self.extra if not key.startswith("[")}
        return (
            self.is_of(record.name, record.levelname)
            and re.fullmatch(pattern, record.getMessage(), re.DOTALL) is not None
            and required <= attributes <= {key.strip("[]") for key in self.extra}
        )


with (DOCS / "logs.csv").open(newline="") as _table:
    LOG_ROWS = [
        LogRow(
            row["Logger"].strip("`"),
            row["Level"],
            row["Text"].strip("`"),
            frozenset(row["Extra"].replace("`", "").split()),
        )
        for row in csv.DictReader(_table)
    ]


def logging_calls() -> Iterator[tuple[str, str, list[str]]]:
    """Yield the logger, the level and the fixed parts of the text of each logging call in kser."""
    for path in sorted((ROOT / "kser").rglob("*.py")):
        module = ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")
        if module == "kser.log_lines":
            # This module writes to the loggers of its callers: the emitted log records show its lines.
            continue
        # The parts of a client write to the logger of the client.
        if module in ("kser.confluent.client_errors", "kser.python_kafka.health"):
            module = f"{module.rpartition('.')[0]}.client"
        # The shared parts of a consumer write to the logger of the transport.
        own_logger = (
            "kser.consumer.work_queue",
            "kser.consumer.services",
            "kser.consumer.replay",
            "kser.consumer.commit_metadata",
        )
        if module.startswith("kser.consumer.") and module not in own_logger:
            module = "kser.dummy.consumer"
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            level = {"exception": "ERROR"}.get(node.func.attr, node.func.attr.upper())
            if level not in ("DEBUG", "INFO", "WARNING", "ERROR") or not node.args:
                continue
            constants = (part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))
            pieces = (piece for text in constants if isinstance(text, str) for piece in re.split("%[rs]", text))
            # The table may shorten the end of a piece.
            yield module, level, [piece[:20] for piece in pieces if len(piece) > 3]


def test_every_logging_call_has_a_row_in_the_table() -> None:
    calls = [call for call in logging_calls() if call[2]]
    assert len(calls) > 20
    for module, level, pieces in calls:
        texts = [row.text for row in LOG_ROWS if row.is_of(module, level)]
        assert any(all(piece in text for piece in pieces) for text in texts), (module, level, pieces)


def strings_of_the_package() -> set[str]:
    """Return all string constants in kser."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kser").rglob("*.py")]
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def is_in_the_package(row: LogRow, strings: set[str]) -> bool:
    """Return whether each fixed part of a row is in a string of kser: a line may be composed of several strings."""
    pieces = [piece.strip("'[]():;,. ") for piece in re.split(r"<[^<>]+>", row.text)]
    return all(any(piece in string for string in strings) for piece in pieces if len(piece) > 3)


def test_log_lines_match_the_table(caplog: pytest.LogCaptureFixture, lock_path: Path) -> None:
    caplog.set_level(logging.DEBUG, "kser")
    emit_log_lines()
    emitted = [record for record in caplog.records if record.name.startswith("kser")]
    undocumented = [
        (record.name, record.levelname, record.getMessage())
        for record in emitted
        if not any(row.matches(record) for row in LOG_ROWS)
    ]
    assert undocumented == []
    strings = strings_of_the_package()
    unemitted = [row for row in LOG_ROWS if not any(row.matches(record) for record in emitted)]
    assert [row for row in unemitted if not is_in_the_package(row, strings)] == []


def emit_log_lines() -> None:
    """Run tasks, operations, hooks, wrong messages and a consumer, so that kser logs many of its lines."""
    oregistry = OperationRegistry()

    class LoggingTask(Task):
        def run(self) -> None:
            self.log("text %d", logging.INFO, 1, extra={"kmsg": {}})

    class FailingTask(Task):
        def run(self) -> None:
            raise ValueError("run failed")

        def onerror(self, result: Result) -> Any:
            raise ValueError("onerror failed")

    class FailingOperation(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [LoggingTask(), FailingTask()]

    class SuccessfulOperation(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [LoggingTask()]

    class RaisingController(Controller):
        @classmethod
        def onsuccess(cls, kmsg: Message, result: Any) -> Any:
            raise ValueError("hook")

    for cls in (LoggingTask, FailingTask, FailingOperation, SuccessfulOperation):
        oregistry.subscribe(cls)
        Controller.run(Message("1", cls.path).dumps())
    # Another class of the same path replaces the first one.
    oregistry.subscribe(type("LoggingTask", (Task,), {}))
    RaisingController.run(Message("1", LoggingTask.path).dumps())
    Entrypoint().log("text")
    Controller.run("no message")
    Controller.run(Message("1", "unknown").dumps())
    consumer = Consumer(topics=["t"])
    consumer.stop()
    with pytest.raises(SystemExit):
        consumer.run()
