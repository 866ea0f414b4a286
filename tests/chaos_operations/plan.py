"""The plan of faults, made from a seed before the run.

What is done to consumers goes to slots, each of which is one process at a time; at every time at least one is left
alone. The database and Kafka go away while that goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.chaos.history import BROKER_KILL, BROKER_STOP, KILL, STOP, TERM
from tests.chaos.monkey import Action

#: Faults of the database: for less and for more than a lease.
SHORT_OUTAGE, LONG_OUTAGE = "database away", "database away for more than a lease"

#: SQLite: a process was stopped while it wrote.
HELD = "database held by a stopped process"

#: What is done to consumers, and how often in relation to each other.
WEIGHTS = {KILL: 4, TERM: 3, STOP: 2}
#: Seconds from one fault to the next.
PAUSE = (0.7, 1.6)
#: Seconds until another process takes the place of one, and that this one has to settle.
REPLACED, SETTLE = (0.1, 0.8), 1.5
#: Seconds by which a stop is longer than a lease: others need some time to go on with what it had.
STOPPED = (1.0, 6.0)
#: Seconds that consumers have before the first fault.
BEGIN = 2.0
#: Seconds that the database is away for less than a lease, and by how much it is longer than one.
AWAY, LONGER = (0.2, 1.0), (1.0, 2.5)
#: Seconds that Kafka is away, and what it needs to start does not count.
KAFKA_AWAY = (1.0, 3.0)


def plan(seed: int, seconds: float, *, slots: int = 4, lease: float) -> list[Action]:
    """What to do in a run of about so many seconds.

    :param lease: after so many seconds a stopped process has lost its claims.
    """
    chance = random.Random(f"operations {seed}")
    return sorted([*_consumers(chance, seconds, slots, lease), *_servers(chance, seconds, lease)])


def _consumers(chance: random.Random, seconds: float, slots: int, lease: float) -> Iterator[Action]:
    busy = [BEGIN] * slots
    # What is needed comes first.
    wanted = [STOP, KILL, TERM, KILL, STOP]
    now = BEGIN
    while now < seconds:
        kind = wanted[0] if wanted else chance.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        down = lease + chance.uniform(*STOPPED) if kind == STOP else chance.uniform(*REPLACED)
        free = [slot for slot in range(slots) if busy[slot] <= now]
        if len(free) > 1:
            slot = chance.choice(free)
            yield Action(round(now, 3), kind, slot, round(down, 3))
            busy[slot] = now + down + SETTLE
            wanted = wanted[1:]
        now += chance.uniform(*PAUSE)


def _servers(chance: random.Random, seconds: float, lease: float) -> Iterator[Action]:
    outages = [(SHORT_OUTAGE, AWAY), (SHORT_OUTAGE, AWAY), (LONG_OUTAGE, (lease + LONGER[0], lease + LONGER[1]))]
    outages.append((chance.choice((BROKER_STOP, BROKER_KILL)), KAFKA_AWAY))
    chance.shuffle(outages)
    actions = [(kind, round(chance.uniform(*away), 3)) for kind, away in outages]
    gap = (seconds - BEGIN - sum(away for _, away in actions)) / len(actions)
    now = BEGIN
    for kind, away in actions:
        at = round(now + gap * chance.uniform(0.3, 0.9), 3)
        yield Action(at, kind, -1, away)
        now = max(at, now + gap) + away
