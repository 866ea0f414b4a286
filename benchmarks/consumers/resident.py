"""Measure memory: ``python resident.py TRANSPORT ADDRESS TOPIC COUNT STARTED`` prints start time and memory.

The first figure is the seconds from STARTED, which is a time of this machine's monotonic clock, to the first poll. The
other figures are the resident memory in MB: when the consumer is idle, after a tenth of the messages, and after all
messages.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kser.controller import Controller
from kser.entry import Entrypoint

transport, address, topic, count, started = *sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5])
logging.basicConfig(level=logging.WARNING)
handled = itertools.count(1)
figures: list[float] = []


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Noop(Entrypoint):
    """A task that does nothing but count messages."""

    def run(self) -> None:
        number = next(handled)
        if number in (count // 10, count):
            figures.append(resident())
        if number == count:
            consumer.stop()


Controller.register("bench.Noop", Noop)
names = {"python_kafka": ("bootstrap_servers", "group_id"), "confluent": ("bootstrap.servers", "group.id")}[transport]
base: Any = importlib.import_module(f"kser.{transport}.consumer").Consumer


class Consumer(base):
    """A consumer that records the time of its first poll."""

    def _kser_connect(self) -> Any:
        client = super()._kser_connect()
        poll = client.poll

        def noted(*arguments: Any) -> Any:
            if not figures:
                figures.extend((time.monotonic() - started, resident()))
            return poll(*arguments)

        client.poll = noted
        return client


consumer = Consumer(dict(zip(names, (address, str(uuid.uuid4())), strict=False)), [topic])
try:
    consumer.run()
except SystemExit:
    print(*figures)
