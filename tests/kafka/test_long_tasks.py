"""Tests of long tasks and pauses that exceed max_poll_interval_ms: the consumer stays in its group."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kafka.broker import Kafka
from tests.kafka.helpers import Worker, committed, config, message, repeated, send_records, uuids, wait_until

#: ``max_poll_interval_ms`` of the workers, in seconds.
POLL_INTERVAL = 3.0


@pytest.fixture
def start(kafka: Kafka, topic: Callable[..., str], tmp_path: Path) -> Callable[[], Worker]:
    """Return ``start()``: starts a worker and waits for its partition."""
    name = topic()

    def starter() -> Worker:
        worker = Worker(config(kafka, name, max_poll_interval_ms=int(POLL_INTERVAL * 1000)), name, tmp_path / "ledger")
        worker.wait_for_partitions(1)
        return worker

    return starter


@pytest.fixture
def pause_file() -> Iterator[Path]:
    path = Path(os.environ["LOCK_FILE"])
    yield path
    path.unlink(missing_ok=True)


def test_short_tasks_that_together_exceed_max_poll_interval_keep_the_partition(
    kafka: Kafka, start: Callable[[], Worker]
) -> None:
    messages = [message(seconds=0.2) for _ in range(30)]
    with start() as worker:
        send_records(kafka, worker.topic, messages)
        worker.wait_for("end", len(messages))
        assert worker.all_recorded("end") == uuids(messages), "not once or not in order"
        assert worker.all_recorded("assigned") == ["1"], "the partition was lost"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert committed(kafka, worker.group, worker.topic) == len(messages)


def test_long_pause_keeps_the_partition_and_uses_no_cpu(
    kafka: Kafka, start: Callable[[], Worker], pause_file: Path
) -> None:
    before = [message(seconds=0.1) for _ in range(40)]
    with start() as worker:
        send_records(kafka, worker.topic, before)
        worker.wait_for("end", 5)
        pause_file.touch()
        worker.wait_for_text("Consumer is paused")
        wait_until(
            lambda: len(worker.all_recorded("start")) == len(worker.all_recorded("end")), "the running task has ended"
        )
        done = len(worker.all_recorded("end"))
        assert done < len(before), "no message was in flight, so the test shows nothing"
        cpu = cpu_seconds(worker.pid)
        time.sleep(POLL_INTERVAL + 1.5)
        cpu = cpu_seconds(worker.pid) - cpu
        print(f"paused with messages in flight: {cpu:.2f} s of CPU in {POLL_INTERVAL + 1.5} s")
        assert len(worker.all_recorded("end")) == done, "a message ran during the pause"
        during = [message() for _ in range(5)]
        send_records(kafka, worker.topic, during)
        pause_file.unlink()
        worker.wait_for("end", len(before + during))
        assert worker.all_recorded("end") == uuids(before + during), "not once or not in order"
        assert worker.all_recorded("assigned") == ["1"], "the partition was lost"
        assert worker.text.count("Consumer is paused") == 1
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert committed(kafka, worker.group, worker.topic) == len(before + during)
        assert cpu < 1, "the paused consumer is busy"


def test_paused_idle_consumer_takes_no_message_and_can_be_stopped(
    kafka: Kafka, start: Callable[[], Worker], pause_file: Path
) -> None:
    with start() as worker:
        pause_file.touch()
        worker.wait_for_text("Consumer is paused")
        send_records(kafka, worker.topic, [message() for _ in range(10)])
        time.sleep(1.5)
        assert not worker.all_recorded("start")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert committed(kafka, worker.group, worker.topic) == 0
    # A new consumer removes the pause file.
    with start() as worker:
        assert not pause_file.exists()
        worker.wait_for("end", 10)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert not repeated(worker.all_recorded("end"))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = (int(field) for field in fields[11:13])
    return (user + system) / os.sysconf("SC_CLK_TCK")
