"""Tests of producers while a broker becomes the leader of a partition: it rejects the first request to the partition.

A broker that has just created a topic responds NOT_LEADER_OR_FOLLOWER for a moment. A proxy makes this moment last from
the first request until the second one arrives, or until a second has passed.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kser.confluent.producer import Producer as ConfluentProducer
from kser.python_kafka.producer import Producer as KafkaProducer
from kser.schemas import Message
from tests.kafka.broker import Kafka
from tests.kafka.helpers import wait_until
from tests.kafka.proxy import KafkaProxy, ProxiedConnection
from tests.transports.producer_contract import read

PRODUCE = 0
NOT_LEADER = 6
#: The first version of a Produce request whose response has compact fields and tags, and the last that kser meets.
FIRST_COMPACT, LAST_WITH_NAMES = 9, 12
#: Seconds that the proxy waits for a second request before it responds to the first.
SECOND_REQUEST_SECONDS = 1.0

MESSAGES = 40


class RejectingProxy(KafkaProxy):
    """A proxy of a broker that responds NOT_LEADER_OR_FOLLOWER to the first Produce request of a topic.

    :param kafka: the broker.
    :param topic: the topic; it has one partition.
    """

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self._topic = topic.encode()
        self._second_arrived = threading.Event()
        #: The number of Produce requests of the topic.
        self.requests = 0
        super().__init__(kafka)

    def passes(self, connection: ProxiedConnection, request: bytes) -> bool:
        key, version, correlation = struct.unpack_from(">hhi", request)
        if key != PRODUCE or self._topic not in request:
            return True
        self.requests += 1
        if self.requests > 1:
            self._second_arrived.set()
            return True
        assert version <= LAST_WITH_NAMES, f"Produce version {version} has no topic names"
        response = _rejection(version, correlation, self._topic)
        threading.Thread(target=self._reject, args=(connection, response), daemon=True).start()
        return False

    def _reject(self, connection: ProxiedConnection, response: bytes) -> None:
        # Responses must have the order of the requests, so hold back the response to the second request.
        with connection.sending, contextlib.suppress(OSError):
            self._second_arrived.wait(SECOND_REQUEST_SECONDS)
            connection.respond(response)


def _rejection(version: int, correlation: int, topic: bytes) -> bytes:
    """Return the response to a Produce request with one partition: the broker is not its leader."""
    partition = struct.pack(">ihqqq", 0, NOT_LEADER, -1, -1, -1)
    if version < FIRST_COMPACT:
        empty_errors = struct.pack(">ih", 0, -1) if version >= 8 else b""
        topics = struct.pack(">ih", 1, len(topic)) + topic + struct.pack(">i", 1) + partition + empty_errors
        return struct.pack(">i", correlation) + topics + struct.pack(">i", 0)
    no_tags, one, no_errors, no_text = b"\0", b"\2", b"\1", b"\0"
    topics = one + bytes([len(topic) + 1]) + topic + one + partition + no_errors + no_text + no_tags + no_tags
    return struct.pack(">i", correlation) + no_tags + topics + struct.pack(">i", 0) + no_tags


def _kafka_python(address: str) -> Any:
    return KafkaProducer({"bootstrap_servers": address})


def _confluent(address: str) -> Any:
    return ConfluentProducer({"bootstrap.servers": address})


def _confluent_with_two_requests(address: str) -> Any:
    return ConfluentProducer({"bootstrap.servers": address, "max.in.flight": 2})


def _send(kafka: Kafka, topic: str, new_producer: Callable[[str], Any]) -> list[Any]:
    """Send messages through the proxy, the first one in a request of its own, and return their Results."""
    proxy = RejectingProxy(kafka, topic)
    with contextlib.closing(proxy), contextlib.closing(new_producer(proxy.kafka.bootstrap_servers)) as producer:
        results: list[Any] = []
        for number in range(MESSAGES):
            message = Message(uuid=str(number), entrypoint="x", params={})
            producer.send_nowait(topic, message, results.append, 30)
            wait_until(lambda: proxy.requests, "the first message is sent", 30)
        wait_until(lambda: len(results) == MESSAGES, "all messages are reported", 60)
        assert proxy.requests > 1, "the proxy rejected no request"
        return results


@pytest.mark.parametrize("new_producer", [_kafka_python, _confluent])
def test_message_that_a_new_leader_rejects_is_sent_again(
    kafka: Kafka, topic: Callable[..., str], new_producer: Callable[[str], Any]
) -> None:
    name = topic()
    results = _send(kafka, name, new_producer)
    assert [result.retcode for result in results] == [0] * MESSAGES
    assert len(read(kafka.bootstrap_servers, name, MESSAGES)) == MESSAGES


def test_lost_message_is_reported_as_not_confirmed(kafka: Kafka, topic: Callable[..., str]) -> None:
    """With several requests in flight, librdkafka loses the rejected message and reports it without an offset."""
    name = topic()
    failed = [result for result in _send(kafka, name, _confluent_with_two_requests) if result.retcode]
    assert [result.uuid for result in failed] == ["0"]
    assert "did not confirm the message, which may still arrive" in failed[0].stderr
    assert len(read(kafka.bootstrap_servers, name, MESSAGES - 1)) == MESSAGES - 1
