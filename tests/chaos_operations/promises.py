"""The promises about operations, each a function that reads a history and names what breaks it.

1. Every operation that was accepted has ended, as it must and with the right result.
2. What a task gave is recorded once, and it was given by a run of this task.
3. A task begins when the result of the one before is stored, and sees exactly the stored results.
4. A task is run again only when its process was killed, stopped past its lease, lost the database, or had to end.
5. Nothing begins once an operation has ended.
6. Something moves while operations are open.
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
from tests.chaos_operations.history import OUTAGES, History, Kept, Run
from tests.chaos_operations.orders import CANCELLED, FAILING, SIZE, Order, values

#: Seconds that a checkpoint may be late.
LATE = 1.5
#: Seconds that a process may need to go on once the database does, and to notice what happened meanwhile.
RECOVERY = 3.0
#: Seconds within which what was claimed is begun.
PROMPT = 1.0
#: Stories that are told of one promise.
TOLD = 4


class Double(NamedTuple):
    """An attempt that was begun again."""

    earlier: Run
    later: Run
    #: Why that is allowed; None when it is not.
    cause: str | None


def broken(history: History) -> list[Violation]:
    """All violations of all promises."""
    found: dict[tuple[int, str], list[str]] = {}
    for promise, text, uuid in _found(history):
        found.setdefault((promise, text), []).append(uuid)
    violations = [
        Violation(promise, f"{text}: {len(set(uuids))} operation(s)", _told(history, uuids))
        for (promise, text), uuids in found.items()
    ]
    return [*violations, *stalls(history)]


def _told(history: History, uuids: list[str]) -> tuple[str, ...]:
    return tuple(line for uuid in list(dict.fromkeys(uuids))[:TOLD] for line in history.story(uuid))


def _found(history: History) -> Iterator[tuple[int, str, str]]:
    orders = {order.uuid: order for order in history.orders}
    for uuid in history.kept.keys() - orders.keys():
        yield 1, "stored, and never handed in", uuid
    for order in history.orders:
        kept = history.kept.get(order.uuid)
        if order.uuid not in history.accepted:
            yield 1, "not accepted", order.uuid
        elif kept is None:
            yield 1, "accepted, and not stored", order.uuid
        else:
            yield from ((1, text, order.uuid) for text in wrong_ends(order, kept, history))
            yield from ((2, text, order.uuid) for text in wrong_records(order, kept, history))
            yield from ((3, text, order.uuid) for text in wrong_starts(kept, history))
            yield from ((5, text, order.uuid) for text in late_starts(kept, history))
    for double in doubles(history):
        if double.cause is None:
            yield 4, "a task was run again without cause", double.earlier.told.operation


# -- 1 -----------------------------------------------------------------------------------------------------------------


def wrong_ends(order: Order, kept: Kept, history: History) -> Iterator[str]:
    """What is wrong with how an operation ended."""
    allowed = {SUCCESS, IS_CANCELLED} if order.kind == CANCELLED else {SUCCESS}
    if kept.status not in allowed:
        yield f"{order.kind} ended as {kept.status}"
        return
    if order.kind == FAILING and order.uuid not in history.resumed:
        yield "ended well without having failed"
    gave = [each for each in kept.gave if each is not None]
    if kept.status == SUCCESS and len(gave) != SIZE:
        yield "ended well without all of its tasks"
    if kept.gave[: len(gave)] != gave:
        yield "has a task that succeeded behind one that did not"
    if [number for number, _ in gave] != values(order)[: len(gave)]:
        yield "a task gave something wrong"
    if dict(kept.retval) != {str(position): each for position, each in enumerate(gave)}:
        yield "its result is not that of its tasks"


# -- 2 -----------------------------------------------------------------------------------------------------------------


def wrong_records(order: Order, kept: Kept, history: History) -> Iterator[str]:
    """What is wrong with what was recorded of its tasks."""
    for position, gave in enumerate(kept.gave):
        runs = history.runs.get((order.uuid, position), [])
        attempts = [(number, status) for where, number, status in kept.attempts if where == position]
        numbers = list(range(1, order.tries(position) + 1))
        expected = [(number, SUCCESS if number == numbers[-1] else FAILED) for number in numbers]
        if gave is not None and attempts != expected:
            yield "the attempts that were recorded are not those that were to be made"
        if gave is None and attempts != expected[: len(attempts)]:
            yield "attempts were recorded that were not to be made"
        if gave is not None and _recorded(runs, gave) is None:
            yield "a result was recorded that no run gave"
        if any(run.told.task != kept.tasks[position] for run in runs):
            yield "a task had another uuid when it was run"
        if any(run.told.attempt > len(numbers) for run in runs):
            yield "an attempt was begun that was not to be made"
    events = Counter(kind for kind, _, _ in kept.events)
    succeeded = Counter(uuid for kind, uuid, _ in kept.events if kind == "task-succeeded")
    if events["accepted"] != 1 or any(count != 1 for count in succeeded.values()):
        yield "something that happens once was recorded more than once"
    if events["ended"] != 1 + events["resumed"] or events["resumed"] != (order.kind == FAILING):
        yield "it ended or was resumed more or less often than it was to"
    if any(after < before for (_, before), (_, after) in pairwise(kept.marks)):
        yield "something was recorded under a claim that was over"


def _recorded(runs: list[Run], gave: list[object]) -> Run | None:
    """The run that gave what is recorded."""
    return next((run for run in runs if run.told.nonce == gave[1] and run.outcome == ledger.END), None)


# -- 3 -----------------------------------------------------------------------------------------------------------------


def wrong_starts(kept: Kept, history: History) -> Iterator[str]:
    """What is wrong with when its tasks began, and with what they saw."""
    for position in range(SIZE):
        stored = {str(before): kept.gave[before] for before in range(min(position, len(kept.gave)))}
        for run in history.runs.get((kept.uuid, position), []):
            if run.told.seen != stored:
                yield "a task saw something else than the stored results"
            if position and (gave := kept.gave[position - 1]) is not None:
                before = _recorded(history.runs.get((kept.uuid, position - 1), []), gave)
                if before is not None and (before.end_place or 0) > run.place:
                    yield "a task began before the one before it had ended"


# -- 4 -----------------------------------------------------------------------------------------------------------------


def doubles(history: History) -> list[Double]:
    """Attempts that were begun again."""
    found = []
    for runs in history.runs.values():
        ordered = sorted(runs, key=lambda run: (run.told.attempt, run.start))
        for _, same in groupby(ordered, key=lambda run: run.told.attempt):
            found += [Double(first, second, cause(history, first, second)) for first, second in pairwise(same)]
    return found


def cause(history: History, first: Run, second: Run) -> str | None:
    """Why an attempt may have been begun again."""
    return _fault_cause(history, first, second) or _database_cause(history, first, second) or _starved(history, first)


def _fault_cause(history: History, first: Run, second: Run) -> str | None:
    rules = history.rules
    ends = (first.end or second.start) + LATE
    for fault in history.faults_of(first.process, KILL):
        if first.start <= fault.until and fault.at <= min(ends, second.start):
            return "killed"
    for run in (first, second):
        begins, ends = run.start - PROMPT, (run.end or second.start) + LATE
        for fault in history.faults_of(run.process, STOP):
            if _too_long(history, fault) and fault.at <= ends and fault.until >= begins and fault.at < second.start:
                return "stopped past its lease"
    for fault in history.faults_of(first.process, TERM):
        over = fault.at + rules.shutdown_timeout
        if first.start <= over <= second.start and (first.end is None or first.end > over - LATE):
            return "longer than shutdown_timeout"
    return None


def _too_long(history: History, fault: Fault) -> bool:
    """Whether a stop may outlast what was left of a lease."""
    return fault.until - fault.at >= history.rules.lease - 2 * history.rules.heartbeat


def _database_cause(history: History, first: Run, second: Run) -> str | None:
    for fault in history.faults_of("", *OUTAGES):
        ends = (first.end or second.start) + LATE
        if fault.at <= min(ends, second.start) and fault.until + RECOVERY >= first.start - PROMPT:
            return "lost the database"
    return None


def _starved(history: History, run: Run) -> str | None:
    """Whether the machine did not let a process run for so long that its lease was over."""
    rules = history.rules
    for begin, end in history.starved.get(run.process, ()):
        during = begin <= (run.end or end) + LATE and end >= run.start
        if during and end - begin >= rules.lease - 2 * rules.heartbeat:
            return "did not get to run"
    return None


def caused(history: History) -> Counter[str]:
    """How many doubles there are by cause."""
    return Counter(double.cause or "no cause" for double in doubles(history))


def waits(history: History) -> list[float]:
    """Seconds from each kill that cut a task off until it was sent again, or taken up; shortest first."""
    found = []
    for double in doubles(history):
        kept = history.kept.get(double.earlier.told.operation)
        if kept is None or double.cause != "killed":
            continue
        kills = [fault.at for fault in history.faults_of(double.earlier.process, KILL)]
        kill = max(at for at in kills if at <= double.later.start)
        happened = zip(kept.events, kept.marks, strict=False)
        found += [at - kill for (kind, _, _), (at, _) in happened if at > kill and kind in ("sent-again", "claimed")][
            :1
        ]
    return sorted(found)


# -- 5 -----------------------------------------------------------------------------------------------------------------


def late_starts(kept: Kept, history: History) -> Iterator[str]:
    """Tasks that were begun after the end, unless by a process that had no way to know of it."""
    if kept.ended is None:
        return
    for run in history.runs_of(kept.uuid):
        if run.start > kept.ended + PROMPT and not _was_away(history, run, kept.ended):
            yield "a task was begun after the end"


def _was_away(history: History, run: Run, ended: float) -> bool:
    faults = [*history.faults_of(run.process, STOP), *history.faults_of("", *OUTAGES)]
    return any(fault.at <= ended + PROMPT and fault.until + PROMPT >= run.start for fault in faults)


# -- 6 -----------------------------------------------------------------------------------------------------------------


def stalls(history: History) -> list[Violation]:
    """Whether nothing moved for too long although there was something to do."""
    longest = longest_pause(history, healed=True)
    if longest <= history.rules.patience:
        return []
    left = [uuid for uuid, kept in history.kept.items() if kept.ended is None]
    return [Violation(6, f"nothing moved for {longest:.1f} s", _told(history, left))]


def longest_pause(history: History, healed: bool = False) -> float:
    """The longest time in which no task began or ended although operations were open.

    :param healed: it begins anew after each fault, and while a server is away does not count.
    """
    longest = since = 0.0
    before: int | None = None
    faults = history.faults if healed else ()
    for look in history.looks:
        if look.open == 0 or look.moves != before:
            since, before = look.at, look.moves
        begin = max([since, *(fault.until for fault in faults if fault.at <= look.at)])
        longest = max(longest, look.at - begin)
    return longest


# -- hits --------------------------------------------------------------------------------------------------------------


def hits(history: History) -> Counter[str]:
    """By kind, how many faults hit operations that ran."""
    return Counter(fault.kind for fault in history.faults if _did_hit(history, fault))


def _did_hit(history: History, fault: Fault) -> bool:
    every = [run for runs in history.runs.values() for run in runs]
    running = [run for run in every if run.start <= fault.at and (run.end is None or run.end >= fault.at)]
    if fault.process:
        too_short = fault.kind == STOP and fault.until - fault.at < history.rules.lease
        return not too_short and any(run.process == fault.process for run in running)
    return bool(running) and any(run.start > fault.until for run in every)
