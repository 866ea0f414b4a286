"""Tests of the fetch positions of the consumer client on librdkafka, with a scripted library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from kser.confluent import client as client_module
from kser.confluent.client import ConfluentClient
from kser.consumer.client import Commit, Partition
from kser.consumer.unreadable import UnreadableRecord
from kser.errors import ClientError
from tests.support import lines

DICE, COIN = Partition("dice", 0), Partition("coin", 0)
RESET, EOF, BAD = KafkaError._AUTO_OFFSET_RESET, KafkaError._PARTITION_EOF, KafkaError._BAD_MSG
NO_RESPONSE = KafkaException(KafkaError(KafkaError._TIMED_OUT))


class Message:
    """A message of librdkafka: a record, or an error."""

    def __init__(self, key: Partition, offset: int, code: int | None = None) -> None:
        self.topic = lambda: key.topic
        self.partition = lambda: key.partition
        self.offset = lambda: offset
        self.key = self.value = lambda: None
        self.error = lambda: None if code is None else KafkaError(code, "scripted")


class Library:
    """A consumer of librdkafka that has assigned ``dice[0]`` and ``coin[0]``. It plays the script of a test."""

    def __init__(self) -> None:
        #: The messages that each poll returns.
        self.polls: list[Sequence[Message]] = []
        #: The errors that the next calls of each method raise.
        self.failures: dict[str, list[Exception]] = {}
        self.ranges = {DICE: (20, 30), COIN: (0, 30)}
        self.ends_known = True
        #: The offset from which each partition is fetched, and the paused partitions.
        self.assigned: dict[Partition, int] = {}
        self.paused: set[Partition] = set()
        self.committed: dict[Partition, int] = {}
        self.queue: list[Message] = []

    def _fail(self, method: str) -> None:
        if errors := self.failures.get(method):
            raise errors.pop(0)

    def poll(self, timeout: float) -> Message | None:
        self.queue = list(self.polls.pop(0)) if self.polls else []
        return self.queue.pop(0) if self.queue else None

    def consume(self, limit: int, timeout: float) -> list[Message]:
        return self.queue

    def get_watermark_offsets(self, tp: Any, **keywords: Any) -> tuple[int, int]:
        if keywords.get("cached"):
            return self.ranges[Partition(tp.topic, tp.partition)] if self.ends_known else (-1001, -1001)
        self._fail("get_watermark_offsets")
        return self.ranges[Partition(tp.topic, tp.partition)]

    def incremental_unassign(self, partitions: Sequence[Any]) -> None:
        for tp in partitions:
            if self.assigned.pop(Partition(tp.topic, tp.partition), None) is None:
                raise KafkaException(KafkaError(KafkaError._INVALID_ARG))

    def incremental_assign(self, partitions: Sequence[Any]) -> None:
        self._fail("incremental_assign")
        self.assigned.update({Partition(tp.topic, tp.partition): tp.offset for tp in partitions})

    def pause(self, partitions: Sequence[Any]) -> None:
        self._fail("pause")
        self.paused |= {Partition(tp.topic, tp.partition) for tp in partitions}

    def resume(self, partitions: Sequence[Any]) -> None:
        self.paused -= {Partition(tp.topic, tp.partition) for tp in partitions}

    def commit(self, offsets: Sequence[Any], asynchronous: bool) -> Sequence[Any]:
        self._fail("commit")
        self.committed.update({Partition(tp.topic, tp.partition): tp.offset for tp in offsets})
        return offsets

    def close(self) -> None: ...


class _NoTopicIds:
    def poll(self, topics: Any) -> dict[str, bytes]:
        return {}

    def close(self) -> None: ...


class Listener:
    """A listener that records the resets."""

    def __init__(self) -> None:
        self.resets: list[Mapping[Partition, Commit]] = []

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        self.resets.append(starts)

    def on_lost(self, partitions: Any) -> None: ...


class Member:
    """A client on a scripted library, with a clock that the test steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library, self.listener, self.now = Library(), Listener(), 1000.0
        monkeypatch.setattr(client_module, "connect", lambda *args, **keywords: self.library)
        monkeypatch.setattr(client_module, "TopicIds", lambda *args: _NoTopicIds())
        monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        options = {"group.id": "g", "partition.assignment.strategy": "cooperative-sticky"}
        self.client: Any = ConfluentClient(options, "earliest", 1 << 20)
        self.client._listener = self.listener
        for key in (DICE, COIN):
            self.client._keys[key.topic, key.partition] = key
            self.client._positions[key] = self.library.assigned[key] = 10

    def poll(self, *messages: Message) -> dict[Partition, list[int]]:
        """Poll while the library has these messages, and return the offsets of the records."""
        self.library.polls = [messages] if messages else []
        batches = self.client.poll(0, 100, ())
        return {key: [record.offset for record in records] for key, records in batches.items()}

    def failed_poll(self) -> str:
        """Poll without records, and return the text of the error."""
        with pytest.raises(ClientError) as raised:
            self.poll()
        return raised.value.message

    def fail(self, method: str, count: int = 1) -> None:
        """Let the next calls of a method of the library fail."""
        self.library.failures[method] = [NO_RESPONSE] * count


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> Iterator[Member]:
    """Return a client whose partitions are at offset 10."""
    member = Member(monkeypatch)
    yield member
    member.client.close(5)


