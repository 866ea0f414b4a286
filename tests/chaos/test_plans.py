"""Tests of the seeded plans and of the ledger: the same seed gives the same faults, messages and payloads."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kser.controller import Controller
from tests.chaos import ledger, messages
from tests.chaos.history import BROKER_KILL, BROKER_STOP, FENCED, JOIN, KILL, STOP, TERM
from tests.chaos.plan import WEIGHTS, fault_plan, fence_plan
from tests.kafka.hostile import hostile_records
from tests.support import Clock

SEEDS = range(50)
OUTAGES = (BROKER_STOP, BROKER_KILL)


def test_plan_depends_on_the_seed_alone() -> None:
    assert fault_plan(7, 60) == fault_plan(7, 60)
    assert fault_plan(7, 60) != fault_plan(8, 60)


@pytest.mark.parametrize("seed", SEEDS)
def test_shortest_plan_contains_every_kind_of_fault(seed: int) -> None:
    assert {action.kind for action in fault_plan(seed, 24)} == set(WEIGHTS)


@pytest.mark.parametrize("seed", SEEDS)
def test_plan_spares_one_consumer_and_hits_each_other_one_at_a_time(seed: int) -> None:
    actions = [action for action in fault_plan(seed, 300) if action.kind != JOIN]
    for number, action in enumerate(actions):
        simultaneous = [action, *(other for other in actions[:number] if other.until > action.at)]
        assert len({each.slot for each in simultaneous}) == len(simultaneous) < 3


@pytest.mark.parametrize("seed", SEEDS)
def test_sigstop_lasts_longer_than_the_session(seed: int) -> None:
    stops = [action for action in fault_plan(seed, 100, session_timeout=6) if action.kind == STOP]
    assert stops
    assert all(stop.seconds >= 9 for stop in stops)


@pytest.mark.parametrize("seed", SEEDS)
def test_consumers_are_spared_during_a_broker_outage(seed: int) -> None:
    actions = fault_plan(seed, 200, outages=True)
    outages = [action for action in actions if action.kind in OUTAGES]
    assert len(outages) >= 2
    for outage, action in itertools.product(outages, actions):
        assert action == outage or action.until < outage.at or action.at > outage.until


@pytest.mark.parametrize("seed", SEEDS)
def test_two_members_are_fenced_and_no_slot_is_hit_twice_in_a_row(seed: int) -> None:
    actions = fence_plan(seed)
    assert actions == fence_plan(seed)
    assert sorted(action.kind for action in actions) == sorted([FENCED, FENCED, KILL, TERM])
    assert all(before.slot != after.slot for before, after in itertools.pairwise(actions))
    assert {action.slot for action in actions} <= {0, 1, 2}


def test_subject_of_a_hostile_record_is_its_uuid_if_the_record_can_run() -> None:
    records = hostile_records(messages.WORK)
    for offset, record in enumerate(records):
        header_bytes = sum(len(name) + len(value or b"") for name, value in record.headers)
        subject = messages.hostile_subject(3, offset, record.value, header_bytes)
        assert subject == (record.uuid or f"hostile-3-{offset}")


def test_same_seed_gives_same_messages_and_keys_stay_in_their_partitions() -> None:
    records = [*itertools.islice(messages.work_records(7, 4), 500)]
    assert records == [*itertools.islice(messages.work_records(7, 4), 500)]
    assert len({record.subject for record in records}) == 500
    partitions = {record.key: record.partition for record in records if record.key}
    assert all(partitions[record.key] == record.partition for record in records if record.key)
    assert {record.partition for record in records} == {0, 1, 2, 3}


def test_random_payloads_are_unique_and_all_fail_to_run() -> None:
    records = messages.random_payloads(7, 1000, 4)
    assert records == messages.random_payloads(7, 1000, 4)
    assert len({record.subject for record in records}) == len({record.value for record in records}) == 1000
    results = [Controller.run(record.value) for record in records]
    assert all(result.retcode for result in results)


def test_ledger_returns_its_entries_and_skips_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    assert ledger.read(path) == []
    assert ledger.size(path) == 0
    ledger.Ledger(path, "one").write(ledger.START, "a")
    ledger.Ledger(path, "two").write(ledger.END, "b")
    complete_size = ledger.size(path)
    with path.open("a") as file:
        file.write("start c on")
    entries = ledger.read(path)
    assert [(entry.event, entry.subject, entry.process) for entry in entries] == [
        ("start", "a", "one"),
        ("end", "b", "two"),
    ]
    assert entries[0].at <= entries[1].at
    assert entries[1].position == complete_size


def test_process_is_busy_between_start_and_end_of_a_long_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(ledger, "monotonic", clock)
    path = tmp_path / "ledger"
    assert not ledger.is_busy(path, "one")
    ledger_of_one = ledger.Ledger(path, "one")
    ledger_of_one.write(ledger.UP)
    ledger_of_one.write(ledger.START, "a")
    assert not ledger.is_busy(path, "one"), "the task may be short"
    clock.advance(ledger.LONG_TASK_SECONDS + 0.001)
    assert ledger.is_busy(path, "one")
    assert not ledger.is_busy(path, "two")
    ledger_of_one.write(ledger.END, "a")
    assert not ledger.is_busy(path, "one")
