"""Measure the latency of operations: ``python operation_latency.py ADDRESS TOPIC URI COUNT`` prints two medians.

Each operation has 5 steps and runs in one confluent consumer. The first median is the milliseconds from sending the
message to the end of the last task. The second median is the milliseconds from sending the message to the recorded end
of the operation. The message contains the time when it was sent, by the monotonic clock of this machine.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task, signals
from kser.confluent.consumer import Consumer
from kser.store import open_store

address, topic, uri, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
logging.basicConfig(level=logging.WARNING)
registry = OperationRegistry(store=open_store(uri))
sent: dict[str, float] = {}
tasks: list[float] = []
ends: list[float] = []


@registry.subscribe
class Noop(Task):
    """A task with no work and a small result."""

    def run(self) -> Result:
        return Result(uuid=self.uuid, retval={"done": 1})


@registry.subscribe
class Last(Noop):
    """The last task, which records the latency."""

    def onsuccess(self, result: Result) -> Result:
        tasks.append(time.monotonic() - sent[self.operation_uuid])
        return super().onsuccess(result)


@registry.subscribe
class Five(Operation):
    """An operation of five steps."""

    def build_tasks(self, **kwargs: object) -> list[Task]:
        sent[self.uuid] = self.params["sent"]
        return [*(Noop() for _ in range(4)), Last()]


def note(sender: object, **change: object) -> None:
    if change["new"] == "SUCCESS":
        ends.append(time.monotonic() - sent[str(change["uuid"])])
        if len(ends) == count:
            consumer.stop()


signals.operation_changed.connect(note)
consumer = Consumer({"bootstrap.servers": address, "group.id": str(uuid.uuid4()), "linger.ms": 0}, [topic])
try:
    consumer.run()
except SystemExit:
    # Skip the first half, because these messages waited until the consumer had joined its group.
    print(*(statistics.median(delays[count // 2 :]) * 1000 for delays in (tasks, ends)))
