"""The thread that owns the client, one turn after the other: what it takes, when it commits, and what it survives."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kser.consumer.client import Commit, Partition
from kser.consumer.poller import EAGER_POLL, ENDING_POLL
from kser.dummy.bus import Bus
from kser.errors import BrokerUnavailable, ClientTrouble
from tests.engine import AT_ONCE, DICE, Act, Client, Troubled, committed, consumer_of, put
from tests.support import Clock, lines, records

pytestmark = pytest.mark.usefixtures("bus")


def trouble_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What was said of the client, by level and text."""
    own = [record for record in records(caplog, logging.INFO) if record.name == "kser.dummy.consumer"]
    return [(record.levelname, record.getMessage()) for record in own]


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_it_asks_for_no_more_than_there_is_room_for() -> None:
    put(*"12345")
    consumer = Troubled(max_in_flight=3)
    poller = consumer._poller
    assert [poller.turn(0), poller.turn(0)] == [3, 0]
    consumer._workers.step()
    assert poller.turn(0) == 1
    assert [limit for _, limit, _ in consumer.used.polls] == [3, 0, 1]


def test_a_full_consumer_goes_on_polling_without_taking() -> None:
    """A task may take hours: the group must hear of its member."""
    put(*"123")
    consumer = Troubled({"auto_commit_interval_ms": 10}, max_in_flight=1)
    for _ in range(4):
        consumer._poller.turn(0.05)
    assert [limit for _, limit, _ in consumer.used.polls] == [1, 0, 0, 0]
    assert consumer._dispatch.in_flight == 1


def test_while_paused_and_at_the_end_it_takes_nothing_and_waits() -> None:
    put("1")
    consumer = Troubled()
    consumer._poller.paused = True
    assert consumer._poller.turn(0.02) == 0
    consumer._poller.paused, consumer._poller.ending = False, True
    assert consumer._poller.turn(0.5) == 0
    assert [(timeout, limit) for timeout, limit, _ in consumer.used.polls] == [(0.02, 0), (ENDING_POLL, 0)]


def test_nothing_is_taken_of_what_is_held() -> None:
    consumer = Troubled()
    consumer._poller.turn(0)
    consumer._dispatch._partitions[DICE].unburied.add(0)
    put("1")
    assert consumer._poller.turn(0) == 0
    assert consumer.used.polls[-1][2] == {DICE}


def test_a_poll_waits_until_something_is_to_be_committed() -> None:
    put("1")
    consumer = Troubled({"auto_commit_interval_ms": 300})
    Clock(consumer).pass_by(0.1)
    for _ in range(2):
        consumer._poller.turn(0.5)
    first, second = (timeout for timeout, _, _ in consumer.used.polls)
    assert (first, second <= 0.3) == (0.5, True)


def test_a_poll_waits_hardly_when_what_runs_is_to_be_committed_at_once_and_a_worker_is_idle() -> None:
    put("1")
    consumer = Troubled(AT_ONCE)
    consumer._poller.turn(0.5)
    consumer._dispatch.take(0)
    consumer._dispatch._idle_workers = 1
    consumer._poller.turn(0.5)
    assert [timeout for timeout, _, _ in consumer.used.polls] == [0.5, EAGER_POLL]


def test_a_poll_does_not_wait_when_what_runs_is_to_be_committed_at_once_and_all_workers_are_busy() -> None:
    put("1")
    consumer = Troubled(AT_ONCE)
    consumer._poller.turn(0.5)
    # What it waits for instead is that something is begun or finished.
    consumer._dispatch.wait_for_change = lambda timeout, until: None  # type: ignore[method-assign]
    consumer._poller.turn(0.5)
    assert [timeout for timeout, _, _ in consumer.used.polls] == [0.5, 0]


# -- commits -----------------------------------------------------------------------------------------------------------


def test_a_commit_is_for_all_partitions_and_only_when_there_is_something(bus: Bus) -> None:
    bus.create_topic("dice", 2)
    consumer = Troubled({"auto_commit_interval_ms": 1000})
    clock = Clock(consumer)
    put("1", partition=0)
    put("2", "3", partition=1)
    for _ in range(10):
        consumer.step(timeout=0)
        clock.pass_by(0.5)
    assert consumer.used.commits == [{Partition("dice", 0): Commit(1), Partition("dice", 1): Commit(2)}]


def test_what_is_finished_above_the_lowest_unfinished_is_committed_beside_it() -> None:
    put("1", "2", "3")
    consumer = Troubled(AT_ONCE, ordering="none")
    consumer._poller.turn(0)
    first = consumer._dispatch.take(0)
    assert first is not None
    consumer._workers.step()
    consumer._poller.turn(0)
    assert consumer.used.commits == [{DICE: Commit(0, "kser:1,1")}]
    consumer.close()
    consumer_of().run_until_idle()
    assert Act.seen == ["2", "1", "3"]


