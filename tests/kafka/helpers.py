"""Helpers of the Kafka tests: programs in their own processes, their ledgers, and clients that bypass kser."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import confluent_kafka
import pytest

from kser.python_kafka.consumer import Consumer
from kser.schemas import Message
from tests.kafka.broker import Kafka

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
WORKER = HERE / "worker.py"

WORK = "__main__.Work"
JOB = "__main__.Job"

#: The transports that each test of a worker runs with.
TRANSPORTS = ["python_kafka", "confluent"]

#: The shortest session that Kafka allows by default, so that a killed member soon leaves the group; and frequent
#: heartbeats, so that members soon notice a rebalance.
QUICK_GROUP = {"session_timeout_ms": 6000, "heartbeat_interval_ms": 200}


needs_next_protocol = pytest.mark.skipif(
    confluent_kafka.libversion()[1] < 0x020C0000, reason="librdkafka before 2.12 has only a preview of KIP-848"
)


def wait_until(condition: Callable[[], Any], event: str, seconds: float = 15) -> Any:
    """Wait until ``condition`` returns a true value, and return this value.

    :param event: describes the condition in the error.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{event}: not within {seconds} s")
        time.sleep(0.02)
    return value


def message(entrypoint: str = WORK, **params: Any) -> Message:
    """Return a message with a new uuid."""
    return Message(uuid=str(uuid.uuid4()), entrypoint=entrypoint, params=params)


def uuids(messages: Iterable[Message]) -> list[str]:
    """Return the uuids of messages."""
    return [message.uuid for message in messages]


def config(kafka: Kafka, group: str | None = None, **options: Any) -> dict[str, Any]:
    """Return the options of a kafka-python consumer, by default of a new group."""
    return {
        "bootstrap_servers": kafka.bootstrap_servers,
        "group_id": group or f"kser-test-{uuid.uuid4()}",
        **QUICK_GROUP,
        **options,
    }


