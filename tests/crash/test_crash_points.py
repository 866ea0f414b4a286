"""Tests of crash points: operations end as promised when consumers die, sleep, or a call of theirs fails."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kser.dummy.broker import InMemoryBroker
from kser.store import retrying
from kser.store.memory import MemoryStore
from tests.crash.faults import KILLED, MOMENTS, POINTS, REFUSED, RUN, SLEPT, TROUBLES, UNKNOWN, Fault
from tests.crash.invariants import broken, doubled
from tests.crash.shop import SCENARIOS, Scenario
from tests.crash.simulation import Simulation
from tests.crash.table import Table
from tests.support import ROOT

TABLE = ROOT / "docs" / "crash-points.csv"
#: Set to write the table instead of comparing it.
WRITE = "KSER_TEST_WRITE_TABLES"

#: Runs with two faults, of each kind of store.
PAIRS_IN_MEMORY, PAIRS_IN_SQLITE = 1000, 200
#: Of each kind of case every so many-th is tried with SQLite too.
SQLITE_SAMPLE = 4
#: Runs in which much of what is called fails.
STORMS = 200

Go = Callable[..., Simulation]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Thousands of consumers die: nobody reads what they say, or waits for what they wait for."""
    logger = logging.getLogger("kser")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    monkeypatch.setattr(retrying, "_BACKOFF", lambda _failures: 0)
    yield
    logger.setLevel(before)
    InMemoryBroker.reset()


@pytest.fixture
def in_memory() -> Go:
    """Runs a scenario in a database of its own, in memory."""

    def go(scenario: Scenario, *plan: Fault) -> Simulation:
        clock = [0.0]
        InMemoryBroker.reset()
        return Simulation(MemoryStore(lambda: clock[0]), lambda now: clock.__setitem__(0, now), scenario, plan).run()

    return go


@pytest.fixture
def in_sqlite(tmp_path: Path) -> Iterator[Go]:
    """Runs scenarios in one SQLite file, one after the other."""
    sql = pytest.importorskip("kser.store.sql")
    offset = 0.0
    store = sql.SQLStore(f"sqlite:///{tmp_path / 'shop.db'}", synchronous="NORMAL", clock_offset=lambda: offset)

    def go(scenario: Scenario, *plan: Fault) -> Simulation:
        start = offset

        def set_clock(now: float) -> None:
            nonlocal offset
            offset = start + now

        InMemoryBroker.reset()
        return Simulation(store, set_clock, scenario, plan).run()

    yield go
    store.close()


def faults_of(simulation: Simulation, start: int = 0, moments: Sequence[str] = MOMENTS) -> Iterator[Fault]:
    """Everything that may go wrong in the calls of a run, from ``start`` on."""
    for call in simulation.calls[start:]:
        if call.number not in simulation.dull:
            for kind in POINTS[call.point]:
                for moment in moments if kind in SLEPT else ("",):
                    yield Fault(call.number, kind, moment)


def check(simulation: Simulation) -> None:
    """Nothing is broken, or the test fails with what happened."""
    if problems := broken(simulation):
        told = [f"{simulation.scenario}, with {', '.join(map(str, simulation.plan.values()))}:", *problems]
        told += [f"{call.number}: {call.process}: {call.point}" for call in simulation.calls]
        pytest.fail("\n".join(map(str, told)), pytrace=False)


