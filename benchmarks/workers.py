"""Measure messages per second of tasks that sleep 10 ms, with 50 workers, on Apache Kafka. The ideal rate is 5,000.

Usage: ``python benchmarks/workers.py [COUNT]`` (20,000 messages by default).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile

from bench import ROUNDS, fill, kafka, new_topic
from consume import rate

WORKERS = 50
SLEEP = 0.01


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, kafka() as address:
        os.environ["LOCK_PATH"] = folder
        topic = new_topic(address)
        fill(address, topic, count)
        for transport in ("python_kafka", "confluent"):
            arguments = (transport, address, topic, count, WORKERS, SLEEP)
            rates = [rate(sys.executable, "kser_consumer.py", *arguments) for _ in range(ROUNDS)]
            median = statistics.median(rates)
            print(f"{transport}, {WORKERS} workers: {median:,.0f}/s, {median * SLEEP / WORKERS:.2f} of the ideal")


if __name__ == "__main__":
    main()
