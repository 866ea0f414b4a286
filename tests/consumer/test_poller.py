"""Tests of the poller, one poll at a time: fetching, commits and client errors."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from kser.attempt import FAILED, Failure
from kser.consumer.client import Commit, Partition
from kser.consumer.membership import PROOF_INTERVAL
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
from tests.support import WAIT_SECONDS, Clock, lines, records, wait_until

pytestmark = pytest.mark.usefixtures("bus")


def consumer_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the level and the text of each log record of the consumer from INFO upwards."""
    own = [record for record in records(caplog, logging.INFO) if record.name == "kser.dummy.consumer"]
    return [(record.levelname, record.getMessage()) for record in own]


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_poll_fetches_no_more_than_the_in_flight_limit() -> None:
    send_messages(*"12345")
    consumer = FaultyConsumer(max_in_flight=3)
    assert [consumer.poll(), consumer.poll()] == [3, 0]
    consumer.run_record()
    assert consumer.poll() == 1
    assert [poll.limit for poll in consumer.current_client.polls] == [3, 0, 1]


def test_full_consumer_keeps_polling_without_fetching() -> None:
    """A task may take hours, and without polls the group would remove the consumer."""
    send_messages(*"123")
    consumer = FaultyConsumer({"auto_commit_interval_ms": 10}, max_in_flight=1)
    for _ in range(4):
        consumer.poll(0.05)
    assert [poll.limit for poll in consumer.current_client.polls] == [1, 0, 0, 0]
    assert consumer.in_flight == 1


def test_paused_or_stopping_poller_fetches_nothing_and_waits() -> None:
    send_messages("1")
    consumer = FaultyConsumer()
    consumer._kser_poller.paused = True
    assert consumer.poll(0.02) == 0
    consumer._kser_poller.paused, consumer._kser_poller.shutting_down = False, True
    assert consumer.poll(0.5) == 0
    assert [(poll.timeout, poll.limit) for poll in consumer.current_client.polls] == [
        (0.02, 0),
        (SHUTDOWN_POLL_TIMEOUT, 0),
    ]


def test_blocked_partition_is_not_fetched() -> None:
    """A dead letter that cannot be written blocks its partition."""
    consumer = FaultyConsumer()
    send_messages("1")
    consumer.poll()
    item = consumer.start_record()
    item.attempt.failure = Failure(FAILED, "KeyError", "x")
    consumer._kser_work_queue.retry_dead_letter(item, 30)
    send_messages("2")
    assert consumer.poll() == 0
    assert consumer.current_client.polls[-1].paused == {DICE}


def test_poll_timeout_ends_at_the_next_commit() -> None:
    send_messages("1")
    clock = Clock()
    consumer = FaultyConsumer({"auto_commit_interval_ms": 300}, clock=clock)
    clock.advance(0.1)
    for _ in range(2):
        consumer.poll(0.5)
    assert [poll.timeout for poll in consumer.current_client.polls] == [0.5, pytest.approx(0.2)]


def test_poll_timeout_is_short_with_a_manual_commit_and_an_idle_worker() -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer.poll(0.5)
    consumer.start_record()
    idle_worker = threading.Thread(target=consumer._kser_work_queue.get, args=(WAIT_SECONDS,))
    idle_worker.start()
    wait_until(lambda: not consumer._kser_work_queue.is_busy)
    consumer.poll(0.5)
    assert [poll.timeout for poll in consumer.current_client.polls] == [0.5, BUSY_POLL_TIMEOUT]
    consumer.close()
    idle_worker.join(WAIT_SECONDS)


def test_poll_timeout_is_zero_with_a_manual_commit_and_busy_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer.poll(0.5)
    # The poller waits for a started or finished record before it polls. No worker runs here, so skip this wait.
    monkeypatch.setattr(consumer._kser_work_queue.waiters, "wait", lambda predicate, timeout: None)
    consumer.poll(0.5)
    assert [poll.timeout for poll in consumer.current_client.polls] == [0.5, 0]


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
    consumer.poll()
    consumer.start_record()
    consumer.run_record()
    consumer.poll()
    assert consumer.current_client.commits == [{DICE: Commit(0, "kser:1,1")}]
    consumer.close()
    new_consumer().run_until_idle()
    assert ScriptedTask.ran == ["2", "1", "3"]


def test_commit_before_commits_started_records() -> None:
    send_messages("1", "2", "3")
    consumer = FaultyConsumer(MANUAL_COMMIT, commit="before", workers=2)
    assert consumer.poll() == 2
    consumer.poll()
    assert committed() == 0
    consumer.start_record()
    consumer.poll()
    assert (committed(), ScriptedTask.ran) == (1, [])


