"""Measure steps per second of stored operations, and compare with the database driver alone and with other programs.

Operations have 5 tasks that do nothing, and 50 operations are in flight. They run in a confluent consumer on Apache
Kafka. SQLite uses FULL and WAL, and PostgreSQL runs on this machine with its default settings. The script measures the
programs in turn, each in its own process with its own database. Each figure is the median of ROUNDS (5) rounds.

Usage: ``python benchmarks/operations.py [--count 2000] [--peers DIR] [--only PART,...]``. DIR contains the environments
that ``benchmarks/peers/setup.sh DIR`` creates for the other programs. The parts are sqlite, postgresql, distributed,
cost, latency, plain, and peers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import confluent_kafka
from bench import PARTITIONS, ROUNDS, fill, kafka, new_topic
from consume import CHILDREN

from kser.schemas import Message
from tests.postgres import Database, Postgresql

PEERS = Path(__file__).parent / "peers"
PARTS = ("sqlite", "postgresql", "distributed", "cost", "latency", "plain", "peers")
IN_FLIGHT = 50
LONG = 10_000
#: The number of operations for the other programs, which are slow. Their rate does not depend on this number.
FEWER = 400
#: Seconds between two operations when the latency is measured.
INTERVAL = 0.05

Subject = Callable[[], Sequence[float]]


class Ratio(NamedTuple):
    """Two measurements of one run, and the target of their ratio."""

    ours: str
    other: str
    wanted: str


class World:
    """The broker, database server and sizes of all measurements.

    :param address: the address of Apache Kafka.
    :param server: the PostgreSQL server; None if no part needs one.
    :param folder: the folder for SQLite's files, on a disk.
    :param count: the number of operations per measurement.
    """

    def __init__(self, address: str, server: Postgresql | None, folder: Path, count: int) -> None:
        self.address = address
        self.server = server
        self.folder = folder
        self.count = count

    @contextmanager
    def database(self, kind: str) -> Iterator[str]:
        """Yield the URI of a new database."""
        if kind == "sqlite":
            with tempfile.TemporaryDirectory(dir=self.folder) as own:
                yield f"sqlite:///{own}/benchmark.db"
            return
        assert self.server is not None
        database = Database(self.server.uri)
        try:
            yield database.uri
        finally:
            database.close()

    # -- subjects ------------------------------------------------------------------------------------------------------

    def operations(self, kind: str, mode: str = "local", workers: int = IN_FLIGHT, steps: int = 5) -> Subject:
        """Return the measurement of kser's stored operations."""

        def measure() -> Sequence[float]:
            count = max(self.count * 5 // steps, 1)
            topic = new_topic(self.address)
            self._send(topic, count)
            with self.database(kind) as uri:
                arguments = ("confluent", self.address, topic, uri, count, workers, mode, steps)
                return child("operations.py", *arguments)

        return measure

    def raw(self, kind: str, together: int) -> Subject:
        """Return the measurement of the bare database driver."""

        def measure() -> Sequence[float]:
            with self.database(kind) as uri:
                return child("raw_rows.py", uri, self.count, together)

        return measure

    def latency(self, kind: str) -> Subject:
        """Return the measurement of the milliseconds until the last task ends, and until the end is recorded."""

        def measure() -> Sequence[float]:
            count = 200
            topic = new_topic(self.address)
            with self.database(kind) as uri:
                command = command_of("operation_latency.py", self.address, topic, uri, count)
                process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                producer = confluent_kafka.Producer({"bootstrap.servers": self.address, "linger.ms": 0})
                for _ in range(count):
                    kmsg = Message(str(uuid.uuid4()), "__main__.Five", params={"sent": time.monotonic()})
                    producer.produce(topic, kmsg.dumps().encode())
                    producer.poll(0)
                    time.sleep(INTERVAL)
                producer.flush(10)
                return numbers(process.communicate(timeout=60)[0])

        return measure

    def plain(self, topic: str, kind: str | None) -> Subject:
        """Return the measurement of plain tasks, with or without a store, and of their database calls."""

        def measure() -> Sequence[float]:
            if kind is None:
                return child("plain.py", self.address, topic, self.plain_count)
            with self.database(kind) as uri:
                return child("plain.py", self.address, topic, self.plain_count, uri)

        return measure

    @property
    def plain_count(self) -> int:
        """The number of plain tasks per measurement."""
        return self.count * 10

    def peer(self, python: Path, script: str, kind: str | None) -> Subject:
        """Return the measurement of another program in its environment."""

        def measure() -> Sequence[float]:
            count = min(self.count, FEWER)
            command = [str(python), str(PEERS / script)]
            if kind is None:
                return run([*command, str(count)])
            with self.database(kind) as uri:
                return run([*command, uri.removeprefix("sqlite:///"), str(count)])

        return measure

    def _send(self, topic: str, count: int) -> None:
        """Send operations to a topic."""
        producer = confluent_kafka.Producer({"bootstrap.servers": self.address, "linger.ms": 20})
        for number in range(count):
            kmsg = Message(str(uuid.uuid4()), "__main__.Five", params={"order": number})
            producer.produce(topic, kmsg.dumps().encode(), partition=number % PARTITIONS)
            producer.poll(0)
        if producer.flush(60):
            raise SystemExit(f"the topic could not be filled at {self.address}")


def command_of(script: str, *arguments: object) -> list[str]:
    """Return the command of a program in ``consumers``."""
    return [sys.executable, str(CHILDREN / script), *map(str, arguments)]


def child(script: str, *arguments: object) -> Sequence[float]:
    """Run a program in ``consumers``, and return the numbers that it prints."""
    return run(command_of(script, *arguments))


def run(command: list[str]) -> Sequence[float]:
    """Run a process, and return the numbers in its last line of output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if done.returncode or not done.stdout.strip():
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return numbers(done.stdout)


def numbers(text: str) -> Sequence[float]:
    """Return the numbers in the last line of a text."""
    return [float(word) for word in text.strip().splitlines()[-1].split()]


def fsync_milliseconds(folder: Path) -> float:
    """Return the median time of an fsync of 4 KiB."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(500):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


# -- comparisons -------------------------------------------------------------------------------------------------------


def databases(world: World, kind: str, driver: str, name: str) -> tuple[dict[str, Subject], list[Ratio]]:
    """Compare operations in one consumer with the bare database driver."""
    ours = f"kser in one consumer, {name}"
    floors = {f"raw {driver}, one step a transaction": 1, f"raw {driver}, {IN_FLIGHT} steps a transaction": IN_FLIGHT}
    subjects = {ours: world.operations(kind)} | {name: world.raw(kind, number) for name, number in floors.items()}
    return subjects, [Ratio(ours, floor, "0.5") for floor in floors]


def cost(world: World) -> tuple[dict[str, Subject], list[Ratio]]:
    """Compare the cost of a step in short and long operations, one operation at a time."""
    subjects: dict[str, Subject] = {}
    ratios = []
    for kind, name in (("sqlite", "SQLite"), ("postgresql", "PostgreSQL")):
        short, long = (f"one at a time, operations of {size:,} steps, {name}" for size in (5, LONG))
        subjects[short] = world.operations(kind, workers=1)
        subjects[long] = world.operations(kind, workers=1, steps=LONG)
        ratios.append(Ratio(short, long, "cost of a step, at most 1.2"))
    return subjects, ratios


def plain(world: World) -> tuple[dict[str, Subject], list[Ratio]]:
    """Compare plain tasks, which belong to no operation, with and without a store."""
    topic = new_topic(world.address)
    fill(world.address, topic, world.plain_count)
    without, beside = "plain tasks without a store", "plain tasks beside a store (SQLite)"
    subjects = {without: world.plain(topic, None), beside: world.plain(topic, "sqlite")}
    return subjects, [Ratio(beside, without, "1, and no database call")]


def peers(world: World, folder: Path) -> tuple[dict[str, Subject], list[Ratio]]:
    """Compare kser with the other programs whose environments exist."""
    subjects: dict[str, Subject] = {}
    ratios = []
    for name, script, kind, ours, title, wanted in (
        ("dbos", "dbos_workflow.py", "postgresql", "PostgreSQL", "DBOS Transact, PostgreSQL", "8"),
        ("celery", "celery_chain.py", None, "PostgreSQL", "Celery chain, Redis", "5"),
        ("huey", "huey_pipeline.py", "sqlite", "SQLite", "huey pipeline, SQLite", "3"),
    ):
        python = folder / name / "bin" / "python"
        if not python.exists():
            print(f"{name} is not measured: there is no {python}")
            continue
        subjects[title] = world.peer(python, script, kind)
        ratios.append(Ratio(f"kser in one consumer, {ours}", title, wanted))
    return subjects, ratios


def figures(world: World, parts: Sequence[str], folder: Path | None) -> tuple[dict[str, Subject], list[Ratio]]:
    """Return the measurements and ratios of the selected parts."""
    subjects: dict[str, Subject] = {}
    ratios: list[Ratio] = []
    found: list[tuple[dict[str, Subject], list[Ratio]]] = []
    if "sqlite" in parts:
        found.append(databases(world, "sqlite", "sqlite3", "SQLite"))
    if "postgresql" in parts:
        found.append(databases(world, "postgresql", "psycopg", "PostgreSQL"))
    if "distributed" in parts:
        found.append(({"kser over the consumers, PostgreSQL": world.operations("postgresql", "distributed")}, []))
    if "cost" in parts:
        found.append(cost(world))
    if "latency" in parts:
        names = (("sqlite", "SQLite"), ("postgresql", "PostgreSQL"))
        found.append(({f"latency of one operation, {name}": world.latency(kind) for kind, name in names}, []))
    if "plain" in parts:
        found.append(plain(world))
    if "peers" in parts and folder is not None:
        found.append(peers(world, folder))
    for some, pairs in found:
        subjects |= some
        ratios += pairs
    return subjects, ratios


def report(medians: dict[str, list[float]], ratios: list[Ratio]) -> None:
    """Print the medians and ratios."""
    for name, values in medians.items():
        if name.startswith("latency"):
            print(f"{name}: p50 {values[0]:.2f} ms to the end of its last task, {values[1]:.2f} ms to its recorded end")
        else:
            calls = f", {values[1]:.0f} database calls" if len(values) > 1 else ""
            print(f"{name}: {values[0]:,.0f}/s{calls}")
    for ours, other, wanted in ratios:
        if ours in medians and other in medians:
            print(f"{ours} / {other}: {medians[ours][0] / medians[other][0]:.2f} (wanted: {wanted})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="operations per measurement")
    parser.add_argument("--peers", type=Path, help="the folder with the environments of the other programs")
    parser.add_argument("--only", default=",".join(PARTS), help="the parts to run, separated by commas")
    options = parser.parse_args()
    parts = options.only.split(",")
    needs_server = bool({"postgresql", "distributed", "cost", "latency", "peers"} & set(parts))
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as locks,
        tempfile.TemporaryDirectory() as folder,
        kafka() as address,
    ):
        os.environ["LOCK_PATH"] = locks
        server = Postgresql() if needs_server else None
        try:
            world = World(address, server, Path(folder), options.count)
            subjects, ratios = figures(world, parts, options.peers)
            measured: dict[str, list[Sequence[float]]] = {name: [] for name in subjects}
            for _ in range(ROUNDS):
                for name, measure in subjects.items():
                    measured[name].append(measure())
                    print(f"  {name}: {measured[name][-1][0]:,.2f}", file=sys.stderr)
            print(f"an fsync takes {fsync_milliseconds(Path(folder)):.3f} ms")
        finally:
            if server is not None:
                server.close()
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in measured.items()
    }
    report(medians, ratios)


if __name__ == "__main__":
    main()
