"""Only what is below the lowest unfinished record may be committed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kser.consumer.client import Partition
from kser.consumer.offsets import OffsetTracker
from kser.dummy.bus import DummyRecord

ONE, TWO = Partition("dice", 0), Partition("dice", 1)


def record(offset: int, partition: Partition = ONE) -> DummyRecord:
    return DummyRecord(*partition, offset, b"")


def tracking(*offsets: int, partition: Partition = ONE) -> OffsetTracker:
    tracker = OffsetTracker()
    for offset in offsets:
        tracker.received(record(offset, partition))
    return tracker


def test_what_was_handed_out_is_not_committable() -> None:
    assert tracking(5, 6).committable() == {}


def test_the_offset_behind_what_is_done_is_committable() -> None:
    tracker = tracking(5, 6, 7)
    tracker.done(record(5))
    assert tracker.committable() == {ONE: 6}
    tracker.done(record(6))
    tracker.done(record(7))
    assert tracker.committable() == {ONE: 8}


def test_a_gap_holds_everything_behind_it_back() -> None:
    tracker = tracking(5, 6, 7)
    tracker.done(record(7))
    tracker.done(record(6))
    assert tracker.committable() == {}
    tracker.done(record(5))
    assert tracker.committable() == {ONE: 8}


def test_offsets_that_kafka_left_out_are_passed_over() -> None:
    """Compacted topics and transactions leave holes."""
    tracker = tracking(5, 9, 20)
    tracker.done(record(5))
    assert tracker.committable() == {ONE: 9}
    tracker.done(record(9))
    tracker.done(record(20))
    assert tracker.committable() == {ONE: 21}


def test_what_was_committed_is_not_committable_again() -> None:
    tracker = tracking(5, 6)
    tracker.done(record(5))
    tracker.committed({ONE: 6})
    assert tracker.committable() == {}
    tracker.done(record(6))
    assert tracker.committable() == {ONE: 7}


def test_partitions_go_their_own_way() -> None:
    tracker = tracking(5)
    tracker.received(record(1, TWO))
    tracker.done(record(1, TWO))
    assert tracker.committable() == {TWO: 2}
    tracker.done(record(5))
    assert tracker.committable(among=[ONE]) == {ONE: 6}


def test_a_forgotten_partition_is_not_committable_and_its_late_records_are_passed_over() -> None:
    tracker = tracking(5, 6)
    tracker.done(record(5))
    tracker.forget([ONE, TWO])
    tracker.done(record(6))
    tracker.committed({ONE: 7})
    assert tracker.committable() == {}


def test_a_partition_that_comes_back_starts_anew() -> None:
    tracker = tracking(5, 6)
    tracker.done(record(6))
    tracker.forget([ONE])
    tracker.received(record(5))
    tracker.received(record(6))
    tracker.done(record(5))
    assert tracker.committable() == {ONE: 6}


@settings(database=None, deadline=None, max_examples=300, print_blob=True)
@given(
    gaps=st.lists(st.integers(1, 3), min_size=1, max_size=30),
    order=st.randoms(use_true_random=False),
    batches=st.integers(1, 5),
)
def test_in_any_order_nothing_unfinished_is_committable(gaps: list[int], order: object, batches: int) -> None:
    offsets = [sum(gaps[: index + 1]) for index in range(len(gaps))]
    waiting, unfinished = list(offsets), set(offsets)
    tracker, handed_out, commits = OffsetTracker(), [], [offsets[0]]
    while unfinished:
        if waiting and (not handed_out or order.random() < 1 / batches):  # type: ignore[attr-defined]
            tracker.received(record(waiting[0]))
            handed_out.append(waiting.pop(0))
            continue
        offset = handed_out.pop(order.randrange(len(handed_out)))  # type: ignore[attr-defined]
        tracker.done(record(offset))
        unfinished.discard(offset)
        committable = tracker.committable()
        tracker.committed(committable)
        commits += committable.values()
        assert commits[-1] <= min(unfinished, default=offsets[-1] + 1)
    assert commits == sorted(set(commits))
    assert commits[-1] == offsets[-1] + 1
