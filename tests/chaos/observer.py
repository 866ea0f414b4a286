"""Kafka seen from outside, by a client that is no part of kser: what is sent, what is committed, what is in the log."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import confluent_kafka
from confluent_kafka import TopicPartition
from kafka import KafkaAdminClient
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from tests.chaos import ledger
from tests.chaos.history import Sample
from tests.chaos.messages import Order
from tests.chaos.promises import StallWatch
from tests.kafka.broker import answers

#: Seconds from one look at the committed offsets to the next.
INTERVAL = 0.2
#: Seconds that Kafka has to answer.
PATIENCE = 2.0
#: Seconds in which everything in a topic has to be read.
READING = 60.0
#: The header of a record that says what the ledger calls it.
SUBJECT = "subject"
#: How the metadata of a commit begins.
METADATA = "kser:"

#: A broker that goes away is no news here.
QUIET = {"log_level": 0, "error_cb": lambda _error: None, "reconnect.backoff.max.ms": 500}


class Found(NamedTuple):
    """A record as it was read."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]
    #: Seconds since 1970.
    written: float


def make_outsider(servers: str) -> Any:
    """A client that can ask and read, and is no member of any group."""
    group = f"reader-{uuid.uuid4()}"
    return confluent_kafka.Consumer(
        {**QUIET, "bootstrap.servers": servers, "group.id": group, "enable.auto.commit": False}
    )


def read_topic(servers: str, topic: str) -> list[Found]:
    """Everything that is in a topic."""
    found: list[Found] = []
    with contextlib.closing(make_outsider(servers)) as client:
        partitions = client.list_topics(topic, timeout=10).topics[topic].partitions
        ends = {n: client.get_watermark_offsets(TopicPartition(topic, n), timeout=10)[1] for n in partitions}
        client.assign([TopicPartition(topic, number, 0) for number in partitions])
        deadline = time.monotonic() + READING
        while len(found) < sum(ends.values()):
            assert time.monotonic() < deadline, f"{len(found)} of {sum(ends.values())} records of {topic} could be read"
            found += [_found(record) for record in client.consume(1000, timeout=1) if record.error() is None]
    return found


def _found(record: Any) -> Found:
    headers = {name: value for name, value in record.headers() or () if value is not None}
    written = record.timestamp()[1] / 1000
    return Found(record.partition(), record.offset(), record.key(), record.value(), headers, written)


class Feeder(threading.Thread):
    """Sends records at a steady rate until it is told to stop, or has no more. Each arrives once."""

    def __init__(self, servers: str, topic: str, orders: Iterator[Order], rate: float) -> None:
        super().__init__(name="feeder")
        self._topic = topic
        self._orders = orders
        self._rate = rate
        self._enough = threading.Event()
        self._producer = confluent_kafka.Producer(
            {**QUIET, "bootstrap.servers": servers, "enable.idempotence": True, "linger.ms": 5}
        )
        self.delivered = 0
        self.problems: list[str] = []

    def run(self) -> None:
        begun = time.monotonic()
        for number, order in enumerate(self._orders):
            while (wait := begun + number / self._rate - time.monotonic()) > 0 and not self._enough.is_set():
                self._producer.poll(min(wait, 0.05))
            if self._enough.is_set():
                break
            self._send(order)
        self._producer.flush(READING)

    def _send(self, order: Order) -> None:
        try:
            self._producer.produce(
                self._topic,
                order.value,
                key=order.key,
                partition=order.partition,
                headers={SUBJECT: order.subject.encode()},
                on_delivery=self._answered,
            )
        except confluent_kafka.KafkaException as problem:
            self.problems.append(str(problem))
        self._producer.poll(0)

    def _answered(self, error: Any, _record: Any) -> None:
        if error:
            self.problems.append(str(error))
        else:
            self.delivered += 1

    @property
    def waiting(self) -> int:
        """How many records have not arrived yet."""
        return len(self._producer)

    def stop(self) -> None:
        """Send no more, and wait until everything has arrived."""
        self._enough.set()
        self.join()


class Asking:
    """Asks with a client that is made when it is needed, and anew after trouble."""

    _client: Any = None

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()


