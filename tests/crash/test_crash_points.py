"""Tests of crash points: operations end as promised when processes die or stall, and when calls fail."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kser.dummy.broker import InMemoryBroker
from kser.store import retrying
from kser.store.memory import MemoryStore
from tests.crash.faults import (
    CALL_FAULTS,
    CRASH_POINTS,
    KILLED,
    KILLED_BEFORE,
    REFUSED,
    REPLY_LOST,
    RUN,
    STALLED,
    WAKE_EVENTS,
    Fault,
)
from tests.crash.invariants import duplicate_runs, violations_of
from tests.crash.shop import SCENARIOS, Scenario
from tests.crash.simulation import Simulation
from tests.crash.table import CrashPointTable
from tests.support import ROOT

TABLE = ROOT / "docs" / "crash-points.csv"
#: The environment variable with which the test writes the table instead of comparing it.
WRITE_TABLES = "KSER_TEST_WRITE_TABLES"

#: Number of runs with two faults, for each kind of store.
PAIRS_IN_MEMORY, PAIRS_IN_SQLITE = 1000, 200
#: One of this number of cases with the same crash point and fault also runs with SQLite.
SQLITE_SAMPLE = 4
#: Number of runs in which up to half of the calls fail.
RUNS_WITH_MANY_FAULTS = 200

Simulate = Callable[..., Simulation]


@pytest.fixture(autouse=True)
def no_logs_and_no_backoff(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Disable log and back-off, because thousands of consumers die."""
    logger = logging.getLogger("kser")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    monkeypatch.setattr(retrying, "_BACKOFF", lambda _failures: 0)
    yield
    logger.setLevel(before)
    InMemoryBroker.reset()


@pytest.fixture
def in_memory() -> Simulate:
    """Return a function that runs a scenario in a new in-memory store."""

    def simulate(scenario: Scenario, *plan: Fault) -> Simulation:
        clock = [0.0]
        InMemoryBroker.reset()
        return Simulation(MemoryStore(lambda: clock[0]), lambda now: clock.__setitem__(0, now), scenario, plan).run()

    return simulate


@pytest.fixture
def in_sqlite(tmp_path: Path) -> Iterator[Simulate]:
    """Return a function that runs a scenario in SQLite; all runs share one file."""
    sql = pytest.importorskip("kser.store.sql")
    offset = 0.0
    store = sql.SQLStore(f"sqlite:///{tmp_path / 'shop.db'}", synchronous="NORMAL", clock_offset=lambda: offset)

    def simulate(scenario: Scenario, *plan: Fault) -> Simulation:
        start = offset

        def set_clock(now: float) -> None:
            nonlocal offset
            offset = start + now

        InMemoryBroker.reset()
        return Simulation(store, set_clock, scenario, plan).run()

    yield simulate
    store.close()


def possible_faults(
    simulation: Simulation, start: int = 0, wake_events: Sequence[str] = WAKE_EVENTS
) -> Iterator[Fault]:
    """Return every fault that is possible in the calls of a run, from call number ``start`` on."""
    for call in simulation.calls[start:]:
        if call.number not in simulation.idle_calls:
            for kind in CRASH_POINTS[call.crash_point]:
                for wake_event in wake_events if kind in STALLED else ("",):
                    yield Fault(call.number, kind, wake_event)


def wake_events_of(scenario: Scenario) -> Sequence[str]:
    """Return the wake events that make a difference in a scenario."""
    if not scenario.takes_over:
        # The other events wake processes in the scenarios with takeovers too.
        return ("reaped", "claimed")
    # An operation that fails needs one event, and a reaper sends nothing that a consumer takes over.
    return ("claimed",) if scenario.fails else [event for event in WAKE_EVENTS if event != "reaped"]


def check(simulation: Simulation) -> None:
    """Fail the test with the calls of the run, if the run violates an invariant."""
    if violations := violations_of(simulation):
        report = [f"{simulation.scenario}, with {', '.join(map(str, simulation.plan.values()))}:", *violations]
        report += [f"{call.number}: {call.process}: {call.crash_point}" for call in simulation.calls]
        pytest.fail("\n".join(report), pytrace=False)


