"""Tests of the promise checks for operations: a broken promise is reported, and a kept one is not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from tests.chaos import ledger
from tests.chaos.history import KILL, STOP, TERM, Fault
from tests.chaos_operations import promises
from tests.chaos_operations.history import History, Kept, Look, Rules
from tests.chaos_operations.orders import CANCELLED, FAILING, LAUNCH, PLAIN, SHAKY, SIZE, Order, orders, values
from tests.chaos_operations.plan import LONG_OUTAGE, SHORT_OUTAGE, plan
from tests.chaos_operations.shop import Told
from tests.chaos_operations.worker import LATE

RULES = Rules(lease=3, heartbeat=1, shutdown_timeout=3, patience=30)

#: What came of it: the tasks that were done, as the database has them.
GAVE = [[number, f"n{position}"] for position, number in enumerate(values(Order(1, "u", "", "", 0, (), 0, None, None)))]


def order(kind: str = PLAIN, where: int = 2) -> Order:
    return Order(1, "u", LAUNCH, kind, where, (0.1,) * SIZE, 0, None, None)


def seen(count: int) -> dict[str, Any]:
    return {str(position): GAVE[position] for position in range(count)}


def run(position: int, start: float, end: float | None = None, **given: Any) -> list[tuple[float, str, str, str]]:
    """The lines of one run of a task: when, in which process, which event, about what."""
    process, outcome = given.pop("process", "one"), given.pop("outcome", ledger.END)
    told = Told("u", position, 1, f"t{position}", f"n{position}", seen(position))._replace(**given)
    lines = [(start, process, ledger.START, told.dump())]
    return lines if end is None else [*lines, (end, process, outcome, told.dump())]


#: Task 0 from 10 to 10.5, task 1 from 11 to 11.5, and so on.
ALL_RUN = [line for position in range(SIZE) for line in run(position, 10 + position, 10.5 + position)]


def kept(count: int = SIZE, status: str = "SUCCESS", **given: Any) -> Kept:
    """An operation of which so many tasks succeeded."""
    gave = [*GAVE[:count], *[None] * (SIZE - count)]
    ends = [("task-succeeded", f"t{position}", None) for position in range(count)]
    return Kept(
        "u",
        status,
        seen(count),
        gave,
        [f"t{position}" for position in range(SIZE)],
        [(position, 1, "SUCCESS") for position in range(count)],
        [("accepted", None, None), *ends, ("ended", None, status)],
        15.0,
    )._replace(**given)


def told(
    lines: Sequence[tuple[float, str, str, str]] = ALL_RUN,
    stored: Kept | None = None,
    *faults: Fault,
    made: Order | None = None,
    looks: Sequence[Look] = (),
    **given: Any,
) -> History:
    entries = [
        ledger.Entry(event, subject, process, at, place)
        for place, (at, process, event, subject) in enumerate(sorted(lines, key=lambda line: line[0]), 1)
    ]
    found: dict[str, Any] = {"accepted": {"u": 9.0}, "resumed": frozenset(), **given}
    found |= {"kept": {"u": stored or kept()}, "entries": entries, "faults": faults, "looks": looks}
    return History(RULES, [made or order()], **found)


def texts(history: History) -> str:
    return "\n".join(f"{found.promise}: {found.text}" for found in promises.broken(history))


def test_run_without_faults_breaks_no_promise() -> None:
    assert texts(told()) == ""
    assert promises.doubles(told()) == []


# -- 1: ends and results -----------------------------------------------------------------------------------------------


def test_operation_that_has_not_ended_is_reported() -> None:
    assert "1: plain ended as RUNNING" in texts(told(ALL_RUN[:4], kept(2, "RUNNING", ended=None)))


@pytest.mark.parametrize(("kind", "well"), [(PLAIN, False), (CANCELLED, True)])
def test_cancelled_operation_without_a_cancel_request_is_reported(kind: str, well: bool) -> None:
    assert (texts(told(ALL_RUN[:4], kept(2, "CANCELLED"), made=order(kind))) == "") == well


def test_difference_between_accepted_and_stored_operations_is_reported() -> None:
    assert "1: not accepted" in texts(told(accepted={}))
    history = told()
    history.kept = {"other": kept()}
    assert texts(history).splitlines() == [
        "1: stored, and never handed in: 1 operation(s)",
        "1: accepted, and not stored: 1 operation(s)",
    ]


def test_wrong_task_result_is_reported() -> None:
    gave = [*GAVE[:4], [7, "n4"]]
    wrong = kept(gave=gave, retval={str(position): each for position, each in enumerate(gave)})
    assert "1: a task gave something wrong" in texts(told(stored=wrong))


@pytest.mark.parametrize("retval", [seen(4), {**seen(5), "error": "no"}, {**seen(5), "4": [GAVE[4][0], "other"]}])
def test_operation_result_differing_from_its_tasks_is_reported(retval: Any) -> None:
    assert "1: its result is not that of its tasks" in texts(told(stored=kept(retval=retval)))


def test_success_of_a_failing_operation_without_a_resume_is_reported() -> None:
    failed = run(2, 12, 12.5, outcome=ledger.FAIL, nonce="first")
    again = [line for position in (2, 3, 4) for line in run(position, 20 + position, 20.5 + position, attempt=2)]
    again = [*again[:2], *run(3, 23, 23.5), *run(4, 24, 24.5)]
    events = [*kept().events[:4], ("ended", None, "FAILED"), ("resumed", None, None), *kept().events[4:]]
    attempts = [*kept().attempts[:2], (2, 1, "FAILED"), (2, 2, "SUCCESS"), *kept().attempts[3:]]
    stored = kept(events=events, attempts=attempts, ended=25.0)
    lines = [*ALL_RUN[:4], *failed, *again]
    assert texts(told(lines, stored, made=order(FAILING), resumed=frozenset("u"))) == ""
    assert "1: ended well without having failed" in texts(told(lines, stored, made=order(FAILING)))


# -- 2: records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        (kept(attempts=[*kept().attempts, (4, 2, "SUCCESS")]), "the attempts that were recorded"),
        (kept(attempts=kept().attempts[:4]), "the attempts that were recorded"),
        (kept(events=[*kept().events, ("task-succeeded", "t1", None)]), "more than once"),
        (kept(events=[*kept().events, ("ended", None, "SUCCESS")]), "more or less often"),
        (kept(marks=[(1.0, 0), (2.0, 2), (3.0, 1)]), "under a claim that was over"),
        (kept(tasks=["t0", "t1", "other", "t3", "t4"]), "another uuid"),
    ],
)
def test_records_that_do_not_match_the_ledger_are_reported(stored: Kept, text: str) -> None:
    assert text in texts(told(stored=stored))


def test_recorded_result_without_a_run_is_reported() -> None:
    assert "2: a result was recorded that no run gave" in texts(told(ALL_RUN[:-1]))


def test_missing_attempts_of_a_retried_task_are_reported() -> None:
    attempts = [*kept().attempts[:2], *((2, number, "FAILED") for number in (1, 2)), (2, 3, "SUCCESS")]
    first = run(2, 12.2, 12.3, attempt=1, nonce="x1", outcome=ledger.FAIL)
    second = run(2, 12.5, 12.6, attempt=2, nonce="x2", outcome=ledger.FAIL)
    lines = [*ALL_RUN[:4], *first, *second, *run(2, 12.8, 12.9, attempt=3), *ALL_RUN[6:]]
    whole = kept(attempts=[*attempts, *kept().attempts[3:]])
    assert texts(told(lines, whole, made=order(SHAKY))) == ""
    assert "2: the attempts that were recorded" in texts(told(lines, kept(), made=order(SHAKY)))


# -- 3: order ----------------------------------------------------------------------------------------------------------


def test_task_starting_before_its_predecessor_ended_is_reported() -> None:
    early = [*ALL_RUN[:4], *run(2, 11.4, 12.5), *ALL_RUN[6:]]
    assert texts(told(early)) == "3: a task began before the one before it had ended: 1 operation(s)"


def test_task_seeing_other_results_than_the_stored_ones_is_reported() -> None:
    for wrong in (seen(1), seen(3), {**seen(2), "1": [GAVE[1][0], "of another run"]}):
        lines = [*ALL_RUN[:4], *run(2, 12, 12.5, seen=wrong), *ALL_RUN[6:]]
        assert "3: a task saw something else" in texts(told(lines))


# -- 4: doubles --------------------------------------------------------------------------------------------------------

#: Task 2 was begun in one process, and again in another.
CUT_OFF = [*ALL_RUN[:4], *run(2, 12, nonce="lost"), *run(2, 16, 16.5, process="two")]
DONE_TWICE = [*ALL_RUN[:4], *run(2, 12, 12.5, nonce="lost"), *run(2, 16, 16.5, process="two")]
REST = [*run(3, 17, 17.5), *run(4, 18, 18.5)]


def cause(lines: Sequence[tuple[float, str, str, str]], *faults: Fault) -> str | None:
    (double,) = promises.doubles(told([*lines, *REST], kept(ended=19.0), *faults))
    return double.cause


def test_rerun_of_a_task_without_a_fault_is_reported() -> None:
    assert cause(CUT_OFF) is None
    assert texts(told([*DONE_TWICE, *REST], kept(ended=19.0))) == (
        "4: a task was run again without cause: 1 operation(s)"
    )


@pytest.mark.parametrize(
    ("lines", "fault", "expected"),
    [
        (CUT_OFF, Fault(KILL, "one", 12.2, 12.2), "killed"),
        (DONE_TWICE, Fault(KILL, "one", 12.6, 12.6), "killed"),
        (DONE_TWICE, Fault(KILL, "one", 15.5, 15.5), None),
        (CUT_OFF, Fault(KILL, "one", 11.8, 11.8), None),
        (CUT_OFF, Fault(KILL, "two", 12.2, 12.2), None),
        (CUT_OFF, Fault(KILL, "one", 16.2, 16.2), None),
        (CUT_OFF, Fault(STOP, "one", 12.2, 17), "stopped past its lease"),
        (DONE_TWICE, Fault(STOP, "one", 12.2, 12.4), None),
        (DONE_TWICE, Fault(STOP, "three", 12.2, 17), None),
        (CUT_OFF, Fault(TERM, "one", 12.2, 15.4), "longer than shutdown_timeout"),
        (DONE_TWICE, Fault(TERM, "one", 12.2, 12.6), None),
        (DONE_TWICE, Fault(LONG_OUTAGE, "", 12.2, 15.5), "lost the database"),
        (DONE_TWICE, Fault(SHORT_OUTAGE, "", 13.9, 14.5), "lost the database"),
        (DONE_TWICE, Fault(SHORT_OUTAGE, "", 14.5, 15), None),
        (DONE_TWICE, Fault("broker killed", "", 12.2, 15), None),
    ],
)
def test_rerun_of_a_task_is_excused_only_by_a_matching_fault(
    lines: list[tuple[float, str, str, str]], fault: Fault, expected: str | None
) -> None:
    assert cause(lines, fault) == expected


def test_rerun_of_a_task_is_excused_when_its_process_was_starved_of_cpu() -> None:
    assert cause([*CUT_OFF, (14, "one", LATE, "1.8")]) == "did not get to run"
    assert cause([*CUT_OFF, (14, "one", LATE, "0.9")]) is None


def test_wait_after_a_kill_is_measured() -> None:
    events = [("claimed", None, None), ("sent-again", None, "lease-expired"), ("claimed", None, None)]
    stored = kept(events=events, marks=[(11.9, 1), (15.2, 1), (15.9, 2)])
    history = told([*CUT_OFF, *REST], stored, Fault(KILL, "one", 12.2, 12.2))
    assert promises.waits(history) == [pytest.approx(3.0)]


# -- 5: nothing begins after the end -----------------------------------------------------------------------------------


def test_task_starting_after_the_end_is_reported() -> None:
    late = [*ALL_RUN[:4], *run(2, 18, 18.5)]
    cancelled = kept(2, "CANCELLED", ended=12.0)
    assert "5: a task was begun after the end" in texts(told(late, cancelled, made=order(CANCELLED)))
    zombie = Fault(STOP, "one", 11.9, 17.9)
    assert texts(told(late, cancelled, zombie, made=order(CANCELLED))) == ""


# -- 6: progress -------------------------------------------------------------------------------------------------------


def test_open_operations_without_progress_are_reported_as_stalled() -> None:
    still = [Look(second, 5, 1) for second in range(40)]
    assert "6: nothing moved for 39.0 s" in texts(told(looks=still))
    assert texts(told((), None, looks=[Look(second, 5, 0) for second in range(40)])).count("6:") == 0


def test_progress_or_a_recent_fault_is_no_stall() -> None:
    assert promises.longest_pause(told(looks=[Look(second, second // 20, 1) for second in range(90)])) == 19
    still = [Look(second, 5, None if 5 < second < 30 else 1) for second in range(40)]
    away = told(ALL_RUN, None, Fault(LONG_OUTAGE, "", 5, 30), looks=still)
    assert (promises.longest_pause(away), promises.longest_pause(away, healed=True)) == (39, 9)
    assert promises.stalls(away) == []
    hit = told(ALL_RUN, None, Fault(KILL, "one", 20, 20), looks=still)
    assert promises.longest_pause(hit, healed=True) == 19


# -- hits --------------------------------------------------------------------------------------------------------------


def test_fault_hits_only_while_a_task_is_running() -> None:
    faults = [Fault(KILL, "one", 10.2, 10.2), Fault(KILL, "two", 10.2, 10.2), Fault(KILL, "one", 10.7, 10.7)]
    faults += [Fault(STOP, "one", 11.2, 13), Fault(STOP, "one", 11.2, 15), Fault(SHORT_OUTAGE, "", 12.2, 12.9)]
    faults += [Fault(LONG_OUTAGE, "", 12.7, 12.9), Fault(LONG_OUTAGE, "", 14.2, 16)]
    assert promises.hits(told(ALL_RUN, None, *faults)) == {KILL: 1, STOP: 1, SHORT_OUTAGE: 1}


# -- what is asked for, and what is done -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_same_seed_gives_the_same_orders_with_every_kind(seed: int) -> None:
    found = orders(seed, 80, 24, long=4)
    assert found == orders(seed, 80, 24, long=4)
    assert {each.kind for each in found} == {PLAIN, SHAKY, FAILING, CANCELLED}
    assert len({each.uuid for each in found}) == len(found)


@pytest.mark.parametrize("seed", range(30))
def test_plan_spares_one_consumer_and_stops_both_servers(seed: int) -> None:
    actions = plan(seed, 24, lease=3)
    assert actions == plan(seed, 24, lease=3)
    consumers = [action for action in actions if action.slot >= 0]
    assert {action.kind for action in consumers} == {KILL, TERM, STOP}
    for number, action in enumerate(consumers):
        during = [other for other in consumers[:number] if other.until > action.at]
        assert len({other.slot for other in during} | {action.slot}) == len(during) + 1 < 4
    servers = [action for action in actions if action.slot < 0]
    assert [action.kind for action in servers].count(SHORT_OUTAGE) == 2
    assert any(action.kind == LONG_OUTAGE and action.seconds > 3 for action in servers)
    assert len(servers) == 4
    assert all(action.until < other.at for action, other in pairwise(servers))
