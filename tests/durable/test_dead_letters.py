"""Tests of dead letters of stored operations."""

from __future__ import annotations

from typing import Any

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.sequencing.task import Task
from kser.status import FAILED
from tests.consumer.harness import ScriptedTask, send_messages
from tests.durable.harness import (
    BOTH_MODES,
    DistributedSale,
    DurableHarness,
    Sale,
    send_raw_message,
)


@BOTH_MODES
def test_recorded_failure_is_not_dead_lettered(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 29: the store has the failure, and ``resume()`` replaces a replay."""
    process = harness.start_process(cls, group="letters", dead_letter=True)
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls)
    process.handle()
    assert harness.status() == FAILED
    assert InMemoryBroker.at("").topics.get("dice.dlq", [[]]) == [[]]
    assert (process.consumer.counts["dead_lettered"], process.consumer.counts.get("failed")) == (0, None)


@pytest.mark.parametrize("cause", ["build", "hook"])
def test_recorded_failure_of_any_cause_is_not_dead_lettered(harness: DurableHarness, cause: str) -> None:
    """durability rule 29"""

    class FailingSale(Sale):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if cause == "build":
                raise ConnectionError("no")
            return super().build_tasks(**kwargs)

        def onsuccess(self, result: Result) -> Result:
            if cause == "hook":
                raise ConnectionError("no")
            return result

    process = harness.start_process(FailingSale, group="letters", dead_letter=True)
    operation = harness.first.subscribe_copy(FailingSale)("1")
    (operation if cause == "build" else operation.build()).send()
    process.handle()
    assert harness.status() == FAILED
    assert process.consumer.counts["dead_lettered"] == 0


def test_failed_plain_task_is_still_dead_lettered(harness: DurableHarness) -> None:
    """durability rule 29"""
    process = harness.start_process(DistributedSale, group="letters", dead_letter=True)
    ScriptedTask.script["plain"] = ConnectionError("no")
    send_messages("plain", cls=ScriptedTask)
    process.handle()
    assert process.consumer.counts["dead_lettered"] == 1
