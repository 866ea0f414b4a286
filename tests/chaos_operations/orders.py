"""Orders made from a seed: operations of five tasks, and the expected outcome of each.

What a task gives is computed from what it sees of those before it, so a wrong result of one shows in all behind it.
"""

from __future__ import annotations

import random
import uuid
from typing import Any, NamedTuple

#: Tasks of an operation.
SIZE = 5

#: How an operation is handed in: by ``send()``, as a message of somebody who knows no class, by ``launch()``, or as
#: such a message for a class that is launched when it arrives.
SEND, MESSAGE, LAUNCH, SPREAD = WAYS = ("send()", "message", "launch()", "message, DISTRIBUTED")

#: What happens to it: nothing; a task fails twice, then succeeds; a task fails until the operation is resumed; it is
#: cancelled at some time.
PLAIN, SHAKY, FAILING, CANCELLED = KINDS = ("plain", "shaky", "failing", "cancelled")
SHARES = (64, 14, 10, 12)

#: Attempts at a task that fails now and then.
ATTEMPTS = 3
#: Share of tasks that take longer than a lease, and of operations that are handed in twice.
LONG, TWICE = 0.03, 0.1
#: Results are less than this.
LIMIT = 1_000_003


class Order(NamedTuple):
    """An operation to hand in."""

    number: int
    uuid: str
    way: str
    kind: str
    #: Which task has trouble.
    where: int
    #: What each task takes.
    seconds: tuple[float, ...]
    #: When it is handed in.
    at: float
    #: Seconds after that: when it is handed in once more, and when it is cancelled; None for never.
    again: float | None
    cancel: float | None

    @property
    def params(self) -> dict[str, Any]:
        """The params of the operation."""
        return {"number": self.number, "kind": self.kind, "where": self.where, "seconds": list(self.seconds)}

    def tries(self, position: int) -> int:
        """How many attempts at a task are to be recorded in all, if it comes to its end."""
        if position != self.where:
            return 1
        return {SHAKY: ATTEMPTS, FAILING: 2}.get(self.kind, 1)


def orders(seed: int, count: int, seconds: float, *, long: float) -> list[Order]:
    """So many operations, handed in one after the other within so many seconds.

    :param long: what a long task takes.
    """
    chance = random.Random(f"orders {seed}")
    found = []
    for number in range(count):
        kind = chance.choices(KINDS, SHARES)[0]
        takes = [chance.uniform(0.01, 0.35) for _ in range(SIZE)]
        takes = [long if chance.random() < LONG else each for each in takes]
        found.append(
            Order(
                number,
                str(uuid.UUID(int=chance.getrandbits(128), version=4)),
                WAYS[number % len(WAYS)],
                kind,
                chance.randrange(SIZE),
                tuple(round(each, 3) for each in takes),
                round(seconds * number / count, 3),
                round(chance.uniform(0, 8), 3) if chance.random() < TWICE else None,
                round(chance.uniform(0, 3), 3) if kind == CANCELLED else None,
            )
        )
    return found


def value(number: int, position: int, before: list[int]) -> int:
    """What a task gives.

    :param before: what those before it gave.
    """
    return (31 * sum(before) + 7 * number + position + 1) % LIMIT


def values(order: Order) -> list[int]:
    """What all tasks of an operation give."""
    found: list[int] = []
    for position in range(SIZE):
        found.append(value(order.number, position, found))
    return found
