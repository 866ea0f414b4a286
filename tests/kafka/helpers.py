"""Shared parts of the Kafka tests: programs in their own processes, ledgers, and a view of Kafka from outside."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import confluent_kafka

from kser.python_kafka.consumer import Consumer
from kser.schemas import Message
from tests.kafka.broker import Kafka

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
WORKER = HERE / "worker.py"

WORK = "__main__.Work"
JOB = "__main__.Job"

#: Packages of kser whose consumers the same tests are run against.
TRANSPORTS = ["python_kafka", "confluent"]

#: The shortest session that Kafka allows, so that a killed member is soon given up; heartbeats notice others at once.
QUICK_GROUP = {"session_timeout_ms": 6000, "heartbeat_interval_ms": 200}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 15) -> Any:
    """Wait until ``condition`` gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.02)
    return found


def message(entrypoint: str = WORK, **params: Any) -> Message:
    """A message with a uuid of its own."""
    return Message(uuid=str(uuid.uuid4()), entrypoint=entrypoint, params=params)


def uuids(messages: Iterable[Message]) -> list[str]:
    return [each.uuid for each in messages]


def config(kafka: Kafka, group: str | None = None, **options: Any) -> dict[str, Any]:
    """Options of a consumer; the group is named for nobody else unless it is said."""
    return {
        "bootstrap_servers": kafka.bootstrap_servers,
        "group_id": group or f"kser-test-{uuid.uuid4()}",
        **QUICK_GROUP,
        **options,
    }


