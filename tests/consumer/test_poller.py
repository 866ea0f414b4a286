"""Tests of the poller, turn by turn: fetching, commits, and client errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kser.consumer.client import Commit, Partition
from kser.consumer.poller import BUSY_POLL_TIMEOUT, SHUTDOWN_POLL_TIMEOUT
from kser.dummy.broker import InMemoryBroker
from kser.errors import BrokerUnavailable, ClientError
from tests.consumer.harness import (
    DICE,
    MANUAL_COMMIT,
    FaultyClient,
    FaultyConsumer,
    ScriptedTask,
    committed,
    new_consumer,
    send_messages,
)
from tests.support import Clock, lines, records

pytestmark = pytest.mark.usefixtures("bus")


def fault_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What was said of the client, by level and text."""
    own = [record for record in records(caplog, logging.INFO) if record.name == "kser.dummy.consumer"]
    return [(record.levelname, record.getMessage()) for record in own]


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_poll_fetches_no_more_than_the_in_flight_limit() -> None:
    send_messages(*"12345")
    consumer = FaultyConsumer(max_in_flight=3)
    poller = consumer._kser_poller
    assert [poller.poll_once(0), poller.poll_once(0)] == [3, 0]
    consumer._kser_worker_pool.step()
    assert poller.poll_once(0) == 1
    assert [limit for _, limit, _ in consumer.current_client.polls] == [3, 0, 1]


def test_full_consumer_keeps_polling_without_fetching() -> None:
    """A task may take hours: the group must hear of its member."""
    send_messages(*"123")
    consumer = FaultyConsumer({"auto_commit_interval_ms": 10}, max_in_flight=1)
    for _ in range(4):
        consumer._kser_poller.poll_once(0.05)
    assert [limit for _, limit, _ in consumer.current_client.polls] == [1, 0, 0, 0]
    assert consumer._kser_work_queue.in_flight == 1


def test_paused_or_stopping_poller_fetches_nothing_and_waits() -> None:
    send_messages("1")
    consumer = FaultyConsumer()
    consumer._kser_poller.paused = True
    assert consumer._kser_poller.poll_once(0.02) == 0
    consumer._kser_poller.paused, consumer._kser_poller.shutting_down = False, True
    assert consumer._kser_poller.poll_once(0.5) == 0
    assert [(timeout, limit) for timeout, limit, _ in consumer.current_client.polls] == [
        (0.02, 0),
        (SHUTDOWN_POLL_TIMEOUT, 0),
    ]


def test_blocked_partition_is_not_fetched() -> None:
    consumer = FaultyConsumer()
    consumer._kser_poller.poll_once(0)
    consumer._kser_partitions._trackers[DICE].dead_letter_pending.add(0)
    send_messages("1")
    assert consumer._kser_poller.poll_once(0) == 0
    assert consumer.current_client.polls[-1][2] == {DICE}


def test_poll_timeout_ends_at_the_next_commit() -> None:
    send_messages("1")
    clock = Clock()
    consumer = FaultyConsumer({"auto_commit_interval_ms": 300}, clock=clock)
    clock.advance(0.1)
    for _ in range(2):
        consumer._kser_poller.poll_once(0.5)
    first, second = (timeout for timeout, _, _ in consumer.current_client.polls)
    assert (first, second <= 0.3) == (0.5, True)


def test_poll_timeout_is_short_with_a_manual_commit_and_an_idle_worker() -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer._kser_poller.poll_once(0.5)
    consumer._kser_work_queue.get(0)
    consumer._kser_work_queue._idle_workers = 1
    consumer._kser_poller.poll_once(0.5)
    assert [timeout for timeout, _, _ in consumer.current_client.polls] == [0.5, BUSY_POLL_TIMEOUT]


def test_poll_timeout_is_zero_with_a_manual_commit_and_busy_workers() -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer._kser_poller.poll_once(0.5)
    # What it waits for instead is that something is begun or finished.
    consumer._kser_work_queue.waiters.wait = lambda predicate, timeout: None  # type: ignore[method-assign]
    consumer._kser_poller.poll_once(0.5)
    assert [timeout for timeout, _, _ in consumer.current_client.polls] == [0.5, 0]


# -- commits -----------------------------------------------------------------------------------------------------------


