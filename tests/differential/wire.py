"""Helpers of the scenarios with a broker: they access the broker of the harness with kafka-python alone."""

from __future__ import annotations

import os
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from recorder import describe, emit

# The mock cluster rejects the version request of kafka-python, so the version is set. A consumer without a group that
# subscribes while its client connects may get its topic only with the next refresh of the metadata.
CLIENT: dict[str, Any] = {
    "bootstrap_servers": os.environ.get("DIFFERENTIAL_BROKER", ""),
    "api_version": (2, 0),
    "metadata_max_age_ms": 1000,
}

# Options of a client whose broker does not respond: no process listens on the port.
DEAD: dict[str, Any] = {"bootstrap_servers": "127.0.0.1:9", "api_version": (2, 0), "max_block_ms": 300}


def group(name: str, **options: Any) -> dict[str, Any]:
    """Return the options of a consumer in a group, with a short heartbeat interval for the mock cluster."""
    joining = {"session_timeout_ms": 6000, "heartbeat_interval_ms": 500, "auto_offset_reset": "earliest"}
    return {**CLIENT, **joining, "group_id": name, **options}


def feed(topic: str, *values: bytes | None) -> None:
    """Write values to the first partition of a topic, in this order."""
    producer = KafkaProducer(**CLIENT)
    for value in values:
        # A record without a value must have a key.
        producer.send(topic, value, key=b"key" if value is None else None, partition=0).get(timeout=10)
    producer.close()


def show_wire(topic: str) -> None:
    """Print every record of a topic: value, key, headers; sorted, because the client chooses the partitions."""
    consumer = KafkaConsumer(**CLIENT, auto_offset_reset="earliest")
    partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    lines = []
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        for batch in consumer.poll(timeout_ms=200).values():
            lines += [f"wire {describe(r.value)} key={describe(r.key)} headers={describe(r.headers)}" for r in batch]
    consumer.close()
    for line in sorted(lines):
        emit(line)
    emit(f"wire {len(lines)} record(s)")


def committed(name: str, topic: str) -> int | None:
    """Return the offset that a group has committed in the first partition."""
    consumer = KafkaConsumer(**CLIENT, group_id=name, enable_auto_commit=False)
    offset = consumer.committed(TopicPartition(topic, 0))
    consumer.close(autocommit=False)
    return offset
