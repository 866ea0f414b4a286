"""The promises, each a function that reads a history and names what breaks it.

1. Every message is done or dead-lettered.
2. No committed offset is ever above the lowest unfinished one.
3. A message is done twice only when its process was killed, stopped past its session or had to give it up.
4. Messages with the same key are first begun in the order of the log, and do not overlap.
5. Something happens while there is something to do.
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
    KILL,
    LEADER_KILL,
    MORE_PARTITIONS,
    STOP,
    TERM,
    Execution,
    Fault,
    History,
    Logged,
    Sample,
)

#: Seconds that a commit may be late: it is asked for at a turn of the loop, and has to be answered.
LATE = 3.0
#: Seconds within which what was being begun when its process was stopped is noted after it goes on.
WAKING = 0.05
#: Seconds within which the end of a grace period is noticed.
SHARP = 0.5
#: Seconds from when partitions are given away until their next owner begins something of them.
JOINING = 1.0
#: Stories that are told of one promise.
TOLD = 5


class Violation(NamedTuple):
    """A promise that was broken, with what is known about it."""

    promise: int
    text: str
    evidence: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((f"promise {self.promise}: {self.text}", *self.evidence))


class Double(NamedTuple):
    """A record that was begun again although an earlier execution had not failed."""

    subject: str
    earlier: Execution
    later: Execution
    #: Why that is allowed; None when it is not.
    cause: str | None


def broken(history: History) -> list[Violation]:
    """All violations of all promises."""
    return [
        *unfinished(history),
        *committed_too_far(history),
        *forbidden_doubles(history),
        *out_of_order(history),
        *stalls(history),
    ]


# -- 1 -----------------------------------------------------------------------------------------------------------------


def unfinished(history: History) -> list[Violation]:
    """Messages that are in the log, and neither done nor dead-lettered."""
    missing = [record.subject for record in history.log if record.subject not in history.finished]
    if not missing:
        return []
    return [Violation(1, f"{len(missing)} of {len(history.log)} messages were not finished", _told(history, missing))]


# -- 2 -----------------------------------------------------------------------------------------------------------------


def committed_too_far(history: History) -> list[Violation]:
    """Samples in which Kafka had been told of records as finished that were not.

    Each sample's ledger position was read after its offsets, so what was finished by then is at least what was
    finished when they were committed.
    """
    found = covered_unfinished(history)
    if not found:
        return []
    text = f"{len(found)} messages were covered by a commit while they were unfinished"
    return [Violation(2, text, _told(history, found))]


def covered_unfinished(history: History) -> list[str]:
    """Subjects that a commit covered too early."""
    found: dict[str, None] = {}
    checked: set[str] = set()
    ordered: dict[int, list[Logged]] = defaultdict(list)
    for record in sorted(history.log, key=lambda each: each.offset, reverse=True):
        ordered[record.partition].append(record)
    for sample in history.samples:
        for record in _newly_covered(sample, ordered, history, checked):
            if not history.was_finished(record.subject, sample):
                found.setdefault(record.subject)
    return list(found)


def _newly_covered(
    sample: Sample, left: dict[int, list[Logged]], history: History, checked: set[str]
) -> Iterator[Logged]:
    """Records that this sample covers and none before did; what was finished once stays finished."""
    for partition, first in (sample.committed or {}).items():
        records = left.get(partition, [])
        while records and records[-1].offset < first:
            record = records.pop()
            if record.subject not in checked:
                yield record
    for place in ((partition, offset) for partition, offsets in sample.above.items() for offset in offsets):
        above = history.places.get(place)
        if above is not None and above.subject not in checked:
            checked.add(above.subject)
            yield above


# -- 3 -----------------------------------------------------------------------------------------------------------------


def forbidden_doubles(history: History) -> list[Violation]:
    """Records that were begun again without one of the causes that are allowed."""
    forbidden = [double.subject for double in doubles(history) if double.cause is None]
    if not forbidden:
        return []
    subjects = list(dict.fromkeys(forbidden))
    return [Violation(3, f"{len(subjects)} messages were doubled without cause", _told(history, subjects))]


def doubles(history: History) -> list[Double]:
    """Every pair of executions of a record of which the earlier had not failed when the later began.

    Another attempt after a failure is none; neither is an attempt of somebody else, when the partition moved between.
    """
    found: list[Double] = []
    for subject, executions in history.executions.items():
        for number, later in enumerate(executions):
            for earlier in executions[:number]:
                failed = earlier.outcome in (ledger.FAIL, ledger.EXIT) and (earlier.end or 0) <= later.start
                if not failed or history.is_final(earlier):
                    found.append(Double(subject, earlier, later, _cause(history, subject, earlier, later)))
    return found


def caused(history: History) -> Counter[str]:
    """How many records were doubled, by cause; each counts once."""
    causes = {double.subject: double.cause for double in doubles(history) if double.cause}
    return Counter(causes.values())


def _cause(history: History, subject: str, earlier: Execution, later: Execution) -> str | None:
    for fault in _losses(history, earlier):
        if fault.at > later.start:
            continue
        if earlier.was_running(fault.at, fault.until + (WAKING if fault.kind == STOP else 0)):
            return f"running at {fault.kind}"
        if _was_uncommitted(history, subject, earlier, later, fault):
            return f"not yet committed at {fault.kind}"
    if _was_being_begun(history, later):
        return f"running at {STOP}"
    if _outlived_shutdown(history, earlier, later):
        return "longer than shutdown_timeout"
    if _outlived_revocation(history, earlier, later):
        return "longer than revoke_timeout"
    if _was_given_away(history, subject, earlier, later):
        return f"running when {MORE_PARTITIONS}"
    return None


def _losses(history: History, execution: Execution) -> list[Fault]:
    """Faults after which what the process of an execution had in hand is another's."""
    faults = history.faults_of(execution.process, KILL, STOP)
    return [fault for fault in faults if fault.kind == KILL or is_past_session(history, fault)]


