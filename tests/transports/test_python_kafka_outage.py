"""Tests of the default transport when its broker is unreachable or has died."""

from __future__ import annotations

import gc
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import kafka
import pytest
from kafka import KafkaConsumer

from kser.consumer.client import Commit, Partition
from kser.consumer.partition_table import PartitionTable
from kser.consumer.work_queue import WorkQueue
from kser.controller import Controller
from kser.embedded import EmbeddedBroker
from kser.entry import Entrypoint
from kser.errors import ClientError
from kser.python_kafka.client import KafkaPythonClient
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from tests.support import UUID, lines, message, run_python

# kafka-python drops sockets that could not connect without closing them.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

PATIENCE = 30


class Note(Entrypoint):
    seen: list[str] = []  # noqa: RUF012  emptied after each test

    def run(self) -> None:
        self.seen.append(self.uuid)


@pytest.fixture(autouse=True)
def registered(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    Controller.register(Note.path, Note)
    caplog.set_level(logging.INFO, "kser")
    # Its records would hold the sockets until the next test, where warnings about them are errors.
    kafka_logger = logging.getLogger("kafka")
    level = kafka_logger.level
    kafka_logger.setLevel(logging.CRITICAL)
    yield
    kafka_logger.setLevel(level)
    Note.seen.clear()
    gc.collect()


@pytest.fixture
def nobody() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def hasty(address: str) -> dict[str, Any]:
    """Options with which a client gives up soon."""
    return {"bootstrap_servers": address, "api_version": (2, 0), "delivery_timeout_ms": 600, "request_timeout_ms": 500}


@pytest.mark.parametrize("call", ["send", "bulk_send"])
def test_unreachable_broker_is_named_within_the_timeout(nobody: str, call: str) -> None:
    """D2"""
    producer = Producer(hasty(nobody))
    begin = time.monotonic()
    argument: Any = message("x") if call == "send" else [message("x"), message("x", uuid="2")]
    result = getattr(producer, call)("dice", argument, timeout=0.3)
    assert time.monotonic() - begin < 1.5
    producer.close()
    assert result.retcode == 500
    assert f"No broker responds at {nobody}" in result.stderr


def test_threads_sharing_a_producer_wait_no_longer_than_their_timeout(nobody: str) -> None:
    producer = Producer(hasty(nobody))
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(producer.send("dice", message("x"), timeout=0.3)))
        for _ in range(3)
    ]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 1.5
    producer.close()
    assert [result.retcode for result in results] == [500] * 3
    assert all(nobody in result.stderr for result in results)


def test_dead_broker_is_named_within_the_timeout() -> None:
    """D2: the topic is known already, so the message waits for its delivery."""
    broker = EmbeddedBroker("dice")
    producer = Producer(hasty(broker.bootstrap_servers))
    assert producer.send("dice", message("x")).retcode == 0
    broker.close()
    begin = time.monotonic()
    result = producer.send("dice", message("x"), timeout=0.3)
    assert time.monotonic() - begin < 1.5
    producer.close()
    assert (result.uuid, result.retcode) == (UUID, 500)
    assert broker.bootstrap_servers in result.stderr


@pytest.mark.skipif(not hasattr(kafka, "AsyncConsumerRebalanceListener"), reason="kafka-python 2 closes without a word")
def test_closing_a_producer_with_messages_in_flight_leaves_no_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The detector of leaks looks for it when the test has ended."""
    broker = EmbeddedBroker("dice")
    producer = Producer(broker.producer_config)
    producer.send("dice", message("x"))
    broker.close()
    producer.send("dice", message("x"), timeout=0)
    begin = time.monotonic()
    producer.close()
    assert time.monotonic() - begin < 2
    (line,) = lines(caplog, logging.WARNING)[-1:]
    assert line.startswith("Producer: closed with messages in flight to ")


UNMADE = """
import sys
from kafka import KafkaConsumer
from kser.errors import BrokerUnavailable
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
config = {"bootstrap_servers": [sys.argv[2]]}
if "bootstrap_timeout_ms" in KafkaConsumer.DEFAULT_CONFIG:
    # kafka-python 2 waits for 2 s, and cannot be told otherwise.
    config["bootstrap_timeout_ms"] = 300
try:
    Producer(config) if sys.argv[1] == "producer" else Consumer(config, ["dice"])
except BrokerUnavailable as error:
    print(error.message)
"""


@pytest.mark.parametrize("what", ["producer", "consumer"])
def test_construction_without_a_broker_or_a_version_names_the_address(what: str, nobody: str) -> None:
    """In a process of its own: kafka-python leaves a thread behind when it cannot be constructed."""
    done = run_python(UNMADE, what, nobody)
    assert done.stdout.startswith(f"no Kafka broker responds at {nobody}"), done.stderr
    assert "'bootstrap_servers' in KSER_CONFIG" in done.stdout


def test_commit_without_a_broker_raises_client_error_within_its_timeout() -> None:
    broker = EmbeddedBroker("dice")
    client = KafkaPythonClient(
        KafkaConsumer(**broker.config, group_id="gone", enable_auto_commit=False, auto_offset_reset="none"), "earliest"
    )
    client.subscribe(["dice"], PartitionTable(WorkQueue()))
    broker.close()
    begin = time.monotonic()
    with pytest.raises(ClientError, match=f"cannot commit offsets at {broker.bootstrap_servers}"):
        client.commit({Partition("dice", 0): Commit(1)}, 0.3)
    client.close(0.3)
    assert time.monotonic() - begin < 3


def test_graceful_shutdown_is_bounded_although_the_broker_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedBroker("dice") as broker:
        producer = Producer(broker.producer_config)
        producer.send("dice", message(Note))
        producer.close()
        consumer = Consumer({**broker.config, "group_id": "gone", "auto_commit_interval_ms": 600_000}, ["dice"])
        deadline = time.monotonic() + PATIENCE
        while not Note.seen:
            assert time.monotonic() < deadline
            consumer.step(timeout=0.05)
    begin = time.monotonic()
    consumer.close()
    assert time.monotonic() - begin < 5
    assert "cannot commit offsets" in lines(caplog, logging.ERROR)[0]
