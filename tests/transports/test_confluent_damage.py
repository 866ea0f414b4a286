"""Tests of the search for the end of data that librdkafka cannot decode, with scripted probes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from kser.confluent import damage
from kser.confluent.client import ConfluentClient
from kser.confluent.damage import MAX_REFETCHES, DamagedPartitions, DamageSearch
from kser.confluent.records import ConfluentRecord
from kser.consumer.client import Partition
from kser.consumer.unreadable import FETCH_TRIES, UnreadableRecord
from tests.support import lines, wait_until

DICE = Partition("dice", 0)
BAD = KafkaError(KafkaError._BAD_MSG, "checksum")


class Event:
    """An event of a client of librdkafka: a record, or an error."""

    def __init__(self, offset: int, code: int | None = None) -> None:
        self._offset = offset
        self._error = None if code is None else KafkaError(code, "scripted")

    def offset(self) -> int:
        return self._offset

    def error(self) -> KafkaError | None:
        return self._error


class Unconnectable:
    """The place of a client that cannot be created.

    :param error: the error.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error


class DamagedLog:
    """A partition with batches, of which some are damaged. It creates the clients that read it.

    :param bases: the first offset of each batch.
    :param damaged: the first offset of each damaged batch.
    :param end: the end of the partition.
    """

    def __init__(self, bases: Sequence[int], damaged: Sequence[int], end: int) -> None:
        self.bases, self.damaged, self.end = bases, damaged, end
        self.clients = 0
        #: The number of clients that find the data damaged; the other clients can read all.
        self.unlucky_clients = 1_000_000
        #: The events or exceptions of the first clients.
        self.scripted: list[Any] = []

    def connect(self, options: Any, **keywords: Any) -> Any:
        """Return a client."""
        self.clients += 1
        number = self.clients
        script = self.scripted.pop(0) if self.scripted else None
        if isinstance(script, Unconnectable):
            raise script.error
        assigned: list[int] = []

        def poll(timeout: float) -> Any:
            if isinstance(script, Exception):
                raise script
            return script or self._event(assigned[0], number <= self.unlucky_clients)

        return SimpleNamespace(
            assign=lambda partitions: assigned.append(partitions[0].offset), poll=poll, close=lambda: None
        )

    def _event(self, offset: int, is_unlucky: bool) -> Event:
        if offset >= self.end:
            return Event(self.end, KafkaError._PARTITION_EOF)
        base = max(base for base in self.bases if base <= offset)
        return Event(base, KafkaError._BAD_MSG) if base in self.damaged and is_unlucky else Event(offset)


def search(log: DamagedLog, offset: int, monkeypatch: pytest.MonkeyPatch) -> DamageSearch:
    """Return a search that has ended."""
    monkeypatch.setattr(damage.confluent_kafka, "Consumer", log.connect)
    monkeypatch.setattr(damage, "PROBE_INTERVAL", 0)
    search = DamageSearch({}, DICE, offset, BAD)
    search.run()
    return search


