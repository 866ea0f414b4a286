"""Tests of the Apache Kafka broker that the test suite starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
from kafka import KafkaConsumer, KafkaProducer

from tests.kafka.broker import Kafka, KafkaBroker, answers, free_ports


def read_one(bootstrap_servers: str, topic: str) -> bytes:
    """Return the first value of a topic."""
    consumer = KafkaConsumer(
        topic, bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest", consumer_timeout_ms=20000
    )
    try:
        return next(consumer).value
    finally:
        consumer.close()


def send_one(bootstrap_servers: str, topic: str, value: bytes) -> None:
    """Send a value and wait for its delivery."""
    producer = KafkaProducer(bootstrap_servers=bootstrap_servers)
    try:
        producer.send(topic, value).get(20)
    finally:
        producer.close()


def is_alive(pid: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_record_sent_to_a_topic_can_be_read(kafka: Kafka, topic: Callable[..., str]) -> None:
    name = topic(partitions=3)
    send_one(kafka.bootstrap_servers, name, b"hello")
    assert read_one(kafka.bootstrap_servers, name) == b"hello"


def test_topic_that_was_never_created_is_missing(own_kafka: KafkaBroker) -> None:
    producer = KafkaProducer(bootstrap_servers=own_kafka.bootstrap_servers, max_block_ms=1000)
    try:
        with pytest.raises(Exception, match=r"(?i)metadata|topic"):
            producer.send("missing", b"").get(5)
    finally:
        producer.close()


def test_restarted_broker_keeps_its_address_and_messages(own_kafka: KafkaBroker) -> None:
    own_kafka.create_topic("kept")
    send_one(own_kafka.bootstrap_servers, "kept", b"still here")
    own_kafka.kill()
    assert not answers(own_kafka.port)
    own_kafka.start()
    assert read_one(own_kafka.bootstrap_servers, "kept") == b"still here"
    own_kafka.stop()
    own_kafka.start()
    assert read_one(own_kafka.bootstrap_servers, "kept") == b"still here"


def test_closed_broker_leaves_no_process_and_no_folder(own_kafka: KafkaBroker) -> None:
    pid, folder, port = own_kafka.pid, own_kafka.folder, own_kafka.port
    assert pid is not None and is_alive(pid) and folder.is_dir() and answers(port)
    own_kafka.close()
    assert not is_alive(pid)
    assert not folder.exists()
    assert not answers(port)


def test_broker_that_cannot_start_reports_its_output_and_leaves_no_process(
    own_kafka: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_kafka.stop()
    (own_kafka.folder / "server.properties").write_text("process.roles=nonsense\n")
    with pytest.raises(RuntimeError, match=r"ended with status 1 while it started(?s:.*)nonsense"):
        own_kafka.start()
    assert own_kafka.pid is None


def test_broker_listens_on_127_0_0_1_alone(own_kafka: KafkaBroker) -> None:
    with socket.create_connection(("127.0.0.1", own_kafka.port), timeout=1):
        pass
    # Another address of this machine; a broker that listens on all addresses would accept this connection.
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", own_kafka.port), timeout=1):
        pass


def test_free_ports_are_distinct_and_outside_the_ephemeral_range() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(20000 <= port < 32000 for port in ports)
