"""Consumer of the in-memory transport. In place of ``kser.dummy`` of 0.8.27, which neither sent nor received."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from kser import lockfiles
from kser.config import Settings
from kser.consumer.base import BaseConsumer, check_commit_mode
from kser.controller import BaseProducer
from kser.dummy.bus import Bus, DummyClient
from kser.dummy.producer import Producer

logger = logging.getLogger(__name__)


class Consumer(BaseConsumer):
    """Takes messages from the bus that ``config["bootstrap_servers"]`` names; tests drive it step by step.

    :param config: ``bootstrap_servers``, ``group_id`` (``"dummy"`` when missing), ``enable_auto_commit`` and
        ``auto_commit_interval_ms`` are looked at, the rest is not; ``KSER_CONFIG`` when None.
    :param topics: what to consume; ``KSER_TOPICS`` when None.
    :param commit: ``"after"`` a message is done, or ``"before"`` it is handled.
    :param app: a Flask application whose ``config`` is looked at before the environment.
    :raises kser.errors.SettingError: there is no topic to consume.
    """

    LOGGER: ClassVar[logging.Logger] = logger

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        topics: Iterable[str] | None = None,
        *,
        commit: str = "after",
        app: Any = None,
    ) -> None:
        check_commit_mode(commit)
        settings = Settings.of(app)
        self.config = dict((settings.client if config is None else config) or {})
        self.client = Bus.at(str(self.config.get("bootstrap_servers", "")))
        at_once = not self.config.get("enable_auto_commit", True)
        super().__init__(
            DummyClient(self.client, self.config.get("group_id", "dummy")),
            settings.consumed_topics(topics),
            commit=commit,
            commit_interval=0 if at_once else self.config.get("auto_commit_interval_ms", 5000) / 1000,
        )

    def run_until_idle(self) -> int:
        """Handle messages, also those that tasks send meanwhile, until there are none, then commit.

        :return: how many messages were handled.
        """
        handled = 0
        while count := self.step(timeout=0):
            handled += count
        self._commit()
        return handled

    @staticmethod
    def clean_lock() -> None:
        """Remove the pause file: a consumer that starts is not paused."""
        path = lockfiles.remove_pause_file()
        if path:
            logger.debug(f"Cleaning existing pause file {path}")

    def make_producer(self) -> BaseProducer:
        return Producer(self.config)
