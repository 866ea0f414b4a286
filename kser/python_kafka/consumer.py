"""Consumer on kafka-python. Drop-in for ``kser.python_kafka`` of 0.8.27."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import kafka
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from kser import lockfiles
from kser.config import Settings
from kser.consumer.base import BaseConsumer, check_commit_mode
from kser.consumer.client import ConsumerClient, OnRevoke, Partition, Record
from kser.controller import BaseProducer
from kser.errors import ClientTrouble
from kser.python_kafka.options import connect, options_for, servers
from kser.python_kafka.producer import Producer

logger = logging.getLogger(__name__)

#: Milliseconds that the commit before a rebalance may take: the whole group waits for it.
REVOKE_TIMEOUT_MS = 2000


class Consumer(BaseConsumer):
    """Takes messages from Kafka with ``kafka.KafkaConsumer`` and has :attr:`REGISTRY` handle them.

    The client never commits by itself: ``enable_auto_commit`` (default True) chooses whether offsets are committed
    every ``auto_commit_interval_ms`` or, when False, at every message. With ``commit="after"`` a group that has
    committed nothing starts at the earliest record, unless ``auto_offset_reset`` says otherwise (decision D17).

    :param config: options of KafkaConsumer; what it knows of ``KSER_CONFIG`` when None.
    :param topics: what to consume; ``KSER_TOPICS`` when None.
    :param commit: ``"after"`` a message is done, or ``"before"`` it is handled, as kser 0.8 did.
    :param app: a Flask application whose ``config`` is looked at before the environment.
    :raises kser.errors.BrokerUnavailable: no broker answers.
    :raises kser.errors.SettingError: a setting is missing or cannot be used.
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
        self._producer_options: Mapping[str, Any] | None = config
        self._app = app
        topics = settings.consumed_topics(topics)
        options = options_for(KafkaConsumer, config, settings)
        at_once = not options.get("enable_auto_commit", True)
        options["enable_auto_commit"] = False
        # Without a group nothing is remembered, and every start would handle the whole topic again.
        if commit == "after" and options.get("group_id") is not None:
            options.setdefault("auto_offset_reset", "earliest")
        self.client = connect(KafkaConsumer, options)
        interval = self.client.config["auto_commit_interval_ms"] / 1000
        super().__init__(
            KafkaPythonClient(self.client),
            topics,
            commit=commit,
            commit_interval=0 if at_once else interval,
        )

    @staticmethod
    def clean_lock() -> None:
        """Remove the pause file: a consumer that starts is not paused."""
        path = lockfiles.remove_pause_file()
        if path:
            logger.debug(f"Cleaning existing pause file: {path}")

    def make_producer(self) -> BaseProducer:
        if self._producer_options is None:
            return Producer(app=self._app)
        options = self._producer_options.items()
        return Producer({key: value for key, value in options if key in KafkaProducer.DEFAULT_CONFIG})


class KafkaPythonClient(ConsumerClient):
    """``kafka.KafkaConsumer`` behind the contract of all transports."""

    def __init__(self, client: KafkaConsumer) -> None:
        self._client = client
        self._servers = servers(client.config)
        self.can_commit = client.config["group_id"] is not None

    def subscribe(self, topics: Iterable[str], on_revoke: OnRevoke) -> None:
        self._client.subscribe(topics, listener=_Listener(self._client, on_revoke))

    def poll(self, timeout: float, hold: bool) -> Sequence[Record]:
        try:
            # A rebalance forgets what was paused, so it is said again before each poll.
            if hold:
                self._client.pause(*self._client.assignment())
            elif self._client.paused():
                self._client.resume(*self._client.paused())
            batches = self._client.poll(timeout_ms=int(timeout * 1000))
        except KafkaError as error:
            raise self._trouble("take messages", error) from error
        return list(chain.from_iterable(batches.values()))

    def commit(self, offsets: Mapping[Partition, int], timeout: float) -> None:
        try:
            self._client.commit(_client_offsets(offsets), timeout_ms=int(timeout * 1000))
        except KafkaError as error:
            raise self._trouble("commit offsets", error) from error

    def rewind(self, offsets: Mapping[Partition, int]) -> Collection[Partition]:
        if not _KEEPS_POSITIONS:
            return ()
        ours = {Partition(*key) for key in self._client.assignment()}
        rewound = {key: offset for key, offset in offsets.items() if key in ours}
        for key, offset in rewound.items():
            self._client.seek(TopicPartition(*key), offset)
        return rewound.keys()

    def close(self, timeout: float) -> None:
        try:
            self._client.close(autocommit=False, timeout_ms=int(timeout * 1000))
        except KafkaError as error:
            logger.warning(f"the group at {self._servers} was not left in order: {error}")

    def _trouble(self, what: str, error: KafkaError) -> ClientTrouble:
        return ClientTrouble(f"cannot {what} at {self._servers} (bootstrap_servers): {error}")


def _client_offsets(offsets: Mapping[Partition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {TopicPartition(*key): OffsetAndMetadata(offset, "", -1) for key, offset in offsets.items()}


#: kafka-python 3 fetches on from where it was in a partition that a rebalance gives back to us; kafka-python 2 asks the
#: group where to begin.
_KEEPS_POSITIONS = hasattr(kafka, "AsyncConsumerRebalanceListener")

if _KEEPS_POSITIONS:

    class _Listener(kafka.AsyncConsumerRebalanceListener):  # type: ignore[misc]
        """kafka-python 3 calls listeners in its own thread, where nothing may block."""

        def __init__(self, client: KafkaConsumer, on_revoke: OnRevoke) -> None:
            self._client = client
            self._on_revoke = on_revoke

        async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
            offsets = self._on_revoke({Partition(*key) for key in revoked}, lost=False)
            if offsets:
                commit = self._client.commit_async(_client_offsets(offsets))
                try:
                    await self._client._manager.wait_for(commit, REVOKE_TIMEOUT_MS)
                except KafkaError as error:
                    _report_uncommitted(offsets, error)

        async def on_partitions_lost(self, lost: Collection[TopicPartition]) -> None:
            self._on_revoke({Partition(*key) for key in lost}, lost=True)

        async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
            """Nothing to do: partitions begin where the group says."""

else:

    class _Listener(kafka.ConsumerRebalanceListener):  # type: ignore[misc,no-redef]
        """kafka-python 2 calls listeners in the thread that polls."""

        def __init__(self, client: KafkaConsumer, on_revoke: OnRevoke) -> None:
            self._client = client
            self._on_revoke = on_revoke

        def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
            offsets = self._on_revoke({Partition(*key) for key in revoked}, lost=False)
            if offsets:
                try:
                    self._client.commit(_client_offsets(offsets), timeout_ms=REVOKE_TIMEOUT_MS)
                except KafkaError as error:
                    _report_uncommitted(offsets, error)

        def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
            """Nothing to do: partitions begin where the group says."""


def _report_uncommitted(offsets: Mapping[Partition, int], error: KafkaError) -> None:
    places = ", ".join(f"{key.topic}[{key.partition}] at {offset}" for key, offset in offsets.items())
    logger.warning(f"partitions were given up before {places} could be committed ({error}): messages come again")
