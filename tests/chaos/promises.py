"""The promises about messages; each has a function that reads a history and returns the violations.

1. Every message is finished: its task succeeded, or the task cannot succeed and the message was dead-lettered.
2. No committed offset is ever above the lowest unfinished one.
3. A message runs again only if its process was killed, was stopped past its session, was fenced, or lost the
   partition, or if the committed offset was moved below it.
4. Messages with the same key first start in the order of the log, and do not overlap.
5. The group makes progress while it has a lag.
6. A process whose group instance id another process has taken starts nothing more.

If the topic or the committed offsets are replaced during a run, the history has two parts. The last part has a log of
its own: the records that the group must run from then on.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from tests.chaos import ledger
from tests.chaos.history import (
    BROKER_KILL,
    BROKER_STOP,
    FENCED,
    KILL,
    LEADER_KILL,
    MORE_PARTITIONS,
    NEW_TOPIC,
    STOP,
    TERM,
    Execution,
    Fault,
    History,
    LoggedRecord,
    Sample,
)

#: Seconds that a commit may be late, because the poll loop requests it and Kafka must respond.
COMMIT_DELAY = 3.0
#: Seconds after SIGCONT in which a task may write the start that SIGSTOP interrupted.
WAKE_UP = 0.05
#: Seconds by which a consumer may end a grace period too early.
GRACE_TOLERANCE = 0.5
#: Seconds from the revocation of partitions until their next owner starts a record of them.
TAKEOVER = 1.0
#: Seconds after which consumers have noticed that their topic was created again: the maximum age of the metadata, and
#: the time for a request.
NOTICE_SECONDS = 1 + COMMIT_DELAY
#: The maximum number of subjects whose timelines are the evidence of a violation.
MAX_EVIDENCE = 5


class Violation(NamedTuple):
    """A broken promise with its evidence."""

    promise: int
    text: str
    evidence: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((f"promise {self.promise}: {self.text}", *self.evidence))


class Duplicate(NamedTuple):
    """A record that started again although an earlier execution had not failed."""

    subject: str
    earlier: Execution
    later: Execution
    #: The reason why the duplicate is allowed; None for a violation.
    cause: str | None


def violations(history: History) -> list[Violation]:
    """Return the violations of all promises, except that the messages of an earlier part need not be finished."""
    earlier = violations(history.earlier) if history.earlier else []
    return [
        *(violation for violation in earlier if violation.promise != 1),
        *unfinished(history),
        *wrongly_failed(history),
        *committed_too_far(history),
        *forbidden_duplicates(history),
        *unexpected(history),
        *out_of_order(history),
        *stalls(history),
        *started_when_fenced(history),
    ]


# -- 1: every message is finished --------------------------------------------------------------------------------------


def unfinished(history: History) -> list[Violation]:
    """Return the violation about messages of the log that neither succeeded nor were dead-lettered."""
    missing = [record.subject for record in history.log if record.subject not in history.finished]
    if not missing:
        return []
    return [
        Violation(1, f"{len(missing)} of {len(history.log)} messages were not finished", _evidence(history, missing))
    ]


def wrongly_failed(history: History) -> list[Violation]:
    """Return the violation about messages that were dead-lettered or rejected although their tasks succeed."""
    ended = {entry.subject for entry in history.entries if entry.event == ledger.END}
    failed = [
        record.subject
        for record in history.log
        if record.succeeds and record.subject in history.finished and record.subject not in ended
    ]
    if not failed:
        return []
    return [Violation(1, f"{len(failed)} messages failed although their tasks succeed", _evidence(history, failed))]


# -- 2: commits --------------------------------------------------------------------------------------------------------


def committed_too_far(history: History) -> list[Violation]:
    """Return the violation about commits that cover unfinished records.

    The ledger position of a sample was read after its offsets, so the ledger up to there contains every record that was
    finished before the commit.
    """
    subjects = covered_unfinished(history)
    if not subjects:
        return []
    text = f"{len(subjects)} messages were covered by a commit while they were unfinished"
    return [Violation(2, text, _evidence(history, subjects))]


def covered_unfinished(history: History) -> list[str]:
    """Return the subjects that a commit covered too early."""
    subjects: dict[str, None] = {}
    checked: set[str] = set()
    # The lowest offset is last, so that it can be popped.
    uncovered: dict[int, list[LoggedRecord]] = defaultdict(list)
    for record in sorted(history.log, key=lambda record: record.offset, reverse=True):
        uncovered[record.partition].append(record)
    for sample in history.samples:
        for record in _newly_covered(sample, uncovered, history, checked):
            if not history.was_finished(record.subject, sample):
                subjects.setdefault(record.subject)
    return list(subjects)


def _newly_covered(
    sample: Sample, uncovered: dict[int, list[LoggedRecord]], history: History, checked: set[str]
) -> Iterator[LoggedRecord]:
    """Yield the records that this sample is the first to cover; a finished record stays finished."""
    for partition, committed in (sample.committed or {}).items():
        records = uncovered.get(partition, [])
        while records and records[-1].offset < committed:
            record = records.pop()
            if record.subject not in checked:
                yield record
    for partition, offsets in sample.finished_above.items():
        for offset in offsets:
            above = history.records_by_offset.get((partition, offset))
            if above is not None and above.subject not in checked:
                checked.add(above.subject)
                yield above


# -- 3: duplicates -----------------------------------------------------------------------------------------------------


def forbidden_duplicates(history: History) -> list[Violation]:
    """Return the violation about records that started again without an allowed cause."""
    forbidden = [duplicate.subject for duplicate in duplicates(history) if duplicate.cause is None]
    if not forbidden:
        return []
    subjects = list(dict.fromkeys(forbidden))
    return [Violation(3, f"{len(subjects)} messages were duplicated without cause", _evidence(history, subjects))]


def unexpected(history: History) -> list[Violation]:
    """Return the violation about runs of records that are not in the log, for example below a moved offset."""
    subjects = [subject for subject in history.executions if subject not in history.records]
    if not subjects:
        return []
    return [Violation(3, f"{len(subjects)} messages ran that are not in the log", _evidence(history, subjects))]


def duplicates(history: History) -> list[Duplicate]:
    """Return each pair of executions of a record of which the earlier had not failed when the later started.

    A retry after a failure is no duplicate, also if the partition moved to another process in between.
    """
    result: list[Duplicate] = []
    for subject, executions in history.executions.items():
        for number, later in enumerate(executions):
            for earlier in executions[:number]:
                failed = earlier.outcome in (ledger.FAIL, ledger.EXIT) and (earlier.end or 0) <= later.start
                if not failed or history.is_final(earlier):
                    result.append(Duplicate(subject, earlier, later, _cause(history, subject, earlier, later)))
    return result


def duplicates_by_cause(history: History) -> Counter[str]:
    """Count the records with an allowed duplicate, by cause; each record counts once."""
    causes = {duplicate.subject: duplicate.cause for duplicate in duplicates(history) if duplicate.cause}
    return Counter(causes.values())


def _cause(history: History, subject: str, earlier: Execution, later: Execution) -> str | None:
    """Return the fault or time limit that allows a duplicate; None if there is none."""
    for fault in _losses(history, earlier):
        if fault.at > later.start or (fault.kind == FENCED and _is_committed(history, subject, later.start)):
            continue
        if earlier.was_running(fault.at, fault.until + (WAKE_UP if fault.kind == STOP else 0)):
            return f"running at {fault.kind}"
        if _was_uncommitted(history, subject, earlier, later, fault):
            return f"not yet committed at {fault.kind}"
    if interruption := _interruption_of_start(history, later):
        return f"running at {interruption}"
    if is_before_notice(history, earlier):
        return f"started before the consumer noticed: {NEW_TOPIC}"
    if _outlived_shutdown(history, earlier, later):
        return "longer than shutdown_timeout"
    if _outlived_revocation(history, earlier, later):
        return "longer than revoke_timeout"
    if _lost_its_partition(history, subject, earlier, later):
        return f"running when {MORE_PARTITIONS}"
    return None


def _losses(history: History, execution: Execution) -> list[Fault]:
    """Return the faults after which another process owns the partitions of an execution's process."""
    faults = history.faults_of(execution.process, KILL, STOP)
    losses = [fault for fault in faults if fault.kind == KILL or is_past_session(history, fault)]
    fenced = history.faults_of(execution.process, FENCED)
    return losses + [fault._replace(at=fenced_at(history, fault)) for fault in fenced]


