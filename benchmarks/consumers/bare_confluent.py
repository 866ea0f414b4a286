"""Measure confluent-kafka alone: ``python bare_confluent.py ADDRESS TOPIC COUNT`` prints messages per second.

The script decodes each message with json.loads."""

from __future__ import annotations

import json
import sys
import time
import uuid

from confluent_kafka import Consumer

address, topic, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = Consumer({"bootstrap.servers": address, "group.id": str(uuid.uuid4()), "auto.offset.reset": "earliest"})
client.subscribe([topic])


def take() -> int:
    """Poll once and decode the messages."""
    messages = client.consume(500, 0.5)
    for message in messages:
        json.loads(message.value())
    return len(messages)


first = 0
while not first:
    first = take()
handled, start = first, time.perf_counter()
while handled < count:
    handled += take()
print((handled - first) / (time.perf_counter() - start))
client.close()
