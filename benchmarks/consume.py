"""Messages a second: kser's consumer in its safe mode against a bare kafka-python ``poll`` loop, on Apache Kafka.

No-op tasks, 300-byte messages, logs at WARNING. Both read the same topic from its beginning, in turn.

Usage: ``python benchmarks/consume.py [COUNT]`` (100,000 messages by default).
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import uuid

from bench import compare, kafka, message, new_topic
from kafka import KafkaConsumer

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer


class Noop(Entrypoint):
    """Does nothing."""

    def run(self) -> None:
        return None


def options(address: str) -> dict:
    """The options of both."""
    return {"bootstrap_servers": address, "group_id": str(uuid.uuid4()), "auto_offset_reset": "earliest"}


def kser_rate(address: str, topic: str, count: int) -> float:
    """From the first message to the last one's commit."""
    consumer = Consumer(options(address), [topic])
    handled = 0
    while not handled:
        handled = consumer.step()
    start, counted = time.perf_counter(), handled
    while handled < count:
        handled += consumer.step()
    consumer.close()
    return (count - counted) / (time.perf_counter() - start)


def bare_rate(address: str, topic: str, count: int) -> float:
    """From the first batch to the last one; nothing is done with the messages."""
    client = KafkaConsumer(topic, **options(address))
    handled = 0
    while not handled:
        handled = sum(map(len, client.poll(timeout_ms=500).values()))
    start, counted = time.perf_counter(), handled
    while handled < count:
        handled += sum(map(len, client.poll(timeout_ms=500).values()))
    rate = (count - counted) / (time.perf_counter() - start)
    client.close()
    return rate


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    logging.basicConfig(level=logging.WARNING)
    Controller.register("bench.Noop", Noop)
    with tempfile.TemporaryDirectory() as folder, kafka() as address:
        os.environ["RUNNING_FILE"] = os.path.join(folder, "run.lock")
        topic = new_topic(address)
        producer = Producer({"bootstrap_servers": address, "linger_ms": 5})
        outcome = producer.bulk_send(topic, (message() for _ in range(count)), timeout=600)
        producer.close()
        if outcome.retcode:
            sys.exit(outcome.stderr)
        compare(
            f"consume {count:,} messages",
            lambda: kser_rate(address, topic, count),
            lambda: bare_rate(address, topic, count),
        )


if __name__ == "__main__":
    main()
