"""Invariants that hold after every fault."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from kser import status as states
from tests.crash.faults import TROUBLES
from tests.crash.shop import STEPS, Entry
from tests.crash.simulation import Simulation


def broken(simulation: Simulation) -> list[str]:
    """What is wrong with how a scenario went."""
    found = simulation.look()
    if found is None:
        return [*simulation.wrong, "it is not stored: it was lost"]
    return [
        *simulation.wrong,
        *_end(simulation, found),
        *_tasks(simulation, found),
        *_runs(simulation, found),
        *_doubled(simulation),
    ]


def doubled(simulation: Simulation) -> int:
    """How many runs of tasks and hooks there were that an undisturbed operation does not have."""
    return sum(count - 1 for count in _counts(simulation).values())


def _counts(simulation: Simulation) -> Counter[tuple[str, int]]:
    return Counter((entry.what, entry.attempt) for entry in simulation.ledger if entry.what != "build")


def _end(simulation: Simulation, found: Any) -> Iterator[str]:
    """An operation that was accepted ends, with the results of its tasks."""
    row, scenario = found.operation, simulation.scenario
    if row.status != scenario.status:
        yield f"it ended {row.status}: {row.result}"
    if row.owner is not None or row.next_check_at is not None:
        yield f"it has ended, and is not let go: {row}"
    succeeded = STEPS[:-1] if scenario.fails else STEPS
    given = json.loads(row.result or "{}").get("retval", {})
    expected = {name: _mark(task) for name, task in zip(succeeded, found.tasks, strict=False)}
    hook = "onerror" if scenario.fails else "onsuccess"
    mine = [entry.mark for entry in simulation.ledger if entry.what == hook]
    if scenario.hooks and given.pop(hook, "") not in mine:
        yield f"{hook} gave {mine}, and that is not what is stored"
    if given != expected:
        yield f"its result is {given}, and the tasks gave {expected}"


def _mark(task: Any) -> Any:
    name = json.loads(task.params)["name"]
    return json.loads(task.result or "{}").get("retval", {}).get(name)


def _tasks(simulation: Simulation, found: Any) -> Iterator[str]:
    """A task's result is recorded once."""
    last = states.FAILED if simulation.scenario.fails else states.SUCCESS
    if [task.status for task in found.tasks] != [states.SUCCESS, states.SUCCESS, last]:
        yield f"its tasks are {[task.status for task in found.tasks]}"
    recorded = [(row.position, row.number, row.status) for row in found.attempts]
    if recorded != [(0, 1, "SUCCESS"), (1, 1, "FAILED"), (1, 2, "SUCCESS"), (2, 1, last)]:
        yield f"its attempts are {recorded}"
    epochs = [row.epoch for row in found.attempts]
    if epochs != sorted(epochs):
        yield f"a later attempt is of an earlier claim: {epochs}"
    for kind in ("accepted", "ended", "task-retried"):
        count = sum(event.kind == kind for event in found.events)
        if count != 1:
            yield f"there are {count} events {kind!r}"


def _runs(simulation: Simulation, found: Any) -> Iterator[str]:
    """A task sees exactly what is stored of those before it, and is the same at each attempt."""
    uuids = {name: task.uuid for name, task in zip(STEPS, found.tasks, strict=False)}
    for entry in simulation.ledger:
        if entry.what not in STEPS:
            continue
        before = STEPS[: STEPS.index(entry.what)]
        if entry.uuid != uuids[entry.what]:
            yield f"{entry} is not the task that is stored"
        if dict(entry.seen) != {name: _stored_mark(entry, name) for name in before}:
            yield f"{entry} does not see what was stored then"
        final = {name: _mark(task) for name, task in zip(STEPS, found.tasks, strict=False) if name in before}
        if dict(entry.seen) != final:
            yield f"{entry} does not see what is stored at the end: {final}"


def _stored_mark(entry: Entry, name: str) -> Any:
    position = STEPS.index(name)
    status, result = entry.stored[position] if position < len(entry.stored) else ("", None)
    return json.loads(result)["retval"][name] if status == states.SUCCESS else None


def _doubled(simulation: Simulation) -> Iterator[str]:
    """Something runs again only when its process died, or slept for longer than its lease."""
    allowed = sum(fault.kind not in TROUBLES for fault, _ in simulation.hits)
    if doubled(simulation) > allowed:
        yield f"{doubled(simulation)} runs are doubled, and {allowed} may be: {_counts(simulation)}"
    built = sum(entry.what == "build" for entry in simulation.ledger)
    if built > 1 + allowed + simulation.unsent:
        yield f"its tasks were built {built} times"
