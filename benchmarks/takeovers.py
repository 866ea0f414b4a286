"""Measure how soon stored operations continue: after SIGKILL of their consumer, for a retry, and after a resume.

Two consumers with default settings and 50 workers each run on Apache Kafka. One of them has the partition, and the
other one is idle. The first one is killed while it runs 50 operations.

Usage: ``python benchmarks/takeovers.py [COUNT]`` (50 operations by default).
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import uuid
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from bench import kafka

from tests.kafka.broker import Kafka
from tests.kafka.continuation import (
    DISTRIBUTED,
    LOCAL,
    Case,
    Fleet,
    delays_after_kill,
    percentile,
    resume_delays,
    retry_delays,
)
from tests.postgres import Database, Postgresql

TRANSPORTS = ("python_kafka", "confluent")
STORES = ("sqlite", "postgresql")
MODES = {"in one consumer": LOCAL, "over the consumers": DISTRIBUTED}


@contextlib.contextmanager
def new_database(store: str, folder: Path) -> Iterator[str]:
    """Yield the address of an empty database."""
    if store == "sqlite":
        yield f"sqlite:///{folder / 'kser.db'}"
        return
    with Postgresql() as server, contextlib.closing(Database(server.uri)) as database:
        yield database.uri


def measure(address: str, transport: str, store: str, mode: str, count: int) -> str:
    """Return a row of the table."""
    with tempfile.TemporaryDirectory() as name, new_database(store, Path(name)) as uri:
        broker, topic = Kafka(address), f"takeovers-{uuid.uuid4().hex[:8]}"
        broker.create_topic(topic)
        with contextlib.closing(Fleet(broker, topic, Case(transport, uri), Path(name), count)) as fleet:
            fleet.start_two()
            retries, resumes = retry_delays(fleet, count), resume_delays(fleet, count)
            fleet.wait_for_trust()
            continued = delays_after_kill(fleet, [MODES[mode]], count)
    return " | ".join(
        [
            *(transport, store, mode),
            *(f"{seconds:.2f} s" for seconds in (statistics.median(continued), max(continued))),
            *(f"{seconds:.2f} s" for seconds in (percentile(retries, 0.95), max(retries))),
            f"{percentile(resumes, 0.95):.2f} s",
        ]
    )


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    print("client | store | mode | killed: median | killed: longest | retry: p95 | retry: longest | resume: p95")
    with kafka() as address:
        for transport, store, mode in product(TRANSPORTS, STORES, MODES):
            print(measure(address, transport, store, mode, count), flush=True)


if __name__ == "__main__":
    main()
