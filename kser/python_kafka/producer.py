"""Producer on kafka-python. Drop-in for ``kser.python_kafka`` of 0.8.27."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from cdumay_result import Result
from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from kser import signals
from kser.config import CONFIG, Settings
from kser.outgoing import (
    HeaderList,
    KeyOf,
    OutgoingProducer,
    Tally,
    key_bytes,
    refused_as_too_large,
    remaining,
    size_of,
    too_large,
)
from kser.python_kafka.options import connect, options_for, servers
from kser.results import merge
from kser.schemas import Message

logger = logging.getLogger(__name__)

#: Milliseconds that the client may wait for the metadata of a topic, unless it is configured.
MAX_BLOCK_MS = 5000
#: Seconds that closing waits for messages that are still on their way.
CLOSE_TIMEOUT = 0.5
#: Messages of a bulk that are encoded before they are handed to the client together, and seconds that this may take.
CHUNK = 500
CHUNK_SECONDS = 0.05


class Producer(OutgoingProducer):
    """Sends messages with ``kafka.KafkaProducer``, and checks that each one was delivered. Safe to share by threads.

    Unless it is configured, ``acks`` is ``"all"``. kafka-python 3 is idempotent unless other options forbid it;
    kafka-python 2 is when ``enable_idempotence`` says so (it then cannot end its thread while no broker answers, which
    is why it is not the default there).

    The client has one setting for how long it waits for metadata: while one thread sends with less time than that,
    another one may wait too short for a topic that is new to the client. Its result then says so.

    :param config: options of KafkaProducer; what it knows of ``KSER_CONFIG`` when None.
    :param app: a Flask application whose ``config`` is looked at before the environment.
    :raises kser.errors.BrokerUnavailable: no broker answers.
    :raises kser.errors.SettingError: ``KSER_CONFIG`` cannot be used.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, *, app: Any = None) -> None:
        options = options_for(KafkaProducer, config, Settings.of(app))
        options.setdefault("acks", "all")
        self._max_block_ms = options.setdefault("max_block_ms", MAX_BLOCK_MS)
        self._servers = servers(options)
        self._hurrying = threading.Lock()
        self._limit = options.get("max_request_size", KafkaProducer.DEFAULT_CONFIG["max_request_size"])
        self.client = connect(KafkaProducer, options)

    def bulk_send(
        self, topic: str, kmsgs: Iterable[Message], timeout: float = 60, *, key: KeyOf | None = None
    ) -> Result:
        """Send many messages, then wait until all are delivered.

        :param topic: where to.
        :param kmsgs: the messages; any iterable, consumed once.
        :param timeout: seconds for everything together.
        :param key: called with each message for its key; without, no message has one.
        :return: a Result that says how many were sent. If some were not, it is failed, and ``retval["failed"]`` has the
            reason by uuid; those whose time ran out may still arrive.
        """
        bulk = _Bulk(self, topic, timeout, key)
        try:
            bulk.send(kmsgs)
        except Exception as exc:
            return merge(bulk.finish(), Result.from_exception(exc))
        return bulk.finish()

    def close(self) -> None:
        try:
            self.client.close(timeout=CLOSE_TIMEOUT)
        except KafkaError as error:
            logger.warning(
                f"{type(self).__name__}: closed with messages still on their way to {self._servers}: {error}"
            )
            # The client has given up before it ended its thread, which would live and try for ever.
            self.client._sender.force_close()
            with suppress(KafkaError):
                self.client.close(timeout=CLOSE_TIMEOUT)

    def _deliver(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderList, deadline: float
    ) -> None:
        if value is None and key is None:
            # The client cannot write a record that has neither.
            value = b""
        delivery = self._enqueue(topic, value, _options(key, headers), deadline)
        try:
            self._confirm(delivery, deadline)
        except MessageSizeTooLargeError as error:
            raise self._undelivered(error, topic, size_of(value, key, headers)) from error

    def _begin(
        self, topic: str, value: bytes | None, deadline: float, told: Callable[[Exception | None], None]
    ) -> None:
        delivery = self._enqueue(topic, value, {}, deadline)
        delivery.add_callback(lambda _record: told(None))
        delivery.add_errback(lambda error: told(self._undelivered(error, topic, len(value or b""))))

    def _delivered(self, topic: str, kmsg: Message, timeout: float) -> Result:
        return Result(uuid=kmsg.uuid, stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent in {topic}")

    def _enqueue(self, topic: str, value: bytes | None, options: Mapping[str, Any], deadline: float) -> Any:
        """Hand a record to the client, which may wait for metadata first; returns the future of its delivery."""
        size = size_of(value, options.get("key"), options.get("headers", []))
        if size > self._limit:
            raise too_large(size, self._limit, "max_request_size")
        last_answer = self._last_answer()
        try:
            if remaining(deadline) * 1000 >= self._max_block_ms:
                delivery = self.client.send(topic, value, **options)
            else:
                delivery = self._send_in_time(topic, value, options, deadline)
            # The client knows what the protocol adds. Version 3 raises this, version 2 has it in what it returns.
            if isinstance(getattr(delivery, "exception", None), MessageSizeTooLargeError):
                raise delivery.exception
        except MessageSizeTooLargeError as error:
            raise too_large(size, self._limit, "max_request_size") from error
        except KafkaTimeoutError as error:
            raise KafkaTimeoutError(f"{_text(error)} {self._explain(topic, last_answer)}") from error
        return delivery

    def _confirm(self, delivery: Any, deadline: float) -> None:
        """Wait until a message is delivered."""
        try:
            delivery.get(timeout=remaining(deadline))
        except KafkaTimeoutError as error:
            unconfirmed = f"{self._servers} did not confirm the message, which may still arrive"
            raise KafkaTimeoutError(f"{_text(error).rstrip('.')}: {unconfirmed}") from error

    def _undelivered(self, error: Exception, topic: str, size: int) -> Exception:
        """What to say about a delivery that failed."""
        return (
            refused_as_too_large(size, topic, self._servers) if isinstance(error, MessageSizeTooLargeError) else error
        )

    def _send_in_time(self, topic: str, value: bytes | None, options: Mapping[str, Any], deadline: float) -> Any:
        """Send when there is less time than the client may wait: it has one setting for that, so one thread at a time.

        Another thread that has more time may meanwhile wait too short, and is then told so by its result.
        """
        if not self._hurrying.acquire(timeout=remaining(deadline)):
            raise KafkaTimeoutError(f"Another thread still waits for metadata from {self._servers}.")
        try:
            self.client.config["max_block_ms"] = remaining(deadline) * 1000
            return self.client.send(topic, value, **options)
        except TypeError as error:
            if remaining(deadline):
                raise
            # kafka-python 2.3 stumbles over the text of its own timeout.
            raise KafkaTimeoutError("No time was left to wait for metadata.") from error
        finally:
            self.client.config["max_block_ms"] = self._max_block_ms
            self._hurrying.release()

    def _last_answer(self) -> float:
        """When a broker last told what topics there are, by the client's own clock."""
        return float(self.client._metadata._last_successful_refresh_ms)

    def _explain(self, topic: str, last_answer: float) -> str:
        # The one thing that tells a broker that does not answer from one that does not know the topic.
        if self._last_answer() != last_answer:
            return f"The brokers at {self._servers} answer, but know no topic {topic!r}: create it, or correct its name"
        return f"No broker answers at {self._servers}: start one there, or correct 'bootstrap_servers' in {CONFIG}"


class _Bulk:
    """Messages on their way together.

    They are encoded, handed to the client and looked at in chunks: handed over one by one, each of them would find the
    client's own thread awake, and most of them would travel alone.
    """

    def __init__(self, producer: Producer, topic: str, timeout: float, key: KeyOf | None) -> None:
        self._producer = producer
        self._topic = topic
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._key = key
        self._tally = Tally()
        #: Until when to wait for metadata and for room in the client's buffer.
        self._patience = self._deadline
        self._in_vain: KafkaTimeoutError | None = None
        self._chunk: list[tuple[Message, bytes, dict[str, Any]]] = []
        self._unchecked: list[tuple[Message, int, Any]] = []

    def send(self, kmsgs: Iterable[Message]) -> None:
        """Take messages; each is sent with the next ones, but not held back for long."""
        began = time.monotonic()
        for kmsg in kmsgs:
            self._tally.take()
            try:
                options = {} if self._key is None else _options(key_bytes(self._key(kmsg)), [])
                self._chunk.append((kmsg, self._producer._encode(kmsg), options))
            except Exception as exc:
                self._tally.fail(kmsg, exc)
            if len(self._chunk) >= CHUNK or time.monotonic() - began > CHUNK_SECONDS:
                self._send_chunk()
                began = time.monotonic()

    def finish(self) -> Result:
        """Wait until all are delivered, and say what came of them."""
        self._send_chunk()
        # What does not make it in time is found when each delivery is looked at.
        with suppress(KafkaTimeoutError):
            self._producer.client.flush(timeout=remaining(self._deadline))
        self._check(self._unchecked)
        return self._tally.result()

    def _send_chunk(self) -> None:
        # The chunks before this one are through by now, or nearly so: their futures need not be kept.
        checkable, self._unchecked = self._unchecked, []
        for kmsg, data, options in self._chunk:
            try:
                delivery = self._producer._enqueue(self._topic, data, options, self._patience)
                self._unchecked.append((kmsg, len(data), delivery))
            except KafkaTimeoutError as exc:
                # What one waited for in vain, the others need not wait for again; and it alone knows the reason.
                self._patience = time.monotonic()
                self._in_vain = self._in_vain or exc
                self._tally.fail(kmsg, self._in_vain)
            except Exception as exc:
                self._tally.fail(kmsg, exc)
        self._chunk = []
        self._check(checkable)

    def _check(self, deliveries: Iterable[tuple[Message, int, Any]]) -> None:
        announced = bool(signals.message_sent.receivers)
        for kmsg, size, delivery in deliveries:
            try:
                self._producer._confirm(delivery, self._deadline)
            except Exception as exc:
                self._tally.fail(kmsg, self._producer._undelivered(exc, self._topic, size))
            else:
                if announced:
                    self._producer._announce(self._topic, kmsg, self._timeout)


def _options(key: bytes | None, headers: HeaderList) -> dict[str, Any]:
    """What the client is given beside the value: only what there is."""
    options: dict[str, Any] = {}
    if key is not None:
        options["key"] = key
    if headers:
        # The client refuses headers without a value.
        options["headers"] = [(name, value or b"") for name, value in headers]
    return options


def _text(error: KafkaTimeoutError) -> str:
    """What the client says, without the name that the error to be raised says again."""
    return str(error.args[0] if error.args else error)
