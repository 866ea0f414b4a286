"""Which offset may be committed: the one below which everything is finished. And what is finished above it.

The metadata of a commit carries what is finished above its offset, so that the next owner of the partition does not run
it again: ``kser:1,14,2,3`` says, from the committed offset on and in hexadecimal, 1 unfinished, 20 finished, 2
unfinished, 3 finished. An offset that holds no record (compacted, or a mark of a transaction) counts as finished. Where
groups begin at the end of topics, ``of:4`` before it says that the topic had 4 partitions. In Kafka it is sealed with a
checksum: what cannot be read as it was written must not be taken for finished.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any
from zlib import crc32

from kser.consumer.client import Commit, Partition

PREFIX = "kser:"
SIZE_PREFIX = "of:"
#: Characters that the metadata may have; brokers take 4096 bytes (``offset.metadata.max.bytes``).
METADATA_LIMIT = 4000


def seal(metadata: str) -> str:
    """Metadata as it is written to Kafka."""
    return f"{metadata};{crc32(metadata.encode()):08x};" if metadata else ""


def unseal(written: str) -> str:
    """Metadata that was written to Kafka; empty when it is none of ours, or damaged."""
    metadata, _, rest = written.partition(";")
    # librdkafka's client for Python may read on behind the end.
    return metadata if written.startswith(seal(metadata)) and rest else ""


class Ranges:
    """Offsets as ranges: sorted, apart from each other, each from its first to before its end."""

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
        """The offset behind all of them."""
        return self._ends[-1] if self._ends else 0


def decode(commit: Commit) -> Ranges:
    """What is finished above a commit; nothing, when its metadata is not of this format."""
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
    """How many partitions topics have, to tell those that were added since a group began.

    They were empty when it did: so their beginning is where it would have begun.

    :param reset: where the group begins; only ``"latest"`` makes a difference, so only then commits say so.
    """

    def __init__(self, reset: str) -> None:
        self._in_commits = reset == "latest"
        self._sizes: dict[str, int] = {}

    def see(self, topic: str, size: int) -> None:
        """Take note of what a topic has now, when it is seen for the first time."""
        self._sizes.setdefault(topic, size)

    def note(self, key: Partition, commit: Commit) -> Commit:
        """The commit with the size that the topic had."""
        size = self._sizes.get(key.topic) if self._in_commits else None
        return commit if size is None else Commit(commit.offset, f"{SIZE_PREFIX}{size} {commit.metadata}".rstrip())

    def learn(self, key: Partition, commit: Commit) -> None:
        """Take over what a commit of the group says."""
        word = commit.metadata.partition(" ")[0].removeprefix(SIZE_PREFIX)
        if commit.metadata.startswith(SIZE_PREFIX) and word.isdigit():
            self._sizes[key.topic] = min(int(word), self._sizes.get(key.topic, int(word)))

    def was_added(self, key: Partition) -> bool:
        """Whether a partition was added since."""
        return key.partition >= self._sizes[key.topic]


class Progress:
    """One partition while it is ours: which records were handed out, and which of them are unfinished.

    :param start: where the group is.
    :param known: offsets that are finished all the same, from an earlier time that the partition was ours.
    :param kept: items of records that have been begun in that time and are not finished; they are not begun again.
    """

    def __init__(
        self, start: Commit, known: Iterable[tuple[int, int]] = (), kept: dict[int, Any] | None = None
    ) -> None:
        #: Items of the unfinished records by offset, in order.
        self.open: dict[int, Any] = {}
        #: The offset behind the last one that was handed out.
        self.following = start.offset
        #: What the group knows.
        self.committed = start
        #: Set once the partition is to be given up: nothing of it is begun any more.
        self.revoked = False
        #: Offsets of records that failed for good, which could not be written down yet.
        self.unburied: set[int] = set()
        self._finished = Ranges((*decode(start), *known))
        self._kept = kept or {}
        self._early: set[int] = set()
        self._new_from = max((self._finished.end, *(offset + 1 for offset in self._kept)))

    def received(self, offset: int, item: Any) -> Any:
        """A record was handed out; within a partition that happens in order.

        :return: what is open because of it: ``item``, which is to be begun, or one that was begun before; None when
            nothing is.
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
        """A record is finished; returns whether it was one of those that are open."""
        self.unburied.discard(offset)
        if offset in self.open:
            del self.open[offset]
            return True
        if self._kept.pop(offset, None) is not None:
            # Finished before it was handed out once more.
            self._early.add(offset)
        return False

    def replace(self, offset: int, item: Any) -> bool:
        """Another item stands for an unfinished record; returns False when that is none of ours."""
        place = self.open if offset in self.open else self._kept
        if offset in place:
            place[offset] = item
            return True
        return False

    def finished_ranges(self, unfinished: Iterable[int] | None = None) -> Iterator[tuple[int, int]]:
        """Everything from the committed offset on that need not be begun again.

        :param unfinished: what is not finished of what was handed out, in order; all that is open by default.
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
        """The partition is to be given up: nothing more of it is begun. What is open stays unfinished."""
        self.revoked = True
        for offset, item in self.open.items():
            if not is_begun(item):
                self.open[offset] = None

    def begun(self) -> dict[int, Any]:
        """The items that are begun and not finished, once revoked."""
        return {**{offset: item for offset, item in self.open.items() if item is not None}, **self._kept}

    def commit(self, is_begun: Callable[[Any], bool] | None = None) -> Commit:
        """What may be committed now.

        :param is_begun: tells items that count as finished because they are begun; None when none does.
        """
        unfinished: Collection[int] = self.open
        if is_begun is not None:
            unfinished = [at for at, item in self.open.items() if item is None or not is_begun(item)]
        offset = next(iter(unfinished), self.following)
        if self.following - offset == len(unfinished) and self.following >= self._new_from:
            return Commit(offset)
        finished = Ranges(self.finished_ranges(unfinished))
        if not unfinished:
            # What was known before goes on where the last record that was handed out ends.
            offset = max((end for start, end in finished if start <= offset), default=offset)
        return Commit(offset, _encode(offset, finished))

    def is_committed(self, offset: int) -> bool:
        """Whether the group knows that a record is finished."""
        return offset < self.committed.offset or offset in decode(self.committed)

    @property
    def is_full(self) -> bool:
        """Whether the metadata might not take more, in whatever order the open records are finished."""
        if not self.open:
            return False
        span = self.following - next(iter(self.open))
        gaps: int = min(len(self.open), (span + 1) // 2)
        # For each gap: its length, that of what is finished behind it, and two commas.
        above = sum(1 for _, end in self._finished if end > self.following) if self.following < self._new_from else 0
        return gaps * (4 + len(f"{span // gaps:x}")) + above * 10 > METADATA_LIMIT


def uncommitted(
    partitions: Mapping[Partition, Progress], is_begun: Callable[[Any], bool] | None
) -> dict[Partition, Commit]:
    """What may be committed of these partitions and is not.

    :param is_begun: see :meth:`Progress.commit`.
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
    # What does not fit is not said, and would be run again: a partition that is full is given nothing more to do.
    return text if len(text) <= METADATA_LIMIT else text[: text.rindex(",", 0, METADATA_LIMIT)]
