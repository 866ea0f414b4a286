"""Measure Celery: ``python celery_chain.py COUNT`` prints steps per second of chains of 5 no-op tasks on Redis.

Celery uses acks_late, stored results, prefork with two processes, and 25 prefetched messages for each process. The
script switches off gossip, mingle and heartbeats. It starts Redis on a free port of this machine without persistence,
which is the fastest mode of Redis, and stops Redis at the end. It queues all chains before the worker starts.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from celery import Celery, chain
from redis import Redis

address = os.environ.get("BENCHMARK_REDIS", "redis://127.0.0.1:6379")
app = Celery("celery_chain", broker=f"{address}/0", backend=f"{address}/1")
app.conf.update(
    task_acks_late=True,
    task_ignore_result=False,
    worker_prefetch_multiplier=25,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    broker_connection_retry_on_startup=True,
    result_expires=3600,
)


@app.task(name="first")
def first() -> dict[str, int]:
    return {"done": 1}


@app.task(name="following")
def following(before: dict[str, int]) -> dict[str, int]:
    return before


@contextmanager
def redis_server() -> Iterator[int]:
    """Start a Redis server, and yield its port."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("there is no redis-server on the PATH; install it (Debian: redis-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", "", "--appendonly", "no"]
        server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        try:
            yield port
        finally:
            server.terminate()
            server.wait(10)


def measure(port: int, count: int) -> float:
    """Return the steps per second."""
    environment = {**os.environ, "BENCHMARK_REDIS": f"redis://127.0.0.1:{port}"}
    fill = [sys.executable, __file__, "fill", str(count)]
    subprocess.run(fill, env=environment, check=True, timeout=300)
    results = Redis(port=port, db=1)
    command = [sys.executable, "-m", "celery", "-A", "celery_chain", "worker", "--pool", "prefork", "-c", "2"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "WARNING"]
    folder = os.path.dirname(os.path.abspath(__file__))
    worker = subprocess.Popen([*command, *quiet], env=environment, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        # Each finished task adds one key to the result backend, so its size counts the steps.
        while not (at_first := results.dbsize()):
            time.sleep(0.001)
        began = time.perf_counter()
        while results.dbsize() < count * 5:
            if worker.poll() is not None or time.perf_counter() - began > 300:
                raise SystemExit("the chains did not end")
            time.sleep(0.01)
        return (count * 5 - at_first) / (time.perf_counter() - began)
    finally:
        worker.terminate()
        worker.wait(30)


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        for _ in range(int(sys.argv[2])):
            chain(first.s(), *[following.s()] * 4).apply_async()
    else:
        with redis_server() as own_port:
            print(measure(own_port, int(sys.argv[1])))
