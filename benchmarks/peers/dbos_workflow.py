"""Measure DBOS Transact: ``python dbos_workflow.py URI COUNT [KIND]`` prints steps/s of workflows of 5 no-op steps.

DBOS runs on PostgreSQL with a pool of 50 connections. It polls its queue every 10 ms, and runs 50 workflows at a time.
Logs are at WARNING. KIND is ``sync`` or ``async``. The default is ``sync``, which was faster. Another process queues
all workflows before this process reads the queue.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time

from dbos import DBOS, DBOSClient, DBOSConfig

IN_FLIGHT = 50
QUEUE = "benchmark"

uri, count = sys.argv[1].replace("postgresql+psycopg://", "postgresql://"), int(sys.argv[2])
kind = sys.argv[3] if len(sys.argv) > 3 else "sync"
fills = sys.argv[-1] == "fill"
config: DBOSConfig = {
    "name": "benchmark",
    "application_version": "1",
    "system_database_url": uri,
    "sys_db_pool_size": IN_FLIGHT,
    "log_level": "WARNING",
}
started, ended = itertools.count(1), itertools.count(1)
times: list[float] = []
over = threading.Event()


def begin() -> None:
    if next(started) == 1:
        times.append(time.perf_counter())


@DBOS.step()
def noop() -> dict[str, int]:
    return {"done": 1}


@DBOS.workflow()
def five() -> dict[str, int]:
    begin()
    for _ in range(5):
        done = noop()
    return done


@DBOS.step()
async def noop_async() -> dict[str, int]:
    return {"done": 1}


@DBOS.workflow()
async def five_async() -> dict[str, int]:
    begin()
    for _ in range(5):
        done = await noop_async()
    return done


def fill() -> None:
    DBOS(config=config)
    DBOS.listen_queues([])
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=IN_FLIGHT, polling_interval_sec=0.01)
    name = five_async.__qualname__ if kind == "async" else five.__qualname__
    client = DBOSClient(system_database_url=uri)
    for _ in range(count):
        client.enqueue({"queue_name": QUEUE, "workflow_name": name, "app_version": "1"})
    client.destroy()
    DBOS.destroy()


def run() -> None:
    DBOS(config=config)
    DBOS.listen_queues([QUEUE])
    DBOS.launch()
    # A workflow's end is recorded shortly after its function returns, so wait for the database.
    while DBOS.list_workflows(status=["ENQUEUED", "PENDING"], limit=1, load_input=False, load_output=False):
        time.sleep(0.05)
    print(count * 5 / (time.perf_counter() - times[0]))
    DBOS.destroy()


if fills:
    fill()
else:
    subprocess.run([sys.executable, __file__, uri, str(count), kind, "fill"], check=True, timeout=300)
    run()
