"""Tests of the limits of messages, with records as both clients return them."""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any

import confluent_kafka
import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.schemas import Message
from tests.kafka.broker import Kafka
from tests.kafka.helpers import TRANSPORTS, client_options, committed, config, step_until
from tests.test_limits import nested


class CountedTask(Entrypoint):
    """Entrypoint that records its runs."""

    runs: list[str]

    def run(self) -> Result:
        self.runs.append(self.uuid)
        return Result(uuid=self.uuid)


def send_compressed(kafka: Kafka, topic: str, records: list[tuple[bytes, list[tuple[str, bytes | None]]]]) -> None:
    """Send values and headers in gzip batches that are small, however large their records are."""
    producer = confluent_kafka.Producer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "compression.type": "gzip",
            "message.max.bytes": 100 << 20,
            "queue.buffering.max.kbytes": 200 << 10,
        }
    )
    for value, headers in records:
        producer.produce(topic, value, headers=headers)
        # A record in a batch of its own, because a broker may limit the size of a batch.
        assert producer.flush(30) == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_records_above_the_limits_fail_and_all_others_run(
    kafka: Kafka, topic: Callable[..., str], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = type("EmptyCountedTask", (CountedTask,), {"runs": []})
    Controller.register("counted", task)
    errors: list[str] = []

    def onerror(cls: Any, kmsg: Message, result: Result) -> Result:
        errors.append(result.retval["error"]["name"])
        return result

    monkeypatch.setattr(Controller, "onerror", classmethod(onerror))

    def value(number: int, text: str = "", **fields: Any) -> bytes:
        data = {"uuid": str(number), "entrypoint": "counted", "params": {"text": text}, **fields}
        return json.dumps(data).encode()

    name = topic()
    records: list[tuple[bytes, list[tuple[str, bytes | None]]]] = [
        (value(0), []),
        (value(1, "x" * (33 << 20)), []),
        (value(2), [("a", None), ("b", b""), ("c", b"x" * 60_000)]),
        (value(3), [("a", b"x" * 70_000)]),
        (value(4), [("name", b"x" * 100)] * 700),
        (value(5, metadata=dict.fromkeys(map(str, range(70_000)), 0)), []),
        (value(6, params={"a": nested(200)}), []),
        (value(7, "x" * (20 << 20)), []),
        (value(8), []),
    ]
    send_compressed(kafka, name, records)
    consumer_class = importlib.import_module(f"kser.{transport}.consumer").Consumer
    options = client_options(transport, config(kafka, f"kser-test-{uuid.uuid4()}", auto_offset_reset="earliest"))
    group = options["group.id" if transport == "confluent" else "group_id"]
    with closing(consumer_class(options, [name])) as consumer:
        step_until(
            consumer, lambda: len(task.runs) + len(errors) == len(records), "the messages are handled", seconds=60
        )
    assert task.runs == ["0", "2", "7", "8"]
    assert errors == ["ValueTooLarge", "HeadersTooLarge", "HeadersTooLarge", "TooManyMetadataKeys", "NestedTooDeep"]
    assert committed(kafka, group, name) == len(records)
