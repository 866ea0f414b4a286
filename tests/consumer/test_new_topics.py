"""Tests of topics that are deleted and created again: the state of the old topic does not apply to the new one."""

from __future__ import annotations

import logging

import pytest

from kser.dummy.broker import InMemoryBroker
from tests.consumer.harness import MANUAL_COMMIT, FaultyConsumer, ScriptedTask, committed, new_consumer, send_messages
from tests.support import lines


@pytest.mark.parametrize("reset", ["earliest", "latest"])
def test_all_messages_of_the_new_topic_run(bus: InMemoryBroker, reset: str, caplog: pytest.LogCaptureFixture) -> None:
    consumer = new_consumer(MANUAL_COMMIT | {"auto_offset_reset": reset})
    consumer.step(timeout=0)
    send_messages(*(f"old {number}" for number in range(50)))
    consumer.run_until_idle()
    assert committed() == 50
    bus.delete_topic("dice")
    send_messages(*(f"new {number}" for number in range(80)))
    consumer.run_until_idle()
    assert ScriptedTask.ran[50:] == [f"new {number}" for number in range(80)]
    assert committed() == 80
    (line,) = lines(caplog, logging.ERROR)
    assert line.startswith("the topic 'dice' was deleted and created again")


def test_finished_messages_of_the_old_topic_do_not_finish_messages_of_the_new_one(bus: InMemoryBroker) -> None:
    send_messages("1", "2", "3")
    consumer = FaultyConsumer(MANUAL_COMMIT, ordering="none")
    consumer.poll()
    running = consumer.start_record()
    consumer.run_record()
    consumer.poll()
    bus.delete_topic("dice")
    send_messages("4", "5", "6")
    consumer.poll()
    consumer.run_started(running)
    while consumer.run_record():
        consumer.poll()
    assert sorted(ScriptedTask.ran) == ["1", "2", "4", "5", "6"]
    consumer.poll()
    assert committed() == 3


def test_topic_created_again_between_two_consumers_starts_at_its_beginning(bus: InMemoryBroker) -> None:
    first = new_consumer(MANUAL_COMMIT)
    send_messages("1", "2", "3")
    first.run_until_idle()
    first.close()
    late = bus.committed.copy()
    bus.delete_topic("dice")
    send_messages("4", "5", "6", "7")
    bus.committed.update(late)
    new_consumer(MANUAL_COMMIT).run_until_idle()
    assert ScriptedTask.ran == ["1", "2", "3", "4", "5", "6", "7"]
