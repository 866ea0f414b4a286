"""Tests of producers whose client is in a fatal state, in which it can send nothing any more."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

import kser.confluent.producer as confluent_producer
import kser.producer as base_module
import kser.python_kafka.producer as python_kafka_producer
from kser.confluent.producer_client import ProducerClient
from kser.errors import DeliveryError, MessageTooLarge
from kser.schemas import Message

REASON = "Cluster authorization failed"

#: Sends a message and returns the error text, which is empty after a success.
Send = Callable[[Any], str]


def _produce(producer: Any) -> str:
    try:
        producer.produce("dice", b"x", timeout=5)
    except DeliveryError as error:
        return str(error.message)
    return ""


def _send_nowait(producer: Any) -> str:
    results: list[Any] = []
    producer.send_nowait("dice", Message(uuid="u", entrypoint="e"), results.append, timeout=5)
    return results[0].stderr or ""


SENDS: dict[str, Send] = {
    "produce": _produce,
    "send": lambda producer: producer.send("dice", Message(uuid="u", entrypoint="e"), timeout=5).stderr or "",
    "send_nowait": _send_nowait,
    "bulk_send": lambda producer: (
        producer.bulk_send("dice", [Message(uuid="u", entrypoint="e")], timeout=5).stderr or ""
    ),
}


class LibrdkafkaClient:
    """A client of librdkafka, which is fatal from its first message on if the user is denied."""

    def __init__(self, denied: bool) -> None:
        self.denied = denied
        self._is_fatal = False
        self._error: Any = None
        self._queue: list[Any] = []

    def list_topics(self, topic: str, timeout: float) -> Any:
        return SimpleNamespace(topics={topic: SimpleNamespace(error=None)})

    def produce(self, topic: str, value: bytes, on_delivery: Any, **options: Any) -> None:
        if self._is_fatal:
            raise KafkaException(KafkaError(KafkaError._FATAL))
        self._queue.append(on_delivery)
        if self.denied:
            self._is_fatal = True
            self._error = KafkaError(KafkaError.CLUSTER_AUTHORIZATION_FAILED, REASON, True)

    def poll(self, seconds: float) -> None:
        """Report the fatal error once, and messages only if they are delivered or purged."""
        if self._error is not None:
            error, self._error = self._error, None
            raise KafkaException(error)
        if not self._is_fatal:
            self._report(None)

    def purge(self) -> None:
        self._report(KafkaError(KafkaError._PURGE_QUEUE))

    def flush(self, seconds: float) -> int:
        return len(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def _report(self, error: Any) -> None:
        queue, self._queue = self._queue, []
        for on_delivery in queue:
            on_delivery(error, SimpleNamespace(offset=lambda: 0))


class KafkaPythonClient:
    """A client of kafka-python, which is fatal from its first message on if the user is denied."""

    def __init__(self, denied: bool) -> None:
        self._denied = denied
        self._is_fatal = False
        self.config: dict[str, Any] = {"value_serializer": None}
        self._transaction_manager = SimpleNamespace(has_fatal_error=lambda: self._is_fatal)
        self._metadata = SimpleNamespace(_last_successful_refresh_ms=0)
        self.closed = False

    def send(self, topic: str, value: bytes, **options: Any) -> Any:
        self._is_fatal = self._denied
        return Delivery(self._denied)

    def flush(self, timeout: float) -> None:
        """Deliver nothing, because every message is delivered at once."""

    def close(self, timeout: float) -> None:
        self.closed = True


class Delivery:
    """A future of kafka-python that has ended."""

    exception = None

    def __init__(self, denied: bool) -> None:
        self._error = python_kafka_producer.KafkaError(REASON) if denied else None

    def get(self, timeout: float) -> None:
        if self._error:
            raise self._error

    def add_callback(self, function: Callable[[Any], Any]) -> None:
        if not self._error:
            function(None)

    def add_errback(self, function: Callable[[Any], Any]) -> None:
        if self._error:
            function(self._error)


@pytest.fixture(params=["confluent", "python_kafka"])
def clients(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The producer, its clients in the order of their creation, and whether the brokers deny further clients."""
    state = SimpleNamespace(denied=True, made=[])
    module: Any = {"confluent": confluent_producer, "python_kafka": python_kafka_producer}[request.param]
    cls: Any = {"confluent": LibrdkafkaClient, "python_kafka": KafkaPythonClient}[request.param]

    def connect(*_: Any, **__: Any) -> Any:
        state.made.append(cls(state.denied))
        return state.made[-1]

    monkeypatch.setattr(module, "connect", connect)
    if request.param == "python_kafka":
        monkeypatch.setattr(module, "keep_usable", lambda client: None)
        monkeypatch.setattr(module, "NullableValues", lambda serializer: serializer)
    state.producer = module.Producer({})
    yield state
    state.producer.close()


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
def test_send_after_a_fatal_error_uses_a_new_client(clients: Any, send: Send) -> None:
    """The permission was granted meanwhile."""
    assert REASON in send(clients.producer)
    clients.denied = False
    assert [send(clients.producer), send(clients.producer)] == ["", ""]
    assert len(clients.made) == 2


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
def test_fatal_client_is_replaced_at_most_once_a_second(
    clients: Any, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "REPLACE_INTERVAL", 3600)
    assert all(REASON in send(clients.producer) for _ in range(5))
    assert len(clients.made) == 2
    clients.producer._kser_replaced_at = time.monotonic() - 3600
    clients.denied = False
    assert send(clients.producer) == ""


def test_closed_producer_connects_no_new_client_after_a_fatal_error(clients: Any) -> None:
    _produce(clients.producer)
    clients.producer.close()
    assert _produce(clients.producer)
    assert len(clients.made) == 1


def test_fatal_error_ends_neither_the_thread_that_polls_nor_the_wait_of_other_senders() -> None:
    client = LibrdkafkaClient(denied=True)
    producer_client = ProducerClient(client)
    reports: list[Any] = []
    client.produce("dice", b"x", lambda error, _record: reports.append(error.code()))
    producer_client.poller.poll_if_idle()
    assert reports == [KafkaError._PURGE_QUEUE]
    assert producer_client.fatal.reason == REASON
    producer_client.poller.close()


@pytest.mark.parametrize(
    ("limit", "setting"),
    [(8_388_608, "max.message.bytes"), (20_000, "max.message.bytes"), (10_050, "max_request_size")],
)
def test_refusal_of_a_broker_that_comes_at_once_names_the_limit_of_the_broker(
    limit: int, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = KafkaPythonClient(denied=False)
    delivery: Any = SimpleNamespace(exception=python_kafka_producer.MessageSizeTooLargeError())
    monkeypatch.setattr(client, "send", lambda *_, **__: delivery)
    monkeypatch.setattr(python_kafka_producer, "connect", lambda *_: client)
    monkeypatch.setattr(python_kafka_producer, "NullableValues", lambda serializer: serializer)
    producer = python_kafka_producer.Producer({"max_request_size": limit})
    with pytest.raises(MessageTooLarge) as caught:
        producer.produce("dice", b"x" * 10_000, timeout=5)
    assert setting in caught.value.message.split(" accepts")[-1].split(" allows")[0]
    producer.close()


def test_error_of_a_poll_that_is_not_fatal_is_raised() -> None:
    client = LibrdkafkaClient(denied=False)
    client._error = KafkaError(KafkaError._INVALID_ARG)
    producer_client = ProducerClient(client)
    with pytest.raises(KafkaException):
        producer_client.poller.poll()
    producer_client.poller.close()
