"""Tests of the network of kafka-python: calls have a time limit, and a closed client logs no error."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from kafka import KafkaConsumer

from kser.consumer.partition_table import PartitionTable
from kser.consumer.work_queue import WorkQueue
from kser.embedded import EmbeddedBroker
from kser.errors import ClientError
from kser.python_kafka import health, metadata
from kser.python_kafka.client import KafkaPythonClient
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.rebalances import ASYNC
from tests.transports.client_contract import PROMPT_SECONDS

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def quiet_kafka() -> Iterator[None]:
    """Silence kafka-python, which logs each failed connection."""
    logger = logging.getLogger("kafka")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def ends_soon(call: Callable[[], Any]) -> bool:
    """Call a function in a thread; return whether it ends within ``PROMPT_SECONDS``."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PROMPT_SECONDS)
    return not thread.is_alive()


@pytest.mark.usefixtures("quiet_kafka")
def test_poll_without_a_broker_ends_although_the_topics_are_unknown(
    unused_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``api_version``, the client is created without a broker, and its first request is for metadata."""
    monkeypatch.setattr(metadata, "METADATA_TIMEOUT_MS", 200)
    monkeypatch.setattr(health, "HEALTH_CHECK_INTERVAL", 0)
    options = {"auto_offset_reset": "none", "api_version": (2, 4), "group_id": "group"}
    kafka_client = KafkaConsumer(bootstrap_servers=unused_address, **options)
    with closing(kafka_client):
        client = KafkaPythonClient(kafka_client, "earliest")
        client.subscribe(["dice"], PartitionTable(WorkQueue()))
        errors: list[ClientError] = []

        def poll_until_error() -> None:
            deadline = time.monotonic() + PROMPT_SECONDS
            while not errors and time.monotonic() < deadline:
                try:
                    client.poll(0.05, 1, ())
                except ClientError as error:
                    errors.append(error)

        assert ends_soon(poll_until_error), "a poll does not return"
        assert ends_soon(lambda: client.close(0.2)), "close does not return"
    (error,) = errors
    assert unused_address in error.message


@pytest.mark.skipif(not ASYNC, reason="kafka-python 2 reads in the thread that closes")
def test_client_that_is_closed_while_it_reads_logs_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kafka.net.transport import KafkaTCPTransport

    is_closing = threading.Event()
    reads = threading.Event()
    receive = KafkaTCPTransport._sock_recv

    def receive_late(transport: Any) -> Any:
        """Read only after another thread has had time to close the connection."""
        deadline = time.monotonic() + 0.3
        while is_closing.is_set() and transport._sock is not None and time.monotonic() < deadline:
            reads.set()
            time.sleep(0.001)
        return receive(transport)

    monkeypatch.setattr(KafkaTCPTransport, "_sock_recv", receive_late)
    with EmbeddedBroker("dice") as broker, closing(Consumer(broker.config, ["dice"])) as consumer:
        consumer.step(0.2)
        coordinator = consumer.client._coordinator
        leave_group = coordinator.close

        def leave_and_wait_for_a_read(*arguments: Any, **keywords: Any) -> None:
            leave_group(*arguments, **keywords)
            is_closing.set()
            consumer.client._client.cluster.request_update()
            reads.wait(PROMPT_SECONDS)

        monkeypatch.setattr(coordinator, "close", leave_and_wait_for_a_read)
    assert reads.is_set()
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
