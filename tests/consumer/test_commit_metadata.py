"""Tests of the metadata of commits: it applies only where it was written, beside its offset, partition and topic."""

from __future__ import annotations

import logging

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kser.consumer.client import Commit, Partition
from kser.consumer.commit_metadata import BROKER_LIMIT, RETRY_INTERVAL, CommitMetadata, Validity
from kser.consumer.offsets import METADATA_LIMIT, decode
from tests.consumer.harness import DICE
from tests.support import Clock, lines

cases = settings(database=None, deadline=None, max_examples=200, print_blob=True)

LONG = "kser:" + ",".join(["1"] * 401)


def new_metadata(cluster: str = "one", topic_id: bytes = b"first", reset: str = "earliest") -> CommitMetadata:
    """Return the metadata of a new client that knows the id of the topic ``dice``."""
    metadata = CommitMetadata(reset, Clock())
    metadata.cluster = cluster
    if topic_id:
        metadata.learn_topic_id("dice", topic_id)
    return metadata


WRITTEN = new_metadata().write(DICE, Commit(5, "starts:2 kser:1,2"))


def test_metadata_applies_where_it_was_written() -> None:
    commit, validity = new_metadata().read(DICE, 5, WRITTEN)
    assert validity is Validity.VALID
    assert (list(decode(commit)), commit.word("starts:")) == ([(6, 8)], "2")


@pytest.mark.parametrize(
    ("key", "offset", "cluster"),
    [
        (DICE, 4, "one"),
        (DICE, 6, "one"),
        (Partition("dice", 1), 5, "one"),
        (Partition("cards", 0), 5, "one"),
        (DICE, 5, "two"),
    ],
)
def test_metadata_does_not_apply_elsewhere(key: Partition, offset: int, cluster: str) -> None:
    assert new_metadata(cluster).read(key, offset, WRITTEN) == (Commit(offset), Validity.MOVED)


@pytest.mark.parametrize("written", ["", "kser:1,2", "x", "of another program;12345678;", WRITTEN[:-9], f" {WRITTEN}"])
def test_metadata_of_another_program_is_ignored(written: str, caplog: pytest.LogCaptureFixture) -> None:
    assert new_metadata().start_of(DICE, 5, written) == (Commit(5), Validity.VALID)
    assert lines(caplog) == []


def test_text_behind_the_metadata_is_ignored() -> None:
    assert new_metadata().read(DICE, 5, f"{WRITTEN}\0garbage")[1] is Validity.VALID


@cases
@given(position=st.integers(0, len(WRITTEN) - 1), letter=st.characters())
@example(position=3, letter="\ud800")
def test_damaged_metadata_never_applies(position: int, letter: str) -> None:
    damaged = WRITTEN[:position] + letter + WRITTEN[position + 1 :]
    if damaged != WRITTEN:
        assert new_metadata().read(DICE, 5, damaged)[0] == Commit(5)


def test_metadata_of_an_old_topic_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    metadata = new_metadata(topic_id=b"second")
    for _ in range(3):
        assert metadata.start_of(DICE, 5, WRITTEN) == (Commit(5), Validity.OLD_TOPIC)
    assert len(lines(caplog, logging.ERROR)) == 1


def test_topic_id_of_the_metadata_applies_while_the_client_does_not_know_the_id() -> None:
    metadata = new_metadata(topic_id=b"")
    assert metadata.read(DICE, 5, WRITTEN)[1] is Validity.VALID
    assert metadata.write(DICE, Commit(5, "starts:2 kser:1,2")) == WRITTEN
    assert not metadata.learn_topic_id("dice", b"first")
    assert metadata.learn_topic_id("dice", b"second")


def test_all_partitions_of_a_new_topic_count_as_added() -> None:
    metadata = new_metadata(reset="latest")
    metadata.partition_counts.observe("dice", 4)
    assert not metadata.partition_counts.is_new_partition(DICE)
    metadata.learn_topic_id("dice", b"second")
    assert metadata.partition_counts.is_new_partition(DICE)
    assert Commit(5, metadata.write(DICE, Commit(5))).word("of:").startswith("0")


def test_longest_metadata_of_a_tracker_fits_with_all_words() -> None:
    metadata = new_metadata(reset="latest")
    metadata.partition_counts.observe("dice", 100_000)
    text = "kser:" + "1," * ((METADATA_LIMIT - 6) // 2) + "1"
    written = metadata.write(DICE, Commit(10**15, f"starts:20 {text}"))
    assert text in written and len(written) < BROKER_LIMIT


def test_metadata_shrinks_until_the_broker_accepts_it_and_grows_again(caplog: pytest.LogCaptureFixture) -> None:
    metadata = new_metadata()
    lengths = []
    while True:
        written = metadata.write(DICE, Commit(5, f"starts:2 {LONG}"))
        commit, validity = new_metadata().read(DICE, 5, written)
        assert validity is Validity.VALID and all(end <= 5 + 401 for _, end in decode(commit))
        lengths.append(len(written))
        if not metadata.shrink():
            break
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == 0
    assert metadata.is_disabled
    metadata._clock.advance(RETRY_INTERVAL)  # type: ignore[attr-defined]
    assert len(metadata.write(DICE, Commit(5, LONG))) == max(lengths) - len("starts:2 ")
    metadata.shrink()
    assert len(lines(caplog, logging.WARNING)) == 1


def test_commit_of_a_partition_that_has_not_restarted_belongs_to_the_old_topic() -> None:
    metadata = new_metadata()
    metadata.mark_started(DICE)
    assert metadata.learn_topic_id("dice", b"second")
    written = metadata.write(DICE, Commit(40))
    assert new_metadata(topic_id=b"second").read(DICE, 40, written)[1] is Validity.OLD_TOPIC
    metadata.mark_started(DICE)
    written = metadata.write(DICE, Commit(5))
    assert new_metadata(topic_id=b"second").read(DICE, 5, written)[1] is Validity.VALID


def test_repeated_commit_of_metadata_that_was_read_contains_each_word_once() -> None:
    """A proof of the membership commits what was read, and the next consumer reads the result."""
    written = ""
    lengths = set()
    for _ in range(5):
        metadata = new_metadata(reset="latest")
        metadata.mark_started(DICE)
        metadata.partition_counts.observe("dice", 4)
        commit = metadata.read(DICE, 5, written)[0] if written else Commit(5, "starts:2 kser:1,2")
        written = metadata.write(DICE, commit)
        lengths.add(len(written))
        assert [written.count(word) for word in ("id:", "of:", "starts:2", "kser:1,2")] == [1, 1, 1, 1]
    assert len(lengths) == 1


def test_repeated_commit_contains_the_current_words_of_the_client() -> None:
    metadata = new_metadata(topic_id=b"second", reset="latest")
    metadata.partition_counts.observe("dice", 8)
    written = metadata.write(DICE, Commit(5, "id:12345678 of:4 kser:1,2"))
    commit = metadata.read(DICE, 5, written)[0]
    assert (commit.word("of:"), commit.word("kser:")) == ("8", "1,2")
    assert commit.word("id:") != "12345678"