def seeded(name: str) -> random.Random:
    """Chance that can be repeated: with the seed that is printed."""
    seed = int(os.environ.get("KSER_TEST_SEED", random.randrange(1 << 32)))
    print(f"{name}: KSER_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_undisturbed_run_duplicates_nothing(in_memory: Go, scenario: Scenario) -> None:
    simulation = in_memory(scenario)
    check(simulation)
    assert doubled(simulation) == 0


def test_every_crash_point_is_survived(in_memory: Go) -> None:
    """Also by those who go on as if they had died, and have not: in the end the table says what was seen."""
    table, wakings = Table(), Counter[str]()
    for scenario in SCENARIOS:
        # A failure makes no difference to who wakes up when.
        moments = ("claimed",) if scenario.fails else MOMENTS
        for fault in faults_of(in_memory(scenario), moments=moments):
            simulation = in_memory(scenario, fault)
            check(simulation)
            # One thing that goes wrong is nothing that whoever sends it hears of.
            assert (len(simulation.hits), simulation.unsent) == (1, 0), fault
            table.add(simulation)
            wakings.update(simulation.wakings)
    assert table.missing == []
    assert all(wakings[moment] > 100 for moment in MOMENTS), wakings
    if os.environ.get(WRITE):
        TABLE.write_text(table.text())
    assert TABLE.read_text() == table.text(), f"set {WRITE}=1 to write the table of crash points anew"


def _pairs(go: Go, chance: random.Random, count: int) -> None:
    hits = Counter[str]()
    singles = {scenario: list(faults_of(go(scenario))) for scenario in SCENARIOS}
    for _ in range(count):
        scenario = chance.choice(SCENARIOS)
        first = chance.choice(singles[scenario])
        once = go(scenario, first)
        second = chance.choice([*faults_of(once, first.at + 1), first])
        simulation = go(scenario, first, second)
        check(simulation)
        hits.update(f"{call.point}: {fault.kind}" for fault, call in simulation.hits)
    print(f"{count} pairs: {dict(sorted(hits.items()))}")
    assert sum(hits.values()) > count * 1.5


def test_two_faults_are_survived(in_memory: Go) -> None:
    _pairs(in_memory, seeded("two faults"), PAIRS_IN_MEMORY)


def test_two_faults_are_survived_with_sqlite(in_sqlite: Go) -> None:
    _pairs(in_sqlite, seeded("two faults"), PAIRS_IN_SQLITE)


def test_every_crash_point_is_survived_with_sqlite(in_sqlite: Go) -> None:
    table, seen = Table(), Counter[tuple[str, str, str]]()
    for scenario in SCENARIOS:
        simulation = in_sqlite(scenario)
        check(simulation)
        for fault in faults_of(simulation):
            kind = simulation.calls[fault.at].point, fault.kind, fault.moment
            seen[kind] += 1
            if seen[kind] % SQLITE_SAMPLE == 1:
                found = in_sqlite(scenario, fault)
                check(found)
                table.add(found)
    assert table.missing == []


def test_random_store_and_kafka_errors_duplicate_nothing(in_memory: Go) -> None:
    """Rule 33: an error or a missing response of the database or Kafka delays an operation and does nothing else."""
    chance = seeded("troubles")
    for _ in range(STORMS):
        scenario = chance.choice(SCENARIOS)
        share = chance.random() / 2
        plan = [Fault(at, chance.choice((REFUSED, UNKNOWN))) for at in range(400) if chance.random() < share]
        simulation = in_memory(scenario, *plan)
        check(simulation)
        assert doubled(simulation) == 0


def test_poison_message_fails_its_operation_after_twenty_consumer_deaths(in_memory: Go) -> None:
    """Rule 22: the twentieth death in one step is the last one."""
    scenario = SCENARIOS[0]
    plan: list[Fault] = []
    while True:
        simulation = in_memory(scenario, *plan)
        runs = [call.number for call in simulation.calls if call.point == RUN]
        if len(plan) >= 20 or len(runs) <= len(plan):
            break
        plan.append(Fault(runs[len(plan)], KILLED[0]))
    found: Any = simulation.look()
    assert found.operation.status == "FAILED"
    assert "20 consumers died" in found.operation.result
    assert sum(event.kind == "claimed" for event in found.events) == 21


def test_fault_kinds_match_those_of_the_crash_points() -> None:
    assert {kind for kinds in POINTS.values() for kind in kinds} == {*TROUBLES, *KILLED, *SLEPT}
