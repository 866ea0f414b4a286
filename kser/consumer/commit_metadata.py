"""The metadata of commits: what a client writes beside a committed offset, and what it accepts when it reads it back.

The metadata is a list of words, for example ``id:5f2c09ab starts:2 kser:1,14``. ``id:`` identifies the topic, so that a
consumer notices that the topic was deleted and created again. :mod:`kser.consumer.offsets` defines the other words.
The words end with a checksum. The checksum covers the cluster, the partition and the committed offset too, because the
words are true only beside the offset for which they were written: MirrorMaker and administrators move offsets and keep
the metadata.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from enum import Enum
from zlib import crc32

from kser.consumer.client import Commit, Partition
from kser.consumer.offsets import COUNT_PREFIX, PREFIX, PartitionCounts
from kser.consumer.starts import STARTS_PREFIX
from kser.escaping import escape_lines

logger = escape_lines(logging.getLogger(__name__))

ID_PREFIX = "id:"

#: The default limit of brokers for the metadata of a commit, in bytes (``offset.metadata.max.bytes``).
BROKER_LIMIT = 4096

#: Seconds between two checks whether topics were created again. The interval of the metadata of the client is the
#: upper limit.
TOPIC_CHECK_INTERVAL = 30.0

#: Seconds after which a client tries again to commit metadata that the broker rejected as too large.
RETRY_INTERVAL = 600.0

#: Number of characters of the checksum, with the semicolons around it.
_CHECKSUM_SIZE = 10
#: The shortest metadata that is worth to be written, in characters: the words ``id:`` and ``starts:``, and a checksum.
_SHORTEST = 32

# confluent-kafka may read past the end of the metadata, so text behind the checksum is ignored.
_SEALED = re.compile(
    rf"(?P<words>(?:{ID_PREFIX}|{COUNT_PREFIX}|{STARTS_PREFIX}|{PREFIX})[^;\0]*);(?P<checksum>[0-9a-f]{{8}});"
)


class Validity(Enum):
    """The validity of the metadata of a committed offset for the records of the partition."""

    #: The metadata applies, or there is no metadata of kser.
    VALID = "valid"
    #: The metadata was written for another offset, partition or cluster, or it is damaged. The offset applies.
    MOVED = "moved"
    #: The offset was committed for an earlier topic with the same name. Neither the offset nor the metadata applies.
    OLD_TOPIC = "old topic"


class CommitMetadata:
    """The metadata of the commits of one client.

    :param reset: the reset policy of the group (``auto.offset.reset``).
    :param clock: returns the time in seconds.
    """

    def __init__(self, reset: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.partition_counts = PartitionCounts(reset)
        #: The id of the Kafka cluster; empty while it is unknown.
        self.cluster = ""
        self._clock = clock
        self._ids: dict[str, str] = {}
        #: The id of the topic when each partition got its last start position.
        self._started_ids: dict[Partition, str] = {}
        self._reported: set[tuple[str, str | None]] = set()
        self._limit = BROKER_LIMIT
        self._longest = 0
        self._retry_at = 0.0
        self._warned = False

    # -- topics that are created again ---------------------------------------------------------------------------------

    def learn_topic_id(self, topic: str, topic_id: bytes) -> bool:
        """Record the current id of a topic.

        :return: True if the topic had another id before, so that all positions in the topic are void.
        """
        short = f"{crc32(topic_id):08x}"
        known = self._ids.get(topic)
        self._ids[topic] = short
        if known in (None, short):
            return False
        self._report_new_topic(topic)
        return True

    def knows_topic_id(self, topic: str) -> bool:
        """Return whether the id of a topic is known."""
        return topic in self._ids

    def is_of_new_topic(self, key: Partition) -> bool:
        """Return whether the topic was created again since the last call of :meth:`mark_started` for a partition."""
        before, now = self._started_ids.get(key), self._ids.get(key.topic)
        return before is not None and before != now

    def mark_started(self, key: Partition) -> None:
        """Record that a partition has a start position in the current topic."""
        if (now := self._ids.get(key.topic)) is not None:
            self._started_ids[key] = now

    def _report_new_topic(self, topic: str) -> None:
        # All records of the new topic are newer than the subscription, as those of an added partition are.
        self.partition_counts.mark_all_new(topic)
        if (report := (topic, self._ids.get(topic))) not in self._reported:
            self._reported.add(report)
            logger.error(
                f"the topic {topic!r} was deleted and created again: the offsets that the group committed for the old"
                " topic do not apply to the new topic, so the consumer starts at the beginning of the new topic"
            )

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, key: Partition, commit: Commit) -> str:
        """Return the metadata of a commit in the form that is written to Kafka."""
        if self._limit < BROKER_LIMIT and self._clock() >= self._retry_at:
            self._limit = BROKER_LIMIT
        # The words that the client writes itself are already there if the commit was read from Kafka.
        own = (ID_PREFIX, COUNT_PREFIX)
        others = " ".join(word for word in commit.metadata.split(" ") if not word.startswith(own))
        commit = self.partition_counts.annotate(key, Commit(commit.offset, others))
        # The offset belongs to the topic in which the partition has started. If that topic was created again, and the
        # partition has not restarted yet, the id of the new topic would make the offset valid there.
        topic_id = self._started_ids.get(key, self._ids.get(key.topic))
        words = [f"{ID_PREFIX}{topic_id}"] if topic_id else []
        text = _shorten(" ".join([*words, commit.metadata]).strip(), self._limit - _CHECKSUM_SIZE - 1)
        if not text:
            return ""
        sealed = f"{text};{self._checksum(key, commit.offset, text)};"
        self._longest = max(self._longest, len(sealed))
        return sealed

    @property
    def is_disabled(self) -> bool:
        """True if the client writes no metadata, because the broker has rejected even short metadata as too large."""
        return not self._limit

    def shrink(self) -> bool:
        """Write shorter metadata from now on, because the broker has rejected the metadata of a commit as too large.

        :return: False if the client already writes no metadata.
        """
        half = min(self._longest, self._limit) // 2
        return self._set_limit(half if half >= _SHORTEST else 0)

    def disable(self) -> None:
        """Write no metadata from now on, because there is no time to find out which length the broker accepts."""
        self._set_limit(0)

    def _set_limit(self, limit: int) -> bool:
        if not self._limit:
            return False
        if self._limit == BROKER_LIMIT and not self._warned:
            self._warned = True
            logger.warning(
                "the broker rejects the metadata of commits as too large, so finished messages above the committed"
                " offset may run again after a rebalance or a restart: set offset.metadata.max.bytes of the broker to"
                " 4096, its default"
            )
        self._limit, self._longest = limit, 0
        self._retry_at = self._clock() + RETRY_INTERVAL
        return True

    def _checksum(self, key: Partition, offset: int, text: str) -> str:
        # Damaged metadata may contain surrogates, and must not raise an error.
        covered = f"{self.cluster} {key.topic} {key.partition} {offset} {text}".encode(errors="surrogatepass")
        return f"{crc32(covered):08x}"

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, key: Partition, offset: int, written: str) -> tuple[Commit, Validity]:
        """Return the commit that Kafka has stored, and whether its metadata applies.

        If the metadata does not apply, the commit has no metadata.

        :param written: the metadata in the form in which Kafka has stored it.
        """
        sealed = _SEALED.match(written)
        if sealed is None:
            return Commit(offset), Validity.VALID
        words = sealed["words"]
        if sealed["checksum"] != self._checksum(key, offset, words):
            return Commit(offset), Validity.MOVED
        commit = Commit(offset, words)
        topic_id = commit.word(ID_PREFIX)
        if topic_id and self._ids.setdefault(key.topic, topic_id) != topic_id:
            return Commit(offset), Validity.OLD_TOPIC
        return commit, Validity.VALID

    def start_of(self, key: Partition, offset: int, written: str) -> tuple[Commit, Validity]:
        """Return the commit at which a newly assigned partition starts, as :meth:`read` does, and log what is void."""
        commit, validity = self.read(key, offset, written)
        if validity is Validity.MOVED:
            logger.warning(
                f"{key}: the metadata beside the committed offset {offset} was not written for this offset: the offset"
                " was moved, for example by MirrorMaker or an administrator, or the metadata is damaged; all messages"
                f" from offset {offset} on run, also those that have run before"
            )
        elif validity is Validity.OLD_TOPIC:
            self._report_new_topic(key.topic)
        return commit, validity

    def restore(self, key: Partition, offset: int, written: str) -> None:
        """Read the partition count of a topic from the metadata of a commit of the group."""
        self.partition_counts.restore(key, self.read(key, offset, written)[0])


def _shorten(text: str, limit: int) -> str:
    """Return as much of the metadata as fits: the last words, and the last runs of the finished offsets, go first."""
    if len(text) <= limit:
        return text
    head, _, last = text.rpartition(" ")
    if last.startswith(PREFIX):
        comma = text.rfind(",", 0, limit + 1) if limit > 0 else -1
        if comma > len(head):
            return text[:comma]
    return _shorten(head, limit) if head else ""
