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

#: Faults that are in the sent messages or in the time of another fault, and are no entries of the plan.
EXIT = "SystemExit in a task"
FIRST_KILL = "SIGKILL before the first commit"
LONG_TASK = "task of ten times max.poll.interval.ms"
RANDOM_PAYLOAD = "random payload"


def hits(history: History) -> Counter[str]:
    """Count the faults that hit, by kind."""
    counts = Counter(fault.kind for fault in history.faults if did_hit(history, fault))
    kills = [fault for fault in history.faults if fault.kind == KILL and did_hit(history, fault)]
    others = {
        EXIT: sum(entry.event == ledger.EXIT for entry in history.entries),
        FIRST_KILL: sum(not _has_committed(history, fault.until) for fault in kills),
        LONG_TASK: sum(
            _is_long(history, execution) for executions in history.executions.values() for execution in executions
        ),
        RANDOM_PAYLOAD: sum(
            record.subject.startswith("x") and record.subject in history.finished for record in history.log
        ),
    }
    return counts + Counter(others)


def did_hit(history: History, fault: Fault) -> bool:
    """Return whether a fault hit its target at work."""
    if fault.kind == JOIN:
        return any(entry.event == ledger.START for entry in history.entries if entry.process == fault.process)
    if fault.kind in (KILL, TERM):
        return _hit_a_task(history, fault)
    if fault.kind == STOP:
        return is_past_session(history, fault) and _hit_a_task(history, fault)
    if fault.kind in (BROKER_STOP, BROKER_KILL):
        return _had_no_response(history, fault) and _has_work_around(history, fault)
    if fault.kind == LEADER_KILL:
        return _has_work_around(history, fault)
    if fault.kind == MORE_PARTITIONS:
        return _reached_new_partitions(history, fault)
    return True


def _hit_a_task(history: History, fault: Fault) -> bool:
    """Return whether a task was running in the process."""
    return any(
        execution.process == fault.process and execution.was_running(fault.at, fault.at)
        for executions in history.executions.values()
        for execution in executions
    )


def _had_no_response(history: History, fault: Fault) -> bool:
    """Return whether a request to Kafka failed during the fault."""
    return any(sample.committed is None for sample in history.samples if fault.at <= sample.at <= fault.until)


def _has_work_around(history: History, fault: Fault) -> bool:
    """Return whether tasks started before and after the fault."""
    starts = [entry.at for entry in history.entries if entry.event == ledger.START]
    return min(starts, default=fault.at) < fault.at and max(starts, default=0) > fault.until


def _reached_new_partitions(history: History, fault: Fault) -> bool:
    """Return whether tasks ran before the fault, and later tasks from partitions that had none before."""
    first_starts: dict[int, float] = {}
    for entry in history.entries:
        if entry.event == ledger.START and entry.subject in history.records:
            first_starts.setdefault(history.records[entry.subject].partition, entry.at)
    return any(at < fault.at for at in first_starts.values()) and any(at > fault.at for at in first_starts.values())


def _has_committed(history: History, at: float) -> bool:
    return any(sample.committed and sum(sample.committed.values()) for sample in history.samples if sample.at <= at)


def _is_long(history: History, execution: Execution) -> bool:
    interval = history.rules.poll_interval
    return interval is not None and execution.end is not None and execution.end - execution.start >= 10 * interval
