"""History of a finished run: Kafka's log, the ledger, samples of committed offsets, and the faults."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from tests.chaos import ledger

#: What an attempt that failed is noted as.
FAILURES = (ledger.FAIL, ledger.EXIT)

#: Faults of processes.
KILL, STOP, TERM, JOIN = "SIGKILL", "SIGSTOP", "SIGTERM", "consumer joined"
#: Faults of Kafka.
BROKER_STOP, BROKER_KILL, LEADER_KILL = "broker stopped", "broker killed", "leader killed"
MORE_PARTITIONS = "partitions added"


class Logged(NamedTuple):
    """A record as Kafka keeps it. The subject is what the ledger calls it."""

    subject: str
    partition: int
    offset: int
    key: str | None


class DeadLetter(NamedTuple):
    """A record of the dead-letter topic, and which record it is about."""

    subject: str
    #: Who wrote it.
    process: str
    at: float
    #: Its own offset.
    position: int


class Fault(NamedTuple):
    """Something that was done to a process, or to a broker."""

    kind: str
    process: str
    #: Before it was done.
    at: float
    #: When it was over: the process is gone, or was continued; the broker answers again.
    until: float


class Sample(NamedTuple):
    """What Kafka said of the group, and then, read after the answer was there, how far ledger and dead letters were."""

    #: When the answer was there.
    at: float
    #: None when Kafka did not answer.
    committed: Mapping[int, int] | None
    #: Offsets above the committed one that the commit's metadata declares as finished.
    above: Mapping[int, frozenset[int]]
    ledger_position: int
    dead_position: int
    #: How many records were in the log before Kafka was asked.
    logged: int

    def covers(self, record: Logged) -> bool:
        """Whether the next owner of the partition would not be given this record."""
        if self.committed is None:
            return False
        first = self.committed.get(record.partition, 0)
        return record.offset < first or record.offset in self.above.get(record.partition, ())

    @property
    def lag(self) -> int:
        """Records that are not below the committed offsets."""
        return self.logged - sum((self.committed or {}).values())


@dataclass
class Execution:
    """A process ran a record once."""

    process: str
    start: float
    position: int
    end: float | None = None
    #: ``end``, ``fail``, ``exit``, ``dead``; empty when it never came to an end.
    outcome: str = ""

    def was_running(self, begin: float, end: float) -> bool:
        """Whether it ran at some time between these two."""
        return self.start <= end and (self.end is None or self.end >= begin)


@dataclass(frozen=True)
class Rules:
    """The settings of the consumers, in seconds, as far as promises depend on them."""

    session: float = 6
    commit_interval: float = 1
    shutdown_timeout: float = 30
    #: How long a task may hold a partition that is to be given up.
    revoke_timeout: float = 10
    #: ``max.poll.interval.ms``, where a run is about that.
    poll_interval: float | None = None
    ordering: str = "key"
    #: Whether the client gives partitions away without waiting for what runs when it hears of new ones.
    hasty: bool = False
    #: Whether what failed for good goes to a dead-letter topic; otherwise a failure is final, and logged.
    dead_letters: bool = False
    #: A group with messages to handle that makes no progress for so long is stuck.
    patience: float = 30


@dataclass
class History:
    """Everything that was recorded of a run."""

    rules: Rules
    log: list[Logged]
    entries: list[ledger.Entry]
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)

    @cached_property
    def records(self) -> dict[str, Logged]:
        return {record.subject: record for record in self.log}

    @cached_property
    def places(self) -> dict[tuple[int, int], Logged]:
        return {(record.partition, record.offset): record for record in self.log}

    @cached_property
    def executions(self) -> dict[str, list[Execution]]:
        """By subject, in the order in which they began."""
        found: dict[str, list[Execution]] = defaultdict(list)
        running: dict[tuple[str, str], list[Execution]] = defaultdict(list)
        for entry in self.entries:
            place = (entry.process, entry.subject)
            if entry.event in (ledger.START, ledger.REFUSED):
                execution = Execution(entry.process, entry.at, entry.position)
                found[entry.subject].append(execution)
                running[place].append(execution)
            if entry.event in (ledger.END, *FAILURES, ledger.REFUSED) and running[place]:
                execution = running[place].pop(0)
                execution.end = entry.at
                execution.outcome = "fail" if entry.event == ledger.REFUSED else entry.event
        for letter in self.dead:
            self._bury(found[letter.subject], letter)
        return dict(found)

    def _bury(self, executions: list[Execution], letter: DeadLetter) -> None:
        """The last attempt before a dead letter was its cause, and is finished with it."""
        # Kafka counts in milliseconds.
        latest = letter.at + 0.01
        own = [each for each in executions if each.process == letter.process]
        failed = [each for each in own if each.outcome in FAILURES and (each.end or 0) <= latest]
        if not failed:
            # Nobody noted an attempt: a payload that names no known task.
            failed = [Execution(letter.process, letter.at, letter.position)]
            executions.extend(failed)
            executions.sort(key=lambda each: each.start)
        failed[-1].end, failed[-1].outcome = letter.at, "dead"

    def is_final(self, execution: Execution) -> bool:
        """Whether nothing is left to do for the record after this."""
        if execution.outcome in FAILURES:
            return not self.rules.dead_letters
        return bool(execution.outcome)

    @cached_property
    def finished(self) -> dict[str, tuple[int | None, int | None]]:
        """By subject: how far the ledger was when it was first done, and the dead letters when it was first there."""
        done: dict[str, int] = {}
        for entry in self.entries:
            failed = not self.rules.dead_letters and entry.event in (*FAILURES, ledger.REFUSED)
            if entry.event == ledger.END or failed:
                done.setdefault(entry.subject, entry.position)
        dead: dict[str, int] = {}
        for letter in self.dead:
            dead.setdefault(letter.subject, letter.position)
        return {subject: (done.get(subject), dead.get(subject)) for subject in done.keys() | dead.keys()}

    def was_finished(self, subject: str, sample: Sample) -> bool:
        """Whether the record was done or dead-lettered by the time of a sample."""
        done, dead = self.finished.get(subject, (None, None))
        return (done is not None and done <= sample.ledger_position) or (
            dead is not None and dead < sample.dead_position
        )

    def faults_of(self, process: str, *kinds: str) -> list[Fault]:
        return [fault for fault in self.faults if fault.process == process and fault.kind in kinds]

    def story(self, subject: str) -> list[str]:
        """All that is known about one record, in order of time: the evidence for what went wrong with it."""
        record = self.records.get(subject)
        told = [(entry.at, f"{entry.event} in {entry.process}") for entry in self.entries if entry.subject == subject]
        processes = {entry.process for entry in self.entries if entry.subject == subject}
        told += [(letter.at, f"dead letter of {letter.process}") for letter in self.dead if letter.subject == subject]
        for fault in self.faults:
            if fault.process in processes or not fault.process:
                told.append((fault.at, f"{fault.kind} {fault.process} until {fault.until:.3f}"))
        told += [(e.at, f"up: {e.process}") for e in self.entries if e.event == ledger.UP and e.process in processes]
        if record is not None:
            told += self._commits(record)
        return [f"{subject}: {record}", *(f"    {at:.3f} {text}" for at, text in sorted(told))]

    def _commits(self, record: Logged) -> list[tuple[float, str]]:
        """When the group was first seen not to have, and when to have, what covers a record."""
        answered = [sample for sample in self.samples if sample.committed is not None]
        changes = [
            (after.at, f"committed {dict(after.committed or {}).get(record.partition)}, covers it: {covers}")
            for before, after in pairwise(answered)
            if (covers := after.covers(record)) != before.covers(record)
        ]
        return changes or [(sample.at, f"covers it: {sample.covers(record)}") for sample in answered[-1:]]