def fenced_at(history: History, fault: Fault) -> float:
    """Return the earliest time at which a process can have been fenced: its successor was about to join the group."""
    times = [entry.at for entry in history.entries if entry.event == ledger.UP and entry.process == fault.successor]
    return times[0] if times else fault.at


def is_before_notice(history: History, execution: Execution) -> bool:
    """Return whether a run started before its consumer had to notice that the topic was created again."""
    return any(execution.start <= fault.until + NOTICE_SECONDS for fault in history.faults_of("", NEW_TOPIC))


def is_past_session(history: History, fault: Fault) -> bool:
    """Return whether a process was stopped for longer than its session."""
    return fault.until - fault.at > history.rules.session_timeout


def _was_uncommitted(history: History, subject: str, earlier: Execution, later: Execution, fault: Fault) -> bool:
    """Return whether a record was finished so shortly before the fault that no commit had to cover it."""
    if earlier.end is None or earlier.end > fault.at:
        return False
    if subject not in history.records or _is_committed(history, subject, later.start):
        return False
    time_to_commit = fault.at - earlier.end - _outage_seconds(history, earlier.end, fault.at)
    return time_to_commit <= history.rules.commit_interval + COMMIT_DELAY


def _is_committed(history: History, subject: str, at: float) -> bool:
    """Return whether a commit covered a record before a time."""
    record = history.records.get(subject)
    return record is not None and any(sample.covers(record) for sample in history.samples if sample.at < at)


