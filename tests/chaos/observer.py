"""Clients that are not part of kser: they send the records, and read the log and the committed offsets of a group."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple, Self

import confluent_kafka
from confluent_kafka import TopicPartition
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata
from kafka.structs import TopicPartition as KafkaTopicPartition

from tests.chaos import ledger
from tests.chaos.history import Sample
from tests.chaos.messages import OutgoingRecord
from tests.chaos.promises import StallWatch
from tests.kafka.broker import Kafka, answers
from tests.kafka.hostile import HostileProducer, HostileRecord

#: Seconds between two samples of the committed offsets.
SAMPLE_INTERVAL = 0.2
#: Seconds after which a request to Kafka fails.
REQUEST_SECONDS = 2.0
#: Seconds within which all records of a topic must be read or sent.
READ_SECONDS = 60.0
#: The header with the subject of a record: its name in the ledger.
SUBJECT = "subject"
#: The prefixes of two words of the metadata of a commit: the finished offsets, and the id of the topic.
RUNS_PREFIX, ID_PREFIX = "kser:", "id:"

#: Options of clients that log no broker outage, because outages are planned.
QUIET = {"log_level": 0, "error_cb": lambda _error: None, "reconnect.backoff.max.ms": 500}


class ReadRecord(NamedTuple):
    """A record that was read from a topic."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]
    #: Seconds since 1970.
    timestamp: float


def new_reader(servers: str) -> Any:
    """Return a client that reads topics and joins no group."""
    group = f"reader-{uuid.uuid4()}"
    return confluent_kafka.Consumer(
        {**QUIET, "bootstrap.servers": servers, "group.id": group, "enable.auto.commit": False}
    )


def read_topic(servers: str, topic: str) -> list[ReadRecord]:
    """Return all records of a topic."""
    records: list[ReadRecord] = []
    with contextlib.closing(new_reader(servers)) as client:
        partitions = client.list_topics(topic, timeout=10).topics[topic].partitions
        ends = {n: client.get_watermark_offsets(TopicPartition(topic, n), timeout=10)[1] for n in partitions}
        client.assign([TopicPartition(topic, number, 0) for number in partitions])
        total = sum(ends.values())
        deadline = time.monotonic() + READ_SECONDS
        while len(records) < total:
            assert time.monotonic() < deadline, f"{len(records)} of {total} records of {topic} could be read"
            records += [_read_record(record) for record in client.consume(1000, timeout=1) if record.error() is None]
    return records


#: Calls ``record.headers()``. For a name that is not UTF-8, the method returns a damaged list and sets an exception,
#: which only this kind of call always raises.
_headers = methodcaller("headers")


def _read_record(record: Any) -> ReadRecord:
    headers: dict[str, bytes] = {}
    with contextlib.suppress(SystemError, UnicodeDecodeError):
        headers = {name: value for name, value in _headers(record) or () if value is not None}
    _, milliseconds = record.timestamp()
    return ReadRecord(record.partition(), record.offset(), record.key(), record.value(), headers, milliseconds / 1000)


class Feeder(threading.Thread):
    """Thread that sends records at a steady rate, without duplicates, until :meth:`stop` or the last record.

    :param rate: records per second.
    """

    def __init__(self, servers: str, topic: str, records: Iterator[OutgoingRecord], rate: float) -> None:
        super().__init__(name="feeder")
        self._topic = topic
        self._records = records
        self._rate = rate
        self._stopping = threading.Event()
        self._producer = confluent_kafka.Producer(
            {**QUIET, "bootstrap.servers": servers, "enable.idempotence": True, "linger.ms": 5}
        )
        self.delivered = 0
        self.problems: list[str] = []

    def run(self) -> None:
        started = time.monotonic()
        for number, record in enumerate(self._records):
            while (wait := started + number / self._rate - time.monotonic()) > 0 and not self._stopping.is_set():
                self._producer.poll(min(wait, 0.05))
            if self._stopping.is_set():
                break
            self._send(record)
        self._producer.flush(READ_SECONDS)

    def _send(self, record: OutgoingRecord) -> None:
        try:
            self._producer.produce(
                self._topic,
                record.value,
                key=record.key,
                partition=record.partition,
                headers={SUBJECT: record.subject.encode()},
                on_delivery=self._on_delivery,
            )
        except confluent_kafka.KafkaException as problem:
            self.problems.append(str(problem))
        self._producer.poll(0)

    def _on_delivery(self, error: Any, _record: Any) -> None:
        if error:
            self.problems.append(str(error))
        else:
            self.delivered += 1

    @property
    def undelivered(self) -> int:
        """The number of sent records without a delivery report."""
        return len(self._producer)

    def stop(self) -> None:
        """Stop sending, and wait until all sent records are delivered."""
        self._stopping.set()
        self.join()


