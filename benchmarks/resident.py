"""Measure the resident memory of an idle and of a busy consumer, and the time from its start to its first poll.

Usage: ``python benchmarks/resident.py [COUNT]`` (1,000,000 messages by default).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from bench import fill, kafka, new_topic
from consume import CHILDREN


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, kafka() as address:
        os.environ["LOCK_PATH"] = folder
        topic = new_topic(address)
        fill(address, topic, count)
        for transport in ("python_kafka", "confluent"):
            arguments = [transport, address, topic, count, time.monotonic()]
            command = [sys.executable, str(CHILDREN / "resident.py"), *map(str, arguments)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            start, idle, tenth, full = map(float, done.stdout.split())
            print(
                f"{transport}: {start:.2f} s to the first poll; {idle:.0f} MB idle, {tenth:.0f} MB after"
                f" {count // 10:,} messages, {full - tenth:+.1f} MB more after {count:,}"
            )


if __name__ == "__main__":
    main()
