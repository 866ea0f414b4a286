"""Measure huey: ``python huey_pipeline.py FILE COUNT [WORKERS]`` prints steps/s of pipelines of 5 no-op tasks.

huey uses SQLite with FULL (``fsync=True``) and WAL, and stores results. The script queues all pipelines before the
consumer starts. The default is one worker, because SQLite has one writer. Two, four and eight workers were slower.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time

from huey import SqliteHuey

file, count = sys.argv[1], int(sys.argv[2])
workers = int(sys.argv[3]) if len(sys.argv) > 3 else 1
logging.basicConfig(level=logging.WARNING)
huey = SqliteHuey(filename=file, fsync=True, journal_mode="wal", timeout=30)
started, ended = itertools.count(1), itertools.count(1)
times: list[float] = []
over = threading.Event()


@huey.task()
def first() -> dict[str, int]:
    if next(started) == 1:
        times.append(time.perf_counter())
    return {"done": 1}


@huey.task()
def middle(done: int) -> dict[str, int]:
    return {"done": done}


@huey.task()
def last(done: int) -> dict[str, int]:
    if next(ended) == count:
        times.append(time.perf_counter())
        over.set()
    return {"done": done}


for _ in range(count):
    huey.enqueue(first.s().then(middle).then(middle).then(middle).then(last))
consumer = huey.create_consumer(
    workers=workers,
    worker_type="thread",
    initial_delay=0.001,
    max_delay=0.01,
    periodic=False,
    check_worker_health=False,
)
consumer.start()
over.wait(300)
consumer.stop(graceful=True)
print(count * 5 / (times[1] - times[0]))
