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
    """Return a record of the topic ``dice``."""
    return DummyRecord("dice", partition, offset, key, value)


class QueueUnderTest(WorkQueue):
    """A work queue with the assigned partition dice[0] and a clock that only the test advances."""

    clock: Clock

    def __init__(self, *, revoke_timeout: float = 10, **options: Any) -> None:
        super().__init__(**options, clock=Clock())
        self.partitions = PartitionTable(self, revoke_timeout)
        self.partitions.on_assign({DICE: Commit(0)})

    def fetch(self, *records: DummyRecord) -> None:
        """Queue records, as after a poll."""
        for fetched in records:
            self.partitions.put({Partition(fetched.topic, fetched.partition): [fetched]})

    def fetch_keys(self, keys: str) -> None:
        """Queue a record of dice[0] for each letter, its key; ``-`` stands for a record without a key."""
        self.partitions.put({DICE: [record(n, None if key == "-" else key.encode()) for n, key in enumerate(keys)]})

    def start_next(self) -> WorkItem:
        """Start the next record."""
        item = self.get(0)
        assert item is not None, "no record is ready"
        return item

    def start_all(self) -> list[WorkItem]:
        """Start every record that may run concurrently now."""
        items = []
        while (item := self.get(0)) is not None:
            items.append(item)
        return items

    def revoke_and_reassign(self) -> None:
        """Revoke dice[0], commit its finished records, and assign it again."""
        commits = self.partitions.on_revoke([DICE]).commits()
        self.partitions.on_assign({DICE: commits.get(DICE, Commit(0))})


def offsets(items: list[WorkItem]) -> list[int]:
    """Return the offsets of records."""
    return [item.record.offset for item in items]
