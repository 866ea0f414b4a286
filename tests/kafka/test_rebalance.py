"""Tests of rebalances under load: no message is lost, and short tasks do not run twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from tests.kafka.broker import Kafka
from tests.kafka.helpers import (
    MessageFlow,
    Worker,
    committed,
    config,
    message,
    repeated,
    send_records,
    uuids,
    wait_until,
)

PARTITIONS = 4


def test_rebalance_on_join_and_leave_loses_and_duplicates_nothing(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
) -> None:
    name = topic(PARTITIONS)
    settings = config(kafka, name)
    ledger = tmp_path / "ledger"
    flow = MessageFlow(kafka, name, PARTITIONS)
    with Worker(settings, name, ledger) as first:
        first.wait_for_partitions(PARTITIONS)
        flow.start()
        try:
            first.wait_for("end", 50)
            for _ in range(2):
                with Worker(settings, name, ledger) as second:
                    second.wait_for_partitions(PARTITIONS // 2)
                    first.wait_for_partitions(PARTITIONS // 2)
                    second.wait_for("end", 20)
                    second.send_signal(signal.SIGTERM)
                    assert second.wait() == 0
                    # Less than the session timeout: the worker has left the group.
                    first.wait_for_partitions(PARTITIONS, 5)
        finally:
            flow.stop()
        wait_until(lambda: set(first.all_recorded("end")) >= set(uuids(flow.sent)), "all messages are handled")
        assignments = [count for count in first.recorded("assigned") if count != "0"]
        assert assignments == ["4", "2", "4", "2", "4"], "no rebalance, so the test shows nothing"
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 0
        duplicates = repeated(first.all_recorded("end"))
        print(f"{len(flow.sent)} messages, {len(duplicates)} more than once")
        assert not duplicates
        assert committed(kafka, name, name, PARTITIONS) == len(flow.sent)


def test_rebalance_after_a_killed_consumer_loses_nothing(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
) -> None:
    name = topic(PARTITIONS)
    settings = config(kafka, name, auto_commit_interval_ms=500)
    ledger = tmp_path / "ledger"
    flow = MessageFlow(kafka, name, PARTITIONS)
    with Worker(settings, name, ledger) as first, Worker(settings, name, ledger) as second:
        first.wait_for_partitions(PARTITIONS // 2)
        second.wait_for_partitions(PARTITIONS // 2)
        flow.start()
        try:
            second.wait_for("end", 50)
            second.send_signal(signal.SIGKILL)
            second.wait()
            first.wait_for_partitions(PARTITIONS)
        finally:
            flow.stop()
        wait_until(lambda: set(first.all_recorded("end")) >= set(uuids(flow.sent)), "all messages are handled")
        print(f"{len(flow.sent)} messages, {len(repeated(first.all_recorded('end')))} more than once")
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 0
        assert committed(kafka, name, name, PARTITIONS) == len(flow.sent)


def test_rebalance_lets_running_tasks_end_and_duplicates_no_other_task(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
) -> None:
    name = topic(2)
    settings = config(kafka, name)
    ledger = tmp_path / "ledger"
    messages = [message(seconds=0.6) for _ in range(12)]
    # The first worker has fetched the messages of both partitions before the second one joins.
    send_records(kafka, name, messages, 2)
    with Worker(settings, name, ledger) as first:
        first.wait_for("start", 1)
        with Worker(settings, name, ledger) as second:
            second.wait_for_partitions(1)
            wait_until(lambda: set(first.all_recorded("end")) >= set(uuids(messages)), "all messages are handled")
            duplicates = repeated(first.all_recorded("start"))
            print(f"{len(duplicates)} of {len(messages)} messages were started twice")
            assert len(duplicates) <= 1
            for worker in (first, second):
                worker.send_signal(signal.SIGTERM)
                assert worker.wait() == 0
    assert committed(kafka, name, name, 2) == len(messages)
