"""Tests of send failures: each has a failed result with its reason, within the timeout."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from cdumay_result import Result
from kafka import KafkaProducer

from kser.confluent.producer import Producer as ConfluentProducer
from kser.errors import BrokerUnavailable, DeliveryError, MessageTooLarge
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from tests.kafka.broker import Kafka, KafkaBroker, free_ports
from tests.kafka.helpers import message, read_uuids, read_values, uuids
from tests.support import WAIT_SECONDS

# kafka-python leaves the sockets of connections that were refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

#: The option for the time that a new client looks for a broker; its name differs between kafka-python 2 and 3.
BOOTSTRAP_TIMEOUT = (
    "bootstrap_timeout_ms" if "bootstrap_timeout_ms" in KafkaProducer.DEFAULT_CONFIG else "api_version_auto_timeout_ms"
)

#: Seconds that a send may take beyond its timeout. The default timeouts of the clients are longer.
SLACK = 2

#: The options of each producer for its broker, and for the largest message.
SERVERS = {Producer: "bootstrap_servers", ConfluentProducer: "bootstrap.servers"}
LIMIT = {Producer: "max_request_size", ConfluentProducer: "message.max.bytes"}

both_producers = pytest.mark.parametrize("kind", SERVERS, ids=["python_kafka", "confluent"])


@pytest.fixture(autouse=True)
def collect_garbage() -> Iterator[None]:
    yield
    gc.collect()


def connected(kind: type[Any], kafka: Kafka, **options: Any) -> Any:
    """Return a context manager that creates a producer and closes it."""
    return closing(kind({SERVERS[kind]: kafka.bootstrap_servers, **options}))


@pytest.fixture(params=SERVERS, ids=["python_kafka", "confluent"])
def producer(kafka: Kafka, request: pytest.FixtureRequest) -> Iterator[Any]:
    with connected(request.param, kafka) as producer:
        yield producer


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Check that the block takes no more than ``seconds``, with some slack."""
    started_at = time.monotonic()
    yield
    duration = time.monotonic() - started_at
    print(f"took {duration:.2f} s")
    assert duration < seconds + SLACK, duration


def check_failed(result: Result, sent: Any, retcode: int = 500) -> None:
    """Check that a result reports the failure of a message."""
    assert result.retcode == retcode
    assert result.uuid == sent.uuid
    assert result.retval["error"]["message"] == result.stderr


def test_send_to_a_missing_topic_fails_within_the_timeout(producer: Any) -> None:
    sent = message()
    with within(1):
        result = producer.send("missing-topic", sent, timeout=1)
    print(result.stderr)
    check_failed(result, sent)
    assert "have no topic 'missing-topic'" in result.stderr


def test_produce_to_a_missing_topic_raises(producer: Any) -> None:
    with within(1), pytest.raises(DeliveryError, match="have no topic 'missing-topic'"):
        producer.produce("missing-topic", b"x", timeout=1)


def test_send_to_a_missing_topic_fails_within_five_seconds_by_default(producer: Any) -> None:
    sent = message()
    with within(5):
        result = producer.send("missing-topic", sent)
    check_failed(result, sent)
    assert "have no topic 'missing-topic'" in result.stderr


def test_bulk_send_to_a_missing_topic_fails_within_the_timeout(producer: Any) -> None:
    messages = [message() for _ in range(200)]
    with within(2):
        result = producer.bulk_send("missing-topic", messages, timeout=2)
    assert result.retcode == 500
    assert result.stdout == "0 message(s) sent"
    assert sorted(result.retval["failed"]) == sorted(uuids(messages))
    assert all("have no topic 'missing-topic'" in reason for reason in result.retval["failed"].values())


def test_bulk_send_to_a_missing_topic_waits_for_metadata_once(kafka: Kafka) -> None:
    with closing(Producer({"bootstrap_servers": kafka.bootstrap_servers, "max_block_ms": 1000})) as producer:
        with within(1):
            result = producer.bulk_send("missing-topic", [message() for _ in range(6)], timeout=6)
        assert len(result.retval["failed"]) == 6


def test_topic_created_later_can_be_sent_to(kafka: Kafka, producer: Any, topic: Callable[..., str]) -> None:
    name = topic()
    kafka.delete_topic(name)
    assert producer.send(name, message(), timeout=1).retcode == 500
    kafka.create_topic(name)
    sent = message()
    assert producer.send(name, sent, timeout=5).retcode == 0
    assert read_uuids(kafka, name) == [sent.uuid]


def test_oversized_message_is_rejected_at_once_and_the_others_are_sent(
    kafka: Kafka, producer: Any, topic: Callable[..., str]
) -> None:
    name = topic()
    small, large = message(), message(text="x" * 2_000_000)
    with within(0.5):
        result = producer.send(name, large, timeout=10)
    print(result.stderr)
    check_failed(result, large, 413)
    assert LIMIT[type(producer)] in result.stderr

    others = [message() for _ in range(10)]
    with within(2):
        result = producer.bulk_send(name, [small, large, *others], timeout=10)
    assert list(result.retval["failed"]) == [large.uuid]
    assert result.stdout == "11 message(s) sent"
    assert read_uuids(kafka, name) == uuids([small, *others])


