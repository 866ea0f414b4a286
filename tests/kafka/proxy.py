"""A proxy in front of a broker. Subclasses change, hold or replace the requests and responses that pass it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

from tests.kafka.broker import Kafka


class ProxiedConnection:
    """A connection of a client through the proxy. The order of its responses is the order of its requests."""

    def __init__(self, client: socket.socket, broker: socket.socket) -> None:
        self.client, self.broker = client, broker
        #: The lock under which a thread sends a response to the client.
        self.sending = threading.Lock()

    def respond(self, response: bytes) -> None:
        """Send a response to the client. The caller must hold the lock."""
        _send(self.client, response)


class KafkaProxy:
    """A proxy of a broker, which passes each request and response as a whole.

    Clients stay behind the proxy, because it replaces the port of the broker in all responses.

    :param kafka: a broker on 127.0.0.1, without encryption.
    """

    def __init__(self, kafka: Kafka) -> None:
        self._port = int(kafka.bootstrap_servers.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._own_port = self._listener.getsockname()[1]
        #: The broker, as clients reach it through the proxy.
        self.kafka = Kafka(f"127.0.0.1:{self._own_port}")
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close all connections."""
        for each in self._sockets:
            _shut_down(each)
            each.close()

    def passes(self, connection: ProxiedConnection, request: bytes) -> bool:
        """Return whether a request is sent to the broker. Otherwise, the proxy itself must respond."""
        return True

    def change(self, response: bytes) -> bytes:
        """Return the response that the client receives."""
        return response

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                broker = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, broker]
                connection = ProxiedConnection(client, broker)
                for forward in (self._forward_requests, self._forward_responses):
                    threading.Thread(target=_until_closed, args=(forward, connection), daemon=True).start()

    def _forward_requests(self, connection: ProxiedConnection) -> None:
        for request in _frames(connection.client):
            if self.passes(connection, request):
                _send(connection.broker, request)

    def _forward_responses(self, connection: ProxiedConnection) -> None:
        host = b"127.0.0.1"
        broker, proxy = (host + struct.pack(">i", port) for port in (self._port, self._own_port))
        for response in _frames(connection.broker):
            changed = self.change(response.replace(broker, proxy))
            with connection.sending:
                connection.respond(changed)


def _until_closed(forward: Callable[[ProxiedConnection], None], connection: ProxiedConnection) -> None:
    # A connection can end within the size of a frame, which is then too short to unpack.
    with contextlib.suppress(OSError, struct.error):
        forward(connection)
    for each in (connection.client, connection.broker):
        _shut_down(each)


def _frames(source: socket.socket) -> Iterator[bytes]:
    """Yield the requests or responses that arrive, until the connection ends."""
    with source.makefile("rb") as file:
        while header := file.read(4):
            yield file.read(*struct.unpack(">i", header))


def _send(target: socket.socket, frame: bytes) -> None:
    target.sendall(struct.pack(">i", len(frame)) + frame)


def _shut_down(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
