"""Measure the milliseconds from send to the start of the task in an idle consumer, and compare with the client alone.

A producer of confluent-kafka with linger 0 sends a message every 10 ms to Apache Kafka.

Usage: ``python benchmarks/latency.py [COUNT]`` (1,200 messages by default).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

import confluent_kafka
from bench import ROUNDS, kafka, new_topic
from consume import CHILDREN

from kser.schemas import Message

INTERVAL = 0.01


def measure(kind: str, address: str, count: int) -> float:
    """Return the median latency of one consumer, measured in its own process."""
    topic = new_topic(address)
    command = [sys.executable, str(CHILDREN / "latency.py"), kind, address, topic, str(count)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    producer = confluent_kafka.Producer({"bootstrap.servers": address, "linger.ms": 0})
    for number in range(count):
        kmsg = Message(uuid=str(number), entrypoint="bench.Stamped", params={"sent": time.monotonic()})
        producer.produce(topic, kmsg.dumps().encode())
        producer.poll(0)
        time.sleep(INTERVAL)
    producer.flush(10)
    return float(child.communicate(timeout=60)[0].split()[-1])


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1200
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, kafka() as address:
        os.environ["LOCK_PATH"] = folder
        for kind in ("python_kafka", "confluent"):
            pairs = [[measure(each, address, count) for each in (kind, f"bare_{kind}")] for _ in range(ROUNDS)]
            ours, bare = (statistics.median(column) for column in zip(*pairs, strict=False))
            print(f"{kind}: p50 {ours:.2f} ms, bare client {bare:.2f} ms, {ours - bare:.2f} ms above")


if __name__ == "__main__":
    main()
