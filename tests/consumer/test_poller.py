"""Tests of the poller, turn by turn: fetching, commits, and client errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kser.consumer.client import Commit, Partition
from kser.consumer.poller import BUSY_POLL_TIMEOUT, SHUTDOWN_POLL_TIMEOUT
from kser.dummy.broker import InMemoryBroker
from kser.errors import BrokerUnavailable, ClientError
from tests.consumer.harness import AT_ONCE, DICE, Act, Client, Troubled, committed, consumer_of, put
from tests.support import Clock, lines, records

pytestmark = pytest.mark.usefixtures("bus")


def trouble_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What was said of the client, by level and text."""
    own = [record for record in records(caplog, logging.INFO) if record.name == "kser.dummy.consumer"]
    return [(record.levelname, record.getMessage()) for record in own]


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_poll_fetches_no_more_than_the_in_flight_limit() -> None:
    put(*"12345")
    consumer = Troubled(max_in_flight=3)
    poller = consumer._kser_poller
    assert [poller.poll_once(0), poller.poll_once(0)] == [3, 0]
    consumer._kser_worker_pool.step()
    assert poller.poll_once(0) == 1
    assert [limit for _, limit, _ in consumer.used.polls] == [3, 0, 1]


def test_full_consumer_keeps_polling_without_fetching() -> None:
    """A task may take hours: the group must hear of its member."""
    put(*"123")
    consumer = Troubled({"auto_commit_interval_ms": 10}, max_in_flight=1)
    for _ in range(4):
        consumer._kser_poller.poll_once(0.05)
    assert [limit for _, limit, _ in consumer.used.polls] == [1, 0, 0, 0]
    assert consumer._kser_work_queue.in_flight == 1


def test_paused_or_stopping_poller_fetches_nothing_and_waits() -> None:
    put("1")
    consumer = Troubled()
    consumer._kser_poller.paused = True
    assert consumer._kser_poller.poll_once(0.02) == 0
    consumer._kser_poller.paused, consumer._kser_poller.shutting_down = False, True
    assert consumer._kser_poller.poll_once(0.5) == 0
    assert [(timeout, limit) for timeout, limit, _ in consumer.used.polls] == [(0.02, 0), (SHUTDOWN_POLL_TIMEOUT, 0)]


def test_blocked_partition_is_not_fetched() -> None:
    consumer = Troubled()
    consumer._kser_poller.poll_once(0)
    consumer._kser_partitions._trackers[DICE].dead_letter_pending.add(0)
    put("1")
    assert consumer._kser_poller.poll_once(0) == 0
    assert consumer.used.polls[-1][2] == {DICE}


def test_poll_timeout_ends_at_the_next_commit() -> None:
    put("1")
    consumer = Troubled({"auto_commit_interval_ms": 300})
    Clock(consumer).pass_by(0.1)
    for _ in range(2):
        consumer._kser_poller.poll_once(0.5)
    first, second = (timeout for timeout, _, _ in consumer.used.polls)
    assert (first, second <= 0.3) == (0.5, True)


def test_poll_timeout_is_short_with_a_manual_commit_and_an_idle_worker() -> None:
    put("1")
    consumer = Troubled(AT_ONCE)
    consumer._kser_poller.poll_once(0.5)
    consumer._kser_work_queue.get(0)
    consumer._kser_work_queue._idle_workers = 1
    consumer._kser_poller.poll_once(0.5)
    assert [timeout for timeout, _, _ in consumer.used.polls] == [0.5, BUSY_POLL_TIMEOUT]


def test_poll_timeout_is_zero_with_a_manual_commit_and_busy_workers() -> None:
    put("1")
    consumer = Troubled(AT_ONCE)
    consumer._kser_poller.poll_once(0.5)
    # What it waits for instead is that something is begun or finished.
    consumer._kser_work_queue.waiters.wait = lambda predicate, timeout: None  # type: ignore[method-assign]
    consumer._kser_poller.poll_once(0.5)
    assert [timeout for timeout, _, _ in consumer.used.polls] == [0.5, 0]


