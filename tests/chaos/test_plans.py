"""Tests of the seeded plans: the same seed gives the same faults, messages and payloads."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from kser.controller import Controller
from tests.chaos import ledger, messages, monkey
from tests.chaos.history import BROKER_KILL, BROKER_STOP, JOIN, STOP

SEEDS = range(50)
OUTAGES = (BROKER_STOP, BROKER_KILL)


def test_plan_depends_on_the_seed_alone() -> None:
    assert monkey.plan(7, 60) == monkey.plan(7, 60)
    assert monkey.plan(7, 60) != monkey.plan(8, 60)


@pytest.mark.parametrize("seed", SEEDS)
def test_shortest_plan_contains_every_kind_of_fault(seed: int) -> None:
    assert {action.kind for action in monkey.plan(seed, 24)} == {*monkey.WEIGHTS}


@pytest.mark.parametrize("seed", SEEDS)
def test_plan_spares_one_consumer_and_hits_each_other_one_at_a_time(seed: int) -> None:
    actions = [action for action in monkey.plan(seed, 300) if action.kind != JOIN]
    for number, action in enumerate(actions):
        during = [other for other in actions[:number] if other.until > action.at]
        assert len({other.slot for other in during} | {action.slot}) == len(during) + 1 < 3


@pytest.mark.parametrize("seed", SEEDS)
def test_sigstop_lasts_longer_than_the_session(seed: int) -> None:
    assert all(action.seconds >= 9 for action in monkey.plan(seed, 100, session=6) if action.kind == STOP)


@pytest.mark.parametrize("seed", SEEDS)
def test_consumers_are_spared_during_a_broker_outage(seed: int) -> None:
    actions = monkey.plan(seed, 200, outages=True)
    outages = [action for action in actions if action.kind in OUTAGES]
    assert len(outages) >= 2
    for outage, action in itertools.product(outages, actions):
        assert action == outage or action.until < outage.at or action.at > outage.until


def test_same_seed_gives_same_messages_and_keys_stay_in_their_partitions() -> None:
    orders = [*itertools.islice(messages.work(7, 4), 500)]
    assert orders == [*itertools.islice(messages.work(7, 4), 500)]
    assert len({order.subject for order in orders}) == 500
    places = {order.key: order.partition for order in orders if order.key}
    assert all(places[order.key] == order.partition for order in orders if order.key)
    assert {order.partition for order in orders} == {0, 1, 2, 3}


def test_random_payloads_are_unique_and_all_fail_to_run() -> None:
    orders = messages.rubbish(7, 1000, 4)
    assert orders == messages.rubbish(7, 1000, 4)
    assert len({order.subject for order in orders}) == len({order.value for order in orders}) == 1000
    results = [Controller.run(order.value) for order in orders]
    assert all(result.retcode for result in results)


def test_ledger_returns_its_entries_and_skips_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    assert ledger.read(path) == []
    assert ledger.size(path) == 0
    ledger.Ledger(path, "one").note(ledger.START, "a")
    ledger.Ledger(path, "two").note(ledger.END, "b")
    whole = ledger.size(path)
    with path.open("a") as file:
        file.write("start c on")
    entries = ledger.read(path)
    assert [entry[:3] for entry in entries] == [("start", "a", "one"), ("end", "b", "two")]
    assert entries[0].at <= entries[1].at
    assert entries[1].position == whole


def test_process_is_busy_between_its_start_and_end_entries(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    assert not ledger.is_busy(path, "one")
    notes = ledger.Ledger(path, "one")
    notes.note(ledger.UP)
    notes.note(ledger.START, "a")
    assert not ledger.is_busy(path, "one"), "it may be over in a moment"
    time.sleep(ledger.MOMENT)
    assert ledger.is_busy(path, "one")
    assert not ledger.is_busy(path, "two")
    notes.note(ledger.END, "a")
    assert not ledger.is_busy(path, "one")
