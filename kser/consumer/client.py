"""The contract that a transport fulfils, so that one consumer loop serves them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    partition: int


class Record(Protocol):
    """What a transport hands out; the records of Kafka clients are such as they are."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def value(self) -> bytes | None: ...


class OnRevoke(Protocol):
    """Called while partitions are taken away, maybe in a thread of the client."""

    def __call__(self, partitions: Collection[Partition], *, lost: bool) -> Mapping[Partition, int]:
        """Take note, and return the offsets to commit before.

        :param lost: they are somebody else's already, so nothing can be committed.
        """
        ...


class ConsumerClient(ABC):
    """A member of a consumer group. Used by one thread.

    What the client cannot do now is raised as :class:`kser.errors.ClientTrouble`; it will be tried again.
    """

    #: Whether offsets can be committed at all: whether there is a group.
    can_commit: bool

    @abstractmethod
    def subscribe(self, topics: Iterable[str], on_revoke: OnRevoke) -> None:
        """Take part in the consumption of ``topics``.

        :param on_revoke: called before partitions are given up; what it returns is committed while they still are
            ours, and is not when they are lost already.
        """

    @abstractmethod
    def poll(self, timeout: float, hold: bool) -> Sequence[Record]:
        """Take part in the group, and hand out records that were not handed out yet, in order within a partition.

        They are of partitions that are ours when it returns.

        :param timeout: seconds to wait when there are no records to hand out.
        :param hold: hand out none. Records of partitions that are assigned in this very call may come all the same.
        """

    @abstractmethod
    def commit(self, offsets: Mapping[Partition, int], timeout: float) -> None:
        """Record where each partition is to be resumed; returns when the group knows it, within ``timeout`` seconds."""

    @abstractmethod
    def rewind(self, offsets: Mapping[Partition, int]) -> Collection[Partition]:
        """Hand out again what was handed out from these offsets on: a rebalance came before it was handled.

        :return: the partitions that are rewound: those that are still ours, and which the client does not itself bring
            back to where the group is. Records of them that :meth:`poll` has just handed out will come again.
        """

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Leave the group without committing, and let go of all resources, within about ``timeout`` seconds."""
