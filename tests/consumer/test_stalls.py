"""Tests of stall detection: a consumer that lags behind without progress logs it."""

from __future__ import annotations

import logging

import pytest

from kser.consumer.client import Partition
from kser.errors import ClientError
from kser.takeover import Takeover
from tests.consumer.harness import FaultyConsumer, new_consumer, send_messages
from tests.support import Clock, lines

pytestmark = pytest.mark.usefixtures("bus")


def errors_after(consumer: FaultyConsumer, clock: Clock, caplog: pytest.LogCaptureFixture, *delays: float) -> list[str]:
    """Poll after each delay in seconds; return all errors logged so far."""
    for seconds in delays:
        clock.advance(seconds)
        consumer.poll()
    return lines(caplog, logging.ERROR)


def test_stalled_consumer_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    send_messages(*"123")
    clock = Clock()
    consumer = FaultyConsumer(max_in_flight=1, stall_timeout=60, clock=clock)
    consumer.poll()
    consumer.start_record()
    assert errors_after(consumer, clock, caplog, 30, 29.9) == []
    (line,) = errors_after(consumer, clock, caplog, 0.2, 60, 60)
    assert line == (
        "FaultyConsumer: no message was finished for 60 s, but partitions lag: dice[0] by 3; 1 message(s) are being"
        " handled, the longest for 60 s: offset 0 of dice[0]; set TIME_LIMIT on its class, or add workers"
    )


def test_stall_after_progress_is_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    send_messages(*"123")
    clock = Clock()
    consumer = FaultyConsumer(max_in_flight=1, stall_timeout=60, clock=clock)
    consumer.poll()
    assert len(errors_after(consumer, clock, caplog, 61)) == 1
    consumer.run_record()
    assert len(errors_after(consumer, clock, caplog, 1, 59)) == 1
    assert len(errors_after(consumer, clock, caplog, 2)) == 2
    assert "no message is being handled" in lines(caplog, logging.ERROR)[-1]


@pytest.mark.parametrize("record_ends", [False, True])
def test_takeovers_do_not_hide_a_stall(record_ends: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A takeover belongs to no partition."""
    send_messages(*"123")
    clock = Clock()
    consumer = FaultyConsumer(workers=4, ordering="partition", stall_timeout=60, clock=clock)
    consumer.poll()
    record = consumer.start_record()
    for second in range(59):
        assert consumer._kser_services._host.put(Takeover("dice", b"", 1, "step", lambda takeover: None), 5)
        consumer._kser_work_queue.task_done(consumer.start_record())
        assert errors_after(consumer, clock, caplog, 1) == [], second
    if record_ends:
        consumer.run_started(record)
    assert len(errors_after(consumer, clock, caplog, 2)) == (0 if record_ends else 1)


def test_idle_consumer_does_not_stall(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1")
    clock = Clock()
    consumer = FaultyConsumer(stall_timeout=60, clock=clock)
    consumer.step(timeout=0)
    assert errors_after(consumer, clock, caplog, 1000, 1000) == []


@pytest.mark.parametrize("state", ["paused", "shutting_down"])
def test_paused_or_stopping_consumer_does_not_stall(state: str, caplog: pytest.LogCaptureFixture) -> None:
    send_messages(*"123")
    clock = Clock()
    consumer = FaultyConsumer(max_in_flight=1, stall_timeout=60, clock=clock)
    consumer.poll()
    setattr(consumer._kser_poller, state, True)
    assert errors_after(consumer, clock, caplog, 1000, 1000) == []


def test_stall_without_a_known_lag_counts_the_queued_records(caplog: pytest.LogCaptureFixture) -> None:
    send_messages(*"123")
    clock = Clock()
    consumer = FaultyConsumer(max_in_flight=1, stall_timeout=60, clock=clock)
    consumer.poll()
    consumer.current_client.faults = {"lag": "no broker"}
    (line,) = errors_after(consumer, clock, caplog, 61)
    assert "partitions lag: dice[0] by 1;" in line


def test_consumer_outside_its_group_stalls_without_partitions(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    consumer = FaultyConsumer(stall_timeout=60, clock=clock)
    consumer.current_client.is_member = lambda: False  # type: ignore[method-assign]
    consumer.current_client.faults = {"poll": ClientError("the group is full", transient=True)}
    assert errors_after(consumer, clock, caplog, 30, 29) == []
    (line,) = errors_after(consumer, clock, caplog, 2, 60, 60)
    assert "has had no partitions for 60 s, because it is not a member of its group" in line


def test_spare_member_without_partitions_does_not_stall(caplog: pytest.LogCaptureFixture) -> None:
    holder = new_consumer()
    holder.step(timeout=0)
    clock = Clock()
    spare = FaultyConsumer(stall_timeout=60, clock=clock)
    spare.poll()
    assert not spare.assignment
    assert errors_after(spare, clock, caplog, 61, 61, 61) == []


def test_member_that_still_has_partitions_is_not_outside_its_group(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    consumer = FaultyConsumer(stall_timeout=60, clock=clock)
    consumer.poll()
    consumer.current_client.is_member = lambda: False  # type: ignore[method-assign]
    assert errors_after(consumer, clock, caplog, 61, 61) == []


@pytest.mark.parametrize(
    ("held", "rest"),
    [
        ({0: 3, 1: 2}, None),
        ({0: 3}, "; dice[0] waits because of its data: see the errors before this line"),
        ({}, ""),
    ],
)
def test_partition_that_waits_because_of_its_data_is_no_stall(
    held: dict[int, int], rest: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has logged why it waits, and the stall line would name other causes."""
    clock = Clock()
    consumer = FaultyConsumer(stall_timeout=60, clock=clock)
    consumer.poll()
    client = consumer.current_client
    monkeypatch.setattr(client, "lag", lambda: {Partition("dice", 0): 3, Partition("dice", 1): 2})
    monkeypatch.setattr(client, "waiting", lambda: {Partition("dice", number): "no codec" for number in held})
    logged = errors_after(consumer, clock, caplog, 61, 61)
    if rest is None:
        assert logged == []
        # The stall begins when the partitions wait no longer.
        monkeypatch.setattr(client, "waiting", dict)
        logged = errors_after(consumer, clock, caplog, 61, 1)
        rest = ""
    (line,) = logged
    assert line == (
        "FaultyConsumer: no message was finished for 60 s, but partitions lag: dice[0] by 3, dice[1] by 2; no message"
        f" is being handled: check that the group is stable and that dead letters can be written{rest}"
    )
