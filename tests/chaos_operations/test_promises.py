"""Tests of the promise checks for operations: a broken promise is reported, and a kept one is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from tests.chaos import ledger
from tests.chaos.history import KILL, STOP, TERM, Fault
from tests.chaos_operations import promises
from tests.chaos_operations.history import History, ProgressSample, Rules, StoredAttempt, StoredEvent, StoredOperation
from tests.chaos_operations.orders import (
    CANCELLED,
    FAILING,
    LAUNCH,
    PLAIN,
    SHAKY,
    SIZE,
    Order,
    expected_results,
    orders,
)
from tests.chaos_operations.plan import LONG_OUTAGE, SHORT_OUTAGE, fault_plan
from tests.chaos_operations.shop import RunInfo
from tests.chaos_operations.worker import STARVED

RULES = Rules(lease=3, heartbeat=1, shutdown_timeout=3, stall_seconds=30)


class Line(NamedTuple):
    """A line of the ledger."""

    at: float
    process: str
    event: str
    subject: str


def order(kind: str = PLAIN) -> Order:
    """Return an order; its task 2 fails if the kind has a failing task."""
    return Order(
        number=1,
        uuid="u",
        way=LAUNCH,
        kind=kind,
        failing_task=2,
        seconds=(0.1,) * SIZE,
        at=0,
        repeat_after=None,
        cancel_after=None,
    )


#: The result of each task: its number, and the nonce of the run that returned it.
RESULTS = [[number, f"n{position}"] for position, number in enumerate(expected_results(order()))]


#: The same numbers, as another run of the tasks would return them.
OTHER_RESULTS = [[number, "other"] for number, _nonce in RESULTS]


def results(count: int) -> dict[str, Any]:
    """Return the results of the first tasks by position."""
    return {str(position): RESULTS[position] for position in range(count)}


def run(
    position: int,
    start: float,
    end: float | None = None,
    *,
    process: str = "one",
    outcome: str = ledger.END,
    **changes: Any,
) -> list[Line]:
    """Return the ledger lines of one run of a task.

    :param end: None for a run that was interrupted.
    :param changes: fields of :class:`RunInfo`.
    """
    info = RunInfo("u", position, 1, f"t{position}", f"n{position}", results(position))._replace(**changes)
    lines = [Line(start, process, ledger.START, info.dump())]
    return lines if end is None else [*lines, Line(end, process, outcome, info.dump())]


#: Task 0 runs from 10 to 10.5, task 1 from 11 to 11.5, and so on.
ALL_RUN = [line for position in range(SIZE) for line in run(position, 10 + position, 10.5 + position)]

#: The lines of the first two tasks, and those of the last two.
TWO_RUN = [*run(0, 10, 10.5), *run(1, 11, 11.5)]
REST = [*run(3, 13, 13.5), *run(4, 14, 14.5)]


def attempts(*numbers: tuple[int, int, str]) -> list[StoredAttempt]:
    """Return attempts from their position, number and status."""
    return [StoredAttempt(position, number, status) for position, number, status in numbers]


def stored(count: int = SIZE, status: str = "SUCCESS", **changes: Any) -> StoredOperation:
    """Return an operation of which the first ``count`` tasks succeeded.

    :param changes: fields of :class:`StoredOperation`.
    """
    successes = [StoredEvent("task-succeeded", f"t{position}") for position in range(count)]
    return StoredOperation(
        uuid="u",
        status=status,
        retval=results(count),
        task_results=[*RESULTS[:count], *[None] * (SIZE - count)],
        task_uuids=[f"t{position}" for position in range(SIZE)],
        attempts=attempts(*((position, 1, "SUCCESS") for position in range(count))),
        events=[StoredEvent("accepted"), *successes, StoredEvent("ended", text=status)],
        ended=15.0,
    )._replace(**changes)


def history_of(
    lines: Sequence[Line] = ALL_RUN,
    operation: StoredOperation | None = None,
    *faults: Fault,
    kind: str = PLAIN,
    samples: Sequence[ProgressSample] = (),
    accepted: Mapping[str, float] | None = None,
    resumed: frozenset[str] = frozenset(),
) -> History:
    """Return the history of one operation; by default it succeeded without faults."""
    return History(
        rules=RULES,
        orders=[order(kind)],
        accepted={"u": 9.0} if accepted is None else accepted,
        resumed=resumed,
        stored={"u": operation or stored()},
        entries=[
            ledger.Entry(line.event, line.subject, line.process, line.at, position)
            for position, line in enumerate(sorted(lines, key=lambda line: line.at), 1)
        ],
        faults=faults,
        samples=samples,
    )


def texts(history: History) -> str:
    """Return the number and the text of each violation as lines."""
    return "\n".join(f"{violation.promise}: {violation.text}" for violation in promises.violations(history))


def test_run_without_faults_breaks_no_promise() -> None:
    assert texts(history_of()) == ""
    assert promises.reruns(history_of()) == []


# -- 1: ends and results -----------------------------------------------------------------------------------------------


def test_operation_that_has_not_ended_is_reported() -> None:
    assert "1: a plain operation ended as RUNNING" in texts(history_of(TWO_RUN, stored(2, "RUNNING", ended=None)))


def test_cancelled_operation_without_a_cancel_request_is_reported() -> None:
    cancelled = stored(2, "CANCELLED")
    assert "1: a plain operation ended as CANCELLED" in texts(history_of(TWO_RUN, cancelled))
    assert texts(history_of(TWO_RUN, cancelled, kind=CANCELLED)) == ""


def test_difference_between_accepted_and_stored_operations_is_reported() -> None:
    assert "1: an operation was not accepted" in texts(history_of(accepted={}))
    history = history_of()
    history.stored = {"other": stored()}
    assert texts(history).splitlines() == [
        "1: an operation is stored that was never sent: 1 operation(s)",
        "1: an accepted operation is not stored: 1 operation(s)",
    ]


def test_wrong_task_result_is_reported() -> None:
    retval = {**results(5), "4": [7, "n4"]}
    wrong = stored(task_results=list(retval.values()), retval=retval)
    assert "1: a task has a wrong result" in texts(history_of(operation=wrong))


@pytest.mark.parametrize("retval", [results(4), {**results(5), "error": "no"}, {**results(5), "4": OTHER_RESULTS[4]}])
def test_operation_result_differing_from_its_tasks_is_reported(retval: Any) -> None:
    text = "1: the result of an operation is not that of its tasks"
    assert text in texts(history_of(operation=stored(retval=retval)))


def test_success_of_a_failing_operation_without_a_resume_is_reported() -> None:
    failed = run(2, 12, 12.5, outcome=ledger.FAIL, nonce="first")
    lines = [*TWO_RUN, *failed, *run(2, 22, 22.5, attempt=2), *run(3, 23, 23.5), *run(4, 24, 24.5)]
    failure = [StoredEvent("ended", text="FAILED"), StoredEvent("resumed")]
    accepted, *successes, ended = stored().events
    statuses = ((0, 1, "SUCCESS"), (1, 1, "SUCCESS"), (2, 1, "FAILED"), (2, 2, "SUCCESS"))
    resumed = stored(
        events=[accepted, *successes[:2], *failure, *successes[2:], ended],
        attempts=attempts(*statuses, (3, 1, "SUCCESS"), (4, 1, "SUCCESS")),
        ended=25.0,
    )
    assert texts(history_of(lines, resumed, kind=FAILING, resumed=frozenset("u"))) == ""
    text = "1: a failing operation succeeded without a resume"
    assert text in texts(history_of(lines, resumed, kind=FAILING))


# -- 2: records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (stored(attempts=[*stored().attempts, StoredAttempt(4, 2, "SUCCESS")]), "the recorded attempts of a task"),
        (stored(attempts=stored().attempts[:4]), "the recorded attempts of a task"),
        (stored(events=[*stored().events, StoredEvent("task-succeeded", "t1")]), "recorded several times"),
        (stored(events=[*stored().events, StoredEvent("ended", text="SUCCESS")]), "too often or too rarely"),
        (stored(events=[*stored().events, StoredEvent("claimed", epoch=2), StoredEvent("sent", epoch=1)]), "old claim"),
        (stored(task_uuids=["t0", "t1", "other", "t3", "t4"]), "another uuid"),
    ],
)
def test_records_that_do_not_match_the_ledger_are_reported(operation: StoredOperation, text: str) -> None:
    assert text in texts(history_of(operation=operation))


def test_recorded_result_without_a_run_is_reported() -> None:
    assert "2: a result was recorded that no run returned" in texts(history_of(ALL_RUN[:-1]))


def test_missing_attempts_of_a_retried_task_are_reported() -> None:
    first = run(2, 12.2, 12.3, attempt=1, nonce="x1", outcome=ledger.FAIL)
    second = run(2, 12.5, 12.6, attempt=2, nonce="x2", outcome=ledger.FAIL)
    lines = [*TWO_RUN, *first, *second, *run(2, 12.8, 12.9, attempt=3), *REST]
    statuses = ((0, 1, "SUCCESS"), (1, 1, "SUCCESS"), (2, 1, "FAILED"), (2, 2, "FAILED"), (2, 3, "SUCCESS"))
    complete = stored(attempts=attempts(*statuses, (3, 1, "SUCCESS"), (4, 1, "SUCCESS")))
    assert texts(history_of(lines, complete, kind=SHAKY)) == ""
    assert "2: the recorded attempts of a task" in texts(history_of(lines, stored(), kind=SHAKY))


# -- 3: order ----------------------------------------------------------------------------------------------------------


def test_task_starting_before_its_predecessor_ended_is_reported() -> None:
    lines = [*TWO_RUN, *run(2, 11.4, 12.5), *REST]
    assert texts(history_of(lines)) == "3: a task started before the previous one had ended: 1 operation(s)"


@pytest.mark.parametrize("wrong", [results(1), results(3), {**results(2), "1": OTHER_RESULTS[1]}])
def test_task_receiving_other_results_than_the_stored_ones_is_reported(wrong: dict[str, Any]) -> None:
    lines = [*TWO_RUN, *run(2, 12, 12.5, earlier_results=wrong), *REST]
    assert "3: a task received other results than the stored ones" in texts(history_of(lines))


# -- 4: reruns ---------------------------------------------------------------------------------------------------------

#: Task 2 was interrupted in one process, and ran again in another.
INTERRUPTED = [*TWO_RUN, *run(2, 12, nonce="lost"), *run(2, 16, 16.5, process="two")]
#: Task 2 ended in one process, and ran again in another.
RUN_TWICE = [*TWO_RUN, *run(2, 12, 12.5, nonce="lost"), *run(2, 16, 16.5, process="two")]
REST_AFTER_RERUN = [*run(3, 17, 17.5), *run(4, 18, 18.5)]


def cause(lines: Sequence[Line], *faults: Fault) -> str | None:
    """Return the cause of the only rerun in a history."""
    (rerun,) = promises.reruns(history_of([*lines, *REST_AFTER_RERUN], stored(ended=19.0), *faults))
    return rerun.cause


def test_rerun_of_a_task_without_a_fault_is_reported() -> None:
    assert cause(INTERRUPTED) is None
    history = history_of([*RUN_TWICE, *REST_AFTER_RERUN], stored(ended=19.0))
    assert texts(history) == "4: a task ran again without cause: 1 operation(s)"


@pytest.mark.parametrize(
    ("lines", "fault", "expected"),
    [
        (INTERRUPTED, Fault(KILL, "one", 12.2, 12.2), "killed"),
        (RUN_TWICE, Fault(KILL, "one", 12.6, 12.6), "killed"),
        (RUN_TWICE, Fault(KILL, "one", 15.5, 15.5), None),
        (INTERRUPTED, Fault(KILL, "one", 11.8, 11.8), None),
        (INTERRUPTED, Fault(KILL, "two", 12.2, 12.2), None),
        (INTERRUPTED, Fault(KILL, "one", 16.2, 16.2), None),
        (INTERRUPTED, Fault(STOP, "one", 12.2, 17), "stopped past its lease"),
        (RUN_TWICE, Fault(STOP, "one", 12.2, 12.4), None),
        (RUN_TWICE, Fault(STOP, "three", 12.2, 17), None),
        (INTERRUPTED, Fault(TERM, "one", 12.2, 15.4), "longer than shutdown_timeout"),
        (RUN_TWICE, Fault(TERM, "one", 12.2, 12.6), None),
        (RUN_TWICE, Fault(LONG_OUTAGE, "", 12.2, 15.5), "lost the database"),
        (RUN_TWICE, Fault(SHORT_OUTAGE, "", 13.9, 14.5), "lost the database"),
        (RUN_TWICE, Fault(SHORT_OUTAGE, "", 14.5, 15), None),
        (RUN_TWICE, Fault("broker killed", "", 12.2, 15), None),
    ],
)
def test_rerun_of_a_task_is_excused_only_by_a_matching_fault(
    lines: list[Line], fault: Fault, expected: str | None
) -> None:
    assert cause(lines, fault) == expected


def test_rerun_of_a_task_is_excused_when_its_process_was_starved_of_cpu() -> None:
    assert cause([*INTERRUPTED, Line(14, "one", STARVED, "1.8")]) == "did not get to run"
    assert cause([*INTERRUPTED, Line(14, "one", STARVED, "0.9")]) is None


def test_recovery_time_after_a_kill_is_measured() -> None:
    events = [
        StoredEvent("claimed", at=11.9, epoch=1),
        StoredEvent("sent-again", text="lease-expired", at=15.2, epoch=1),
        StoredEvent("claimed", at=15.9, epoch=2),
    ]
    history = history_of([*INTERRUPTED, *REST_AFTER_RERUN], stored(events=events), Fault(KILL, "one", 12.2, 12.2))
    assert promises.recovery_times(history) == [pytest.approx(3.0)]


# -- 5: no start after the end -----------------------------------------------------------------------------------------


def test_task_starting_after_the_end_is_reported() -> None:
    late = [*TWO_RUN, *run(2, 18, 18.5)]
    cancelled = stored(2, "CANCELLED", ended=12.0)
    assert "5: a task started after the end" in texts(history_of(late, cancelled, kind=CANCELLED))
    suspension = Fault(STOP, "one", 11.9, 17.9)
    assert texts(history_of(late, cancelled, suspension, kind=CANCELLED)) == ""


# -- 6: progress -------------------------------------------------------------------------------------------------------


def test_open_operations_without_progress_are_reported_as_stalled() -> None:
    without_progress = [ProgressSample(second, 5, 1) for second in range(40)]
    assert "6: no progress for 39.0 s" in texts(history_of(samples=without_progress))
    without_open_operations = [ProgressSample(second, 5, 0) for second in range(40)]
    assert promises.stalls(history_of(samples=without_open_operations)) == []


def test_progress_or_a_recent_fault_is_no_stall() -> None:
    slow = history_of(samples=[ProgressSample(second, second // 20, 1) for second in range(90)])
    assert promises.longest_pause(slow) == 19
    samples = [ProgressSample(second, 5, None if 5 < second < 30 else 1) for second in range(40)]
    with_outage = history_of(ALL_RUN, None, Fault(LONG_OUTAGE, "", 5, 30), samples=samples)
    assert promises.longest_pause(with_outage) == 39
    assert promises.longest_pause(with_outage, without_faults=True) == 9
    assert promises.stalls(with_outage) == []
    with_kill = history_of(ALL_RUN, None, Fault(KILL, "one", 20, 20), samples=samples)
    assert promises.longest_pause(with_kill, without_faults=True) == 19


# -- hits --------------------------------------------------------------------------------------------------------------


def test_fault_hits_only_while_a_task_is_running() -> None:
    faults = [Fault(KILL, "one", 10.2, 10.2), Fault(KILL, "two", 10.2, 10.2), Fault(KILL, "one", 10.7, 10.7)]
    faults += [Fault(STOP, "one", 11.2, 13), Fault(STOP, "one", 11.2, 15), Fault(SHORT_OUTAGE, "", 12.2, 12.9)]
    faults += [Fault(LONG_OUTAGE, "", 12.7, 12.9), Fault(LONG_OUTAGE, "", 14.2, 16)]
    assert promises.hits(history_of(ALL_RUN, None, *faults)) == {KILL: 1, STOP: 1, SHORT_OUTAGE: 1}


# -- orders and plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_same_seed_gives_the_same_orders_with_every_kind(seed: int) -> None:
    seeded = orders(seed, 80, 24, long=4)
    assert seeded == orders(seed, 80, 24, long=4)
    assert {order.kind for order in seeded} == {PLAIN, SHAKY, FAILING, CANCELLED}
    assert len({order.uuid for order in seeded}) == len(seeded)


@pytest.mark.parametrize("seed", range(30))
def test_plan_spares_one_consumer_and_stops_both_servers(seed: int) -> None:
    actions = fault_plan(seed, 24, lease=3)
    assert actions == fault_plan(seed, 24, lease=3)
    consumers = [action for action in actions if action.slot >= 0]
    assert {action.kind for action in consumers} == {KILL, TERM, STOP}
    for number, action in enumerate(consumers):
        simultaneous = [action, *(other for other in consumers[:number] if other.until > action.at)]
        assert len({each.slot for each in simultaneous}) == len(simultaneous) < 4
    servers = [action for action in actions if action.slot < 0]
    assert [action.kind for action in servers].count(SHORT_OUTAGE) == 2
    assert any(action.kind == LONG_OUTAGE and action.seconds > 3 for action in servers)
    assert len(servers) == 4
    assert all(action.until < other.at for action, other in pairwise(servers))