def named_for(transport: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the names that librdkafka has for them, where it is the transport."""
    return {key.replace("_", ".") if transport == "confluent" else key: value for key, value in options.items()}


# -- Kafka, seen by another client -------------------------------------------------------------------------------------


def put(
    kafka: Kafka, topic: str, values: Iterable[bytes | Message], partitions: int = 1, *, keys: Iterable[str] = ()
) -> None:
    """Send with a client that kser does not use, to the partitions in turn; all have arrived when it returns.

    :param keys: what the records have for keys, in turn; they choose no partition.
    """
    in_turn = itertools.cycle(keys or [None])
    producer = confluent_kafka.Producer({"bootstrap.servers": kafka.bootstrap_servers})
    problems: list[Any] = []

    def delivered(error: Any, _: Any) -> None:
        if error:
            problems.append(error)

    for number, value in enumerate(values):
        data = value.dumps().encode() if isinstance(value, Message) else value
        producer.produce(topic, data, next(in_turn), partition=number % partitions, on_delivery=delivered)
    left = producer.flush(15)
    assert not left and not problems, f"{left} not delivered, {problems}"


def committed(kafka: Kafka, group: str, topic: str, partitions: int = 1) -> int | None:
    """The committed offsets of a group, summed up over all partitions; None when nothing is committed."""
    with _outside(kafka, group) as client:
        asked = [confluent_kafka.TopicPartition(topic, number) for number in range(partitions)]
        offsets = [each.offset for each in client.committed(asked, timeout=10) if each.offset >= 0]
    return sum(offsets) if offsets else None


def stored(kafka: Kafka, topic: str) -> list[bytes]:
    """All values in partition 0 of a topic."""
    with _outside(kafka, f"kser-test-{uuid.uuid4()}") as client:
        partition = confluent_kafka.TopicPartition(topic, 0, 0)
        _, end = client.get_watermark_offsets(partition, timeout=10)
        client.assign([partition])
        values: list[bytes] = []
        deadline = time.monotonic() + 15
        while len(values) < end and time.monotonic() < deadline:
            values += [record.value() for record in client.consume(500, timeout=1) if record.error() is None]
    assert len(values) == end, f"{len(values)} of {end} records could be read"
    return values


def stored_uuids(kafka: Kafka, topic: str) -> list[str]:
    return [json.loads(value)["uuid"] for value in stored(kafka, topic)]


@contextlib.contextmanager
def _outside(kafka: Kafka, group: str) -> Iterator[Any]:
    client = confluent_kafka.Consumer(
        {"bootstrap.servers": kafka.bootstrap_servers, "group.id": group, "enable.auto.commit": False}
    )
    try:
        yield client
    finally:
        client.close()


# -- consumers of this process -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def consuming(consumer: Consumer) -> Iterator[Consumer]:
    """Close the consumer in the end; the test calls ``step`` itself."""
    try:
        yield consumer
    finally:
        consumer.close()


def step_until(consumer: Consumer, condition: Callable[[], Any], what: str, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        consumer.step()


# -- programs ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One line of a ledger."""

    event: str
    subject: str
    pid: int
    at: float


class Program:
    """A Python program in a process of its own, which is gone when the test is."""

    def __init__(self, arguments: Iterable[str | Path], environment: Mapping[str, str], output: Path) -> None:
        self.output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [str(argument) for argument in arguments],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        """What it has written so far."""
        return self.output.read_text(errors="replace")

    def send_signal(self, number: signal.Signals) -> float:
        """Send a signal; returns when that was, on the clock that all processes share."""
        at = time.monotonic()
        self.process.send_signal(number)
        return at

    def wait(self, seconds: float = 15) -> int:
        """Wait for its end; returns its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s; it wrote:\n{self.text}") from None

    def wait_for_text(self, text: str, seconds: float = 15) -> None:
        wait_until(lambda: text in self.text or self._has_ended(), f"{text!r} in the output", seconds)
        assert text in self.text, self.text

    def _has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Make sure that it is gone."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
        if kind is not None:
            # pytest shows it with the failure.
            print(f"--- {self.output.name}:\n{self.text}")


class Worker(Program):
    """``worker.py``, with what it noted in its ledger. Several workers may share one."""

    started = 0

    def __init__(
        self,
        config: Mapping[str, Any],
        topic: str,
        ledger: Path,
        *,
        transport: str = "python_kafka",
        **environment: str,
    ) -> None:
        Worker.started += 1
        self.ledger = ledger
        self.topic = topic
        self.group: str = config["group_id"]
        super().__init__(
            [sys.executable, WORKER],
            {
                "PYTHONPATH": str(REPOSITORY),
                "KSER_CONFIG": json.dumps(named_for(transport, config)),
                "KSER_TOPICS": topic,
                "TRANSPORT": transport,
                "LEDGER": str(ledger),
                **environment,
            },
            ledger.with_name(f"worker-{Worker.started}.txt"),
        )

    def noted(self, event: str) -> list[str]:
        """The subjects of this event, in order, whoever noted them."""
        return [entry.subject for entry in entries(self.ledger) if entry.event == event]

    def mine(self, event: str) -> list[str]:
        """The subjects of this event that this worker noted."""
        return [entry.subject for entry in entries(self.ledger) if entry.event == event and entry.pid == self.pid]

    def wait_for(self, event: str, count: int = 1, seconds: float = 15) -> None:
        """Wait until the event was noted by this worker so many times."""
        self._wait(lambda: len(self.mine(event)) >= count, f"{event} noted {count} times", seconds)

    def wait_for_partitions(self, count: int, seconds: float = 15) -> None:
        self._wait(lambda: self.mine("assigned")[-1:] == [str(count)], f"{count} partition(s) assigned", seconds)

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        wait_until(lambda: condition() or self._has_ended(), what, seconds)
        assert condition(), f"ended with {self.process.returncode} before {what}; it wrote:\n{self.text}"


def entries(ledger: Path) -> list[Entry]:
    """What was noted; a line that is being written is left out."""
    if not ledger.exists():
        return []
    rows = [line.split() for line in ledger.read_text().split("\n")[:-1]]
    return [Entry(event, subject, int(pid), float(at)) for event, subject, pid, at in rows]


def repeated(subjects: Iterable[str]) -> dict[str, int]:
    """What is there more than once, and how often."""
    return {subject: count for subject, count in Counter(subjects).items() if count > 1}
