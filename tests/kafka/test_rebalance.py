"""Tests of rebalances under load: no message is lost, and short tasks do not run twice."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kser.schemas import Message
from tests.kafka.broker import Kafka
from tests.kafka.helpers import Worker, committed, config, message, put, repeated, uuids, wait_until

PARTITIONS = 4


class Flow(threading.Thread):
    """Sends some messages every 50 ms, to all partitions in turn."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        super().__init__(name="flow")
        self._kafka = kafka
        self._topic = topic
        self._enough = threading.Event()
        self.sent: list[Message] = []

    def run(self) -> None:
        while not self._enough.wait(0.05):
            batch = [message(seconds=0.002) for _ in range(12)]
            put(self._kafka, self._topic, batch, PARTITIONS)
            self.sent += batch

    def stop(self) -> None:
        self._enough.set()
        self.join()


def test_rebalance_on_join_and_leave_loses_and_duplicates_nothing(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
) -> None:
    name = topic(PARTITIONS)
    settings = config(kafka, name)
    ledger = tmp_path / "ledger"
    flow = Flow(kafka, name)
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
                    at = second.send_signal(signal.SIGTERM)
                    assert second.wait() == 0
                    first.wait_for_partitions(PARTITIONS, 5)
                    print(f"handed over after {time.monotonic() - at:.2f} s; a session is 6 s")
        finally:
            flow.stop()
        wait_until(lambda: set(first.noted("end")) >= set(uuids(flow.sent)), "all are handled")
        had = [count for count in first.mine("assigned") if count != "0"]
        assert had == ["4", "2", "4", "2", "4"], "no rebalance: nothing was tested"
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 0
        doubled = repeated(first.noted("end"))
        print(f"{len(flow.sent)} messages, {len(doubled)} more than once")
        assert not doubled
        assert committed(kafka, name, name, PARTITIONS) == len(flow.sent)


def test_rebalance_after_a_killed_consumer_loses_nothing(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
) -> None:
    name = topic(PARTITIONS)
    settings = config(kafka, name, auto_commit_interval_ms=500)
    ledger = tmp_path / "ledger"
    flow = Flow(kafka, name)
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
        wait_until(lambda: set(first.noted("end")) >= set(uuids(flow.sent)), "all are handled")
        print(f"{len(flow.sent)} messages, {len(repeated(first.noted('end')))} more than once")
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
    # Both partitions' messages are in hand when the first one has to share.
    put(kafka, name, messages, 2)
    with Worker(settings, name, ledger) as first:
        first.wait_for("start", 1)
        with Worker(settings, name, ledger) as second:
            second.wait_for_partitions(1)
            wait_until(lambda: set(first.noted("end")) >= set(uuids(messages)), "all are handled")
            doubled = repeated(first.noted("start"))
            print(f"of {len(messages)} messages {len(doubled)} were begun twice")
            assert len(doubled) <= 1
            for worker in (first, second):
                worker.send_signal(signal.SIGTERM)
                assert worker.wait() == 0
    assert committed(kafka, name, name, 2) == len(messages)
