"""Count of the faults that hit a process at work; a fault that hits an idle process proves nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tests.chaos import ledger
from tests.chaos.history import (
    BROKER_KILL,
    BROKER_STOP,
    FENCED,
    JOIN,
    KILL,
    LEADER_KILL,
    MORE_PARTITIONS,
    MOVED,
    NEW_TOPIC,
    STOP,
    TERM,
    Execution,
    Fault,
    History,
)
from tests.chaos.messages import HOSTILE
from tests.chaos.promises import fenced_at, is_past_session

#: Faults that are in the sent messages or in the time of another fault, and are no entries of the plan.
EXIT = "SystemExit in a task"
FIRST_KILL = "SIGKILL before the first commit"
LONG_TASK = "task of ten times max.poll.interval.ms"
RANDOM_PAYLOAD = "random payload"
HOSTILE_RECORD = "hostile record"


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
        RANDOM_PAYLOAD: _count_finished(history, "x"),
        HOSTILE_RECORD: _count_finished(history, HOSTILE),
    }
    return counts + Counter(others)


def _count_finished(history: History, prefix: str) -> int:
    """Return the number of finished records whose subjects begin with ``prefix``."""
    return sum(record.subject.startswith(prefix) and record.subject in history.finished for record in history.log)


def did_hit(history: History, fault: Fault) -> bool:
    """Return whether a fault hit its target at work."""
    check = _CHECKS.get(fault.kind)
    return check is None or check(history, fault)


def _has_started_a_task(history: History, fault: Fault) -> bool:
    """Return whether the process that joined has started a task."""
    return _started(history, fault.process)


def _started(history: History, process: str) -> bool:
    return any(entry.event == ledger.START for entry in history.entries if entry.process == process)


def _hit_a_task_past_session(history: History, fault: Fault) -> bool:
    """Return whether the process was stopped past its session while it ran a task."""
    return is_past_session(history, fault) and _hit_a_task(history, fault)


def _fenced_a_task(history: History, fault: Fault) -> bool:
    """Return whether the process ran a task while its successor joined, and the successor has started a task."""
    begin = fenced_at(history, fault)
    is_at_work = any(
        execution.process == fault.process and execution.was_running(begin, fault.until)
        for executions in history.executions.values()
        for execution in executions
    )
    return is_at_work and _started(history, fault.successor)


def _had_outage(history: History, fault: Fault) -> bool:
    """Return whether a request to Kafka failed during the fault, and tasks started before and after the fault."""
    return _had_no_response(history, fault) and _has_work_around(history, fault)


def _deleted_unfinished_messages(history: History, fault: Fault) -> bool:
    """Return whether the deleted topic had unfinished messages, some of which were running."""
    earlier = history.earlier
    return earlier is not None and any(
        execution.was_running(fault.at, fault.at)
        for executions in earlier.executions.values()
        for execution in executions
    )


def _moved(history: History, _fault: Fault) -> bool:
    """Return whether committed records must run again, and finished records behind a skipped one must run again."""
    finished = history.earlier.finished if history.earlier else {}
    again = [record for record in history.log if record.subject in finished]
    starts: dict[int, int] = {}
    for record in history.log:
        starts[record.partition] = min(starts.get(record.partition, record.offset), record.offset)
    committed = {number: _committed_before(history, number) for number in starts}
    is_back = any(record.offset < committed[record.partition] for record in again)
    is_forward = any(starts[record.partition] > committed[record.partition] for record in again)
    return is_back and is_forward


def _committed_before(history: History, partition: int) -> int:
    """Return the last committed offset of a partition in the earlier part."""
    samples = history.earlier.samples if history.earlier else []
    return max(((sample.committed or {}).get(partition, 0) for sample in samples), default=0)


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


_CHECKS: dict[str, Callable[[History, Fault], bool]] = {
    JOIN: _has_started_a_task,
    KILL: _hit_a_task,
    TERM: _hit_a_task,
    STOP: _hit_a_task_past_session,
    FENCED: _fenced_a_task,
    BROKER_STOP: _had_outage,
    BROKER_KILL: _had_outage,
    LEADER_KILL: _has_work_around,
    MORE_PARTITIONS: _reached_new_partitions,
    NEW_TOPIC: _deleted_unfinished_messages,
    MOVED: _moved,
}
