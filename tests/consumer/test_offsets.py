"""Tests of the offset tracker: it commits below the lowest unfinished record and puts later ones in the metadata."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kser.consumer.client import Commit
from kser.consumer.offsets import METADATA_LIMIT, PREFIX, OffsetTracker, Ranges, decode

#: The default limit of a broker for the metadata of a commit, in bytes.
BROKER_LIMIT = 4096

cases = settings(database=None, deadline=None, max_examples=300, print_blob=True)
edges = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple)
offsets = st.sets(st.integers(0, 80))


def tracker_of(*tracked: int, **options: Any) -> OffsetTracker:
    """Return a tracker of records at these offsets; the item of each record is its offset as text."""
    tracker = OffsetTracker(Commit(tracked[0]), **options)
    for offset in tracked:
        tracker.track(offset, str(offset))
    return tracker


def finish(tracker: OffsetTracker, *finished: int) -> OffsetTracker:
    """Mark records as finished, and return the tracker."""
    for offset in finished:
        assert tracker.mark_finished(offset)
    return tracker


def track(tracker: OffsetTracker, fetched: Iterable[int]) -> list[int]:
    """Track records at these offsets; return the offsets that have to run."""
    return [offset for offset in fetched if tracker.track(offset, offset) == offset]


def redelivered(commit: Commit, end: int) -> list[int]:
    """Return the offsets below ``end`` that run again with the next owner of the partition."""
    return track(OffsetTracker(commit), range(commit.offset, end))


# -- ranges ------------------------------------------------------------------------------------------------------------


def test_adjacent_or_overlapping_ranges_merge_and_empty_ones_vanish() -> None:
    assert list(Ranges([(7, 9), (1, 3), (3, 4), (2, 3), (5, 5)])) == [(1, 4), (7, 9)]


def test_ranges_end_behind_their_last_offset() -> None:
    assert Ranges([(1, 4), (7, 9)]).end == 9
    assert Ranges().end == 0


@cases
@given(st.lists(edges))
def test_ranges_contain_exactly_the_given_offsets(pairs: list[tuple[int, int]]) -> None:
    ranges = Ranges(pairs)
    expected = {offset for start, end in pairs for offset in range(start, end)}
    assert {offset for offset in range(-1, 62) if offset in ranges} == expected
    assert all(start < end for start, end in ranges)
    assert all(end < next_start for (_, end), (next_start, _) in pairwise(ranges)), "adjacent ranges are merged"


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_documented_metadata_example_is_decoded_as_explained() -> None:
    assert list(decode(Commit(100, "kser:1,14,2,3"))) == [(101, 121), (123, 126)]


@pytest.mark.parametrize("metadata", ["", "another client", "kser", "kser:", "kser:1,x", "kser:1,,2", "kser:1;2"])
def test_metadata_of_another_format_is_ignored(metadata: str) -> None:
    assert list(decode(Commit(5, metadata))) == []


def test_metadata_that_ends_with_an_unfinished_run_is_decoded_up_to_there() -> None:
    assert list(decode(Commit(5, "kser:1,2,3"))) == [(6, 8)]


def test_commit_without_gaps_has_no_metadata() -> None:
    assert tracker_of(5, 6, 7).commit() == Commit(5)
    assert finish(tracker_of(5, 6, 7), 5).commit() == Commit(6)
    assert finish(tracker_of(5, 6, 7), 5, 6, 7).commit() == Commit(8)


@cases
@given(fetched=offsets, finished=offsets, start=st.integers(0, 20))
def test_next_owner_starts_exactly_the_unfinished_records(fetched: set[int], finished: set[int], start: int) -> None:
    records = sorted(offset for offset in fetched if offset >= start)
    tracker = OffsetTracker(Commit(start))
    assert track(tracker, records) == records
    for offset in finished & set(records):
        assert tracker.mark_finished(offset)
    unfinished = sorted(set(records) - finished)
    next_offset = max(records, default=start - 1) + 1
    commit = tracker.commit()
    assert commit.offset == (unfinished[0] if unfinished else next_offset)
    in_metadata = {offset for pair in decode(commit) for offset in range(*pair)}
    assert in_metadata == set(range(commit.offset, next_offset)) - set(unfinished)
    assert redelivered(commit, next_offset) == unfinished


@cases
@given(rounds=st.lists(st.tuples(st.integers(0, 12), st.randoms(use_true_random=False)), max_size=6))
def test_finished_records_stay_finished_from_owner_to_owner(rounds: list[tuple[int, Any]]) -> None:
    commit, finished, end = Commit(0), set[int](), 0
    for count, chance in rounds:
        tracker, end = OffsetTracker(commit), end + count
        started = track(tracker, range(commit.offset, end))
        assert started == [offset for offset in range(end) if offset not in finished]
        for offset in started:
            if chance.random() < 0.5:
                finished.add(offset)
                tracker.mark_finished(offset)
        commit = tracker.commit()
        assert commit.offset == min(set(range(end)) - finished, default=end)


@cases
@given(finished=offsets, fetched=st.integers(0, 80))
def test_owner_keeps_the_metadata_of_records_it_has_not_fetched(finished: set[int], fetched: int) -> None:
    first = tracker_of(*range(81))
    for offset in finished:
        first.mark_finished(offset)
    commit = first.commit()
    second = OffsetTracker(commit)
    track(second, range(commit.offset, fetched))
    assert redelivered(second.commit(), 81) == sorted(set(range(81)) - finished)


def test_offsets_missing_from_the_log_are_skipped() -> None:
    """Compaction and transactions leave gaps in a log."""
    tracker = finish(tracker_of(5, 9, 20), 5)
    assert tracker.commit().offset == 9
    finish(tracker, 9)
    assert tracker.commit().offset == 20
    finish(tracker, 20)
    assert tracker.commit() == Commit(21)


# -- the metadata limit ------------------------------------------------------------------------------------------------


def tracker_with_gaps(count: int) -> OffsetTracker:
    """Return a tracker of ``count`` unfinished records, each followed by a finished one."""
    tracker = tracker_of(*range(2 * count))
    return finish(tracker, *range(1, 2 * count, 2))


def test_metadata_beyond_the_limit_is_cut_off_between_two_runs() -> None:
    tracker = tracker_with_gaps(3000)
    commit = tracker.commit()
    assert METADATA_LIMIT - 50 < len(commit.metadata) <= METADATA_LIMIT < BROKER_LIMIT
    assert set(commit.metadata.removeprefix(PREFIX)) == {"1", ","}
    ranges = list(decode(commit))
    assert ranges == [(offset, offset + 1) for offset in range(1, 2 * len(ranges), 2)], "only finished records"
    tracker.committed = commit
    assert tracker.is_full


def test_metadata_that_just_fits_is_not_cut_off() -> None:
    count = (METADATA_LIMIT - len(PREFIX) + 1) // 4
    commit = tracker_with_gaps(count).commit()
    assert METADATA_LIMIT - 4 < len(commit.metadata) <= METADATA_LIMIT
    assert len(list(decode(commit))) == count


def test_partition_with_few_gaps_is_not_full() -> None:
    tracker = tracker_with_gaps(10)
    assert not tracker.is_full
    tracker.committed = tracker.commit()
    assert not tracker.is_full


@pytest.mark.parametrize("stride", [2, 3, 17, 40])
def test_partition_is_full_before_metadata_would_be_cut_off(stride: int) -> None:
    """One record in ``stride`` stays unfinished, and no commit happens while records are fetched."""
    tracker, end = OffsetTracker(Commit(0)), 0
    while not tracker.is_full and end < 100_000:
        # A fetch that has started may still bring records to a full partition.
        track(tracker, range(end, end + 10))
        for offset in range(end, end + 10):
            if offset % stride:
                tracker.mark_finished(offset)
        end += 10
    unfinished = list(range(0, end, stride))
    assert end < 100_000, "the partition never becomes full"
    assert redelivered(tracker.commit(), end) == unfinished


@settings(cases, max_examples=30)
@given(share=st.floats(0.02, 0.98), late=st.floats(0, 1), number=st.integers(0, 2**32))
def test_metadata_is_never_cut_off_in_any_order_of_finishing(share: float, late: float, number: int) -> None:
    tracker, end, chance = OffsetTracker(Commit(0)), 0, random.Random(number)
    while not tracker.is_full and end < 5_000:
        for offset in track(tracker, range(end, end + 10)):
            if chance.random() < share:
                tracker.mark_finished(offset)
        end += 10
    for offset in list(tracker.unfinished):
        if chance.random() < late:
            tracker.mark_finished(offset)
    assert redelivered(tracker.commit(), end) == list(tracker.unfinished)


# -- redelivery and rebalances -----------------------------------------------------------------------------------------


def test_redelivered_record_is_not_tracked_twice() -> None:
    tracker = tracker_of(5, 6)
    assert tracker.track(5, "redelivered") is None
    assert tracker.unfinished == {5: "5", 6: "6"}
    finish(tracker, 5)
    assert tracker.track(5, "redelivered") is None
    assert tracker.commit() == Commit(6)


def test_untracked_offset_cannot_be_finished() -> None:
    tracker = tracker_of(5)
    assert not tracker.mark_finished(6)
    finish(tracker, 5)
    assert not tracker.mark_finished(5)
    assert tracker.commit() == Commit(6)


def test_known_finished_records_are_not_started_again() -> None:
    tracker = OffsetTracker(Commit(5, "kser:1,1"), finished=[(8, 9)])
    assert track(tracker, range(5, 10)) == [5, 7, 9]
    finish(tracker, 5)
    assert tracker.commit() == Commit(7, "kser:1,1")


def test_carried_over_record_is_not_started_again() -> None:
    tracker = tracker_of(5, carried_over={6: "started"})
    assert tracker.track(6, "6") == "started"
    assert tracker.track(7, "7") == "7"
    assert tracker.unfinished == {5: "5", 6: "started", 7: "7"}
    finish(tracker, 5)
    assert tracker.commit() == Commit(6)
    finish(tracker, 6)
    assert tracker.commit() == Commit(7)


def test_carried_over_record_finished_before_its_redelivery_stays_finished() -> None:
    tracker = OffsetTracker(Commit(5), carried_over={6: "started"})
    assert not tracker.mark_finished(6)
    assert redelivered(tracker.commit(), 8) == [5, 7]
    assert track(tracker, range(5, 8)) == [5, 7]
    finish(tracker, 5)
    assert tracker.commit() == Commit(7)


def test_fetch_position_does_not_pass_a_carried_over_record() -> None:
    tracker = OffsetTracker(Commit(5), carried_over={6: "started"})
    tracker.advance(9)
    assert tracker.commit() == Commit(5)
    tracker.mark_finished(6)
    tracker.advance(9)
    assert tracker.commit() == Commit(9)


def test_replacement_is_accepted_only_for_unfinished_records() -> None:
    tracker = OffsetTracker(Commit(5), carried_over={6: "started"})
    tracker.track(5, "first")
    assert tracker.replace(5, "second") and tracker.replace(6, "retry")
    assert not tracker.replace(7, "untracked")
    tracker.track(6, "redelivered")
    assert tracker.unfinished == {5: "second", 6: "retry"}


def test_started_records_survive_a_revocation_and_others_are_forgotten() -> None:
    tracker = finish(tracker_of(5, 6, 7, carried_over={7: "started", 9: "not redelivered"}), 5)
    tracker.revoke(lambda item: item != "6")
    assert tracker.revoked
    assert tracker.started() == {7: "started", 9: "not redelivered"}
    assert list(tracker.unfinished) == [6, 7]
    assert tracker.commit().offset == 6


def test_record_finished_after_a_revocation_is_finished_for_the_next_tracker() -> None:
    revoked = finish(tracker_of(5, 6, 7, 8), 6)
    revoked.revoke(lambda item: item in ("5", "7"))
    finish(revoked, 7)
    reassigned = OffsetTracker(Commit(5), finished=revoked.finished_ranges(), carried_over=revoked.started())
    assert track(reassigned, range(5, 10)) == [8, 9]
    assert reassigned.unfinished == {5: "5", 8: 8, 9: 9}


def test_pending_dead_letter_is_tracked_until_its_record_is_finished() -> None:
    tracker = tracker_of(5, 6)
    tracker.dead_letter_pending.add(5)
    finish(tracker, 6)
    assert tracker.dead_letter_pending == {5}
    finish(tracker, 5)
    assert tracker.dead_letter_pending == set()
