"""The plan of faults, created from a seed before the run: the same seed plans the same faults at the same times.

A fault hits a slot, which is one consumer process at a time. At any time at least one slot has no fault, so that the
group can make progress. During a broker outage consumers have no faults, because a consumer that ends without a broker
does not promise to commit its finished records.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from tests.chaos.history import BROKER_KILL, BROKER_STOP, FENCED, JOIN, KILL, STOP, TERM

#: Faults of consumers, with their relative frequencies.
WEIGHTS = {KILL: 3, TERM: 3, JOIN: 3, STOP: 2}
#: Seconds between two faults: least and most.
PAUSE = (1.0, 3.0)
#: Duration of a broker outage in seconds.
OUTAGE_SECONDS = 10.0
#: Seconds without faults before and after a broker outage.
CALM = (2.0, 6.0)
#: Seconds without faults at the start, and after each fault of a slot.
START_SECONDS, SETTLE_SECONDS = 3.0, 3.0
#: Seconds of churn between two outages in a long run.
ROUND_SECONDS = 60.0


class Action(NamedTuple):
    """A planned fault; for ``seconds`` its target is down, stopped, or a member of the group."""

    at: float
    kind: str
    slot: int
    seconds: float

    @property
    def until(self) -> float:
        return self.at + self.seconds


def fault_plan(
    seed: int, seconds: float, *, slots: int = 3, session_timeout: float = 6, outages: bool = False
) -> list[Action]:
    """Return the faults of a run of about ``seconds`` seconds.

    :param slots: the number of permanent consumers. A consumer that joins for some seconds has the next slot.
    :param session_timeout: seconds after which a stopped process loses its partitions.
    :param outages: whether the broker is also stopped or killed.
    """
    chance = random.Random(f"plan {seed}")
    actions: list[Action] = []
    begin = START_SECONDS
    while begin < seconds:
        end = min(begin + ROUND_SECONDS, seconds) if outages else seconds
        actions += _churn(chance, begin, end, slots, session_timeout)
        settled = max([action.until for action in actions] + [end])
        begin = settled
        if outages:
            outage = Action(settled + CALM[0], chance.choice((BROKER_STOP, BROKER_KILL)), -1, OUTAGE_SECONDS)
            actions.append(outage)
            begin = outage.until + CALM[1]
    return sorted(actions)


def fence_plan(seed: int, *, slots: int = 3) -> list[Action]:
    """Return the faults of a run in which second processes take the group instance ids of consumers.

    Two consumers are fenced; another is killed, and one is terminated, before, between or after that.
    """
    chance = random.Random(f"fence {seed}")
    actions: list[Action] = []
    at, slot = START_SECONDS, chance.randrange(slots)
    for kind in chance.sample([FENCED, FENCED, KILL, TERM], 4):
        seconds = 0.0 if kind == FENCED else _seconds(chance, kind, 0)
        actions.append(Action(round(at, 3), kind, slot, round(seconds, 3)))
        # Two faults in a row hit different slots, because the new process in a slot needs time to join.
        slot = (slot + chance.randrange(1, slots)) % slots
        at += chance.uniform(*PAUSE)
    return actions


def _churn(chance: random.Random, begin: float, end: float, slots: int, session_timeout: float) -> Iterator[Action]:
    """Yield faults of consumers; a long enough period contains each kind."""
    busy_until = [begin] * (slots + 1)
    # A kill may hit an idle process, so plan two.
    required = [KILL, KILL, TERM, TERM, JOIN]
    chance.shuffle(required)
    # Plan the longest fault first, so that it ends in time.
    required.insert(0, STOP)
    now = begin
    while now < end:
        kind = required[0] if required else chance.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        seconds = _seconds(chance, kind, session_timeout)
        slot = _free_slot(chance, kind, busy_until, now)
        if slot is not None and now + seconds <= end + SETTLE_SECONDS:
            yield Action(round(now, 3), kind, slot, round(seconds, 3))
            busy_until[slot] = now + seconds + SETTLE_SECONDS
            required = required[1:]
        now += chance.uniform(*PAUSE)


def _seconds(chance: random.Random, kind: str, session_timeout: float) -> float:
    """Return the duration of a fault."""
    if kind == STOP:
        return session_timeout + chance.uniform(3, 4)
    return chance.uniform(4, 8) if kind == JOIN else chance.uniform(0.2, 2.5)


def _free_slot(chance: random.Random, kind: str, busy_until: list[float], now: float) -> int | None:
    """Return a slot without a fault; None if no other slot would be left."""
    joining = len(busy_until) - 1
    if kind == JOIN:
        return joining if busy_until[joining] <= now else None
    free = [slot for slot in range(joining) if busy_until[slot] <= now]
    return chance.choice(free) if len(free) > 1 else None
