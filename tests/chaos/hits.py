"""Count of the faults that hit a process at work; a fault that hits an idle process proves nothing."""

from __future__ import annotations

from collections import Counter

from tests.chaos import ledger
from tests.chaos.history import (
    BROKER_KILL,
    BROKER_STOP,
    JOIN,
    KILL,
    LEADER_KILL,
    MORE_PARTITIONS,
    STOP,
    TERM,
    Execution,
    Fault,
    History,
)
from tests.chaos.promises import is_past_session

#: Faults that are no event of their own, but in what is sent, or in when something else hits.
EXIT = "SystemExit in a task"
FIRST = "SIGKILL before the first commit"
LONG = "task of ten times max.poll.interval.ms"
RUBBISH = "random payload"


def hits(history: History) -> Counter[str]:
    """By kind, how many faults hit."""
    found = Counter(fault.kind for fault in history.faults if did_hit(history, fault))
    kills = [fault for fault in history.faults if fault.kind == KILL and did_hit(history, fault)]
    others = {
        EXIT: sum(entry.event == ledger.EXIT for entry in history.entries),
        FIRST: sum(not _has_committed(history, fault.until) for fault in kills),
        LONG: sum(
            _is_long(history, execution) for executions in history.executions.values() for execution in executions
        ),
        RUBBISH: sum(record.subject.startswith("x") for record in history.log if record.subject in history.finished),
    }
    return found + Counter(others)


def did_hit(history: History, fault: Fault) -> bool:
    """Whether a fault found what it was meant for."""
    if fault.kind == JOIN:
        return any(entry.event == ledger.START for entry in history.entries if entry.process == fault.process)
    if fault.kind in (KILL, TERM):
        return _found_work(history, fault)
    if fault.kind == STOP:
        return is_past_session(history, fault) and _found_work(history, fault)
    if fault.kind in (BROKER_STOP, BROKER_KILL):
        return _was_noticed(history, fault) and _went_on(history, fault)
    if fault.kind == LEADER_KILL:
        return _went_on(history, fault)
    if fault.kind == MORE_PARTITIONS:
        return _reached_new_partitions(history, fault)
    return True


def _found_work(history: History, fault: Fault) -> bool:
    """Whether a task was running in the process."""
    return any(
        execution.process == fault.process and execution.was_running(fault.at, fault.at)
        for executions in history.executions.values()
        for execution in executions
    )


def _was_noticed(history: History, fault: Fault) -> bool:
    """Whether Kafka did not answer."""
    return any(sample.committed is None for sample in history.samples if fault.at <= sample.at <= fault.until)


def _went_on(history: History, fault: Fault) -> bool:
    """Whether tasks were run before and after."""
    starts = [entry.at for entry in history.entries if entry.event == ledger.START]
    return min(starts, default=fault.at) < fault.at and max(starts, default=0) > fault.until


def _reached_new_partitions(history: History, fault: Fault) -> bool:
    """Whether tasks were run that came in partitions that nobody had seen before."""
    begun: dict[int, float] = {}
    for entry in history.entries:
        if entry.event == ledger.START and entry.subject in history.records:
            begun.setdefault(history.records[entry.subject].partition, entry.at)
    return any(at < fault.at for at in begun.values()) and any(at > fault.at for at in begun.values())


def _has_committed(history: History, at: float) -> bool:
    return any(sample.committed and sum(sample.committed.values()) for sample in history.samples if sample.at <= at)


def _is_long(history: History, execution: Execution) -> bool:
    interval = history.rules.poll_interval
    return interval is not None and execution.end is not None and execution.end - execution.start >= 10 * interval
