"""Tests of unreadable records: a range of offsets fails as one record, without running any code."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kser.consumer.client import Commit
from kser.consumer.dead_letters import PREFIX
from kser.consumer.offsets import OffsetTracker, decode
from kser.consumer.unreadable import UnreadableRecord, decoding_notes
from kser.controller import Controller
from kser.dummy.broker import DummyRecord, InMemoryBroker
from tests.consumer.harness import DICE, MANUAL_COMMIT, ScriptedTask, committed, new_consumer, send_messages
from tests.consumer.queue_under_test import QueueUnderTest
from tests.support import lines

REASON = "CorruptRecordError: the checksum is wrong"


def send_unreadable(count: int) -> UnreadableRecord:
    """Append unreadable data to the topic ``dice``; it takes the place of ``count`` records."""
    log = InMemoryBroker.at("").topics["dice"][0]
    first = len(log)
    record = UnreadableRecord("dice", 0, first, first + count - 1, REASON)
    # The in-memory broker finds a record by its offset, so each offset of the range needs an entry.
    log.extend([record] * count)
    return record


@pytest.fixture
def between_messages(bus: InMemoryBroker) -> UnreadableRecord:
    """Send unreadable data for the offsets 1 to 3, between the messages ``a`` and ``b``."""
    send_messages("a", partition=0)
    record = send_unreadable(3)
    send_messages("b", partition=0)
    return record


def test_consumer_fails_unreadable_data_and_continues_behind_it(
    between_messages: UnreadableRecord, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[Any] = []
    run = Controller.run
    monkeypatch.setattr(Controller, "run", lambda value: handled.append(value) or run(value))
    consumer = new_consumer(MANUAL_COMMIT)
    consumer.run_until_idle()
    assert ScriptedTask.ran == ["a", "b"]
    assert len(handled) == 2, "the controller saw the unreadable data"
    assert consumer.counts["failed"] == 1
    assert committed() == 5
    (line,) = lines(caplog, logging.ERROR)
    assert "offsets 1 to 3 of dice[0] cannot be read" in line
    assert REASON in line


def test_unreadable_data_of_one_record_is_named_by_its_offset(
    bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    send_messages("a", partition=0)
    send_unreadable(1)
    new_consumer(MANUAL_COMMIT).run_until_idle()
    assert "offset 1 of dice[0] cannot be read" in "\n".join(lines(caplog, logging.ERROR))


def test_log_line_names_fetches_only_of_data_that_was_fetched_again(
    bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    data = [UnreadableRecord("dice", 0, 0, 0, REASON), UnreadableRecord("dice", 0, 1, 1, REASON, tries=0)]
    bus.create_topic("dice")
    bus.topics["dice"][0].extend(data)
    new_consumer(MANUAL_COMMIT).run_until_idle()
    first, second = lines(caplog, logging.ERROR)
    assert f"skips this data after 3 more fetches, each over a new connection: {REASON}; check" in first
    assert f"skips this data: {REASON}; check" in second


@pytest.mark.parametrize("ordering", ["key", "partition", "none"])
@pytest.mark.parametrize("commit", ["after", "before", "never"])
def test_unreadable_data_stops_no_consumer(between_messages: UnreadableRecord, ordering: str, commit: str) -> None:
    options = {**MANUAL_COMMIT, "auto_offset_reset": "earliest"}
    consumer = new_consumer(options, ordering=ordering, commit=commit)
    # With commit="before", each poll returns one entry of the log, and two of the entries are no records.
    for _ in range(10):
        consumer.step(timeout=0)
    assert ScriptedTask.ran == ["a", "b"]
    assert consumer.counts["failed"] == 1
    assert committed() == (None if commit == "never" else 5)


def test_dead_letter_of_unreadable_data_has_its_range_and_no_value(between_messages: UnreadableRecord) -> None:
    consumer = new_consumer(MANUAL_COMMIT, dead_letter=True)
    consumer.run_until_idle()
    (letter,) = [record for log in InMemoryBroker.at("").topics["dice.dlq"] for record in log]
    headers = {name.removeprefix(PREFIX): value for name, value in letter.headers}
    assert not letter.value
    assert (headers["reason"], headers["offset"], headers["last-offset"]) == (b"unreadable", b"1", b"3")
    assert headers["error-message"] == REASON.encode()
    assert committed() == 5


def test_dead_letter_says_that_the_headers_of_its_record_could_not_be_decoded() -> None:
    class HeaderlessRecord(DummyRecord):
        headers_error = "invalid start byte"

    record = HeaderlessRecord("dice", 0, 0, None, b"{", 0, ())
    assert decoding_notes(record) == {"headers-error": "invalid start byte"}


def test_readable_record_needs_no_note_in_its_dead_letter() -> None:
    assert decoding_notes(DummyRecord("dice", 0, 0, None, b"{", 0, ())) == {}


# -- the offset tracker ------------------------------------------------------------------------------------------------


def tracker_with_range(**options: Any) -> OffsetTracker:
    """Return a tracker of the records 0, 1 to 3, and 4."""
    tracker = OffsetTracker(Commit(0), **options)
    tracker.track(0, "a")
    tracker.track(1, "unreadable")
    tracker.extend(1, 3)
    tracker.track(4, "b")
    return tracker


def test_no_offset_of_unreadable_data_counts_as_finished_before_its_record() -> None:
    """The data may become readable, for example because another replica becomes the leader."""
    tracker = tracker_with_range()
    tracker.mark_finished(0)
    tracker.mark_finished(4)
    commit = tracker.commit()
    assert commit.offset == 1
    assert [offset for offset in range(1, 6) if offset in decode(commit)] == [4]
    assert list(tracker.finished_ranges()) == [(0, 1), (4, 5)]


def test_all_offsets_of_unreadable_data_finish_together() -> None:
    tracker = tracker_with_range()
    for offset in (0, 4, 1):
        tracker.mark_finished(offset)
    assert tracker.commit() == Commit(5)


def test_unreadable_data_starts_at_its_first_unfinished_offset() -> None:
    tracker = OffsetTracker(Commit(0), finished=[(0, 2), (3, 4)])
    assert tracker.first_unfinished(0, 3) == 2
    tracker.track(2, "unreadable")
    tracker.extend(2, 3)
    tracker.mark_finished(2)
    assert tracker.commit() == Commit(4)


def test_finished_unreadable_data_is_not_started_again() -> None:
    tracker = OffsetTracker(Commit(0), finished=[(0, 4)])
    assert tracker.first_unfinished(0, 3) == 3
    assert tracker.track(3, "unreadable") is None


def returned_tracker(revoked: OffsetTracker) -> OffsetTracker:
    """Return the tracker of a partition that was revoked and has returned."""
    revoked.revoke(lambda item: True)
    return OffsetTracker(revoked.commit(), revoked.finished_ranges(), revoked.started(), revoked.last_offsets)


def test_unreadable_data_finished_before_its_redelivery_finishes_as_a_whole() -> None:
    tracker = returned_tracker(returned_tracker(tracker_with_range()))
    tracker.mark_finished(1)
    assert [offset for offset in range(6) if offset in decode(tracker.commit())] == [1, 2, 3]
    assert tracker.track(0, "a") == "a"
    assert tracker.first_unfinished(1, 3) == 3
    assert tracker.track(3, "again") is None
    tracker.extend(3, 3)
    tracker.track(4, "b")
    for offset in (0, 4):
        tracker.mark_finished(offset)
    assert tracker.commit() == Commit(5)


def test_unreadable_data_finished_after_its_redelivery_finishes_as_a_whole() -> None:
    tracker = returned_tracker(tracker_with_range())
    tracker.track(0, "a")
    assert tracker.first_unfinished(1, 3) == 1
    assert tracker.track(1, "again") == "unreadable"
    tracker.extend(1, 3)
    tracker.track(4, "b")
    for offset in (0, 4, 1):
        tracker.mark_finished(offset)
    assert tracker.commit() == Commit(5)


@pytest.mark.parametrize("redelivered_first", [True, False])
def test_unreadable_data_whose_partition_is_revoked_and_returns_is_handled_once(redelivered_first: bool) -> None:
    queue = QueueUnderTest()
    unreadable: Any = UnreadableRecord("dice", 0, 0, 9, REASON)
    queue.fetch(unreadable)
    item = queue.start_next()
    queue.revoke_and_reassign()
    if redelivered_first:
        queue.fetch(unreadable)
    queue.task_done(item)
    queue.fetch(unreadable)
    assert queue.start_all() == []
    assert queue.partitions.commits() == {DICE: Commit(10)}
