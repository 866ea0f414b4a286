"""Producer of the in-memory transport. Replaces ``kser.dummy`` of 0.8.27, which sent and received no messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cdumay_result import Result

from kser.config import Settings
from kser.dummy.broker import InMemoryBroker
from kser.limits import limits_of
from kser.producer import Bulk, HeaderList, KafkaProducerBase, KeyFunction, size_of, too_large
from kser.schemas import Message

#: Default of ``max_request_size`` in bytes. It equals the default of kafka-python.
MAX_REQUEST_SIZE = 1_048_576


class Producer(KafkaProducerBase):
    """A producer for the in-memory broker at ``config["bootstrap_servers"]``.

    :param config: the options ``bootstrap_servers`` and ``max_request_size`` (limit of a record in bytes); other
        options are ignored. None means the options in ``KSER_CONFIG``.
    :param app: a Flask application; its ``config`` has precedence over the environment.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, *, app: Any = None) -> None:
        self.config = dict((Settings.of(app).client if config is None else config) or {})
        self._kser_limits = limits_of(app)
        self.client = InMemoryBroker.at(str(self.config.get("bootstrap_servers", "")))

    def _kser_new_bulk(self, topic: str, timeout: float, key: KeyFunction | None) -> Bulk:
        return _Bulk(self, topic, timeout, key)

    def _kser_deadline(self, timeout: float) -> float:
        # A send in memory needs no deadline. The timeout has no effect; it only appears in the text of the Result.
        return math.inf

    def _kser_deliver(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderList, deadline: float
    ) -> None:
        limit = int(self.config.get("max_request_size", MAX_REQUEST_SIZE))
        size = size_of(value, key, headers)
        if size > limit:
            raise too_large(size, limit, "max_request_size")
        self.client.send(topic, value, key=key, headers=headers)

    def _kser_deliver_nowait(
        self, topic: str, value: bytes | None, deadline: float, on_delivered: Callable[[Exception | None], None]
    ) -> None:
        self._kser_deliver(topic, value, None, [], deadline)
        on_delivered(None)

    def _kser_success_result(self, topic: str, kmsg: Message, timeout: float) -> Result:
        text = f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent in {topic} (timeout: {timeout})"
        return Result(uuid=kmsg.uuid, stdout=text)

    def _kser_undelivered_text(self, topic: str, reason: str) -> str:
        return f"the record was not appended to topic {topic!r}: {reason}"


class _Bulk(Bulk):
    """The messages of one ``bulk_send``.

    The Result contains the topic and the timeout, as the Result of a single message does.
    """

    def finish(self) -> Result:
        return self._results.result(f" to {self._topic} (timeout: {self._timeout})")
