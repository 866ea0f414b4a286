"""Measure kser: ``python kser_consumer.py TRANSPORT ADDRESS TOPIC COUNT [WORKERS [SLEEP]]`` prints messages per second.

The measured time is from the start of the first task to the end of the last task. kser commits offsets after the tasks.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kser.controller import Controller
from kser.entry import Entrypoint

transport, address, topic = sys.argv[1:4]
count, workers, sleep = (
    kind(text) for kind, text in zip((int, int, float), ([*sys.argv[4:], "1", "0"])[:3], strict=False)
)
logging.basicConfig(level=logging.WARNING)
started = itertools.count(1)
ended = itertools.count(1)
times: list[float] = []


class Noop(Entrypoint):
    """A task that does nothing, or sleeps."""

    def run(self) -> None:
        if next(started) == 1:
            times.append(time.perf_counter())
        if sleep:
            time.sleep(sleep)
        if next(ended) == count:
            times.append(time.perf_counter())
            consumer.stop()


Controller.register("bench.Noop", Noop)
group = str(uuid.uuid4())
config = (
    {"bootstrap_servers": address, "group_id": group}
    if transport == "python_kafka"
    else {"bootstrap.servers": address, "group.id": group}
)
consumer = importlib.import_module(f"kser.{transport}.consumer").Consumer(config, [topic], workers=workers)
try:
    consumer.run()
except SystemExit:
    print((count - 1) / (times[1] - times[0]))
