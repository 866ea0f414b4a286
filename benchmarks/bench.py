"""Common code of the benchmarks on Apache Kafka: broker, topics, messages and ratios."""

from __future__ import annotations

import json
import os
import statistics
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import confluent_kafka  # noqa: E402
from kafka.admin import KafkaAdminClient, NewTopic  # noqa: E402

from kser.schemas import Message  # noqa: E402
from tests.kafka.broker import KafkaBroker  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", 5))
PARTITIONS = 4


@contextmanager
def kafka() -> Iterator[str]:
    """Yield the address of Apache Kafka: ``KSER_TEST_BOOTSTRAP_SERVERS``, or a broker started for the block."""
    address = os.environ.get("KSER_TEST_BOOTSTRAP_SERVERS")
    if address:
        yield address
        return
    with KafkaBroker() as broker:
        yield broker.bootstrap_servers


def new_topic(address: str) -> str:
    """Create a topic and return its name."""
    name = f"benchmark-{uuid.uuid4().hex[:8]}"
    admin = KafkaAdminClient(bootstrap_servers=address)
    admin.create_topics([NewTopic(name=name, num_partitions=PARTITIONS, replication_factor=1)])
    admin.close()
    return name


def message() -> Message:
    """Return a message of 300 bytes on the wire."""
    kmsg = Message(uuid=str(uuid.uuid4()), entrypoint="bench.Noop", params={"order": 42, "customer": ""})
    kmsg.params["customer"] = "x" * (300 - len(kmsg.dumps()))
    assert len(json.dumps(kmsg.dump())) == 300
    return kmsg


def fill(address: str, topic: str, count: int) -> None:
    """Send ``count`` messages to a topic."""
    producer = confluent_kafka.Producer({"bootstrap.servers": address, "linger.ms": 20})
    for number in range(count):
        producer.produce(topic, message().dumps().encode(), partition=number % PARTITIONS)
        if number % 10_000 == 0:
            producer.poll(0)
            producer.flush()
    if producer.flush(60):
        raise SystemExit(f"the topic could not be filled at {address}")


def compare(what: str, ours: Callable[[], float], bare: Callable[[], float]) -> None:
    """Measure both programs in turn, and print the medians and their ratio."""
    pairs = [(ours(), bare()) for _ in range(ROUNDS)]
    kser, client = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{what}: kser {kser:,.0f}/s, bare client {client:,.0f}/s, ratio {kser / client:.2f}")
