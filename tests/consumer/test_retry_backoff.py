"""Tests of the retry backoff: which records wait for a delayed one."""

from __future__ import annotations

import pytest

from kser.retry import Retry
from tests.consumer.harness import ScriptedTask, SteppedConsumer, committed, new_consumer, send_messages

pytestmark = pytest.mark.usefixtures("bus")

#: Three attempts, ten seconds apart.
THRICE = Retry(max_attempts=3, delay=10, backoff=1, jitter=False)


def test_retry_backoff_blocks_the_key_and_no_other_record() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), None]
    send_messages("1", "2", key=b"a")
    send_messages("3", key=b"b")
    send_messages("4")
    running = SteppedConsumer(retry=THRICE)
    assert running.attempts(5) == [3, 0]
    assert sorted(ScriptedTask.ran) == ["1", "3", "4"]
    assert running.attempts(5) == [0, 2]
    assert (ScriptedTask.ran[-2:], committed()) == (["1", "2"], 4)


@pytest.mark.parametrize(("ordering", "seen"), [("partition", ["1"]), ("none", ["1", "2", "3"])])
def test_retry_backoff_blocks_other_records_according_to_the_ordering(ordering: str, seen: list[str]) -> None:
    ScriptedTask.script["1"] = ConnectionError("no")
    send_messages("1", "2", key=b"a")
    send_messages("3")
    SteppedConsumer(retry=THRICE, ordering=ordering).attempts()
    assert ScriptedTask.ran == seen


def test_retry_backoff_blocks_the_commit_but_not_its_metadata() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), None]
    send_messages("1", "2", "3")
    running = SteppedConsumer(retry=THRICE)
    running.attempts()
    running.consumer.close()
    assert committed() == 0
    new_consumer().run_until_idle()
    assert sorted(ScriptedTask.ran) == ["1", "1", "2", "3"]
