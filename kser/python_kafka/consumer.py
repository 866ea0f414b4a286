"""Consumer on kafka-python. A drop-in replacement for ``kser.python_kafka`` of 0.8.27."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Unpack

from kafka import KafkaConsumer, KafkaProducer

from kser.attempt import UNDECODABLE, current_attempt
from kser.config import Settings
from kser.consumer.base import BaseConsumer
from kser.consumer.client import ConsumerClient
from kser.consumer.green_threads import check_threads
from kser.consumer.options import BEFORE, NEVER, ConsumerKwargs, ConsumerOptions, reset_policy
from kser.controller import BaseProducer
from kser.escaping import escape_lines
from kser.producer import CONSUMER_SIZE_LIMIT
from kser.python_kafka.client import KafkaPythonClient
from kser.python_kafka.decompression import batch_limit
from kser.python_kafka.options import (
    METADATA_MAX_AGE_MS,
    connect,
    options_for,
    producer_options,
    with_group_defaults,
    with_short_bootstrap,
)
from kser.python_kafka.producer import Producer

logger = escape_lines(logging.getLogger(__name__))


class Consumer(BaseConsumer):
    """A consumer that polls ``kafka.KafkaConsumer`` and passes messages to :attr:`REGISTRY`.

    The consumer disables the automatic commits of kafka-python and commits the offsets itself. If
    ``enable_auto_commit`` is True (the default), the consumer commits every ``auto_commit_interval_ms`` milliseconds.
    If ``enable_auto_commit`` is False, the consumer commits as soon as a message is finished. With ``commit="after"``,
    a group without committed offsets starts at the earliest record, unless ``auto_offset_reset`` is set to another
    value (decision D17).

    :param config: options of KafkaConsumer; None means the options of KafkaConsumer in ``KSER_CONFIG``.
    :param topics: the topics to consume; None means the topics in ``KSER_TOPICS``.
    :param app: a Flask application; its ``config`` has precedence over the environment.
    :param clock: returns the time in seconds. Tests may pass a clock that they advance themselves.
    :param options: see :class:`kser.consumer.options.ConsumerOptions`.
    :raises kser.errors.BrokerUnavailable: no broker responds.
    :raises kser.errors.SettingError: a setting is missing or invalid, or gevent has replaced threads or sockets.
    """

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
        check_threads("kser.python_kafka", ("gevent",))
        settings = Settings.of(app)
        self._kser_app = app
        topics = settings.consumed_topics(topics)
        consumer_options = ConsumerOptions.from_settings(settings, options)
        self._kser_producer_options = self._kser_options_for_producer(config, settings, consumer_options)
        self._kser_client_options = with_group_defaults(options_for(KafkaConsumer, config, settings))
        at_once = not self._kser_client_options.get("enable_auto_commit", True)
        group = self._kser_client_options.get("group_id")
        self._kser_reset = self._kser_resolve_reset(consumer_options.commit, group)
        self._kser_client_options |= {
            "enable_auto_commit": False,
            "auto_offset_reset": "none" if group else self._kser_reset,
        }
        self._kser_client_options.setdefault("fetch_max_bytes", consumer_options.max_buffered_bytes)
        self._kser_client_options.setdefault("metadata_max_age_ms", METADATA_MAX_AGE_MS)
        # Remove both deserializers from the options of the client. The consumer runs the value deserializer itself for
        # each record, because an exception inside the client would stop the client. The consumer does not need the key
        # deserializer, because it only compares keys, as bytes.
        self._kser_deserialize = self._kser_take_deserializer("value_deserializer")
        self._kser_take_deserializer("key_deserializer")
        super().__init__(
            topics,
            consumer_options,
            group=group,
            interval=0 if at_once else self._kser_option("auto_commit_interval_ms") / 1000,
            poll_limit=self._kser_option("max_poll_interval_ms") / 1000,
            session=self._kser_option("session_timeout_ms") / 1000,
            clock=clock,
        )

    def make_producer(self) -> BaseProducer:
        # The producer needs the app for the limits of messages.
        return Producer(self._kser_producer_options, app=self._kser_app)

    @staticmethod
    def _kser_options_for_producer(
        config: Mapping[str, Any] | None, settings: Settings, options: ConsumerOptions
    ) -> dict[str, Any]:
        shared = options_for(KafkaProducer, config, settings, checked=False)
        if config is not None:
            shared = {key: value for key, value in shared.items() if key in KafkaProducer.DEFAULT_CONFIG}
        return {"max_request_size": CONSUMER_SIZE_LIMIT, **shared, **producer_options(options.producer_config)}

    def _kser_connect(self) -> ConsumerClient:
        #: The current KafkaConsumer.
        self.client = connect(KafkaConsumer, self._kser_connect_options())
        limit, commits = batch_limit(self.options.limits), self.options.commit != NEVER
        return KafkaPythonClient(self.client, self._kser_reset, commits=commits, batch_limit=limit)

    def _kser_connect_options(self) -> dict[str, Any]:
        """Return the options of the next client.

        A client that replaces another one waits only briefly for a broker, because the client thread has a time limit.
        The poller tries again later.
        """
        options = self._kser_client_options
        return options if getattr(self, "client", None) is None else with_short_bootstrap(options, KafkaConsumer)

    def _kser_handle(self, value: Any) -> None:
        if self._kser_deserialize is not None:
            try:
                value = self._kser_deserialize(value)
            except Exception as exc:
                if (attempt := current_attempt.get()) is not None:
                    attempt.reject(UNDECODABLE, exc)
                raise
        super()._kser_handle(value)

    def _kser_take_deserializer(self, name: str) -> Callable[[Any], Any] | None:
        return self._kser_client_options.pop(name) if callable(self._kser_client_options.get(name)) else None

    def _kser_resolve_reset(self, commit: str, group: str | None) -> str:
        # Without a group, no offset is committed, so "earliest" would handle the whole topic again at every start.
        default = "earliest" if group is not None and commit != BEFORE else "latest"
        return reset_policy(self.RESET_OPTION, self._kser_client_options.get(self.RESET_OPTION), default)

    def _kser_option(self, name: str) -> Any:
        return self._kser_client_options.get(name, KafkaConsumer.DEFAULT_CONFIG[name])
