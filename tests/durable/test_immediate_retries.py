"""Tests of immediate retries of stored tasks, which wait for no reaper."""

from __future__ import annotations

from kser.retry import Retry
from kser.status import SUCCESS
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import BOTH_WAYS, DurableHarness, Sale, send_raw_message


@BOTH_WAYS
def test_immediate_retry_is_sent_by_the_attempt_before_it(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 27"""
    ScriptedTask.script["1.b"] = [Retry.later(0)]
    send_raw_message(cls)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.b", "1.c"], SUCCESS)