class HostileFeeder(threading.Thread):
    """Thread that sends hostile records one by one to random partitions, at a steady rate.

    :param rate: records per second.
    """

    #: Errors of the delivery; always empty, because an error ends the thread.
    problems: Sequence[str] = ()
    undelivered = 0

    def __init__(
        self, kafka: Kafka, topic: str, records: Sequence[HostileRecord], partitions: int, rate: float, seed: int
    ) -> None:
        super().__init__(name="hostile feeder")
        self._kafka, self._topic, self._records, self._rate = kafka, topic, records, rate
        self._chance = random.Random(f"hostile partitions {seed}")
        self._partitions = partitions
        self.delivered = 0

    def run(self) -> None:
        with contextlib.closing(HostileProducer(self._kafka)) as producer:
            for record in self._records:
                producer.send(self._topic, record, partition=self._chance.randrange(self._partitions))
                self.delivered += 1
                time.sleep(1 / self._rate)

    def stop(self) -> None:
        """Wait until all records are sent."""
        self.join()
        if self.delivered < len(self._records):
            self.problems = [f"only {self.delivered} of {len(self._records)} hostile records were sent"]


class ReconnectingClient:
    """Base of clients that are created at the first request, and again after an error."""

    _client: Any = None

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()


class GroupOffsets(ReconnectingClient):
    """Client that reads the committed offsets of a group.

    It uses kafka-python, because confluent-kafka cannot read the metadata of another group's commits.
    """

    def __init__(self, servers: str, group: str) -> None:
        self._group = group
        self._ports = [int(server.rpartition(":")[2]) for server in servers.split(",")]
        limits = {
            "request_timeout_ms": int(REQUEST_SECONDS * 1000),
            "bootstrap_timeout_ms": int(REQUEST_SECONDS * 1000),
        }
        self._options = {"bootstrap_servers": servers.split(","), "reconnect_backoff_max_ms": 500, **limits}

    def committed(self, topic: str) -> dict[int, OffsetAndMetadata] | None:
        """Return the committed offsets by partition; None if Kafka does not respond."""
        if self._client is None and not any(answers(port) for port in self._ports):
            # A client whose constructor fails would leave a thread running.
            return None
        try:
            if self._client is None:
                self._client = KafkaAdminClient(**self._options)
            offsets = self._client.list_group_offsets(self._group)[self._group]
        except KafkaError:
            # Use a new client, because this one may look for the group's coordinator on a wrong node.
            self._close()
            return None
        return {
            partition.partition: committed
            for partition, committed in offsets.items()
            if partition.topic == topic and committed.offset >= 0
        }


def move_offsets(servers: str, group: str, topic: str, offsets: Mapping[int, OffsetAndMetadata]) -> None:
    """Commit offsets for a group without members, with their metadata, as MirrorMaker and administrators do."""
    moved = {KafkaTopicPartition(topic, number): commit for number, commit in offsets.items()}
    with contextlib.closing(
        KafkaConsumer(bootstrap_servers=servers, group_id=group, enable_auto_commit=False)
    ) as client:
        client.assign(list(moved))
        client.commit(moved)


def metadata_word(metadata: str | None, prefix: str) -> str:
    """Return the word of a commit's metadata that begins with ``prefix``; empty if there is none."""
    # Use the part before the checksum; confluent-kafka sends a zero byte after it.
    words = (metadata or "").partition(";")[0].split()
    return next((word for word in words if word.startswith(prefix)), "")