# -- commits -----------------------------------------------------------------------------------------------------------


def test_commit_covers_all_partitions_and_only_pending_offsets(bus: InMemoryBroker) -> None:
    bus.create_topic("dice", 2)
    consumer = Troubled({"auto_commit_interval_ms": 1000})
    clock = Clock(consumer)
    put("1", partition=0)
    put("2", "3", partition=1)
    for _ in range(10):
        consumer.step(timeout=0)
        clock.pass_by(0.5)
    assert consumer.used.commits == [{Partition("dice", 0): Commit(1), Partition("dice", 1): Commit(2)}]


def test_records_finished_above_the_lowest_unfinished_are_in_the_metadata() -> None:
    put("1", "2", "3")
    consumer = Troubled(AT_ONCE, ordering="none")
    consumer._kser_poller.poll_once(0)
    first = consumer._kser_work_queue.get(0)
    assert first is not None
    consumer._kser_worker_pool.step()
    consumer._kser_poller.poll_once(0)
    assert consumer.used.commits == [{DICE: Commit(0, "kser:1,1")}]
    consumer.close()
    consumer_of().run_until_idle()
    assert Act.seen == ["2", "1", "3"]


def test_commit_before_commits_started_records() -> None:
    put("1", "2", "3")
    consumer = Troubled(AT_ONCE, commit="before", workers=2)
    assert consumer._kser_poller.poll_once(0) == 2
    consumer._kser_poller.poll_once(0)
    assert committed() == 0
    consumer._kser_work_queue.get(0)
    consumer._kser_poller.poll_once(0)
    assert (committed(), Act.seen) == (1, [])


def test_commit_before_in_intervals_commits_started_records() -> None:
    put("1", "2")
    consumer = Troubled({"auto_commit_interval_ms": 1000}, commit="before")
    clock = Clock(consumer)
    consumer._kser_poller.poll_once(0)
    consumer._kser_work_queue.get(0)
    clock.pass_by(0.9)
    consumer._kser_poller.poll_once(0)
    assert committed() == 0
    clock.pass_by(0.2)
    consumer._kser_poller.poll_once(0)
    assert (committed(), Act.seen) == (1, [])


def test_commit_before_commits_started_records_at_a_revocation() -> None:
    put("1", "2")
    consumer = Troubled({"auto_commit_interval_ms": 60_000}, commit="before")
    consumer._kser_poller.poll_once(0)
    consumer._kser_worker_pool.step()
    InMemoryBroker.at("").create_topic("dice", 2)
    consumer._kser_poller.poll_once(0)
    assert (Act.seen, committed()) == (["1"], 1)


