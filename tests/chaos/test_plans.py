"""What is random is made from a seed alone, and is what it is meant to be."""

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


def test_a_plan_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    assert monkey.plan(7, 60) == monkey.plan(7, 60)
    assert monkey.plan(7, 60) != monkey.plan(8, 60)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_kind_of_fault_is_in_the_shortest_plan(seed: int) -> None:
    assert {action.kind for action in monkey.plan(seed, 24)} == {*monkey.WEIGHTS}


@pytest.mark.parametrize("seed", SEEDS)
def test_one_consumer_is_always_left_alone_and_no_two_things_are_done_to_the_same(seed: int) -> None:
    actions = [action for action in monkey.plan(seed, 300) if action.kind != JOIN]
    for number, action in enumerate(actions):
        during = [other for other in actions[:number] if other.until > action.at]
        assert len({other.slot for other in during} | {action.slot}) == len(during) + 1 < 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stop_is_longer_than_the_session(seed: int) -> None:
    assert all(action.seconds >= 9 for action in monkey.plan(seed, 100, session=6) if action.kind == STOP)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_done_to_consumers_while_the_broker_is_away(seed: int) -> None:
    actions = monkey.plan(seed, 200, outages=True)
    outages = [action for action in actions if action.kind in OUTAGES]
    assert len(outages) >= 2
    for outage, action in itertools.product(outages, actions):
        assert action == outage or action.until < outage.at or action.at > outage.until


def test_messages_are_the_same_for_the_same_seed_and_keys_stay_in_their_partitions() -> None:
    orders = [*itertools.islice(messages.work(7, 4), 500)]
    assert orders == [*itertools.islice(messages.work(7, 4), 500)]
    assert len({order.subject for order in orders}) == 500
    places = {order.key: order.partition for order in orders if order.key}
    assert all(places[order.key] == order.partition for order in orders if order.key)
    assert {order.partition for order in orders} == {0, 1, 2, 3}


def test_random_payloads_are_all_different_and_none_of_them_is_a_message_that_can_be_handled() -> None:
    orders = messages.rubbish(7, 1000, 4)
    assert orders == messages.rubbish(7, 1000, 4)
    assert len({order.subject for order in orders}) == len({order.value for order in orders}) == 1000
    results = [Controller.run(order.value) for order in orders]
    assert all(result.retcode for result in results)


def test_a_ledger_gives_back_what_was_noted_and_leaves_out_a_line_that_is_being_written(tmp_path: Path) -> None:
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


def test_a_process_is_busy_while_it_has_noted_a_beginning_and_no_end(tmp_path: Path) -> None:
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