def test_the_published_order_is_to_commit_what_is_begun() -> None:
    put("1", "2", "3")
    consumer = Troubled(AT_ONCE, commit="before", workers=2)
    assert consumer._poller.turn(0) == 2
    consumer._poller.turn(0)
    assert committed() == 0
    consumer._dispatch.take(0)
    consumer._poller.turn(0)
    assert (committed(), Act.seen) == (1, [])


def test_the_published_order_in_intervals_commits_what_is_begun() -> None:
    put("1", "2")
    consumer = Troubled({"auto_commit_interval_ms": 1000}, commit="before")
    clock = Clock(consumer)
    consumer._poller.turn(0)
    consumer._dispatch.take(0)
    clock.pass_by(0.9)
    consumer._poller.turn(0)
    assert committed() == 0
    clock.pass_by(0.2)
    consumer._poller.turn(0)
    assert (committed(), Act.seen) == (1, [])


def test_the_published_order_commits_what_is_begun_when_its_partition_goes() -> None:
    put("1", "2")
    consumer = Troubled({"auto_commit_interval_ms": 60_000}, commit="before")
    consumer._poller.turn(0)
    consumer._workers.step()
    Bus.at("").create_topic("dice", 2)
    consumer._poller.turn(0)
    assert (Act.seen, committed()) == (["1"], 1)


