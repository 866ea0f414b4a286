"""The plan of faults, created from a seed before the run.

A fault of a consumer hits a slot, which is one process at a time. At any time at least one slot has no fault. The
outages of the database and of Kafka come at the same time as faults of consumers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.chaos.history import BROKER_KILL, BROKER_STOP, KILL, STOP, TERM
from tests.chaos.plan import Action

#: Outages of the database that are shorter, and longer, than a lease.
SHORT_OUTAGE, LONG_OUTAGE = "database away", "database away for more than a lease"

#: A process was suspended while it held the write lock of SQLite.
LOCKED = "database held by a stopped process"

#: Faults of consumers, with their relative frequencies.
WEIGHTS = {KILL: 4, TERM: 3, STOP: 2}
#: Seconds between two faults: least and most.
PAUSE = (0.7, 1.6)
#: Seconds until a new process replaces an ended one, and seconds without faults of its slot after that.
REPLACE_SECONDS, SETTLE_SECONDS = (0.1, 0.8), 1.5
#: Seconds by which a SIGSTOP is longer than a lease, so that another consumer can run the operations.
STOP_BEYOND_LEASE = (1.0, 6.0)
#: Seconds without faults at the start.
START_SECONDS = 2.0
#: Seconds of a short outage of the database, and seconds by which a long one is longer than a lease.
SHORT_SECONDS, LONG_BEYOND_LEASE = (0.2, 1.0), (1.0, 2.5)
#: Seconds of an outage of Kafka, without the time for its start.
KAFKA_OUTAGE_SECONDS = (1.0, 3.0)


def fault_plan(seed: int, seconds: float, *, slots: int = 4, lease: float) -> list[Action]:
    """Return the faults of a run of about ``seconds`` seconds.

    :param lease: seconds after which a suspended process has lost its claims.
    """
    chance = random.Random(f"operations {seed}")
    return sorted([*_consumer_faults(chance, seconds, slots, lease), *_outages(chance, seconds, lease)])


def _consumer_faults(chance: random.Random, seconds: float, slots: int, lease: float) -> Iterator[Action]:
    busy_until = [START_SECONDS] * slots
    # Plan the required faults first.
    required = [STOP, KILL, TERM, KILL, STOP]
    now = START_SECONDS
    while now < seconds:
        kind = required[0] if required else chance.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        down = lease + chance.uniform(*STOP_BEYOND_LEASE) if kind == STOP else chance.uniform(*REPLACE_SECONDS)
        free = [slot for slot in range(slots) if busy_until[slot] <= now]
        if len(free) > 1:
            slot = chance.choice(free)
            yield Action(round(now, 3), kind, slot, round(down, 3))
            busy_until[slot] = now + down + SETTLE_SECONDS
            required = required[1:]
        now += chance.uniform(*PAUSE)


def _outages(chance: random.Random, seconds: float, lease: float) -> Iterator[Action]:
    least, most = LONG_BEYOND_LEASE
    ranges = [
        (SHORT_OUTAGE, SHORT_SECONDS),
        (SHORT_OUTAGE, SHORT_SECONDS),
        (LONG_OUTAGE, (lease + least, lease + most)),
    ]
    ranges.append((chance.choice((BROKER_STOP, BROKER_KILL)), KAFKA_OUTAGE_SECONDS))
    chance.shuffle(ranges)
    outages = [(kind, round(chance.uniform(*duration_range), 3)) for kind, duration_range in ranges]
    gap = (seconds - START_SECONDS - sum(duration for _, duration in outages)) / len(outages)
    now = START_SECONDS
    for kind, duration in outages:
        at = round(now + gap * chance.uniform(0.3, 0.9), 3)
        yield Action(at, kind, -1, duration)
        now = max(at, now + gap) + duration
