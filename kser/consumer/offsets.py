"""The offset tracker: computes the offset to commit and the finished offsets above it.

All records below the committed offset are finished. The metadata of the commit lists the finished offsets above the
committed offset, so that the next consumer of the partition does not run their records again. For example,
``kser:1,14,2,3`` counts offsets in hexadecimal, from the committed offset on: 1 offset is unfinished, the next 20
(hexadecimal 14) are finished, the next 2 are unfinished, and the next 3 are finished. An offset without a record
(compacted, or a transaction marker) counts as finished. With the reset policy ``latest``, the number of partitions that
the topic had when the group subscribed precedes this list, for example ``of:4 kser:1,14,2,3`` for 4 partitions. The
word ``starts:2`` counts the starts of the partition, see :mod:`kser.consumer.starts`. The module
:mod:`kser.consumer.commit_metadata` adds a checksum to metadata that is written to Kafka.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from kser.consumer.client import Commit, Partition
from kser.consumer.starts import StartCount

PREFIX = "kser:"
COUNT_PREFIX = "of:"
#: Maximum number of characters of the metadata. Brokers accept 4096 bytes (``offset.metadata.max.bytes``).
METADATA_LIMIT = 4000


class Ranges:
    """A set of offsets as sorted, disjoint, half-open ranges."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif start < end:
                self._starts.append(start)
                self._ends.append(end)

    def __contains__(self, offset: int) -> bool:
        index = bisect_right(self._starts, offset) - 1
        return index >= 0 and offset < self._ends[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    @property
    def end(self) -> int:
        """The end of the last range; 0 if there is none."""
        return self._ends[-1] if self._ends else 0


def decode(commit: Commit) -> Ranges:
    """Return the finished ranges above a committed offset; the result is empty if the metadata has another format."""
    text = commit.word(PREFIX)
    if not text:
        return Ranges()
    try:
        runs = [int(run, 16) for run in text.split(",")]
    except ValueError:
        return Ranges()
    edges = [commit.offset]
    for run in runs:
        edges.append(edges[-1] + run)
    return Ranges(zip(edges[1::2], edges[2::2], strict=False))


class PartitionCounts:
    """The number of partitions of each topic at the time when the group subscribed to the topic.

    A partition with a number equal to or above this count was added to the topic after the group had subscribed. All
    records of the added partition are newer than the subscription. So the group starts at the beginning of the added
    partition, even with the reset policy ``latest``.

    :param reset: the reset policy of the group (``auto.offset.reset``). The commits contain the counts only with
        ``"latest"``, because the other policies do not need them.
    """

    def __init__(self, reset: str) -> None:
        self._in_commits = reset == "latest"
        self._counts: dict[str, int] = {}

    def observe(self, topic: str, count: int) -> None:
        """Record the current partition count of a topic. Only the first call for a topic has an effect."""
        self._counts.setdefault(topic, count)

    def annotate(self, key: Partition, commit: Commit) -> Commit:
        """Return the commit with the partition count of the topic in its metadata."""
        size = self._counts.get(key.topic) if self._in_commits else None
        return commit if size is None else Commit(commit.offset, f"{COUNT_PREFIX}{size} {commit.metadata}".rstrip())

    def restore(self, key: Partition, commit: Commit) -> None:
        """Read the partition count of a topic from the metadata of ``commit``, a commit of the group.

        If several commits contain a count for the topic, the smallest count applies.
        """
        word = commit.word(COUNT_PREFIX)
        if word.isdigit():
            self._counts[key.topic] = min(int(word), self._counts.get(key.topic, int(word)))

    def mark_all_new(self, topic: str) -> None:
        """Let all partitions of a topic count as added after the group had subscribed."""
        self._counts[topic] = 0

    def is_new_partition(self, key: Partition) -> bool:
        """Return whether a partition was added after the group had subscribed."""
        return key.partition >= self._counts[key.topic]


class OffsetTracker:
    """The offset tracker of one assigned partition: which records were received, and which of them are unfinished.

    :param start: the committed offset of the group.
    :param finished: additional finished ranges, from an earlier assignment of the partition.
    :param carried_over: items of records that were started during an earlier assignment and are unfinished. These items
        do not start a second time.
    :param last_offsets: the last offset of each of these records that stands for several offsets, by its first offset.
    """

    def __init__(
        self,
        start: Commit,
        finished: Iterable[tuple[int, int]] = (),
        carried_over: dict[int, Any] | None = None,
        last_offsets: Mapping[int, int] | None = None,
    ) -> None:
        #: The items of the unfinished records by offset, in order.
        self.unfinished: dict[int, Any] = {}
        #: The offset after the last received record.
        self.next_offset = start.offset
        #: The last confirmed commit.
        self.committed = start
        #: True once the partition is revoked; no record of a revoked partition starts.
        self.revoked = False
        #: Offsets of permanently failed records whose dead letter is not written yet.
        self.dead_letter_pending: set[int] = set()
        #: The counts of starts.
        self.starts = StartCount(start)
        self._finished = Ranges((*decode(start), *finished))
        self._carried_over = carried_over or {}
        self._finished_early: set[int] = set()
        #: The last offset of each unfinished record that stands for several offsets, by its first offset.
        self.last_offsets = {at: last for at, last in (last_offsets or {}).items() if at in self._carried_over}
        seen = (*self._carried_over, *self.last_offsets.values())
        self._first_unseen = max((self._finished.end, *(offset + 1 for offset in seen)))

    def track(self, offset: int, item: Any) -> Any:
        """Track a received record. Records of a partition must arrive in order.

        :return: ``item`` if the record is new and must start, an earlier item if an attempt at the record already
            exists, and None if the record is already finished.
        """
        if offset < self.next_offset:
            return None
        self.next_offset = offset + 1
        if offset < self._first_unseen:
            if offset in self._finished or offset in self._finished_early:
                self._finished_early.discard(offset)
                return None
            item = self._carried_over.pop(offset, item)
        self.unfinished[offset] = item
        return item

    def is_finished(self, offset: int) -> bool:
        """Return whether an offset is finished, or has no record that can still start."""
        return offset < self.next_offset or offset in self._finished or offset in self._finished_early

    def first_unfinished(self, first: int, last: int) -> int:
        """Return the first unfinished offset from ``first`` to ``last``, or ``last`` if all of them are finished."""
        for offset in range(max(first, self.next_offset), last):
            if offset not in self._finished and offset not in self._finished_early:
                return offset
        return last

    def extend(self, offset: int, last: int) -> None:
        """Let a tracked record stand for all offsets up to ``last``. They finish together with the record."""
        if offset in self.unfinished and last > offset:
            self.last_offsets[offset] = last
            self.next_offset = max(last + 1, self.next_offset)
        if self._finished_early:
            self._finished_early = {at for at in self._finished_early if at > last}

    def advance(self, position: int) -> None:
        """Count the offsets below a fetch position as finished, unless a record below it is unfinished.

        The client has returned every record below the position, so the other offsets have no record: they are markers
        or aborted records of transactions, or compacted.
        """
        if position > self.next_offset and not self.unfinished and not self._carried_over:
            self.next_offset = position

    def mark_finished(self, offset: int) -> bool:
        """Mark a record as finished.

        :return: whether the record was received during this assignment and was still unfinished.
        """
        self.starts.finish(offset)
        if self.dead_letter_pending:
            self.dead_letter_pending.discard(offset)
        last = self.last_offsets.pop(offset, offset) if self.last_offsets else offset
        if offset in self.unfinished:
            del self.unfinished[offset]
            return True
        if self._carried_over.pop(offset, None) is not None:
            # The partition was revoked and assigned to this consumer again. An attempt from the earlier assignment has
            # finished the record, and the client has not fetched the record again yet. Remember the offset, so that
            # :meth:`track` drops the record when it arrives.
            self._finished_early.update(range(offset, last + 1))
        return False

    def replace(self, offset: int, item: Any) -> bool:
        """Replace the item of an unfinished record; return False if the tracker does not contain the record."""
        items = self.unfinished if offset in self.unfinished else self._carried_over
        if offset in items:
            items[offset] = item
            return True
        return False

    def finished_ranges(self, unfinished: Iterable[int] | None = None) -> Iterator[tuple[int, int]]:
        """Iterate over the finished ranges, from the committed offset on.

        :param unfinished: the received offsets that are not finished, in ascending order; by default, all offsets that
            the tracker contains as unfinished. :meth:`commit` passes fewer offsets if started records count as
            finished.
        """
        start = self.committed.offset
        for offset in self._extended(self.unfinished) if unfinished is None else unfinished:
            if start < offset:
                yield start, offset
            start = offset + 1
        if start < self.next_offset:
            yield start, self.next_offset
        for offset in self._finished_early:
            yield offset, offset + 1
        for start, end in self._finished:
            if end > self.next_offset:
                yield max(start, self.next_offset), end

    def revoke(self, was_started: Callable[[Any], bool]) -> None:
        """Mark the partition as revoked and discard the items that have not started. Their records stay unfinished."""
        self.revoked = True
        for offset, item in self.unfinished.items():
            if not was_started(item):
                self.unfinished[offset] = None

    def started(self) -> dict[int, Any]:
        """Return the items that were started and are unfinished. Call this method after :meth:`revoke`."""
        return {**{offset: item for offset, item in self.unfinished.items() if item is not None}, **self._carried_over}

    def commit(self, counts_as_finished: Callable[[Any], bool] | None = None) -> Commit:
        """Return the commit for the current state.

        :param counts_as_finished: for ``commit="before"``, which commits a record when its attempt starts: returns
            whether an item was started, so that its record counts as finished although the attempt still runs. With
            None, only finished records count as finished.
        """
        return self.starts.annotate(self._finished_commit(counts_as_finished))

    def _finished_commit(self, counts_as_finished: Callable[[Any], bool] | None) -> Commit:
        unfinished: Collection[int] = self.unfinished
        if counts_as_finished is not None:
            unfinished = [at for at, item in self.unfinished.items() if item is None or not counts_as_finished(item)]
        unfinished = self._extended(unfinished)
        offset = next(iter(unfinished), self.next_offset)
        if self.next_offset - offset == len(unfinished) and self.next_offset >= self._first_unseen:
            return Commit(offset)
        finished = Ranges(self.finished_ranges(unfinished))
        if not unfinished:
            # Finished ranges of an earlier assignment may follow the last received record directly. In this case, the
            # offset to commit is the end of these ranges.
            offset = max((end for start, end in finished if start <= offset), default=offset)
        return Commit(offset, _encode(offset, finished))

    def _extended(self, offsets: Collection[int]) -> Collection[int]:
        """Return unfinished offsets, with all offsets of the records that stand for several offsets."""
        if not self.last_offsets:
            return offsets
        return [at for first in offsets for at in range(first, self.last_offsets.get(first, first) + 1)]

    def is_committed(self, offset: int) -> bool:
        """Return whether a record is finished according to the last confirmed commit."""
        return offset < self.committed.offset or offset in decode(self.committed)

    @property
    def is_full(self) -> bool:
        """True if the metadata could exceed its limit when the unfinished records finish in the worst order."""
        if not self.unfinished:
            return False
        span = self.next_offset - next(iter(self.unfinished))
        gaps: int = min(len(self.unfinished), (span + 1) // 2)
        # Each gap between finished ranges adds to the metadata: the digits of its length, the digits of the length of
        # the finished range behind the gap, and two commas.
        above = (
            sum(1 for _, end in self._finished if end > self.next_offset)
            if self.next_offset < self._first_unseen
            else 0
        )
        return gaps * (4 + len(f"{span // gaps:x}")) + above * 10 > METADATA_LIMIT


def pending_commits(
    partitions: Mapping[Partition, OffsetTracker], counts_as_finished: Callable[[Any], bool] | None
) -> dict[Partition, Commit]:
    """Return the offsets of these partitions that can be committed and are not committed yet.

    :param counts_as_finished: see :meth:`OffsetTracker.commit`.
    """
    commits = ((key, tracker, tracker.commit(counts_as_finished)) for key, tracker in partitions.items())
    return {key: commit for key, tracker, commit in commits if commit != tracker.committed}


def has_progress(commit: Commit, committed: Commit | None) -> bool:
    """Return whether a commit contains finished records that ``committed`` does not contain."""
    return committed is None or (commit.offset, commit.word(PREFIX)) != (committed.offset, committed.word(PREFIX))


def _encode(offset: int, finished: Ranges) -> str:
    runs: list[int] = []
    last = offset
    for start, end in finished:
        if end > offset:
            runs += (max(start, offset) - last, end - max(start, offset))
            last = end
    text = PREFIX + ",".join(format(run, "x") for run in runs) if runs else ""
    # If the metadata exceeded its limit, this function would drop the last ranges, and the records of these ranges
    # would run again after a crash. The limit is normally not reached, because the poller pauses a partition while
    # ``is_full`` is true.
    return text if len(text) <= METADATA_LIMIT else text[: text.rindex(",", 0, METADATA_LIMIT)]
