"""Orders created from a seed: operations of five tasks, and the expected result of each task.

A task computes its result from the results of the earlier tasks, so that a wrong result changes all later ones.
"""

from __future__ import annotations

import random
import uuid
from typing import Any, NamedTuple

#: The number of tasks of an operation.
SIZE = 5

#: Ways to send an operation: with ``send()``, as a plain message, with ``launch()``, or as a plain message for a class
#: with ``DISTRIBUTED``.
SEND, MESSAGE, LAUNCH, MESSAGE_DISTRIBUTED = WAYS = ("send()", "message", "launch()", "message, DISTRIBUTED")

#: Kinds of operations: all tasks succeed; a task fails twice and then succeeds; a task fails until the operation is
#: resumed; the operation is cancelled. The shares of the kinds are in percent.
PLAIN, SHAKY, FAILING, CANCELLED = KINDS = ("plain", "shaky", "failing", "cancelled")
SHARES = (64, 14, 10, 12)

#: The number of attempts at the task of a shaky operation.
ATTEMPTS = 3
#: The share of tasks that take longer than a lease, and of operations that are sent twice.
LONG, TWICE = 0.03, 0.1
#: The upper limit of results.
LIMIT = 1_000_003


class Order(NamedTuple):
    """An operation to send."""

    number: int
    uuid: str
    way: str
    kind: str
    #: The position of the task that fails in a shaky or failing operation.
    failing_task: int
    #: The duration of each task in seconds.
    seconds: tuple[float, ...]
    #: Seconds from the start of the run until the operation is sent.
    at: float
    #: Seconds from then until the operation is sent again; None for never.
    repeat_after: float | None
    #: Seconds from then until the operation is cancelled; None for never.
    cancel_after: float | None

    @property
    def params(self) -> dict[str, Any]:
        """The params of the operation."""
        return {
            "number": self.number,
            "kind": self.kind,
            "failing_task": self.failing_task,
            "seconds": list(self.seconds),
        }

    def expected_attempts(self, position: int) -> int:
        """Return the number of attempts at a task until it succeeds."""
        if position != self.failing_task:
            return 1
        return {SHAKY: ATTEMPTS, FAILING: 2}.get(self.kind, 1)


def orders(seed: int, count: int, seconds: float, *, long: float) -> list[Order]:
    """Return ``count`` operations, which are sent one after the other within ``seconds`` seconds.

    :param long: the duration of a long task in seconds.
    """
    chance = random.Random(f"orders {seed}")
    result = []
    for number in range(count):
        kind = chance.choices(KINDS, SHARES)[0]
        durations = [chance.uniform(0.01, 0.35) for _ in range(SIZE)]
        durations = [long if chance.random() < LONG else duration for duration in durations]
        result.append(
            Order(
                number=number,
                uuid=str(uuid.UUID(int=chance.getrandbits(128), version=4)),
                way=WAYS[number % len(WAYS)],
                kind=kind,
                failing_task=chance.randrange(SIZE),
                seconds=tuple(round(duration, 3) for duration in durations),
                at=round(seconds * number / count, 3),
                repeat_after=round(chance.uniform(0, 8), 3) if chance.random() < TWICE else None,
                cancel_after=round(chance.uniform(0, 3), 3) if kind == CANCELLED else None,
            )
        )
    return result


def task_result(number: int, position: int, earlier: list[int]) -> int:
    """Return the result of a task.

    :param number: the number of the order.
    :param earlier: the results of the earlier tasks.
    """
    return (31 * sum(earlier) + 7 * number + position + 1) % LIMIT


def expected_results(order: Order) -> list[int]:
    """Return the results of all tasks of an operation."""
    results: list[int] = []
    for position in range(SIZE):
        results.append(task_result(order.number, position, results))
    return results
