"""Tests of the default transport, kafka-python, with a broker that is unreachable or has died."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from typing import Any

import kafka
import pytest
from kafka import KafkaConsumer

from kser.consumer.client import Commit, Partition
from kser.consumer.partition_table import PartitionTable
from kser.consumer.work_queue import WorkQueue
from kser.embedded import EmbeddedBroker
from kser.errors import ClientError
from kser.python_kafka.client import KafkaPythonClient
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from tests.support import WAIT_SECONDS, lines, message, run_concurrently, run_python, wait_until
from tests.transports.client_contract import PROMPT_SECONDS
from tests.transports.harness import RecordingEntrypoint

# kafka-python does not close a socket that could not connect.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def released_sockets(recording_entrypoint: type[RecordingEntrypoint]) -> Iterator[None]:
    """Release the sockets of a test in the same test, because each unclosed one is a warning."""
    # Captured log records of kafka-python refer to sockets.
    kafka_logger = logging.getLogger("kafka")
    level = kafka_logger.level
    kafka_logger.setLevel(logging.CRITICAL)
    yield
    kafka_logger.setLevel(level)
    gc.collect()


def short_timeouts(address: str) -> dict[str, Any]:
    """Return options of a producer that waits half a second for a broker."""
    return {"bootstrap_servers": address, "api_version": (2, 0), "delivery_timeout_ms": 600, "request_timeout_ms": 500}


@pytest.mark.parametrize("call", ["send", "bulk_send"])
def test_unreachable_broker_is_named_within_the_timeout(unused_address: str, call: str) -> None:
    """D2"""
    producer = Producer(short_timeouts(unused_address))
    argument: Any = message("x") if call == "send" else [message("x"), message("x", uuid="2")]
    start = time.monotonic()
    result = getattr(producer, call)("dice", argument, timeout=0.3)
    assert time.monotonic() - start < PROMPT_SECONDS
    producer.close()
    assert result.retcode == 500
    assert f"No broker responds at {unused_address}" in result.stderr


def test_threads_sharing_a_producer_wait_no_longer_than_their_timeout(unused_address: str) -> None:
    """The timeouts of all threads together are longer than the limit of the test."""
    count = 30
    producer = Producer(short_timeouts(unused_address))
    start = time.monotonic()
    results = run_concurrently(*[lambda: producer.send("dice", message("x"), timeout=0.3)] * count)
    assert time.monotonic() - start < PROMPT_SECONDS < count * 0.3
    producer.close()
    assert [result.retcode for result in results] == [500] * count
    assert all(unused_address in result.stderr for result in results)


@pytest.mark.skipif(not hasattr(kafka, "AsyncConsumerRebalanceListener"), reason="kafka-python 2 logs nothing")
def test_closing_a_producer_with_messages_in_flight_leaves_no_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The leak detector fails the test if a thread is left."""
    broker = EmbeddedBroker("dice")
    producer = Producer(broker.producer_config)
    producer.send("dice", message("x"))
    broker.close()
    producer.send("dice", message("x"), timeout=0)
    start = time.monotonic()
    producer.close()
    assert time.monotonic() - start < PROMPT_SECONDS
    (line,) = lines(caplog, logging.WARNING)[-1:]
    assert line.startswith("Producer: closed before all messages were delivered to ")


CONSTRUCT_WITHOUT_BROKER = """
import sys
from kafka import KafkaConsumer
from kser.errors import BrokerUnavailable
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
config = {"bootstrap_servers": [sys.argv[2]]}
if "bootstrap_timeout_ms" in KafkaConsumer.DEFAULT_CONFIG:
    # kafka-python 2 has no such option and waits for 2 s.
    config["bootstrap_timeout_ms"] = 300
try:
    Producer(config) if sys.argv[1] == "producer" else Consumer(config, ["dice"])
except BrokerUnavailable as error:
    print(error.message)
"""


@pytest.mark.parametrize("kind", ["producer", "consumer"])
def test_construction_without_a_broker_or_a_version_names_the_address(kind: str, unused_address: str) -> None:
    """The test uses another process, because kafka-python leaves a thread when its construction fails."""
    done = run_python(CONSTRUCT_WITHOUT_BROKER, kind, unused_address)
    assert done.stdout.startswith(f"no Kafka broker responds at {unused_address}"), done.stderr
    assert "'bootstrap_servers' in KSER_CONFIG" in done.stdout


def test_commit_without_a_broker_raises_client_error_within_its_timeout() -> None:
    broker = EmbeddedBroker("dice")
    client = KafkaPythonClient(
        KafkaConsumer(**broker.config, group_id="gone", enable_auto_commit=False, auto_offset_reset="none"), "earliest"
    )
    client.subscribe(["dice"], PartitionTable(WorkQueue()))
    broker.close()
    start = time.monotonic()
    with pytest.raises(ClientError, match=f"cannot commit offsets at {broker.bootstrap_servers}"):
        client.commit({Partition("dice", 0): Commit(1)}, 0.3)
    client.close(0.3)
    assert time.monotonic() - start < PROMPT_SECONDS


def test_graceful_shutdown_is_bounded_although_the_broker_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedBroker("dice") as broker:
        producer = Producer(broker.producer_config)
        producer.send("dice", message(RecordingEntrypoint))
        producer.close()
        consumer = Consumer({**broker.config, "group_id": "gone", "auto_commit_interval_ms": 600_000}, ["dice"])
        wait_until(lambda: consumer.step(timeout=0.05) or RecordingEntrypoint.ran)
    start = time.monotonic()
    consumer.close()
    assert time.monotonic() - start < WAIT_SECONDS
    assert "cannot commit offsets" in lines(caplog, logging.ERROR)[0]
