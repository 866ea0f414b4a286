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

#: Brokers refuse a commit with more, unless they are told otherwise.
BROKER_LIMIT = 4096

cases = settings(database=None, deadline=None, max_examples=300, print_blob=True)
edges = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple)
offsets = st.sets(st.integers(0, 80))


def given_out(*found: int, start: Commit | None = None, **more: Any) -> OffsetTracker:
    """A partition of which these records were handed out; what stands for each is its offset as a text."""
    tracker = OffsetTracker(start or Commit(found[0]), **more)
    for offset in found:
        tracker.track(offset, str(offset))
    return tracker


def finish(tracker: OffsetTracker, *found: int) -> OffsetTracker:
    for offset in found:
        assert tracker.mark_finished(offset)
    return tracker


def begun(tracker: OffsetTracker, found: Iterable[int]) -> list[int]:
    """Hand these records out; returns those that are to be begun."""
    return [offset for offset in found if tracker.track(offset, offset) == offset]


def runs_again(commit: Commit, end: int) -> list[int]:
    """Which offsets the next owner begins."""
    return begun(OffsetTracker(commit), range(commit.offset, end))


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
    found = list(ranges)
    assert all(start < end for start, end in found)
    assert all(one[1] < other[0] for one, other in pairwise(found)), "they are apart"


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_documented_metadata_example_is_decoded_as_explained() -> None:
    assert list(decode(Commit(100, "kser:1,14,2,3"))) == [(101, 121), (123, 126)]


@pytest.mark.parametrize("metadata", ["", "somebody else's", "kser", "kser:", "kser:1,x", "kser:1,,2", "kser:1;2"])
def test_metadata_of_another_format_is_ignored(metadata: str) -> None:
    assert list(decode(Commit(5, metadata))) == []


def test_metadata_that_ends_with_an_unfinished_run_is_decoded_up_to_there() -> None:
    assert list(decode(Commit(5, "kser:1,2,3"))) == [(6, 8)]


def test_commit_without_gaps_has_no_metadata() -> None:
    assert given_out(5, 6, 7).commit() == Commit(5)
    assert finish(given_out(5, 6, 7), 5).commit() == Commit(6)
    assert finish(given_out(5, 6, 7), 5, 6, 7).commit() == Commit(8)


@cases
@given(seen=offsets, finished=offsets, start=st.integers(0, 20))
def test_next_owner_starts_exactly_the_unfinished_records(seen: set[int], finished: set[int], start: int) -> None:
    records = sorted(offset for offset in seen if offset >= start)
    tracker = OffsetTracker(Commit(start))
    assert begun(tracker, records) == records
    for offset in finished & set(records):
        assert tracker.mark_finished(offset)
    unfinished = sorted(set(records) - finished)
    following = max(records, default=start - 1) + 1
    commit = tracker.commit()
    assert commit.offset == (unfinished[0] if unfinished else following)
    above = {offset for pair in decode(commit) for offset in range(*pair)}
    assert above == set(range(commit.offset, following)) - set(unfinished)
    assert runs_again(commit, following) == unfinished


@cases
@given(rounds=st.lists(st.tuples(st.integers(0, 12), st.randoms(use_true_random=False)), max_size=6))
def test_finished_records_stay_finished_from_owner_to_owner(rounds: list[tuple[int, Any]]) -> None:
    commit, finished, end = Commit(0), set[int](), 0
    for more, chance in rounds:
        tracker, end = OffsetTracker(commit), end + more
        given = begun(tracker, range(commit.offset, end))
        assert given == [offset for offset in range(end) if offset not in finished]
        for offset in given:
            if chance.random() < 0.5:
                finished.add(offset)
                tracker.mark_finished(offset)
        commit = tracker.commit()
        assert commit.offset == min(set(range(end)) - finished, default=end)


@cases
@given(finished=offsets, seen=st.integers(0, 80))
def test_owner_passes_on_metadata_of_records_it_has_not_received(finished: set[int], seen: int) -> None:
    first = given_out(*range(81))
    for offset in finished:
        first.mark_finished(offset)
    commit = first.commit()
    second = OffsetTracker(commit)
    begun(second, range(commit.offset, seen))
    assert runs_again(second.commit(), 81) == sorted(set(range(81)) - finished)


def test_offsets_missing_from_the_log_are_skipped() -> None:
    """Compacted topics and transactions leave holes."""
    tracker = finish(given_out(5, 9, 20), 5)
    assert tracker.commit().offset == 9
    finish(tracker, 9)
    assert tracker.commit().offset == 20
    finish(tracker, 20)
    assert tracker.commit() == Commit(21)


# -- the limit ---------------------------------------------------------------------------------------------------------


def every_other(count: int) -> OffsetTracker:
    """So many gaps that they do not fit."""
    tracker = given_out(*range(2 * count))
    return finish(tracker, *range(1, 2 * count, 2))


def test_metadata_beyond_the_limit_is_cut_off_between_two_runs() -> None:
    tracker = every_other(3000)
    commit = tracker.commit()
    assert METADATA_LIMIT - 50 < len(commit.metadata) <= METADATA_LIMIT < BROKER_LIMIT
    assert set(commit.metadata.removeprefix(PREFIX)) == {"1", ","}
    told = list(decode(commit))
    assert told == [(offset, offset + 1) for offset in range(1, 2 * len(told), 2)], "only what is finished is said"
    tracker.committed = commit
    assert tracker.is_full


