"""Measure latency: ``python latency.py KIND ADDRESS TOPIC COUNT`` prints the median milliseconds from send to start.

KIND is ``python_kafka`` or ``confluent`` for a consumer of kser, and ``bare_python_kafka`` or ``bare_confluent`` for
the client alone. Each message contains the time when it was sent, by the monotonic clock of this machine.
"""

from __future__ import annotations

import importlib
import json
import logging
import statistics
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kser.controller import Controller
from kser.entry import Entrypoint

kind, address, topic, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
logging.basicConfig(level=logging.WARNING)
delays: list[float] = []
GROUP = str(uuid.uuid4())


def arrived(sent: float) -> bool:
    """Record the latency of a message, and return whether it was the last message."""
    delays.append(time.monotonic() - sent)
    return len(delays) == count


class Stamped(Entrypoint):
    """A message with the time at which it was sent."""

    def run(self) -> None:
        if arrived(self.params["sent"]):
            consumer.stop()


def bare_python_kafka() -> None:
    from kafka import KafkaConsumer

    client = KafkaConsumer(topic, bootstrap_servers=address, group_id=GROUP, auto_offset_reset="earliest")
    while True:
        for records in client.poll(timeout_ms=500).values():
            for record in records:
                if arrived(json.loads(record.value)["params"]["sent"]):
                    return


def bare_confluent() -> None:
    from confluent_kafka import Consumer

    client = Consumer({"bootstrap.servers": address, "group.id": GROUP, "auto.offset.reset": "earliest"})
    client.subscribe([topic])
    while True:
        message = client.poll(0.5)
        if message is not None and arrived(json.loads(message.value())["params"]["sent"]):
            return


if kind.startswith("bare_"):
    globals()[kind]()
else:
    Controller.register("bench.Stamped", Stamped)
    names = {"python_kafka": ("bootstrap_servers", "group_id"), "confluent": ("bootstrap.servers", "group.id")}[kind]
    config = dict(zip(names, (address, GROUP), strict=False))
    consumer = importlib.import_module(f"kser.{kind}.consumer").Consumer(config, [topic])
    try:
        consumer.run()
    except SystemExit:
        """Ignore the exit: ``run`` always ends with SystemExit."""
# Skip the first half, because these messages waited until the consumer had joined its group.
print(statistics.median(delays[count // 2 :]) * 1000)
