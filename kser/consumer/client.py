"""The interface that each transport's Kafka client implements, and that the consumer calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from kser.connection import Connection, explain
from kser.errors import ClientError


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


class Record(Protocol):
    """A Kafka record. Transports return the record objects of their client library, or wrap them."""

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
        """The timestamp of the record, in milliseconds since 1970."""
        ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


class Commit(NamedTuple):
    """The committed offset of a consumer group in a partition.

    :param offset: the offset at which the group continues; all records below this offset are finished.
    :param metadata: the finished offsets above ``offset``, in the format of :mod:`kser.consumer.offsets`.
    """

    offset: int
    metadata: str = ""

    def word(self, prefix: str) -> str:
        """Return the rest of the word that begins with ``prefix``, or "" if the metadata has no such word."""
        words = self.metadata.split(" ") if self.metadata else ()
        return next((word.removeprefix(prefix) for word in words if word.startswith(prefix)), "")


class Revocation(Protocol):
    """A pending revocation of partitions.

    The client waits until the running records of the partitions are finished, commits the finished records, and then
    releases the partitions.
    """

    @property
    def drained(self) -> bool:
        """True when no record of the revoked partitions is running, or when the time limit has passed."""
        ...

    def wait(self) -> None:
        """Block until :attr:`drained` is True."""

    @property
    def commits(self) -> Callable[[], Mapping[Partition, Commit]]:
        """A callable that returns the offsets to commit.

        Call it after :meth:`wait`, so that the result includes every finished record.
        """
        ...


class RebalanceListener(Protocol):
    """The rebalance listener of a client. The client may call the listener in a thread of its own."""

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        """Handle newly assigned partitions. The client calls this method before it returns records of these partitions.

        :param starts: the committed offset of each partition.
        """

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        """Handle assigned partitions whose fetch position was reset, and discard all state of these partitions.

        :param starts: the new fetch position of each partition.
        """

    def on_revoke(self, partitions: Collection[Partition]) -> Revocation:
        """Handle a revocation.

        The client waits until :attr:`Revocation.drained` of the returned revocation is True, and then commits the
        offsets of the revocation.
        """
        ...

    def on_lost(self, partitions: Collection[Partition]) -> None:
        """Handle lost partitions. The group has already reassigned these partitions, so nothing can be committed."""


class ConsumerClient(ABC):
    """A member of a consumer group. Only one thread uses the client.

    A partition starts at the committed offset of the group. If the group has no committed offset in the partition, the
    partition starts at the position that ``auto_offset_reset`` names, and the client commits this position before it
    returns the first record. Apart from this commit of a start position, the client commits only when :meth:`commit` is
    called. Each method raises :class:`kser.errors.ClientError` if it fails, and the caller retries the call.
    """

    #: True if the client can commit offsets; False without a consumer group.
    can_commit: bool

    #: Tells the supervisor that the client still makes progress. The client calls it between its calls of the library
    #: if one call of a method needs many of them.
    progress: Callable[[], None] = staticmethod(lambda: None)

    @property
    def cluster(self) -> str:
        """The cluster id, which is the same for all bootstrap servers of a Kafka cluster; empty if it is unknown.

        Any thread may read this property.
        """
        return ""

    @abstractmethod
    def subscribe(self, topics: Iterable[str], listener: RebalanceListener) -> None:
        """Subscribe to ``topics`` and report rebalances to ``listener``.

        :param topics: names and patterns (:class:`kser.consumer.subscription.Subscription`). The client consumes a
            topic that matches a pattern, and that is created later, after at most 30 seconds.
        """

    @abstractmethod
    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        """Keep the group membership alive and return new records, in the order of the offsets within a partition.

        :param timeout: seconds to wait if no record is available.
        :param limit: the maximum number of records. With 0, the call may still return records of partitions that the
            group assigns during the call.
        :param paused: the paused partitions; the call returns no records of these partitions.
        """

    @abstractmethod
    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        """Commit offsets and return after the group has confirmed them, within ``timeout`` seconds."""

    def positions(self) -> Mapping[Partition, int]:
        """Return the fetch position of each started partition, for a commit of partitions without unfinished records.

        The client has returned every record below this position. The position can be above the last record, because
        the markers and the aborted records of transactions have offsets too.
        """
        return {}

    @abstractmethod
    def lag(self) -> Mapping[Partition, int]:
        """Return the number of records in each partition after the last record that :meth:`poll` returned.

        The client computes the number from cached end offsets.
        """

    def waiting(self) -> Mapping[Partition, str]:
        """Return the partitions from which the client does not fetch because of their data, and the logged reasons."""
        return {}

    def is_member(self) -> bool:
        """Return whether the client is a member of its group, as far as the client can tell; True without a group.

        A member without partitions is a member too.
        """
        return True

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Leave the group without a commit and release all resources, within about ``timeout`` seconds."""