@pytest.mark.parametrize(
    ("bases", "damaged", "end", "start", "last"),
    [
        ([0, 1, 2], [1], 3, 1, 1),
        ([0, 3, 6], [3], 9, 3, 5),
        ([0, 3, 6], [3], 9, 4, 5),
        ([0, 3, 6], [3, 6], 9, 3, 5),
        ([0, 3, 6], [6], 9, 6, 8),
        ([0], [0], 1, 0, 0),
        ([0, 10_001, 10_002], [0], 10_003, 0, 10_000),
        ([0, 4096], [0], 4097, 0, 4095),
    ],
)
def test_search_finds_the_last_offset_of_the_damaged_batch(
    bases: list[int], damaged: list[int], end: int, start: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = DamagedLog(bases, damaged, end)
    record = search(log, start, monkeypatch).unreadable
    assert record is not None
    assert (record.topic, record.partition, record.offset, record.last_offset) == ("dice", 0, start, last)
    assert "_BAD_MSG" in record.reason
    assert log.clients < 40, "the search is too slow for a large batch"


@pytest.mark.parametrize("unlucky", range(FETCH_TRIES))
def test_data_that_one_of_three_new_clients_can_read_is_not_skipped(
    unlucky: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = DamagedLog([0, 3], [3], 6)
    log.unlucky_clients = unlucky
    assert search(log, 3, monkeypatch).unreadable is None
    assert log.clients == unlucky + 1


@pytest.mark.parametrize(
    "problem",
    [
        KafkaException(KafkaError(KafkaError._TRANSPORT)),
        Event(0, KafkaError._ALL_BROKERS_DOWN),
        Event(0, KafkaError.TOPIC_AUTHORIZATION_FAILED),
        OSError(24, "Too many open files"),
        Unconnectable(KafkaException(KafkaError(KafkaError._CRIT_SYS_RESOURCE, "Too many open files"))),
        Unconnectable(MemoryError()),
    ],
)
def test_trouble_of_the_broker_skips_nothing(
    problem: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = DamagedLog([0, 3], [], 6)
    log.scripted = [problem] * 5
    assert search(log, 3, monkeypatch).unreadable is None
    assert log.clients == 6
    (line,) = lines(caplog)
    assert line.startswith("dice[0] waits: the data at offset 3 cannot be decoded")


def test_data_that_retention_has_deleted_meanwhile_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    log = DamagedLog([0, 3], [3], 6)
    log.scripted = [Event(3, KafkaError._AUTO_OFFSET_RESET)]
    assert search(log, 3, monkeypatch).unreadable is None


@pytest.mark.parametrize("has_failed_to_start", [True, False])
def test_search_without_a_result_is_started_again_and_accuses_no_connection(
    has_failed_to_start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        if has_failed_to_start:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(damage.confluent_kafka, "Consumer", DamagedLog([0, 3], [0], 6).connect)
    partitions = DamagedPartitions({})
    with monkeypatch.context() as broken:
        # A thread that does nothing stands for one that an error has killed.
        broken.setattr(DamageSearch, "start" if has_failed_to_start else "run", fail)
        partitions.search(DICE, 0, BAD)
        assert partitions.take_finished(()) == []
    assert partitions.partitions == {DICE}
    finished: list[DamageSearch] = []
    wait_until(lambda: finished.extend(partitions.take_finished(())) or finished)
    assert finished[0].unreadable is not None
    assert (finished[0].unreadable.offset, finished[0].unreadable.last_offset) == (0, 2)


def test_probe_that_cannot_be_closed_has_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    log = DamagedLog([0, 3], [3], 6)

    def fail() -> None:
        raise RuntimeError("scripted")

    def connect(options: Any, **keywords: Any) -> Any:
        client = log.connect(options)
        client.close = fail
        return client

    monkeypatch.setattr(damage.confluent_kafka, "Consumer", connect)
    search = DamageSearch({}, DICE, 3, BAD)
    search.run()
    assert search.unreadable == UnreadableRecord("dice", 0, 3, 5, search._reason)


def test_search_in_a_revoked_partition_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    log = DamagedLog([0], [0], 1)
    log.scripted = [KafkaException(KafkaError(KafkaError._TRANSPORT))] * 1_000_000
    monkeypatch.setattr(damage.confluent_kafka, "Consumer", log.connect)
    partitions = DamagedPartitions({})
    partitions.search(DICE, 0, BAD)
    running = partitions._searches[DICE]
    partitions.forget([DICE])
    running.join(10)
    assert not running.is_alive()
    assert not partitions.partitions


def test_finished_search_in_a_paused_partition_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage.confluent_kafka, "Consumer", DamagedLog([0, 3], [0], 6).connect)
    partitions = DamagedPartitions({})
    partitions.search(DICE, 0, BAD)
    partitions.search(DICE, 0, BAD)
    partitions._searches[DICE].join(10)
    assert not partitions.take_finished({DICE})
    (finished,) = partitions.take_finished(())
    assert finished.unreadable == UnreadableRecord("dice", 0, 0, 2, finished.unreadable.reason)
    assert not partitions.take_finished(())


def test_connection_that_damages_data_each_time_is_replaced() -> None:
    partitions = DamagedPartitions({})
    first, second = DamageSearch({}, DICE, 3, BAD), DamageSearch({}, DICE, 4, BAD)
    assert [partitions.must_reconnect(first) for _ in range(MAX_REFETCHES)] == [False] * MAX_REFETCHES
    assert not partitions.must_reconnect(second)
    for _ in range(MAX_REFETCHES):
        assert not partitions.must_reconnect(first)
    assert partitions.must_reconnect(first)


def test_probe_has_no_callback_and_no_membership_of_the_client() -> None:
    options = {
        "bootstrap.servers": "x",
        "error_cb": print,
        "stats_cb": print,
        "group.instance.id": "i",
        "group.id": "g",
    }
    assert DamageSearch(options, DICE, 0, BAD)._options == {"bootstrap.servers": "x", "group.id": "g"}


@pytest.mark.parametrize(("options", "checks"), [({}, True), ({"check.crcs": False}, False)])
def test_client_checks_checksums_unless_the_user_decides_otherwise(options: dict[str, Any], checks: bool) -> None:
    client = ConfluentClient({"bootstrap.servers": "127.0.0.1:1", "group.id": "g", **options}, "earliest", 1 << 20)
    try:
        assert client._damaged._options["check.crcs"] is checks
    finally:
        client.close(5)


class MessageWithBadHeaders:
    """A message of librdkafka whose second ``headers()`` would end the process."""

    calls = 0

    def headers(self) -> Any:
        self.calls += 1
        assert self.calls == 1, "the second call would end the process"
        raise SystemError("returned a result with an exception set") from UnicodeDecodeError(
            "utf-8", b"\xff", 0, 1, "invalid start byte"
        )

    def offset(self) -> int:
        return 0

    def key(self) -> None:
        return None

    value = key


def test_headers_that_cannot_be_decoded_are_read_once() -> None:
    record = ConfluentRecord(MessageWithBadHeaders(), "dice", 0)
    assert record.headers_error is None
    for _ in range(20):
        assert record.headers == ()
    assert record.headers_error is not None
    assert "invalid start byte" in record.headers_error
