"""Contract tests of a producer."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import confluent_kafka
import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import signals
from kser.errors import DeliveryError, MessageTooLarge, RecordRejected
from kser.schemas import Message
from tests.support import UUID, WAIT_SECONDS, lines, message, record_of, wait_until

#: Seconds after which a new reader reads a topic from its beginning.
READER_SECONDS = 7


class Sent(NamedTuple):
    """A record as it is in its topic."""

    value: bytes | None
    key: bytes | None
    headers: list[tuple[str, bytes | None]]
    partition: int


class Transport(ABC):
    """A producer class, and a broker for it."""

    #: The producer class.
    producer: ClassVar[type[Any]]
    #: The text of a result after ``Message <entrypoint>[<uuid>] sent``.
    ending: ClassVar[str] = ""
    #: The text of a result after ``<n> message(s) sent``.
    bulk_ending: ClassVar[str] = ""
    #: The option that limits the size of a record.
    limit: ClassVar[str]

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the options of a producer for the broker."""

    @abstractmethod
    def new_topic(self) -> str:
        """Create a topic without records."""

    @abstractmethod
    def records(self, topic: str, count: int) -> list[Sent]:
        """Wait for ``count`` records in a topic, and return them in the order of partition and offset."""


def read(servers: str, topic: str, count: int) -> list[Sent]:
    """Wait for ``count`` records in a topic, and return them, read without kser.

    If a reader has not found all records after ``READER_SECONDS``, a new reader reads the topic from its beginning.
    Only a record that no reader finds counts as lost.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        records, end_offsets = _read_once(servers, topic, count)
        if len(records) >= count or time.monotonic() > deadline:
            break
    assert len(records) == count, (
        f"{len(records)} records were read in place of {count}; partitions and their (begin, end): {end_offsets}; read:"
        f" {[(record.partition(), record.offset(), record.value()) for record in records]}"
    )
    records.sort(key=lambda record: (record.partition(), record.offset()))
    return [Sent(record.value(), record.key(), record.headers() or [], record.partition()) for record in records]


def _read_once(servers: str, topic: str, count: int) -> tuple[list[Any], dict[int, tuple[int, int]]]:
    """Read a topic with a new reader; return its records, and the first and the end offset of each partition."""
    reader = confluent_kafka.Consumer({"bootstrap.servers": servers, "group.id": "reader", "enable.auto.commit": False})
    try:
        partitions = [
            confluent_kafka.TopicPartition(topic, number, confluent_kafka.OFFSET_BEGINNING)
            for number in reader.list_topics(topic, timeout=WAIT_SECONDS).topics[topic].partitions
        ]
        reader.assign(partitions)
        records: list[Any] = []
        deadline = time.monotonic() + READER_SECONDS
        while len(records) < count and time.monotonic() < deadline:
            record = reader.poll(0.1)
            if record is not None:
                assert record.error() is None, record.error()
                records.append(record)
        offsets = {each.partition: reader.get_watermark_offsets(each, timeout=WAIT_SECONDS) for each in partitions}
        return records, offsets
    finally:
        reader.close()


def uuids(sent: list[Sent]) -> list[str]:
    """Return the uuids of the messages in records."""
    return [json.loads(record.value or b"{}")["uuid"] for record in sent]


class ProducerContract:
    """The contract of a producer; a subclass in a test module has a fixture ``transport``."""

    @pytest.fixture
    def topic(self, transport: Transport) -> str:
        return transport.new_topic()

    @pytest.fixture
    def producer(self, transport: Transport, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
        caplog.set_level(logging.INFO, "kser")
        producer = transport.producer(transport.config())
        yield producer
        producer.close()

    def new_producer(self, transport: Transport, kind: type[Any] | None = None, **options: Any) -> Any:
        return (kind or transport.producer)({**transport.config(), **options})

    # -- one message ---------------------------------------------------------------------------------------------------

    def test_a_message_is_delivered_as_published(
        self, transport: Transport, producer: Any, topic: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        kmsg = message("shop.Pay", params={"café": 1})
        result = producer.send(topic, kmsg)
        text = f"Message shop.Pay[{UUID}] sent" + transport.ending.format(topic=topic)
        assert (result.uuid, result.retcode, result.stdout, result.stderr) == (UUID, 0, text, "")
        assert lines(caplog) == [f"Producer.Success: shop.Pay[{UUID}]: {text}"]
        assert record_of(caplog, "Producer.Success").name == "kser.controller"
        (record,) = transport.records(topic, 1)
        assert (record.value, record.key, record.headers) == (kmsg.dumps().encode(), None, [])

    def test_key_is_sent_with_its_message(self, transport: Transport, producer: Any, topic: str) -> None:
        for key in ("é", b"\xff\x00", "", "é"):
            assert producer.send(topic, message("x"), key=key).retcode == 0
        sent = transport.records(topic, 4)
        assert sorted(record.key or b"" for record in sent) == [b"", "é".encode(), "é".encode(), b"\xff\x00"]
        assert {record.key for record in sent} == {"é".encode(), b"\xff\x00", b""}
        assert len({record.partition for record in sent if record.key == "é".encode()}) == 1

    def test_headers_are_sent_with_their_message(self, transport: Transport, producer: Any, topic: str) -> None:
        headers: Any
        for headers in ({"trace": b"1"}, [("a", b"1"), ("a", b"2")], (("é", b""), ("none", None)), [], {}):
            assert producer.send(topic, message("x"), headers=headers, key="same").retcode == 0
        assert [record.headers for record in transport.records(topic, 5)] == [
            [("trace", b"1")],
            [("a", b"1"), ("a", b"2")],
            [("é", b""), ("none", None)],
            [],
            [],
        ]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"key": 7}, "a key must be a str or bytes, not 7"),
            ({"headers": {"n": "text"}}, "a header must be a name and bytes, not ('n', 'text')"),
            ({"headers": ["name"]}, "a header must be a name and bytes, not 'name'"),
        ],
    )
    def test_invalid_key_or_header_gives_a_failed_result(
        self, producer: Any, topic: str, options: dict[str, Any], reason: str
    ) -> None:
        result = producer.send(topic, message("x"), **options)
        assert (result.uuid, result.retcode) == (UUID, 400)
        assert reason in result.stderr

    def test_message_that_is_not_json_gives_a_failed_result(
        self, producer: Any, topic: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """D13"""
        result = producer.send(topic, message("x", params={"when": object()}))
        assert (result.uuid, result.retcode) == (UUID, 500)
        assert result.stderr == "Object of type object is not JSON serializable"
        assert lines(caplog) == [f"Producer.Failed: x[{UUID}]: {result.stderr}"]

    def test_oversized_record_is_rejected_with_the_limit(self, transport: Transport, topic: str) -> None:
        producer = self.new_producer(transport, **{transport.limit: 5000})
        for headers, key, size in (({}, None, 5000), ({"h": b"x" * 3000}, "k" * 3000, 1)):
            result = producer.send(topic, message("x", params={"t": "x" * size}), headers=headers, key=key)
            assert (result.uuid, result.retcode) == (UUID, 413)
            assert f"{transport.limit!r} allows 5,000" in result.stderr
            assert f"raise {transport.limit!r} in KSER_CONFIG" in result.stderr
        with pytest.raises(MessageTooLarge, match="has 5,001 bytes"):
            producer.produce(topic, b"x" * 5001)
        assert producer.send(topic, message("x", params={"t": "x" * 4000}, uuid="fits")).retcode == 0
        producer.close()

    # -- produce -------------------------------------------------------------------------------------------------------

    def test_produce_writes_the_record_unchanged(
        self, transport: Transport, topic: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        class HookedProducer(transport.producer):  # type: ignore[name-defined,misc]
            @classmethod
            def onmessage(cls, kmsg: Message) -> Message:
                raise AssertionError("a hook was called")

            onsuccess = onerror = onmessage

        caplog.set_level(logging.DEBUG, "kser")
        producer = self.new_producer(transport, HookedProducer)
        with signals.message_sent.connected_to(_fail_on_signal):
            assert producer.produce(topic, b"\xff", key=b"k", headers=[("h", b"1")]) is None
            producer.produce(topic, None, key=b"k", timeout=WAIT_SECONDS)
        producer.close()
        first, second = transport.records(topic, 2)
        assert (first.value, first.key, first.headers) == (b"\xff", b"k", [("h", b"1")])
        assert (second.value, second.key, second.headers) == (None, b"k", [])
        assert lines(caplog) == []

    def test_produce_keeps_null_apart_from_empty(self, transport: Transport, producer: Any, topic: str) -> None:
        headers = [("null", None), ("empty", b""), ("null", None), ("é", b"1")]
        for value, key in ((None, None), (b"", b""), (None, b"k"), (b"v", None)):
            producer.produce(topic, value, key=key, headers=headers)
        producer.produce(topic, None)
        sent = transport.records(topic, 5)
        pairs = [(record.value, record.key) for record in sent]
        assert sorted(pairs, key=repr) == [(None, None), (None, None), (None, b"k"), (b"", b""), (b"v", None)]
        assert [record.headers for record in sent if record.headers] == [headers] * 4

    def test_produce_of_an_illegal_record_is_rejected_for_good(self, producer: Any, topic: str) -> None:
        with pytest.raises(RecordRejected):
            producer.produce(topic, b"x", headers=[("\udc80", b"1")])
        producer.produce(topic, b"x")

    def test_produce_of_an_invalid_record_raises(self, producer: Any, topic: str) -> None:
        with pytest.raises(DeliveryError, match="a header must be a name and bytes"):
            producer.produce(topic, b"x", headers=[("name", "text")])

    # -- hooks and signals ---------------------------------------------------------------------------------------------

    def test_hooks_are_called_around_sending(self, transport: Transport, topic: str) -> None:
        class HookedProducer(transport.producer):  # type: ignore[name-defined,misc]
            @classmethod
            def onmessage(cls, kmsg: Message) -> Message:
                return Message(kmsg.uuid, "replaced", params=kmsg.params)

            @classmethod
            def onsuccess(cls, kmsg: Message, result: Result) -> Any:
                return "sent", kmsg.entrypoint

            @classmethod
            def onerror(cls, kmsg: Message, result: Result) -> Any:
                return "failed", kmsg.entrypoint

        producer = self.new_producer(transport, HookedProducer)
        assert producer.send(topic, message("original")) == ("sent", "original")
        assert producer.send(topic, message("original", params={"when": object()})) == ("failed", "original")
        producer.close()
        (record,) = transport.records(topic, 1)
        assert json.loads(record.value or b"")["entrypoint"] == "replaced"

    def test_raising_onmessage_hook_fails_the_message_under_its_own_uuid(
        self, transport: Transport, topic: str
    ) -> None:
        """C12"""

        class RejectingProducer(transport.producer):  # type: ignore[name-defined,misc]
            @classmethod
            def onmessage(cls, kmsg: Message) -> Message:
                raise ValidationError("rejected")

        producer = self.new_producer(transport, RejectingProducer)
        result = producer.send(topic, message("x"))
        bulk = producer.bulk_send(topic, [message("x")])
        producer.close()
        assert (result.uuid, result.retcode, result.stderr) == (UUID, 400, "rejected")
        assert bulk.retval["failed"] == {UUID: "rejected"}

    def test_interrupt_in_a_hook_is_not_swallowed(self, transport: Transport, topic: str) -> None:
        """C9"""

        class InterruptedProducer(transport.producer):  # type: ignore[name-defined,misc]
            @classmethod
            def onmessage(cls, kmsg: Message) -> Message:
                raise KeyboardInterrupt

        producer = self.new_producer(transport, InterruptedProducer)
        with pytest.raises(KeyboardInterrupt):
            producer.send(topic, message("x"))
        with pytest.raises(KeyboardInterrupt):
            producer.bulk_send(topic, [message("x")])
        producer.close()

    def test_message_sent_signal_is_emitted_after_delivery(self, producer: Any, topic: str) -> None:
        emitted: list[tuple[str, str, str, str]] = []

        def listen(sender: Any, topic: str, kmsg: Message, result: Result) -> None:
            emitted.append((topic, kmsg.uuid, result.uuid, threading.current_thread().name))

        not_json = {"when": object()}
        with signals.message_sent.connected_to(listen):
            producer.send(topic, message("x", uuid="1"))
            producer.send(topic, message("x", uuid="2", params=not_json))
            producer.bulk_send(topic, [message("x", uuid="3"), message("x", uuid="4", params=not_json)])
        thread = threading.current_thread().name
        assert emitted == [(topic, "1", "1", thread), (topic, "3", "3", thread)]

    # -- send_nowait ---------------------------------------------------------------------------------------------------

    def test_send_nowait_calls_back_after_delivery(
        self, transport: Transport, producer: Any, topic: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        results: list[Any] = []
        for number in range(20):
            producer.send_nowait(topic, message("x", uuid=str(number)), results.append)
        wait_until(lambda: len(results) == 20)
        outcomes = sorted((int(result.uuid), result.retcode) for result in results)
        assert outcomes == [(number, 0) for number in range(20)]
        assert len([line for line in lines(caplog) if line.startswith("Producer.Success: x[")]) == 20
        assert sorted(uuids(transport.records(topic, 20)), key=int) == [str(number) for number in range(20)]

    def test_send_nowait_reports_an_unsendable_message_at_once(self, transport: Transport, topic: str) -> None:
        results: list[Any] = []
        producer = self.new_producer(transport, **{transport.limit: 5000})
        producer.send_nowait(topic, message("x", params={"when": object()}), results.append)
        producer.send_nowait(topic, message("x", params={"text": "x" * 6000}), results.append)
        producer.close()
        assert [result.retcode for result in results] == [500, 413]
        assert f"{transport.limit!r} allows 5,000" in results[1].stderr

    @pytest.mark.parametrize("hook", ["onsuccess", "_send", "message_sent"])
    def test_user_code_is_called_in_the_thread_of_send_nowait(
        self, transport: Transport, topic: str, hook: str
    ) -> None:
        """User code may itself send a message and wait for its delivery."""
        threads: list[str] = []

        def record_thread(*_: Any, **__: Any) -> None:
            threads.append(threading.current_thread().name)

        class OverridingProducer(transport.producer):  # type: ignore[name-defined,misc]
            @classmethod
            def onsuccess(cls, kmsg: Message, result: Result) -> Any:
                record_thread()
                return result

            def _send(self, *arguments: Any, **options: Any) -> Any:
                record_thread()
                return super()._send(*arguments, **options)

        for name in {"onsuccess", "_send"} - {hook}:
            delattr(OverridingProducer, name)
        results: list[Any] = []
        producer = self.new_producer(transport, OverridingProducer)
        with signals.message_sent.connected_to(record_thread) if hook == "message_sent" else nullcontext():
            producer.send_nowait(topic, message("x"), lambda result: results.append((result.retcode, *threads)))
        assert results == [(0, threading.current_thread().name)]
        producer.close()

    # -- bulk_send -----------------------------------------------------------------------------------------------------

    def test_bulk_send_accepts_any_iterable(self, transport: Transport, producer: Any, topic: str) -> None:
        """D14"""
        count = 1200
        result = producer.bulk_send(topic, (message("x", uuid=str(number)) for number in range(count)))
        ending = transport.bulk_ending.format(topic=topic)
        assert (result.retcode, result.stdout, result.stderr) == (0, f"{count} message(s) sent{ending}", "")
        assert sorted(uuids(transport.records(topic, count)), key=int) == [str(number) for number in range(count)]

    def test_bulk_send_of_no_messages_succeeds(self, transport: Transport, producer: Any, topic: str) -> None:
        assert producer.bulk_send(topic, []).stdout == "0 message(s) sent" + transport.bulk_ending.format(topic=topic)

    def test_bulk_send_applies_keys_and_keeps_the_order_per_key(
        self, transport: Transport, producer: Any, topic: str
    ) -> None:
        keys: Mapping[int, Any] = {0: "even", 1: b"odd", 2: None}
        messages = [message("x", uuid=str(number)) for number in range(600)]
        assert producer.bulk_send(topic, messages, key=lambda kmsg: keys[int(kmsg.uuid) % 3]).retcode == 0
        sent = transport.records(topic, 600)
        for remainder, key in ((0, b"even"), (1, b"odd")):
            records = [record for record in sent if record.key == key]
            assert uuids(records) == [str(number) for number in range(600) if number % 3 == remainder]
            assert len({record.partition for record in records}) == 1

    def test_bulk_send_names_the_failed_messages(self, transport: Transport, topic: str) -> None:
        """D14: only delivered messages count as sent."""
        producer = self.new_producer(transport, **{transport.limit: 5000})
        unsendable = {"1": {"when": object()}, "2": {"text": "x" * 6000}}
        messages = [message("x", uuid=str(n), params=unsendable.get(str(n))) for n in range(5)]
        result = producer.bulk_send(topic, messages, key=lambda kmsg: {"3": 7}.get(kmsg.uuid))
        producer.close()
        ending = transport.bulk_ending.format(topic=topic)
        assert (result.retcode, result.stdout) == (500, f"2 message(s) sent{ending}")
        reasons = result.retval["failed"]
        assert result.stderr == f"3 of 5 message(s) not sent; first error: {next(iter(reasons.values()))}"
        assert set(reasons) == {"1", "2", "3"}
        assert "not JSON serializable" in reasons["1"]
        assert f"{transport.limit!r} allows 5,000" in reasons["2"]
        assert "a key must be a str or bytes" in reasons["3"]
        assert sorted(uuids(transport.records(topic, 2))) == ["0", "4"]

    def test_raising_iterable_gives_a_failed_result(self, transport: Transport, producer: Any, topic: str) -> None:
        def messages() -> Iterator[Message]:
            yield message("x")
            raise ValueError("no more")

        result = producer.bulk_send(topic, messages())
        assert (result.retcode, result.stderr) == (500, "no more")
        assert uuids(transport.records(topic, 1)) == [UUID]

    # -- threads -------------------------------------------------------------------------------------------------------

    def test_threads_share_a_producer(self, transport: Transport, producer: Any, topic: str) -> None:
        """Six threads send single messages and two send many; each message arrives once."""
        numbers = itertools.count()
        errors: list[Any] = []
        start = threading.Barrier(8)

        def one_by_one() -> None:
            start.wait()
            for _ in range(25):
                kmsg = message("x", uuid=str(next(numbers)))
                result = producer.send(topic, kmsg, timeout=WAIT_SECONDS)
                if (result.uuid, result.retcode) != (kmsg.uuid, 0):
                    errors.append(result.stderr)

        def in_bulk() -> None:
            start.wait()
            result = producer.bulk_send(topic, [message("x", uuid=str(next(numbers))) for _ in range(600)])
            if result.retcode:
                errors.append(result.stderr)

        threads = [threading.Thread(target=target) for target in [one_by_one] * 6 + [in_bulk] * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert sorted(map(int, uuids(transport.records(topic, 1350)))) == list(range(1350))

    def test_closing_twice_is_harmless(self, transport: Transport) -> None:
        producer = self.new_producer(transport)
        producer.close()
        producer.close()


class KafkaContract(ProducerContract):
    """The additional contract of a producer with a Kafka client."""

    def test_closed_producer_reports_that_it_is_closed(self, transport: Transport, topic: str) -> None:
        producer = self.new_producer(transport)
        producer.close()
        result = producer.send(topic, message("x"))
        assert (result.uuid, result.retcode) == (UUID, 500)
        assert "closed" in result.stderr

    def test_protocol_overhead_counts_towards_the_size_limit(self, transport: Transport, topic: str) -> None:
        producer = self.new_producer(transport, **{transport.limit: 5000})
        with pytest.raises(MessageTooLarge, match=f"{transport.limit!r} allows 5,000 including protocol overhead"):
            producer.produce(topic, b"x" * 5000)
        producer.produce(topic, b"x" * 4800)
        producer.close()
        assert len(transport.records(topic, 1)) == 1

    def test_key_partitioning_matches_other_clients(self, transport: Transport, producer: Any, topic: str) -> None:
        """Records with the same key share a partition, whichever client of Kafka sends them."""
        options = transport.config()
        servers = options.get("bootstrap.servers") or options["bootstrap_servers"]
        other = confluent_kafka.Producer({"bootstrap.servers": servers, "partitioner": "murmur2_random"})
        keys = [uuid.uuid4().hex for _ in range(20)]
        for key in keys:
            other.produce(topic, b'{"uuid": ""}', key=key)
        assert other.flush(WAIT_SECONDS) == 0
        producer.bulk_send(topic, [message("x", uuid=key) for key in keys], key=lambda kmsg: kmsg.uuid)
        partitions: dict[bytes | None, set[int]] = {}
        for record in transport.records(topic, 40):
            partitions.setdefault(record.key, set()).add(record.partition)
        assert [key for key in keys if len(partitions[key.encode()]) != 1] == []


def _fail_on_signal(sender: Any, **_: Any) -> None:
    raise AssertionError("the signal was emitted")