def test_commit_before_in_intervals_commits_started_records() -> None:
    send_messages("1", "2")
    clock = Clock()
    consumer = FaultyConsumer({"auto_commit_interval_ms": 1000}, commit="before", clock=clock)
    consumer.poll()
    consumer.start_record()
    clock.advance(0.9)
    consumer.poll()
    assert committed() == 0
    clock.advance(0.2)
    consumer.poll()
    assert (committed(), ScriptedTask.ran) == (1, [])


def test_commit_before_commits_started_records_at_a_revocation() -> None:
    send_messages("1", "2")
    consumer = FaultyConsumer({"auto_commit_interval_ms": 60_000}, commit="before")
    consumer.poll()
    consumer.run_record()
    InMemoryBroker.at("").create_topic("dice", 2)
    consumer.poll()
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


# -- client errors -----------------------------------------------------------------------------------------------------


def test_client_error_is_logged_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
    consumer = FaultyConsumer()
    for faults in ({"poll": "no broker"}, {"poll": "no broker"}, {"poll": "no topic"}, {}, {}):
        consumer.current_client.faults = faults
        assert consumer.step(timeout=0) == 0
    assert consumer_lines(caplog) == [
        ("ERROR", "FaultyConsumer: no broker; trying again"),
        ("ERROR", "FaultyConsumer: no topic; trying again"),
        ("INFO", "FaultyConsumer: the Kafka client can poll again"),
    ]
    assert len(consumer.clients) == 1


def test_errors_of_one_kind_are_logged_once_although_their_texts_differ_and_alternate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    consumer = FaultyConsumer(clock=clock)
    for number in range(6):
        kind = ("login", "down")[number % 2]
        consumer.current_client.faults = {"poll": ClientError(f"{kind} after {number} ms", kind=kind)}
        consumer.step(timeout=0)
    assert len(consumer_lines(caplog)) == 2
    clock.advance(600)
    consumer.step(timeout=0)
    assert consumer_lines(caplog)[2:] == [("ERROR", "FaultyConsumer: down after 5 ms; trying again")]


