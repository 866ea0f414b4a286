"""Measure kafka-python alone: ``python bare_kafka.py plain|crc32c ADDRESS TOPIC COUNT`` prints messages per second.

The script decodes each message with json.loads. ``plain`` measures without the package crc32c, which kafka-python does
not install by default.
"""

from __future__ import annotations

import json
import sys
import time
import uuid

if sys.argv[1] == "plain":
    sys.modules["crc32c"] = None  # type: ignore[assignment]

from kafka import KafkaConsumer

address, topic, count = sys.argv[2], sys.argv[3], int(sys.argv[4])
client = KafkaConsumer(topic, bootstrap_servers=address, group_id=str(uuid.uuid4()), auto_offset_reset="earliest")


def take() -> int:
    """Poll once and decode the messages."""
    handled = 0
    for records in client.poll(timeout_ms=500).values():
        for record in records:
            json.loads(record.value)
            handled += 1
    return handled


first = 0
while not first:
    first = take()
handled, start = first, time.perf_counter()
while handled < count:
    handled += take()
print((handled - first) / (time.perf_counter() - start))
client.close()
