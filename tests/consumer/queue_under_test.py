"""Shared harness of the work queue tests."""

from __future__ import annotations

from typing import Any

from kser.consumer.client import Commit, Partition
from kser.consumer.partition_table import PartitionTable
from kser.consumer.work_item import WorkItem
from kser.consumer.work_queue import WorkQueue
from kser.dummy.broker import DummyRecord
from tests.consumer.harness import DICE
from tests.support import Clock

OTHER = Partition("dice", 1)


def record(offset: int, key: bytes | None = None, value: bytes = b"", partition: int = 0) -> DummyRecord:
    return DummyRecord("dice", partition, offset, key, value)


class QueueUnderTest(WorkQueue):
    """A work queue with the partition dice[0], whose time passes when a test says so."""

    def __init__(self, *, revoke_timeout: float = 10, **options: Any) -> None:
        self.time = Clock()
        super().__init__(**options, clock=self.time)
        self.partitions = PartitionTable(self, revoke_timeout)
        self.partitions.on_assign({DICE: Commit(0)})

    def enter(self, *records: DummyRecord) -> None:
        for each in records:
            self.partitions.put({Partition(each.topic, each.partition): [each]})

    def enter_keys(self, keys: str) -> None:
        """A record for each letter; those of ``-`` have no key."""
        self.partitions.put({DICE: [record(n, None if key == "-" else key.encode()) for n, key in enumerate(keys)]})

    def next(self) -> WorkItem:
        item = self.get(0)
        assert item is not None, "there is nothing to take"
        return item

    def all(self) -> list[WorkItem]:
        """What may run now at the same time."""
        items = []
        while (item := self.get(0)) is not None:
            items.append(item)
        return items

    def come_back(self, commit: Commit | None = None) -> None:
        """The partition is given up, with everything committed that may be, and assigned again."""
        commits = self.partitions.on_revoke([DICE]).commits()
        self.partitions.on_assign({DICE: commit or commits.get(DICE, Commit(0))})


def offsets(items: list[WorkItem]) -> list[int]:
    return [item.record.offset for item in items]
