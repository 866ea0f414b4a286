"""The plan of faults, made from a seed before the run: the same seed does the same things at the same times.

What is done goes to slots, each of which is one consumer process at a time. At every time at least one slot is left
alone, so that the group can go on, and while the broker is away nothing else is done: whether a consumer that is told
to end without a broker commits what it has done is nobody's promise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from tests.chaos.history import BROKER_KILL, BROKER_STOP, JOIN, KILL, STOP, TERM

#: What is done to consumers, and how often in relation to each other.
WEIGHTS = {KILL: 3, TERM: 3, JOIN: 3, STOP: 2}
#: Seconds from one fault to the next.
PAUSE = (1.0, 3.0)
#: Seconds that a broker is away.
AWAY = 10.0
#: Seconds that are left alone before a broker goes and after it is back.
CALM = (2.0, 6.0)
#: Seconds that consumers have to start before the first fault, and to settle after the last.
BEGIN, SETTLE = 3.0, 3.0
#: Seconds of churn between two outages in a long run.
ROUND = 60.0


class Action(NamedTuple):
    """One thing to do, and for how long its target is down, stopped, away, or part of the group."""

    at: float
    kind: str
    slot: int
    seconds: float

    @property
    def until(self) -> float:
        return self.at + self.seconds


def plan(seed: int, seconds: float, *, slots: int = 3, session: float = 6, outages: bool = False) -> list[Action]:
    """What to do in a run of about so many seconds.

    :param slots: consumers that are always meant to be there. Those that join for a while have the slots behind.
    :param session: after so many seconds a stopped process is given up.
    :param outages: whether the broker is stopped or killed, too.
    """
    chance = random.Random(f"plan {seed}")
    actions: list[Action] = []
    begin = BEGIN
    while begin < seconds:
        end = min(begin + ROUND, seconds) if outages else seconds
        actions += _churn(chance, begin, end, slots, session)
        settled = max([action.until for action in actions] + [end])
        begin = settled
        if outages:
            away = Action(settled + CALM[0], chance.choice((BROKER_STOP, BROKER_KILL)), -1, AWAY)
            actions.append(away)
            begin = away.until + CALM[1]
    return sorted(actions)


def _churn(chance: random.Random, begin: float, end: float, slots: int, session: float) -> Iterator[Action]:
    """Faults of consumers, of each kind some if there is time."""
    busy = [begin] * (slots + 1)
    # A kill may find nobody at work, so there is more than one.
    wanted = [KILL, KILL, TERM, TERM, JOIN]
    chance.shuffle(wanted)
    # What takes longest comes first: it has to end in time.
    wanted.insert(0, STOP)
    now = begin
    while now < end:
        kind = wanted[0] if wanted else chance.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        seconds = _seconds(chance, kind, session)
        slot = _slot(chance, kind, busy, now)
        if slot is not None and now + seconds <= end + SETTLE:
            yield Action(round(now, 3), kind, slot, round(seconds, 3))
            busy[slot] = now + seconds + SETTLE
            wanted = wanted[1:]
        now += chance.uniform(*PAUSE)


def _seconds(chance: random.Random, kind: str, session: float) -> float:
    if kind == STOP:
        return session + chance.uniform(3, 4)
    return chance.uniform(4, 8) if kind == JOIN else chance.uniform(0.2, 2.5)


def _slot(chance: random.Random, kind: str, busy: list[float], now: float) -> int | None:
    """A slot that nothing is being done to; None when one of them has to be left alone."""
    guest = len(busy) - 1
    if kind == JOIN:
        return guest if busy[guest] <= now else None
    free = [slot for slot in range(guest) if busy[slot] <= now]
    return chance.choice(free) if len(free) > 1 else None
