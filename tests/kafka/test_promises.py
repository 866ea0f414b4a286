"""Tests of the consumer's promises with each Kafka client: rebalances, workers, retries and dead letters."""

from __future__ import annotations

import json
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kafka.coordinator.assignors
import pytest

from kser.consumer.client import Partition
from tests.kafka.broker import Kafka
from tests.kafka.helpers import (
    TRANSPORTS,
    MessageFlow,
    Worker,
    committed,
    config,
    entries,
    message,
    repeated,
    send_records,
    uuids,
    wait_until,
)
from tests.transports.producer_contract import read

#: ``max_poll_interval_ms`` in seconds; a revocation waits at most a third of it for running records.
POLL_INTERVAL = 3.0

Start = Callable[..., Worker]


@pytest.fixture(params=TRANSPORTS)
def start(kafka: Kafka, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Return ``start(topic)``: starts a worker; all workers share a group and a ledger."""
    settings = config(kafka, max_poll_interval_ms=int(POLL_INTERVAL * 1000), session_timeout_ms=2000)
    with ExitStack() as workers:

        def starter(topic: str, *, options: Any = None, **environment: str) -> Worker:
            worker = Worker(
                {**settings, **(options or {})}, topic, tmp_path / "ledger", transport=request.param, **environment
            )
            return workers.enter_context(worker)

        yield starter


def end(*workers: Worker) -> None:
    """Shut workers down gracefully, one after the other."""
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_consumer_logs_its_settings_at_the_start(start: Start, topic: Callable[..., str]) -> None:
    name = topic()
    settings = {"KSER_WORKERS": "3", "KSER_ORDERING": "partition", "KSER_DEAD_LETTER": "true"}
    worker = start(name, **settings, KSER_RETRY=json.dumps({"max_attempts": 4}))
    worker.wait_for_partitions(1)
    (line,) = [line for line in worker.text.splitlines() if "Worker: commit=" in line]
    assert "INFO" in line
    for part in ("commit=after", "workers=3", "ordering=partition", f"group={worker.group}", f"topics={name}"):
        assert f"{part}," in line
    assert "max_attempts=4" in line and line.endswith("dead letters=<topic>.dlq")
    end(worker)


# -- rebalances --------------------------------------------------------------------------------------------------------


def test_long_task_runs_once_through_a_rebalance_of_another_topic(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    """A member with another topic joins: all partitions are revoked, and the partition of the task returns."""
    name, other = topic(), topic()
    long = message(seconds=3 * POLL_INTERVAL)
    send_records(kafka, name, [long, message()])
    first = start(name)
    first.wait_for("start")
    second = start(other)
    second.wait_for_partitions(1)
    first.wait_for("end", 2, 4 * POLL_INTERVAL)
    assert not repeated(first.all_recorded("start"))
    end(first, second)
    assert committed(kafka, first.group, name) == 2


def test_long_task_is_not_duplicated_while_its_consumer_owns_the_partition(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name = topic(2)
    send_records(kafka, name, [message(seconds=2 * POLL_INTERVAL)])
    first = start(name)
    first.wait_for("start")
    second = start(name)
    second.wait_for_partitions(1)
    first.wait_for("end", 1, 3 * POLL_INTERVAL)
    assert len(first.recorded("start")) == 1
    # The task outlasts the revocation, so its partition may have moved to the other worker, which runs it once.
    assert len(second.recorded("start")) <= 1
    end(first, second)
    assert committed(kafka, first.group, name, 2) == 1


def test_delayed_retry_keeps_its_attempt_number_through_a_rebalance(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name, other = topic(), topic()
    sent = message(times=2)
    send_records(kafka, name, [sent])
    retry = json.dumps({"max_attempts": 5, "delay": 1.5, "backoff": 1, "jitter": False})
    first = start(name, KSER_RETRY=retry)
    first.wait_for("attempt")
    second = start(other)
    second.wait_for_partitions(1)
    first.wait_for("end")
    assert first.all_recorded("attempt") == [f"{sent.uuid}/{number}" for number in (1, 2, 3)]
    assert set(first.recorded("revoked")) - {"0"}, "no partition was revoked, so the test shows nothing"
    end(first, second)
    assert committed(kafka, first.group, name) == 1


def test_cooperative_rebalance_moves_few_partitions_and_duplicates_nothing(
    kafka: Kafka, start: Start, topic: Callable[..., str], request: pytest.FixtureRequest
) -> None:
    cooperative: dict[str, Any] = {"options": {"partition_assignment_strategy": "cooperative-sticky"}}
    if "python_kafka" in request.node.name:
        if not has_cooperative_assignor():
            pytest.skip("kafka-python 2 has no cooperative assignor")
        cooperative = {"COOPERATIVE": "1"}
    name = topic(4)
    first = start(name, **cooperative)
    first.wait_for_partitions(4)
    flow = MessageFlow(kafka, name, 4)
    flow.start()
    try:
        first.wait_for("end", 50)
        second = start(name, **cooperative)
        second.wait_for_partitions(2)
        second.wait_for("end", 50)
        end(second)
        first.wait_for_partitions(4)
    finally:
        flow.stop()
    wait_until(lambda: set(first.all_recorded("end")) >= set(uuids(flow.sent)), "all messages are handled")
    assert "0" not in first.recorded("assigned"), "the first worker has lost all partitions"
    end(first)
    assert not repeated(first.all_recorded("end"))
    assert committed(kafka, first.group, name, 4) == len(flow.sent)


def has_cooperative_assignor() -> bool:
    """Return whether the installed kafka-python has a cooperative assignor."""
    return (Path(kafka.coordinator.assignors.__file__).parent / "cooperative_sticky.py").exists()


# -- workers -----------------------------------------------------------------------------------------------------------


def test_four_workers_keep_the_order_per_key_and_run_keys_in_parallel(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name = topic()
    keys = ["a", "b", "c", "d"]
    messages = [message(seconds=0.05) for _ in range(40)]
    send_records(kafka, name, messages, keys=keys)
    worker = start(name, KSER_WORKERS="4")
    worker.wait_for("end", len(messages))
    key_of = {sent.uuid: keys[number % 4] for number, sent in enumerate(messages)}
    events: dict[str, list[tuple[str, str]]] = defaultdict(list)
    running = max_running = 0
    for entry in entries(worker.ledger):
        if entry.event in ("start", "end"):
            events[key_of[entry.subject]].append((entry.event, entry.subject))
            running += 1 if entry.event == "start" else -1
            max_running = max(max_running, running)
    for key in keys:
        lane = [sent.uuid for sent in messages if key_of[sent.uuid] == key]
        assert events[key] == [(event, uuid) for uuid in lane for event in ("start", "end")]
    assert max_running == 4
    end(worker)
    assert committed(kafka, worker.group, name) == len(messages)


def test_records_finished_above_a_long_task_are_not_run_again_after_shutdown(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name = topic()
    long, others = message(seconds=60), [message() for _ in range(20)]
    send_records(kafka, name, [*others[:3], long, *others[3:]])
    settings = {"KSER_WORKERS": "2", "KSER_SHUTDOWN_TIMEOUT": "0.5"}
    first = start(name, **settings)
    first.wait_for("end", len(others))
    end(first)
    assert committed(kafka, first.group, name) == 3
    second = start(name, **settings)
    second.wait_for("start")
    last = message()
    send_records(kafka, name, [last])
    second.wait_for("end")
    assert sorted(second.recorded("start")) == sorted(uuids([long, last]))
    end(second)


# -- dead letters ------------------------------------------------------------------------------------------------------


def test_dead_letters_are_written_before_their_offset_is_committed(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name, dead_letter_topic = topic(), topic()
    failing, unknown, successful = message(then="fail"), message("shop.Unknown"), message()
    send_records(kafka, name, [b"\xff{", unknown, failing, successful], keys=["k"])
    retry = json.dumps({"max_attempts": 2, "delay": 0})
    worker = start(name, KSER_DEAD_LETTER=dead_letter_topic, KSER_RETRY=retry)
    worker.wait_for("end")
    letters = read(kafka.bootstrap_servers, dead_letter_topic, 3)
    headers = [
        {key.removeprefix("kser-dlq-"): (value or b"").decode() for key, value in letter.headers} for letter in letters
    ]
    assert [letter.value for letter in letters] == [b"\xff{", unknown.dumps().encode(), failing.dumps().encode()]
    assert {letter.key for letter in letters} == {b"k"}
    assert [failure["reason"] for failure in headers] == ["undecodable", "unknown-entrypoint", "failed"]
    assert [failure["attempts"] for failure in headers] == ["1", "1", "2"]
    assert [failure["offset"] for failure in headers] == ["0", "1", "2"]
    assert {(failure["topic"], failure["partition"]) for failure in headers} == {(name, "0")}
    assert headers[2]["error-class"] == "ValueError"
    assert "scripted failure" in headers[2]["error-message"]
    end(worker)
    assert committed(kafka, worker.group, name) == 4


def test_unwritable_dead_letter_blocks_its_partition_until_written(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name = topic()
    send_records(kafka, name, [message(then="fail")])
    worker = start(name, KSER_DEAD_LETTER="true", options={"auto_commit_interval_ms": 100})
    worker.wait_for_text("the partition is paused until the write succeeds", 30)
    text = f"offset 0 of {Partition(name, 0)} failed (failed) and its dead letter cannot be written to '{name}.dlq'"
    assert text in worker.text
    # A poll that started before the partition was blocked may still fetch records.
    time.sleep(1)
    send_records(kafka, name, [message()])
    time.sleep(1)
    assert committed(kafka, worker.group, name) == 0
    assert not worker.all_recorded("end")
    kafka.create_topic(f"{name}.dlq")
    worker.wait_for("end", 1, 60)
    wait_until(lambda: committed(kafka, worker.group, name) == 2, "both messages are finished")
    assert len(worker.all_recorded("start")) == 2, "the failed message ran again"
    end(worker)
    kafka.delete_topic(f"{name}.dlq")
