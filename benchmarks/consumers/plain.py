"""Measure plain tasks: ``python plain.py ADDRESS TOPIC COUNT [URI]`` prints tasks per second and database calls.

The tasks do nothing and belong to no operation. They run in a confluent consumer. With URI, the registry of the
consumer has a store. The script does not count the queries of the background threads, which run about five per second.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kser import OperationRegistry, Task
from kser.attempt import current_attempt
from kser.confluent.consumer import Consumer
from kser.store import open_store

address, topic, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
uri = sys.argv[4] if len(sys.argv) > 4 else None
logging.basicConfig(level=logging.WARNING)
calls: list[str] = []
times: list[float] = []
started, ended = itertools.count(1), itertools.count(1)


class Counted:
    """A store that records its calls while a message is handled."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return self._noted(name, found) if callable(found) else found

    @staticmethod
    def _noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            if current_attempt.get() is not None:
                calls.append(name)
            return call(*args, **options)

        return noted


registry = OperationRegistry(store=Counted(open_store(uri)) if uri else None)  # type: ignore[arg-type]


class Noop(Task):
    """A task that does nothing."""

    __module__ = "bench"

    def run(self) -> None:
        if next(started) == 1:
            times.append(time.perf_counter())
        if next(ended) == count:
            times.append(time.perf_counter())
            consumer.stop()


registry.subscribe(Noop)
consumer = Consumer({"bootstrap.servers": address, "group.id": str(uuid.uuid4())}, [topic])
try:
    consumer.run()
except SystemExit:
    print((count - 1) / (times[1] - times[0]), len(calls))
