"""The contract that a transport fulfils, so that one consumer serves them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from kser.errors import ClientTrouble


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


class Record(Protocol):
    """What a transport hands out; the records of Kafka clients are such, or are wrapped to be."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def timestamp(self) -> int:
        """Milliseconds since 1970."""
        ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


class Commit(NamedTuple):
    """Where a group is in a partition: what Kafka remembers of it.

    :param offset: everything below it is finished.
    :param metadata: what is finished above it, see :mod:`kser.consumer.offsets`.
    """

    offset: int
    metadata: str = ""


class Revocation(Protocol):
    """Partitions on their way out: what runs is waited for, then everything that is finished is committed."""

    @property
    def drained(self) -> bool:
        """Whether nothing of them runs any more, or no more time is left for it."""
        ...

    def wait(self) -> None:
        """Return once they are drained."""

    @property
    def commits(self) -> Callable[[], Mapping[Partition, Commit]]:
        """What gives what to commit: what is finished by now, which is most once they are drained."""
        ...


class Listener(Protocol):
    """Who is told which partitions come and go. May be called in a thread of the client."""

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        """Partitions are ours, from these positions on. Called before a record of them is handed out."""

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        """The same, but these positions are new: what was known of the partitions is not true any more."""

    def on_revoke(self, partitions: Collection[Partition]) -> Revocation:
        """Partitions are to be given up; the client waits until they are drained, and commits."""
        ...

    def on_lost(self, partitions: Collection[Partition]) -> None:
        """Partitions are somebody else's already: nothing can be committed."""


class ConsumerClient(ABC):
    """A member of a consumer group. Used by one thread.

    Its own commits are off, and so is its own choice of a position: a partition starts where the group is, or, if the
    group has committed nothing there, where ``auto_offset_reset`` says, and that is committed before the first record
    is handed out. What the client cannot do now is raised as :class:`kser.errors.ClientTrouble`; it is tried again.
    """

    #: Whether offsets can be committed at all: whether there is a group.
    can_commit: bool

    @property
    def cluster(self) -> str:
        """What tells this Kafka cluster from others, whichever of its brokers was named; empty if nobody says.

        May be asked by any thread.
        """
        return ""

    @abstractmethod
    def subscribe(self, topics: Iterable[str], listener: Listener) -> None:
        """Take part in the consumption of ``topics``."""

    @abstractmethod
    def poll(self, timeout: float, limit: int, held: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        """Take part in the group, and hand out records that were not handed out yet, in order within a partition.

        :param timeout: seconds to wait when there are no records to hand out.
        :param limit: hand out that many at most. With 0, those of partitions that are assigned in this very call may
            come all the same.
        :param held: partitions to hand out none of.
        """

    @abstractmethod
    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        """Record where the group is; returns when it knows, within ``timeout`` seconds."""

    @abstractmethod
    def lag(self) -> Mapping[Partition, int]:
        """How far the end of each partition is ahead of what was handed out, as far as the client has heard."""

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Leave the group without committing, and let go of all resources, within about ``timeout`` seconds."""


def out_of_range(partition: Partition, was: int | None, begin: int, end: int, start: int) -> str:
    """What to log of a position that is not in the log (any more)."""
    position = -1 if was is None else was
    if position < begin:
        lost = f"offsets {position} to {begin - 1} were deleted before they were handled: raise the topic's retention"
    else:
        lost = f"offsets {end} to {position - 1} are gone from the log: it was cut off, or the topic was made anew"
    return f"{partition}: the position {position} is out of range ({begin} to {end}): {lost}; going on at {start}"


#: What to do about an error of a client, by a word in its text.
_REMEDIES = {
    "authenticat": "check user, password and mechanism in the client's security settings",
    "authoriz": "grant the user Read on the topic and on the consumer group",
    "ssl": "check the certificates in the client's security settings",
    "brokers are down": "start one there, or correct the address",
    "bootstrap": "start a broker there, or correct the address",
}


def trouble(what: str, servers: str, reason: object, *, fatal: bool = False, passing: bool = False) -> ClientTrouble:
    """What a client cannot do now.

    :param what: what it was to do.
    :param servers: where.
    :param reason: its own error.
    """
    text = f"cannot {what} at {servers}: {reason}"
    remedy = next((remedy for word, remedy in _REMEDIES.items() if word in str(reason).lower()), None)
    return ClientTrouble(f"{text}; {remedy}" if remedy else text, fatal=fatal, passing=passing)


def nowhere_to_begin(partitions: Iterable[Partition]) -> ClientTrouble:
    """What is wrong when a group has committed nothing, and is not to begin by itself."""
    places = ", ".join(map(str, partitions))
    return ClientTrouble(
        f"the group has committed nothing in {places}, and the reset policy is 'none': commit offsets for it, or let it"
        " begin with 'earliest' or 'latest'"
    )


def given_up(commits: Mapping[Partition, Commit], error: Exception) -> str:
    """What to say when partitions are gone, and what was finished of them is not committed."""
    places = ", ".join(f"{key} at {commit.offset}" for key, commit in commits.items())
    return f"partitions were given up before {places} could be committed ({error}): messages come again"
