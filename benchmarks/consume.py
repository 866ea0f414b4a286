"""Measure messages per second through a consumer on Apache Kafka: kser with commit="after", and other programs.

Tasks do nothing, messages have 300 bytes, the topic has 4 partitions, and logs are at WARNING. The programs read the
same topic from its beginning, one after the other, each in its own process. kafka-python runs twice: without the
package crc32c, which is its default installation, and with crc32c, which kser requires.

Usage: ``python benchmarks/consume.py [COUNT [ORACLE_PYTHON [FASTSTREAM_PYTHON]]]`` (100,000 messages by default).
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import ROUNDS, fill, kafka, new_topic

CHILDREN = Path(__file__).parent / "consumers"
#: The number of messages for FastStream and kser 0.8.27, which are slow. Their rate does not depend on this number.
FEWER = 20_000


def rate(python: str, script: str, *arguments: object) -> float:
    """Run a measurement in its own process, and return the rate that it prints."""
    command = [python, str(CHILDREN / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600)
    return float(done.stdout.split()[-1])


def main() -> None:
    arguments = sys.argv[1:]
    count = int(arguments[0]) if arguments else 100_000
    logging.basicConfig(level=logging.WARNING)
    subjects = {
        "kafka-python, poll and json.loads": (sys.executable, "bare_kafka.py", "plain"),
        "kafka-python with crc32c": (sys.executable, "bare_kafka.py", "crc32c"),
        "kser, kafka-python": (sys.executable, "kser_consumer.py", "python_kafka"),
        "confluent-kafka, consume and json.loads": (sys.executable, "bare_confluent.py"),
        "kser, confluent": (sys.executable, "kser_consumer.py", "confluent"),
    }
    for python, name, script in zip(
        arguments[1:],
        ("kser 0.8.27, unsafe", "FastStream, NACK_ON_ERROR"),
        ("published.py", "faststream_nack.py"),
        strict=False,
    ):
        subjects[name] = (python, script)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, kafka() as address:
        os.environ["LOCK_PATH"] = folder
        topic = new_topic(address)
        fill(address, topic, count)
        rates: dict[str, list[float]] = {name: [] for name in subjects}
        for _ in range(ROUNDS):
            for name, (python, script, *transport) in subjects.items():
                number = count if python == sys.executable else min(count, FEWER)
                rates[name].append(rate(python, script, *transport, address, topic, number))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"{name}: {median:,.0f}/s")
    for ours, other in (
        ("kser, kafka-python", "kafka-python, poll and json.loads"),
        ("kser, kafka-python", "kafka-python with crc32c"),
        ("kser, kafka-python", "kser 0.8.27, unsafe"),
        ("kser, confluent", "confluent-kafka, consume and json.loads"),
        ("kser, confluent", "FastStream, NACK_ON_ERROR"),
    ):
        if other in medians:
            print(f"{ours} / {other}: {medians[ours] / medians[other]:.2f}")


if __name__ == "__main__":
    main()
