"""Short chaos runs: every kind of fault hits, and the promises are checked with the ledger and Kafka.

``KSER_TEST_CHAOS_SEED`` replays a run; ``KSER_TEST_CHAOS_SECONDS`` is the duration of each churn; the runs add their
figures to the file that ``KSER_TEST_CHAOS_TABLE`` names. ``python -m tests.chaos`` is the long run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos import hits, report, scenarios
from tests.chaos.cluster import Cluster
from tests.chaos.conftest import SEED
from tests.chaos.history import (
    BROKER_KILL,
    BROKER_STOP,
    FENCED,
    JOIN,
    KILL,
    LEADER_KILL,
    MORE_PARTITIONS,
    MOVED,
    NEW_TOPIC,
    STOP,
    TERM,
)
from tests.chaos.run import Outcome
from tests.kafka.broker import KafkaBroker

# kafka-python leaves the sockets of connections that were refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

SECONDS = float(os.environ.get("KSER_TEST_CHAOS_SECONDS") or 24)


def check(outcomes: Sequence[Outcome], *faults: str) -> None:
    """Assert that all promises hold, and that each of these faults hit."""
    for outcome in outcomes:
        print(report.text(outcome), end="\n\n")
    report.add_to_table(outcomes)
    violations = [
        f"{outcome.transport}: {text}"
        for outcome in outcomes
        for text in (*outcome.violations, *(outcome.last_output if outcome.violations else ()))
    ]
    replay = f"{SEED}={outcomes[0].seed} plans the same run"
    assert not violations, "\n".join((replay, *violations))
    for outcome in outcomes:
        missed = [fault for fault in faults if not outcome.hits[fault]]
        assert not missed, f"{outcome.transport}: no {', '.join(missed)} hit, so the run proves nothing; {replay}"


@pytest.mark.parametrize("transport", scenarios.TRANSPORTS)
def test_consumer_group_keeps_its_promises_under_churn(
    kafka: KafkaBroker, tmp_path: Path, seed: int, transport: str
) -> None:
    outcomes = scenarios.churn(kafka, tmp_path, seed, SECONDS, transport)
    check(outcomes, KILL, TERM, STOP, JOIN, hits.EXIT)


def test_broker_outage_duplicates_no_message(own_kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    check(scenarios.broker_outage(own_kafka, tmp_path, seed), BROKER_STOP, BROKER_KILL)


def test_kill_before_the_first_commit_loses_no_message(kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    check(scenarios.first_start_killed(kafka, tmp_path, seed), hits.FIRST_KILL)


def test_records_in_added_partitions_are_consumed(kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    check(scenarios.partitions_added(kafka, tmp_path, seed), MORE_PARTITIONS)


def test_task_may_run_ten_times_longer_than_max_poll_interval(kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    check(scenarios.long_task(kafka, tmp_path, seed), hits.LONG_TASK, JOIN)


def test_random_payloads_are_dead_lettered_and_block_nothing(kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    outcomes = scenarios.random_payloads(kafka, tmp_path, seed)
    check(outcomes, hits.RANDOM_PAYLOAD, hits.HOSTILE_RECORD, KILL)
    assert all(outcome.hits[hits.RANDOM_PAYLOAD] == scenarios.PAYLOADS for outcome in outcomes)


def test_second_process_with_an_instance_id_ends_the_first_and_loses_no_message(
    kafka: KafkaBroker, tmp_path: Path, seed: int
) -> None:
    check(scenarios.member_fenced(kafka, tmp_path, seed), FENCED)


def test_every_message_of_a_topic_that_was_created_again_is_done(kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    check(scenarios.topic_created_again(kafka, tmp_path, seed), NEW_TOPIC)


def test_group_runs_each_message_from_its_moved_offsets_on(kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    check(scenarios.offsets_moved(kafka, tmp_path, seed), MOVED)


def test_leader_loss_duplicates_no_message(cluster: Cluster, tmp_path: Path, seed: int) -> None:
    check(scenarios.leader_outage(cluster, tmp_path, seed), LEADER_KILL)