def seeded_random(name: str) -> random.Random:
    """Return a random generator, and print its seed, with which the test can be repeated."""
    seed = int(os.environ.get("KSER_TEST_SEED", random.randrange(1 << 32)))
    print(f"{name}: KSER_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_run_without_faults_duplicates_nothing(in_memory: Simulate, scenario: Scenario) -> None:
    simulation = in_memory(scenario)
    check(simulation)
    assert duplicate_runs(simulation) == 0


def test_every_crash_point_is_survived(in_memory: Simulate) -> None:
    """Inject each possible fault into each call; the table in the documentation shows the recoveries."""
    table, wake_events = CrashPointTable(), Counter[str]()
    for scenario in SCENARIOS:
        scenario_events = wake_events_of(scenario)
        for fault in possible_faults(in_memory(scenario), wake_events=scenario_events):
            simulation = in_memory(scenario, fault)
            check(simulation)
            # One fault never fails a send, because the store is tried three times.
            assert (len(simulation.injected), simulation.failed_sends) == (1, 0), fault
            table.add(simulation)
            wake_events.update(simulation.wake_events)
    assert table.missing == []
    assert all(wake_events[event] > 100 for event in WAKE_EVENTS), wake_events
    if os.environ.get(WRITE_TABLES):
        TABLE.write_text(table.text())
    assert TABLE.read_text() == table.text(), f"set {WRITE_TABLES}=1 to write the table of crash points again"


def _check_pairs(simulate: Simulate, generator: random.Random, count: int) -> None:
    """Run ``count`` random pairs of faults; the second one follows the first in the same run."""
    injected = Counter[str]()
    single_faults = {scenario: list(possible_faults(simulate(scenario))) for scenario in SCENARIOS}
    for _ in range(count):
        scenario = generator.choice(SCENARIOS)
        first = generator.choice(single_faults[scenario])
        after_first = simulate(scenario, first)
        second = generator.choice([*possible_faults(after_first, first.call_number + 1), first])
        simulation = simulate(scenario, first, second)
        check(simulation)
        injected.update(f"{call.crash_point}: {fault.kind}" for fault, call in simulation.injected)
    print(f"{count} pairs: {dict(sorted(injected.items()))}")
    assert sum(injected.values()) > count * 1.5


def test_two_faults_are_survived(in_memory: Simulate) -> None:
    _check_pairs(in_memory, seeded_random("two faults"), PAIRS_IN_MEMORY)


def test_two_faults_are_survived_with_sqlite(in_sqlite: Simulate) -> None:
    _check_pairs(in_sqlite, seeded_random("two faults"), PAIRS_IN_SQLITE)


def test_every_crash_point_is_survived_with_sqlite(in_sqlite: Simulate) -> None:
    table, cases = CrashPointTable(), Counter[tuple[str, str, str]]()
    for scenario in SCENARIOS:
        without_faults = in_sqlite(scenario)
        check(without_faults)
        for fault in possible_faults(without_faults):
            case = without_faults.calls[fault.call_number].crash_point, fault.kind, fault.wake_event
            cases[case] += 1
            if cases[case] % SQLITE_SAMPLE == 1:
                simulation = in_sqlite(scenario, fault)
                check(simulation)
                table.add(simulation)
    assert table.missing == []


def test_random_store_and_kafka_errors_duplicate_nothing(in_memory: Simulate) -> None:
    """Rule 33: an error or a missing response of the database or Kafka delays an operation and does nothing else."""
    generator = seeded_random("many faults")
    for _ in range(RUNS_WITH_MANY_FAULTS):
        scenario = generator.choice(SCENARIOS)
        share = generator.random() / 2
        plan = [
            Fault(number, generator.choice((REFUSED, REPLY_LOST)))
            for number in range(400)
            if generator.random() < share
        ]
        simulation = in_memory(scenario, *plan)
        check(simulation)
        assert duplicate_runs(simulation) == 0


def test_poison_message_fails_its_operation_after_twenty_consumer_deaths(in_memory: Simulate) -> None:
    """Rule 22: the twentieth death of a consumer in one step fails the step."""
    scenario = SCENARIOS[0]
    plan: list[Fault] = []
    while True:
        simulation = in_memory(scenario, *plan)
        runs = [call.number for call in simulation.calls if call.crash_point == RUN]
        if len(plan) >= 20 or len(runs) <= len(plan):
            break
        plan.append(Fault(runs[len(plan)], KILLED_BEFORE))
    stored = simulation.snapshot()
    assert stored is not None
    assert stored.operation.status == "FAILED"
    assert "20 consumers died" in (stored.operation.result or "")
    assert sum(event.kind == "claimed" for event in stored.events) == 21


def test_fault_kinds_match_those_of_the_crash_points() -> None:
    assert {kind for kinds in CRASH_POINTS.values() for kind in kinds} == {*CALL_FAULTS, *KILLED, *STALLED}