class GroupOffsets(Asking):
    """What a group has committed. By kafka-python: confluent-kafka cannot read the metadata of others' commits."""

    def __init__(self, servers: str, group: str) -> None:
        self._group = group
        self._ports = [int(server.rpartition(":")[2]) for server in servers.split(",")]
        limits = {"request_timeout_ms": int(PATIENCE * 1000), "bootstrap_timeout_ms": int(PATIENCE * 1000)}
        self._options = {"bootstrap_servers": servers.split(","), "reconnect_backoff_max_ms": 500, **limits}

    def of(self, topic: str) -> dict[int, OffsetAndMetadata] | None:
        """By partition; None when Kafka does not answer."""
        if self._client is None and not any(answers(port) for port in self._ports):
            # One that cannot be made leaves a thread behind.
            return None
        try:
            if self._client is None:
                self._client = KafkaAdminClient(**self._options)
            found = self._client.list_group_offsets(self._group)[self._group]
        except KafkaError:
            # A new client knows nothing wrong about where the group is kept.
            self._close()
            return None
        return {key.partition: each for key, each in found.items() if key.topic == topic and each.offset >= 0}


class DeadLetters(Asking):
    """How many records a topic of one partition has."""

    def __init__(self, servers: str, topic: str | None) -> None:
        self._servers, self._topic = servers, topic

    def count(self) -> int | None:
        """None when Kafka does not answer; zero when there is no topic."""
        if self._topic is None:
            return 0
        if self._client is None:
            self._client = make_outsider(self._servers)
        try:
            _, end = self._client.get_watermark_offsets(TopicPartition(self._topic, 0), timeout=PATIENCE)
        except confluent_kafka.KafkaException:
            # One that has seen the topic without a leader may ask for its new one only minutes later.
            self._close()
            return None
        return int(end)


class Sampler(threading.Thread):
    """Asks Kafka again and again where the group is, and then looks how far the ledger is."""

    def __init__(
        self,
        servers: str,
        group: str,
        topic: str,
        *,
        delivered: Callable[[], int],
        path: Path,
        dead_topic: str | None,
        patience: float,
    ) -> None:
        super().__init__(name=f"sampler of {group}")
        self._servers, self._group, self._topic, self._dead_topic = servers, group, topic, dead_topic
        self._delivered = delivered
        self._path = path
        self._watch = StallWatch(patience)
        self._enough = threading.Event()
        self.samples: list[Sample] = []
        #: Why the run can be given up, once it can.
        self.stuck: str | None = None

    def run(self) -> None:
        with GroupOffsets(self._servers, self._group) as offsets, DeadLetters(self._servers, self._dead_topic) as dead:
            while not self._enough.is_set():
                sample = self._sample(offsets, dead)
                self.samples.append(sample)
                self.stuck = self.stuck or self._watch.see(sample)
                self._enough.wait(INTERVAL)

    def _sample(self, offsets: GroupOffsets, dead_letters: DeadLetters) -> Sample:
        delivered = self._delivered()
        answers = offsets.of(self._topic)
        at = time.monotonic()
        # In this order: what was finished when it was committed is in the ledger, or dead-lettered, by now.
        position = ledger.size(self._path)
        dead = None if answers is None else dead_letters.count()
        if answers is None or dead is None:
            return Sample(at, None, {}, position, 0, delivered)
        committed = {number: found.offset for number, found in answers.items()}
        above = {number: finished_above(found.offset, found.metadata) for number, found in answers.items()}
        return Sample(at, committed, above, position, dead, delivered)

    def lag_since(self, at: float) -> float:
        """How much was left to do when Kafka said so last; without end if that was before this time."""
        last = self.samples[-1] if self.samples else None
        return math.inf if last is None or last.committed is None or last.at < at else last.lag

    def stop(self) -> None:
        self._enough.set()
        self.join()


def finished_above(offset: int, metadata: str | None) -> frozenset[int]:
    """The offsets above the committed one that a commit declares as finished.

    Written down once more, as the format is documented: ``kser:1,14`` is 1 unfinished, then 20 finished.
    """
    if not metadata or not metadata.startswith(METADATA):
        return frozenset()
    found: list[int] = []
    # confluent-kafka also sends the zero with which texts end in C.
    text = metadata.removeprefix(METADATA).partition(";")[0]
    for number, run in enumerate(int(digits, 16) for digits in text.split(",")):
        if number % 2:
            found += range(offset, offset + run)
        offset += run
    return frozenset(found)