@pytest.mark.parametrize("config", [AT_ONCE, {"auto_commit_interval_ms": 10}])
def test_who_is_never_to_commit_never_does(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    consumer = Troubled(config, commit="never")
    clock = Clock(consumer)
    consumer.run_until_idle()
    clock.pass_by(1)
    Bus.at("").create_topic("dice", 2)
    consumer.step(timeout=0)
    consumer.close()
    assert (consumer.used.commits, committed(), Act.seen) == ([], None, ["1", "2"])
    assert lines(caplog, logging.WARNING) == []


@pytest.mark.parametrize("commit", ["after", "before", "never"])
def test_without_a_group_nothing_is_committed_in_any_mode(commit: str, caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    consumer = Troubled({**AT_ONCE, "group_id": None}, commit=commit)
    consumer.run_until_idle()
    consumer.close()
    assert (consumer._poller.mode, consumer.used.commits, Act.seen) == ("never", [], ["1", "2"])
    assert len(lines(caplog, logging.WARNING)) == (commit != "never")


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_trouble_is_logged_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
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


def test_between_two_tries_it_waits_longer_and_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = Troubled()
    waits: list[float] = []
    monkeypatch.setattr(consumer._poller._stop, "wait", waits.append)
    monkeypatch.setattr("random.uniform", lambda _low, high: high)
    consumer.used.trouble = {"poll": "no broker"}
    for _ in range(9):
        consumer._poller.turn(60)
    assert waits[:3] == sorted(waits[:3])
    assert waits[0] < 1 < waits[5] <= waits[-1] <= 10
    consumer.used.trouble = {}
    consumer._poller.turn(0)
    consumer.used.trouble = {"poll": "no broker"}
    consumer._poller.turn(60)
    assert waits[-1] == waits[0]


def test_a_commit_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
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


def test_trouble_with_commits_and_with_polls_is_told_apart(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_client_that_has_come_to_its_end_is_replaced_and_what_ran_is_not_run_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    put("1", "2")
    consumer = Troubled(AT_ONCE)
    consumer._poller.turn(0)
    job = consumer._dispatch.take(0)
    assert job is not None
    consumer.used.trouble = {"poll": ClientTrouble("fenced", fatal=True)}
    consumer._poller.turn(0)
    assert (consumer.assignment, consumer.used.closed) == (frozenset(), 1)
    assert consumer.run_until_idle() == 1
    assert (len(consumer.clients), consumer.assignment, Act.seen) == (2, {DICE}, ["2"])
    consumer._workers._attempt(job)
    consumer.step(timeout=0)
    assert (Act.seen, committed()) == (["2", "1"], 2)
    assert [text for _, text in trouble_lines(caplog)] == [
        "Troubled: fenced; trying again",
        "Troubled: the Kafka client can poll again",
    ]


def test_a_client_that_has_come_to_its_end_commits_nothing_more() -> None:
    """Whoever fenced it has its partitions; what is done here is known when they return."""
    put("1", "2")
    consumer = Troubled({"auto_commit_interval_ms": 600_000}, max_in_flight=1)
    consumer._poller.turn(0)
    consumer._workers.step()
    consumer.used.trouble = {"poll": ClientTrouble("fenced", fatal=True)}
    consumer._poller.turn(0)
    assert committed() == 0
    consumer.used.trouble = {}
    for _ in range(4):
        consumer.step(timeout=0)
    consumer.close()
    assert (Act.seen, committed()) == (["1", "2"], 2)


@pytest.mark.parametrize("activity", ["poll", "commit", "lag"])
def test_what_a_client_does_not_announce_is_said_with_all_of_it_and_survived(
    activity: str, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = Troubled(AT_ONCE, max_in_flight=1, stall_timeout=0)
    put("0", "1", "2")
    consumer._poller.turn(0)
    consumer._workers.step()
    consumer.used.trouble = {activity: RuntimeError("surprise")}
    consumer._poller.turn(0)
    consumer._poller.turn(0)
    (record,) = [record for record in records(caplog, logging.ERROR) if record.exc_info]
    assert "RuntimeError('surprise')" in record.getMessage()
    consumer.run_until_idle()
    assert len(consumer.clients) == 2
    assert (sorted(set(Act.seen)), committed()) == (["0", "1", "2"], 3)


def test_what_is_not_announced_time_and_again_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    consumer = Troubled(first_trouble={"poll": RuntimeError("surprise")})
    for _ in range(5):
        consumer._poller.turn(0)
    assert len([record for record in records(caplog, logging.ERROR) if record.exc_info]) == 1


def test_a_client_that_cannot_be_made_anew_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Troubled):
        def _connect(self) -> Client:
            if len(self.clients) == 1:
                raise BrokerUnavailable("no broker answers")
            return super()._connect()

    consumer = Gone()
    consumer.used.trouble = {"poll": ClientTrouble("fenced", fatal=True)}
    for _ in range(5):
        consumer._poller.turn(0)
    assert trouble_lines(caplog) == [
        ("ERROR", "Gone: fenced; trying again"),
        ("ERROR", "Gone: no broker answers; trying again"),
    ]
    assert not [record for record in records(caplog) if record.exc_info]


def test_the_next_client_does_not_commit_what_the_last_one_handed_out() -> None:
    """Its partitions may be somebody else's by now, who is further."""
    put("1", "2", "3")
    consumer = Troubled({"auto_commit_interval_ms": 1000}, commit="before")
    clock = Clock(consumer)
    consumer.step(timeout=0)
    consumer.used.trouble = {"poll": ClientTrouble("fenced", fatal=True)}
    consumer._poller.turn(0)
    other = consumer_of(AT_ONCE, commit="before")
    other.step(timeout=0)
    clock.pass_by(10)
    consumer._poller.turn(0)
    assert consumer.used.commits == []


def test_a_subscription_that_fails_lets_go_of_the_client() -> None:
    made: list[Client] = []

    class Failing(Troubled):
        def _connect(self) -> Client:
            made.append(super()._connect())
            return made[-1]

    with pytest.raises(ClientTrouble):
        Failing(first_trouble={"subscribe": "no"})
    assert [client.closed for client in made] == [1]


def test_an_unforeseen_error_of_the_last_commit_does_not_keep_the_client_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    put("1")
    consumer = Troubled()
    consumer.step(timeout=0)
    consumer.used.trouble = {"commit": RuntimeError("surprise")}
    consumer.close()
    assert (consumer.used.closed, committed()) == (1, 0)
    assert "RuntimeError('surprise')" in lines(caplog, logging.ERROR)[0]


def test_what_could_not_be_committed_at_the_end_is_named(caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    consumer = Troubled()
    consumer.step(timeout=0)
    consumer.used.trouble = {"commit": "no coordinator"}
    consumer.close()
    assert (consumer.used.closed, committed()) == (1, 0)
    assert lines(caplog, logging.WARNING) == [
        "Troubled: no coordinator; trying again",
        "Troubled: what is done could not be committed and comes again: dice[0] up to offset 2",
    ]


# -- a process that was stopped ----------------------------------------------------------------------------------------

SHORT_SESSION = {"session_timeout_ms": 6000}


def test_after_a_long_stop_records_are_begun_only_when_the_group_has_taken_a_commit() -> None:
    put("1", "2")
    consumer = Troubled(SHORT_SESSION)
    clock = Clock(consumer)
    consumer._poller.turn(0)
    clock.pass_by(3)
    consumer.used.trouble["commit"] = ClientTrouble("no member any more", passing=True)
    consumer._poller.turn(0)
    assert consumer._dispatch.take(0) is None
    del consumer.used.trouble["commit"]
    consumer._poller.turn(0)
    assert consumer._dispatch.take(0) is not None
