"""Back-off: the waiting time before the next try, which grows with each failure up to a ceiling."""

from __future__ import annotations

import random


def delay(failures: int, *, first: float, ceiling: float, factor: float = 2.0) -> float:
    """Return the back-off after a failure, in seconds.

    :param failures: the number of consecutive failures, counted from 1.
    :param first: the back-off after the first failure, in seconds.
    :param ceiling: the longest back-off, in seconds.
    :param factor: the factor by which the back-off grows from one failure to the next.
    """
    try:
        return min(first * factor ** (failures - 1), ceiling)
    except OverflowError:
        return ceiling


def random_delay(failures: int, *, first: float, ceiling: float, lowest: float) -> float:
    """Return a random back-off in seconds, between ``lowest`` and the value of :func:`delay`.

    The back-off is random so that several clients do not retry at the same time.
    """
    return random.uniform(lowest, max(lowest, delay(failures, first=first, ceiling=ceiling)))