def _outage_seconds(history: History, begin: float, end: float) -> float:
    """Return the seconds of a period in which a broker outage prevented commits."""
    kinds = (BROKER_STOP, BROKER_KILL, LEADER_KILL)
    durations = (min(fault.until, end) - max(fault.at, begin) for fault in history.faults_of("", *kinds))
    return sum(seconds for seconds in durations if seconds > 0)


def _interruption_of_start(history: History, later: Execution) -> str | None:
    """Return the fault before which a process had decided to start a run, or had not noticed that it must not start.

    A start that SIGSTOP interrupted is written to the ledger just after SIGCONT. A fenced process starts records until
    it notices that it is fenced.
    """
    stops = history.faults_of(later.process, STOP)
    if any(is_past_session(history, stop) and 0 <= later.start - stop.until <= WAKE_UP for stop in stops):
        return STOP
    fenced = history.faults_of(later.process, FENCED)
    return FENCED if any(fenced_at(history, fault) <= later.start for fault in fenced) else None


def _outlived_shutdown(history: History, earlier: Execution, later: Execution) -> bool:
    """Return whether a task ran longer than the shutdown_timeout of its process."""
    for fault in history.faults_of(earlier.process, TERM):
        end = fault.at + history.rules.shutdown_timeout - GRACE_TOLERANCE
        if earlier.was_running(end, end) and later.start >= end:
            return True
    return False


def _lost_its_partition(history: History, subject: str, earlier: Execution, later: Execution) -> bool:
    """Return whether a task was running when its client revoked the partition at once because of added partitions."""
    if not history.rules.revokes_at_once:
        return False
    partition = history.records[subject].partition
    starts_of_new_owner = [
        execution.start
        for record in history.log
        if record.partition == partition
        for execution in history.executions.get(record.subject, ())
        if execution.process == later.process
    ]
    for fault in history.faults_of("", MORE_PARTITIONS):
        taken_over = min((start for start in starts_of_new_owner if start >= fault.at), default=math.inf)
        if taken_over <= fault.until + COMMIT_DELAY and earlier.was_running(taken_over - TAKEOVER, taken_over):
            return True
    return False


def _outlived_revocation(history: History, earlier: Execution, later: Execution) -> bool:
    """Return whether a task ran longer than revoke_timeout after an event that causes a rebalance."""
    grace = history.rules.revoke_timeout - GRACE_TOLERANCE
    if min(earlier.end or later.start, later.start) - earlier.start < grace:
        return False
    events = [entry.at for entry in history.entries if entry.event == ledger.UP]
    events += [at for fault in history.faults for at in (fault.at, fault.until)]
    # The group notices the loss of a killed process only after its session.
    rebalance_delay = history.rules.session_timeout + COMMIT_DELAY
    return any(at + grace <= later.start and at + rebalance_delay >= earlier.start for at in events)


# -- 4: order ----------------------------------------------------------------------------------------------------------


def out_of_order(history: History) -> list[Violation]:
    """Return the violations about records that started after a later record of their lane, or overlap with another."""
    disordered = {
        "after a later message of their lane": overtaken(history),
        "while the previous message of their lane was running": overlapping(history),
    }
    return [
        Violation(4, f"{len(subjects)} messages started {when}", _evidence(history, subjects))
        for when, subjects in disordered.items()
        if subjects
    ]


def overtaken(history: History) -> list[str]:
    """Return the subjects that first started after a later record of their lane."""
    subjects: list[str] = []
    for lane in lanes(history):
        latest = 0
        for record in lane:
            position = _ordered(history, record.subject).position
            if position < latest:
                subjects.append(record.subject)
            latest = max(latest, position)
    return subjects