@both_producers
def test_message_too_large_for_the_broker_alone_is_rejected(
    kind: type[Any], kafka: Kafka, topic: Callable[..., str]
) -> None:
    name = topic()
    small, large = message(), message(text="x" * 1_500_000)
    with connected(kind, kafka, **{LIMIT[kind]: 3_000_000}) as producer:
        with within(3):
            result = producer.send(name, large, timeout=3)
        print(result.stderr)
        check_failed(result, large, 413)
        assert f"more than topic {name!r} at {kafka.bootstrap_servers} accepts ('max.message.bytes'" in result.stderr
        with pytest.raises(MessageTooLarge, match=r"'max\.message\.bytes' of the topic"):
            producer.produce(name, b"x" * 1_500_000, timeout=3)
        with within(3):
            result = producer.bulk_send(name, [small, large], timeout=3)
        assert large.uuid in result.retval["failed"]
        arrived = read_uuids(kafka, name)
        assert set(uuids([small, large])) - result.retval["failed"].keys() <= set(arrived)
        assert large.uuid not in arrived


@both_producers
def test_rejected_record_harms_no_other_record(kind: type[Any], kafka: Kafka, topic: Callable[..., str]) -> None:
    """Three threads send small records, while the broker rejects large records of the same producer."""
    name = topic()
    errors: list[str] = []
    is_over = threading.Event()

    def send_small(producer: Any) -> None:
        while not is_over.is_set():
            try:
                producer.produce(name, b"small", timeout=WAIT_SECONDS)
            except DeliveryError as error:
                errors.append(error.message)

    with connected(kind, kafka, **{LIMIT[kind]: 3_000_000}) as producer:
        threads = [threading.Thread(target=send_small, args=[producer]) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                with pytest.raises(MessageTooLarge):
                    producer.produce(name, b"x" * 1_500_000, timeout=WAIT_SECONDS)
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        producer.produce(name, b"small", timeout=WAIT_SECONDS)
    assert errors == []


def test_message_that_is_not_json_is_rejected_and_the_others_are_sent(
    kafka: Kafka, producer: Any, topic: Callable[..., str]
) -> None:
    name = topic()
    invalid = message(param=object())
    result = producer.send(name, invalid)
    check_failed(result, invalid)
    assert "not JSON serializable" in result.stderr
    sent = message()
    result = producer.bulk_send(name, [invalid, sent])
    assert list(result.retval["failed"]) == [invalid.uuid]
    assert read_uuids(kafka, name) == [sent.uuid]


def test_bulk_send_accepts_any_iterable_and_counts_the_sent_messages(
    kafka: Kafka, producer: Any, topic: Callable[..., str]
) -> None:
    name = topic()
    messages = [message(number=number) for number in range(1500)]
    result = producer.bulk_send(name, iter(messages))
    assert (result.retcode, result.stdout) == (0, "1500 message(s) sent")
    assert read_values(kafka, name) == [message.dumps().encode() for message in messages]
    assert producer.bulk_send(name, []).stdout == "0 message(s) sent"


@both_producers
def test_deleted_topic_is_named_and_found_again_when_recreated(
    kind: type[Any], kafka: Kafka, topic: Callable[..., str]
) -> None:
    name = topic()
    with connected(kind, kafka) as producer:
        assert producer.send(name, message()).retcode == 0
        kafka.delete_topic(name)
        result = producer.send(name, message(), timeout=2)
        print(result.stderr)
        assert result.retcode == 500 and kafka.bootstrap_servers in result.stderr
        kafka.create_topic(name)
        assert producer.send(name, message(), timeout=15).retcode == 0


def test_raising_iterable_fails_the_bulk_send_after_its_earlier_messages(
    kafka: Kafka, producer: Any, topic: Callable[..., str]
) -> None:
    name = topic()
    first = message()

    def broken() -> Iterator[Any]:
        yield first
        raise ValueError("no more")

    result = producer.bulk_send(name, broken())
    assert result.retcode == 500 and "no more" in result.stderr
    assert read_uuids(kafka, name) == [first.uuid]


@pytest.mark.parametrize("client", [Producer, Consumer])
def test_construction_names_an_address_without_a_broker(client: type[Any]) -> None:
    (port,) = free_ports(1)
    options = {"bootstrap_servers": f"127.0.0.1:{port}", BOOTSTRAP_TIMEOUT: 1000}
    arguments = (["work"],) if client is Consumer else ()
    with within(2), pytest.raises(BrokerUnavailable, match=f"no Kafka broker responds at 127.0.0.1:{port}"):
        client(options, *arguments)


@both_producers
def test_dead_broker_is_named_within_the_timeout_by_send_and_bulk_send(kind: type[Any], own_kafka: KafkaBroker) -> None:
    own_kafka.create_topic("work")
    with connected(kind, own_kafka) as producer:
        assert producer.send("work", message()).retcode == 0
        own_kafka.kill()
        known, unknown = message(), message()
        # The client has the metadata of the topic "work", so the first send waits for the delivery, and the second for
        # metadata.
        for name, sent in (("work", known), ("other", unknown)):
            with within(1):
                result = producer.send(name, sent, timeout=1)
            print(name, result.stderr)
            check_failed(result, sent)
            assert own_kafka.bootstrap_servers in result.stderr, result.stderr
        with within(1):
            result = producer.bulk_send("work", [message() for _ in range(50)], timeout=1)
        print(result.stderr)
        assert len(result.retval["failed"]) == 50
        assert own_kafka.bootstrap_servers in result.stderr, result.stderr
