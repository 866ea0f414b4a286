"""Tests of long tasks: work that exceeds ``max_poll_interval_ms`` does not cost the consumer its partition."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kafka.broker import Kafka
from tests.kafka.helpers import Worker, committed, config, message, put, repeated, uuids, wait_until

INTERVAL = 3.0


@pytest.fixture
def start(kafka: Kafka, topic: Callable[..., str], tmp_path: Path) -> Callable[[], Worker]:
    """Starts a worker that may be away from its client for 3 s."""
    name = topic()

    def starter() -> Worker:
        worker = Worker(config(kafka, name, max_poll_interval_ms=int(INTERVAL * 1000)), name, tmp_path / "ledger")
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
        put(kafka, worker.topic, messages)
        worker.wait_for("end", len(messages))
        assert worker.noted("end") == uuids(messages), "not once and in order"
        assert worker.noted("assigned") == ["1"], "the partition was lost on the way"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert committed(kafka, worker.group, worker.topic) == len(messages)


def test_long_pause_keeps_the_partition_and_uses_no_cpu(
    kafka: Kafka, start: Callable[[], Worker], pause_file: Path
) -> None:
    before = [message(seconds=0.1) for _ in range(40)]
    with start() as worker:
        put(kafka, worker.topic, before)
        # It has more messages in hand when it is paused.
        worker.wait_for("end", 5)
        pause_file.touch()
        worker.wait_for_text("Consumer is paused")
        wait_until(lambda: len(worker.noted("start")) == len(worker.noted("end")), "what runs ends")
        done = len(worker.noted("end"))
        assert done < len(before), "nothing was left: the test shows nothing"
        cpu = _cpu_seconds(worker.pid)
        time.sleep(INTERVAL + 1.5)
        cpu = _cpu_seconds(worker.pid) - cpu
        print(f"paused with messages in hand: {cpu:.2f} s of CPU in {INTERVAL + 1.5} s")
        assert len(worker.noted("end")) == done, "it went on while paused"
        during = [message() for _ in range(5)]
        put(kafka, worker.topic, during)
        pause_file.unlink()
        at = time.monotonic()
        worker.wait_for("end", done + 1)
        print(f"went on {time.monotonic() - at:.2f} s after the file was gone")
        assert time.monotonic() - at < 2
        worker.wait_for("end", len(before + during))
        assert worker.noted("end") == uuids(before + during), "not once and in order"
        assert worker.noted("assigned") == ["1"], "the partition was lost on the way"
        assert worker.text.count("Consumer is paused") == 1
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert committed(kafka, worker.group, worker.topic) == len(before + during)
        assert cpu < 1, "it does not rest while it is paused"


def test_paused_idle_consumer_takes_no_message_and_can_be_stopped(
    kafka: Kafka, start: Callable[[], Worker], pause_file: Path
) -> None:
    with start() as worker:
        pause_file.touch()
        worker.wait_for_text("Consumer is paused")
        put(kafka, worker.topic, [message() for _ in range(10)])
        time.sleep(1.5)
        assert not worker.noted("start")
        at = worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert time.monotonic() - at < 1.5
        assert committed(kafka, worker.group, worker.topic) == 0
    # A consumer that starts is not paused.
    with start() as worker:
        assert not pause_file.exists()
        worker.wait_for("end", 10)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert not repeated(worker.noted("end"))


def _cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