def overlapping(history: History) -> list[str]:
    """Return the subjects that first started while the same process ran the previous record of their lane."""
    subjects: list[str] = []
    for lane in lanes(history):
        for previous, record in pairwise(lane):
            before, after = _ordered(history, previous.subject), _ordered(history, record.subject)
            ended = before.end is not None and before.end <= after.start
            if before.process == after.process and not ended:
                subjects.append(record.subject)
    return subjects


def _ordered(history: History, subject: str) -> Execution:
    """Return the run of a record that has an order: the first, or the last if the topic was created again meanwhile.

    A consumer that has not noticed the new topic may run some of its records before it starts at the beginning.
    """
    executions = history.executions[subject]
    return executions[-1 if is_before_notice(history, executions[0]) else 0]


def lanes(history: History) -> list[list[LoggedRecord]]:
    """Return the started records of each lane, in the order of the log."""
    by_lane: dict[tuple[int, str | None], list[LoggedRecord]] = defaultdict(list)
    for record in sorted(history.log, key=lambda record: record.offset):
        if record.subject not in history.executions:
            continue
        if history.rules.ordering == "partition":
            by_lane[record.partition, None].append(record)
        elif record.key is not None:
            by_lane[record.partition, record.key].append(record)
    return list(by_lane.values())


# -- 5: progress -------------------------------------------------------------------------------------------------------


class StallWatch:
    """Stall detector: measures how long a group with a lag makes no progress.

    :param stall_seconds: a longer time without progress is a stall.
    """

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._progress_at: float | None = None
        self._ledger_position = 0
        self._committed = 0
        self._lag = 0
        #: The longest time without progress, in seconds.
        self.longest = 0.0

    def add(self, sample: Sample) -> str | None:
        """Add the next sample; return a text about the stall if the group is stalled."""
        committed = self._committed
        if sample.committed is not None:
            self._lag = sample.lag
            committed = sum(sample.committed.values())
        has_progress = (sample.ledger_position, committed) != (self._ledger_position, self._committed)
        if self._progress_at is None or has_progress or self._lag <= 0:
            self._progress_at, self._ledger_position, self._committed = sample.at, sample.ledger_position, committed
        pause = sample.at - self._progress_at
        self.longest = max(self.longest, pause)
        return f"no progress for {pause:.1f} s with a lag of {self._lag}" if pause > self._stall_seconds else None


def stalls(history: History) -> list[Violation]:
    """Return the violation about a time with a lag in which no task started or ended and no commit was made."""
    watch = StallWatch(history.rules.stall_seconds)
    texts = [text for sample in history.samples if (text := watch.add(sample))]
    return [Violation(5, texts[-1], _offsets_of_partitions(history))] if texts else []


def _offsets_of_partitions(history: History) -> tuple[str, ...]:
    """Return a text about the last sampled offsets of each partition."""
    ends: dict[int, int] = {}
    for record in history.log:
        ends[record.partition] = max(ends.get(record.partition, 0), record.offset + 1)
    last = next((sample for sample in reversed(history.samples) if sample.committed is not None), None)
    if last is None:
        return ()
    return tuple(
        f"    partition {number}: committed {(last.committed or {}).get(number)},"
        f" {len(last.finished_above.get(number, ()))} finished above, of {end}"
        for number, end in sorted(ends.items())
    )


def longest_pause(history: History) -> float:
    """Return the longest time without progress during a lag, in seconds."""
    watch = StallWatch(history.rules.stall_seconds)
    for sample in history.samples:
        watch.add(sample)
    return watch.longest


# -- 6: fenced processes -----------------------------------------------------------------------------------------------


def started_when_fenced(history: History) -> list[Violation]:
    """Return the violation about records that a process started after another had taken its group instance id.

    The successor starts records only as a member of the group. The fenced process notices this at its next heartbeat.
    """
    subjects: list[str] = []
    for fault in history.faults:
        starts = [
            entry.at for entry in history.entries if entry.event == ledger.START and entry.process == fault.successor
        ]
        if fault.kind == FENCED and starts:
            subjects += [
                entry.subject
                for entry in history.entries
                if entry.event == ledger.START
                and entry.process == fault.process
                and entry.at > starts[0] + COMMIT_DELAY
            ]
    if not subjects:
        return []
    return [Violation(6, f"fenced processes started {len(subjects)} messages", _evidence(history, subjects))]


def _evidence(history: History, subjects: Iterable[str]) -> tuple[str, ...]:
    return tuple(line for subject in list(subjects)[:MAX_EVIDENCE] for line in history.timeline(subject))
