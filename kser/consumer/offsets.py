"""The offset tracker: computes the offset to commit and the finished offsets above it.

The committed offset is the one below which all records are finished. The metadata of the commit lists the finished
offsets above it, so that the next owner of the partition does not run these records again. For example,
``kser:1,14,2,3`` means, in hexadecimal and from the committed offset on: 1 unfinished, 20 finished, 2 unfinished and
3 finished. An offset without a record (compacted, or a transaction marker) counts as finished. If groups start at the
end of topics, the prefix ``of:4`` means that the topic had 4 partitions. In Kafka, the metadata has a checksum, because
damaged metadata must not mark a record as finished.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any
from zlib import crc32

from kser.consumer.client import Commit, Partition

PREFIX = "kser:"
SIZE_PREFIX = "of:"
#: Maximum characters of the metadata; brokers accept 4096 bytes (``offset.metadata.max.bytes``).
METADATA_LIMIT = 4000


def seal(metadata: str) -> str:
    """Add the checksum to metadata, as written to Kafka."""
    return f"{metadata};{crc32(metadata.encode()):08x};" if metadata else ""


def unseal(written: str) -> str:
    """Verify and remove the checksum of metadata read from Kafka; return "" if it is foreign or damaged."""
    metadata, _, rest = written.partition(";")
    # confluent-kafka may read past the end of the metadata, so text behind the checksum is ignored.
    return metadata if written.startswith(seal(metadata)) and rest else ""


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
        place = bisect_right(self._starts, offset) - 1
        return place >= 0 and offset < self._ends[place]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    @property
    def end(self) -> int:
        """The end of the last range; 0 if there is none."""
        return self._ends[-1] if self._ends else 0


def decode(commit: Commit) -> Ranges:
    """Return the finished ranges above a committed offset; none if its metadata has another format."""
    text = commit.metadata.rpartition(" ")[2]
    if not text.startswith(PREFIX):
        return Ranges()
    try:
        runs = [int(run, 16) for run in text.removeprefix(PREFIX).split(",")]
    except ValueError:
        return Ranges()
    edges = [commit.offset]
    for run in runs:
        edges.append(edges[-1] + run)
    return Ranges(zip(edges[1::2], edges[2::2], strict=False))


class Sizes:
    """The partition counts of topics, used to recognise partitions added after the group had subscribed.

    Partitions added later were empty when the group subscribed, so the group starts at their beginning even with
    ``latest``.

    :param reset: the reset policy of the group. Only ``"latest"`` makes a difference, so only then the commits
        contain the counts.
    """

    def __init__(self, reset: str) -> None:
        self._in_commits = reset == "latest"
        self._sizes: dict[str, int] = {}

    def see(self, topic: str, size: int) -> None:
        """Record the current partition count of a topic, at the first call for the topic."""
        self._sizes.setdefault(topic, size)

    def note(self, key: Partition, commit: Commit) -> Commit:
        """Return the commit with the partition count of the topic in its metadata."""
        size = self._sizes.get(key.topic) if self._in_commits else None
        return commit if size is None else Commit(commit.offset, f"{SIZE_PREFIX}{size} {commit.metadata}".rstrip())

    def learn(self, key: Partition, commit: Commit) -> None:
        """Restore the partition count of a topic from a commit of the group; the smallest count applies."""
        word = commit.metadata.partition(" ")[0].removeprefix(SIZE_PREFIX)
        if commit.metadata.startswith(SIZE_PREFIX) and word.isdigit():
            self._sizes[key.topic] = min(int(word), self._sizes.get(key.topic, int(word)))

    def was_added(self, key: Partition) -> bool:
        """Return whether a partition was added after the group had subscribed."""
        return key.partition >= self._sizes[key.topic]


class Progress:
    """The offset tracker of one assigned partition: which records were received, and which of them are unfinished.

    :param start: the committed offset of the group.
    :param known: additional finished ranges, from an earlier assignment of the partition.
    :param kept: items of records that were started during an earlier assignment and are unfinished; they do not start
        a second time.
    """

    def __init__(
        self, start: Commit, known: Iterable[tuple[int, int]] = (), kept: dict[int, Any] | None = None
    ) -> None:
        #: The items of the unfinished records by offset, in order.
        self.open: dict[int, Any] = {}
        #: The offset behind the last received record.
        self.following = start.offset
        #: The last confirmed commit.
        self.committed = start
        #: Whether the partition is revoked; no record of a revoked partition starts.
        self.revoked = False
        #: Offsets of permanently failed records whose dead letter is not written yet.
        self.unburied: set[int] = set()
        self._finished = Ranges((*decode(start), *known))
        self._kept = kept or {}
        self._early: set[int] = set()
        self._new_from = max((self._finished.end, *(offset + 1 for offset in self._kept)))

    def received(self, offset: int, item: Any) -> Any:
        """Track a received record. Records of a partition must arrive in order.

        :return: ``item`` if the record is new and must start, an earlier item if an attempt at the record already
            exists, and None if the record is already finished.
        """
        if offset < self.following:
            return None
        self.following = offset + 1
        if offset < self._new_from:
            if offset in self._finished or offset in self._early:
                self._early.discard(offset)
                return None
            item = self._kept.pop(offset, item)
        self.open[offset] = item
        return item

    def finished(self, offset: int) -> bool:
        """Mark a record as finished; return whether it was received during this assignment and unfinished."""
        self.unburied.discard(offset)
        if offset in self.open:
            del self.open[offset]
            return True
        if self._kept.pop(offset, None) is not None:
            # The record finished before the client returned it again, so its redelivery must be dropped.
            self._early.add(offset)
        return False

    def replace(self, offset: int, item: Any) -> bool:
        """Replace the item of an unfinished record; return False if the tracker does not contain the record."""
        place = self.open if offset in self.open else self._kept
        if offset in place:
            place[offset] = item
            return True
        return False

    def finished_ranges(self, unfinished: Iterable[int] | None = None) -> Iterator[tuple[int, int]]:
        """Iterate over the finished ranges, from the committed offset on.

        :param unfinished: the unfinished offsets of the received records, in order; defaults to all tracked ones.
        """
        start = self.committed.offset
        for offset in self.open if unfinished is None else unfinished:
            if start < offset:
                yield start, offset
            start = offset + 1
        if start < self.following:
            yield start, self.following
        for offset in self._early:
            yield offset, offset + 1
        for start, end in self._finished:
            if end > self.following:
                yield max(start, self.following), end

    def revoke(self, is_begun: Callable[[Any], bool]) -> None:
        """Mark the partition as revoked: discard the items that have not started. Their records stay unfinished."""
        self.revoked = True
        for offset, item in self.open.items():
            if not is_begun(item):
                self.open[offset] = None

    def begun(self) -> dict[int, Any]:
        """Return the started and unfinished items. Call it after :meth:`revoke`."""
        return {**{offset: item for offset, item in self.open.items() if item is not None}, **self._kept}

    def commit(self, is_begun: Callable[[Any], bool] | None = None) -> Commit:
        """Return the commit for the current state.

        :param is_begun: returns whether an unfinished item counts as finished because it has started; None if no item
            does.
        """
        unfinished: Collection[int] = self.open
        if is_begun is not None:
            unfinished = [at for at, item in self.open.items() if item is None or not is_begun(item)]
        offset = next(iter(unfinished), self.following)
        if self.following - offset == len(unfinished) and self.following >= self._new_from:
            return Commit(offset)
        finished = Ranges(self.finished_ranges(unfinished))
        if not unfinished:
            # Finished ranges of an earlier assignment may adjoin the last received record, so move behind them.
            offset = max((end for start, end in finished if start <= offset), default=offset)
        return Commit(offset, _encode(offset, finished))

    def is_committed(self, offset: int) -> bool:
        """Return whether a record is finished according to the last confirmed commit."""
        return offset < self.committed.offset or offset in decode(self.committed)

    @property
    def is_full(self) -> bool:
        """Whether the metadata could exceed its limit, for the worst order in which the open records finish."""
        if not self.open:
            return False
        span = self.following - next(iter(self.open))
        gaps: int = min(len(self.open), (span + 1) // 2)
        # Each gap takes the digits of its length and of the finished range behind it, and two commas.
        above = sum(1 for _, end in self._finished if end > self.following) if self.following < self._new_from else 0
        return gaps * (4 + len(f"{span // gaps:x}")) + above * 10 > METADATA_LIMIT


def uncommitted(
    partitions: Mapping[Partition, Progress], is_begun: Callable[[Any], bool] | None
) -> dict[Partition, Commit]:
    """Return the offsets of these partitions that can be committed and are not committed yet.

    :param is_begun: see :meth:`OffsetTracker.commit`.
    """
    found = ((key, progress, progress.commit(is_begun)) for key, progress in partitions.items())
    return {key: commit for key, progress, commit in found if commit != progress.committed}


def _encode(offset: int, finished: Ranges) -> str:
    runs: list[int] = []
    place = offset
    for start, end in finished:
        if end > offset:
            runs += (max(start, offset) - place, end - max(start, offset))
            place = end
    text = PREFIX + ",".join(format(run, "x") for run in runs) if runs else ""
    # Ranges beyond the metadata limit are dropped and would run again after a crash, so ``is_full`` pauses the
    # partition before that.
    return text if len(text) <= METADATA_LIMIT else text[: text.rindex(",", 0, METADATA_LIMIT)]
