"""Tests of producers while a broker becomes the leader of a partition: it rejects the first request to the partition.

A broker that has just created a topic responds NOT_LEADER_OR_FOLLOWER for a moment. A proxy makes this moment last from
the first request until the second one arrives, or until a second has passed.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kser.confluent.producer import Producer as ConfluentProducer
from kser.python_kafka.producer import Producer as KafkaProducer
from kser.schemas import Message
from tests.kafka.broker import Kafka
from tests.kafka.helpers import wait_until
from tests.transports.producer_contract import read

PRODUCE = 0
NOT_LEADER = 6
#: The first version of a Produce request whose response has compact fields and tags, and the last that kser meets.
FIRST_COMPACT, LAST_WITH_NAMES = 9, 12
#: Seconds that the proxy waits for a second request before it responds to the first.
SECOND_REQUEST_SECONDS = 1.0

MESSAGES = 40


class RejectingProxy:
    """A proxy of a broker that responds NOT_LEADER_OR_FOLLOWER to the first Produce request of a topic.

    :param port: the port of the broker.
    :param topic: the topic; it has one partition.
    """

    def __init__(self, port: int, topic: str) -> None:
        self._port, self._topic = port, topic.encode()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._own_port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self._own_port}"
        self._sockets: list[socket.socket] = [self._listener]
        self._second_arrived = threading.Event()
        #: The number of Produce requests of the topic.
        self.requests = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close all connections."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                broker = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, broker]
                sending = threading.Lock()
                for target in (self._forward_requests, self._forward_responses):
                    threading.Thread(target=target, args=(client, broker, sending), daemon=True).start()

    def _forward_requests(self, client: socket.socket, broker: socket.socket, sending: threading.Lock) -> None:
        with contextlib.suppress(OSError):
            for frame in _frames(client):
                key, version, correlation = struct.unpack_from(">hhi", frame)
                if key == PRODUCE and self._topic in frame:
                    self.requests += 1
                    if self.requests == 1:
                        assert version <= LAST_WITH_NAMES, f"Produce version {version} has no topic names"
                        response = _rejection(version, correlation, self._topic)
                        threading.Thread(target=self._reject, args=(client, response, sending), daemon=True).start()
                        continue
                    self._second_arrived.set()
                broker.sendall(struct.pack(">i", len(frame)) + frame)

    def _reject(self, client: socket.socket, response: bytes, sending: threading.Lock) -> None:
        # Responses must have the order of the requests, so hold back the response to the second request.
        with sending, contextlib.suppress(OSError):
            self._second_arrived.wait(SECOND_REQUEST_SECONDS)
            client.sendall(struct.pack(">i", len(response)) + response)

    def _forward_responses(self, client: socket.socket, broker: socket.socket, sending: threading.Lock) -> None:
        address = b"127.0.0.1"
        with contextlib.suppress(OSError):
            for frame in _frames(broker):
                # The metadata name the address of the broker, but the client must connect to the proxy.
                changed = frame.replace(
                    address + struct.pack(">i", self._port), address + struct.pack(">i", self._own_port)
                )
                with sending:
                    client.sendall(struct.pack(">i", len(changed)) + changed)


def _frames(connection: socket.socket) -> Iterator[bytes]:
    """Yield the requests or responses that arrive at a connection."""
    with connection.makefile("rb") as stream:
        while header := stream.read(4):
            yield stream.read(*struct.unpack(">i", header))


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
    proxy = RejectingProxy(int(kafka.bootstrap_servers.rpartition(":")[2]), topic)
    with contextlib.closing(proxy), contextlib.closing(new_producer(proxy.address)) as producer:
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
