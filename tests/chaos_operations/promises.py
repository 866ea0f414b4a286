"""The promises about operations; each has a function that reads a history and returns the violations.

1. Every accepted operation has ended, with the expected status and the correct result.
2. The result of a task is recorded once, and a run of this task returned it.
3. A task starts after the result of the previous task is stored, and receives exactly the stored results.
4. A task runs again only if its process was killed, was stopped past its lease, lost the database, or had to end.
5. No task starts after its operation has ended.
6. The tasks make progress while operations are open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

from kser.status import CANCELLED as IS_CANCELLED
from kser.status import FAILED, SUCCESS
from tests.chaos import ledger
from tests.chaos.history import KILL, STOP, TERM, Fault
from tests.chaos.promises import Violation
from tests.chaos_operations.history import OUTAGES, History, Run, StoredEvent, StoredOperation
from tests.chaos_operations.orders import CANCELLED, FAILING, SIZE, Order, expected_results

#: Seconds from the end of a run within which its checkpoint is written.
CHECKPOINT_DELAY = 1.5
#: Seconds from the end of an outage within which a process has noticed the changes in the database.
RECOVERY = 3.0
#: Seconds from a claim within which its task starts.
START_DELAY = 1.0
#: The maximum number of operations whose timelines are the evidence of a violation.
MAX_EVIDENCE = 4


class Rerun(NamedTuple):
    """An attempt that ran again."""

    earlier: Run
    later: Run
    #: The reason why the rerun is allowed; None for a violation.
    cause: str | None


def violations(history: History) -> list[Violation]:
    """Return the violations of all promises."""
    uuids_by_text: dict[tuple[int, str], list[str]] = {}
    for promise, text, uuid in _violations_by_operation(history):
        uuids_by_text.setdefault((promise, text), []).append(uuid)
    by_text = [
        Violation(promise, f"{text}: {len(set(uuids))} operation(s)", _evidence(history, uuids))
        for (promise, text), uuids in uuids_by_text.items()
    ]
    return [*by_text, *stalls(history)]


def _evidence(history: History, uuids: list[str]) -> tuple[str, ...]:
    return tuple(line for uuid in list(dict.fromkeys(uuids))[:MAX_EVIDENCE] for line in history.timeline(uuid))


def _violations_by_operation(history: History) -> Iterator[tuple[int, str, str]]:
    """Yield the number of the promise, a text and the uuid of the operation, of each violation."""
    sent = {order.uuid for order in history.orders}
    for uuid in history.stored.keys() - sent:
        yield 1, "an operation is stored that was never sent", uuid
    for order in history.orders:
        operation = history.stored.get(order.uuid)
        if order.uuid not in history.accepted:
            yield 1, "an operation was not accepted", order.uuid
        elif operation is None:
            yield 1, "an accepted operation is not stored", order.uuid
        else:
            yield from ((1, text, order.uuid) for text in wrong_ends(order, operation, history))
            yield from ((2, text, order.uuid) for text in wrong_records(order, operation, history))
            yield from ((3, text, order.uuid) for text in wrong_starts(operation, history))
            yield from ((5, text, order.uuid) for text in late_starts(operation, history))
    for rerun in reruns(history):
        if rerun.cause is None:
            yield 4, "a task ran again without cause", rerun.earlier.info.operation


# -- 1: ends and results -----------------------------------------------------------------------------------------------


def wrong_ends(order: Order, operation: StoredOperation, history: History) -> Iterator[str]:
    """Yield texts about a wrong status or result of an operation."""
    allowed = {SUCCESS, IS_CANCELLED} if order.kind == CANCELLED else {SUCCESS}
    if operation.status not in allowed:
        yield f"a {order.kind} operation ended as {operation.status}"
        return
    if order.kind == FAILING and order.uuid not in history.resumed:
        yield "a failing operation succeeded without a resume"
    results = [result for result in operation.task_results if result is not None]
    if operation.status == SUCCESS and len(results) != SIZE:
        yield "an operation succeeded without all of its tasks"
    if operation.task_results[: len(results)] != results:
        yield "a task succeeded although an earlier one did not"
    if [number for number, _ in results] != expected_results(order)[: len(results)]:
        yield "a task has a wrong result"
    if dict(operation.retval) != {str(position): result for position, result in enumerate(results)}:
        yield "the result of an operation is not that of its tasks"


# -- 2: records --------------------------------------------------------------------------------------------------------


def wrong_records(order: Order, operation: StoredOperation, history: History) -> Iterator[str]:
    """Yield texts about wrong attempts, results and events of an operation."""
    for position in range(len(operation.task_results)):
        yield from _wrong_attempts(order, operation, position, history.runs.get((order.uuid, position), []))
    counts = Counter(event.kind for event in operation.events)
    successes = Counter(event.uuid for event in operation.events if event.kind == "task-succeeded")
    if counts["accepted"] != 1 or any(count != 1 for count in successes.values()):
        yield "an event that happens once was recorded several times"
    if counts["ended"] != 1 + counts["resumed"] or counts["resumed"] != (order.kind == FAILING):
        yield "an operation ended or was resumed too often or too rarely"
    if any(after.epoch < before.epoch for before, after in pairwise(operation.events)):
        yield "an event was recorded under an old claim"


def _wrong_attempts(order: Order, operation: StoredOperation, position: int, runs: list[Run]) -> Iterator[str]:
    """Yield texts about wrong attempts and results of a task."""
    result = operation.task_results[position]
    attempts = [(attempt.number, attempt.status) for attempt in operation.attempts if attempt.position == position]
    numbers = list(range(1, order.expected_attempts(position) + 1))
    expected = [(number, SUCCESS if number == numbers[-1] else FAILED) for number in numbers]
    if result is not None and attempts != expected:
        yield "the recorded attempts of a task are not the expected ones"
    if result is None and attempts != expected[: len(attempts)]:
        yield "unexpected attempts were recorded"
    if result is not None and _run_with_result(runs, result) is None:
        yield "a result was recorded that no run returned"
    if any(run.info.task != operation.task_uuids[position] for run in runs):
        yield "a task ran with another uuid"
    if any(run.info.attempt > len(numbers) for run in runs):
        yield "an unexpected attempt was started"


def _run_with_result(runs: list[Run], result: list[object]) -> Run | None:
    """Return the run that returned a recorded result."""
    _, nonce = result
    return next((run for run in runs if run.info.nonce == nonce and run.outcome == ledger.END), None)


# -- 3: order ----------------------------------------------------------------------------------------------------------


def wrong_starts(operation: StoredOperation, history: History) -> Iterator[str]:
    """Yield texts about tasks that started too early or with wrong results of earlier tasks."""
    results = operation.task_results
    for position in range(SIZE):
        stored = {str(earlier): results[earlier] for earlier in range(min(position, len(results)))}
        for run in history.runs.get((operation.uuid, position), []):
            if run.info.earlier_results != stored:
                yield "a task received other results than the stored ones"
            if position and (result := results[position - 1]) is not None:
                previous = _run_with_result(history.runs.get((operation.uuid, position - 1), []), result)
                if previous is not None and (previous.end_position or 0) > run.start_position:
                    yield "a task started before the previous one had ended"


# -- 4: reruns ---------------------------------------------------------------------------------------------------------


def reruns(history: History) -> list[Rerun]:
    """Return the attempts that ran again."""
    result = []
    for runs in history.runs.values():
        ordered = sorted(runs, key=lambda run: (run.info.attempt, run.start))
        for _, same_attempt in groupby(ordered, key=lambda run: run.info.attempt):
            result += [Rerun(first, second, cause(history, first, second)) for first, second in pairwise(same_attempt)]
    return result


def cause(history: History, first: Run, second: Run) -> str | None:
    """Return the fault that allows a rerun; None if there is none."""
    return _fault_cause(history, first, second) or _database_cause(history, first, second) or _starved(history, first)


def _fault_cause(history: History, first: Run, second: Run) -> str | None:
    """Return the fault of a process that allows a rerun."""
    rules = history.rules
    ends = (first.end or second.start) + CHECKPOINT_DELAY
    for fault in history.faults_of(first.process, KILL):
        if first.start <= fault.until and fault.at <= min(ends, second.start):
            return "killed"
    for run in (first, second):
        claimed_at, ends = run.start - START_DELAY, (run.end or second.start) + CHECKPOINT_DELAY
        for fault in history.faults_of(run.process, STOP):
            if (
                _outlasts_lease(history, fault)
                and fault.at <= ends
                and fault.until >= claimed_at
                and fault.at < second.start
            ):
                return "stopped past its lease"
    for fault in history.faults_of(first.process, TERM):
        over = fault.at + rules.shutdown_timeout
        if first.start <= over <= second.start and (first.end is None or first.end > over - CHECKPOINT_DELAY):
            return "longer than shutdown_timeout"
    return None


def _outlasts_lease(history: History, fault: Fault) -> bool:
    """Return whether a SIGSTOP may have outlasted the rest of a lease."""
    return fault.until - fault.at >= history.rules.lease - 2 * history.rules.heartbeat


def _database_cause(history: History, first: Run, second: Run) -> str | None:
    """Return the outage of the database that allows a rerun."""
    for fault in history.faults_of("", *OUTAGES):
        ends = (first.end or second.start) + CHECKPOINT_DELAY
        if fault.at <= min(ends, second.start) and fault.until + RECOVERY >= first.start - START_DELAY:
            return "lost the database"
    return None


def _starved(history: History, run: Run) -> str | None:
    """Return the cause of a rerun if a process got no processor time until its lease had expired."""
    rules = history.rules
    for begin, end in history.starved.get(run.process, ()):
        during = begin <= (run.end or end) + CHECKPOINT_DELAY and end >= run.start
        if during and end - begin >= rules.lease - 2 * rules.heartbeat:
            return "did not get to run"
    return None


def reruns_by_cause(history: History) -> Counter[str]:
    """Count the reruns by cause."""
    return Counter(rerun.cause or "no cause" for rerun in reruns(history))


def recovery_times(history: History) -> list[float]:
    """Return the seconds from each kill of a running task until its message was sent again, or claimed, sorted."""
    times = []
    for rerun in reruns(history):
        operation = history.stored.get(rerun.earlier.info.operation)
        if operation is None or rerun.cause != "killed":
            continue
        kills = [fault.at for fault in history.faults_of(rerun.earlier.process, KILL)]
        killed_at = max(at for at in kills if at <= rerun.later.start)
        recovery = next((event for event in operation.events if _is_recovery(event, killed_at)), None)
        if recovery is not None:
            times.append(recovery.at - killed_at)
    return sorted(times)


def _is_recovery(event: StoredEvent, killed_at: float) -> bool:
    return event.at > killed_at and event.kind in ("sent-again", "claimed")


# -- 5: no start after the end -----------------------------------------------------------------------------------------


def late_starts(operation: StoredOperation, history: History) -> Iterator[str]:
    """Yield a text about each task that started after the end, unless a fault hid the end from its process."""
    if operation.ended is None:
        return
    for run in history.runs_of(operation.uuid):
        if run.start > operation.ended + START_DELAY and not _missed_the_end(history, run, operation.ended):
            yield "a task started after the end"


def _missed_the_end(history: History, run: Run, ended: float) -> bool:
    """Return whether a suspension or an outage hid the end of the operation from the process of a run."""
    faults = [*history.faults_of(run.process, STOP), *history.faults_of("", *OUTAGES)]
    return any(fault.at <= ended + START_DELAY and fault.until + START_DELAY >= run.start for fault in faults)


# -- 6: progress -------------------------------------------------------------------------------------------------------


def stalls(history: History) -> list[Violation]:
    """Return the violation about a time in which no task started or ended although operations were open."""
    longest = longest_pause(history, without_faults=True)
    if longest <= history.rules.stall_seconds:
        return []
    open_uuids = [uuid for uuid, operation in history.stored.items() if operation.ended is None]
    return [Violation(6, f"no progress for {longest:.1f} s", _evidence(history, open_uuids))]


def longest_pause(history: History, without_faults: bool = False) -> float:
    """Return the longest time, in seconds, in which no task started or ended although operations were open.

    :param without_faults: count only from the end of the latest fault.
    """
    longest = progress_at = 0.0
    task_events: int | None = None
    faults = history.faults if without_faults else ()
    for sample in history.samples:
        if sample.open == 0 or sample.task_events != task_events:
            progress_at, task_events = sample.at, sample.task_events
        begin = max([progress_at, *(fault.until for fault in faults if fault.at <= sample.at)])
        longest = max(longest, sample.at - begin)
    return longest


# -- hits --------------------------------------------------------------------------------------------------------------


def hits(history: History) -> Counter[str]:
    """Count the faults that hit running tasks, by kind."""
    return Counter(fault.kind for fault in history.faults if _did_hit(history, fault))


def _did_hit(history: History, fault: Fault) -> bool:
    all_runs = [run for runs in history.runs.values() for run in runs]
    running = [run for run in all_runs if run.start <= fault.at and (run.end is None or run.end >= fault.at)]
    if fault.process:
        too_short = fault.kind == STOP and fault.until - fault.at < history.rules.lease
        return not too_short and any(run.process == fault.process for run in running)
    return bool(running) and any(run.start > fault.until for run in all_runs)