class DeadLetterCount(ReconnectingClient):
    """Client that counts the records of a dead-letter topic, which has one partition.

    :param topic: the topic; None for a group without dead letters.
    """

    def __init__(self, servers: str, topic: str | None) -> None:
        self._servers, self._topic = servers, topic

    def count(self) -> int | None:
        """Return the number of dead letters; None if Kafka does not respond."""
        if self._topic is None:
            return 0
        if self._client is None:
            self._client = new_reader(self._servers)
        try:
            _, end = self._client.get_watermark_offsets(TopicPartition(self._topic, 0), timeout=REQUEST_SECONDS)
        except confluent_kafka.KafkaException:
            # A client that has seen the topic without a leader may look for the new leader only minutes later.
            self._close()
            return None
        return int(end)


class Sampler(threading.Thread):
    """Thread that samples the committed offsets of a group, and then the sizes of the ledger and the dead letters."""

    def __init__(
        self,
        servers: str,
        group: str,
        topic: str,
        *,
        delivered: Callable[[], int],
        path: Path,
        dead_topic: str | None,
        stall_seconds: float,
    ) -> None:
        super().__init__(name=f"sampler of {group}")
        self._servers, self._group, self._topic, self._dead_topic = servers, group, topic, dead_topic
        self._delivered = delivered
        self._path = path
        self._stall_watch = StallWatch(stall_seconds)
        self._stopping = threading.Event()
        self.samples: list[Sample] = []
        #: Offsets that the test committed; the metadata beside them does not apply.
        self.moved: dict[int, OffsetAndMetadata] = {}
        #: The words that identify deleted topics; a commit with one of them, or without any, is not sampled.
        self.deleted: set[str] = set()
        self._topic_words: set[str] = set()
        #: The text about a stall of the group, after which the run is aborted.
        self.stall: str | None = None

    def run(self) -> None:
        with (
            GroupOffsets(self._servers, self._group) as offsets,
            DeadLetterCount(self._servers, self._dead_topic) as dead_letters,
        ):
            while not self._stopping.is_set():
                sample = self._sample(offsets, dead_letters)
                self.samples.append(sample)
                self.stall = self.stall or self._stall_watch.add(sample)
                self._stopping.wait(SAMPLE_INTERVAL)

    def _sample(self, offsets: GroupOffsets, dead_letters: DeadLetterCount) -> Sample:
        log_size = self._delivered()
        commits = offsets.committed(self._topic)
        at = time.monotonic()
        # Read the ledger after the offsets, because it then contains everything that was finished before the commit.
        position = ledger.size(self._path)
        dead_letter_count = None if commits is None else dead_letters.count()
        if commits is None or dead_letter_count is None:
            return Sample(at, None, {}, position, 0, log_size)
        if self.deleted:
            commits = {
                partition: commit
                for partition, commit in commits.items()
                if metadata_word(commit.metadata, ID_PREFIX) not in self.deleted | {""}
            }
        self._topic_words.update(metadata_word(commit.metadata, ID_PREFIX) for commit in commits.values())
        committed = {partition: commit.offset for partition, commit in commits.items()}
        above = {
            partition: finished_above(commit.offset, commit.metadata)
            for partition, commit in commits.items()
            if commit != self.moved.get(partition)
        }
        return Sample(at, committed, above, position, dead_letter_count, log_size)

    def forget_topic(self) -> None:
        """Ignore all commits for the topic, which is about to be deleted and created again."""
        self.deleted |= self._topic_words

    def lag_since(self, at: float) -> float:
        """Return the lag in the last sample; infinite if that sample is older than ``at`` or had no response."""
        last = self.samples[-1] if self.samples else None
        return math.inf if last is None or last.committed is None or last.at < at else last.lag

    def stop(self) -> None:
        """Take no more samples."""
        self._stopping.set()
        self.join()


def finished_above(offset: int, metadata: str | None) -> frozenset[int]:
    """Return the offsets above the committed one that a commit marks as finished.

    This implements the documented format without kser: ``kser:1,14`` is 1 unfinished offset, then 20 finished ones.
    """
    runs = metadata_word(metadata, RUNS_PREFIX).removeprefix(RUNS_PREFIX)
    finished: list[int] = []
    for number, length in enumerate(int(digits, 16) for digits in runs.split(",") if digits):
        if number % 2:
            finished += range(offset, offset + length)
        offset += length
    return frozenset(finished)
