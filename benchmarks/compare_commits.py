"""Compare two commits of this repository: run every benchmark on both commits in turn, each time in a new process.

Usage: ``python benchmarks/compare_commits.py OLD NEW [--pairs 15] [--only NAME]``. The script prints the median of each
commit. It also prints the median of the ratios NEW / OLD with its 90 % bootstrap interval. A benchmark fails if the
whole interval is below 0.97 (rates) or above 1.03 (times and memory). In this case the exit status is 1. With fewer
than 5 pairs, no benchmark can fail.

Both commits run with the packages of this environment, and with the workloads of this checkout (``_workloads.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SEED = 1
RESAMPLES = 5000
LOWEST_RATE, HIGHEST_COST = 0.97, 1.03
#: The smallest number of pairs that allows a result. The true median lies outside of n values with a probability of
#: 2 / 2 ** n, which is above 10 % for 4 pairs.
FEWEST_PAIRS = 5
MESSAGES = 20_000
OPERATIONS, WORKERS = 1000, 20
TOPIC = "compare"
CHILD_SECONDS = 180


class Unavailable(Exception):
    """A benchmark cannot run on this machine. The text contains the reason."""


class World:
    """The folders, the broker and the database server that the benchmarks share. Each server starts when it is needed.

    :param stack: the stack that stops the servers and removes the folders.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kser-compare-")))
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._locks = stack.enter_context(tempfile.TemporaryDirectory(dir=memory))
        self._broker = ""
        self._server: tuple[Callable[[str], str], Callable[[str], object]] | None = None

    def checkout(self, name: str, commit: str) -> Path:
        """Create a worktree of a commit, which the stack removes, and return its path."""
        path = self.folder / name
        git = ["git", "-C", str(ROOT), "worktree"]
        self._stack.callback(subprocess.run, [*git, "remove", "--force", str(path)], capture_output=True)
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        return path

    def run(self, checkout: Path, *command: object) -> str:
        """Run Python with the kser of a checkout, and return the standard output."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KSER_")}
        for name in ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE"):
            environment.pop(name, None)
        environment |= {"PYTHONPATH": str(checkout), "LOCK_PATH": self._locks}
        full = [sys.executable, *map(str, command)]
        done = subprocess.run(
            full, stdout=subprocess.PIPE, text=True, timeout=CHILD_SECONDS, env=environment, cwd=self.folder
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(full)} ended with status {done.returncode}, kser of {checkout}")
        return done.stdout

    def workload(self, checkout: Path, *arguments: object) -> float:
        """Run a workload, and return the number that it prints."""
        output = self.run(checkout, Path(__file__).with_name("_workloads.py"), *arguments)
        return float(json.loads(output.splitlines()[-1]))

    def broker(self) -> str:
        """Return the address of a development broker that contains the messages."""
        if not self._broker:
            from bench import fill

            from kser.embedded import EmbeddedBroker

            self._broker = self._stack.enter_context(EmbeddedBroker(TOPIC)).bootstrap_servers
            fill(self._broker, TOPIC, MESSAGES)
        return self._broker

    @contextmanager
    def sqlite(self, checkout: Path) -> Iterator[str]:
        """Return the address of a new SQLite database."""
        with tempfile.TemporaryDirectory(dir=self.folder) as own:
            yield f"sqlite:///{own}/compare.db"

    @contextmanager
    def postgresql(self, checkout: Path) -> Iterator[str]:
        """Return the address of a new PostgreSQL database that has the tables of the checkout.

        :raises Unavailable: PostgreSQL is not installed.
        """
        if self._server is None:
            self._server = self._start_postgresql()
        address, execute = self._server
        name = f"compare_{uuid.uuid4().hex[:12]}"
        execute(f"CREATE DATABASE {name}")
        try:
            self.run(checkout, "-m", "kser.store", "upgrade", "--uri", address(name))
            yield address(name)
        finally:
            execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _start_postgresql(self) -> tuple[Callable[[str], str], Callable[[str], object]]:
        import psycopg

        from tests.postgres import Postgresql, ServiceMissing

        try:
            server = self._stack.enter_context(Postgresql())
        except ServiceMissing as missing:
            raise Unavailable(str(missing)) from missing
        connection = self._stack.enter_context(
            psycopg.connect(host="127.0.0.1", port=server.port, user="postgres", autocommit=True)
        )
        return server.uri_of, connection.execute


class Benchmark(NamedTuple):
    """A benchmark, which measures the kser of a checkout."""

    unit: str
    measure: Callable[[World, Path], float]

    @property
    def is_rate(self) -> bool:
        """Return whether a higher figure is better."""
        return self.unit.endswith("/s")


def operations(world: World, checkout: Path, kind: str) -> float:
    """Return the steps per second on a new database."""
    with getattr(world, kind)(checkout) as uri:
        return world.workload(checkout, "operations", uri, OPERATIONS, WORKERS)


def latency(world: World, checkout: Path) -> float:
    """Return the milliseconds of one operation on SQLite."""
    with world.sqlite(checkout) as uri:
        return world.workload(checkout, "latency", uri)


def consuming(world: World, checkout: Path, transport: str) -> float:
    """Return the messages per second from the development broker."""
    return world.workload(checkout, "consuming", transport, world.broker(), TOPIC, MESSAGES)


BENCHMARKS = {
    "routing": Benchmark("messages/s", lambda world, checkout: world.workload(checkout, "routing")),
    "kafka-python": Benchmark("messages/s", lambda world, checkout: consuming(world, checkout, "python_kafka")),
    "confluent": Benchmark("messages/s", lambda world, checkout: consuming(world, checkout, "confluent")),
    "sqlite": Benchmark("steps/s", lambda world, checkout: operations(world, checkout, "sqlite")),
    "postgresql": Benchmark("steps/s", lambda world, checkout: operations(world, checkout, "postgresql")),
    "latency": Benchmark("ms", latency),
    "import": Benchmark("ms", lambda world, checkout: world.workload(checkout, "importing", "import kser")),
    "import-names": Benchmark(
        "ms", lambda world, checkout: world.workload(checkout, "importing", "from kser import *")
    ),
    "memory": Benchmark("MB", lambda world, checkout: world.workload(checkout, "memory")),
}


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the 90 % bootstrap interval of the median."""
    chance = random.Random(SEED)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 20], medians[RESAMPLES - 1 - RESAMPLES // 20]


def compare(name: str, world: World, old: Path, new: Path, pairs: int) -> bool:
    """Measure both commits in turn, print the comparison, and return whether the benchmark passed."""
    benchmark = BENCHMARKS[name]
    measured: dict[Path, list[float]] = {old: [], new: []}
    try:
        # Do not count the first run, because it compiles modules and fills caches.
        for checkout in measured:
            benchmark.measure(world, checkout)
        for number in range(pairs):
            for checkout in (old, new) if number % 2 == 0 else (new, old):
                measured[checkout].append(benchmark.measure(world, checkout))
    except Unavailable as reason:
        print(f"{name:14}{'skipped':12}{reason}", flush=True)
        return True
    low, high = interval(ratios := [after / before for before, after in zip(*measured.values(), strict=True)])
    passed = high >= LOWEST_RATE if benchmark.is_rate else low <= HIGHEST_COST
    verdict = ("passed" if passed else "FAILED") if pairs >= FEWEST_PAIRS else "too few pairs"
    before, after = (statistics.median(values) for values in measured.values())
    print(
        f"{name:14}{benchmark.unit:12}{before:12,.2f}{after:12,.2f}{statistics.median(ratios):8.3f}"
        f"  {low:.3f} to {high:.3f}  {verdict}",
        flush=True,
    )
    return passed or pairs < FEWEST_PAIRS


def hash_of(commit: str) -> str:
    """Return the full hash of a commit."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"there is no commit {commit!r}")
    return found.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="the old commit")
    parser.add_argument("new", help="the new commit")
    parser.add_argument("--pairs", type=int, default=15, help="runs of each commit (15)")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run only this benchmark; repeatable")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error("--pairs must be 1 or more")
    commits = [hash_of(commit) for commit in (options.old, options.new)]
    # Convert SIGTERM to an exception, so that the script also cleans up after this signal.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with ExitStack() as stack:
        world = World(stack)
        old, new = (world.checkout(name, commit) for name, commit in zip(("old", "new"), commits, strict=True))
        print(f"old {commits[0]}, new {commits[1]}, {options.pairs} pairs, seed {SEED}")
        print(f"{'benchmark':14}{'unit':12}{'old':>12}{'new':>12}{'ratio':>8}  90 % interval   verdict", flush=True)
        passed = [compare(name, world, old, new, options.pairs) for name in options.only or BENCHMARKS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
