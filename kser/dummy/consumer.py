"""Consumer of the in-memory transport. Replaces ``kser.dummy`` of 0.8.27, which sent and received no messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Unpack

from kser import lockfiles
from kser.config import Settings
from kser.consumer.base import BaseConsumer
from kser.consumer.client import ConsumerClient
from kser.consumer.options import BEFORE, NEVER, SESSION_TIMEOUT_MS, ConsumerKwargs, ConsumerOptions, reset_policy
from kser.controller import BaseProducer
from kser.dummy.broker import DummyClient, InMemoryBroker
from kser.dummy.producer import Producer
from kser.escaping import escape_lines

logger = escape_lines(logging.getLogger(__name__))


class Consumer(BaseConsumer):
    """A consumer of the in-memory broker at ``config["bootstrap_servers"]``. Tests run it step by step.

    :param config: the options ``bootstrap_servers``, ``group_id`` (``"dummy"`` when missing), ``auto_offset_reset``,
        ``enable_auto_commit``, ``auto_commit_interval_ms``, ``max_poll_interval_ms`` and ``session_timeout_ms``; other
        options are ignored. None means the options in ``KSER_CONFIG``.
    :param topics: the topics to consume; None means the topics in ``KSER_TOPICS``.
    :param app: a Flask application; its ``config`` has precedence over the environment.
    :param clock: returns the time in seconds. Tests may pass a clock that they advance themselves.
    :param options: see :class:`kser.consumer.options.ConsumerOptions`.
    :raises kser.errors.SettingError: a setting is missing or invalid.
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
        settings = Settings.of(app)
        self._kser_app = app
        self.config = dict((settings.client if config is None else config) or {})
        self.client = InMemoryBroker.at(str(self.config.get("bootstrap_servers", "")))
        at_once = not self.config.get("enable_auto_commit", True)
        super().__init__(
            settings.consumed_topics(topics),
            ConsumerOptions.from_settings(settings, options),
            group=self.config.get("group_id", "dummy"),
            interval=0 if at_once else self.config.get("auto_commit_interval_ms", 5000) / 1000,
            poll_limit=self.config.get("max_poll_interval_ms", 300_000) / 1000,
            session=self.config.get("session_timeout_ms", SESSION_TIMEOUT_MS) / 1000,
            clock=clock,
        )

    def run_until_idle(self) -> int:
        """Handle messages until no message is left, and then commit.

        Messages that tasks send meanwhile are handled too.

        :return: the number of handled messages.
        """
        handled = 0
        while count := self.step(timeout=0):
            handled += count
        self._kser_poller.commit()
        return handled

    @classmethod
    def clean_lock(cls) -> None:
        """Remove the pause file, because a consumer starts unpaused."""
        if path := lockfiles.remove_pause_file():
            logger.debug(f"Cleaning existing pause file {path}")

    def make_producer(self) -> BaseProducer:
        return Producer({**self.config, **(self.options.producer_config or {})}, app=self._kser_app)

    def _kser_connect(self) -> ConsumerClient:
        default = "latest" if self.options.commit == BEFORE else "earliest"
        reset = reset_policy(self.RESET_OPTION, self.config.get(self.RESET_OPTION), default)
        return DummyClient(self.client, self._kser_group, reset, commits=self.options.commit != NEVER)
