"""Consumer on confluent-kafka. It has the same interface as the consumer of ``kser.confluent`` in kser 0.8.27."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Unpack

from kser.config import Settings
from kser.confluent.client import ConfluentClient
from kser.confluent.options import (
    NEXT_PROTOCOL_SESSION_MS,
    options_for,
    own_options,
    producer_options,
    with_group_defaults,
)
from kser.confluent.producer import Producer
from kser.consumer.base import BaseConsumer
from kser.consumer.client import ConsumerClient
from kser.consumer.green_threads import check_threads
from kser.consumer.options import BEFORE, NEVER, ConsumerKwargs, ConsumerOptions, reset_policy
from kser.controller import BaseProducer
from kser.errors import SettingError
from kser.escaping import escape_lines
from kser.producer import CONSUMER_SIZE_LIMIT

logger = escape_lines(logging.getLogger(__name__))


class Consumer(BaseConsumer):
    """A consumer that polls ``confluent_kafka.Consumer`` and passes messages to :attr:`REGISTRY`.

    The consumer disables the automatic commits of librdkafka and commits the offsets itself. If ``enable.auto.commit``
    is True (the default), the consumer commits every ``auto.commit.interval.ms`` milliseconds. If
    ``enable.auto.commit`` is False, the consumer commits as soon as a message is finished. With ``commit="after"``, a
    group without committed offsets starts at the earliest record, unless ``auto.offset.reset`` is set to another value
    (D17 in docs/differences.rst).

    :param config: options of librdkafka; None means the consumer options in ``KSER_CONFIG``. ``group.id`` is required.
    :param topics: the topics to consume; None means the topics in ``KSER_TOPICS``.
    :param app: a Flask application; its ``config`` has precedence over the environment.
    :param clock: returns the time in seconds. Tests may pass a clock that they advance themselves.
    :param options: see :class:`kser.consumer.options.ConsumerOptions`.
    :raises kser.errors.SettingError: a setting is missing or invalid, or gevent has replaced threads or sockets.
    """

    GROUP_OPTION: ClassVar[str] = "group.id"
    RESET_OPTION: ClassVar[str] = "auto.offset.reset"
    LOGGER: ClassVar[logging.Logger] = logger

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        topics: Iterable[str] | None = None,
        *,
        app: Any = None,
        clock: Callable[[], float] = time.monotonic,
        **options: Unpack[ConsumerKwargs],
    ) -> None:
        check_threads("kser.confluent", ("gevent", "eventlet"))
        settings = Settings.of(app)
        self._kser_app = app
        topics = settings.consumed_topics(topics)
        consumer_options = ConsumerOptions.from_settings(settings, options)
        shared = options_for("producer", config, settings)
        self._kser_producer_options = {
            "message.max.bytes": CONSUMER_SIZE_LIMIT,
            **own_options("producer", shared),
            **producer_options(consumer_options.producer_config),
        }
        self._kser_client_options = with_group_defaults(options_for("consumer", config, settings))
        group = self._kser_client_options.get("group.id")
        if not group:
            raise SettingError("the consumer of kser.confluent needs 'group.id': librdkafka requires a group")
        super().__init__(
            topics,
            consumer_options,
            group=group,
            interval=self._kser_commit_interval(),
            poll_limit=float(self._kser_client_options.get("max.poll.interval.ms", 300_000)) / 1000,
            session=float(self._kser_client_options.get("session.timeout.ms", NEXT_PROTOCOL_SESSION_MS)) / 1000,
            clock=clock,
        )

    def make_producer(self) -> BaseProducer:
        # The producer needs the app for the limits of messages.
        return Producer(self._kser_producer_options, app=self._kser_app)

    def _kser_connect(self) -> ConsumerClient:
        default = "latest" if self.options.commit == BEFORE else "earliest"
        reset = reset_policy(self.RESET_OPTION, self._kser_client_options.get(self.RESET_OPTION), default)
        client = ConfluentClient(
            self._kser_client_options, reset, self.options.max_buffered_bytes, commits=self.options.commit != NEVER
        )
        #: The current client of librdkafka.
        self.client = client.client
        return client

    def _kser_commit_interval(self) -> float:
        """Return the number of seconds between two commits; 0 means a commit after each message."""
        if str(self._kser_client_options.get("enable.auto.commit", True)).lower() in ("false", "0"):
            return 0
        return float(self._kser_client_options.get("auto.commit.interval.ms", 5000)) / 1000
