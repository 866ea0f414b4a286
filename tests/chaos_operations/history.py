"""History of a finished run: the orders, the ledger, the database, and the faults."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

from kser.status import FINAL, SUCCESS
from tests.chaos import ledger
from tests.chaos.history import Fault
from tests.chaos_operations.orders import Order
from tests.chaos_operations.plan import LOCKED, LONG_OUTAGE, SHORT_OUTAGE
from tests.chaos_operations.shop import RunInfo
from tests.chaos_operations.worker import STARVED

#: Faults of the database.
OUTAGES = (SHORT_OUTAGE, LONG_OUTAGE, LOCKED)


class Rules(NamedTuple):
    """The settings that promises depend on, in seconds."""

    lease: float = 3
    heartbeat: float = 1
    shutdown_timeout: float = 3
    #: Open operations that make no progress for this time are stalled.
    stall_seconds: float = 30


class Run(NamedTuple):
    """One run of a task in a process."""

    info: RunInfo
    process: str
    start: float
    #: The size of the ledger at the start.
    start_position: int
    end: float | None = None
    end_position: int | None = None
    #: ``end`` or ``fail``; empty when the run never ended.
    outcome: str = ""


class StoredAttempt(NamedTuple):
    """An attempt in the database."""

    position: int
    number: int
    status: str


class StoredEvent(NamedTuple):
    """An event in the database; ``at`` is converted to the clock of the ledger."""

    kind: str
    uuid: str | None = None
    text: str | None = None
    at: float = 0.0
    epoch: int = 0


class StoredOperation(NamedTuple):
    """An operation in the database; times are converted to the clock of the ledger."""

    uuid: str
    status: str
    #: The ``retval`` of the operation's result.
    retval: Mapping[str, Any]
    #: The result of each task; None for a task that has not succeeded.
    task_results: Sequence[Any]
    task_uuids: Sequence[str]
    attempts: Sequence[StoredAttempt]
    events: Sequence[StoredEvent]
    #: None for an operation that has not ended.
    ended: float | None

    @classmethod
    def from_operation(cls, operation: Any, clock_offset: float) -> Self:
        """Return the facts about an operation that the registry returned.

        :param clock_offset: seconds from the clock of the database to that of the ledger.
        """
        events = [
            StoredEvent(event.kind, event.uuid, event.text, event.at + clock_offset, event.epoch)
            for event in operation.events
        ]
        ends = [event.at for event in events if event.kind == "ended"]
        return cls(
            uuid=operation.uuid,
            status=operation.status,
            retval=operation.result.retval,
            task_results=[
                task.result.retval.get(str(position)) if task.status == SUCCESS else None
                for position, task in enumerate(operation.tasks)
            ],
            task_uuids=[task.uuid for task in operation.tasks],
            attempts=[
                StoredAttempt(attempt.position, attempt.number, attempt.status) for attempt in operation.attempts
            ],
            events=events,
            ended=max(ends, default=None) if operation.status in FINAL else None,
        )


class ProgressSample(NamedTuple):
    """The progress of all operations at one time."""

    at: float
    #: The number of starts and ends of tasks in the ledger.
    task_events: int
    #: The number of accepted operations that had not ended; None if the database was unavailable.
    open: int | None


@dataclass
class History:
    """The recorded facts of a run."""

    rules: Rules
    orders: Sequence[Order]
    #: The time of acceptance, by uuid of the operation.
    accepted: Mapping[str, float]
    #: The uuids of the resumed operations.
    resumed: frozenset[str]
    #: The stored operations by uuid.
    stored: Mapping[str, StoredOperation]
    entries: Sequence[ledger.Entry]
    faults: Sequence[Fault] = ()
    samples: Sequence[ProgressSample] = field(default_factory=list)

    @cached_property
    def runs(self) -> dict[tuple[str, int], list[Run]]:
        """The runs by operation and position of the task, in the order in which they started."""
        by_subject: dict[str, Run] = {}
        for entry in self.entries:
            if entry.event == ledger.START:
                by_subject[entry.subject] = Run(RunInfo.load(entry.subject), entry.process, entry.at, entry.position)
            elif entry.event in (ledger.END, ledger.FAIL) and entry.subject in by_subject:
                by_subject[entry.subject] = by_subject[entry.subject]._replace(
                    end=entry.at, end_position=entry.position, outcome=entry.event
                )
        by_task: dict[tuple[str, int], list[Run]] = defaultdict(list)
        for run in by_subject.values():
            by_task[run.info.operation, run.info.position].append(run)
        return dict(by_task)

    def runs_of(self, uuid: str) -> list[Run]:
        """Return the runs of all tasks of an operation."""
        return [run for (operation, _), runs in self.runs.items() if operation == uuid for run in runs]

    @cached_property
    def starved(self) -> dict[str, list[tuple[float, float]]]:
        """The periods, by process, in which a process got no processor time although it had no fault."""
        periods: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for entry in self.entries:
            if entry.event == STARVED:
                periods[entry.process].append((entry.at - float(entry.subject), entry.at))
        return periods

    def faults_of(self, process: str, *kinds: str) -> list[Fault]:
        """Return the faults of a process, or of a server for an empty name."""
        return [fault for fault in self.faults if fault.process == process and fault.kind in kinds]

    def timeline(self, uuid: str) -> list[str]:
        """Return the known events of an operation, in order of time, as evidence of a violation."""
        runs = self.runs_of(uuid)
        processes = {run.process for run in runs}
        events = [(run.start, f"start {_run_text(run)}") for run in runs]
        events += [(run.end, f"{run.outcome} {_run_text(run)}") for run in runs if run.end is not None]
        events += [
            (fault.at, f"{fault.kind} {fault.process} until {fault.until:.3f}")
            for fault in self.faults
            if fault.process in processes or not fault.process
        ]
        operation = self.stored.get(uuid)
        if operation is not None and operation.ended is not None:
            events.append((operation.ended, f"ended {operation.status}"))
        order = next((order for order in self.orders if order.uuid == uuid), None)
        texts = [f"    {at:.3f} {text}" for at, text in sorted(events)]
        return [f"{uuid}: {order}, accepted at {self.accepted.get(uuid)}", *texts, f"    {operation}"]


def _run_text(run: Run) -> str:
    info = run.info
    return (
        f"task {info.position}, attempt {info.attempt}, {info.nonce} in {run.process},"
        f" with the results of {sorted(info.earlier_results)}"
    )
