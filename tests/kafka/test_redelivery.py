"""Tests of redelivered messages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer
from tests.kafka.broker import Kafka
from tests.kafka.helpers import committed, config, message, send_records, step_until, uuids


class RunRecorder(Entrypoint):
    """An entrypoint that records its runs, in a class attribute and in its result."""

    runs: list[str]

    def run(self) -> Result:
        type(self).runs.append(self.uuid)
        if self.params.get("interrupt") and type(self).runs.count(self.uuid) == 1:
            raise KeyboardInterrupt
        if self.params.get("fail"):
            raise ValueError("scripted failure")
        return Result(uuid=self.uuid, retval={"seen": [*self.result.retval.get("seen", ()), "run"]})


@pytest.fixture
def recorder() -> type[RunRecorder]:
    """Return the entrypoint ``recorder``."""

    class EmptyRunRecorder(RunRecorder):
        runs: list[str] = []  # noqa: RUF012

    Controller.register("recorder", EmptyRunRecorder)
    return EmptyRunRecorder


def consume(kafka: Kafka, name: str, condition: Callable[[], Any], **options: Any) -> None:
    """Consume the topic and group ``name`` until a condition is true."""
    with closing(Consumer(config(kafka, name, **options), [name])) as consumer:
        step_until(consumer, condition, "the messages are handled")


def test_interrupted_message_alone_is_redelivered_to_the_next_consumer(
    kafka: Kafka, topic: Callable[..., str], recorder: type[RunRecorder]
) -> None:
    name = topic()
    messages = [message("recorder"), message("recorder", interrupt=True), message("recorder")]
    send_records(kafka, name, messages)
    with pytest.raises(KeyboardInterrupt):
        consume(kafka, name, lambda: False)
    assert committed(kafka, name, name) == 1
    consume(kafka, name, lambda: len(recorder.runs) == 4)
    first, interrupted, last = uuids(messages)
    assert recorder.runs == [first, interrupted, interrupted, last]
    assert committed(kafka, name, name) == 3


def test_redelivered_message_runs_on_a_fresh_object(
    kafka: Kafka, topic: Callable[..., str], recorder: type[RunRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = topic()
    results: list[Any] = []

    def record_result(cls: Any, kmsg: Any, result: Any) -> Any:
        results.append(result.retval)
        return result

    monkeypatch.setattr(Controller, "onsuccess", classmethod(record_result))
    sent = message("recorder")
    # Two records with the same message, as after a crash between the end of the task and the commit.
    send_records(kafka, name, [sent, sent])
    consume(kafka, name, lambda: len(results) == 2)
    assert recorder.runs == [sent.uuid] * 2
    assert results == [{"seen": ["run"]}] * 2


def test_failed_message_is_committed_and_not_redelivered(
    kafka: Kafka, topic: Callable[..., str], recorder: type[RunRecorder]
) -> None:
    name = topic()
    send_records(kafka, name, [message("recorder", fail=True), message("recorder")])
    consume(kafka, name, lambda: len(recorder.runs) == 2)
    assert committed(kafka, name, name) == 2


def test_records_in_flight_at_close_are_not_lost(
    kafka: Kafka, topic: Callable[..., str], recorder: type[RunRecorder]
) -> None:
    name = topic()
    messages = [message("recorder") for _ in range(50)]
    send_records(kafka, name, messages)
    while len(recorder.runs) < len(messages):
        consumer = Consumer(config(kafka, name), [name])

        class StoppingController(Controller):
            last = {len(recorder.runs) + 20, len(messages)}  # noqa: RUF012
            stop = staticmethod(consumer.stop)

            @classmethod
            def run(cls, raw_data: Any) -> Any:
                if len(recorder.runs) + 1 in cls.last:
                    cls.stop()
                return super().run(raw_data)

        consumer.REGISTRY = StoppingController
        with pytest.raises(SystemExit) as end:
            consumer.run()
        assert end.value.code == 0
        assert committed(kafka, name, name) == len(recorder.runs)
    assert recorder.runs == uuids(messages)
