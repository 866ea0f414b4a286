"""History of a finished run: Kafka's log, the ledger, samples of committed offsets, and the faults."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from tests.chaos import ledger

#: The ledger events of a failed attempt.
FAILURES = (ledger.FAIL, ledger.EXIT)

#: Faults of processes.
KILL, STOP, TERM, JOIN = "SIGKILL", "SIGSTOP", "SIGTERM", "consumer joined"
FENCED = "member fenced"
#: Faults of Kafka.
BROKER_STOP, BROKER_KILL, LEADER_KILL = "broker stopped", "broker killed", "leader killed"
MORE_PARTITIONS, NEW_TOPIC, MOVED = "partitions added", "topic created again", "offsets moved"


class LoggedRecord(NamedTuple):
    """A record in the log of Kafka; the subject is its name in the ledger."""

    subject: str
    partition: int
    offset: int
    key: str | None
    #: True if the task of the message succeeds, so that a dead letter of the message would be wrong.
    succeeds: bool = False


class DeadLetter(NamedTuple):
    """A record of the dead-letter topic, with the subject of its original record."""

    subject: str
    #: The process that wrote the dead letter.
    process: str
    at: float
    #: The offset in the dead-letter topic.
    position: int


class Fault(NamedTuple):
    """A fault of a process; or of Kafka, where ``process`` is empty."""

    kind: str
    process: str
    #: The time just before the fault.
    at: float
    #: The end of the fault: the process is gone or continued, or the broker responds again.
    until: float
    #: The process that took the group instance id of a fenced process.
    successor: str = ""


class Sample(NamedTuple):
    """The committed offsets of the group, and the sizes of the ledger and of the dead-letter topic just after that."""

    #: The time of Kafka's response.
    at: float
    #: The committed offset by partition; None when Kafka did not respond.
    committed: Mapping[int, int] | None
    #: Offsets above the committed one that the metadata of the commit marks as finished.
    finished_above: Mapping[int, frozenset[int]]
    ledger_position: int
    dead_letter_count: int
    #: The number of records in the log before the request.
    log_size: int

    def covers(self, record: LoggedRecord) -> bool:
        """Return whether the commit covers a record: the next owner of the partition would not receive it."""
        if self.committed is None:
            return False
        first = self.committed.get(record.partition, 0)
        return record.offset < first or record.offset in self.finished_above.get(record.partition, ())

    @property
    def lag(self) -> int:
        """The number of records that are not below the committed offsets."""
        return self.log_size - sum((self.committed or {}).values())


@dataclass
class Execution:
    """One run of a record in a process."""

    process: str
    start: float
    position: int
    end: float | None = None
    #: ``end``, ``fail``, ``exit`` or ``dead``; empty when the run never ended.
    outcome: str = ""

    def was_running(self, since: float, until: float) -> bool:
        """Return whether the run overlaps a period."""
        return self.start <= until and (self.end is None or self.end >= since)


@dataclass(frozen=True)
class Rules:
    """The settings of the consumers that promises depend on; times are in seconds."""

    session_timeout: float = 6
    commit_interval: float = 1
    shutdown_timeout: float = 30
    #: The longest time that a running task may delay the revocation of its partition.
    revoke_timeout: float = 10
    #: ``max.poll.interval.ms``, in runs that test it.
    poll_interval: float | None = None
    ordering: str = "key"
    #: True if the client revokes partitions without waiting for running tasks when partitions are added.
    revokes_at_once: bool = False
    #: True if permanent failures go to a dead-letter topic; otherwise a failure is only logged, and final.
    dead_letters: bool = False
    #: A group that has a lag and makes no progress for this time is stalled.
    stall_seconds: float = 30


@dataclass
class History:
    """The recorded facts of a run, or of its last part."""

    rules: Rules
    log: list[LoggedRecord]
    entries: list[ledger.Entry]
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    #: The part of the run before the topic or the committed offsets were replaced.
    earlier: History | None = None

    @cached_property
    def records(self) -> dict[str, LoggedRecord]:
        """The records of the log by subject."""
        return {record.subject: record for record in self.log}

    @cached_property
    def records_by_offset(self) -> dict[tuple[int, int], LoggedRecord]:
        """The records of the log by partition and offset."""
        return {(record.partition, record.offset): record for record in self.log}

    @cached_property
    def executions(self) -> dict[str, list[Execution]]:
        """The runs by subject, in the order in which they started."""
        executions: dict[str, list[Execution]] = defaultdict(list)
        running: dict[tuple[str, str], list[Execution]] = defaultdict(list)
        for entry in self.entries:
            key = (entry.process, entry.subject)
            if entry.event in (ledger.START, ledger.REFUSED):
                execution = Execution(entry.process, entry.at, entry.position)
                executions[entry.subject].append(execution)
                running[key].append(execution)
            if entry.event in (ledger.END, *FAILURES, ledger.REFUSED) and running[key]:
                execution = running[key].pop(0)
                execution.end = entry.at
                execution.outcome = "fail" if entry.event == ledger.REFUSED else entry.event
        for letter in self.dead:
            self._dead_letter(executions[letter.subject], letter)
        return dict(executions)

    def _dead_letter(self, executions: list[Execution], letter: DeadLetter) -> None:
        """End the last failed attempt before a dead letter, which is the cause of the dead letter."""
        # The timestamps of Kafka are rounded to milliseconds.
        latest = letter.at + 0.01
        failed = [
            execution
            for execution in executions
            if execution.process == letter.process and execution.outcome in FAILURES and (execution.end or 0) <= latest
        ]
        if not failed:
            # A payload that names no known task has a dead letter without an attempt in the ledger.
            failed = [Execution(letter.process, letter.at, letter.position)]
            executions.extend(failed)
            executions.sort(key=lambda execution: execution.start)
        failed[-1].end, failed[-1].outcome = letter.at, "dead"

    def is_final(self, execution: Execution) -> bool:
        """Return whether the record is finished after a run."""
        if execution.outcome in FAILURES:
            return not self.rules.dead_letters
        return bool(execution.outcome)

    @cached_property
    def finished(self) -> dict[str, tuple[int | None, int | None]]:
        """The ledger position of the first success and the offset of the first dead letter, by subject."""
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
        """Return whether a record had succeeded or was dead-lettered at the time of a sample."""
        done, dead = self.finished.get(subject, (None, None))
        return (done is not None and done <= sample.ledger_position) or (
            dead is not None and dead < sample.dead_letter_count
        )

    def faults_of(self, process: str, *kinds: str) -> list[Fault]:
        """Return the faults of a process, or of Kafka for an empty name."""
        return [fault for fault in self.faults if fault.process == process and fault.kind in kinds]

    def divide(self, fault: Fault, before: list[LoggedRecord], is_earlier: Callable[[ledger.Entry], bool]) -> History:
        """Return the last part of the history, with the earlier part in :attr:`earlier`.

        :param fault: the fault that divides the history.
        :param before: the log before the fault.
        :param is_earlier: returns whether an entry of the ledger belongs to the earlier part. The starts of processes
            belong to both parts.
        """
        earlier = replace(
            self,
            log=before,
            entries=[entry for entry in self.entries if entry.event == ledger.UP or is_earlier(entry)],
            samples=[sample for sample in self.samples if sample.at < fault.at],
        )
        return replace(
            self,
            entries=[entry for entry in self.entries if entry.event == ledger.UP or not is_earlier(entry)],
            samples=[sample for sample in self.samples if sample.at >= fault.until],
            faults=[*self.faults, fault],
            earlier=earlier,
        )

    def timeline(self, subject: str) -> list[str]:
        """Return the known events of a record, in order of time, as evidence of a violation."""
        record = self.records.get(subject)
        events = [(entry.at, f"{entry.event} in {entry.process}") for entry in self.entries if entry.subject == subject]
        processes = {entry.process for entry in self.entries if entry.subject == subject}
        events += [(letter.at, f"dead letter of {letter.process}") for letter in self.dead if letter.subject == subject]
        for fault in self.faults:
            if fault.process in processes or not fault.process:
                events.append((fault.at, f"{fault.kind} {fault.process} until {fault.until:.3f}"))
        events += [
            (entry.at, f"up: {entry.process}")
            for entry in self.entries
            if entry.event == ledger.UP and entry.process in processes
        ]
        if record is not None:
            events += self._commits(record)
        return [f"{subject}: {record}", *(f"    {at:.3f} {text}" for at, text in sorted(events))]

    def _commits(self, record: LoggedRecord) -> list[tuple[float, str]]:
        """Return the times at which the sampled commits began or ceased to cover a record."""
        responses = [sample for sample in self.samples if sample.committed is not None]
        changes = [
            (after.at, f"committed {dict(after.committed or {}).get(record.partition)}, covered: {covers}")
            for before, after in pairwise(responses)
            if (covers := after.covers(record)) != before.covers(record)
        ]
        return changes or [(sample.at, f"covered: {sample.covers(record)}") for sample in responses[-1:]]