def test_commit_covers_all_partitions_and_only_pending_offsets(bus: InMemoryBroker) -> None:
    bus.create_topic("dice", 2)
    clock = Clock()
    consumer = FaultyConsumer({"auto_commit_interval_ms": 1000}, clock=clock)
    send_messages("1", partition=0)
    send_messages("2", "3", partition=1)
    for _ in range(10):
        consumer.step(timeout=0)
        clock.advance(0.5)
    assert consumer.current_client.commits == [{Partition("dice", 0): Commit(1), Partition("dice", 1): Commit(2)}]


def test_records_finished_above_the_lowest_unfinished_are_in_the_metadata() -> None:
    send_messages("1", "2", "3")
    consumer = FaultyConsumer(MANUAL_COMMIT, ordering="none")
    consumer._kser_poller.poll_once(0)
    first = consumer._kser_work_queue.get(0)
    assert first is not None
    consumer._kser_worker_pool.step()
    consumer._kser_poller.poll_once(0)
    assert consumer.current_client.commits == [{DICE: Commit(0, "kser:1,1")}]
    consumer.close()
    new_consumer().run_until_idle()
    assert ScriptedTask.ran == ["2", "1", "3"]


def test_commit_before_commits_started_records() -> None:
    send_messages("1", "2", "3")
    consumer = FaultyConsumer(MANUAL_COMMIT, commit="before", workers=2)
    assert consumer._kser_poller.poll_once(0) == 2
    consumer._kser_poller.poll_once(0)
    assert committed() == 0
    consumer._kser_work_queue.get(0)
    consumer._kser_poller.poll_once(0)
    assert (committed(), ScriptedTask.ran) == (1, [])


def test_commit_before_in_intervals_commits_started_records() -> None:
    send_messages("1", "2")
    clock = Clock()
    consumer = FaultyConsumer({"auto_commit_interval_ms": 1000}, commit="before", clock=clock)
    consumer._kser_poller.poll_once(0)
    consumer._kser_work_queue.get(0)
    clock.advance(0.9)
    consumer._kser_poller.poll_once(0)
    assert committed() == 0
    clock.advance(0.2)
    consumer._kser_poller.poll_once(0)
    assert (committed(), ScriptedTask.ran) == (1, [])


def test_commit_before_commits_started_records_at_a_revocation() -> None:
    send_messages("1", "2")
    consumer = FaultyConsumer({"auto_commit_interval_ms": 60_000}, commit="before")
    consumer._kser_poller.poll_once(0)
    consumer._kser_worker_pool.step()
    InMemoryBroker.at("").create_topic("dice", 2)
    consumer._kser_poller.poll_once(0)
    assert (ScriptedTask.ran, committed()) == (["1"], 1)


