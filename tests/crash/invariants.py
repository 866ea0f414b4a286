"""Invariants that hold after every fault."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from kser import status as states
from kser.store.model import OperationSnapshot, TaskRow
from tests.crash.faults import CALL_FAULTS
from tests.crash.shop import TASK_NAMES, LedgerEntry
from tests.crash.simulation import Simulation


def violations_of(simulation: Simulation) -> list[str]:
    """Return the violations of the invariants in a finished run."""
    stored = simulation.snapshot()
    if stored is None:
        return [*simulation.violations, "the operation is lost: it is not stored"]
    return [
        *simulation.violations,
        *_check_end(simulation, stored),
        *_check_task_rows(simulation, stored),
        *_check_inputs(simulation, stored),
        *_check_duplicates(simulation),
    ]


def duplicate_runs(simulation: Simulation) -> int:
    """Return the number of runs of tasks and hooks that a run without faults does not have."""
    return sum(count - 1 for count in _run_counts(simulation).values())


def _run_counts(simulation: Simulation) -> Counter[tuple[str, int]]:
    return Counter((entry.name, entry.attempt) for entry in simulation.ledger if entry.name != "build")


def _check_end(simulation: Simulation, stored: OperationSnapshot) -> Iterator[str]:
    """Check that the accepted operation ended with the results of its tasks."""
    row, scenario = stored.operation, simulation.scenario
    if row.status != scenario.final_status:
        yield f"the operation ended {row.status}: {row.result}"
    if row.owner is not None or row.take_at is not None:
        yield f"the operation has ended, and is still claimed or due: {row}"
    successful = TASK_NAMES[:-1] if scenario.fails else TASK_NAMES
    retval = json.loads(row.result or "{}").get("retval", {})
    expected = {name: _stored_value(task) for name, task in zip(successful, stored.tasks, strict=False)}
    hook = "onerror" if scenario.fails else "onsuccess"
    hook_values = [entry.value for entry in simulation.ledger if entry.name == hook]
    if scenario.has_hooks and retval.pop(hook, "") not in hook_values:
        yield f"the stored result has none of the values that {hook} returned: {hook_values}"
    if retval != expected:
        yield f"the operation has the result {retval}, and its tasks have {expected}"


def _stored_value(task: TaskRow) -> Any:
    name = json.loads(task.params)["name"]
    return json.loads(task.result or "{}").get("retval", {}).get(name)


def _check_task_rows(simulation: Simulation, stored: OperationSnapshot) -> Iterator[str]:
    """Check that the result of each attempt was recorded once."""
    last = states.FAILED if simulation.scenario.fails else states.SUCCESS
    statuses = [task.status for task in stored.tasks]
    if statuses != [states.SUCCESS, states.SUCCESS, last]:
        yield f"the tasks are {statuses}"
    attempts = [(row.position, row.number, row.status) for row in stored.attempts]
    if attempts != [(0, 1, "SUCCESS"), (1, 1, "FAILED"), (1, 2, "SUCCESS"), (2, 1, last)]:
        yield f"the attempts are {attempts}"
    epochs = [row.epoch for row in stored.attempts]
    if epochs != sorted(epochs):
        yield f"a later attempt has an earlier epoch: {epochs}"
    for kind in ("accepted", "ended", "task-retried"):
        count = sum(event.kind == kind for event in stored.events)
        if count != 1:
            yield f"there are {count} events {kind!r}"


def _check_inputs(simulation: Simulation, stored: OperationSnapshot) -> Iterator[str]:
    """Check that each run received the stored results of earlier tasks, and that attempts share one task uuid."""
    uuids = {name: task.uuid for name, task in zip(TASK_NAMES, stored.tasks, strict=False)}
    for entry in simulation.ledger:
        if entry.name not in TASK_NAMES:
            continue
        earlier = TASK_NAMES[: TASK_NAMES.index(entry.name)]
        if entry.uuid != uuids[entry.name]:
            yield f"{entry} is not the stored task"
        if dict(entry.received) != {name: _value_at_start(entry, name) for name in earlier}:
            yield f"{entry} did not receive the results that were stored at its start"
        final = {
            name: _stored_value(task) for name, task in zip(TASK_NAMES, stored.tasks, strict=False) if name in earlier
        }
        if dict(entry.received) != final:
            yield f"{entry} did not receive the final results: {final}"


def _value_at_start(entry: LedgerEntry, name: str) -> Any:
    position = TASK_NAMES.index(name)
    status, result = entry.stored_tasks[position] if position < len(entry.stored_tasks) else ("", None)
    return json.loads(result)["retval"][name] if status == states.SUCCESS else None


def _check_duplicates(simulation: Simulation) -> Iterator[str]:
    """Check that a run was repeated only if its process died, or stalled for longer than its lease."""
    allowed = sum(fault.kind not in CALL_FAULTS for fault, _call in simulation.injected)
    duplicates = duplicate_runs(simulation)
    if duplicates > allowed:
        yield f"there are {duplicates} duplicate runs, and {allowed} are allowed: {_run_counts(simulation)}"
    builds = sum(entry.name == "build" for entry in simulation.ledger)
    if builds > 1 + allowed + simulation.failed_sends:
        yield f"the tasks were built {builds} times"
