"""The broker of the in-memory transport: topics as lists, and where each group is in them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from kser.consumer.client import ConsumerClient, OnRevoke, Partition, Record


class DummyRecord(NamedTuple):
    """One record of a topic; topics have one partition."""

    topic: str
    partition: int
    offset: int
    value: bytes


class Bus:
    """What is between producers and consumers that name the same ``bootstrap_servers``."""

    _all: dict[str, Bus] = {}  # noqa: RUF012  the buses of this process

    def __init__(self) -> None:
        self.topics: dict[str, list[bytes]] = defaultdict(list)
        self.committed: dict[tuple[str | None, str], int] = {}
        self.arrived = threading.Condition()

    @classmethod
    def at(cls, address: str) -> Bus:
        """The bus with that address, made when first asked for."""
        return cls._all.setdefault(address, cls())

    @classmethod
    def reset(cls) -> None:
        """Forget all buses, between two tests."""
        cls._all.clear()

    def send(self, topic: str, value: bytes) -> None:
        """Put a record behind the others of its topic."""
        with self.arrived:
            self.topics[topic].append(value)
            self.arrived.notify_all()


class DummyClient(ConsumerClient):
    """The one member of its group: it gets all partitions, from the first record that the group has not committed."""

    def __init__(self, bus: Bus, group: str | None) -> None:
        self._bus = bus
        self._group = group
        self._positions: dict[str, int] = {}
        self.can_commit = group is not None

    def subscribe(self, topics: Iterable[str], on_revoke: OnRevoke) -> None:
        self._positions = {topic: self._bus.committed.get((self._group, topic), 0) for topic in topics}

    def poll(self, timeout: float, hold: bool) -> Sequence[Record]:
        with self._bus.arrived:
            self._bus.arrived.wait_for(lambda: not hold and self._is_behind(), timeout)
            return [] if hold else [record for topic in self._positions for record in self._take(topic)]

    def commit(self, offsets: Mapping[Partition, int], timeout: float) -> None:
        self._bus.committed.update({(self._group, key.topic): offset for key, offset in offsets.items()})

    def rewind(self, offsets: Mapping[Partition, int]) -> Collection[Partition]:
        self._positions.update({key.topic: offset for key, offset in offsets.items()})
        return offsets.keys()

    def close(self, timeout: float) -> None:
        self._positions = {}

    def _is_behind(self) -> bool:
        return any(len(self._bus.topics[topic]) > position for topic, position in self._positions.items())

    def _take(self, topic: str) -> list[DummyRecord]:
        position = self._positions[topic]
        values = self._bus.topics[topic][position:]
        self._positions[topic] = position + len(values)
        return [DummyRecord(topic, 0, offset, value) for offset, value in enumerate(values, start=position)]