@pytest.mark.parametrize("config", [MANUAL_COMMIT, {"auto_commit_interval_ms": 10}])
def test_commit_never_commits_nothing(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1", "2")
    clock = Clock()
    consumer = FaultyConsumer(config, commit="never", clock=clock)
    consumer.run_until_idle()
    clock.advance(1)
    InMemoryBroker.at("").create_topic("dice", 2)
    consumer.step(timeout=0)
    consumer.close()
    assert (consumer.current_client.commits, committed(), ScriptedTask.ran) == ([], None, ["1", "2"])
    assert lines(caplog, logging.WARNING) == []


@pytest.mark.parametrize("commit", ["after", "before", "never"])
def test_consumer_without_a_group_commits_nothing_in_any_mode(commit: str, caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1", "2")
    consumer = FaultyConsumer({**MANUAL_COMMIT, "group_id": None}, commit=commit)
    consumer.run_until_idle()
    consumer.close()
    assert (consumer._kser_poller.mode, consumer.current_client.commits, ScriptedTask.ran) == ("never", [], ["1", "2"])
    assert len(lines(caplog, logging.WARNING)) == (commit != "never")


# -- faults ------------------------------------------------------------------------------------------------------------


def test_client_error_is_logged_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
    consumer = FaultyConsumer()
    for faults in ({"poll": "no broker"}, {"poll": "no broker"}, {"poll": "no topic"}, {}, {}):
        consumer.current_client.faults = faults
        assert consumer.step(timeout=0) == 0
    assert fault_lines(caplog) == [
        ("ERROR", "FaultyConsumer: no broker; trying again"),
        ("ERROR", "FaultyConsumer: no topic; trying again"),
        ("INFO", "FaultyConsumer: the Kafka client can poll again"),
    ]
    assert len(consumer.clients) == 1


def test_poll_backoff_grows_and_resets_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = FaultyConsumer()
    waits: list[float] = []
    monkeypatch.setattr(consumer._kser_poller._stop, "wait", waits.append)
    monkeypatch.setattr("random.uniform", lambda _low, high: high)
    consumer.current_client.faults = {"poll": "no broker"}
    for _ in range(9):
        consumer._kser_poller.poll_once(60)
    assert waits[:3] == sorted(waits[:3])
    assert waits[0] < 1 < waits[5] <= waits[-1] <= 10
    consumer.current_client.faults = {}
    consumer._kser_poller.poll_once(0)
    consumer.current_client.faults = {"poll": "no broker"}
    consumer._kser_poller.poll_once(60)
    assert waits[-1] == waits[0]


def test_failed_commit_is_retried(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1", "2")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer.current_client.faults = {"commit": "no coordinator"}
    assert consumer.step(timeout=0) == 2
    assert committed() == 0
    consumer.current_client.faults = {}
    consumer.step(timeout=0)
    assert committed() == 2
    assert fault_lines(caplog) == [
        ("ERROR", "FaultyConsumer: no coordinator; trying again"),
        ("INFO", "FaultyConsumer: the Kafka client can commit again"),
    ]


def test_commit_errors_and_poll_errors_are_logged_separately(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer.current_client.faults = {"commit": "no coordinator"}
    consumer.step(timeout=0)
    consumer.current_client.faults = {"poll": "no broker", "commit": "no coordinator"}
    consumer.step(timeout=0)
    consumer.current_client.faults = {}
    consumer.step(timeout=0)
    texts = [text.partition(": ")[2] for _, text in fault_lines(caplog)]
    assert texts == [
        "no coordinator; trying again",
        "no broker; trying again",
        "the Kafka client can poll again",
        "the Kafka client can commit again",
    ]


def test_fatal_client_is_replaced_and_running_records_are_not_run_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    send_messages("1", "2")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer._kser_poller.poll_once(0)
    item = consumer._kser_work_queue.get(0)
    assert item is not None
    consumer.current_client.faults = {"poll": ClientError("fenced", fatal=True)}
    consumer._kser_poller.poll_once(0)
    assert (consumer.assignment, consumer.current_client.closed) == (frozenset(), 1)
    assert consumer.run_until_idle() == 1
    assert (len(consumer.clients), consumer.assignment, ScriptedTask.ran) == (2, {DICE}, ["2"])
    consumer._kser_worker_pool._attempt(item)
    consumer.step(timeout=0)
    assert (ScriptedTask.ran, committed()) == (["2", "1"], 2)
    assert [text for _, text in fault_lines(caplog)] == [
        "FaultyConsumer: fenced; trying again",
        "FaultyConsumer: the Kafka client can poll again",
    ]


def test_fenced_client_commits_nothing_more() -> None:
    """The client that fenced it owns its partitions; its finished records are known when the partitions return."""
    send_messages("1", "2")
    consumer = FaultyConsumer({"auto_commit_interval_ms": 600_000}, max_in_flight=1)
    consumer._kser_poller.poll_once(0)
    consumer._kser_worker_pool.step()
    consumer.current_client.faults = {"poll": ClientError("fenced", fatal=True)}
    consumer._kser_poller.poll_once(0)
    assert committed() == 0
    consumer.current_client.faults = {}
    for _ in range(4):
        consumer.step(timeout=0)
    consumer.close()
    assert (ScriptedTask.ran, committed()) == (["1", "2"], 2)


@pytest.mark.parametrize("activity", ["poll", "commit", "lag"])
def test_unexpected_client_exception_is_logged_with_traceback_and_survived(
    activity: str, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = FaultyConsumer(MANUAL_COMMIT, max_in_flight=1, stall_timeout=0)
    send_messages("0", "1", "2")
    consumer._kser_poller.poll_once(0)
    consumer._kser_worker_pool.step()
    consumer.current_client.faults = {activity: RuntimeError("surprise")}
    consumer._kser_poller.poll_once(0)
    consumer._kser_poller.poll_once(0)
    (record,) = [record for record in records(caplog, logging.ERROR) if record.exc_info]
    assert "RuntimeError('surprise')" in record.getMessage()
    consumer.run_until_idle()
    assert len(consumer.clients) == 2
    assert (sorted(set(ScriptedTask.ran)), committed()) == (["0", "1", "2"], 3)


def test_repeated_unexpected_exception_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    consumer = FaultyConsumer(initial_faults={"poll": RuntimeError("surprise")})
    for _ in range(5):
        consumer._kser_poller.poll_once(0)
    assert len([record for record in records(caplog, logging.ERROR) if record.exc_info]) == 1


def test_client_that_cannot_be_reconnected_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(FaultyConsumer):
        def _kser_connect(self) -> FaultyClient:
            if len(self.clients) == 1:
                raise BrokerUnavailable("no broker answers")
            return super()._kser_connect()

    consumer = Gone()
    consumer.current_client.faults = {"poll": ClientError("fenced", fatal=True)}
    for _ in range(5):
        consumer._kser_poller.poll_once(0)
    assert fault_lines(caplog) == [
        ("ERROR", "Gone: fenced; trying again"),
        ("ERROR", "Gone: no broker answers; trying again"),
    ]
    assert not [record for record in records(caplog) if record.exc_info]


def test_new_client_does_not_commit_records_of_the_fenced_one() -> None:
    """Another consumer may own the partitions by now and be further ahead."""
    send_messages("1", "2", "3")
    clock = Clock()
    consumer = FaultyConsumer({"auto_commit_interval_ms": 1000}, commit="before", clock=clock)
    consumer.step(timeout=0)
    consumer.current_client.faults = {"poll": ClientError("fenced", fatal=True)}
    consumer._kser_poller.poll_once(0)
    other = new_consumer(MANUAL_COMMIT, commit="before")
    other.step(timeout=0)
    clock.advance(10)
    consumer._kser_poller.poll_once(0)
    assert consumer.current_client.commits == []


def test_failed_subscription_closes_the_client() -> None:
    made: list[FaultyClient] = []

    class Failing(FaultyConsumer):
        def _kser_connect(self) -> FaultyClient:
            made.append(super()._kser_connect())
            return made[-1]

    with pytest.raises(ClientError):
        Failing(initial_faults={"subscribe": "no"})
    assert [client.closed for client in made] == [1]


def test_unexpected_error_of_the_final_commit_closes_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    send_messages("1")
    consumer = FaultyConsumer()
    consumer.step(timeout=0)
    consumer.current_client.faults = {"commit": RuntimeError("surprise")}
    consumer.close()
    assert (consumer.current_client.closed, committed()) == (1, 0)
    assert "RuntimeError('surprise')" in lines(caplog, logging.ERROR)[0]


def test_uncommitted_records_are_logged_at_close(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1", "2")
    consumer = FaultyConsumer()
    consumer.step(timeout=0)
    consumer.current_client.faults = {"commit": "no coordinator"}
    consumer.close()
    assert (consumer.current_client.closed, committed()) == (1, 0)
    assert lines(caplog, logging.WARNING) == [
        "FaultyConsumer: no coordinator; trying again",
        "FaultyConsumer: finished messages could not be committed and will be redelivered: dice[0] up to offset 2",
    ]


# -- a process that was stopped ----------------------------------------------------------------------------------------

SHORT_SESSION = {"session_timeout_ms": 6000}


def test_group_lease_expiry_delays_records_until_a_commit_succeeds() -> None:
    send_messages("1", "2")
    clock = Clock()
    consumer = FaultyConsumer(SHORT_SESSION, clock=clock)
    consumer._kser_poller.poll_once(0)
    clock.advance(3)
    consumer.current_client.faults["commit"] = ClientError("no member any more", transient=True)
    consumer._kser_poller.poll_once(0)
    assert consumer._kser_work_queue.get(0) is None
    del consumer.current_client.faults["commit"]
    consumer._kser_poller.poll_once(0)
    assert consumer._kser_work_queue.get(0) is not None