def test_poll_backoff_grows_and_resets_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = FaultyConsumer()
    waits: list[float] = []
    monkeypatch.setattr(consumer._kser_poller._stop, "wait", waits.append)
    monkeypatch.setattr("random.uniform", lambda _low, high: high)
    consumer.current_client.faults = {"poll": "no broker"}
    for _ in range(9):
        consumer.poll(60)
    assert waits[:3] == sorted(waits[:3])
    assert waits[0] < 1 < waits[5] <= waits[-1] <= 10
    consumer.current_client.faults = {}
    consumer.poll()
    consumer.current_client.faults = {"poll": "no broker"}
    consumer.poll(60)
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
    assert consumer_lines(caplog) == [
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
    texts = [text.partition(": ")[2] for _, text in consumer_lines(caplog)]
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
    consumer.poll()
    item = consumer.start_record()
    consumer.current_client.faults = {"poll": ClientError("fenced", fatal=True)}
    consumer.poll()
    assert (consumer.assignment, consumer.current_client.closed) == (frozenset(), 1)
    assert consumer.run_until_idle() == 1
    assert (len(consumer.clients), consumer.assignment, ScriptedTask.ran) == (2, {DICE}, ["2"])
    consumer.run_started(item)
    consumer.step(timeout=0)
    assert (ScriptedTask.ran, committed()) == (["2", "1"], 2)
    assert [text for _, text in consumer_lines(caplog)] == [
        "FaultyConsumer: fenced; trying again",
        "FaultyConsumer: the Kafka client can poll again",
    ]


def test_fenced_client_commits_nothing_more() -> None:
    """Another client owns the partitions; when they return, their finished records do not run again."""
    send_messages("1", "2")
    consumer = FaultyConsumer({"auto_commit_interval_ms": 600_000}, max_in_flight=1)
    consumer.poll()
    consumer.run_record()
    consumer.current_client.faults = {"poll": ClientError("fenced", fatal=True)}
    consumer.poll()
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
    consumer.poll()
    consumer.run_record()
    consumer.current_client.faults = {activity: RuntimeError("surprise")}
    consumer.poll()
    consumer.poll()
    (record,) = [record for record in records(caplog, logging.ERROR) if record.exc_info]
    assert "RuntimeError('surprise')" in record.getMessage()
    consumer.run_until_idle()
    assert len(consumer.clients) == 2
    assert (sorted(set(ScriptedTask.ran)), committed()) == (["0", "1", "2"], 3)


def test_repeated_unexpected_exception_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    consumer = FaultyConsumer(initial_faults={"poll": RuntimeError("surprise")})
    for _ in range(5):
        consumer.poll()
    assert len([record for record in records(caplog, logging.ERROR) if record.exc_info]) == 1


def test_client_that_cannot_be_reconnected_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class ConsumerWithoutReconnect(FaultyConsumer):
        def _kser_connect(self) -> FaultyClient:
            if len(self.clients) == 1:
                raise BrokerUnavailable("no broker answers")
            return super()._kser_connect()

    consumer = ConsumerWithoutReconnect()
    consumer.current_client.faults = {"poll": ClientError("fenced", fatal=True)}
    for _ in range(5):
        consumer.poll()
    assert consumer_lines(caplog) == [
        ("ERROR", "ConsumerWithoutReconnect: fenced; trying again"),
        ("ERROR", "ConsumerWithoutReconnect: no broker answers; trying again"),
    ]
    assert not [record for record in records(caplog) if record.exc_info]


def test_new_client_does_not_commit_records_of_the_fenced_one() -> None:
    """Another consumer may own the partitions by now and be further ahead."""
    send_messages("1", "2", "3")
    clock = Clock()
    consumer = FaultyConsumer({"auto_commit_interval_ms": 1000}, commit="before", clock=clock)
    consumer.step(timeout=0)
    consumer.current_client.faults = {"poll": ClientError("fenced", fatal=True)}
    consumer.poll()
    other = new_consumer(MANUAL_COMMIT, commit="before")
    other.step(timeout=0)
    clock.advance(10)
    consumer.poll()
    assert consumer.current_client.commits == []


def is_recovery_logged(caplog: pytest.LogCaptureFixture) -> bool:
    """Return whether the consumer has logged that polls work again."""
    return any("the Kafka client can poll again" in line for line in lines(caplog))


def test_recovery_is_not_logged_while_the_group_rejects_commits(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    consumer = FaultyConsumer(clock=clock)
    consumer.poll()
    consumer.current_client.faults = {"poll": "no broker", "commit": "not a member"}
    consumer.poll()
    del consumer.current_client.faults["poll"]
    for _ in range(10):
        clock.advance(1)
        consumer.poll()
    assert not is_recovery_logged(caplog)
    consumer.current_client.faults = {}
    clock.advance(PROOF_INTERVAL)
    consumer.poll()
    assert is_recovery_logged(caplog)


def test_records_prove_the_recovery(caplog: pytest.LogCaptureFixture) -> None:
    consumer = FaultyConsumer()
    consumer.poll()
    consumer.current_client.faults = {"poll": "no broker", "commit": "no coordinator"}
    consumer.poll()
    del consumer.current_client.faults["poll"]
    consumer.poll()
    assert not is_recovery_logged(caplog)
    send_messages("1")
    consumer.poll()
    assert is_recovery_logged(caplog)


@pytest.mark.parametrize("is_member", [True, False])
def test_consumer_without_partitions_has_recovered_if_it_is_a_member(
    is_member: bool, caplog: pytest.LogCaptureFixture
) -> None:
    holder = new_consumer()
    holder.step(timeout=0)
    spare = FaultyConsumer()
    spare.poll()
    assert not spare.assignment
    spare.current_client.is_member = lambda: is_member  # type: ignore[method-assign]
    spare.current_client.faults = {"poll": "no broker"}
    spare.poll()
    spare.current_client.faults = {}
    spare.poll()
    assert is_recovery_logged(caplog) == is_member


def test_client_that_fails_again_and_again_is_replaced_less_and_less_often() -> None:
    clock = Clock()
    consumer = FaultyConsumer(initial_faults={"poll": ClientError("the group is full", fatal=True)}, clock=clock)
    for _ in range(600):
        clock.advance(0.1)
        consumer.poll()
    assert 5 < len(consumer.clients) < 25


def test_failed_subscription_closes_the_client() -> None:
    clients: list[FaultyClient] = []

    class FailingConsumer(FaultyConsumer):
        def _kser_connect(self) -> FaultyClient:
            clients.append(super()._kser_connect())
            return clients[-1]

    with pytest.raises(ClientError):
        FailingConsumer(initial_faults={"subscribe": "no"})
    assert [client.closed for client in clients] == [1]


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


# -- the group lease ---------------------------------------------------------------------------------------------------


def test_group_lease_expiry_delays_records_until_a_commit_succeeds() -> None:
    send_messages("1", "2")
    clock = Clock()
    consumer = FaultyConsumer({"session_timeout_ms": 6000}, clock=clock)
    consumer.poll()
    # Half of the session timeout, the duration of the group lease.
    clock.advance(3)
    consumer.current_client.faults["commit"] = ClientError("not a member", transient=True)
    consumer.poll()
    assert not consumer.run_record()
    del consumer.current_client.faults["commit"]
    consumer.poll()
    assert consumer.run_record()
