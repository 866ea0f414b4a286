"""Measure kser: ``python operations.py TRANSPORT ADDRESS TOPIC URI COUNT [WORKERS [MODE [STEPS]]]`` prints steps/s.

Stored operations have STEPS (5) tasks that do nothing. Up to WORKERS (50) operations are in flight, in MODE ``local``
or ``distributed``. The measured time begins when the first operation is built, and ends when the end of the last
operation is recorded.
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

from cdumay_result import Result

from kser import Message, Operation, OperationRegistry, Task, signals
from kser.store import open_store

transport, address, topic, uri, number = sys.argv[1:6]
workers, mode, steps = [*sys.argv[6:], *["50", "local", "5"][len(sys.argv) - 6 :]][:3]
count = int(number)
logging.basicConfig(level=logging.WARNING)

registry = OperationRegistry(store=open_store(uri))
built, ended = itertools.count(1), itertools.count(1)
times: list[float] = []


@registry.subscribe
class Noop(Task):
    """A task with no work and a small result."""

    TOPIC = topic

    def run(self) -> Result:
        return Result(uuid=self.uuid, retval={"done": 1})


@registry.subscribe
class Five(Operation):
    """An operation of ``STEPS`` no-op tasks."""

    DISTRIBUTED = mode == "distributed"

    def build_tasks(self, **kwargs: object) -> list[Task]:
        if next(built) == 1:
            times.append(time.perf_counter())
        return [Noop() for _ in range(int(steps))]


def note(sender: object, **change: object) -> None:
    if change["new"] == "SUCCESS" and next(ended) == count:
        times.append(time.perf_counter())
        consumer.stop()


signals.operation_changed.connect(note)
if transport == "dummy":
    from kser.dummy.producer import Producer

    producer = Producer({})
    for _ in range(count):
        producer.send(topic, Message(uuid=str(uuid.uuid4()), entrypoint=Five.path, params={"order": 42}))
    config = {}
elif transport == "python_kafka":
    config = {"bootstrap_servers": address, "group_id": str(uuid.uuid4())}
else:
    # Set no linger, so that kser sends the messages of steps with its default, ``linger.ms`` 0.
    config = {"bootstrap.servers": address, "group.id": str(uuid.uuid4())}
consumer = importlib.import_module(f"kser.{transport}.consumer").Consumer(config, [topic], workers=int(workers))
try:
    consumer.run()
except SystemExit:
    print(count * int(steps) / (times[1] - times[0]))
