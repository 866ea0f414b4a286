"""Whether the client is in its group, as far as this process can know."""

from __future__ import annotations

import math
from collections.abc import Callable


class Pulse:
    """Signs of life of the client.

    Without one for long, the group may have given the partitions to others: this process was stopped, or starved.

    :param fence: seconds without a sign after which nothing is begun.
    """

    def __init__(self, clock: Callable[[], float], fence: float = math.inf) -> None:
        self._clock = clock
        self._fence = fence
        #: Until when records may be begun, by the clock.
        self.until = clock() + fence

    def beat(self) -> None:
        """The client is in its group."""
        self.until = self._clock() + self._fence

    @property
    def is_weak(self) -> bool:
        """Whether there was no sign for too long."""
        return self._clock() >= self.until