def is_past_session(history: History, fault: Fault) -> bool:
    """Whether a process was stopped for so long that the group gave it up."""
    return fault.until - fault.at > history.rules.session


def _was_uncommitted(history: History, subject: str, earlier: Execution, later: Execution, fault: Fault) -> bool:
    """Whether a record was finished, and could not yet be covered by a commit, when its process was lost."""
    if earlier.end is None or earlier.end > fault.at:
        return False
    record = history.records.get(subject)
    if record is None or any(sample.covers(record) for sample in history.samples if sample.at < later.start):
        return False
    return fault.at - earlier.end - _outages(history, earlier.end, fault.at) <= history.rules.commit_interval + LATE


def _outages(history: History, begin: float, end: float) -> float:
    """Seconds in which nothing could be committed because the broker was away."""
    kinds = (BROKER_STOP, BROKER_KILL, LEADER_KILL)
    away = (min(fault.until, end) - max(fault.at, begin) for fault in history.faults_of("", *kinds))
    return sum(seconds for seconds in away if seconds > 0)


def _was_being_begun(history: History, later: Execution) -> bool:
    """Whether a process had begun a record when it was stopped, and only could not note that before."""
    stops = history.faults_of(later.process, STOP)
    return any(is_past_session(history, stop) and 0 <= later.start - stop.until <= WAKING for stop in stops)


def _outlived_shutdown(history: History, earlier: Execution, later: Execution) -> bool:
    for fault in history.faults_of(earlier.process, TERM):
        end = fault.at + history.rules.shutdown_timeout - SHARP
        if earlier.was_running(end, end) and later.start >= end:
            return True
    return False


def _was_given_away(history: History, subject: str, earlier: Execution, later: Execution) -> bool:
    """Whether a record was running when a hasty client, which had heard of new partitions, gave away its own."""
    if not history.rules.hasty:
        return False
    partition = history.records[subject].partition
    same = [record.subject for record in history.log if record.partition == partition]
    owned = [each.start for one in same for each in history.executions.get(one, ()) if each.process == later.process]
    for fault in history.faults_of("", MORE_PARTITIONS):
        taken = min((start for start in owned if start >= fault.at), default=math.inf)
        if taken <= fault.until + LATE and earlier.was_running(taken - JOINING, taken):
            return True
    return False