@pytest.mark.parametrize("config", [AT_ONCE, {"auto_commit_interval_ms": 10}])
def test_commit_never_commits_nothing(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    consumer = Troubled(config, commit="never")
    clock = Clock(consumer)
    consumer.run_until_idle()
    clock.pass_by(1)
    InMemoryBroker.at("").create_topic("dice", 2)
    consumer.step(timeout=0)
    consumer.close()
    assert (consumer.used.commits, committed(), Act.seen) == ([], None, ["1", "2"])
    assert lines(caplog, logging.WARNING) == []


@pytest.mark.parametrize("commit", ["after", "before", "never"])
def test_consumer_without_a_group_commits_nothing_in_any_mode(commit: str, caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    consumer = Troubled({**AT_ONCE, "group_id": None}, commit=commit)
    consumer.run_until_idle()
    consumer.close()
    assert (consumer._kser_poller.mode, consumer.used.commits, Act.seen) == ("never", [], ["1", "2"])
    assert len(lines(caplog, logging.WARNING)) == (commit != "never")


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_client_error_is_logged_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
    consumer = Troubled()
    for trouble in ({"poll": "no broker"}, {"poll": "no broker"}, {"poll": "no topic"}, {}, {}):
        consumer.used.trouble = trouble
        assert consumer.step(timeout=0) == 0
    assert trouble_lines(caplog) == [
        ("ERROR", "Troubled: no broker; trying again"),
        ("ERROR", "Troubled: no topic; trying again"),
        ("INFO", "Troubled: the Kafka client can poll again"),
    ]
    assert len(consumer.clients) == 1


def test_poll_backoff_grows_and_resets_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = Troubled()
    waits: list[float] = []
    monkeypatch.setattr(consumer._kser_poller._stop, "wait", waits.append)
    monkeypatch.setattr("random.uniform", lambda _low, high: high)
    consumer.used.trouble = {"poll": "no broker"}
    for _ in range(9):
        consumer._kser_poller.poll_once(60)
    assert waits[:3] == sorted(waits[:3])
    assert waits[0] < 1 < waits[5] <= waits[-1] <= 10
    consumer.used.trouble = {}
    consumer._kser_poller.poll_once(0)
    consumer.used.trouble = {"poll": "no broker"}
    consumer._kser_poller.poll_once(60)
    assert waits[-1] == waits[0]


def test_failed_commit_is_retried(caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    consumer = Troubled(AT_ONCE)
    consumer.used.trouble = {"commit": "no coordinator"}
    assert consumer.step(timeout=0) == 2
    assert committed() == 0
    consumer.used.trouble = {}
    consumer.step(timeout=0)
    assert committed() == 2
    assert trouble_lines(caplog) == [
        ("ERROR", "Troubled: no coordinator; trying again"),
        ("INFO", "Troubled: the Kafka client can commit again"),
    ]


def test_commit_errors_and_poll_errors_are_logged_separately(caplog: pytest.LogCaptureFixture) -> None:
    put("1")
    consumer = Troubled(AT_ONCE)
    consumer.used.trouble = {"commit": "no coordinator"}
    consumer.step(timeout=0)
    consumer.used.trouble = {"poll": "no broker", "commit": "no coordinator"}
    consumer.step(timeout=0)
    consumer.used.trouble = {}
    consumer.step(timeout=0)
    texts = [text.partition(": ")[2] for _, text in trouble_lines(caplog)]
    assert texts == [
        "no coordinator; trying again",
        "no broker; trying again",
        "the Kafka client can poll again",
        "the Kafka client can commit again",
    ]


def test_fatal_client_is_replaced_and_running_records_are_not_run_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    put("1", "2")
    consumer = Troubled(AT_ONCE)
    consumer._kser_poller.poll_once(0)
    item = consumer._kser_work_queue.get(0)
    assert item is not None
    consumer.used.trouble = {"poll": ClientError("fenced", fatal=True)}
    consumer._kser_poller.poll_once(0)
    assert (consumer.assignment, consumer.used.closed) == (frozenset(), 1)
    assert consumer.run_until_idle() == 1
    assert (len(consumer.clients), consumer.assignment, Act.seen) == (2, {DICE}, ["2"])
    consumer._kser_worker_pool._attempt(item)
    consumer.step(timeout=0)
    assert (Act.seen, committed()) == (["2", "1"], 2)
    assert [text for _, text in trouble_lines(caplog)] == [
        "Troubled: fenced; trying again",
        "Troubled: the Kafka client can poll again",
    ]


def test_fenced_client_commits_nothing_more() -> None:
    """The client that fenced it owns its partitions; its finished records are known when the partitions return."""
    put("1", "2")
    consumer = Troubled({"auto_commit_interval_ms": 600_000}, max_in_flight=1)
    consumer._kser_poller.poll_once(0)
    consumer._kser_worker_pool.step()
    consumer.used.trouble = {"poll": ClientError("fenced", fatal=True)}
    consumer._kser_poller.poll_once(0)
    assert committed() == 0
    consumer.used.trouble = {}
    for _ in range(4):
        consumer.step(timeout=0)
    consumer.close()
    assert (Act.seen, committed()) == (["1", "2"], 2)


@pytest.mark.parametrize("activity", ["poll", "commit", "lag"])
def test_unexpected_client_exception_is_logged_with_traceback_and_survived(
    activity: str, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = Troubled(AT_ONCE, max_in_flight=1, stall_timeout=0)
    put("0", "1", "2")
    consumer._kser_poller.poll_once(0)
    consumer._kser_worker_pool.step()
    consumer.used.trouble = {activity: RuntimeError("surprise")}
    consumer._kser_poller.poll_once(0)
    consumer._kser_poller.poll_once(0)
    (record,) = [record for record in records(caplog, logging.ERROR) if record.exc_info]
    assert "RuntimeError('surprise')" in record.getMessage()
    consumer.run_until_idle()
    assert len(consumer.clients) == 2
    assert (sorted(set(Act.seen)), committed()) == (["0", "1", "2"], 3)


def test_repeated_unexpected_exception_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    consumer = Troubled(first_trouble={"poll": RuntimeError("surprise")})
    for _ in range(5):
        consumer._kser_poller.poll_once(0)
    assert len([record for record in records(caplog, logging.ERROR) if record.exc_info]) == 1


def test_client_that_cannot_be_reconnected_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Troubled):
        def _kser_connect(self) -> Client:
            if len(self.clients) == 1:
                raise BrokerUnavailable("no broker answers")
            return super()._kser_connect()

    consumer = Gone()
    consumer.used.trouble = {"poll": ClientError("fenced", fatal=True)}
    for _ in range(5):
        consumer._kser_poller.poll_once(0)
    assert trouble_lines(caplog) == [
        ("ERROR", "Gone: fenced; trying again"),
        ("ERROR", "Gone: no broker answers; trying again"),
    ]
    assert not [record for record in records(caplog) if record.exc_info]


def test_new_client_does_not_commit_records_of_the_fenced_one() -> None:
    """Another consumer may own the partitions by now and be further ahead."""
    put("1", "2", "3")
    consumer = Troubled({"auto_commit_interval_ms": 1000}, commit="before")
    clock = Clock(consumer)
    consumer.step(timeout=0)
    consumer.used.trouble = {"poll": ClientError("fenced", fatal=True)}
    consumer._kser_poller.poll_once(0)
    other = consumer_of(AT_ONCE, commit="before")
    other.step(timeout=0)
    clock.pass_by(10)
    consumer._kser_poller.poll_once(0)
    assert consumer.used.commits == []


def test_failed_subscription_closes_the_client() -> None:
    made: list[Client] = []

    class Failing(Troubled):
        def _kser_connect(self) -> Client:
            made.append(super()._kser_connect())
            return made[-1]

    with pytest.raises(ClientError):
        Failing(first_trouble={"subscribe": "no"})
    assert [client.closed for client in made] == [1]


def test_unexpected_error_of_the_final_commit_closes_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    put("1")
    consumer = Troubled()
    consumer.step(timeout=0)
    consumer.used.trouble = {"commit": RuntimeError("surprise")}
    consumer.close()
    assert (consumer.used.closed, committed()) == (1, 0)
    assert "RuntimeError('surprise')" in lines(caplog, logging.ERROR)[0]


def test_uncommitted_records_are_logged_at_close(caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    consumer = Troubled()
    consumer.step(timeout=0)
    consumer.used.trouble = {"commit": "no coordinator"}
    consumer.close()
    assert (consumer.used.closed, committed()) == (1, 0)
    assert lines(caplog, logging.WARNING) == [
        "Troubled: no coordinator; trying again",
        "Troubled: finished messages could not be committed and will be redelivered: dice[0] up to offset 2",
    ]


# -- a process that was stopped ----------------------------------------------------------------------------------------

SHORT_SESSION = {"session_timeout_ms": 6000}


def test_group_lease_expiry_delays_records_until_a_commit_succeeds() -> None:
    put("1", "2")
    consumer = Troubled(SHORT_SESSION)
    clock = Clock(consumer)
    consumer._kser_poller.poll_once(0)
    clock.pass_by(3)
    consumer.used.trouble["commit"] = ClientError("no member any more", transient=True)
    consumer._kser_poller.poll_once(0)
    assert consumer._kser_work_queue.get(0) is None
    del consumer.used.trouble["commit"]
    consumer._kser_poller.poll_once(0)
    assert consumer._kser_work_queue.get(0) is not None