def test_metadata_that_just_fits_is_not_cut_off() -> None:
    count = (METADATA_LIMIT - len(PREFIX) + 1) // 4
    commit = every_other(count).commit()
    assert METADATA_LIMIT - 4 < len(commit.metadata) <= METADATA_LIMIT
    assert len(list(decode(commit))) == count


def test_partition_with_few_gaps_is_not_full() -> None:
    tracker = every_other(10)
    assert not tracker.is_full
    tracker.committed = tracker.commit()
    assert not tracker.is_full


@pytest.mark.parametrize("stride", [2, 3, 17, 40])
def test_partition_is_full_before_metadata_would_be_cut_off(stride: int) -> None:
    """Records are taken in as long as it is not full, also between two commits; every so many stays unfinished."""
    tracker, end = OffsetTracker(Commit(0)), 0
    while not tracker.is_full and end < 100_000:
        # What is on its way may be taken in all the same.
        begun(tracker, range(end, end + 10))
        for offset in range(end, end + 10):
            if offset % stride:
                tracker.mark_finished(offset)
        end += 10
    unfinished = list(range(0, end, stride))
    assert end < 100_000, "it is never full"
    assert runs_again(tracker.commit(), end) == unfinished


@settings(cases, max_examples=30)
@given(share=st.floats(0.02, 0.98), late=st.floats(0, 1), number=st.integers(0, 2**32))
def test_metadata_is_never_cut_off_in_any_order_of_finishing(share: float, late: float, number: int) -> None:
    tracker, end, chance = OffsetTracker(Commit(0)), 0, random.Random(number)
    while not tracker.is_full and end < 5_000:
        for offset in begun(tracker, range(end, end + 10)):
            if chance.random() < share:
                tracker.mark_finished(offset)
        end += 10
    for offset in list(tracker.unfinished):
        if chance.random() < late:
            tracker.mark_finished(offset)
    assert runs_again(tracker.commit(), end) == list(tracker.unfinished)


# -- a partition that comes and goes -----------------------------------------------------------------------------------


def test_redelivered_record_is_not_tracked_twice() -> None:
    tracker = given_out(5, 6)
    assert tracker.track(5, "again") is None
    assert tracker.unfinished == {5: "5", 6: "6"}
    finish(tracker, 5)
    assert tracker.track(5, "again") is None
    assert tracker.commit() == Commit(6)


def test_untracked_offset_cannot_be_finished() -> None:
    tracker = given_out(5)
    assert not tracker.mark_finished(6)
    finish(tracker, 5)
    assert not tracker.mark_finished(5)
    assert tracker.commit() == Commit(6)


def test_known_finished_records_are_not_started_again() -> None:
    tracker = OffsetTracker(Commit(5, "kser:1,1"), finished=[(8, 9)])
    assert begun(tracker, range(5, 10)) == [5, 7, 9]
    finish(tracker, 5)
    assert tracker.commit() == Commit(7, "kser:1,1")


def test_carried_over_record_is_not_started_again() -> None:
    tracker = given_out(5, carried_over={6: "begun"})
    assert tracker.track(6, "6") == "begun"
    assert tracker.track(7, "7") == "7"
    assert tracker.unfinished == {5: "5", 6: "begun", 7: "7"}
    finish(tracker, 5)
    assert tracker.commit() == Commit(6)
    finish(tracker, 6)
    assert tracker.commit() == Commit(7)


def test_carried_over_record_finished_before_its_redelivery_stays_finished() -> None:
    tracker = OffsetTracker(Commit(5), carried_over={6: "begun"})
    assert not tracker.mark_finished(6)
    assert runs_again(tracker.commit(), 8) == [5, 7]
    assert begun(tracker, range(5, 8)) == [5, 7]
    finish(tracker, 5)
    assert tracker.commit() == Commit(7)


def test_replacement_is_accepted_only_for_unfinished_records() -> None:
    tracker = OffsetTracker(Commit(5), carried_over={6: "begun"})
    tracker.track(5, "first")
    assert tracker.replace(5, "second") and tracker.replace(6, "retry")
    assert not tracker.replace(7, "none")
    tracker.track(6, "fresh")
    assert tracker.unfinished == {5: "second", 6: "retry"}


def test_started_records_survive_a_revocation_and_others_are_forgotten() -> None:
    tracker = finish(given_out(5, 6, 7, carried_over={7: "kept", 9: "not seen again"}), 5)
    tracker.revoke(lambda item: item != "6")
    assert tracker.revoked
    assert tracker.started() == {7: "kept", 9: "not seen again"}
    assert list(tracker.unfinished) == [6, 7], "both are unfinished all the same"
    assert tracker.commit().offset == 6


def test_record_finished_after_a_revocation_is_finished_for_the_next_tracker() -> None:
    away = finish(given_out(5, 6, 7, 8), 6)
    away.revoke(lambda item: item in ("5", "7"))
    finish(away, 7)
    back = OffsetTracker(Commit(5), finished=away.finished_ranges(), carried_over=away.started())
    assert begun(back, range(5, 10)) == [8, 9]
    assert back.unfinished == {5: "5", 8: 8, 9: 9}


def test_pending_dead_letter_is_tracked_until_its_record_is_finished() -> None:
    tracker = given_out(5, 6)
    tracker.dead_letter_pending.add(5)
    finish(tracker, 6)
    assert tracker.dead_letter_pending == {5}
    finish(tracker, 5)
    assert tracker.dead_letter_pending == set()