def out_of_range_text(partition: Partition, was: int | None, begin: int, end: int, start: int) -> str:
    """Return the text of a log line about a fetch position outside of the offset range of the partition.

    :param was: the fetch position; None if it is unknown.
    :param begin: the first offset of the partition.
    :param end: the offset after the last record of the partition.
    :param start: the fetch position at which the consumer continues.
    """
    position = -1 if was is None else was
    if position < begin:
        lost = f"offsets {position} to {begin - 1} were deleted before they were handled: raise the topic's retention"
    else:
        lost = f"offsets {end} to {position - 1} are not in the log: it was truncated, or the topic was recreated"
    return f"{partition}: the position {position} is out of range ({begin} to {end}): {lost}; continuing at {start}"


def client_error(
    activity: str, connection: Connection, reason: object, *, fatal: bool = False, transient: bool = False
) -> ClientError:
    """Build the error of a failed call of the client library.

    :param activity: the purpose of the failed call as an infinitive, for example "fetch messages".
    :param connection: how the client connects.
    :param reason: the error of the client library.
    :param fatal: whether the consumer must replace the client.
    :param transient: whether the error is expected and disappears without an action, for example during a rebalance;
        the consumer logs it at INFO.
    """
    failure = explain(reason, connection)
    text = f"cannot {activity} at {connection.servers} ({connection.option}): {failure.text}"
    return ClientError(text, kind=f"{activity}: {failure.kind}", fatal=fatal, transient=transient)


def missing_topics(topics: Iterable[str], connection: Connection) -> ClientError:
    """Build the error for topics that do not exist."""
    names = ", ".join(map(repr, sorted(topics)))
    text = f"the brokers at {connection.servers} have no topic {names}: create it, or correct its name"
    return ClientError(text, kind=f"missing: {names}")


def denied_topics(topics: Iterable[str], connection: Connection) -> ClientError:
    """Build the error for topics that the user of the client must not read."""
    names = ", ".join(map(repr, sorted(topics)))
    user = f"user {connection.user!r}" if connection.user else "the user of this client"
    text = f"not authorized to read topic {names} at {connection.servers}: grant {user} Read and Describe on the topic"
    return ClientError(text, kind=f"denied: {names}")


def joined_errors(errors: Sequence[ClientError]) -> ClientError | None:
    """Return one error for several; None if there are none."""
    if len(errors) < 2:
        return errors[0] if errors else None
    return ClientError("; ".join(e.message for e in errors), kind="; ".join(e.kind for e in errors))


def no_committed_offset(partitions: Iterable[Partition]) -> ClientError:
    """Build the error for a group that has no committed offset and whose reset policy is ``none``."""
    names = ", ".join(map(str, partitions))
    return ClientError(
        f"the group has no committed offset in {names}, and the reset policy is 'none': commit offsets for the group,"
        " or set the policy to 'earliest' or 'latest'"
    )


def revoked_before_commit_text(commits: Mapping[Partition, Commit], error: Exception) -> str:
    """Return the text of a log line about partitions that were revoked before their finished records were committed."""
    offsets = ", ".join(f"{key} at {commit.offset}" for key, commit in commits.items())
    return f"partitions were revoked before {offsets} could be committed ({error}): messages will be redelivered"
