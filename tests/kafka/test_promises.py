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
    Worker,
    committed,
    config,
    entries,
    message,
    put,
    repeated,
    uuids,
    wait_until,
)
from tests.kafka.test_rebalance import Flow
from tests.transports.producer_contract import read

#: Seconds that a client may go without a poll; the longest drain is a third of it.
INTERVAL = 3.0

Start = Callable[..., Worker]


@pytest.fixture(params=TRANSPORTS)
def start(kafka: Kafka, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """``start(topic)`` starts a worker; they share group and ledger."""
    settings = config(kafka, max_poll_interval_ms=int(INTERVAL * 1000), session_timeout_ms=2000)
    with ExitStack() as workers:

        def starter(topic: str, *, options: Any = None, **environment: str) -> Worker:
            how = {**settings, **(options or {})}
            worker = Worker(how, topic, tmp_path / "ledger", transport=request.param, **environment)
            return workers.enter_context(worker)

        yield starter


def end(*workers: Worker) -> None:
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
    """The other one consumes another topic: everything is taken away, and what runs comes back."""
    name, other = topic(), topic()
    long = message(seconds=3 * INTERVAL)
    put(kafka, name, [long, message()])
    first = start(name)
    first.wait_for("start")
    second = start(other)
    second.wait_for_partitions(1)
    first.wait_for("end", 2, 4 * INTERVAL)
    assert not repeated(first.noted("start"))
    end(first, second)
    assert committed(kafka, first.group, name) == 2


def test_long_task_is_not_duplicated_while_its_consumer_owns_the_partition(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name = topic(2)
    put(kafka, name, [message(seconds=2 * INTERVAL)] * 1)
    first = start(name)
    first.wait_for("start")
    second = start(name)
    second.wait_for_partitions(1)
    first.wait_for("end", 1, 3 * INTERVAL)
    assert len(first.mine("start")) == 1
    # Its drain takes too long: it may have gone to the other one, once.
    assert len(second.mine("start")) <= 1
    end(first, second)
    assert committed(kafka, first.group, name, 2) == 1


def test_delayed_retry_keeps_its_attempt_number_through_a_rebalance(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name, other = topic(), topic()
    sent = message(times=2)
    put(kafka, name, [sent])
    retry = json.dumps({"max_attempts": 5, "delay": 1.5, "backoff": 1, "jitter": False})
    first = start(name, KSER_RETRY=retry)
    first.wait_for("attempt")
    second = start(other)
    second.wait_for_partitions(1)
    first.wait_for("end")
    assert first.noted("attempt") == [f"{sent.uuid}/{number}" for number in (1, 2, 3)]
    assert set(first.mine("revoked")) - {"0"}, "nothing was taken away: nothing was tested"
    end(first, second)
    assert committed(kafka, first.group, name) == 1


def test_cooperative_rebalance_moves_few_partitions_and_duplicates_nothing(
    kafka: Kafka, start: Start, topic: Callable[..., str], request: pytest.FixtureRequest
) -> None:
    how: dict[str, Any] = {"options": {"partition_assignment_strategy": "cooperative-sticky"}}
    if "python_kafka" in request.node.name:
        if not _is_cooperative():
            pytest.skip("kafka-python 2 has no cooperative assignor")
        how = {"COOPERATIVE": "1"}
    name = topic(4)
    first = start(name, **how)
    first.wait_for_partitions(4)
    flow = Flow(kafka, name)
    flow.start()
    try:
        first.wait_for("end", 50)
        second = start(name, **how)
        second.wait_for_partitions(2)
        second.wait_for("end", 50)
        end(second)
        first.wait_for_partitions(4)
    finally:
        flow.stop()
    wait_until(lambda: set(first.noted("end")) >= set(uuids(flow.sent)), "all are handled")
    assert [count for count in first.mine("assigned") if count == "0"] == [], "it kept its own"
    end(first)
    assert not repeated(first.noted("end"))
    assert committed(kafka, first.group, name, 4) == len(flow.sent)


def _is_cooperative() -> bool:
    return (Path(kafka.coordinator.assignors.__file__).parent / "cooperative_sticky.py").exists()


# -- workers -----------------------------------------------------------------------------------------------------------


def test_four_workers_keep_the_order_per_key_and_run_keys_in_parallel(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name = topic()
    keys = ["a", "b", "c", "d"]
    messages = [message(seconds=0.05) for _ in range(40)]
    put(kafka, name, messages, keys=keys)
    worker = start(name, KSER_WORKERS="4")
    worker.wait_for("end", len(messages))
    key_of = {each.uuid: keys[number % 4] for number, each in enumerate(messages)}
    events: dict[str, list[tuple[str, str]]] = defaultdict(list)
    running = most = 0
    for entry in entries(worker.ledger):
        if entry.event in ("start", "end"):
            events[key_of[entry.subject]].append((entry.event, entry.subject))
            running += 1 if entry.event == "start" else -1
            most = max(most, running)
    for key in keys:
        mine = [each.uuid for each in messages if key_of[each.uuid] == key]
        assert events[key] == [(event, uuid) for uuid in mine for event in ("start", "end")]
    assert most == 4
    end(worker)
    assert committed(kafka, worker.group, name) == len(messages)


def test_records_finished_above_a_long_task_are_not_run_again_after_shutdown(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name = topic()
    long, others = message(seconds=60), [message() for _ in range(20)]
    put(kafka, name, [*others[:3], long, *others[3:]])
    how = {"KSER_WORKERS": "2", "KSER_SHUTDOWN_TIMEOUT": "0.5"}
    first = start(name, **how)
    first.wait_for("end", len(others))
    end(first)
    assert committed(kafka, first.group, name) == 3
    second = start(name, **how)
    second.wait_for("start")
    last = message()
    put(kafka, name, [last])
    second.wait_for("end")
    assert sorted(second.mine("start")) == sorted(uuids([long, last]))
    end(second)


# -- dead letters ------------------------------------------------------------------------------------------------------


def test_dead_letters_are_written_before_their_offset_is_committed(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name, letters = topic(), topic()
    failing, unknown, good = message(then="fail"), message("nobody.Knows"), message()
    put(kafka, name, [b"\xff{", unknown, failing, good], keys=["k"])
    retry = json.dumps({"max_attempts": 2, "delay": 0})
    worker = start(name, KSER_DEAD_LETTER=letters, KSER_RETRY=retry)
    worker.wait_for("end")
    found = read(kafka.bootstrap_servers, letters, 3)
    told = [{key.removeprefix("kser-dlq-"): (value or b"").decode() for key, value in each.headers} for each in found]
    assert [each.value for each in found] == [b"\xff{", unknown.dumps().encode(), failing.dumps().encode()]
    assert {each.key for each in found} == {b"k"}
    assert [each["reason"] for each in told] == ["undecodable", "unknown-entrypoint", "failed"]
    assert [each["attempts"] for each in told] == ["1", "1", "2"]
    assert [each["offset"] for each in told] == ["0", "1", "2"]
    assert {(each["topic"], each["partition"]) for each in told} == {(name, "0")}
    assert (told[2]["error-class"], "as it was told" in told[2]["error-message"]) == ("ValueError", True)
    end(worker)
    assert committed(kafka, worker.group, name) == 4


def test_unwritable_dead_letter_blocks_its_partition_until_written(
    kafka: Kafka, start: Start, topic: Callable[..., str]
) -> None:
    name = topic()
    put(kafka, name, [message(then="fail")])
    worker = start(name, KSER_DEAD_LETTER="true", options={"auto_commit_interval_ms": 100})
    worker.wait_for_text("the partition is paused until the write succeeds", 30)
    text = f"offset 0 of {Partition(name, 0)} failed (failed) and its dead letter cannot be written to '{name}.dlq'"
    assert text in worker.text
    # A poll that is under way may still bring some.
    time.sleep(1)
    put(kafka, name, [message()])
    time.sleep(1)
    assert committed(kafka, worker.group, name) == 0
    assert not worker.noted("end")
    kafka.create_topic(f"{name}.dlq")
    worker.wait_for("end", 1, 60)
    wait_until(lambda: committed(kafka, worker.group, name) == 2, "both are done with")
    assert len(worker.noted("start")) == 2, "it was tried again"
    end(worker)
    kafka.delete_topic(f"{name}.dlq")
