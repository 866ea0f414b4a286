"""History of a finished run: the orders, the ledger, the database, and the faults."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

from tests.chaos import ledger
from tests.chaos.history import Fault
from tests.chaos_operations.orders import Order
from tests.chaos_operations.plan import HELD, LONG_OUTAGE, SHORT_OUTAGE
from tests.chaos_operations.shop import Told
from tests.chaos_operations.worker import LATE

#: What is done to the database.
OUTAGES = (SHORT_OUTAGE, LONG_OUTAGE, HELD)


class Rules(NamedTuple):
    """Settings that promises depend on, in seconds."""

    lease: float = 3
    heartbeat: float = 1
    shutdown_timeout: float = 3
    #: Operations that are open and do not move for so long are stuck.
    patience: float = 30


class Run(NamedTuple):
    """A process ran a task once, or began to."""

    told: Told
    process: str
    start: float
    #: Where the ledger was then.
    place: int
    end: float | None = None
    end_place: int | None = None
    outcome: str = ""


class Kept(NamedTuple):
    """An operation as the database has it."""

    uuid: str
    status: str
    #: What it ended with, and what each task did, with ``None`` for one that has not succeeded.
    retval: Mapping[str, Any]
    gave: Sequence[Any]
    tasks: Sequence[str]
    #: Position, number and status of each attempt.
    attempts: Sequence[tuple[int, int, str]]
    #: Kind, uuid and text of each event.
    events: Sequence[tuple[str, str | None, str | None]]
    #: By the clock of the ledger; None for one that has not ended.
    ended: float | None
    #: Of each event: when it was, by the clock of the ledger, and the epoch.
    marks: Sequence[tuple[float, int]] = ()

    @classmethod
    def of(cls, operation: Any, offset: float) -> Self:
        """What a registry gives.

        :param offset: from the database's clock to the ledger's.
        """
        row = operation._kser_snapshot.operation
        return cls(
            operation.uuid,
            operation.status,
            operation.result.retval,
            [
                task.result.retval.get(str(position)) if task.status == "SUCCESS" else None
                for position, task in enumerate(operation.tasks)
            ],
            [task.uuid for task in operation.tasks],
            [(attempt.position, attempt.number, attempt.status) for attempt in operation.attempts],
            [(event.kind, event.uuid, event.text) for event in operation.events],
            None if row.ended_at is None else row.ended_at + offset,
            [(event.at + offset, event.epoch) for event in operation.events],
        )


class Look(NamedTuple):
    """How far everything was at some time."""

    at: float
    #: Tasks that had begun or ended.
    moves: int
    #: Operations that had been accepted and had not ended; None when the database did not say.
    open: int | None


@dataclass
class History:
    """Everything that was recorded of a run."""

    rules: Rules
    orders: Sequence[Order]
    #: By uuid of what was handed in: when.
    accepted: Mapping[str, float]
    #: Uuids of what was resumed.
    resumed: frozenset[str]
    kept: Mapping[str, Kept]
    entries: Sequence[ledger.Entry]
    faults: Sequence[Fault] = ()
    looks: Sequence[Look] = field(default_factory=list)

    @cached_property
    def runs(self) -> dict[tuple[str, int], list[Run]]:
        """By operation and position, in the order in which they began."""
        found: dict[str, Run] = {}
        for entry in self.entries:
            if entry.event == ledger.START:
                found[entry.subject] = Run(Told.load(entry.subject), entry.process, entry.at, entry.position)
            elif entry.event in (ledger.END, ledger.FAIL) and entry.subject in found:
                ended = {"end": entry.at, "end_place": entry.position, "outcome": entry.event}
                found[entry.subject] = found[entry.subject]._replace(**ended)
        by_step: dict[tuple[str, int], list[Run]] = defaultdict(list)
        for run in found.values():
            by_step[run.told.operation, run.told.position].append(run)
        return dict(by_step)

    def runs_of(self, uuid: str) -> list[Run]:
        """All runs of tasks of an operation."""
        return [run for (operation, _), runs in self.runs.items() if operation == uuid for run in runs]

    @cached_property
    def starved(self) -> dict[str, list[tuple[float, float]]]:
        """By process: from when to when it did not get to run, although nothing was done to it."""
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for entry in self.entries:
            if entry.event == LATE:
                found[entry.process].append((entry.at - float(entry.subject), entry.at))
        return found

    def faults_of(self, process: str, *kinds: str) -> list[Fault]:
        """What was done to a process, or to a server where it is empty."""
        return [fault for fault in self.faults if fault.process == process and fault.kind in kinds]

    def story(self, uuid: str) -> list[str]:
        """All that is known about an operation: the evidence for what went wrong with it."""
        runs = self.runs_of(uuid)
        processes = {run.process for run in runs}
        told = [(run.start, f"start {_brief(run)}") for run in runs]
        told += [(run.end, f"{run.outcome} {_brief(run)}") for run in runs if run.end is not None]
        told += [
            (fault.at, f"{fault.kind} {fault.process} until {fault.until:.3f}")
            for fault in self.faults
            if fault.process in processes or not fault.process
        ]
        kept = self.kept.get(uuid)
        if kept is not None and kept.ended is not None:
            told.append((kept.ended, f"ended {kept.status}"))
        order = next((each for each in self.orders if each.uuid == uuid), None)
        texts = [f"    {at:.3f} {text}" for at, text in sorted(told)]
        return [f"{uuid}: {order}, handed in {self.accepted.get(uuid)}", *texts, f"    {kept}"]


def _brief(run: Run) -> str:
    told = run.told
    return f"task {told.position}, attempt {told.attempt}, {told.nonce} in {run.process} seeing {sorted(told.seen)}"