def client_options(transport: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the names that the client of a transport has for them."""
    return {key.replace("_", ".") if transport == "confluent" else key: value for key, value in options.items()}


# -- clients that bypass kser ------------------------------------------------------------------------------------------


def send_records(
    kafka: Kafka, topic: str, values: Iterable[bytes | Message], partitions: int = 1, *, keys: Iterable[str] = ()
) -> None:
    """Send records to the partitions in turn, and wait until all are delivered.

    :param keys: the keys of the records, in turn; they do not determine the partition.
    """
    next_key = itertools.cycle(keys or [None])
    producer = confluent_kafka.Producer({"bootstrap.servers": kafka.bootstrap_servers})
    errors: list[Any] = []

    def on_delivered(error: Any, _: Any) -> None:
        if error:
            errors.append(error)

    for number, value in enumerate(values):
        data = value.dumps().encode() if isinstance(value, Message) else value
        producer.produce(topic, data, next(next_key), partition=number % partitions, on_delivery=on_delivered)
    undelivered = producer.flush(15)
    assert not undelivered and not errors, f"{undelivered} not delivered, {errors}"


def committed(kafka: Kafka, group: str, topic: str, partitions: int = 1) -> int | None:
    """Return the sum of the committed offsets of a group over all partitions; None if no offset is committed."""
    with _independent_consumer(kafka, group) as client:
        requested = [confluent_kafka.TopicPartition(topic, number) for number in range(partitions)]
        offsets = [partition.offset for partition in client.committed(requested, timeout=10) if partition.offset >= 0]
    return sum(offsets) if offsets else None


def read_values(kafka: Kafka, topic: str) -> list[bytes]:
    """Return all values in partition 0 of a topic."""
    with _independent_consumer(kafka, f"kser-test-{uuid.uuid4()}") as client:
        partition = confluent_kafka.TopicPartition(topic, 0, 0)
        _, end = client.get_watermark_offsets(partition, timeout=10)
        client.assign([partition])
        values: list[bytes] = []
        deadline = time.monotonic() + 15
        while len(values) < end and time.monotonic() < deadline:
            values += [record.value() for record in client.consume(500, timeout=1) if record.error() is None]
    assert len(values) == end, f"{len(values)} of {end} records could be read"
    return values


def read_uuids(kafka: Kafka, topic: str) -> list[str]:
    """Return the uuids of all messages in partition 0 of a topic."""
    return [json.loads(value)["uuid"] for value in read_values(kafka, topic)]


@contextlib.contextmanager
def _independent_consumer(kafka: Kafka, group: str) -> Iterator[Any]:
    client = confluent_kafka.Consumer(
        {"bootstrap.servers": kafka.bootstrap_servers, "group.id": group, "enable.auto.commit": False}
    )
    try:
        yield client
    finally:
        client.close()


# -- consumers of this process -----------------------------------------------------------------------------------------


def step_until(
    consumer: Consumer, condition: Callable[[], Any], event: str, *, seconds: float = 15, timeout: float = 0.5
) -> None:
    """Step a consumer until ``condition`` returns a true value.

    :param event: describes the condition in the error.
    :param timeout: seconds that a step waits for records.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{event}: not within {seconds} s"
        consumer.step(timeout)


class MessageFlow(threading.Thread):
    """A thread that sends 12 messages every 50 ms, to the partitions of a topic in turn."""

    def __init__(self, kafka: Kafka, topic: str, partitions: int) -> None:
        super().__init__(name="message-flow")
        self._kafka = kafka
        self._topic = topic
        self._partitions = partitions
        self._stopped = threading.Event()
        self.sent: list[Message] = []

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            batch = [message(seconds=0.002) for _ in range(12)]
            send_records(self._kafka, self._topic, batch, self._partitions)
            self.sent += batch

    def stop(self) -> None:
        """Stop sending; all messages in ``sent`` are delivered."""
        self._stopped.set()
        self.join()


# -- programs ----------------------------------------------------------------------------------------------------------


class LedgerEntry(NamedTuple):
    """One line of a ledger: an event of a process, for example the start of the task with the uuid ``subject``."""

    event: str
    subject: str
    pid: int
    #: The time of ``time.monotonic()``, which is the same clock in all processes of a machine.
    at: float


class Program:
    """A Python program in a process of its own; it is killed at the end of the ``with`` block."""

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
        """The output so far."""
        return self.output.read_text(errors="replace")

    def send_signal(self, number: signal.Signals) -> float:
        """Send a signal; return its time on the clock of :class:`LedgerEntry`."""
        at = time.monotonic()
        self.process.send_signal(number)
        return at

    def wait(self, seconds: float = 15) -> int:
        """Wait for the end of the process; return its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s; it wrote:\n{self.text}") from None

    def wait_for_text(self, text: str, seconds: float = 15) -> None:
        """Wait until the output contains a text."""
        wait_until(lambda: text in self.text or self._has_ended(), f"{text!r} in the output", seconds)
        assert text in self.text, self.text

    def _has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Kill the process if it runs."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
        if kind is not None:
            # pytest shows the output with the failure.
            print(f"--- {self.output.name}:\n{self.text}")


class Worker(Program):
    """A process of ``worker.py``, which records events in a ledger. Several workers may share a ledger."""

    #: The number of workers started so far.
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
                "KSER_CONFIG": json.dumps(client_options(transport, config)),
                "KSER_TOPICS": topic,
                "TRANSPORT": transport,
                "LEDGER": str(ledger),
                **environment,
            },
            ledger.with_name(f"worker-{Worker.started}.txt"),
        )

    def all_recorded(self, event: str) -> list[str]:
        """Return the subjects of an event in the ledger, of all workers."""
        return [entry.subject for entry in entries(self.ledger) if entry.event == event]

    def recorded(self, event: str) -> list[str]:
        """Return the subjects of an event in the ledger, of this worker alone."""
        return [entry.subject for entry in entries(self.ledger) if entry.event == event and entry.pid == self.pid]

    def wait_for(self, event: str, count: int = 1, seconds: float = 15) -> None:
        """Wait until this worker has recorded an event ``count`` times."""
        self._wait(lambda: len(self.recorded(event)) >= count, f"{event} recorded {count} times", seconds)

    def wait_for_partitions(self, count: int, seconds: float = 15) -> None:
        """Wait until this worker has ``count`` partitions."""
        self._wait(lambda: self.recorded("assigned")[-1:] == [str(count)], f"{count} partition(s) assigned", seconds)

    def _wait(self, condition: Callable[[], bool], event: str, seconds: float) -> None:
        wait_until(lambda: condition() or self._has_ended(), event, seconds)
        assert condition(), f"ended with {self.process.returncode} before {event}; it wrote:\n{self.text}"


def entries(ledger: Path) -> list[LedgerEntry]:
    """Return the complete lines of a ledger."""
    if not ledger.exists():
        return []
    rows = [line.split() for line in ledger.read_text().split("\n")[:-1]]
    return [LedgerEntry(event, subject, int(pid), float(at)) for event, subject, pid, at in rows]


def repeated(subjects: Iterable[str]) -> dict[str, int]:
    """Return the subjects that occur more than once, each with its number of occurrences."""
    return {subject: count for subject, count in Counter(subjects).items() if count > 1}
