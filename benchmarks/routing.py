"""Measure ``Controller.run`` with a message of 300 bytes and a task that does nothing, in kser and in kser 0.8.27.

Both are compared with the floor, which is the minimum work of any implementation: one ``json.loads``, one ``Result``
and one ``json.dumps``. The rounds of all three alternate, and each figure is the median of its rounds. The control
files are in memory, because kser 0.8.27 is fastest there.

Usage: ``python benchmarks/routing.py ORACLE_PYTHON`` (the interpreter of an environment that has kser 0.8.27).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LEVELS = ("WARNING", "INFO", "DEBUG")
ROUNDS = 7


def message() -> bytes:
    """Return a message of 300 bytes, encoded as a producer sends it."""
    data = {
        "uuid": "872c3be0-51ac-457f-a4d9-12c2f7667b80",
        "entrypoint": "__main__.Noop",
        "params": {"order": 42, "customer": ""},
        "result": {
            "uuid": "872c3be0-51ac-457f-a4d9-12c2f7667b80",
            "retcode": 0,
            "stdout": "",
            "stderr": "",
            "retval": {},
        },
        "metadata": {},
    }
    data["params"]["customer"] = "x" * (300 - len(json.dumps(data)))
    return json.dumps(data).encode()


def measure(run, seconds: float = 0.4) -> float:
    """Return the number of calls of ``run`` per second."""
    raw = message()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(100):
            run(raw)
        count += 100
    return count / elapsed


def floor(raw: bytes) -> str:
    """Do the minimum work of any implementation."""
    from cdumay_result import Result

    data = json.loads(raw)
    data["result"] = vars(Result(**data["result"]))
    return json.dumps(data)


def serve() -> None:
    """Run one measurement per line of standard input, in the environment of this interpreter."""
    from kser.controller import Controller
    from kser.entry import Entrypoint

    class Noop(Entrypoint):
        def run(self):
            return None

    Controller.register("__main__.Noop", Noop)
    logging.getLogger().addHandler(logging.NullHandler())
    for line in sys.stdin:
        what = line.strip()
        if what == "floor":
            rate = measure(floor)
        else:
            logging.getLogger().setLevel(what)
            rate = measure(Controller.run)
        print(rate, flush=True)


class Server:
    """A process that runs measurements in one environment."""

    def __init__(self, python: str, lock_path: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LOCK_PATH": lock_path, **environment},
        )

    def ask(self, what: str) -> float:
        """Run one round, and return its rate."""
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Stop the process."""
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("oracle", nargs="?", help="the Python of an environment with kser 0.8.27")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    if not arguments.oracle:
        parser.error("name the interpreter of an environment that has kser==0.8.27 and marshmallow<4")
    root = str(Path(__file__).resolve().parent.parent)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as ours, tempfile.TemporaryDirectory(dir=memory) as theirs:
        servers = {
            "kser": Server(sys.executable, ours, PYTHONPATH=root),
            "0.8.27": Server(arguments.oracle, theirs, PYTHONPATH=""),
        }
        print(f"{'level':10}{'kser/s':>10}{'0.8.27/s':>10}{'floor/s':>10}{'x 0.8.27':>10}{'floor x':>10}")
        for level in LEVELS:
            rounds = [
                (servers["kser"].ask(level), servers["0.8.27"].ask(level), servers["kser"].ask("floor"))
                for _ in range(ROUNDS)
            ]
            kser, published, lowest = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(
                f"{level:10}{kser:10,.0f}{published:10,.0f}{lowest:10,.0f}{kser / published:10.1f}{lowest / kser:10.2f}"
            )
        for server in servers.values():
            server.close()


if __name__ == "__main__":
    main()
