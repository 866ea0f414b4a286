"""Run one workload of ``compare_commits.py``: ``python _workloads.py NAME [ARGUMENT...]`` prints one number as JSON.

PYTHONPATH names the checkout whose kser this process imports. The workloads use only public names of kser, so that they
work with both commits.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import resource
import runpy
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# Import kser first, because the scripts that are imported later put this checkout before PYTHONPATH.
import kser

HERE = Path(__file__).resolve().parent
#: Rounds of routing, and of imports, in a measurement. The fastest round counts, because other processes can only make
#: a round slower.
ROUNDS, IMPORTS = 5, 7
#: The number of messages in the run whose memory is measured.
MEMORY_MESSAGES = 20_000
#: The number of operations whose latency is measured, the number of operations that run before to warm up, and the
#: seconds between two operations.
OPERATIONS, WARM_UP, INTERVAL = 150, 20, 0.005


def routing() -> float:
    """Return the messages per second through ``Controller.run``, with logs at WARNING."""
    sys.stdin, output = io.StringIO("WARNING\n" * ROUNDS), io.StringIO()
    with redirect_stdout(output):
        import_module("routing").serve()
    return max(map(float, output.getvalue().split()))


def memory() -> float:
    """Return the peak memory in MB of a process that runs messages through ``Controller.run``."""
    from kser import Controller, Entrypoint

    class Noop(Entrypoint):
        def run(self) -> None:
            return None

    Controller.register("__main__.Noop", Noop)
    raw = import_module("routing").message()
    for _ in range(MEMORY_MESSAGES):
        Controller.run(raw)
    with suppress(OSError), open("/proc/self/status") as status:
        # Read the peak of this program from /proc, because ru_maxrss may include the process that started this program.
        (line,) = (line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def consuming(transport: str, address: str, topic: str, number: str) -> float:
    """Return the messages per second from the development broker, from the first task to the last task.

    The consumer commits offsets after tasks.
    """
    from kser import Controller, Entrypoint

    count = int(number)
    started = itertools.count(1)
    times: list[float] = []

    class Noop(Entrypoint):
        def run(self) -> None:
            place = next(started)
            if place in (1, count):
                times.append(time.perf_counter())
            if place == count:
                consumer.stop()

    Controller.register("bench.Noop", Noop)
    options: dict[str, Any] = {"bootstrap.servers": address, "group.id": str(uuid.uuid4())}
    if transport == "python_kafka":
        # The development broker needs this version; ``EmbeddedBroker.producer_config`` explains the reason.
        options = {name.replace(".", "_"): value for name, value in options.items()} | {"api_version": (2, 0)}
    consumer = import_module(f"kser.{transport}.consumer").Consumer(options, [topic])
    with suppress(SystemExit):
        consumer.run()
    return (count - 1) / (times[1] - times[0])


def operations(uri: str, count: str, workers: str) -> float:
    """Return the steps per second of stored operations in one consumer on the dummy transport."""
    sys.argv = ["operations.py", "dummy", "", "operations", uri, count, workers]
    output = io.StringIO()
    with redirect_stdout(output):
        runpy.run_path(str(HERE / "consumers" / "operations.py"), run_name="__main__")
    return float(output.getvalue())


def latency(uri: str) -> float:
    """Return the median milliseconds from sending an operation of 5 steps to its recorded end, in an idle consumer."""
    from cdumay_result import Result

    from kser import Message, Operation, OperationRegistry, Task, signals
    from kser.dummy.consumer import Consumer
    from kser.dummy.producer import Producer
    from kser.store import open_store

    registry = OperationRegistry(store=open_store(uri))
    ended = threading.Event()
    times: list[float] = []

    @registry.subscribe
    class Noop(Task):
        def run(self) -> Result:
            return Result(uuid=self.uuid, retval={"done": 1})

    @registry.subscribe
    class Five(Operation):
        def build_tasks(self, **_: object) -> list[Task]:
            return [Noop() for _ in range(5)]

    def changed(_: object, **change: object) -> None:
        if change["new"] == "SUCCESS":
            times.append(time.perf_counter())
            ended.set()

    def send() -> None:
        producer = Producer({})
        for _ in range(WARM_UP + OPERATIONS):
            time.sleep(INTERVAL)
            ended.clear()
            times.append(time.perf_counter())
            producer.send("latency", Message(uuid=str(uuid.uuid4()), entrypoint=Five.path))
            ended.wait(30)
        consumer.stop()

    signals.operation_changed.connect(changed)
    consumer = Consumer({}, ["latency"])
    threading.Thread(target=send, daemon=True).start()
    with suppress(SystemExit):
        consumer.run()
    spans = [(end - start) * 1000 for start, end in zip(times[::2], times[1::2], strict=True)]
    return statistics.median(spans[WARM_UP:])


def importing(statement: str) -> float:
    """Return the milliseconds that an import takes in a new process."""
    program = f"import time; start = time.perf_counter(); {statement}; print((time.perf_counter() - start) * 1000)"
    runs = (subprocess.run([sys.executable, "-c", program], capture_output=True, check=True) for _ in range(IMPORTS))
    return min(float(done.stdout) for done in runs)


WORKLOADS: dict[str, Callable[..., float]] = {
    workload.__name__: workload for workload in (routing, memory, consuming, operations, latency, importing)
}


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    wanted = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0]).resolve()
    found = Path(str(kser.__file__)).resolve()
    if not found.is_relative_to(wanted):
        sys.exit(f"{found} was imported, which is not in {wanted}")
    name, *arguments = sys.argv[1:]
    print(json.dumps(WORKLOADS[name](*arguments)))


if __name__ == "__main__":
    main()