@pytest.mark.parametrize("method", ["get_watermark_offsets", "commit", "incremental_assign"])
def test_failed_reset_of_one_position_loses_no_record_of_another_partition(method: str, member: Member) -> None:
    member.fail(method)
    assert member.poll(Message(DICE, 10, RESET), Message(COIN, 10), Message(COIN, 11)) == {COIN: [10, 11]}
    assert member.poll(Message(COIN, 12)) == {COIN: [12]}
    assert member.client.positions()[COIN] == 13
    assert DICE in member.library.paused or DICE not in member.library.assigned
    member.failed_poll()
    member.now += 1
    assert member.poll() == {}
    assert member.library.assigned[DICE] == 20
    assert DICE not in member.library.paused
    assert member.library.committed == {DICE: 20}
    assert member.poll(Message(DICE, 20)) == {DICE: [20]}


@pytest.mark.parametrize("method", ["get_watermark_offsets", "commit", "incremental_assign"])
def test_reset_of_a_position_is_tried_each_second_until_it_succeeds(
    method: str, member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    member.fail(method, 5)
    member.poll(Message(DICE, 10, RESET))
    for tries_left in range(4, -1, -1):
        assert "did not answer the request in time" in member.failed_poll()
        assert len(member.library.failures[method]) == tries_left
        member.failed_poll()
        assert len(member.library.failures[method]) == tries_left, "the next try comes after a second"
        member.now += 1
    assert member.poll() == {}
    assert member.library.assigned[DICE] == 20
    (line,) = lines(caplog)
    assert line.startswith("dice[0]: the position 10 is out of range (20 to 30)")
    member.now += 1
    assert member.poll() == {}
    assert member.listener.resets == [{DICE: Commit(20)}]


def test_revoked_partition_is_not_reset(member: Member) -> None:
    member.fail("get_watermark_offsets", 9)
    member.poll(Message(DICE, 10, RESET))
    member.failed_poll()
    member.client._on_lost(None, [client_module.TopicPartition(*DICE)])
    member.now += 1
    assert member.poll(Message(COIN, 10)) == {COIN: [10]}
    assert member.client.lag() == {COIN: 19}


@pytest.mark.parametrize("ends_known", [True, False])
def test_partition_that_waits_for_its_reset_lags(ends_known: bool, member: Member) -> None:
    member.library.ends_known = ends_known
    member.fail("get_watermark_offsets")
    member.poll(Message(DICE, 10, RESET))
    member.failed_poll()
    assert member.client.lag() == ({DICE: 20, COIN: 20} if ends_known else {DICE: 1})
    member.library.ranges[DICE] = (0, 4)
    assert member.client.lag()[DICE] == 1, "the log was truncated below the position"


@pytest.mark.parametrize("restart_fails", [True, False])
def test_failed_restart_of_a_new_topic_blocks_no_other_partition(restart_fails: bool, member: Member) -> None:
    member.client._restarting.add(DICE)
    member.fail("commit" if restart_fails else "pause", 1 if restart_fails else 0)
    assert member.poll(Message(COIN, 10)) == {COIN: [10]}
    assert (DICE in member.client.positions()) is not restart_fails
    member.now += 1
    assert member.poll() == {}
    assert member.library.assigned[DICE] == 20


def _finished_searches(*searches: Any) -> Callable[..., Any]:
    remaining = [list(searches)]
    return lambda paused: remaining.pop() if remaining else []


@pytest.mark.parametrize("method", ["get_watermark_offsets", "incremental_assign"])
def test_unreadable_record_is_returned_although_the_fetch_behind_it_fails(
    method: str, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = UnreadableRecord(*DICE, 22, 24, "damaged")
    search = SimpleNamespace(partition=DICE, offset=22, unreadable=record)
    monkeypatch.setattr(member.client._damaged, "take_finished", _finished_searches(search))
    member.fail(method)
    assert member.poll() == {DICE: [22]}
    assert member.poll(Message(COIN, 10)) == {COIN: [10]}
    member.now += 1
    assert member.poll() == {}
    assert member.library.assigned[DICE] == 25
    assert member.library.committed == {}


def test_failed_pause_loses_no_unreadable_record(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    search = SimpleNamespace(partition=DICE, offset=22, unreadable=UnreadableRecord(*DICE, 22, 24, "damaged"))
    monkeypatch.setattr(member.client._damaged, "take_finished", _finished_searches(search))
    member.fail("pause")
    with pytest.raises(ClientError):
        member.client.poll(0, 100, {COIN})
    assert member.poll() == {DICE: [22]}


def test_records_behind_readable_again_data_wait_for_the_fetch_of_this_data(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = SimpleNamespace(partition=DICE, offset=22, unreadable=None)
    monkeypatch.setattr(member.client._damaged, "take_finished", _finished_searches(search))
    monkeypatch.setattr(member.client._damaged, "must_reconnect", lambda search: False)
    assert member.poll(Message(DICE, 25)) == {}
    assert member.poll(Message(DICE, 22)) == {DICE: [22]}


@pytest.mark.parametrize("behind", [[Message(DICE, 25)], [Message(DICE, 26, EOF)], [Message(DICE, 25, BAD)], []])
def test_search_begins_at_the_damaged_data_whatever_follows_in_the_same_fetch(
    behind: list[Message], member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[tuple[Partition, int]] = []
    monkeypatch.setattr(member.client._damaged, "search", lambda key, offset, error: searches.append((key, offset)))
    messages = [Message(DICE, 10), Message(DICE, 11, BAD), *behind, Message(COIN, 10)]
    assert member.poll(*messages) == {DICE: [10], COIN: [10]}
    assert searches == [(DICE, 11)]