def _outlived_revocation(history: History, earlier: Execution, later: Execution) -> bool:
    """Whether a task ran on for the whole revoke_timeout after something that makes partitions move."""
    grace = history.rules.revoke_timeout - SHARP
    if min(earlier.end or later.start, later.start) - earlier.start < grace:
        return False
    moments = [entry.at for entry in history.entries if entry.event == ledger.UP]
    moments += [moment for fault in history.faults for moment in (fault.at, fault.until)]
    # Whoever is gone without a word is missed only when its session is over.
    noticed = history.rules.session + LATE
    return any(moment + grace <= later.start and moment + noticed >= earlier.start for moment in moments)


# -- 4 -----------------------------------------------------------------------------------------------------------------


def out_of_order(history: History) -> list[Violation]:
    """Records that were first begun before one that stands before them in their lane, or while it was running."""
    found = {"after one that stands behind them": overtaken(history), "while the one before ran": overlapping(history)}
    return [
        Violation(4, f"{len(subjects)} messages were begun {how}", _told(history, subjects))
        for how, subjects in found.items()
        if subjects
    ]


def overtaken(history: History) -> list[str]:
    """Subjects that were first begun after one that stands behind them."""
    found: list[str] = []
    for lane in lanes(history):
        latest = 0
        for record in lane:
            position = history.executions[record.subject][0].position
            if position < latest:
                found.append(record.subject)
            latest = max(latest, position)
    return found


def overlapping(history: History) -> list[str]:
    """Subjects that were first begun while the same process ran the one before."""
    found: list[str] = []
    for lane in lanes(history):
        for one, other in pairwise(lane):
            before, after = history.executions[one.subject][0], history.executions[other.subject][0]
            ended = before.end is not None and before.end <= after.start
            if before.process == after.process and not ended:
                found.append(other.subject)
    return found


def lanes(history: History) -> list[list[Logged]]:
    """Records that were begun, in order of the log, by what keeps them in order."""
    found: dict[tuple[int, str | None], list[Logged]] = defaultdict(list)
    for record in sorted(history.log, key=lambda each: each.offset):
        if record.subject not in history.executions:
            continue
        if history.rules.ordering == "partition":
            found[record.partition, None].append(record)
        elif record.key is not None:
            found[record.partition, record.key].append(record)
    return list(found.values())


# -- 5 -----------------------------------------------------------------------------------------------------------------


class StallWatch:
    """Sees the samples one after the other, and how long nothing happened while there was something to do."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: float | None = None
        self._last: tuple[int, int] | None = None
        self._lag = 0
        self.longest = 0.0

    def see(self, sample: Sample) -> str | None:
        """Returns what is wrong, if the group is stuck at this sample."""
        if sample.committed is not None:
            self._lag = sample.lag
        committed = sum(sample.committed.values()) if sample.committed is not None else (self._last or (0, 0))[1]
        progress = (sample.ledger_position, committed)
        if self._since is None or progress != self._last or self._lag <= 0:
            self._since, self._last = sample.at, progress
        quiet = sample.at - self._since
        self.longest = max(self.longest, quiet)
        return f"no progress for {quiet:.1f} s with a lag of {self._lag}" if quiet > self._patience else None


def stalls(history: History) -> list[Violation]:
    """Times in which there were messages, and nothing was begun, ended or committed."""
    watch = StallWatch(history.rules.patience)
    found = [text for sample in history.samples if (text := watch.see(sample))]
    return [Violation(5, found[-1], _standing(history))] if found else []


def _standing(history: History) -> tuple[str, ...]:
    """Where the group is in each partition, as far as Kafka knows."""
    ends: dict[int, int] = {}
    for record in history.log:
        ends[record.partition] = max(ends.get(record.partition, 0), record.offset + 1)
    last = next((sample for sample in reversed(history.samples) if sample.committed is not None), None)
    if last is None:
        return ()
    return tuple(
        f"    partition {number}: committed {(last.committed or {}).get(number)},"
        f" {len(last.above.get(number, ()))} finished above, of {end}"
        for number, end in sorted(ends.items())
    )


def longest_pause(history: History) -> float:
    """The longest time without progress while there was something to do."""
    watch = StallWatch(history.rules.patience)
    for sample in history.samples:
        watch.see(sample)
    return watch.longest


def _told(history: History, subjects: Iterable[str]) -> tuple[str, ...]:
    return tuple(line for subject in list(subjects)[:TOLD] for line in history.story(subject))
