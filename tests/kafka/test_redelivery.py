"""Tests of redelivered messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer
from tests.kafka.broker import Kafka
from tests.kafka.helpers import committed, config, consuming, message, put, step_until


class Count(Entrypoint):
    """Counts, in an attribute and in its result, how often it ran."""

    runs: list[str]

    def run(self) -> Result:
        type(self).runs.append(self.uuid)
        if self.params.get("interrupt") and type(self).runs.count(self.uuid) == 1:
            raise KeyboardInterrupt
        if self.params.get("fail"):
            raise ValueError("as it was told")
        return Result(uuid=self.uuid, retval={"seen": [*self.result.retval.get("seen", ()), "run"]})


@pytest.fixture
def count() -> type[Count]:
    class Counting(Count):
        runs: list[str] = []  # noqa: RUF012

    Controller.register("count", Counting)
    return Counting


def consume(kafka: Kafka, name: str, condition: Callable[[], Any], **options: Any) -> None:
    with consuming(Consumer(config(kafka, name, **options), [name])) as consumer:
        step_until(consumer, condition, "the messages are handled")


def test_interrupted_message_alone_is_redelivered_to_the_next_consumer(
    kafka: Kafka, topic: Callable[..., str], count: type[Count]
) -> None:
    name = topic()
    messages = [message("count"), message("count", interrupt=True), message("count")]
    put(kafka, name, messages)
    with pytest.raises(KeyboardInterrupt):
        consume(kafka, name, lambda: False)
    assert committed(kafka, name, name) == 1
    consume(kafka, name, lambda: len(count.runs) == 4)
    first, interrupted, last = (each.uuid for each in messages)
    assert count.runs == [first, interrupted, interrupted, last]
    assert committed(kafka, name, name) == 3


def test_redelivered_message_runs_on_a_fresh_object(
    kafka: Kafka, topic: Callable[..., str], count: type[Count], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = topic()
    results: list[Any] = []

    def remember(cls: Any, kmsg: Any, result: Any) -> Any:
        results.append(result.retval)
        return result

    monkeypatch.setattr(Controller, "onsuccess", classmethod(remember))
    sent = message("count")
    # The same bytes twice, as after a crash between the end of the task and the commit.
    put(kafka, name, [sent, sent])
    consume(kafka, name, lambda: len(results) == 2)
    assert count.runs == [sent.uuid] * 2
    assert results == [{"seen": ["run"]}] * 2


def test_failed_message_is_committed_and_not_redelivered(
    kafka: Kafka, topic: Callable[..., str], count: type[Count]
) -> None:
    name = topic()
    put(kafka, name, [message("count", fail=True), message("count")])
    consume(kafka, name, lambda: len(count.runs) == 2)
    assert committed(kafka, name, name) == 2


def test_messages_taken_but_not_started_at_close_are_not_lost(
    kafka: Kafka, topic: Callable[..., str], count: type[Count]
) -> None:
    name = topic()
    messages = [message("count") for _ in range(50)]
    put(kafka, name, messages)
    while len(count.runs) < len(messages):
        consumer = Consumer(config(kafka, name), [name])

        class Stopping(Controller):
            last = {len(count.runs) + 20, len(messages)}  # noqa: RUF012
            stop = staticmethod(consumer.stop)

            @classmethod
            def run(cls, raw_data: Any) -> Any:
                if len(count.runs) + 1 in cls.last:
                    cls.stop()
                return super().run(raw_data)

        consumer.REGISTRY = Stopping
        with pytest.raises(SystemExit) as end:
            consumer.run()
        assert end.value.code == 0
        assert committed(kafka, name, name) == len(count.runs)
    assert count.runs == [each.uuid for each in messages]
